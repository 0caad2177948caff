"""The networks of Li et al. 2017 and Koch et al. 2015."""

from collections.abc import Sequence

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from metasgd_jax.nn.block import ConvBlock
from metasgd_jax.nn.conv import Conv, check_images, max_pool


class MLP(nn.Module):
  """Dense layers with ReLU between them.

  The defaults give the network of the regression tasks, 1-40-40-1 (Li et al. 2017, section 4.1). The initial weights
  are drawn from N(0, 0.01²), truncated at two standard deviations, and the initial biases are zero. These two choices
  are those of reimplementations, because the paper's text about them was not available.

  Attributes:
    hidden: Number of units of each hidden layer.
    outputs: Number of units of the last layer.
    stddev: Standard deviation of the initial weights, before the truncation.

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
    """Maps `[B, D]` to `[B, outputs]`, and raises ValueError for inputs of another rank."""
    if x.ndim != 2:
      raise ValueError(f'MLP takes inputs of shape [B, D], got {x.shape}; reshape the inputs')
    initial = nn.initializers.truncated_normal(self.stddev)
    for units in self.hidden:
      x = nn.relu(nn.Dense(units, kernel_init=initial)(x))
    return nn.Dense(self.outputs, kernel_init=initial)(x)


class Conv4(nn.Module):
  """Four blocks of 3×3 convolution, batch norm, ReLU and 2×2 max-pool, then dense layers to N logits.

  This is the classifier of Li et al. 2017 (section 4.2). For Omniglot it has 64 filters and a fully connected layer of
  32 units. For mini-ImageNet it has 32 filters and no fully connected layer. The convolutions have no bias, because
  batch norm would cancel it. Two choices are ours, because the paper does not state them: a ReLU follows the layer of
  32 units, and the convolutions have Glorot's initial weights, as in MAML.

  Attributes:
    way: Number of classes, N. With `None` the last layer is left out, and the outputs are features `[B, D]`, which
      serve as an embedding.
    filters: Number of filters of each block.
    hidden: Number of units of the fully connected layer. With 0 the layer is left out.
    dtype: Data type of the activations, by default that of θ. With bfloat16, these parts stay in float32: θ, its
      gradient, sums of products, the statistics of batch norm, and the last layer.
    native: Whether to use XLA's own convolutions, which compile faster and are slower in training; see `conv_block`.

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
  native: bool = False

  @nn.compact
  def __call__(self, x):
    """Maps images `[B, H, W, D]` to logits `[B, way]`, or to features.

    Raises:
      ValueError: if the images have another rank, or are smaller than 16×16.
    """
    check_images('Conv4', x, 16, 16)  # The blocks halve the images four times.
    for _ in range(4):
      x = ConvBlock(self.filters, dtype=self.dtype, native=self.native)(x)
    x = x.reshape(x.shape[0], -1)
    if self.hidden:
      x = nn.relu(nn.Dense(self.hidden, dtype=self.dtype)(x))
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return x if self.way is None else nn.Dense(self.way)(x)


class KochNet(nn.Module):
  """The twin network of Koch et al. 2015 (figure 4) for 105×105 drawings, with 39 million parameters.

  The network has four convolutions with ReLU and without padding: 64@10×10, 128@7×7, 128@4×4 and 256@4×4
  (filters@size). A 2×2 max-pool follows each of the first three. The last layer is a dense layer of 4096 units with a
  sigmoid. The initial values are those of the paper: N(0, 0.01²) for the weights of the convolutions, N(0, 0.2²) for
  the weights of the dense layer, and N(0.5, 0.01²) for all biases.

  Example:
    >>> twins = ms.nn.KochNet()
    >>> x = jnp.zeros((1, 105, 105, 1))
    >>> jax.eval_shape(lambda key, x: twins.init_with_output(key, x)[0], jax.random.key(0), x).shape
    (1, 4096)
  """

  @nn.compact
  def __call__(self, x):
    """Maps images `[B, H, W, D]` to features `[B, 4096]`.

    Raises:
      ValueError: if the images have another rank, or are smaller than 65×65 and so leave no output.
    """
    check_images('KochNet', x, 65, 65)
    kernel = nn.initializers.normal(0.01)
    for i, (filters, size) in enumerate(((64, 10), (128, 7), (128, 4), (256, 4))):
      x = nn.relu(Conv(filters, (size, size), padding='VALID', kernel_init=kernel, bias_init=_koch_bias)(x))
      x = max_pool(x, (2, 2), (2, 2)) if i < 3 else x
    x = nn.Dense(4096, kernel_init=nn.initializers.normal(0.2), bias_init=_koch_bias)(x.reshape(x.shape[0], -1))
    return nn.sigmoid(x)


def _koch_bias(key, shape, dtype=jnp.float32):
  return 0.5 + 0.01 * jax.random.normal(key, shape, dtype)
