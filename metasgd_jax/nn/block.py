"""Batch norm by the batch at hand, and the block that few-shot convolution nets are made of."""

import chex
import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
from jax import lax

from metasgd_jax.nn.conv import conv_general_dilated, max_pool

PART_BYTES = 4 * 2**20  # Of a convolution's output, on a CPU: 1 to 4 MiB were equally fast, 15 MiB a fifth slower.
CHEAP = 32  # Products for each output (h·w·D) up to which a convolution is computed again rather than kept.


def conv_block(
  x: chex.Array,
  kernel: chex.Array,
  scale: chex.Array,
  bias: chex.Array,
  *,
  epsilon: float = 1e-3,
  parts: int | None = None,
  statistics: tuple[chex.Array, chex.Array] | None = None,
) -> chex.Array:
  """Returns relu(max_pool(batch_norm(conv(x, kernel)))), with stride 1, padding 'SAME' and windows of 2×2.

  Batch norm is increasing in a channel whose scale is not negative and decreasing in another, so the winner of a
  window is found before it: m = pool(sign(scale) ∘ y) ∘ sign(scale), and only the winners are normalised,
  scale ∘ (m − mean(y)) / √(var(y) + ε) + bias. ReLU and max-pool commute likewise. Where a scale is exactly 0 all of a
  window are equal, and the derivative by it is that of the largest y; the layers apart would take the first.

  So y itself is needed for its mean and variance only. Where a convolution is cheap and its output large, as that of a
  first layer is, images are taken in parts, y is computed again for the derivatives, and never kept. The parts' means
  and variances make the whole's exactly: var = mean(var_p) + mean((mean_p − mean)²).

  Args:
    x: `[B, H, W, D]`.
    kernel: `[h, w, D, F]`.
    scale: `[F]`, of batch norm.
    bias: `[F]`, of batch norm.
    epsilon: ε.
    parts: how many, a divisor of B; chosen by platform and size where left out (1 but on a CPU).
    statistics: mean and variance to normalise by, `[F]` and `[F]`; those of conv(x, kernel) where left out.

  Returns:
    `[B, H // 2, W // 2, F]`, of x's dtype; statistics are summed in float32 at the least.

  Raises:
    ValueError: parts that do not divide B; images smaller than 2×2.

  Example:
    >>> x, kernel = jnp.zeros((2, 28, 28, 1)), jnp.zeros((3, 3, 1, 8))
    >>> jax.jit(ms.nn.conv_block)(x, kernel, jnp.ones(8), jnp.zeros(8)).shape
    (2, 14, 14, 8)
  """
  return conv_block_and_statistics(x, kernel, scale, bias, epsilon=epsilon, parts=parts, statistics=statistics)[0]


def conv_block_and_statistics(
  x, kernel, scale, bias, *, epsilon=1e-3, parts=None, statistics=None
) -> tuple[chex.Array, tuple[chex.Array, chex.Array]]:
  """Returns `conv_block`'s output, and the mean and variance that it was normalised by."""
  parts = default_parts(x.shape, kernel.shape) if parts is None else parts
  if parts < 1 or x.shape[0] % parts:
    raise ValueError(f'parts must be a divisor of the number of images, {x.shape[0]}, got {parts}')
  sums = jnp.promote_types(x.dtype, jnp.float32)
  sign = jnp.where(scale >= 0, 1, -1).astype(x.dtype).reshape(1, 1, 1, -1)

  def part(x):
    y = conv_general_dilated(x, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
    top = max_pool(y * sign, (2, 2), (2, 2)) * sign
    return *(moments(y.astype(sums)) if statistics is None else statistics), top

  if parts == 1 or statistics is not None:
    mean, variance, top = part(x)
  else:
    again = jax.checkpoint(part, prevent_cse=False)
    means, variances, tops = lax.map(again, x.reshape(parts, -1, *x.shape[1:]))
    mean = jnp.mean(means, 0)
    variance = jnp.mean(variances, 0) + jnp.mean(jnp.square(means - mean[None]), 0)
    top = tops.reshape(-1, *tops.shape[2:])
  return nn.relu(normalise(top, mean, variance, scale, bias, epsilon)), (mean, variance)


def default_parts(images: tuple[int, ...], kernel: tuple[int, ...]) -> int:
  """Returns 1, or on a CPU, for a cheap convolution, a divisor of B that makes parts of about `PART_BYTES`.

  1 as well where B has no divisor near it, is 0, or is not known yet.
  """
  (batch, height, width, depth), (h, w, _, features) = images, kernel
  if jax.export.is_symbolic_dim(batch):  # An exported program may leave their number open.
    return 1
  if jax.default_backend() != 'cpu' or h * w * depth > CHEAP or batch == 0:
    return 1
  least = -(-batch * height * width * features * 4 // PART_BYTES)
  return next((n for n in range(least, min(2 * least + 2, batch + 1)) if batch % n == 0), 1)


def moments(y: chex.Array) -> tuple[chex.Array, chex.Array]:
  """Returns the mean and variance of each channel, `[D]` and `[D]`, over all axes of `[B, …, D]` but the last."""
  axes = tuple(range(y.ndim - 1))
  mean = jnp.mean(y, axes)
  return mean, jnp.mean(jnp.square(y - mean.reshape((1,) * len(axes) + (-1,))), axes)


def normalise(x, mean, variance, scale, bias, epsilon: float) -> chex.Array:
  """Returns scale ∘ (x − mean) / √(variance + ε) + bias, `[B, …, D]`, of x's dtype; the others are `[D]`."""
  channels = (1,) * (x.ndim - 1) + (-1,)
  factor = lax.rsqrt(variance + epsilon) * scale
  out = (x - mean.reshape(channels)) * factor.reshape(channels) + bias.reshape(channels)
  return out.astype(x.dtype)


class BatchNorm(nn.Module):
  """Normalises each channel by the statistics of the batch at hand, or by those that it is given.

  scale ∘ (x − mean) / √(var + ε) + bias, over all axes but the last; no running averages. As MAML's code does, by the
  batch at hand in training and at test: the query items of a task are then normalised together (transductive), so that
  each one's answer depends on the others. Given the support's statistics, each is answered by itself (inductive): they
  are the collection 'statistics', which `Model.statistics` makes and `Model.apply` takes.

  ε = 1e-3 is the default of the layer that MAML's code uses. Statistics are summed in float32 at the least.

  Attributes:
    epsilon: ε, added to the variance.

  Example:
    >>> x = jnp.array([[1.0], [3.0]])
    >>> outputs, variables = ms.nn.BatchNorm().init_with_output(jax.random.key(0), x)
    >>> print(outputs.round(2).ravel())
    [-1.  1.]
  """

  epsilon: float = 1e-3

  @nn.compact
  def __call__(self, x):
    """`[B, …, D]` → the same shape and dtype."""
    scale = self.param('scale', nn.initializers.ones, (x.shape[-1],))
    bias = self.param('bias', nn.initializers.zeros, (x.shape[-1],))
    given = given_statistics(self)
    mean, variance = moments(x.astype(jnp.promote_types(x.dtype, jnp.float32))) if given is None else given
    keep_statistics(self, (mean, variance))
    return normalise(x, mean, variance, scale, bias, self.epsilon)


class ConvBlock(nn.Module):
  """A 3×3 convolution without bias, batch norm, 2×2 max-pool and ReLU: `conv_block` with its parameters.

  The parameters are kernel `[3, 3, D, features]`, scale and bias `[features]`.

  Attributes:
    features: F.
    epsilon: of batch norm.
    dtype: of the activations; where left out, what the input's and the kernel's promote to.

  Example:
    >>> block = ms.nn.ConvBlock(8)
    >>> outputs, variables = block.init_with_output(jax.random.key(0), jnp.zeros((2, 28, 28, 1)))
    >>> outputs.shape
    (2, 14, 14, 8)
  """

  features: int
  epsilon: float = 1e-3
  dtype: chex.ArrayDType | None = None

  @nn.compact
  def __call__(self, x):
    """`[B, H, W, D]` → `[B, H // 2, W // 2, features]`."""
    kernel = self.param('kernel', nn.initializers.glorot_uniform(), (3, 3, x.shape[-1], self.features))
    scale = self.param('scale', nn.initializers.ones, (self.features,))
    bias = self.param('bias', nn.initializers.zeros, (self.features,))
    x = x.astype(self.dtype or jnp.promote_types(x.dtype, kernel.dtype))
    out, statistics = conv_block_and_statistics(
      x, kernel.astype(x.dtype), scale, bias, epsilon=self.epsilon, statistics=given_statistics(self)
    )
    keep_statistics(self, statistics)
    return out


def given_statistics(module: nn.Module) -> tuple[chex.Array, chex.Array] | None:
  """Returns the mean and variance that a layer shall normalise by, or `None` where its batch's own are meant."""
  if module.is_mutable_collection('statistics') or not module.has_variable('statistics', 'mean'):
    return None
  return module.get_variable('statistics', 'mean'), module.get_variable('statistics', 'variance')


def keep_statistics(module: nn.Module, statistics: tuple[chex.Array, chex.Array]) -> None:
  """Keeps a layer's mean and variance where the caller asked for the collection 'statistics'."""
  if module.is_mutable_collection('statistics') and not module.is_initializing():
    for name, value in zip(('mean', 'variance'), statistics, strict=True):
      module.put_variable('statistics', name, value)
