"""Convolution and max-pooling with fast second derivatives, as drop-in replacements for those of lax and flax.

The convolution is also fast when it is vmapped over kernels.
"""

from collections.abc import Callable, Sequence
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from metasgd_jax.nn import bilinear


def conv_general_dilated(
  lhs: chex.Array,
  rhs: chex.Array,
  window_strides: Sequence[int],
  padding: str | Sequence[tuple[int, int]],
  lhs_dilation: Sequence[int] | None = None,
  rhs_dilation: Sequence[int] | None = None,
  dimension_numbers: Any = None,
  feature_group_count: int = 1,
  batch_group_count: int = 1,
  precision: Any = None,
  preferred_element_type: Any = None,
) -> chex.Array:
  """Returns the result of `jax.lax.conv_general_dilated`, and takes the same arguments.

  In one or two spatial dimensions the convolution is fast, and so are its derivatives of every order, forward and
  reverse (see `nn.bilinear`). This includes every layout and all strides, paddings and dilations. In the following
  cases the function calls lax, whose second derivatives are slow on a CPU: groups, three dimensions, integers of any
  size, floats of fewer than 16 bits, empty arrays, arrays sharded over an explicit mesh axis, or a
  `preferred_element_type`.

  On a CPU, large 3×3 convolutions in float32 and float64 use Winograd's algorithm. The rounding error of an output is
  then proportional to the largest input of its 4×4 tile. With lax it is proportional to the largest of the 3×3 inputs
  from which the output is computed. Near inputs that are not finite, or close to overflow, more outputs are NaN or
  infinite than with lax.

  Args:
    lhs: Images, `[B, D, H, W]` unless `dimension_numbers` gives another layout, such as 'NHWC'.
    rhs: Kernel, `[F, D, h, w]` unless `dimension_numbers` gives another layout.
    window_strides: Strides along the spatial dimensions.
    padding: Padding of the images: 'SAME', 'SAME_LOWER', 'VALID', or a pair (before, after) for each spatial dimension.
    lhs_dilation: Dilation of the images, for a transposed convolution.
    rhs_dilation: Dilation of the kernel, for an atrous convolution.
    dimension_numbers: Layouts of the images, the kernel and the output, as in lax.
    feature_group_count: Number of groups of the features, as in lax.
    batch_group_count: Number of groups of the batch, as in lax.
    precision: Precision of the products, as in lax.
    preferred_element_type: Data type of the sums and of the result, as in lax.

  Returns:
    `[B, F, H', W']`, or the layout that `dimension_numbers` gives.

  Raises:
    ValueError: if the kernel is larger than the padded images, or if a stride or dilation is below 1.
    ValueError, TypeError: if the shapes do not fit; these errors come from lax.

  Example:
    >>> x, kernel = jnp.zeros((2, 28, 28, 1)), jnp.zeros((3, 3, 1, 8))
    >>> ms.nn.conv_general_dilated(x, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')).shape
    (2, 28, 28, 8)
  """
  steps = {'window_strides': window_strides, 'lhs_dilation': lhs_dilation, 'rhs_dilation': rhs_dilation}
  for name, values in steps.items():
    if values is not None and any(value < 1 for value in values):
      raise ValueError(f'{name} must be at least 1 along each dimension, got {tuple(values)}')
  window = window_strides, padding, lhs_dilation, rhs_dilation
  others = feature_group_count, batch_group_count, precision, preferred_element_type

  def by_lax(lhs, rhs):
    return lax.conv_general_dilated(lhs, rhs, *window, dimension_numbers, *others)

  out = jax.eval_shape(by_lax, lhs, rhs)  # This also runs the checks of lax.
  numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
  if not all(out.shape[i] for i in numbers.out_spec[2:]):
    raise ValueError(
      f'kernel {rhs.shape} is larger than the images {lhs.shape} with padding {padding!r}; pad or enlarge the images'
    )
  grouped = feature_group_count != 1 or batch_group_count != 1
  if grouped or preferred_element_type is not None or not _suits_bilinear(lhs, rhs, out.dtype):
    return by_lax(lhs, rhs)
  y = _by_bilinear(lhs, rhs, numbers, window, precision)
  place = (numbers.out_spec[0], *numbers.out_spec[2:], numbers.out_spec[1])  # Axes of B, H, W and F.
  return jnp.transpose(y, tuple(place.index(i) for i in range(y.ndim)))


def _suits_bilinear(lhs, rhs, dtype) -> bool:
  """Returns whether images and kernel have a form that `bilinear.conv` accepts, for an output of the given dtype."""
  inexact = jnp.issubdtype(dtype, jnp.inexact) and dtype.itemsize > 1
  sharded = any(axis is not None for a in (lhs, rhs) for axis in jax.typeof(a).sharding.spec)
  return inexact and not sharded and lhs.ndim in (3, 4) and all((*lhs.shape, *rhs.shape))


def _by_bilinear(lhs, rhs, numbers, window, precision):
  """Returns the result of `bilinear.conv`: `[B, H', W', F]`, or `[B, W', F]` if there is one spatial dimension."""
  (batch, depth, *image), (features, inputs, *kernel) = numbers.lhs_spec, numbers.rhs_spec
  x, k = jnp.transpose(lhs, (batch, *image, depth)), jnp.transpose(rhs, (*kernel, inputs, features))
  strides, padding, x_dilation, kernel_dilation = window
  ones = (1,) * len(image)
  strides, x_dilation, kernel_dilation = tuple(strides), tuple(x_dilation or ones), tuple(kernel_dilation or ones)
  if isinstance(padding, str):
    reach = [(n - 1) * d + 1 for n, d in zip(k.shape[:-2], kernel_dilation, strict=True)]
    padding = lax.padtype_to_pads(x.shape[1:-1], reach, strides, padding)
  edges = tuple((int(low), int(high)) for low, high in padding)
  if len(image) == 2:
    return bilinear.conv(x, k, bilinear.Window(strides, edges, x_dilation, kernel_dilation), precision)
  flat = bilinear.Window((1, *strides), ((0, 0), *edges), (1, *x_dilation), (1, *kernel_dilation))
  return bilinear.conv(x[:, None], k[None], flat, precision)[:, 0]


class Conv(nn.Conv):
  """`flax.linen.Conv` computed by `conv_general_dilated`, with the same arguments, parameters and results.

  The paddings 'CIRCULAR', 'REFLECT' and 'CAUSAL', masks and dtypes work as in flax. With groups or three spatial
  dimensions the layer is as slow as the layer of flax. All fields are documented at `flax.linen.Conv`: features,
  kernel_size, strides, padding, input_dilation, kernel_dilation, feature_group_count, use_bias, mask, dtype,
  param_dtype, precision, kernel_init, bias_init, promote_dtype, preferred_element_type, conv_general_dilated_cls.

  Example:
    >>> outputs, variables = ms.nn.Conv(8, (3, 3)).init_with_output(jax.random.key(0), jnp.zeros((2, 28, 28, 1)))
    >>> outputs.shape, variables['params']['kernel'].shape
    ((2, 28, 28, 8), (3, 3, 1, 8))
  """

  conv_general_dilated: Callable[..., Any] | None = conv_general_dilated


def max_pool(
  inputs: chex.Array,
  window_shape: Sequence[int],
  strides: Sequence[int] | None = None,
  padding: str | Sequence[tuple[int, int]] = 'VALID',
) -> chex.Array:
  """Returns the result of `flax.linen.max_pool`, and takes the same arguments.

  The fast case is images with windows that do not overlap: the strides equal the window, and the padding is 'VALID'.
  The winner of a window is its largest value. The index of each winner is stored, and derivatives of every order select
  the winner by its index. If values are equal, the first one in row-major order wins; a NaN always wins. The
  derivatives do not compare the values with their maximum, because XLA may compute the values and the maximum in
  different fusions, which round differently. Then no value might equal the maximum, and the gradient would be lost. All
  other cases use the function of flax, whose derivatives are slow.

  Args:
    inputs: Images `[B, H, W, D]`, or any other shape that flax takes.
    window_shape: Height and width of the window, (h, w).
    strides: Strides of the window. The default is that of flax, (1, 1).
    padding: Padding, as in flax.

  Returns:
    `[B, H // h, W // w, D]` in the fast case. A remainder at the edge is left out.

  Raises:
    ValueError: if the images are smaller than the window.

  Example:
    >>> ms.nn.max_pool(jnp.arange(16.0).reshape(1, 4, 4, 1), (2, 2), (2, 2)).reshape(2, 2)
    Array([[ 5.,  7.],
           [13., 15.]], dtype=float32)
  """
  window = tuple(window_shape)
  if inputs.ndim != 4 or len(window) != 2 or padding != 'VALID' or strides is None or tuple(strides) != window:
    return nn.max_pool(inputs, window, strides, padding)
  (batch, height, width, depth), (h, w) = inputs.shape, window
  check_images(f'max_pool with the window {window}', inputs, h, w)
  rows, columns = height // h, width // w
  return _pool(inputs[:, : rows * h, : columns * w].reshape(batch, rows, h, columns, w, depth))


def check_images(name: str, x: chex.Array, height: int, width: int) -> None:
  """Raises ValueError unless x has the shape `[B, H, W, D]`, with at least the given height and width."""
  if x.ndim != 4 or x.shape[1] < height or x.shape[2] < width:
    least = f'{height}x{width}'
    raise ValueError(f'{name} takes images [B, H, W, D] of at least {least}, got {x.shape}; reshape or resize them')


@jax.custom_jvp
def _pool(x):
  """Returns the largest value of each window of h × w pixels: maps `[B, H, h, W, w, D]` to `[B, H, W, D]`."""
  return _winner(x)[0]


@_pool.defjvp
def _pool_jvp(primals, tangents):
  (x,), (dx,) = primals, tangents
  value, index = _winner(x)
  h, w = x.shape[2], x.shape[4]
  places = jnp.arange(h * w, dtype=index.dtype).reshape(1, 1, h, 1, w, 1)
  won = index[:, :, None, :, None] == places
  return value, jnp.sum(jnp.where(won, dx, jnp.zeros((), dx.dtype)), (2, 4))


def _winner(x):
  h, w = x.shape[2], x.shape[4]
  return largest([x[:, :, place // w, :, place % w] for place in range(h * w)])


def largest(
  candidates: Sequence[chex.Array], index_dtype: chex.ArrayDType = jnp.int32
) -> tuple[chex.Array, chex.Array]:
  """Returns the largest value among arrays of one shape at each place, and the index of its array.

  If values are equal, the first one wins. A NaN always wins.
  """
  value, index = candidates[0], jnp.zeros((), index_dtype)
  for place, other in enumerate(candidates[1:], 1):
    stays = (value >= other) | jnp.isnan(value)
    value, index = jnp.where(stays, value, other), jnp.where(stays, index, jnp.asarray(place, index_dtype))
  return value, jnp.broadcast_to(index, value.shape)
