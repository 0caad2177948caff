"""Winograd's 3×3 convolution and its kernel gradient, which need 2.25 times fewer multiplications.

The algorithm is F(2×2, 3×3) of Lavin and Gray 2016, section 4.1. Each tile of 2×2 outputs is
Aᵀ[(G κ Gᵀ) ⊙ (Bᵀ d B)]A, where κ is the kernel and d is the 4×4 tile of inputs under the outputs. The elementwise
product over all tiles and channels becomes 16 matrix products. The transpose with respect to κ is
Gᵀ[(Bᵀ d B) ⊙ (A ȳ Aᵀ)]G, where ȳ is a tile of the gradient of the output. The products are summed over all tiles before
the multiplication by Gᵀ and G.

The algorithm is exact in real numbers. In float32 the error is proportional to the largest input of a tile. If all
inputs have similar magnitudes, this error is about as large as that of a direct convolution. Otherwise it is larger.
The algorithm is not meant for bfloat16, because the sums Bᵀ d B would use up its 8 bits of precision. An input that is
not finite, or is close to overflow, may make all outputs of a tile NaN or infinite.
"""

import jax.numpy as jnp
from jax import lax

PART_BYTES = 2**20  # Size of the tiles of one part, which then stay in the private cache of a core.


def conv(x, kernel, padding, precision=None):
  """Returns the cross-correlation of `[B, H, W, D]` with `[3, 3, D, F]` and stride 1: `[B, H', W', F]`.

  The images are processed in parts, one part after another. The padding is (before, after) for H and for W, and may be
  negative.
  """
  images, features = x.shape[0], kernel.shape[-1]
  out_h, out_w = (n + sum(p) - 2 for n, p in zip(x.shape[1:3], padding, strict=True))
  rows, columns = -(-out_h // 2), -(-out_w // 2)  # Numbers of tiles.
  turned = _stack(_twice(_of_kernel, [[kernel[i, j] for j in range(3)] for i in range(3)]))

  def part(x):
    products = jnp.matmul(_inputs(x, rows, columns, padding), turned, precision=precision)
    products = products.reshape(4, 4, -1, rows, columns, features)
    y = _twice(_to_outputs, [[products[a, b] for b in range(4)] for a in range(4)])
    y = jnp.stack([jnp.stack(row, 3) for row in y], 2)
    return y.reshape(-1, 2 * rows, 2 * columns, features)[:, :out_h, :out_w]

  parts = _in_parts(x, _num_parts(x, rows * columns))
  return lax.map(part, parts).reshape(-1, out_h, out_w, features)[:images]


def kernel_gradient(x, y, padding, precision=None):
  """Returns the gradient of the kernel, κ̄ `[3, 3, D, F]`, for the gradient of the output, ȳ `[B, H', W', F]`.

  κ̄ is the derivative of the sum of ȳ ⊙ `conv(x, κ, padding)` with respect to κ. The argument `y` is ȳ.
  """
  out_h, out_w, features = y.shape[1:]
  rows, columns = -(-out_h // 2), -(-out_w // 2)

  def part(total, parts):
    x, y = parts
    y = jnp.pad(y, ((0, 0), (0, 2 * rows - out_h), (0, 2 * columns - out_w), (0, 0)))
    y = _stack(_twice(_of_outputs, [[y[:, i::2, j::2] for j in range(2)] for i in range(2)])).reshape(16, -1, features)
    return total + jnp.einsum('tpd,tpf->tdf', _inputs(x, rows, columns, padding), y, precision=precision), None

  parts = _num_parts(x, rows * columns)
  total = jnp.zeros((16, x.shape[-1], features), x.dtype)
  total, _ = lax.scan(part, total, (_in_parts(x, parts), _in_parts(y, parts)))
  gradient = _twice(_to_kernel, [[total[4 * a + b] for b in range(4)] for a in range(4)])
  return _stack(gradient).reshape(3, 3, -1, features)


def _num_parts(x, tiles):
  one_image = 16 * tiles * x.shape[-1] * x.dtype.itemsize
  return -(-x.shape[0] // max(1, PART_BYTES // one_image))


def _in_parts(x, parts):
  """Reshapes `[B, …]` to `[parts, ⌈B / parts⌉, …]`, padded with images of zeros if B is not a multiple of `parts`."""
  rest = -x.shape[0] % parts
  return jnp.pad(x, ((0, rest), (0, 0), (0, 0), (0, 0))).reshape(parts, -1, *x.shape[1:])


def _inputs(x, rows, columns, padding):
  """Returns Bᵀ d B of every tile d of the images x, `[16, images · rows · columns, D]`."""
  sizes = zip((rows, columns), x.shape[1:3], padding, strict=True)
  edges = [(low, 2 * n + 2 - size - low, 0) for n, size, (low, _) in sizes]
  x = lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), *edges, (0, 0, 0)))
  under = [[x[:, i : i + 2 * rows - 1 : 2, j : j + 2 * columns - 1 : 2] for j in range(4)] for i in range(4)]
  return _stack(_twice(_of_inputs, under)).reshape(16, -1, x.shape[-1])


def _of_inputs(d):
  """Transforms input tiles d along one axis: returns Bᵀ d."""
  return [d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]]


def _of_kernel(k):
  """Transforms a kernel k along one axis: returns G k."""
  outer = (k[0] + k[2]) / 2
  return [k[0], outer + k[1] / 2, outer - k[1] / 2, k[2]]


def _to_kernel(m):
  """Transforms products m to a gradient of the kernel along one axis: returns Gᵀ m."""
  middle = (m[1] + m[2]) / 2
  return [m[0] + middle, (m[1] - m[2]) / 2, middle + m[3]]


def _of_outputs(y):
  """Transforms y, which has tiles of the gradient of the output, along one axis: returns A y."""
  return [y[0], y[0] + y[1], y[0] - y[1], -y[1]]


def _to_outputs(m):
  """Transforms products m to outputs along one axis: returns Aᵀ m."""
  return [m[0] + m[1] + m[2], m[1] - m[2] - m[3]]


def _twice(transform, grid):
  """Applies the function `transform` along the first axis of a grid of arrays, and then along the second axis."""
  columns = [transform([row[j] for row in grid]) for j in range(len(grid[0]))]
  return [transform([column[a] for column in columns]) for a in range(len(columns[0]))]


def _stack(grid):
  """Stacks an n × n grid of arrays into one array, `[n², …]`."""
  return jnp.stack([array for row in grid for array in row])
