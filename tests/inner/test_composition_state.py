"""Auxiliary outputs, running averages and dropout of other libraries beside `adapt`; padded tasks."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from problems import assert_slopes_by_differences, assert_trees_close, saying, to_float64

import metasgd_jax as ms

MSE = ms.losses.mean_squared_error
KEEP, EPSILON = 0.9, 1e-5


class Linen(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.BatchNorm(use_running_average=False, momentum=KEEP, epsilon=EPSILON)(nn.Dense(4)(x))
    return nn.Dense(1)(nn.relu(x))


class Nnx(nnx.Module):
  def __init__(self, rngs):
    self.dense, self.out = nnx.Linear(3, 4, rngs=rngs), nnx.Linear(4, 1, rngs=rngs)
    self.norm = nnx.BatchNorm(4, momentum=KEEP, epsilon=EPSILON, rngs=rngs)

  def __call__(self, x):
    return self.out(nnx.relu(self.norm(self.dense(x))))


def linen_loss(theta, batch):
  (x, y), averages = batch
  out, changed = Linen().apply({'params': theta, 'batch_stats': averages}, x, mutable=['batch_stats'])
  return MSE(out, y), changed['batch_stats']


def nnx_loss(theta, batch):
  (x, y), averages = batch
  graphdef = nnx.graphdef(nnx.eval_shape(lambda: Nnx(nnx.Rngs(0))))
  module = nnx.merge(graphdef, theta, averages, copy=True)
  loss = MSE(module(x), y)
  return loss, nnx.to_pure_dict(nnx.state(module, nnx.BatchStat))


def plain_loss(theta, batch):
  (x, y), averages = batch
  row = lambda name: theta[name].reshape(1, -1)
  x = x @ theta['w0'] + row('b0')
  mean, variance = x.mean(0), ((x - x.mean(0, keepdims=True)) ** 2).mean(0)
  x = (x - mean.reshape(1, -1)) / jnp.sqrt(variance.reshape(1, -1) + EPSILON) * row('scale') + row('bias')
  moved = lambda old, new: KEEP * old + (1 - KEEP) * new
  after = {'mean': moved(averages['mean'], mean), 'var': moved(averages['var'], variance)}
  return MSE(jax.nn.relu(x) @ theta['w1'] + row('b1'), y), after


LIBRARIES = {
  'linen': (
    linen_loss,
    lambda w: {
      'Dense_0': {'kernel': w['w0'], 'bias': w['b0']},
      'BatchNorm_0': {'scale': w['scale'], 'bias': w['bias']},
      'Dense_1': {'kernel': w['w1'], 'bias': w['b1']},
    },
    'BatchNorm_0',
  ),
  'nnx': (
    nnx_loss,
    lambda w: {
      'dense': {'kernel': w['w0'], 'bias': w['b0']},
      'norm': {'scale': w['scale'], 'bias': w['bias']},
      'out': {'kernel': w['w1'], 'bias': w['b1']},
    },
    'norm',
  ),
}


def problem():
  rng = np.random.default_rng(0)
  shapes = dict(w0=(3, 4), b0=(4,), scale=(4,), bias=(4,), w1=(4, 1), b1=(1,))
  meta = ms.MetaParams(*({n: rng.normal(size=s) * size for n, s in shapes.items()} for size in (1.0, 0.1)))
  averages = {'mean': rng.normal(size=4), 'var': rng.uniform(0.5, 2, 4)}
  batch = lambda: ms.Batch(rng.normal(size=(6, 3)), rng.normal(size=(6, 1)))
  return jax.tree.map(jnp.asarray, (meta, averages, batch(), batch()))


def by_hand(meta, averages, support, query):
  theta = meta.theta
  for _ in range(2):
    (_, averages), grads = jax.value_and_grad(plain_loss, has_aux=True)(theta, (support, averages))
    theta = jax.tree.map(lambda t, a, g: t - a * g, theta, meta.alpha, grads)
  return plain_loss(theta, (query, averages))[0], averages


class TestState:
  @pytest.mark.parametrize('library', LIBRARIES)
  def test_running_averages_beside_adapt_are_those_of_a_loop_by_hand(self, library):
    """The query's loss, its meta-gradient, and the averages after two steps, as docs/composition.md shows them."""
    loss, put, norm = LIBRARIES[library]

    def of_task(common, averages, support, query):
      theta, alpha, averages = put(common.theta), put(common.alpha), {norm: averages}
      for _ in range(2):
        adapted = ms.adapt(theta, alpha, (support, averages), loss_fn=lambda *inputs: loss(*inputs)[0])
        theta, averages = adapted, loss(theta, (support, averages))[1]
      return loss(theta, (query, averages))[0], averages[norm]

    with jax.enable_x64(True):
      given = problem()
      (value, after), grads = jax.jit(jax.value_and_grad(of_task, has_aux=True))(*given)
      (expected, expected_after), expected_grads = jax.jit(jax.value_and_grad(by_hand, has_aux=True))(*given)
      np.testing.assert_allclose(value, expected, rtol=1e-11)
      assert_trees_close(after, expected_after, rtol=1e-11)
      assert_trees_close(grads, expected_grads, rtol=1e-9, atol=1e-11)
      assert not np.allclose(after['mean'], given[1]['mean'])

  def test_a_key_of_dropout_in_the_batch(self):
    """The same key is the same mask at every step and on the way back; another key another loss."""

    class Net(nn.Module):
      @nn.compact
      def __call__(self, x):
        return nn.Dense(1)(nn.Dropout(0.5, deterministic=False)(nn.tanh(nn.Dense(8)(x))))

    def loss(theta, batch):
      (x, y), key = batch
      return MSE(Net().apply({'params': theta}, x, rngs={'dropout': key}), y)

    def outer(meta, key, adjoint):
      adapted = ms.adapt(*meta, (support, key), loss_fn=loss, steps=3, adjoint=adjoint)
      return loss(adapted, (query, jax.random.key(9)))

    with jax.enable_x64(True):
      _, _, support, query = problem()
      rng = np.random.default_rng(1)
      shapes = jax.eval_shape(Net().init, jax.random.key(0), support.x)['params']
      draw = lambda size: jax.tree.map(lambda s: rng.normal(size=s.shape) * size, shapes)
      meta = ms.MetaParams(draw(1.0), draw(0.1))
      key = jax.random.key(3)
      by = lambda adjoint: jax.jit(jax.value_and_grad(lambda meta, key: outer(meta, key, adjoint)))
      expected, expected_grads = by('reverse')(meta, key)
      for adjoint in ('checkpoint', 'hvp', 'revolve'):
        gradient = by(adjoint)
        loss_, grads = gradient(meta, key)
        np.testing.assert_allclose(loss_, expected, rtol=1e-12)
        assert_trees_close(grads, expected_grads, rtol=1e-9, atol=1e-12)
        assert abs(gradient(meta, jax.random.key(4))[0] - loss_) > 1e-6

  def test_nnx_dropout_draws_a_mask_a_step_and_has_a_meta_gradient(self):
    class Net(nnx.Module):
      def __init__(self, rngs):
        self.dense, self.out = nnx.Linear(3, 8, rngs=rngs), nnx.Linear(8, 1, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

      def __call__(self, x):
        return self.out(self.drop(jnp.tanh(self.dense(x))))

    graphdef, theta, rest = nnx.split(Net(nnx.Rngs(0)), nnx.Param, ...)

    def loss(theta, batch):
      (x, y), rest = batch
      module = nnx.merge(graphdef, theta, rest, copy=True)
      return MSE(module(x), y), nnx.split(module, nnx.Param, ...)[2]

    def outer(meta, rest=rest, new_masks=True):
      theta = meta.theta
      for _ in range(2):
        adapted = ms.adapt(theta, meta.alpha, (support, rest), loss_fn=lambda *inputs: loss(*inputs)[0])
        theta, rest = adapted, loss(theta, (support, rest))[1] if new_masks else rest
      return loss(theta, (query, rest))[0]

    with jax.enable_x64(True):
      _, _, support, query = problem()
      theta = to_float64(nnx.to_pure_dict(theta))
      meta = ms.MetaParams(theta, jax.tree.map(lambda t: np.full(t.shape, 0.1), theta))
      assert_slopes_by_differences(outer, meta)

      @jax.jit
      def with_new_and_with_one(meta):
        same = ms.adapt(*meta, (support, rest), loss_fn=lambda *inputs: loss(*inputs)[0], steps=2)
        return outer(meta), outer(meta, new_masks=False), loss(same, (query, rest))[0]

      new, one, adapted_at_once = with_new_and_with_one(meta)
      np.testing.assert_allclose(one, adapted_at_once, rtol=1e-12)
      assert abs(new - one) > 1e-6

  def test_nnx_dropout_has_a_mask_for_each_task_in_a_loop_over_tasks(self):
    """As docs/composition.md shows it. Three tasks have the same data, and two of them the same key."""

    class Net(nnx.Module):
      def __init__(self, rngs):
        self.out, self.drop = nnx.Linear(3, 1, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

      def __call__(self, x):
        return self.out(self.drop(x))

    graphdef, theta, streams = nnx.split(Net(nnx.Rngs(params=0, dropout=1)), nnx.Param, ...)

    def loss(theta, batch):
      (x, y), key = batch
      module = nnx.merge(graphdef, theta, streams, copy=True)
      nnx.reseed(module, dropout=key)
      return MSE(module(x), y)

    def of_task(key, support, query):
      step_key, query_key = jax.random.split(key)
      return loss(ms.adapt(theta, 0.1, (support, step_key), loss_fn=loss), (query, query_key))

    _, _, support, query = problem()
    keys = jax.vmap(jax.random.key)(np.array([0, 1, 0]))
    side_by_side = lambda keys: jax.vmap(of_task, (0, None, None))(keys, support, query)
    first, other, again, alone = jax.jit(lambda keys: [*side_by_side(keys), of_task(keys[1], support, query)])(keys)
    assert first == again
    assert abs(first - other) > 1e-3
    np.testing.assert_allclose(alone, other, rtol=1e-5)


class TestMasks:
  SHOTS = (1, 5)

  def padded(self, labels, width=5):
    """Tasks of 1 and 5 shots and 4 and 2 queries, and the same padded with what may not matter."""
    rng = np.random.default_rng(0)

    def pad(batch):
      n = len(batch.y)
      x, y = (np.concatenate([a, np.full((width - n, *a.shape[1:]), 2, a.dtype)]) for a in batch)
      return ms.Batch(x, (y, np.arange(width) < n))

    def batch(n):
      return ms.Batch(rng.normal(size=(n, 3)), rng.integers(0, 3, n) if labels else rng.normal(size=(n, 3)))

    tasks = [ms.Episode(batch(s), batch(q)) for s, q in zip(self.SHOTS, (4, 2), strict=True)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *[ms.Episode(*map(pad, task)) for task in tasks])
    return tasks, stacked

  @pytest.mark.parametrize('loss', [MSE, ms.losses.cross_entropy])
  def test_padded_tasks_give_the_meta_gradient_of_the_unpadded(self, loss):
    model = ms.nn.from_linen(ms.nn.MLP((4,), outputs=3, stddev=0.5))
    options = dict(steps=2)
    with jax.enable_x64(True):
      tasks, stacked = self.padded(labels=loss is not MSE)
      masked = ms.meta_sgd(model, ms.losses.masked(loss), **options)
      meta = to_float64(jax.jit(masked.init)(jax.random.key(0), jax.tree.map(lambda a: a[0], stacked)))
      keys = jax.random.split(jax.random.key(0), 2)
      (value, _), grads = jax.jit(lambda m: ms.mean_loss_and_grad(masked, m, stacked, keys))(meta)
      plain = ms.meta_sgd(model, loss, **options)
      one_by_one = lambda m: sum(plain.loss(m, task, None)[0] for task in tasks) / 2
      expected, expected_grads = jax.jit(jax.value_and_grad(one_by_one))(meta)
      np.testing.assert_allclose(value, expected, rtol=1e-12)
      assert_trees_close(grads, expected_grads, rtol=1e-11, atol=1e-14)

  def test_of_a_metric_it_is_the_mean_over_the_items_there(self):
    logits = np.eye(3, dtype=np.float32)[[0, 1, 2, 0]]
    targets = np.array([0, 1, 0, 1]), np.array([True, True, True, False])
    np.testing.assert_allclose(jax.jit(ms.losses.masked(ms.losses.accuracy))(logits, targets), 2 / 3, rtol=1e-6)

  def test_a_task_with_no_shot_stays(self):
    loss = lambda theta, batch: ms.losses.masked(MSE)(batch.x @ theta, batch.y)
    empty = ms.Batch(np.ones((2, 3), np.float32), (np.ones((2, 1), np.float32), np.zeros(2, bool)))
    theta = np.full((3, 1), 0.5, np.float32)
    np.testing.assert_array_equal(jax.jit(lambda theta: ms.adapt(theta, 0.1, empty, loss_fn=loss))(theta), theta)

  def test_mistakes(self):
    loss = ms.losses.masked(MSE)
    ones = lambda *shape, dtype=np.float32: np.ones(shape, dtype)
    with pytest.raises(ValueError, match=saying('targets', 'a pair (y, mask)', 'got ndarray', 'give Batch')):
      loss(ones(2, 1), ones(2, 1))
    with pytest.raises(ValueError, match=saying('mask', 'booleans of shape (2,)', 'got float32 of shape (2,)')):
      loss(ones(2, 1), (ones(2, 1), ones(2)))
    with pytest.raises(ValueError, match=saying('mask', 'booleans of shape (2,)', 'got bool of shape (2, 1)')):
      loss(ones(2, 1), (ones(2, 1), ones(2, 1, dtype=bool)))
