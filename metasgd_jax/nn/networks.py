"""The paper's networks, and any flax Linen module, as a `Model`."""

from collections.abc import Sequence

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from metasgd_jax.nn.block import ConvBlock
from metasgd_jax.nn.conv import Conv, max_pool
from metasgd_jax.types import Model


class MLP(nn.Module):
  """Dense layers with ReLU between them.

  The regression net is 1-40-40-1 (Li et al. 2017, section 4.1). Weights N(0, 0.01²) cut at two deviations and zero
  biases are what reimplementations chose; the paper's text for them was not at hand.

  Attributes:
    hidden: units of each hidden layer.
    outputs: units of the last.
    stddev: of the weights at the start.

  Example:
    >>> model = ms.nn.from_linen(ms.nn.MLP(hidden=(8,), outputs=2))
    >>> theta = model.init(jax.random.key(0), jnp.zeros((1, 3)))
    >>> model.apply(theta, jnp.zeros((5, 3))).shape
    (5, 2)
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
    way: N; `None` leaves out the last layer, so that the outputs are features `[B, D]`: an embedding.
    filters: of each block.
    hidden: units of the fully connected layer; 0 leaves it out.
    dtype: of the activations; θ's where left out. With bfloat16, θ, its gradient, sums of products, batch norm's
      statistics and the last layer stay float32.

  Example:
    >>> model = ms.nn.from_linen(ms.nn.Conv4(way=5, filters=8))
    >>> theta = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
    >>> jax.jit(model.apply)(theta, jnp.zeros((3, 28, 28, 1))).shape
    (3, 5)
  """

  way: int | None = 5
  filters: int = 64
  hidden: int = 32
  dtype: chex.ArrayDType | None = None

  @nn.compact
  def __call__(self, x):
    """`[B, H, W, D]` → `[B, way]`, or features; raises ValueError for other ranks and for images under 16×16."""
    if x.ndim != 4 or min(x.shape[1:3]) < 16:
      raise ValueError(f'Conv4 halves images four times, so takes [B, H, W, D] of at least 16x16, got {x.shape}')
    for _ in range(4):
      x = ConvBlock(self.filters, dtype=self.dtype)(x)
    x = x.reshape(x.shape[0], -1)
    if self.hidden:
      x = nn.relu(nn.Dense(self.hidden, dtype=self.dtype)(x))
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return x if self.way is None else nn.Dense(self.way)(x)


class KochNet(nn.Module):
  """The twins of Koch et al. 2015 (figure 4): for 105×105 drawings, 39 million parameters.

  Convolutions 64@10×10, 128@7×7, 128@4×4 and 256@4×4 without padding, with ReLU, and 2×2 max-pools after the first
  three; then a layer of 4096 with a sigmoid. Weights as there: N(0, 0.01²) of convolutions, N(0, 0.2²) of the dense
  layer, biases N(0.5, 0.01²).

  Example:
    >>> twins = ms.nn.KochNet()
    >>> x = jnp.zeros((1, 105, 105, 1))
    >>> jax.eval_shape(lambda key, x: twins.init_with_output(key, x)[0], jax.random.key(0), x).shape
    (1, 4096)
  """

  @nn.compact
  def __call__(self, x):
    """`[B, H, W, D]` → features `[B, 4096]`; raises ValueError for images under 65×65, of which nothing is left."""
    if x.ndim != 4 or min(x.shape[1:3]) < 65:
      raise ValueError(f'KochNet takes images [B, H, W, D] of at least 65x65 (the paper: 105x105), got {x.shape}')
    bias = lambda key, shape, dtype=jnp.float32: 0.5 + 0.01 * jax.random.normal(key, shape, dtype)
    for i, (filters, size) in enumerate(((64, 10), (128, 7), (128, 4), (256, 4))):
      kernel = nn.initializers.normal(0.01)
      x = nn.relu(Conv(filters, (size, size), padding='VALID', kernel_init=kernel, bias_init=bias)(x))
      x = max_pool(x, (2, 2), (2, 2)) if i < 3 else x
    x = nn.Dense(4096, kernel_init=nn.initializers.normal(0.2), bias_init=bias)(x.reshape(x.shape[0], -1))
    return nn.sigmoid(x)


def from_linen(module: nn.Module) -> Model:
  """Returns a Linen module that has parameters only as a `Model`; θ is its 'params' collection.

  Its `statistics` are the collection of that name, which `nn.BatchNorm` and `nn.ConvBlock` fill and obey.

  Raises (from `init`):
    ValueError: the module has other collections, such as running averages.

  Example:
    >>> model = ms.nn.from_linen(ms.nn.MLP())
    >>> list(model.init(jax.random.key(0), jnp.zeros((1, 1))))
    ['Dense_0', 'Dense_1', 'Dense_2']
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

  def apply(theta, x, statistics=None):
    given = {} if statistics is None else {'statistics': statistics}
    return module.apply({'params': theta, **given}, x)

  def statistics(theta, x):
    return module.apply({'params': theta}, x, mutable=['statistics'])[1].get('statistics', {})

  return Model(init, apply, statistics)
