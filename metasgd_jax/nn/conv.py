"""Convolution and pooling that stay matrix products under vmap over kernels and under second derivatives.

`lax.conv` with a kernel for each task becomes a grouped convolution, whose second derivatives XLA's CPU back end runs
with generic loops; `reduce_window`'s gradient is slow too. Here a convolution is a matrix product over patches, and
pooling is a maximum over slices, so derivatives of every order are products, slices and pads.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import chex
import flax.linen as nn
import jax.numpy as jnp
from jax import lax

Padding = str | Sequence[tuple[int, int]]


def conv(
  x: chex.Array, kernel: chex.Array, *, strides: Sequence[int] = (1, 1), padding: Padding = 'SAME'
) -> chex.Array:
  """Returns the 2-D cross-correlation of x with kernel, as `lax.conv_general_dilated` in NHWC, HWIO.

  Args:
    x: `[B, H, W, D]`.
    kernel: `[h, w, D, F]`.
    strides: along H and W.
    padding: 'SAME', 'VALID', or (before, after) for H and W.

  Returns:
    `[B, H', W', F]`.

  Raises:
    ValueError: ranks other than 4, kernel's D is not x's, or a kernel larger than the padded image.
  """
  if x.ndim != 4 or kernel.ndim != 4:
    raise ValueError(f'conv takes x [B, H, W, D] and kernel [h, w, D, F], got {x.shape} and {kernel.shape}')
  height, width, depth, features = kernel.shape
  if x.shape[-1] != depth:
    raise ValueError(f'kernel {kernel.shape} expects {depth} channels, got images of shape {x.shape}')
  if isinstance(padding, str):
    padding = lax.padtype_to_pads(x.shape[1:3], (height, width), tuple(strides), padding)
  x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
  if height > x.shape[1] or width > x.shape[2]:
    raise ValueError(f'kernel {kernel.shape} is larger than the padded images {x.shape}; pad more, or give larger ones')
  rows, columns = strides
  out_h = (x.shape[1] - height) // rows + 1
  out_w = (x.shape[2] - width) // columns + 1
  patches = [
    x[:, i : i + (out_h - 1) * rows + 1 : rows, j : j + (out_w - 1) * columns + 1 : columns]
    for i in range(height)
    for j in range(width)
  ]
  return jnp.concatenate(patches, axis=-1) @ kernel.reshape(-1, features)


def max_pool(x: chex.Array, *, window: Sequence[int] = (2, 2)) -> chex.Array:
  """Returns the maximum over windows that do not overlap; a remainder at the edge is left out.

  `where(a >= b, a, b)` sends the whole gradient to the first of equal values, whatever XLA fuses around it.
  Comparing x with its maximum does not: the two sides may be rounded apart, and the gradient is lost. A NaN may be
  passed over.

  Args:
    x: `[B, H, W, D]`.
    window: (h, w), which is the stride as well.

  Returns:
    `[B, H // h, W // w, D]`.

  Raises:
    ValueError: images of another rank, or smaller than the window.
  """
  h, w = window
  if x.ndim != 4 or x.shape[1] < h or x.shape[2] < w:
    raise ValueError(f'max_pool takes images [B, H, W, D] of at least {h}x{w}, got {x.shape}')
  rows, columns = x.shape[1] // h * h, x.shape[2] // w * w
  slices = [x[:, i:rows:h, j:columns:w] for i in range(h) for j in range(w)]
  return functools.reduce(lambda a, b: jnp.where(a >= b, a, b), slices)


class Conv(nn.Module):
  """`flax.linen.Conv` for 2-D, through `conv`; the same parameters under the same names.

  Attributes:
    features: F.
    kernel_size: (h, w).
    strides: along H and W.
    padding: as `conv`.
    use_bias: whether to add a bias `[F]`.
    kernel_init: of the kernel `[h, w, D, F]`.
  """

  features: int
  kernel_size: Sequence[int] = (3, 3)
  strides: Sequence[int] = (1, 1)
  padding: Padding = 'SAME'
  use_bias: bool = True
  kernel_init: Callable[..., Any] = nn.initializers.lecun_normal()

  @nn.compact
  def __call__(self, x):
    """`[B, H, W, D]` → `[B, H', W', F]`."""
    kernel = self.param('kernel', self.kernel_init, (*self.kernel_size, x.shape[-1], self.features))
    x = conv(x, kernel, strides=self.strides, padding=self.padding)
    if self.use_bias:
      x = x + self.param('bias', nn.initializers.zeros, (self.features,)).reshape(1, 1, 1, -1)
    return x


class BatchNorm(nn.Module):
  """Normalises each channel by the statistics of the batch at hand, in training and at test (transductive).

  scale ∘ (x − mean) / √(var + ε) + bias, over all axes but the last; no running averages. As MAML's code does; the
  query items of a task are thus normalised together. ε = 1e-3 is the default of the layer that MAML's code uses.
  """

  epsilon: float = 1e-3

  @nn.compact
  def __call__(self, x):
    """`[B, …, D]` → the same shape."""
    axes = tuple(range(x.ndim - 1))
    channels = (1,) * len(axes) + (x.shape[-1],)
    scale = self.param('scale', nn.initializers.ones, (x.shape[-1],)).reshape(channels)
    bias = self.param('bias', nn.initializers.zeros, (x.shape[-1],)).reshape(channels)
    centred = x - jnp.mean(x, axes, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axes, keepdims=True)
    return centred * (lax.rsqrt(variance + self.epsilon) * scale) + bias
