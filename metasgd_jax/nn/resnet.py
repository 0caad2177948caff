"""ResNet-12, the residual network of the few-shot literature."""

from collections.abc import Sequence

import chex
import flax.linen as nn
import jax.numpy as jnp

from metasgd_jax.nn.block import BatchNorm
from metasgd_jax.nn.conv import Conv, max_pool

SLOPE = 0.1
"""Of leaky ReLU below zero (Lee et al. 2019, section 4.1)."""

_KERNEL = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')  # As Lee et al.'s code has it.


class ResidualBlock(nn.Module):
  """Three 3×3 convolutions, each with batch norm, beside a 1×1 convolution with batch norm; then a 2×2 max-pool.

  Leaky ReLU follows the first two and the sum. The convolutions have no bias.

  Attributes:
    features: F.
    dtype: of the activations; where left out, what the input's and the kernel's promote to.

  Example:
    >>> block = ms.nn.ResidualBlock(8)
    >>> x = jnp.zeros((2, 28, 28, 3))
    >>> jax.eval_shape(lambda key, x: block.init_with_output(key, x)[0], jax.random.key(0), x).shape
    (2, 14, 14, 8)
  """

  features: int
  dtype: chex.ArrayDType | None = None

  @nn.compact
  def __call__(self, x):
    """`[B, H, W, D]` → `[B, H // 2, W // 2, features]`."""

    def conv(x, size):
      x = Conv(self.features, (size, size), use_bias=False, kernel_init=_KERNEL, dtype=self.dtype)(x)
      return BatchNorm()(x)

    shortcut, out = conv(x, 1), x
    for _ in range(2):
      out = nn.leaky_relu(conv(out, 3), SLOPE)
    return max_pool(nn.leaky_relu(conv(out, 3) + shortcut, SLOPE), (2, 2), (2, 2))


class ResNet12(nn.Module):
  """Four residual blocks, a mean over places, and a dense layer to N logits.

  As in TADAM (Oreshkin et al. 2018) and, with these widths, MetaOptNet (Lee et al. 2019, section 4.1): 12.4 million
  parameters and the dense layer's. DropBlock, which their training of a classifier of all classes has, is left out.
  Batch norm is by the batch at hand, or by the support's statistics; see `BatchNorm`.

  Attributes:
    way: N; `None` leaves out the dense layer, so that the outputs are features `[B, D]`: an embedding.
    widths: features of each block.
    dtype: of the activations; θ's where left out. The mean over places and the dense layer stay float32.

  Example:
    >>> module = ms.nn.ResNet12(way=5, widths=(4, 4, 4, 4))
    >>> jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 84, 84, 3)))['params'].keys() != {}
    True
  """

  way: int | None = 5
  widths: Sequence[int] = (64, 160, 320, 640)
  dtype: chex.ArrayDType | None = None

  @nn.compact
  def __call__(self, x):
    """`[B, H, W, D]` → `[B, way]`, or features; raises ValueError for other ranks and for images that are too small."""
    least = 2 ** len(self.widths)
    if x.ndim != 4 or min(x.shape[1:3]) < least:
      raise ValueError(
        f'ResNet12 halves images {len(self.widths)} times, so takes [B, H, W, D] of at least {least}x{least}, '
        f'got {x.shape}'
      )
    for width in self.widths:
      x = ResidualBlock(width, dtype=self.dtype)(x)
    x = jnp.mean(x.astype(jnp.promote_types(x.dtype, jnp.float32)), (1, 2))
    return x if self.way is None else nn.Dense(self.way)(x)
