"""Winograd's F(2×2, 3×3): a 3×3 convolution with 2.25 times fewer products.

Each tile of 2×2 outputs is Aᵀ[(G κ Gᵀ) ⊙ (Bᵀ d B)]A with d the 4×4 inputs under it (Lavin and Gray 2016, section 4.1),
and the elementwise product over all tiles and channels is 16 matrix products. Exact in real numbers; in float32 its
error is about that of the direct sum. Not for bfloat16, whose 8 bits the sums Bᵀ d B would spend.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax

IMAGES_AT_ONCE = 16  # So that a part's tiles, four times its images, stay in cache.
G = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])


def conv(x, kernel, padding, precision=None):
  """Returns the cross-correlation of `[B, H, W, D]` with `[3, 3, D, F]` and stride 1: `[B, H', W', F]`.

  Images are taken in parts, one after the other. Padding is (before, after) for H and W, and may be negative.
  """
  images, height, width, depth = x.shape
  (top, bottom), (left, right) = padding
  out_h, out_w = height + top + bottom - 2, width + left + right - 2
  rows, columns = -(-out_h // 2), -(-out_w // 2)  # Of tiles.
  g = jnp.asarray(G, x.dtype)
  turned = jnp.einsum('ai,bj,ijdf->abdf', g, g, kernel, precision=lax.Precision.HIGHEST)
  turned = turned.reshape(16, depth, -1)

  def part(x):
    edges = ((top, 2 * rows + 2 - height - top, 0), (left, 2 * columns + 2 - width - left, 0))
    x = lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), *edges, (0, 0, 0)))
    under = [[x[:, i : i + 2 * rows - 1 : 2, j : j + 2 * columns - 1 : 2] for j in range(4)] for i in range(4)]
    tiles = _twice(_inputs, under)
    stacked = jnp.stack([tiles[a][b] for a in range(4) for b in range(4)]).reshape(16, -1, depth)
    products = jnp.matmul(stacked, turned, precision=precision).reshape(4, 4, -1, rows, columns, turned.shape[-1])
    y = _twice(_outputs, [[products[a, b] for b in range(4)] for a in range(4)])
    y = jnp.stack([jnp.stack(row, 3) for row in y], 2)
    return y.reshape(-1, 2 * rows, 2 * columns, turned.shape[-1])[:, :out_h, :out_w]

  parts = -(-images // IMAGES_AT_ONCE)
  size = -(-images // parts)
  x = jnp.pad(x, ((0, parts * size - images), (0, 0), (0, 0), (0, 0))).reshape(parts, size, height, width, depth)
  return lax.map(part, x).reshape(parts * size, out_h, out_w, -1)[:images]


def _inputs(d):
  """Bᵀ d."""
  return [d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]]


def _outputs(m):
  """Aᵀ m."""
  return [m[0] + m[1] + m[2], m[1] - m[2] - m[3]]


def _twice(transform, grid):
  """The transform along both axes of a grid of arrays."""
  columns = [transform([row[j] for row in grid]) for j in range(len(grid))]
  return [transform([column[a] for column in columns]) for a in range(len(columns[0]))]
