"""A 3×3 convolution of images with few channels and the 2×2 max-pool after it, one window of the pool at a time.

A first layer has few products for each output, so a CPU spends its time on memory. The form here reads and writes as
little as possible:

- The four outputs of a window depend on the 4×4 pixels under it. These pixels are a row of 16·D numbers, the tile t.
  The outputs are one product t K with a wide kernel K, `[16·D, 4·F]`, which has each 3×3 kernel at four places.
- Only the winner of each window is kept, and its index. The derivative with respect to the kernel needs the tiles and
  the index, so the outputs are never stored. Tiles are computed again, because that is cheaper than reading them.
- The mean and variance of all outputs follow from those of the tiles, m and C: the mean of t K is m K, and its variance
  is the diagonal of Kᵀ C K. They are sums over 16·D numbers, and so are their derivatives.

Images are processed one after another, so that the outputs of an image stay in the cache.
"""

import functools

import chex
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero

from metasgd_jax.nn.conv import largest

PRODUCTS = 32
"""Largest number of products for each output, 9·D, for which this form is used."""


def suits(images: tuple[int, ...], kernel: tuple[int, ...]) -> bool:
  """Returns whether this form is used for images `[B, H, W, D]` and a kernel `[h, w, D, F]`.

  It is used on a CPU, for 3×3 kernels and few channels, if H and W are even.
  """
  few = kernel[:2] == (3, 3) and 9 * kernel[2] <= PRODUCTS
  return few and all(n % 2 == 0 for n in images[1:3]) and jax.default_backend() == 'cpu'


def winners_and_moments(x: chex.Array, kernel: chex.Array) -> tuple[chex.Array, chex.Array, chex.Array]:
  """Returns max_pool(y), and the mean and variance of each channel of y = conv(x, kernel).

  The convolution has stride 1 and padding 'SAME', and the windows are 2×2. If outputs of a window are equal, the first
  one in row-major order wins. A NaN always wins.

  Args:
    x: Images, `[B, H, W, D]`, with even H and W.
    kernel: Kernel, `[3, 3, D, F]`.

  Returns:
    The winners, `[B, H // 2, W // 2, F]`, of x's dtype, the mean, `[F]`, and the variance, `[F]`, in float32 or a wider
    type.
  """
  wide = _wide(kernel)
  one_image = lambda image: (_winners(image, wide)[0], *_moments_of_tiles(image))
  is_open = jax.export.is_symbolic_dim(x.shape[0])  # A program may be exported for any number of images.
  top, means, covariances = jax.vmap(one_image)(x) if is_open else lax.map(one_image, x)
  mean = jnp.mean(means, 0)
  apart = means - mean[None]
  covariance = jnp.mean(covariances, 0) + apart.T @ apart / apart.shape[0]
  wide = wide.astype(mean.dtype)
  each_mean = (mean @ wide).reshape(4, -1)  # For each of the four places in a window.
  each_variance = jnp.sum(wide * (covariance @ wide), 0).reshape(4, -1)
  mean = jnp.mean(each_mean, 0)
  variance = jnp.mean(each_variance + jnp.square(each_mean - mean[None]), 0)
  return top.reshape(x.shape[0], x.shape[1] // 2, x.shape[2] // 2, -1), mean, variance


def _wide(kernel):
  """Returns the wide kernel, `[16·D, 4·F]`: the kernel at the four places in a tile of 4×4 pixels."""
  places = [jnp.pad(kernel, ((i, 1 - i), (j, 1 - j), (0, 0), (0, 0))) for i in range(2) for j in range(2)]
  depth, features = kernel.shape[2:]
  wide = jnp.stack(places, -2).reshape(2, 2, 2, 2, depth, 4, features)
  return jnp.swapaxes(wide, 1, 2).reshape(16 * depth, 4 * features)


def _tiles(image):
  """Returns the tiles of an image `[H, W, D]`, `[H // 2 · W // 2, 16·D]`.

  A tile consists of four blocks of 2×2 pixels, because blocks are longer pieces of memory than pixels.
  """
  rows, columns = image.shape[0] // 2, image.shape[1] // 2
  padded = jnp.pad(image, ((1, 1), (1, 1), (0, 0)))
  blocks = padded.reshape(rows + 1, 2, columns + 1, -1).swapaxes(1, 2).reshape(rows + 1, columns + 1, -1)
  four = [blocks[i : i + rows, j : j + columns] for i in range(2) for j in range(2)]
  return jnp.concatenate(four, -1).reshape(rows * columns, -1)


def _outputs(image, wide):
  """Returns the four outputs of each window, `[P, 4, F]`, for P windows of an image."""
  sums = jnp.promote_types(image.dtype, jnp.float32)
  y = jnp.matmul(_tiles(image), wide, preferred_element_type=sums)
  return y.astype(image.dtype).reshape(y.shape[0], 4, -1)


def _moments_of_tiles(image):
  """Returns the mean and the covariance matrix of the tiles of an image, `[16·D]` and `[16·D, 16·D]`."""
  tiles = _tiles(image.astype(jnp.promote_types(image.dtype, jnp.float32)))
  mean = jnp.mean(tiles, 0)
  apart = tiles - mean[None]
  return mean, apart.T @ apart / tiles.shape[0]


@jax.custom_jvp
def _winners(image, wide):
  """Returns the largest output of each window of an image, `[P, F]`, and its index among the four."""
  y = _outputs(image, wide)
  return largest([y[:, place] for place in range(4)], jnp.int8)


@functools.partial(_winners.defjvp, symbolic_zeros=True)
def _winners_jvp(primals, tangents):
  image, wide = primals
  value, index = _winners(image, wide)
  again = jax.checkpoint(_chosen, prevent_cse=False)  # The tiles are computed again for each derivative.
  operands = (tangents[0], wide), (image, tangents[1])
  moved = [again(*pair, index) for pair in operands if not any(isinstance(a, SymbolicZero) for a in pair)]
  return (value, index), (sum(moved, jnp.zeros_like(value)), np.zeros(index.shape, jax.dtypes.float0))


def _chosen(image, wide, index):
  """Returns the output of each window that has the given index, `[P, F]`. It is bilinear in `image` and `wide`."""
  chosen = index[:, None] == jnp.arange(4, dtype=index.dtype).reshape(1, 4, 1)
  return jnp.sum(jnp.where(chosen, _outputs(image, wide), 0), 1)
