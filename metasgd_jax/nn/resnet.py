"""ResNet-12, the residual network that is common in few-shot learning."""

from collections.abc import Sequence

import chex
import flax.linen as nn
import jax.numpy as jnp

from metasgd_jax.nn.block import BatchNorm
from metasgd_jax.nn.conv import Conv, check_images, max_pool

SLOPE = 0.1
"""Slope of leaky ReLU for negative inputs (Lee et al. 2019, section 4.1)."""

_KERNEL = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')  # The code of Lee et al. uses this initialiser.


class ResidualBlock(nn.Module):
  """A residual block: three 3×3 convolutions, plus a 1×1 convolution of the input as the shortcut.

  Each convolution is followed by batch norm and has no bias. Leaky ReLU is applied after each of the first two 3×3
  convolutions, and to the sum of the third one and the shortcut. A 2×2 max-pool comes last.

  Attributes:
    features: Number of output channels, F.
    dtype: Data type of the activations. By default it is the type to which the types of input and kernel promote.

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
    """Maps `[B, H, W, D]` to `[B, H // 2, W // 2, features]`."""

    def conv(x, size):
      x = Conv(self.features, (size, size), use_bias=False, kernel_init=_KERNEL, dtype=self.dtype)(x)
      return BatchNorm()(x)

    shortcut, out = conv(x, 1), x
    for _ in range(2):
      out = nn.leaky_relu(conv(out, 3), SLOPE)
    return max_pool(nn.leaky_relu(conv(out, 3) + shortcut, SLOPE), (2, 2), (2, 2))


class ResNet12(nn.Module):
  """Four residual blocks, a mean over all positions, and a dense layer to N logits.

  This is the network of TADAM (Oreshkin et al. 2018) and, with the default widths, of MetaOptNet (Lee et al. 2019,
  section 4.1). It has 12.4 million parameters, without those of the dense layer. DropBlock, a regulariser that
  MetaOptNet uses in its training, is left out. Batch norm uses the statistics of the current batch, or those of the
  support; see `BatchNorm`.

  Attributes:
    way: Number of classes, N. With `None` the dense layer is left out, and the outputs are features `[B, D]`, which
      serve as an embedding.
    widths: Number of features of each block.
    dtype: Data type of the activations, by default that of θ. The mean over all positions and the dense layer stay in
      float32.

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
    """Maps images `[B, H, W, D]` to logits `[B, way]`, or to features.

    Raises:
      ValueError: if the images do not have four axes, or are too small to be halved by each block.
    """
    least = 2 ** len(self.widths)  # Each block halves the images.
    check_images('ResNet12', x, least, least)
    for width in self.widths:
      x = ResidualBlock(width, dtype=self.dtype)(x)
    x = jnp.mean(x.astype(jnp.promote_types(x.dtype, jnp.float32)), (1, 2))
    return x if self.way is None else nn.Dense(self.way)(x)
