"""Convolution, pooling and their block against lax and flax, to second order, in float64."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from problems import assert_trees_close, relative_error, saying

import metasgd_jax as ms
from metasgd_jax.nn import bilinear, few_channels, winograd

FORMS = [  # kernel size, strides, padding, dilation of the images, of the kernel
  ((3, 3), (1, 1), 'SAME', None, None),
  ((3, 3), (1, 1), 'VALID', None, None),
  ((3, 3), (2, 2), 'SAME', None, None),
  ((1, 1), (1, 1), 'SAME', None, None),
  ((5, 2), (1, 1), 'SAME_LOWER', None, (1, 2)),
  ((2, 3), (2, 1), ((1, 0), (2, 1)), None, (2, 1)),
  ((3, 3), (3, 3), ((-1, 0), (0, 2)), None, None),
  ((3, 2), (1, 2), ((2, 1), (0, 3)), (2, 3), (1, 2)),
]
WINDOW = ('size', 'strides', 'padding', 'x_dilation', 'kernel_dilation')
NHWC = ('NHWC', 'HWIO', 'NHWC')


def options(strides, padding, x_dilation, kernel_dilation):
  return dict(
    window_strides=strides,
    padding=padding,
    lhs_dilation=x_dilation,
    rhs_dilation=kernel_dilation,
    dimension_numbers=NHWC,
  )


def to_second_order(f):
  """The value of a scalar made of f(x, kernel), its gradient, that of the gradient's square, and its derivative."""
  scalar = lambda x, kernel: jnp.sum(jnp.sin(f(x, kernel)))
  first = jax.grad(scalar, argnums=(0, 1))
  second = jax.grad(lambda *a: sum(jnp.sum(g**2) for g in first(*a)), argnums=(0, 1))
  return lambda *a: (f(*a), first(*a), second(*a), jax.jvp(first, a, a)[1])


def to_first_order(f):
  """The value of f(x, kernel), and the gradient of a scalar made of it."""
  return lambda *a: (f(*a), jax.grad(lambda *a: jnp.sum(jnp.sin(f(*a))), argnums=(0, 1))(*a))


def of_both(order, axes=None, **keywords):
  """What `order` makes of our convolution and of lax's, as one program."""
  both = [order(functools.partial(f, **keywords)) for f in (ms.nn.conv_general_dilated, lax.conv_general_dilated)]
  if axes:
    both = [jax.vmap(f, axes) for f in both]
  return jax.jit(lambda *operands: [f(*operands) for f in both])


def normal(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


@pytest.mark.parametrize('depth', [1, 3])
@pytest.mark.parametrize(WINDOW, FORMS)
def test_conv_and_its_gradient_equal_laxs(size, strides, padding, x_dilation, kernel_dilation, depth):
  """Of grey images too, whose kernel's gradient is one product."""
  with jax.enable_x64(True):
    x, kernel = normal(2, 7, 6, depth), normal(*size, depth, 4, seed=1)
    both = of_both(to_first_order, **options(strides, padding, x_dilation, kernel_dilation))
    assert_trees_close(*both(x, kernel), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('depth', [1, 3])
@pytest.mark.parametrize(
  WINDOW, [FORMS[0], *(pytest.param(*f, marks=pytest.mark.slow) for f in FORMS[1:-1]), FORMS[-1]]
)
def test_conv_equals_lax_to_second_order(size, strides, padding, x_dilation, kernel_dilation, depth):
  """Every derivative is one of the two products again: of the forms, the plainest and the richest stand for all."""
  with jax.enable_x64(True):
    x, kernel = normal(2, 7, 6, depth), normal(*size, depth, 4, seed=1)
    both = of_both(to_second_order, **options(strides, padding, x_dilation, kernel_dilation))
    assert_trees_close(*both(x, kernel), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('shared', ['neither', 'images', 'kernel'])
def test_conv_equals_lax_with_a_kernel_for_each_task(shared):
  with jax.enable_x64(True):
    x, kernel = normal(3, 2, 6, 6, 2), normal(3, 3, 3, 2, 4, seed=1)
    x, axes = (x[0], (None, 0)) if shared == 'images' else (x, (0, 0))
    kernel, axes = (kernel[0], (0, None)) if shared == 'kernel' else (kernel, axes)
    both = of_both(to_second_order, axes, **options((1, 1), 'SAME', None, None))
    assert_trees_close(*both(x, kernel), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(WINDOW, FORMS)
@pytest.mark.parametrize('tasks', [1, 3])
def test_the_forms_of_all_platforms_are_equal(tasks, size, strides, padding, x_dilation, kernel_dilation):
  """A CPU's forms and those for other platforms, both run here; 20 images make the kernel's gradient come in parts."""
  if isinstance(padding, str):
    reach = [(n - 1) * d + 1 for n, d in zip(size, kernel_dilation or (1, 1), strict=True)]
    padding = lax.padtype_to_pads((7, 6), reach, strides, padding)
  window = bilinear.Window(strides, tuple(padding), x_dilation or (1, 1), kernel_dilation or (1, 1))

  @jax.jit
  def of_each(x, kernel):
    convs = bilinear._conv_on_cpu, bilinear._conv_by_patches
    gradients = bilinear._kernel_gradient_on_cpu, bilinear._kernel_gradient_by_patches
    y, other = (form(x, kernel, window=window, precision=None) for form in convs)
    return (y, other), [form(x, jnp.sin(y), window=window, size=size, precision=None) for form in gradients]

  with jax.enable_x64(True):
    for pair in of_each(normal(tasks, 20, 7, 6, 3), normal(tasks, *size, 3, 4, seed=1)):
      assert_trees_close(*pair, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('padding', [((1, 1), (1, 1)), ((0, 0), (0, 0)), ((2, 0), (-1, 3))])
@pytest.mark.parametrize('shape', [(5, 8, 7, 3), (33, 9, 10, 2)])
def test_winograd_equals_lax(shape, padding, monkeypatch):
  monkeypatch.setattr(winograd, 'PART_BYTES', 2**16)  # So that 33 images are several parts, the last not full.
  by_lax = functools.partial(lax.conv_general_dilated, **options((1, 1), padding, None, None))

  @jax.jit
  def of_both(x, kernel, y):
    expected, pull = jax.vjp(by_lax, x, kernel)
    found = winograd.conv(x, kernel, padding), winograd.kernel_gradient(x, y, padding)
    return found, (expected, pull(y)[1])

  with jax.enable_x64(True):
    x, kernel = normal(*shape), normal(3, 3, shape[-1], 4, seed=1)
    y = normal(*jax.eval_shape(by_lax, x, kernel).shape, seed=2)
    assert_trees_close(*of_both(x, kernel, y), rtol=1e-10, atol=1e-10)


def test_winograds_error_is_about_that_of_the_direct_sum():
  x, kernel = normal(20, 14, 14, 64), normal(3, 3, 64, 64, seed=1)
  y = normal(20, 14, 14, 64, seed=2)
  direct = functools.partial(lax.conv_general_dilated, **options((1, 1), 'SAME', None, None))
  gradient = lambda x, y: jax.vjp(functools.partial(direct, x), jnp.zeros(kernel.shape, x.dtype))[1](y)[0]
  padding = ((1, 1), (1, 1))
  for plain, fast, operands in (
    (direct, functools.partial(winograd.conv, padding=padding), (x, kernel)),
    (gradient, functools.partial(winograd.kernel_gradient, padding=padding), (x, y)),
  ):
    with jax.enable_x64(True):
      exact = np.asarray(jax.jit(plain)(*(jnp.asarray(a, jnp.float64) for a in operands)))
    worst = lambda value, exact=exact: float(np.max(np.abs(np.float64(value) - exact)))
    assert worst(jax.jit(fast)(*operands)) < 4 * worst(jax.jit(plain)(*operands))


def test_large_convolutions_are_winograds_to_second_order():
  with jax.enable_x64(True):
    x, kernel = normal(17, 8, 8, 32), 0.1 * normal(3, 3, 32, 32, seed=1)
    keywords = options((1, 1), 'SAME', None, None)
    assert_trees_close(*of_both(to_second_order, **keywords)(x, kernel), rtol=1e-8, atol=1e-8)
    conv = functools.partial(ms.nn.conv_general_dilated, **keywords)
    for f in (conv, jax.grad(lambda x, kernel: jnp.sum(conv(x, kernel)), 1)):
      text = jax.jit(f).lower(x, kernel).as_text()
      assert ('stablehlo.convolution' in text) == (jax.default_backend() != 'cpu')


@pytest.mark.skipif(jax.default_backend() != 'cpu', reason="Winograd's algorithm is for CPUs")
@pytest.mark.parametrize(
  ('images', 'size', 'many'),
  [(1, 84, False), (2, 84, True), (4, 42, False), (5, 42, True), (16, 28, True), (16, 8, False)],
)
def test_many_tiles_are_winograds_however_few_the_images(images, size, many):
  x = jax.ShapeDtypeStruct((images, size, size, 32), jnp.float32)
  kernel = jax.ShapeDtypeStruct((3, 3, 32, 32), jnp.float32)
  conv = functools.partial(ms.nn.conv_general_dilated, **options((1, 1), 'SAME', None, None))
  assert ('stablehlo.convolution' in jax.jit(conv).lower(x, kernel).as_text()) == (not many)


def convolutions(text):
  """The layouts of the convolutions in a program's text, and how many have groups."""
  layouts = set(re.findall(r'dim_numbers = (.*?), window', text))
  return layouts, len(re.findall(r'feature_group_count = (?!1 )', text))


def test_convolutions_stay_in_the_fast_layout_at_every_order_and_under_vmap():
  second = to_second_order(functools.partial(ms.nn.conv_general_dilated, **options((1, 1), 'SAME', None, None)))
  x, kernel = normal(3, 2, 6, 6, 2), normal(3, 3, 3, 2, 4)
  for f, operands in ((second, (x[0], kernel[0])), (jax.vmap(second), (x, kernel))):
    layouts, grouped = convolutions(jax.jit(f).lower(*operands).as_text())
    assert layouts == {'[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]'}
    assert not grouped
  by_lax = jax.vmap(to_second_order(functools.partial(lax.conv_general_dilated, **options((1, 1), 'SAME', None, None))))
  assert convolutions(jax.jit(by_lax).lower(x, kernel).as_text())[1]  # What it is there to avoid.


@pytest.mark.parametrize('numbers', [None, NHWC, ('NCHW', 'OIHW', 'NHWC'), ('HWNC', 'HWOI', 'CNWH')])
def test_any_layout(numbers):
  x, kernel = normal(6, 6, 6, 6), normal(6, 6, 6, 6, seed=1)
  kernel = kernel[:3] if numbers and numbers[1].startswith('H') else kernel[..., :3]
  keywords = dict(window_strides=(1, 2), padding='SAME', dimension_numbers=numbers)
  np.testing.assert_allclose(*of_both(lambda conv: conv, **keywords)(x, kernel), rtol=1e-4, atol=1e-4)


CONVS = [
  dict(features=6, kernel_size=(3, 3)),
  dict(features=6, kernel_size=(3, 3), strides=2, padding='VALID', use_bias=False),
  dict(features=6, kernel_size=(3, 2), kernel_dilation=(2, 1), padding='CIRCULAR'),
  dict(features=6, kernel_size=(3, 3), input_dilation=2, padding=1),
  dict(features=6, kernel_size=(3, 3), padding='REFLECT', mask=np.tril(np.ones((3, 3, 3, 6)))),
  dict(features=6, kernel_size=(3, 3), feature_group_count=3),
]


@pytest.mark.parametrize('arguments', CONVS)
def test_a_checkpoint_moves_between_conv_and_flax(arguments):
  check_checkpoint(arguments, (2, 8, 8, 3))


@pytest.mark.parametrize(
  ('arguments', 'shape'),
  [
    (dict(features=4, kernel_size=(3,), padding='CAUSAL'), (2, 8, 3)),
    (dict(features=4, kernel_size=(3, 3)), (8, 8, 3)),
    (dict(features=4, kernel_size=(3, 3)), (2, 3, 8, 8, 3)),
    (dict(features=4, kernel_size=(2, 2, 2)), (2, 4, 4, 4, 3)),
  ],
)
def test_a_checkpoint_moves_in_other_dimensions(arguments, shape):
  check_checkpoint(arguments, shape)


def check_checkpoint(arguments, shape):
  ours, theirs = ms.nn.Conv(**arguments), nn.Conv(**arguments)
  rng = np.random.default_rng(0)
  x = rng.normal(size=shape).astype(np.float32)
  of_ours, params = (jax.eval_shape(module.init, jax.random.key(1), x) for module in (ours, theirs))
  assert of_ours == params
  params = jax.tree.map(lambda p: rng.normal(size=p.shape).astype(p.dtype), params)
  both = jax.jit(lambda params, x: (ours.apply(params, x), theirs.apply(params, x)))(params, x)
  np.testing.assert_allclose(*both, rtol=1e-4, atol=1e-4)


def test_conv_in_bfloat16_sums_in_float32():
  x, kernel = (
    jnp.asarray(np.random.default_rng(0).normal(size=s), jnp.bfloat16) for s in ((40, 14, 14, 16), (3, 3, 16, 16))
  )
  f = functools.partial(ms.nn.conv_general_dilated, **options((1, 1), 'SAME', None, None))
  got = jax.jit(jax.grad(lambda k: jnp.sum(jnp.square(f(x, k).astype(jnp.float32)))))(kernel)
  expected = jax.jit(jax.grad(lambda k: jnp.sum(f(x.astype(jnp.float32), k) ** 2)))(kernel.astype(jnp.float32))
  assert got.dtype == jnp.bfloat16
  assert relative_error(np.float32(got), expected) < 5e-3  # bfloat16 has 8 bits: 2e-3 each way.


def test_conv_of_integers_is_exact():
  x, kernel = np.full((1, 3, 3, 1), 2**24 + 1, np.int32), np.ones((1, 1, 1, 1), np.int32)
  assert int(ms.nn.conv_general_dilated(x, kernel, (1, 1), 'SAME', dimension_numbers=NHWC)[0, 0, 0, 0]) == 2**24 + 1


def test_conv_outside_of_jit_compiles_once(caplog):
  f = functools.partial(ms.nn.conv_general_dilated, **options((1, 1), 'SAME', None, None))
  with jax.log_compiles():
    for value in (1.0, 2.0, 3.0):
      f(np.full((2, 5, 4, 3), value, np.float32), np.ones((3, 3, 3, 4), np.float32))
  assert len([r for r in caplog.records if 'Finished XLA compilation of jit(compiled)' in r.getMessage()]) == 1


def test_conv_with_other_channels():
  with pytest.raises(ValueError, match=saying('feature dimension', '3 // 1 != 2')):
    ms.nn.conv_general_dilated(np.zeros((1, 8, 8, 3)), np.zeros((3, 3, 2, 4)), (1, 1), 'SAME', dimension_numbers=NHWC)


@pytest.mark.parametrize('shape', [(2, 8, 8, 3), (2, 7, 9, 3)])
@pytest.mark.parametrize('window', [(2, 2), (3, 1)])
def test_max_pool_equals_flax_to_second_order(shape, window):
  x = jnp.asarray(np.random.default_rng(0).permutation(np.prod(shape)).reshape(shape) / 7, jnp.float32)

  def value_and_gradients(pool):
    scalar = lambda x: jnp.sum(jnp.sin(pool(x, window, window)))
    grad = jax.grad(scalar)
    return pool(x, window, window), grad(x), jax.grad(lambda x: jnp.sum(grad(x) ** 2))(x), jax.jvp(grad, [x], [x])[1]

  assert_trees_close(*jax.jit(lambda: [value_and_gradients(pool) for pool in (ms.nn.max_pool, nn.max_pool)])())


@pytest.mark.parametrize('arguments', [((2, 2),), ((3, 3), (2, 2), 'SAME'), ((2, 2), (2, 2), ((1, 1), (0, 0)))])
def test_max_pool_with_windows_that_overlap_or_padding_is_flax(arguments):
  x = normal(2, 7, 9, 3)
  assert np.array_equal(ms.nn.max_pool(x, *arguments), nn.max_pool(x, *arguments))


def test_a_nan_wins_the_max_pool():
  x = np.array(normal(1, 4, 4, 2))
  x[0, 0, 0, 0] = x[0, 3, 3, 1] = np.nan
  pools = ms.nn.max_pool, nn.max_pool
  ours, theirs = jax.device_get(jax.jit(lambda x: [pool(x, (2, 2), (2, 2)) for pool in pools])(x))
  np.testing.assert_array_equal(ours, theirs)
  assert np.isnan(ours).sum() == 2


def test_max_pool_of_equal_values_sends_the_gradient_to_one():
  grad = jax.jit(jax.grad(lambda x: jnp.sum(ms.nn.max_pool(x, (2, 2), (2, 2)))))
  grads = np.asarray(grad(np.ones((1, 4, 4, 1), np.float32)))[0, :, :, 0]
  assert np.array_equal(grads, np.tile([[1, 0], [0, 0]], (2, 2)))


def test_compiled_pooling_gradient_after_batch_norm_equals_float64(optimized):
  """Where comparing with the maximum lost gradients: normalisation is computed twice, and rounded apart."""

  def meta(x, scale):
    pool = lambda x: ms.nn.max_pool(x, (2, 2), (2, 2))
    norm = lambda s, x: (x - jnp.mean(x)) * lax.rsqrt(jnp.var(x) + 1e-3) * s
    inner = lambda s: jnp.mean(pool(jnp.maximum(norm(s, x), 0)) ** 3)
    return jnp.mean(pool(norm(scale - 0.4 * jax.grad(inner)(scale), x)) ** 2)

  x = jnp.asarray(normal(16, 28, 28, 8), jnp.float32)
  single = jax.jit(jax.grad(meta, argnums=(0, 1)))(x, jnp.float32(1.3))
  with jax.enable_x64(True):
    double = jax.jit(jax.grad(meta, argnums=(0, 1)))(jnp.float64(np.asarray(x)), jnp.float64(1.3))
    assert relative_error(jax.tree.map(np.float64, single), double) < 1e-4  # The trap was 8e-3.


def test_batch_norm_equals_flax_by_the_batch_at_hand():
  rng = np.random.default_rng(0)
  x, scale, bias = (a.astype(np.float32) for a in (rng.normal(1, 3, (6, 5, 5, 4)), *rng.normal(size=(2, 4))))
  flax_norm = nn.BatchNorm(use_running_average=False, epsilon=1e-3)

  @jax.jit
  def both(params, x):
    stats = {'mean': jnp.zeros(4), 'var': jnp.ones(4)}
    theirs, _ = flax_norm.apply({'params': params, 'batch_stats': stats}, x, mutable=['batch_stats'])
    return ms.nn.BatchNorm().apply({'params': params}, x), theirs

  np.testing.assert_allclose(*both({'scale': scale, 'bias': bias}, x), rtol=1e-4, atol=1e-4)


def plain_block(x, kernel, scale, bias):
  """The block as it is usually written."""
  y = lax.conv_general_dilated(x, kernel, (1, 1), 'SAME', dimension_numbers=NHWC)
  y = y - jnp.mean(y, (0, 1, 2), keepdims=True)
  y = y * lax.rsqrt(jnp.mean(y**2, (0, 1, 2), keepdims=True) + 1e-3) * scale.reshape(1, 1, 1, -1)
  return nn.max_pool(nn.relu(y + bias.reshape(1, 1, 1, -1)), (2, 2), (2, 2))


def orders(block):
  """Returns the block, and its first and second derivatives with respect to all operands, as one function."""
  scalar = lambda *a: jnp.sum(jnp.sin(block(*a)))
  first = jax.grad(scalar, argnums=(0, 1, 2, 3))
  second = jax.grad(lambda *a: sum(jnp.sum(g**2) for g in first(*a)), argnums=(0, 1, 2, 3))
  return jax.jit(lambda *a: (block(*a), first(*a), second(*a)))


@pytest.mark.parametrize('images', [(6, 7, 8, 2), (3, 6, 8, 2)], ids=['odd', 'even'])
def test_conv_block_equals_the_plain_layers_to_second_order(images):
  """Also in channels whose scale is negative, where batch norm turns the order around."""
  assert few_channels.suits(images, (3, 3, 2, 4)) == (images[1] == 6)
  with jax.enable_x64(True):
    operands = normal(*images), normal(3, 3, 2, 4, seed=1), np.array([0.5, -1.5, 2.0, -0.1]), normal(4, seed=2)
    both = [orders(block)(*operands) for block in (ms.nn.conv_block, plain_block)]
    assert_trees_close(*both, rtol=1e-9, atol=1e-9)


def test_conv_block_by_the_convolution_of_xla():
  with jax.enable_x64(True):
    operands = normal(2, 6, 8, 2), normal(3, 3, 2, 4, seed=1), np.array([0.5, -1.5, 2.0, -0.1]), normal(4, seed=2)
    blocks = ms.nn.conv_block, functools.partial(ms.nn.conv_block, native=True)
    assert_trees_close(*[orders(block)(*operands) for block in blocks], rtol=1e-9, atol=1e-9)
    texts = [str(jax.make_jaxpr(block)(*operands)) for block in blocks]
  assert ['conv_general_dilated' in text for text in texts] == [False, True]


def test_few_channels_in_one_program_for_many_tasks():
  """Kernels differ between the tasks of a vmap."""
  with jax.enable_x64(True):
    x, kernels, one = normal(2, 3, 6, 8, 1), normal(2, 3, 3, 1, 4, seed=1), np.ones(4)
    loss = lambda block: jax.grad(lambda k, x: jnp.sum(jnp.sin(block(x, k, one, one))))
    both = [jax.jit(jax.vmap(loss(block)))(kernels, x) for block in (ms.nn.conv_block, plain_block)]
    np.testing.assert_allclose(*both, rtol=1e-9)


def test_moments_of_few_channels_are_accurate_where_neighbours_are_alike():
  """The response of a Laplacian to a smooth image has a thousandth of the image's variance."""
  smooth = np.cumsum(np.cumsum(normal(4, 32, 32, 3), 1), 2) / 100
  kernel = np.broadcast_to(np.array([[0, 1, 0], [1, -4, 1], [0, 1, 0]], float)[..., None, None], (3, 3, 3, 1))
  y = lax.conv_general_dilated(np.float32(smooth), np.float32(kernel), (1, 1), 'SAME', dimension_numbers=NHWC)
  found = jax.jit(few_channels.winners_and_moments)(np.float32(smooth), np.float32(kernel))
  np.testing.assert_allclose(found[2], np.var(np.float64(y), (0, 1, 2)), rtol=1e-4)


def test_few_channels_keep_no_convolution(monkeypatch):
  x, kernel, one = (np.ones(shape, np.float32) for shape in ((60, 28, 28, 1), (3, 3, 1, 64), 64))

  def memory():
    loss = lambda k: jnp.sum(ms.nn.conv_block(x, k, one, one) ** 2)
    return jax.jit(jax.grad(loss)).lower(kernel).compile().memory_analysis().temp_size_in_bytes

  few = memory()
  monkeypatch.setattr(few_channels, 'suits', lambda *shapes: False)
  assert few < 0.5 * memory()


def test_the_first_of_equal_outputs_wins():
  x, kernel = np.zeros((1, 4, 4, 1), np.float32), np.zeros((3, 3, 1, 1), np.float32)
  kernel[1, 1] = 1
  image = jax.grad(lambda x: jnp.sum(few_channels.winners_and_moments(x, kernel)[0]))(x)
  np.testing.assert_array_equal(image[0, :, :, 0], [[1, 0, 1, 0], [0] * 4, [1, 0, 1, 0], [0] * 4])


def test_shapes_that_do_not_fit():
  with pytest.raises(TypeError, match=saying('ndim', 'equal', '3 and 4')):
    ms.nn.conv_general_dilated(np.zeros((8, 8, 3)), np.zeros((3, 3, 3, 4)), (1, 1), 'SAME')
  with pytest.raises(
    ValueError, match=saying('kernel (3, 3, 1, 4)', 'larger', 'images (1, 2, 8, 1)', 'padding', 'VALID')
  ):
    ms.nn.conv_general_dilated(np.zeros((1, 2, 8, 1)), np.zeros((3, 3, 1, 4)), (1, 1), 'VALID', dimension_numbers=NHWC)
  images = np.zeros((1, 1, 8, 8)), np.zeros((1, 1, 3, 3))
  for bad in ({'window_strides': (0, 1)}, {'rhs_dilation': (1, -1)}, {'lhs_dilation': (0, 1)}):
    with pytest.raises(ValueError, match=saying(*bad, 'at least 1', *bad.values())):
      ms.nn.conv_general_dilated(*images, **({'window_strides': (1, 1), 'padding': 'SAME'} | bad))
  with pytest.raises(ValueError, match=saying('max_pool', 'at least 2x2', '(1, 1, 8, 1)')):
    ms.nn.max_pool(np.zeros((1, 1, 8, 1)), (2, 2), (2, 2))


class TestNetworks:
  def test_inputs_that_do_not_fit(self):
    with pytest.raises(ValueError, match=saying('Conv4', 'at least 16x16', '(1, 8, 8, 1)')):
      ms.nn.from_linen(ms.nn.Conv4(5)).init(jax.random.key(0), np.zeros((1, 8, 8, 1)))
    with pytest.raises(ValueError, match=saying('MLP', '[B, D]', '(5,)', 'reshape')):
      ms.nn.from_linen(ms.nn.MLP()).init(jax.random.key(0), np.zeros(5))

  def test_conv4_is_the_papers(self):
    theta = jax.eval_shape(ms.nn.from_linen(ms.nn.Conv4(5)).init, jax.random.key(0), np.zeros((2, 28, 28, 1)))
    shapes = jax.tree.map(jnp.shape, theta)
    assert shapes['ConvBlock_0'] == {'kernel': (3, 3, 1, 64), 'scale': (64,), 'bias': (64,)}
    assert [shapes[f'ConvBlock_{i}']['kernel'] for i in (1, 2, 3)] == [(3, 3, 64, 64)] * 3
    assert shapes['Dense_0']['kernel'] == (64, 32)
    assert shapes['Dense_1'] == {'kernel': (32, 5), 'bias': (5,)}

  def test_conv4_in_bfloat16_keeps_theta_its_gradient_and_the_logits_in_float32(self):
    x = jnp.asarray(normal(10, 16, 16, 1), jnp.float32)
    single, half = (ms.nn.from_linen(ms.nn.Conv4(5, filters=4, dtype=dtype)) for dtype in (None, jnp.bfloat16))
    theta = jax.jit(single.init)(jax.random.key(1), x)
    assert jax.eval_shape(half.init, jax.random.key(1), x) == jax.eval_shape(lambda: theta)
    labels = np.arange(10) % 5
    losses = [
      jax.jit(jax.value_and_grad(lambda t, m=m: ms.losses.cross_entropy(m.apply(t, x), labels)))(theta)
      for m in (single, half)
    ]
    assert {leaf.dtype for leaf in jax.tree.leaves(losses[1])} == {jnp.dtype(jnp.float32)}
    np.testing.assert_allclose(losses[1][0], losses[0][0], rtol=2e-2)
    assert 1e-4 < relative_error(losses[1][1], losses[0][1]) < 0.3  # It rounds, and some windows have another winner.
    assert 'bf16' in jax.jit(half.apply).lower(theta, x).as_text()

  def test_mlp_is_the_papers(self):
    theta = jax.jit(ms.nn.from_linen(ms.nn.MLP()).init)(jax.random.key(0), np.zeros((1, 1), np.float32))
    assert sorted(leaf.shape for leaf in jax.tree.leaves(theta)) == [(1,), (1, 40), (40,), (40,), (40, 1), (40, 40)]
    assert max(np.max(np.abs(leaf)) for leaf in jax.tree.leaves(theta)) < 0.03

  def test_a_module_with_running_averages_is_refused(self):
    model = ms.nn.from_linen(nn.BatchNorm(use_running_average=False))
    with pytest.raises(ValueError, match=saying('BatchNorm', 'batch_stats')):
      model.init(jax.random.key(0), np.zeros((2, 3), np.float32))
