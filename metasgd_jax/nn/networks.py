"""The paper's networks, and any flax Linen module, as a `Model`."""

from collections.abc import Sequence

import chex
import flax.linen as nn
import jax.numpy as jnp

from metasgd_jax.nn.block import ConvBlock
from metasgd_jax.types import Model


class MLP(nn.Module):
  """Dense layers with ReLU between them.

  The regression net is 1-40-40-1 (Li et al. 2017, section 4.1). Weights N(0, 0.01²) cut at two deviations and zero
  biases are what reimplementations chose; the paper's text for them was not at hand.

  Attributes:
    hidden: units of each hidden layer.
    outputs: units of the last.
    stddev: of the weights at the start.
  """

  hidden: Sequence[int] = (40, 40)
  outputs: int = 1
  stddev: float = 0.01

  @nn.compact
  def __call__(self, x):
    """`[B, D]` → `[B, outputs]`; raises ValueError for other ranks."""
    if x.ndim != 2:
      raise ValueError(f'MLP takes inputs [B, D], got {x.shape}; reshape them')
    initial = nn.initializers.truncated_normal(self.stddev)
    for units in self.hidden:
      x = nn.relu(nn.Dense(units, kernel_init=initial)(x))
    return nn.Dense(self.outputs, kernel_init=initial)(x)


class Conv4(nn.Module):
  """Four blocks of 3×3 convolution, batch norm, ReLU and 2×2 max-pool, then dense layers to N logits.

  The paper's classifier (section 4.2): 64 filters and a fully connected layer of 32 on Omniglot, 32 filters and none
  on mini-ImageNet. The convolutions have no bias, since batch norm would cancel it. The ReLU after the layer of 32 is
  our reading: the paper does not state it; so are Glorot's weights for the convolutions, which are MAML's.

  Attributes:
    way: N.
    filters: of each block.
    hidden: units of the fully connected layer; 0 leaves it out.
    dtype: of the activations; θ's where left out. With bfloat16, θ, its gradient, all sums, batch norm's statistics and
      the logits stay float32.
  """

  way: int = 5
  filters: int = 64
  hidden: int = 32
  dtype: chex.ArrayDType | None = None

  @nn.compact
  def __call__(self, x):
    """`[B, H, W, D]` → `[B, way]`; raises ValueError for other ranks and for images under 16×16."""
    if x.ndim != 4 or min(x.shape[1:3]) < 16:
      raise ValueError(f'Conv4 halves images four times, so takes [B, H, W, D] of at least 16x16, got {x.shape}')
    for _ in range(4):
      x = ConvBlock(self.filters, dtype=self.dtype)(x)
    x = x.reshape(x.shape[0], -1)
    if self.hidden:
      x = nn.relu(nn.Dense(self.hidden, dtype=self.dtype)(x))
    logits = nn.Dense(self.way, dtype=self.dtype)(x)
    return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))


def from_linen(module: nn.Module) -> Model:
  """Returns a Linen module that has parameters only as a `Model`; θ is its 'params' collection.

  Raises (from `init`):
    ValueError: the module has other collections, such as running averages.
  """

  def init(key, x):
    variables = module.init(key, jnp.asarray(x))
    others = sorted(set(variables) - {'params'})
    if others:
      raise ValueError(
        f"{type(module).__name__} has the collections {others} besides 'params'; "
        'a Model is a pure function of its parameters (use nn.BatchNorm of this package for batch statistics)'
      )
    return variables['params']

  def apply(theta, x):
    return module.apply({'params': theta}, x)

  return Model(init, apply)
