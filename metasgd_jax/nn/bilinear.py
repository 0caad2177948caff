"""A convolution and its kernel gradient, as two bilinear primitives that are closed under differentiation.

The convolution y = conv(x, κ) is bilinear. The gradient with respect to its kernel, κ̄ = kernel_gradient(x, ȳ), is
bilinear too. The gradient with respect to its input is a convolution of ȳ with the kernel rotated by 180 degrees. Every
derivative of the two primitives, of any order, forward or reverse, is again one of the two primitives:

    conv(x, κ)              d/dx: conv(ȳ, rotated κ)       d/dκ: kernel_gradient(x, ȳ)
    kernel_gradient(x, ȳ)   d/dx: conv(ȳ, rotated κ̄)       d/dȳ: conv(x, κ̄)

The algorithm of each primitive is therefore chosen in this module only, when a program is lowered for a platform. The
choices for the CPU are based on measurements, which are in WORKSPACE_NOTES.md. The choices for other platforms were not
measured.

- CPU: The convolution of each task has the layout NHWC, HWIO → NHWC, and its operands are transposed explicitly. XLA
  converts convolutions to this layout only at the entry of a program; in the body of a loop any other layout is tens of
  times slower. The kernel gradient contracts 16 images at a time, so that the operand that is read repeatedly
  stays in the cache. Large 3×3 convolutions and their kernel gradients use Winograd's algorithm.
- Other platforms: A single task is computed by one convolution in the same layout. Several tasks, each with its own
  kernel, are computed by one batched matrix product over patches.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.export
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from metasgd_jax.nn import winograd

LAYOUT = ('NHWC', 'HWIO', 'NHWC')

# Number of images that a kernel gradient on a CPU contracts at a time; 16 float32 fill a vector register of 512 bits.
IMAGES_AT_ONCE = 16

# Winograd's algorithm is used for more than this number of images, or of tiles of 2×2 outputs. With few of both, as in
# a small support of small images, it would not be faster, and the program would take longer to compile.
MANY_IMAGES = 16
MANY_TILES = 2000

# Largest h·w·D for which a kernel gradient is computed as one matrix product with patches. The limit is that of a 3×3
# kernel on grey images, as in a first layer.
FEW_TAPS = 9


class Window(NamedTuple):
  """How a kernel moves over an image along H and W.

  The fields are the arguments `window_strides`, `padding`, `lhs_dilation` and `rhs_dilation` of
  `lax.conv_general_dilated`.
  """

  strides: tuple[int, ...] = (1, 1)
  padding: tuple[tuple[int, int], ...] = ((0, 0), (0, 0))
  x_dilation: tuple[int, ...] = (1, 1)
  kernel_dilation: tuple[int, ...] = (1, 1)

  def outputs(self, image, kernel) -> tuple[int, ...]:
    """Returns the height and width of the output, given those of the image and of the kernel."""
    return tuple(
      (_dilated(n, xd) + low + high - _dilated(k, kd)) // s + 1
      for n, k, s, (low, high), xd, kd in zip(image, kernel, *self, strict=True)
    )


def conv(x, kernel, window: Window, precision=None):
  """Returns the cross-correlation of images `[B, H, W, D]` with a kernel `[h, w, D, F]`: `[B, H', W', F]`."""
  if precision is None:  # The setting may change until the program is lowered.
    precision = getattr(jax.config, 'jax_default_matmul_precision')  # noqa: B009
  x, kernel = _vary_alike(x[None], kernel[None])
  return conv_p.bind(x, kernel, window=window, precision=precision)[0]


def _vary_alike(*operands):
  """Makes the operands vary over the same mesh axes, which a primitive inside `shard_map` requires."""
  over = [_varies_over(jax.typeof(a)) for a in operands]
  missing = [tuple(sorted(frozenset.union(*over) - mine)) for mine in over]
  return [lax.pcast(a, axes, to='varying') if axes else a for a, axes in zip(operands, missing, strict=True)]


def _varies_over(aval) -> frozenset:
  kind = getattr(aval, 'manual_axis_type', None)  # jax 0.10 has this attribute; other versions have `vma`.
  return getattr(aval, 'vma', frozenset()) if kind is None else kind.varying


def _dilated(n, dilation):
  return (n - 1) * dilation + 1 if n else 0


# The arrays below have a leading task axis T, so that a vmap over tasks remains one call of a primitive:
# x [T, B, H, W, D], kernel [T, h, w, D, F], y [T, B, H', W', F].


def _conv_shape(x, kernel, *, window, **_):
  return x.update(shape=(*x.shape[:2], *window.outputs(x.shape[2:4], kernel.shape[1:3]), kernel.shape[-1]))


def _gradient_shape(x, y, *, size, **_):
  return x.update(shape=(x.shape[0], *size, x.shape[-1], y.shape[-1]))


def _conv_to_x(y, x, kernel, *, window, precision):
  """Returns the gradient with respect to x: the convolution of ȳ with the kernel rotated by 180 degrees."""
  padding = []
  sizes = zip(x.aval.shape[2:4], kernel.shape[1:3], y.shape[2:4], *window, strict=True)
  for n, k, out, s, (low, _), xd, kd in sizes:
    before = _dilated(k, kd) - 1 - low
    padding.append((before, _dilated(n, xd) + _dilated(k, kd) - 1 - _dilated(out, s) - before))
  turned = jnp.swapaxes(kernel[:, ::-1, ::-1], -1, -2)
  back = Window(window.x_dilation, tuple(padding), window.strides, window.kernel_dilation)
  return conv_p.bind(y, turned, window=back, precision=precision)


def _conv_to_kernel(y, x, kernel, *, window, precision):
  return kernel_gradient_p.bind(x, y, window=window, size=kernel.aval.shape[1:3], precision=precision)


def _gradient_to_x(kernel, x, y, *, window, precision, **_):
  return _conv_to_x(y, x, kernel, window=window, precision=precision)


def _gradient_to_y(kernel, x, _y, *, window, precision, **_):
  return conv_p.bind(x, kernel, window=window, precision=precision)


def _batch(primitive, operands, axes, **options):
  """Is the batching rule of a primitive: returns the output, and its vmapped axis.

  A convolution whose kernel is not vmapped merges the vmapped axis with the image axis. Otherwise the vmapped axis is
  merged with the task axis.
  """
  size = next(a.shape[axis] for a, axis in zip(operands, axes, strict=True) if axis is not None)
  if primitive is conv_p and axes[1] is None:
    x = jnp.moveaxis(operands[0], axes[0], 1)
    tasks, _, images = x.shape[:3]
    y = conv_p.bind(x.reshape(tasks, size * images, *x.shape[3:]), operands[1], **options)
    return y.reshape(tasks, size, images, *y.shape[2:]), 1
  moved = [
    jnp.broadcast_to(a[None], (size, *a.shape)) if axis is None else jnp.moveaxis(a, axis, 0)
    for a, axis in zip(operands, axes, strict=True)
  ]
  out = primitive.bind(*(a.reshape(-1, *a.shape[2:]) for a in moved), **options)
  return out.reshape(size, -1, *out.shape[1:]), 0


# The following functions are the algorithms. An algorithm for one task returns sums in float32 or a wider type. The
# sums are rounded only once, at the end.


def _sums(x):
  return jnp.promote_types(x.dtype, jnp.float32)


def _lax_conv(x, kernel, window: Window, precision):
  """Returns the convolution of one task, in float32 or a wider type."""
  return lax.conv_general_dilated(x, kernel, *window, LAYOUT, precision=precision, preferred_element_type=_sums(x))


def _lax_kernel_gradient(x, y, window, size, precision):
  """Returns the kernel gradient of one task, computed as a convolution.

  The argument `y` is ȳ, the gradient with respect to the output. In this convolution the batch axis takes the place of
  the channels, and ȳ takes the place of the kernel. The strides of `window` become the dilation of ȳ, and the kernel
  dilation of `window` becomes the strides.
  """
  padding = []
  for n, k, out, s, (low, _), xd, kd in zip(x.shape[1:3], size, y.shape[1:3], *window, strict=True):
    padding.append((low, _dilated(k, kd) - 1 + _dilated(out, s) - _dilated(n, xd) - low))
  turned = Window(window.kernel_dilation, tuple(padding), window.x_dilation, window.strides)
  out = _lax_conv(jnp.transpose(x, (3, 1, 2, 0)), jnp.transpose(y, (1, 2, 0, 3)), turned, precision)
  return jnp.transpose(out, (1, 2, 0, 3))


def _kernel_gradient_by_one_product(x, y, window, size, precision):
  """Returns the kernel gradient of one task, computed as one matrix product of patches with ȳ.

  This is meant for few channels: the patches are then small compared with ȳ, and ȳ is read without a transposition.
  """
  patches = jnp.moveaxis(_patches(x[None], window, size)[0], -1, 0)
  out = jnp.matmul(patches, y.reshape(-1, y.shape[-1]), precision=precision, preferred_element_type=_sums(x))
  return out.reshape(*size, x.shape[-1], -1)


def _kernel_gradient_in_parts(x, y, window, size, precision):
  gradient = functools.partial(_lax_kernel_gradient, window=window, size=size, precision=precision)
  if not _more_than(x.shape[0], IMAGES_AT_ONCE):
    return gradient(x, y)
  rest = -x.shape[0] % IMAGES_AT_ONCE  # Number of images of zeros to append; they do not change the sum.
  parts = [jnp.pad(a, ((0, rest), (0, 0), (0, 0), (0, 0))).reshape(-1, IMAGES_AT_ONCE, *a.shape[1:]) for a in (x, y)]
  total = jnp.zeros((*size, x.shape[-1], y.shape[-1]), _sums(x))
  return lax.scan(lambda total, part: (total + gradient(*part), None), total, tuple(parts))[0]


def _over_tasks(form, *operands):
  """Applies the algorithm `form` to one task after another, and rounds the results to the dtype of the operands.

  A single task is computed without a loop.
  """

  def rounded(task):
    return form(*task).astype(operands[0].dtype)

  return rounded([a[0] for a in operands])[None] if operands[0].shape[0] == 1 else lax.map(rounded, operands)


def _conv_on_cpu(x, kernel, *, window, precision):
  def one(x, kernel):
    if _suits_winograd(x, kernel.shape, window):
      return winograd.conv(x, kernel, window.padding, precision)
    return _lax_conv(x, kernel, window, precision)

  return _over_tasks(one, x, kernel)


def _suits_winograd(x, kernel, window):
  """Returns whether Winograd's algorithm accepts these operands and was faster in measurements with such shapes.

  The algorithm needs enough images, tiles and channels to make up for the cost of its transforms.
  """
  plain = window == Window(padding=window.padding) and kernel[:2] == (3, 3)
  if not plain or min(x.shape[1:3]) < 7 or min(kernel[2:]) < 32 or x.dtype not in (jnp.float32, jnp.float64):
    return False
  tiles = -(-x.shape[1] // 2) * -(-x.shape[2] // 2)
  return _more_than(x.shape[0], MANY_IMAGES) or _more_than(x.shape[0], MANY_TILES // tiles)


def _more_than(images, few: int) -> bool:
  """Returns whether there are more than `few` images, or False if the number is symbolic, as in an exported program."""
  return not jax.export.is_symbolic_dim(images) and images > few


def _kernel_gradient_on_cpu(x, y, *, window, size, precision):
  def one(x, y):
    kernel = (*size, x.shape[-1], y.shape[-1])
    if _suits_winograd(x, kernel, window):
      return winograd.kernel_gradient(x, y, window.padding, precision)
    if math.prod(kernel[:3]) <= FEW_TAPS:
      return _kernel_gradient_by_one_product(x, y, window, size, precision)
    return _kernel_gradient_in_parts(x, y, window, size, precision)

  return _over_tasks(one, x, y)


def _patches(x, window, size):
  """Returns the patches of x under the kernel, `[T, B·H'·W', h·w·D]`."""
  edges = [(low, high, d - 1) for (low, high), d in zip(window.padding, window.x_dilation, strict=True)]
  x = lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), (0, 0, 0), *edges, (0, 0, 0)))
  out_h, out_w = Window(window.strides, kernel_dilation=window.kernel_dilation).outputs(x.shape[2:4], size)
  slices = []
  for i in range(size[0]):
    for j in range(size[1]):
      top, left = i * window.kernel_dilation[0], j * window.kernel_dilation[1]
      bottom, right = top + (out_h - 1) * window.strides[0] + 1, left + (out_w - 1) * window.strides[1] + 1
      slices.append(x[:, :, top : bottom : window.strides[0], left : right : window.strides[1]])
  patches = jnp.concatenate(slices, -1)
  return patches.reshape(x.shape[0], -1, patches.shape[-1])


def _conv_by_patches(x, kernel, *, window, precision):
  if x.shape[0] == 1:
    return _lax_conv(x[0], kernel[0], window, precision).astype(x.dtype)[None]
  tasks, *size, _, features = kernel.shape
  flat = kernel.reshape(tasks, -1, features)
  y = jnp.einsum('tpk,tkf->tpf', _patches(x, window, size), flat, precision=precision, preferred_element_type=_sums(x))
  return y.astype(x.dtype).reshape(tasks, x.shape[1], *window.outputs(x.shape[2:4], size), features)


def _kernel_gradient_by_patches(x, y, *, window, size, precision):
  if x.shape[0] == 1:
    return _lax_kernel_gradient(x[0], y[0], window, size, precision).astype(x.dtype)[None]
  tasks, features = x.shape[0], y.shape[-1]
  flat, patches = y.reshape(tasks, -1, features), _patches(x, window, size)
  out = jnp.einsum('tpk,tpf->tkf', patches, flat, precision=precision, preferred_element_type=_sums(x))
  return out.astype(x.dtype).reshape(tasks, *size, x.shape[-1], features)


def _primitive(name, shape, to_first, to_second):
  """Returns a bilinear primitive, given its output shape and the derivatives with respect to its two operands."""
  primitive = Primitive(name)
  primitive.def_abstract_eval(shape)
  ad.defbilinear(primitive, to_first, to_second)
  batching.primitive_batchers[primitive] = functools.partial(_batch, primitive)
  return primitive


def _compute(primitive, on_cpu, elsewhere):
  """Makes a primitive run `on_cpu` on a CPU and `elsewhere` on other platforms, inside and outside of jit."""
  mlir.register_lowering(primitive, mlir.lower_fun(elsewhere, multiple_results=False))
  mlir.register_lowering(primitive, mlir.lower_fun(on_cpu, multiple_results=False), platform='cpu')

  @functools.partial(jax.jit, static_argnames=('window', 'size', 'precision'))
  def compiled(first, second, **options):
    return primitive.bind(first, second, **options)

  @primitive.def_impl
  def run(first, second, **options):
    if getattr(jax.config, 'jax_disable_jit'):  # noqa: B009
      return (on_cpu if jax.default_backend() == 'cpu' else elsewhere)(first, second, **options)
    return compiled(first, second, **options)


conv_p = _primitive('metasgd_conv', _conv_shape, _conv_to_x, _conv_to_kernel)
kernel_gradient_p = _primitive('metasgd_conv_kernel_gradient', _gradient_shape, _gradient_to_x, _gradient_to_y)
_compute(conv_p, _conv_on_cpu, _conv_by_patches)
_compute(kernel_gradient_p, _kernel_gradient_on_cpu, _kernel_gradient_by_patches)
