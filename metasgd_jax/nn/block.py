"""Batch norm with the statistics of the current batch, and the convolution block of few-shot networks."""

import chex
import flax.linen as nn
import jax.numpy as jnp
from jax import lax

from metasgd_jax.nn import few_channels
from metasgd_jax.nn.conv import conv_general_dilated, max_pool


def conv_block(
  x: chex.Array,
  kernel: chex.Array,
  scale: chex.Array,
  bias: chex.Array,
  *,
  epsilon: float = 1e-3,
  statistics: tuple[chex.Array, chex.Array] | None = None,
  native: bool = False,
) -> chex.Array:
  """Returns relu(max_pool(batch_norm(conv(x, kernel)))), with stride 1, padding 'SAME' and windows of 2×2.

  Let y = conv(x, kernel). The output of batch norm increases with y if the scale of the channel is positive, and
  decreases with y if the scale is negative. The winner of a window, which is the value that max-pool selects, can
  therefore be found before batch norm: m = pool(sign(scale) ∘ y) ∘ sign(scale), where sign(0) = 1. Only the winners
  are normalised: scale ∘ (m − mean(y)) / √(var(y) + ε) + bias. ReLU never decreases, so it gives the same result before
  and after max-pool.

  If a scale is exactly 0, all values of a window are equal after batch norm, so that each of them could be the winner.
  The choice does not change the output, but it changes the derivative with respect to the scale. This function chooses
  the largest y of the window, and separate layers would choose the first y.

  The array y itself is needed only for its mean and variance. If images have few channels, as in a first layer, y is
  never stored on a CPU; see `nn.few_channels`.

  Args:
    x: Images, `[B, H, W, D]`.
    kernel: Kernel of the convolution, `[h, w, D, F]`.
    scale: Scale of batch norm, `[F]`.
    bias: Bias of batch norm, `[F]`.
    epsilon: Constant ε that is added to the variance.
    statistics: Mean and variance to normalise with, `[F]` and `[F]`. By default they are those of conv(x, kernel).
    native: Whether to use XLA's own convolution. On a CPU, it compiles in a fraction of the time, but it is slower for
      many images, for many tasks, for second derivatives, and above all in loops. The result differs by rounding only.

  Returns:
    `[B, H // 2, W // 2, F]`, of x's dtype. Statistics are summed in float32 or a wider type.

  Raises:
    ValueError: if the images are smaller than 2×2.

  Example:
    >>> x, kernel = jnp.zeros((2, 28, 28, 1)), jnp.zeros((3, 3, 1, 8))
    >>> jax.jit(ms.nn.conv_block)(x, kernel, jnp.ones(8), jnp.zeros(8)).shape
    (2, 14, 14, 8)
  """
  return conv_block_and_statistics(x, kernel, scale, bias, epsilon=epsilon, statistics=statistics, native=native)[0]


def conv_block_and_statistics(x, kernel, scale, bias, *, epsilon=1e-3, statistics=None, native=False) -> tuple:
  """Returns the output of `conv_block`, and the pair (mean, variance) that batch norm used."""
  sign = jnp.where(scale >= 0, 1, -1).astype(x.dtype).reshape(1, 1, 1, -1)
  if not native and few_channels.suits(x.shape, kernel.shape):
    top, mean, variance = few_channels.winners_and_moments(x, kernel * sign)
    mean = mean * sign.ravel()
  else:
    conv = lax.conv_general_dilated if native else conv_general_dilated
    y = conv(x, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
    top = max_pool(y * sign, (2, 2), (2, 2))
    mean, variance = moments(y.astype(jnp.promote_types(x.dtype, jnp.float32)))
  mean, variance = (mean, variance) if statistics is None else statistics
  top = top * sign
  return nn.relu(normalise(top, mean, variance, scale, bias, epsilon)), (mean, variance)


def moments(y: chex.Array) -> tuple[chex.Array, chex.Array]:
  """Returns the mean and variance of each channel, `[D]` and `[D]`, over all axes of `[B, …, D]` except the last."""
  axes = tuple(range(y.ndim - 1))
  mean = jnp.mean(y, axes)
  return mean, jnp.mean(jnp.square(y - mean.reshape((1,) * len(axes) + (-1,))), axes)


def normalise(x, mean, variance, scale, bias, epsilon: float) -> chex.Array:
  """Returns scale ∘ (x − mean) / √(variance + ε) + bias in x's dtype. x is `[B, …, D]`, the other arrays are `[D]`."""
  channels = (1,) * (x.ndim - 1) + (-1,)
  factor = lax.rsqrt(variance + epsilon) * scale
  out = (x - mean.reshape(channels)) * factor.reshape(channels) + bias.reshape(channels)
  return out.astype(x.dtype)


class BatchNorm(nn.Module):
  """Normalises each channel with the statistics of the current batch, or with given statistics.

  The layer computes scale ∘ (x − mean) / √(var + ε) + bias, with the mean and variance over all axes except the last.
  There are no running averages. By default the layer uses the current batch in training and at test time, as MAML's
  code does. The query items of a task are then normalised together, so that each prediction depends on the other query
  items (transductive). If the layer receives the statistics of the support, the prediction for each query item does not
  depend on the others (inductive). To obtain the statistics of the support, call `Model.statistics` with it. The result
  is the collection 'statistics', which `Model.apply` takes.

  ε = 1e-3 is the default of the layer that MAML's code uses. Statistics are summed in float32 or a wider type.

  Attributes:
    epsilon: Constant ε that is added to the variance.

  Example:
    >>> x = jnp.array([[1.0], [3.0]])
    >>> outputs, variables = ms.nn.BatchNorm().init_with_output(jax.random.key(0), x)
    >>> print(outputs.round(2).ravel())
    [-1.  1.]
  """

  epsilon: float = 1e-3

  @nn.compact
  def __call__(self, x):
    """Maps `[B, …, D]` to the same shape and dtype."""
    scale = self.param('scale', nn.initializers.ones, (x.shape[-1],))
    bias = self.param('bias', nn.initializers.zeros, (x.shape[-1],))
    given = given_statistics(self)
    mean, variance = moments(x.astype(jnp.promote_types(x.dtype, jnp.float32))) if given is None else given
    keep_statistics(self, (mean, variance))
    return normalise(x, mean, variance, scale, bias, self.epsilon)


class ConvBlock(nn.Module):
  """A layer of 3×3 convolution without bias, batch norm, 2×2 max-pool and ReLU, computed by `conv_block`.

  The parameters are the kernel `[3, 3, D, features]`, and the scale and the bias of batch norm, each `[features]`.

  Attributes:
    features: Number of filters, F.
    epsilon: Constant ε that batch norm adds to the variance.
    dtype: Data type of the activations. By default it is the type to which the types of input and kernel promote.
    native: Whether to use XLA's own convolution; see `conv_block`.

  Example:
    >>> block = ms.nn.ConvBlock(8)
    >>> outputs, variables = block.init_with_output(jax.random.key(0), jnp.zeros((2, 28, 28, 1)))
    >>> outputs.shape
    (2, 14, 14, 8)
  """

  features: int
  epsilon: float = 1e-3
  dtype: chex.ArrayDType | None = None
  native: bool = False

  @nn.compact
  def __call__(self, x):
    """Maps `[B, H, W, D]` to `[B, H // 2, W // 2, features]`."""
    kernel = self.param('kernel', nn.initializers.glorot_uniform(), (3, 3, x.shape[-1], self.features))
    scale = self.param('scale', nn.initializers.ones, (self.features,))
    bias = self.param('bias', nn.initializers.zeros, (self.features,))
    x = x.astype(self.dtype or jnp.promote_types(x.dtype, kernel.dtype))
    options = dict(epsilon=self.epsilon, statistics=given_statistics(self), native=self.native)
    out, statistics = conv_block_and_statistics(x, kernel.astype(x.dtype), scale, bias, **options)
    keep_statistics(self, statistics)
    return out


def given_statistics(module: nn.Module) -> tuple[chex.Array, chex.Array] | None:
  """Returns the mean and variance that the caller gave to a layer, or `None` if it must use those of its batch."""
  if module.is_mutable_collection('statistics') or not module.has_variable('statistics', 'mean'):
    return None
  return module.get_variable('statistics', 'mean'), module.get_variable('statistics', 'variance')


def keep_statistics(module: nn.Module, statistics: tuple[chex.Array, chex.Array]) -> None:
  """Stores the mean and variance of a layer if the caller asked for the collection 'statistics'."""
  if module.is_mutable_collection('statistics') and not module.is_initializing():
    for name, value in zip(('mean', 'variance'), statistics, strict=True):
      module.put_variable('statistics', name, value)
