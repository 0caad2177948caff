"""Optax inside: Meta-SGD's update as a transformation, and inner loops by others, against those written by hand."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import (
  assert_slopes_by_differences,
  assert_trees_close,
  conv_learner,
  episodes,
  random_bank,
  saying,
  to_float64,
)

import metasgd_jax as ms
import metasgd_jax.inner.alpha as alpha_module
from metasgd_jax.outer import loop

MSE = ms.losses.mean_squared_error
NET = ms.nn.from_linen(ms.nn.MLP((6,), stddev=0.5))


def drawn(like, low=0.02, high=0.2, seed=0):
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda a: rng.uniform(low, high, np.shape(a)), like)


def loss_fn(theta, batch):
  return MSE(NET.apply(theta, batch.x), batch.y)


@functools.cache
def one_episode():
  """An episode of a sine curve, as NumPy arrays."""
  return jax.tree.map(lambda a: a[0], jax.device_get(episodes(ms.tasks.sinusoid(), 1)))


@functools.cache
def problem():
  """θ, α and an episode of a sine curve, as NumPy arrays of float64."""
  start = jax.device_get(jax.jit(NET.init)(jax.random.key(0), one_episode().support.x))
  theta, episode = jax.tree.map(lambda a: a.astype(np.float64), (start, one_episode()))
  return theta, drawn(theta), episode


def outer_gradient(adapt, meta, episode):
  """`adapt(θ, hyper, support) → θ′`; the query loss and its gradient by (θ, hyper)."""
  loss = lambda meta: loss_fn(adapt(*meta, episode.support), episode.query)
  return jax.jit(jax.value_and_grad(loss))(meta)


def by(optimizer, **options):
  return lambda theta, hyper, batch: ms.adapt_with_optimizer(
    theta, hyper, batch, loss_fn=loss_fn, optimizer_fn=optimizer, **options
  )


def clip_without_nan(limit):
  """As docs/composition.md has it."""

  def update(updates, params=None):
    squared = sum(jnp.sum(g**2) for g in jax.tree.leaves(updates))
    factor = limit / jnp.sqrt(jnp.maximum(squared, limit**2))
    return jax.tree.map(lambda g: factor.astype(g.dtype) * g, updates)

  return optax.stateless(update)


class TestScaleByAlpha:
  def test_the_update_is_minus_alpha_times_the_gradient(self):
    theta = {'a': jnp.ones(2), 'b': jnp.ones((2, 2))}
    grads = {'a': jnp.array([1.0, -2.0]), 'b': jnp.full((2, 2), 3.0)}
    update = ms.scale_by_alpha({'a': jnp.array([0.5, 0.25]), 'b': -0.1})
    updates, _ = update.update(grads, update.init(theta))
    np.testing.assert_allclose(updates['a'], [-0.5, 0.5])
    np.testing.assert_allclose(updates['b'], 0.3)
    np.testing.assert_allclose(optax.apply_updates(theta, updates)['a'], [0.5, 1.5])

  @pytest.mark.parametrize('prefix', [0.1, {'Dense_0': -0.2, 'Dense_1': {'kernel': None, 'bias': 0.3}}], ids=str)
  def test_alpha_is_as_adapt_takes_it(self, prefix):
    with jax.enable_x64(True):
      theta, _, episode = problem()
      adapted = lambda theta: (
        by(ms.scale_by_alpha, steps=2)(theta, prefix, episode.support),
        ms.adapt(theta, prefix, episode.support, loss_fn=loss_fn, steps=2),
      )
      assert_trees_close(*jax.jit(adapted)(theta), rtol=1e-12, atol=1e-14)

  @pytest.mark.parametrize('clip', [optax.clip_by_global_norm, clip_without_nan])
  def test_composes_with_clipping_and_has_a_gradient_by_alpha(self, clip):
    """Against clipping written down: g · min(1, 1 / ‖g‖), where ‖g‖ > 1."""
    optimizer = lambda alpha: optax.chain(clip(1.0), ms.scale_by_alpha(alpha))
    with jax.enable_x64(True):
      theta, alpha, episode = problem()
      steep = lambda theta, batch: 20 * loss_fn(theta, batch)

      def by_hand(theta, alpha, batch):
        grads = jax.grad(steep)(theta, batch)
        norm = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(grads)))
        return jax.tree.map(lambda t, a, g: t - a * g / jnp.maximum(norm, 1.0), theta, alpha, grads)

      assert jax.jit(lambda theta: optax.tree.norm(jax.grad(steep)(theta, episode.support)))(theta) > 2
      clipped = lambda theta, alpha, batch: ms.adapt_with_optimizer(
        theta, alpha, batch, loss_fn=steep, optimizer_fn=optimizer
      )
      loss, grads = outer_gradient(clipped, (theta, alpha), episode)
      expected, expected_grads = outer_gradient(by_hand, (theta, alpha), episode)
      np.testing.assert_allclose(loss, expected, rtol=1e-12)
      assert_trees_close(grads, expected_grads, rtol=1e-9, atol=1e-12)
      assert max(np.abs(g).max() for g in jax.tree.leaves(grads[1])) > 0.1

  def test_a_task_with_no_shot_behind_clipping(self):
    """optax's norm gives NaN at a gradient of zero; by the documents' form θ's slope is the query loss's, α's 0."""
    loss = lambda theta, batch: ms.losses.masked(MSE)(batch.x @ theta, batch.y)
    ones = lambda *shape: np.ones(shape, np.float32)
    batch = lambda there: ms.Batch(ones(2, 3), (ones(2, 1), np.full(2, there)))
    meta = np.float32(0.5) * ones(3, 1), np.float32(0.1) * ones(3, 1)

    def slopes(clip):
      inner = lambda alpha: optax.chain(clip(1.0), ms.scale_by_alpha(alpha))
      adapt = lambda meta: ms.adapt_with_optimizer(*meta, batch(False), loss_fn=loss, optimizer_fn=inner, steps=2)
      return jax.jit(jax.grad(lambda meta: loss(adapt(meta), batch(True))))(meta)

    assert all(np.isnan(slope).all() for slope in jax.tree.leaves(slopes(optax.clip_by_global_norm)))
    by_theta, by_alpha = slopes(clip_without_nan)
    np.testing.assert_allclose(by_theta, jax.jit(jax.grad(loss))(meta[0], batch(True)), rtol=1e-6)
    np.testing.assert_array_equal(by_alpha, 0)

  def test_is_an_outer_optimiser_like_any_other(self):
    optimizer = ms.scale_by_alpha(0.1)
    params = {'w': jnp.full(3, 2.0)}
    state = optimizer.init(params)
    for _ in range(50):
      updates, state = jax.jit(optimizer.update)(params, state)  # The gradient of ½‖w‖² is w.
      params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params['w'], 2 * 0.9**50, rtol=1e-4)

  def test_keeps_dtypes(self):
    update = ms.scale_by_alpha(jnp.float32(0.5))
    updates, _ = update.update({'w': jnp.ones(2, jnp.bfloat16)}, update.init({'w': jnp.ones(2, jnp.bfloat16)}))
    assert updates['w'].dtype == jnp.bfloat16

  def test_what_optax_keeps_from_it_may_have_an_alpha(self):
    theta = {'a': {'w': jnp.ones(2), 'b': jnp.ones(1)}, 'c': jnp.ones(3)}
    alpha = jax.tree.map(lambda t: jnp.full(t.shape, 0.5), theta)
    labels = {'a': 'left', 'c': 'right'}
    for given in (alpha, {'a': 0.5, 'c': 0.25}, 0.5):
      halves = optax.partition({'left': ms.scale_by_alpha(given), 'right': ms.scale_by_alpha(0.1)}, labels)
      updates, _ = halves.update(theta, halves.init(theta))
      np.testing.assert_allclose(updates['a']['w'], -0.5, rtol=1e-6)
      np.testing.assert_allclose(updates['c'], -0.1, rtol=1e-6)
    one = optax.masked(ms.scale_by_alpha(alpha), {'a': {'w': True, 'b': False}, 'c': False})
    updates, _ = one.update(theta, one.init(theta))
    np.testing.assert_allclose([updates['a']['w'][0], updates['a']['b'][0], updates['c'][0]], [-0.5, 1, 1], rtol=1e-6)
    nobody = optax.partition({'all': ms.scale_by_alpha(0.5), 'none': ms.scale_by_alpha(0.1)}, 'all')
    np.testing.assert_allclose(nobody.update(theta, nobody.init(theta))[0]['c'], -0.5, rtol=1e-6)
    left = optax.partition({'left': ms.scale_by_alpha({'a': 0.5, 'd': 1.0}), 'right': optax.sgd(0.1)}, labels)
    with pytest.raises(ValueError, match=saying("alpha['d']", 'nothing in theta')):
      left.init(theta)

  def test_the_work_for_hidden_rates_grows_with_their_number_alone(self, monkeypatch):
    theta = {str(i): jnp.ones(1) for i in range(100)}
    flattened = []
    flatten = alpha_module.tree_flatten_with_path
    monkeypatch.setattr(alpha_module, 'tree_flatten_with_path', lambda *a, **k: flattened.append(1) or flatten(*a, **k))
    optax.masked(ms.scale_by_alpha(theta), dict.fromkeys(theta, False) | {'0': True}).init(theta)
    assert len(flattened) <= 4

  def test_takes_numbers_that_are_no_arrays(self):
    update = ms.scale_by_alpha({'a': 0.5, 'b': 2.0}).update
    updates, _ = update({'a': 3.0, 'b': np.array([1.0, 2.0])}, optax.EmptyState())
    assert updates['a'] == -1.5
    np.testing.assert_array_equal(updates['b'], [-2, -4])

  def test_names_a_leaf_that_does_not_fit(self):
    with pytest.raises(ValueError, match=saying("alpha['w'] has shape (3,)", "theta['w'] has shape (2,)")):
      ms.scale_by_alpha({'w': jnp.ones(3)}).init({'w': jnp.ones(2)})


class TestAdaptWith:
  @pytest.mark.parametrize('first_order', [False, True])
  @pytest.mark.parametrize('steps', [0, 1, 3])
  def test_with_scale_by_alpha_it_is_adapt(self, steps, first_order):
    options = dict(steps=steps, first_order=first_order)
    plain = lambda theta, alpha, batch: ms.adapt(theta, alpha, batch, loss_fn=loss_fn, **options)
    with jax.enable_x64(True):
      theta, alpha, episode = problem()
      loss, grads = outer_gradient(by(ms.scale_by_alpha, **options), (theta, alpha), episode)
      expected, expected_grads = outer_gradient(plain, (theta, alpha), episode)
      np.testing.assert_allclose(loss, expected, rtol=1e-13)
      assert_trees_close(grads, expected_grads, rtol=1e-10, atol=1e-13)

  def test_momentum_by_hand(self):
    """m ← μ m + g, θ ← θ − η m, its meta-gradient by θ, η and μ."""

    def by_hand(theta, hyper, batch):
      trace = jax.tree.map(jnp.zeros_like, theta)
      for _ in range(3):
        trace = jax.tree.map(lambda m, g: hyper['mu'] * m + g, trace, jax.grad(loss_fn)(theta, batch))
        theta = jax.tree.map(lambda t, m: t - hyper['rate'] * m, theta, trace)
      return theta

    with jax.enable_x64(True):
      theta, _, episode = problem()
      meta = theta, {'rate': 0.05, 'mu': 0.8}
      adapt = by(lambda hyper: optax.sgd(hyper['rate'], hyper['mu']), steps=3)
      (loss, grads), (expected, expected_grads) = (outer_gradient(a, meta, episode) for a in (adapt, by_hand))
      np.testing.assert_allclose(loss, expected, rtol=1e-12)
      assert_trees_close(grads, expected_grads, rtol=1e-9, atol=1e-12)
      assert abs(grads[1]['mu']) > 1e-4

  def test_adam_by_hand(self):
    """Kingma and Ba 2015, Algorithm 1, with ε under the root as well; by θ, the rate, β₁ and β₂."""

    def by_hand(theta, hyper, batch):
      m = v = jax.tree.map(jnp.zeros_like, theta)
      b1, b2 = hyper['b1'], hyper['b2']
      for t in (1, 2, 3):
        g = jax.grad(loss_fn)(theta, batch)
        m = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, m, g)
        v = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, v, g)
        step = lambda t_, m, v, t=t: t_ - hyper['rate'] * m / (1 - b1**t) / (jnp.sqrt(v / (1 - b2**t) + 1e-8) + 1e-8)
        theta = jax.tree.map(step, theta, m, v)
      return theta

    optimizer = lambda hyper: optax.adam(hyper['rate'], hyper['b1'], hyper['b2'], eps_root=1e-8)
    with jax.enable_x64(True):
      theta, _, episode = problem()
      meta = theta, {'rate': 0.02, 'b1': 0.7, 'b2': 0.9}
      (loss, grads), (expected, expected_grads) = (
        outer_gradient(a, meta, episode) for a in (by(optimizer, steps=3), by_hand)
      )
      np.testing.assert_allclose(loss, expected, rtol=1e-12)
      assert_trees_close(grads, expected_grads, rtol=1e-8, atol=1e-11)
      assert all(abs(g) > 1e-5 for g in jax.tree.leaves(grads[1]))

  @pytest.mark.parametrize('first_order', [False, True])
  def test_adams_root_of_zero_needs_eps_root(self, first_order):
    """Behind a ReLU that is off every gradient is zero: NaN without eps_root, finite with it."""
    theta = {'w': np.float32([1, -1]), 'out': np.ones(2, np.float32)}  # The second unit is off for positive inputs.
    loss_fn = lambda t, x: (jax.nn.relu(x * t['w']) @ t['out'] - 1) ** 2

    def slope(eps_root):
      optimizer = lambda hyper: optax.adam(hyper['rate'], b2=hyper['b2'], eps_root=eps_root)
      options = dict(loss_fn=loss_fn, optimizer_fn=optimizer, steps=2, first_order=first_order)
      outer = lambda theta, hyper: loss_fn(ms.adapt_with_optimizer(theta, hyper, 0.5, **options), 0.7)
      return jax.tree.leaves(jax.jit(jax.grad(outer, (0, 1)))(theta, {'rate': 0.1, 'b2': 0.99}))

    assert any(np.isnan(leaf).any() for leaf in slope(0.0))
    with_root = slope(1e-8)
    assert all(np.isfinite(leaf).all() for leaf in with_root)
    assert max(np.abs(leaf).max() for leaf in with_root) > 0.01

  def test_first_order_with_momentum_has_no_second_derivatives(self):
    """The Jacobian of θ′ by θ is one; that by μ is what the constant gradients say."""
    loss_fn = lambda t, _: jnp.sum(t**4)
    adapt = lambda t, mu, order: ms.adapt_with_optimizer(
      t, mu, None, loss_fn=loss_fn, optimizer_fn=lambda mu: optax.sgd(0.01, mu), steps=2, first_order=order
    )
    t = np.float32([1, 2])
    jacobians = lambda t, mu: [jax.jacobian(adapt, (0, 1))(t, mu, order) for order in (True, False)]
    (by_theta, by_mu), (second, _) = jax.jit(jacobians)(t, 0.5)
    np.testing.assert_allclose(by_theta, np.eye(2), rtol=1e-6)
    assert np.abs(second - np.eye(2)).max() > 0.1
    np.testing.assert_allclose(by_mu, -0.01 * 4 * t**3, rtol=1e-5)

  def test_first_order_makes_the_loss_in_value_a_constant(self):
    """Polyak's step size is the loss over the gradient's square."""
    options = dict(loss_fn=lambda t, _: jnp.sum(t**4), optimizer_fn=optax.polyak_sgd)
    adapt = lambda t, first_order: ms.adapt_with_optimizer(t, 10.0, None, first_order=first_order, **options)
    jacobians = jax.jit(lambda t: [jax.jacobian(adapt)(t, first_order) for first_order in (True, False)])
    first, second = jacobians(np.float32([1, 2]))
    np.testing.assert_allclose(first, np.eye(2), atol=1e-6)
    assert np.abs(second - np.eye(2)).max() > 0.1

  def test_path_holds_each_step(self):
    theta = {'w': np.float32([3, -1])}
    options = dict(loss_fn=lambda t, _: jnp.sum(t['w'] ** 2), optimizer_fn=lambda rate: optax.adam(rate, eps_root=1e-8))
    path, each = jax.jit(
      lambda theta: (
        ms.adapt_path_with_optimizer(theta, 0.1, None, steps=3, **options),
        [ms.adapt_with_optimizer(theta, 0.1, None, steps=steps, **options) for steps in range(4)],
      )
    )(theta)
    for at, adapted in zip(np.asarray(path['w']), each, strict=True):
      np.testing.assert_allclose(at, adapted['w'], rtol=1e-6)
    assert path['w'].shape == (4, 2)

  def test_a_state_that_counts_is_new_for_each_task(self):
    """A rate that falls with the step: two tasks side by side each take 0.1 and then 0.05."""
    schedule = lambda rate: optax.sgd(lambda count: rate / (count + 1))
    loss_fn = lambda t, b: jnp.sum(b * t)
    one = lambda b: ms.adapt_with_optimizer(jnp.zeros(()), 0.1, b, loss_fn=loss_fn, optimizer_fn=schedule, steps=2)
    np.testing.assert_allclose(jax.jit(jax.vmap(one))(np.float32([1, 2])), [-0.15, -0.3], rtol=1e-6)

  def test_what_asks_for_the_loss_gets_it(self):
    """Polyak's step (f − f*) / ‖g‖² on f = ½‖t − c‖² with f* = 0 halves the distance: by hand, and differentiable."""
    loss_fn = lambda t, c: 0.5 * jnp.sum((t - c) ** 2)
    polyak = lambda scale: optax.chain(optax.scale_by_polyak(max_learning_rate=10.0), optax.scale(-scale))
    adapt = lambda scale: ms.adapt_with_optimizer(
      jnp.ones(3), scale, jnp.zeros(3), loss_fn=loss_fn, optimizer_fn=polyak, steps=2
    )
    adapted, slope = jax.jit(lambda scale: (adapt(scale), jax.jacobian(adapt)(scale)))(1.0)
    np.testing.assert_allclose(adapted, np.full(3, 0.25), rtol=1e-6)
    np.testing.assert_allclose(slope, np.full(3, -0.5), rtol=1e-5)  # (1 − s/2)²

  def test_a_line_search_adapts(self):
    loss_fn = lambda t, c: jnp.sum((t - c) ** 4)
    zeros, c = np.zeros(3, np.float32), np.arange(3, dtype=np.float32)
    adapt = lambda t: ms.adapt_with_optimizer(
      t, None, c, loss_fn=loss_fn, optimizer_fn=lambda _: optax.lbfgs(), steps=12
    )
    after, before = jax.jit(lambda t: (loss_fn(adapt(t), c), loss_fn(t, c)))(zeros)
    assert after < 1e-3 < before

  def test_numbers_of_another_dtype_leave_the_state_as_it_is(self):
    with jax.enable_x64(True):
      theta = {'w': np.ones(2, np.float32)}
      optimizer = lambda b1: optax.adam(0.1, b1, eps_root=1e-8)
      options = dict(loss_fn=lambda t, _: jnp.sum(t['w'] ** 2), optimizer_fn=optimizer, steps=2)
      adapted = jax.eval_shape(lambda *meta: ms.adapt_with_optimizer(*meta, None, **options), theta, np.float64(0.9))
      assert adapted['w'].dtype == jnp.float32

  def test_a_part_adapts(self):
    with jax.enable_x64(True):
      theta, alpha, episode = problem()
      head = lambda name: name.startswith('Dense_1')
      rates = {'Dense_0': None, 'Dense_1': alpha['Dense_1']}
      part = by(lambda a: ms.scale_by_alpha({'Dense_0': None, 'Dense_1': a}), steps=2, adapts=head)
      loss, grads = outer_gradient(part, (theta, alpha['Dense_1']), episode)
      whole = lambda theta, a, batch: ms.adapt(theta, rates | {'Dense_1': a}, batch, loss_fn=loss_fn, steps=2)
      expected, expected_grads = outer_gradient(whole, (theta, alpha['Dense_1']), episode)
      np.testing.assert_allclose(loss, expected, rtol=1e-13)
      assert_trees_close(grads, expected_grads, rtol=1e-10, atol=1e-13)
      options = dict(loss_fn=loss_fn, optimizer_fn=optax.sgd, steps=2, adapts=head)
      path = jax.jit(lambda theta: ms.adapt_path_with_optimizer(theta, 0.1, episode.support, **options))(theta)
      assert {leaf.shape[0] for leaf in jax.tree.leaves(path)} == {3}
      np.testing.assert_array_equal(path['Dense_0']['kernel'][2], theta['Dense_0']['kernel'])


class TestMistakes:
  def adapt(self, optimizer, theta=None, loss_fn=lambda t, _: jnp.sum(t['w'] ** 2), **options):
    return ms.adapt_with_optimizer(
      theta or {'w': jnp.ones(2)}, 0.1, None, loss_fn=loss_fn, optimizer_fn=optimizer, **options
    )

  def test_an_optimiser_that_is_no_function(self):
    with pytest.raises(ValueError, match=saying('optimizer', 'a function', '→ optax.GradientTransformation', 'got')):
      self.adapt(optax.sgd(0.1))

  def test_a_function_that_returns_something_else(self):
    with pytest.raises(ValueError, match=saying('optimizer', 'return', 'optax.GradientTransformation', 'got float')):
      self.adapt(lambda rate: rate)

  def test_an_optimiser_that_needs_more_than_a_gradient(self):
    sgd = optax.sgd(0.1)
    for optimizer in (
      optax.lookahead(sgd, 2, 0.5),
      optax.contrib.sam(sgd, sgd),
      optax.chain(optax.contrib.sam(sgd, sgd)),
    ):
      with pytest.raises(ValueError, match=saying('the update of `optimizer_fn` fails', 'Error: ', 'use another')):
        self.adapt(lambda _, optimizer=optimizer: optimizer)

  @pytest.mark.parametrize('steps', [-1, 1.5, True])
  def test_steps(self, steps):
    with pytest.raises(ValueError, match=saying('steps', 'an integer of at least 0', f'got {steps}')):
      self.adapt(optax.sgd, steps=steps)

  def test_a_loss_for_each_item_also_under_jit(self):
    with pytest.raises(ValueError, match=saying('loss_fn', 'a scalar', 'got shape (2,)')):
      jax.jit(lambda: self.adapt(optax.sgd, loss_fn=lambda t, _: t['w']))()

  def test_a_loss_of_integers_also_under_jit(self):
    with pytest.raises(ValueError, match=saying('loss_fn', 'floating-point scalar', 'got dtype int32')):
      jax.jit(lambda: self.adapt(optax.sgd, loss_fn=lambda t, _: jnp.sum(t['w'] > 0)))()

  def test_integers_in_theta(self):
    with pytest.raises(ValueError, match=saying("theta['n']", 'int32')):
      self.adapt(optax.sgd, theta={'n': jnp.arange(2)})


class TestLearner:
  @staticmethod
  def meta_sgd(model, loss_fn, **options):
    hyper = lambda key, theta: ms.init_alpha(key, theta)
    return ms.learners.inner_optimizer(model, loss_fn, optimizer_fn=ms.scale_by_alpha, hyper=hyper, **options)

  @pytest.mark.parametrize('first_order', [False, True])
  def test_with_scale_by_alpha_it_is_meta_sgd(self, first_order):
    options = dict(steps=3, first_order=first_order, metrics={'error': MSE})
    learner, meta_sgd = self.meta_sgd(NET, MSE, **options), ms.meta_sgd(NET, MSE, **options)
    with jax.enable_x64(True):
      some = to_float64(episodes(ms.tasks.sinusoid(), 2))
      keys = jax.random.split(jax.random.key(0), 2)
      start, expected_start = (jax.jit(made.init)(jax.random.key(1), one_episode()) for made in (learner, meta_sgd))
      assert_trees_close(ms.MetaParams(*start), expected_start, rtol=0, atol=0)
      meta = to_float64(start)
      (loss, info), grads = jax.jit(lambda m: ms.mean_loss_and_grad(learner, m, some, keys))(meta)
      of_meta_sgd = jax.jit(lambda m: ms.mean_loss_and_grad(meta_sgd, m, some, keys))
      (expected, expected_info), expected_grads = of_meta_sgd(ms.MetaParams(*meta))
      np.testing.assert_allclose(loss, expected, rtol=1e-12)
      assert_trees_close(info, expected_info)
      assert_trees_close(ms.MetaParams(*grads), expected_grads, rtol=1e-9, atol=1e-12)

  def test_inductive_batch_norm(self):
    tasks = ms.tasks.few_shot(random_bank(size=8), way=3, shot=1, query=2)
    one = jax.tree.map(lambda a: a[0], episodes(tasks, 1))
    learner, meta_sgd = (conv_learner(build, way=3, steps=2, inductive=True) for build in (self.meta_sgd, ms.meta_sgd))
    meta = jax.jit(learner.init)(jax.random.key(0), one)
    metas = (learner, meta), (meta_sgd, ms.MetaParams(*meta))
    path, expected = jax.jit(lambda: [made.path(meta, one.support, None) for made, meta in metas])()
    assert_trees_close(path, expected, rtol=1e-5)

  def test_meta_gradient_by_differences(self):
    optimizer = lambda h: optax.adam(jnp.exp(h['log_rate']), jax.nn.sigmoid(h['b1']), eps_root=1e-6)
    hyper = {'log_rate': -3.0, 'b1': 1.0}
    learner = ms.learners.inner_optimizer(NET, MSE, optimizer_fn=optimizer, hyper=hyper, steps=3)
    with jax.enable_x64(True):
      theta, _, episode = problem()
      meta = ms.MetaParams(theta, to_float64(jax.jit(learner.init)(jax.random.key(0), episode).hyper))
      assert_slopes_by_differences(lambda m: learner.loss(ms.learners.WithHyper(*m), episode, None)[0], meta)

  def test_trains_and_is_evaluated_after_each_step(self):
    """Rate and momentum of lines' descent: by the same train and evaluate as any learner's, to a lower loss."""

    def episode(weights, key):
      x = jax.random.normal(key, (10, 3))
      return ms.Episode(ms.Batch(x[:5], x[:5] @ weights), ms.Batch(x[5:], x[5:] @ weights))

    tasks = ms.TaskDistribution(lambda key: jax.random.normal(key, (3, 1)), episode)
    line = ms.Model(lambda key, x: {'w': jax.random.normal(key, (3, 1))}, lambda theta, x: x @ theta['w'])
    inner = lambda h: optax.chain(optax.clip_by_global_norm(10.0), optax.sgd(h['rate'], h['momentum']))
    hyper = {'rate': 0.01, 'momentum': 0.5}
    learner = ms.learners.inner_optimizer(line, MSE, optimizer_fn=inner, hyper=hyper, steps=3)
    optimizer = optax.adam(1e-2)
    state = ms.init(jax.random.key(0), tasks, learner=learner, optimizer=optimizer)
    judge = lambda meta: ms.evaluate(learner, meta, tasks, jax.random.key(1), metric_fn=MSE, num_tasks=50)
    before = judge(state.meta)
    state = ms.train(state, tasks, learner=learner, optimizer=optimizer, meta_iterations=200, meta_batch=4)
    after = judge(state.meta)
    assert after.shape == (50, 1, 4)
    assert after[..., -1].mean() < 0.5 * before[..., -1].mean()
    assert abs(float(state.meta.hyper['momentum']) - 0.5) > 0.01
    assert abs(float(state.meta.hyper['rate']) - 0.01) > 0.01

  @pytest.mark.parametrize('change', [ms.adapt_only, lambda model, where: ms.low_rank(model, 1, where)])
  def test_of_models_of_which_a_part_adapts(self, change):
    model = change(NET, lambda name: name == 'Dense_1.kernel')
    learner = self.meta_sgd(model, MSE, steps=2)
    with jax.enable_x64(True):
      _, _, episode = problem()
      meta_sgd = ms.meta_sgd(model, MSE, steps=2)
      meta = to_float64(jax.jit(learner.init)(jax.random.key(0), episode))
      moved = jax.eval_shape(meta_sgd.init, jax.random.key(0), episode)
      assert jax.tree.structure(ms.MetaParams(*meta)) == jax.tree.structure(moved)
      adapted = lambda meta: (
        learner.adapt(meta, episode.support, None), meta_sgd.adapt(ms.MetaParams(*meta), episode.support, None)
      )  # fmt: skip
      assert_trees_close(*jax.jit(adapted)(meta), rtol=1e-12, atol=1e-14)

  @staticmethod
  def start(hyper, optimizer=lambda hyper: optax.sgd(hyper['rate'])):
    learner = ms.learners.inner_optimizer(NET, MSE, optimizer_fn=optimizer, hyper=hyper)
    return learner, jax.jit(learner.init)(jax.random.key(0), one_episode()), one_episode()

  @pytest.mark.parametrize('value', [1, True, 'fast', 1j, np.arange(2), optax.sgd], ids=lambda v: type(v).__name__)
  def test_what_cannot_be_learned(self, value):
    with pytest.raises(ValueError, match=saying('hyper.rate', 'floating-point', f'got {value!r}', 'not learned')):
      self.start({'rate': value, 'momentum': 0.9})

  def test_the_loop_compiles_once_with_numbers_of_python_and_a_state_of_python(self):
    """Also where the outer optimiser's state, and the meta-parameters of another's learner, start as plain numbers."""
    tasks = ms.tasks.sinusoid()
    plain, meta, _ = self.start({'rate': 0.01})
    assert not meta.hyper['rate'].weak_type
    weak = plain._replace(
      init=lambda key, episode: plain.init(key, episode)._replace(hyper={'rate': jnp.asarray(0.01)})
    )
    count = optax.GradientTransformation(
      lambda _: 0.0, lambda g, s, _=None: (jax.tree.map(lambda g: -0.01 * g, g), s + 1)
    )
    for learner in (plain, weak):
      state = ms.init(jax.random.key(0), tasks, learner=learner, optimizer=count)
      assert not any(leaf.weak_type for leaf in jax.tree.leaves((state.meta, state.opt_state)))
      before = loop._run_chunk._cache_size()
      options = dict(learner=learner, optimizer=count, meta_iterations=5, meta_batch=2, chunk=2)
      assert ms.train(state, tasks, **options).opt_state == 5
      assert loop._run_chunk._cache_size() - before == 1

  def test_a_module_of_parameters_is_a_start_and_no_function(self):
    """A learned step from each gradient's entry, by an Equinox MLP; its activation has to be taken out."""
    net = eqx.nn.MLP('scalar', 'scalar', 3, 1, key=jax.random.key(0))
    params, static = eqx.partition(net, eqx.is_inexact_array)

    def learned(params):
      step = lambda g: 0.1 * jax.vmap(eqx.combine(params, static))(g.ravel()).reshape(g.shape)
      return optax.stateless(lambda updates, _: jax.tree.map(step, updates))

    learner, meta, one = self.start(params, learned)
    assert_trees_close(meta.hyper, params, rtol=0, atol=0)
    grads = jax.jit(jax.grad(lambda meta: learner.loss(meta, one, None)[0]))(meta)
    assert np.abs(grads.hyper.layers[0].weight).max() > 1e-6
    with pytest.raises(ValueError, match=saying('hyper.activation', 'floating-point', 'custom_jvp')):
      self.start(net, learned)

  def test_what_it_learns_is_no_alpha(self):
    learner = ms.learners.inner_optimizer(
      NET, MSE, optimizer_fn=lambda hyper: optax.sgd(hyper['rate']), hyper={'rate': 0.1}
    )
    assert not hasattr(jax.eval_shape(learner.init, jax.random.key(0), one_episode()), 'alpha')
