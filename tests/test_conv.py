"""conv, max_pool and BatchNorm against lax and flax, to second order, in float64."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from problems import assert_trees_close, relative_error

import metasgd_jax as ms

FORMS = [
  ((3, 3), (1, 1), 'SAME'),
  ((3, 3), (1, 1), 'VALID'),
  ((3, 3), (2, 2), 'SAME'),
  ((1, 1), (1, 1), 'SAME'),
  ((5, 2), (1, 1), 'SAME'),
  ((2, 3), (2, 1), ((1, 0), (2, 1))),
]


def lax_conv(x, kernel, *, strides, padding):
  return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=('NHWC', 'HWIO', 'NHWC'))


def to_second_order(f):
  """The value of a scalar made of f(x, kernel), its gradient, and the gradient of that gradient's square."""
  scalar = lambda x, kernel: jnp.sum(jnp.sin(f(x, kernel)))
  first = jax.grad(scalar, argnums=(0, 1))
  second = jax.grad(lambda *a: sum(jnp.sum(g**2) for g in first(*a)), argnums=(0, 1))
  return lambda *a: (f(*a), first(*a), second(*a))


@pytest.mark.parametrize(('size', 'strides', 'padding'), FORMS)
def test_conv_equals_lax_to_second_order(size, strides, padding):
  rng = np.random.default_rng(0)
  with jax.enable_x64(True):
    x, kernel = jnp.asarray(rng.normal(size=(2, 7, 6, 3))), jnp.asarray(rng.normal(size=(*size, 3, 4)))
    ours, theirs = (
      jax.jit(to_second_order(functools.partial(conv, strides=strides, padding=padding)))(x, kernel)
      for conv in (ms.nn.conv, lax_conv)
    )
    assert_trees_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_conv_equals_lax_with_a_kernel_for_each_task():
  rng = np.random.default_rng(0)
  with jax.enable_x64(True):
    x, kernels = jnp.asarray(rng.normal(size=(3, 2, 6, 6, 2))), jnp.asarray(rng.normal(size=(3, 3, 3, 2, 4)))
    ours, theirs = (
      jax.jit(jax.vmap(to_second_order(functools.partial(conv, strides=(1, 1), padding='SAME'))))(x, kernels)
      for conv in (ms.nn.conv, lax_conv)
    )
    assert_trees_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(('size', 'strides', 'padding'), FORMS)
def test_a_checkpoint_moves_between_conv_and_flax(size, strides, padding):
  options = dict(features=5, kernel_size=size, strides=strides, padding=padding)
  ours, theirs = ms.nn.Conv(**options), nn.Conv(**options)
  x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
  params = theirs.init(jax.random.key(1), x)
  params = jax.tree.map(lambda p: jax.random.normal(jax.random.key(2), p.shape), params)
  assert jax.tree.map(jnp.shape, ours.init(jax.random.key(1), x)) == jax.tree.map(jnp.shape, params)
  np.testing.assert_allclose(ours.apply(params, x), theirs.apply(params, x), rtol=1e-5, atol=1e-5)


def test_conv_with_other_channels():
  with pytest.raises(ValueError, match=r'kernel \(3, 3, 2, 4\) expects 2 channels, got images of shape \(1, 8, 8, 3\)'):
    ms.nn.conv(jnp.zeros((1, 8, 8, 3)), jnp.zeros((3, 3, 2, 4)))


@pytest.mark.parametrize('shape', [(2, 8, 8, 3), (2, 7, 9, 3)])
@pytest.mark.parametrize('window', [(2, 2), (3, 1)])
def test_max_pool_equals_flax_to_second_order(shape, window):
  x = jnp.asarray(np.random.default_rng(0).permutation(np.prod(shape)).reshape(shape) / 7, jnp.float32)

  def value_and_gradients(pool):
    scalar = lambda x: jnp.sum(jnp.sin(pool(x)))
    return pool(x), jax.grad(scalar)(x), jax.grad(lambda x: jnp.sum(jax.grad(scalar)(x) ** 2))(x)

  ours = value_and_gradients(lambda x: ms.nn.max_pool(x, window=window))
  theirs = value_and_gradients(lambda x: nn.max_pool(x, window, window))
  assert_trees_close(ours, theirs)


def test_max_pool_of_equal_values_sends_the_gradient_to_one():
  x = jnp.ones((1, 4, 4, 1))
  grads = jax.grad(lambda x: jnp.sum(ms.nn.max_pool(x)))(x)[0, :, :, 0]
  assert np.array_equal(grads, np.tile([[1, 0], [0, 0]], (2, 2)))


def test_compiled_pooling_gradient_after_batch_norm_equals_float64(optimized):
  """Where comparing with the maximum lost gradients: normalisation is computed twice, and rounded apart."""

  def meta(x, scale):
    norm = lambda s, x: (x - jnp.mean(x)) * lax.rsqrt(jnp.var(x) + 1e-3) * s
    inner = lambda s: jnp.mean(ms.nn.max_pool(jnp.maximum(norm(s, x), 0)) ** 3)
    return jnp.mean(ms.nn.max_pool(norm(scale - 0.4 * jax.grad(inner)(scale), x)) ** 2)

  x = jax.random.normal(jax.random.key(0), (16, 28, 28, 8))
  single = jax.jit(jax.grad(meta, argnums=(0, 1)))(x, jnp.float32(1.3))
  with jax.enable_x64(True):
    double = jax.jit(jax.grad(meta, argnums=(0, 1)))(jnp.float64(np.asarray(x)), jnp.float64(1.3))
    assert relative_error(jax.tree.map(jnp.float64, single), double) < 1e-4  # The trap was 8e-3.


def test_batch_norm_equals_flax_by_the_batch_at_hand():
  x = 3 * jax.random.normal(jax.random.key(0), (6, 5, 5, 4)) + 1
  scale, bias = jax.random.normal(jax.random.key(1), (2, 4))
  ours = ms.nn.BatchNorm().apply({'params': {'scale': scale, 'bias': bias}}, x)
  flax_norm = nn.BatchNorm(use_running_average=False, epsilon=1e-3)
  stats = {'mean': jnp.zeros(4), 'var': jnp.ones(4)}
  theirs, _ = flax_norm.apply(
    {'params': {'scale': scale, 'bias': bias}, 'batch_stats': stats}, x, mutable=['batch_stats']
  )
  np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_shapes_that_do_not_fit():
  with pytest.raises(ValueError, match=r'conv takes x \[B, H, W, D\] .* got \(8, 8, 3\) and'):
    ms.nn.conv(jnp.zeros((8, 8, 3)), jnp.zeros((3, 3, 3, 4)))
  with pytest.raises(ValueError, match=r'kernel \(3, 3, 1, 4\) is larger than the padded images \(1, 2, 8, 1\)'):
    ms.nn.conv(jnp.zeros((1, 2, 8, 1)), jnp.zeros((3, 3, 1, 4)), padding='VALID')
  with pytest.raises(ValueError, match=r'max_pool takes images .* of at least 2x2, got \(1, 1, 8, 1\)'):
    ms.nn.max_pool(jnp.zeros((1, 1, 8, 1)))


class TestNetworks:
  def test_inputs_that_do_not_fit(self):
    with pytest.raises(ValueError, match=r'Conv4 .* of at least 16x16, got \(1, 8, 8, 1\)'):
      ms.nn.from_linen(ms.nn.Conv4(5)).init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    with pytest.raises(ValueError, match=r'MLP takes inputs \[B, D\], got \(5,\); reshape them'):
      ms.nn.from_linen(ms.nn.MLP()).init(jax.random.key(0), jnp.zeros(5))

  def test_conv4_is_the_papers(self):
    x = jnp.zeros((2, 28, 28, 1))
    theta = ms.nn.from_linen(ms.nn.Conv4(5)).init(jax.random.key(0), x)
    shapes = jax.tree.map(jnp.shape, theta)
    assert shapes['Conv_0']['kernel'] == (3, 3, 1, 64)
    assert [shapes[f'Conv_{i}']['kernel'] for i in (1, 2, 3)] == [(3, 3, 64, 64)] * 3
    assert shapes['Dense_0']['kernel'] == (64, 32)
    assert shapes['Dense_1'] == {'kernel': (32, 5), 'bias': (5,)}

  def test_conv4_pools_where_relu_would_come_first(self):
    """ReLU and max-pool commute; the order here is the cheaper one."""
    x = jax.random.normal(jax.random.key(0), (2, 6, 6, 3))
    assert np.array_equal(nn.relu(ms.nn.max_pool(x)), ms.nn.max_pool(nn.relu(x)))

  def test_mlp_is_the_papers(self):
    theta = ms.nn.from_linen(ms.nn.MLP()).init(jax.random.key(0), jnp.zeros((1, 1)))
    assert sorted(leaf.shape for leaf in jax.tree.leaves(theta)) == [(1,), (1, 40), (40,), (40,), (40, 1), (40, 40)]
    assert max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(theta)) < 0.03

  def test_a_module_with_running_averages_is_refused(self):
    model = ms.nn.from_linen(nn.BatchNorm(use_running_average=False))
    with pytest.raises(ValueError, match=r"BatchNorm has the collections \['batch_stats'\]"):
      model.init(jax.random.key(0), jnp.zeros((2, 3)))
