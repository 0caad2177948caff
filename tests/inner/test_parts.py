"""Models of which a part adapts, against those that adapt whole."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import (
  SmallConvNet,
  assert_slopes_by_differences,
  assert_trees_close,
  episodes,
  random_bank,
  saying,
  to_float64,
)

import metasgd_jax as ms

MSE = ms.losses.mean_squared_error
NET = ms.nn.from_linen(ms.nn.MLP((6, 5), stddev=0.5))
LAST = lambda name: name.startswith('Dense_2')
KERNELS = lambda name: name.endswith('kernel')


def first_of(tasks):
  return jax.tree.map(lambda a: a[0], jax.device_get(episodes(tasks, 1)))


@functools.cache
def episode():
  return first_of(ms.tasks.sinusoid())


def meta_of(learner, one=None):
  return jax.jit(learner.init)(jax.random.key(0), episode() if one is None else one)


def drawn(like, seed=0):
  """A tree of float64 numbers of these shapes, far from zero and from one another."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda a: rng.uniform(0.02, 0.2, a.shape), like)


def chosen(tree, where):
  """The tree with zeros for the leaves that are not chosen."""
  keep = lambda path, leaf: leaf * where(jax.tree_util.keystr(path, simple=True, separator='.'))
  return jax.tree_util.tree_map_with_path(keep, tree)


def as_there(tree, like):
  """The tree without the leaves for which `like` has `None`."""
  return jax.tree.map(lambda there, leaf: None if there is None else leaf, like, tree, is_leaf=lambda t: t is None)


@functools.cache
def gradient(learner):
  return jax.jit(jax.value_and_grad(lambda meta, one: learner.loss(meta, one, None)[0]))


@functools.cache
def whole():
  """What all are compared with: a learner that adapts all of the net, by reverse mode over reverse mode."""
  return ms.meta_sgd(NET, MSE, steps=3)


class TestPartly:
  @pytest.mark.parametrize('adjoint', ['reverse', 'checkpoint', 'hvp', 'revolve'])
  @pytest.mark.parametrize('where', [LAST, lambda name: name.endswith('bias')], ids=['head', 'biases'])
  def test_is_the_whole_with_rates_of_zero_for_the_rest(self, where, adjoint):
    part = ms.meta_sgd(ms.adapt_only(NET, where), MSE, steps=3, adjoint=adjoint)
    meta = meta_of(part)
    with jax.enable_x64(True):
      one = to_float64(episode())
      meta = to_float64(meta)
      alpha = drawn(meta.theta)
      rates = as_there(alpha, meta.alpha)
      loss, grads = gradient(part)(meta._replace(alpha=rates), one)
      expected, both = gradient(whole())(ms.MetaParams(meta.theta, chosen(alpha, where)), one)
      np.testing.assert_allclose(loss, expected, rtol=1e-12)
      assert_trees_close(grads.theta, both.theta, rtol=1e-9, atol=1e-12)
      assert_trees_close(grads.alpha, as_there(both.alpha, grads.alpha), rtol=1e-9, atol=1e-12)
      assert max(np.max(np.abs(g)) for g in jax.tree.leaves(grads.theta['Dense_0'])) > 0  # It is learned.
      if adjoint == 'reverse':  # The others equal the same whole.
        assert_slopes_by_differences(lambda m: part.loss(m, one, None)[0], meta._replace(alpha=rates))

  def test_alpha_has_no_entry_for_the_rest_and_the_optimiser_no_state(self):
    learner = ms.meta_sgd(ms.adapt_only(NET, LAST), MSE)
    meta = jax.eval_shape(learner.init, jax.random.key(0), episode())
    assert meta.alpha['Dense_0'] == {'kernel': None, 'bias': None}
    entries = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
    assert entries(meta.alpha) == entries(meta.theta['Dense_2'])

  def test_the_rest_is_the_same_after_adaptation_and_along_the_path(self):
    learner = ms.meta_sgd(ms.adapt_only(NET, LAST), MSE, steps=2)
    one = episode()
    meta = meta_of(learner)
    both = jax.jit(lambda *of: (learner.adapt(*of, None), learner.path(*of, None)))
    adapted, path = jax.device_get(both(meta, one.support))
    assert_trees_close(adapted['Dense_0'], meta.theta['Dense_0'], rtol=0, atol=0)
    assert not np.allclose(adapted['Dense_2']['bias'], meta.theta['Dense_2']['bias'], atol=1e-6)
    assert_trees_close(jax.tree.map(lambda a: a[-1], path), adapted)
    assert {leaf.shape[0] for leaf in jax.tree.leaves(path)} == {3}

  @pytest.mark.parametrize('per', ['entry', 'leaf', 'layer', 'all'])
  @pytest.mark.parametrize('by_step', [False, True])
  def test_rates_of_any_kind(self, per, by_step):
    learner = ms.meta_sgd(ms.adapt_only(NET, LAST), MSE, steps=2, alpha=ms.AlphaConfig(per=per, by_step=by_step))
    one = episode()
    meta = jax.device_get(meta_of(learner))
    value = next(iter(jax.tree.leaves(meta.alpha))).ravel()[0]
    same = ms.maml(ms.adapt_only(NET, LAST), MSE, alpha=value, steps=2)
    both = jax.jit(lambda *of: (learner.adapt(*of, None), same.adapt(of[0]._replace(alpha=None), of[1], None)))
    adapted, expected = both(meta, one.support)
    assert_trees_close(adapted['Dense_1'], meta.theta['Dense_1'], rtol=0, atol=0)
    assert_trees_close(expected, adapted)

  def test_an_inner_step_costs_less(self, optimized):
    """No product is taken for the gradient of a layer that stays, nor for the inputs of the first that moves."""
    wide = ms.nn.from_linen(ms.nn.MLP((200, 200, 200), stddev=0.5))
    x = np.ones((100, 1), np.float32)

    def flops(model):
      learner = ms.meta_sgd(model, MSE)
      meta = jax.eval_shape(learner.init, jax.random.key(0), episode())
      step = jax.jit(lambda meta: learner.adapt(meta, ms.Batch(x, x), None))
      return step.lower(meta).compile().cost_analysis()['flops']

    head = ms.adapt_only(wide, lambda name: name.startswith('Dense_3'))
    assert flops(head) < 0.4 * flops(wide)  # A way forward is a third.

  def test_of_a_part_a_part(self):
    model = ms.adapt_only(ms.adapt_only(NET, LAST), lambda name: name.endswith('bias'))
    meta = jax.eval_shape(ms.meta_sgd(model, MSE).init, jax.random.key(0), episode())
    assert [a.shape for a in jax.tree.leaves(meta.alpha)] == [(1,)]

  def test_inductive_batch_norm(self):
    model = ms.adapt_only(ms.nn.from_linen(SmallConvNet(3)), lambda name: name.startswith('Dense'))
    learner = ms.meta_sgd(model, ms.losses.cross_entropy, inductive=True)

    @jax.jit
    def both(one):
      adapted = learner.adapt(learner.init(jax.random.key(2), one), one.support, None)
      alone = jax.lax.map(lambda x: learner.predict(adapted, x[None])[0], one.query.x)
      return learner.predict(adapted, one.query.x), alone

    one = first_of(ms.tasks.few_shot(random_bank(size=8), way=3, shot=1, query=2))
    np.testing.assert_allclose(*both(one), rtol=1e-4, atol=1e-5)

  def test_none_in_mamls_rates(self):
    one = episode()
    learner = ms.maml(NET, MSE, alpha={'Dense_0': None, 'Dense_1': None, 'Dense_2': 0.1})
    zero = ms.maml(NET, MSE, alpha={'Dense_0': 0.0, 'Dense_1': 0.0, 'Dense_2': 0.1})
    meta = meta_of(learner)
    assert_trees_close(*(gradient(of)(meta, one) for of in (learner, zero)), rtol=1e-5)


class TestLowRank:
  def test_of_full_rank_takes_a_whole_step(self):
    """With A the unit matrix and held, W₀ + B moves as W does, each entry by its own rate."""
    part = ms.meta_sgd(ms.low_rank(NET, 1, KERNELS), MSE, steps=3)
    theta = jax.jit(NET.init)(jax.random.key(0), episode().support.x)
    with jax.enable_x64(True):
      one = to_float64(episode())
      theta = to_float64(theta)
      rates = drawn(theta)
      meta = ms.MetaParams(theta, chosen(rates, KERNELS))
      names = [f'Dense_{i}.kernel' for i in range(3)]
      kernels, steps = [t['kernel'] for t in theta.values()], [a['kernel'] for a in rates.values()]
      shapes = [k.shape for k in kernels]
      units = {n: {'a': np.eye(s[0]), 'b': np.zeros(s)} for n, s in zip(names, shapes, strict=True)}
      only_b = {n: {'a': np.zeros((s[0], s[0])), 'b': a} for n, s, a in zip(names, shapes, steps, strict=True)}
      held = jax.tree.map(lambda _: None, theta)
      low = ms.MetaParams({'base': theta, 'factors': units}, {'base': held, 'factors': only_b})
      compiled = jax.jit(
        lambda *of: [to.adapt(at, one.support, None) for to, at in zip((part, whole()), of, strict=True)]
      )
      adapted, expected = jax.device_get(compiled(low, meta))
      merged = {n: adapted['base'][n.split('.')[0]]['kernel'] + adapted['factors'][n]['b'] for n in names}
      assert_trees_close(merged, {n: expected[n.split('.')[0]]['kernel'] for n in names}, rtol=1e-10, atol=1e-13)
      loss, grads = gradient(part)(low, one)
      expected_loss, expected_grads = gradient(whole())(meta, one)
      np.testing.assert_allclose(loss, expected_loss, rtol=1e-12)
      assert_trees_close(grads.theta['base'], expected_grads.theta, rtol=1e-9, atol=1e-12)
      for n in names:
        layer = n.split('.')[0]
        for of, them in ((grads.theta, expected_grads.theta), (grads.alpha, expected_grads.alpha)):
          np.testing.assert_allclose(of['factors'][n]['b'], them[layer]['kernel'], rtol=1e-9, atol=1e-12)

  @pytest.mark.parametrize('adjoint', ['reverse', 'revolve'])
  def test_meta_gradient_by_differences(self, adjoint):
    learner = ms.meta_sgd(ms.low_rank(NET, 1, KERNELS), MSE, steps=3, adjoint=adjoint)
    meta = meta_of(learner)
    with jax.enable_x64(True):
      one, meta = to_float64(episode()), to_float64(meta)
      meta = ms.MetaParams(jax.tree.map(np.add, meta.theta, drawn(meta.theta)), drawn(meta.alpha, 1))
      assert_slopes_by_differences(lambda m: learner.loss(m, one, None)[0], meta)

  def test_starts_as_the_model_and_changes_by_the_rank(self):
    model = ms.nn.from_linen(SmallConvNet(3))
    low = ms.low_rank(model, 2, lambda name: name in ('ConvBlock_0.kernel', 'Dense_0.kernel'))
    x = np.float32(np.random.default_rng(0).normal(size=(3, 8, 8, 1)))
    learner = ms.meta_sgd(low, ms.losses.cross_entropy, steps=2, alpha=ms.AlphaConfig(0.5, 0.5))

    @jax.jit
    def of_all(x):
      meta = learner.init(jax.random.key(0), ms.Episode(ms.Batch(x, None), None))
      outputs = low.apply(meta.theta, x), model.apply(meta.theta['base'], x)
      return meta, outputs, learner.adapt(meta, ms.Batch(x, np.arange(3)), None)

    meta, outputs, adapted = jax.device_get(of_all(x))
    theta = meta.theta
    np.testing.assert_array_equal(*outputs)
    assert_trees_close(adapted['base'], theta['base'], rtol=0, atol=0)
    a, b = adapted['factors']['Dense_0.kernel'].values()
    assert np.linalg.matrix_rank(a @ b, tol=1e-6) == 2
    assert [f['a'].shape for f in theta['factors'].values()] == [(9, 2), (64, 2)]
    assert sum(t.size for t in jax.tree.leaves(meta.alpha)) == 2 * (9 + 4) + 2 * (64 + 3)
    assert np.std(theta['factors']['Dense_0.kernel']['a']) * math.sqrt(64) == pytest.approx(1, rel=0.2)

  def test_keeps_what_adapts_already(self):
    learner = ms.meta_sgd(ms.low_rank(ms.adapt_only(NET, LAST), 1, lambda name: name == 'Dense_1.kernel'), MSE)
    meta = jax.device_get(meta_of(learner))
    adapted = jax.device_get(jax.jit(lambda *of: learner.adapt(*of, None))(meta, episode().support))
    moved = jax.tree.map(lambda a, t: bool(np.any(a != t)), adapted, meta.theta)
    assert moved['base']['Dense_2'] == {'bias': True, 'kernel': True}
    assert moved['base']['Dense_1'] == {'bias': False, 'kernel': False}
    assert moved['factors'] == {'Dense_1.kernel': {'a': False, 'b': True}}  # b starts at zero, so a's gradient is.

  def test_inductive_batch_norm(self):
    low = ms.low_rank(ms.nn.from_linen(SmallConvNet(3)), 1, KERNELS)

    @jax.jit
    def both(x):
      theta = low.init(jax.random.key(0), x)
      return low.apply(theta, x, low.statistics(theta, x)), low.apply(theta, x)

    np.testing.assert_allclose(
      *both(np.float32(np.random.default_rng(0).normal(size=(4, 8, 8, 1)))), rtol=1e-5, atol=1e-6
    )


class TestMistakes:
  def test_nothing_chosen(self):
    with pytest.raises(ValueError, match=saying('adapts', 'none of', 'Dense_0.bias', 'Dense_0.kernel')):
      jax.eval_shape(
        ms.meta_sgd(ms.adapt_only(NET, lambda name: name == 'head'), MSE).init, jax.random.key(0), episode()
      )
    with pytest.raises(ValueError, match=saying('where', 'none of: Dense_0.kernel,')):
      jax.eval_shape(ms.low_rank(NET, 1, lambda name: 'bias' in name).init, jax.random.key(0), np.ones((2, 1)))

  @pytest.mark.parametrize('rank', [0, 1.5, True])
  def test_rank(self, rank):
    with pytest.raises(ValueError, match=saying('rank', 'integer of at least 1', f'got {rank!r}')):
      ms.low_rank(NET, rank, KERNELS)

  def test_a_matrix_that_is_too_small(self):
    with pytest.raises(ValueError, match=saying('rank', 'at most 1', 'Dense_0.kernel', '1x6', 'got 2')):
      jax.eval_shape(ms.low_rank(NET, 2, KERNELS).init, jax.random.key(0), np.ones((2, 1)))

  def test_learners_that_adapt_all(self):
    part = ms.adapt_only(NET, LAST)
    for build in (lambda: ms.learners.meta_lstm(part, MSE), lambda: ms.learners.fine_tuning(part, classes=4, way=2)):
      with pytest.raises(ValueError, match=saying('adapts all of theta', 'meta_sgd', 'maml')):
        build()

  def test_none_for_what_is_not_in_theta_and_for_all_of_it(self):
    theta = {'a': jnp.asarray(np.ones(2, np.float32))}
    loss_fn = lambda t, batch: jnp.sum(t['a'] ** 2)
    with pytest.raises(ValueError, match=saying("alpha['b']", 'nothing in theta')):
      ms.adapt(theta, {'a': 0.1, 'b': None}, None, loss_fn=loss_fn)
    with pytest.raises(ValueError, match=saying('alpha', "theta['a']")):
      ms.adapt(theta, None, None, loss_fn=loss_fn)
    assert_trees_close(ms.adapt(theta, {'a': None}, None, loss_fn=loss_fn), theta)
