"""One table: what holds of every learner."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import assert_trees_close, conv_learner, episodes, random_bank, sinusoid_learner

import metasgd_jax as ms

SINUSOIDS = ms.tasks.sinusoid()
IMAGES = ms.tasks.few_shot(random_bank(size=16), way=5, shot=1, query=2)
CASES = {
  'meta_sgd': (sinusoid_learner(), SINUSOIDS),
  'meta_sgd, 3 steps': (sinusoid_learner(steps=3, alpha_range=(0.01, 0.01)), SINUSOIDS),
  'meta_sgd, first order': (sinusoid_learner(first_order=True), SINUSOIDS),
  'maml': (sinusoid_learner(ms.maml), SINUSOIDS),
  'maml, 3 steps': (sinusoid_learner(ms.maml, steps=3), SINUSOIDS),
  'anil': (sinusoid_learner(ms.maml, alpha={'Dense_0': 0.0, 'Dense_1': 0.0, 'Dense_2': 0.05}), SINUSOIDS),
  'meta_sgd on images': (conv_learner(), IMAGES),
}


@pytest.fixture(scope='module', params=CASES)
def case(request):
  learner, tasks = CASES[request.param]
  batch = episodes(tasks, 3)
  first = jax.tree.map(lambda a: a[0], batch)
  return learner, tasks, batch, learner.init(jax.random.key(0), first)


def task(batch, i):
  return jax.tree.map(lambda a: a[i], batch)


def test_adapt_keeps_structure_shapes_and_dtypes(case):
  learner, _, batch, meta = case
  adapted = learner.adapt(meta, task(batch, 0).support, jax.random.key(0))
  described = lambda tree: jax.tree.map(lambda a: (a.shape, a.dtype), tree)
  assert described(adapted) == described(meta.theta)


def test_path_goes_from_theta_to_what_adapt_gives(case):
  learner, _, batch, meta = case
  support = task(batch, 0).support
  path = learner.path(meta, support, jax.random.key(0))
  assert_trees_close(jax.tree.map(lambda a: a[0], path), meta.theta)
  adapted = learner.adapt(meta, support, jax.random.key(0))
  assert_trees_close(jax.tree.map(lambda a: a[-1], path), adapted, rtol=1e-4, atol=1e-5)


def test_batched_equals_a_loop_and_compiled_equals_not(case, optimized):
  learner, _, batch, meta = case
  keys = jax.random.split(jax.random.key(0), 3)
  batched, info = jax.jit(jax.vmap(learner.loss, (None, 0, 0)))(meta, batch, keys)
  for i in range(3):
    loss, one_info = learner.loss(meta, task(batch, i), keys[i])
    assert loss.shape == ()
    np.testing.assert_allclose(batched[i], loss, rtol=1e-4)
    assert_trees_close(jax.tree.map(lambda a, i=i: a[i], info), one_info, rtol=1e-4)


def test_loss_is_the_query_loss_after_adaptation(case):
  learner, _, batch, meta = case
  episode = task(batch, 1)
  adapted = learner.adapt(meta, episode.support, None)
  outputs = learner.predict(adapted, episode.query.x)
  loss_fn = ms.losses.cross_entropy if outputs.shape[-1] == 5 else ms.losses.mean_squared_error
  np.testing.assert_allclose(learner.loss(meta, episode, None)[0], loss_fn(outputs, episode.query.y), rtol=1e-5)


def test_every_part_that_is_learned_gets_a_gradient(case):
  learner, _, batch, meta = case
  grads = jax.jit(lambda: ms.value_and_grad(learner, meta, batch, jax.random.split(jax.random.key(0), 3))[1])()
  for path, grad in jax.tree_util.tree_leaves_with_path(grads):
    assert float(jnp.max(jnp.abs(grad))) > 0, path


def test_training_lowers_the_loss_on_unseen_tasks(case):
  learner, tasks, *_ = case
  images = learner is CASES['meta_sgd on images'][0]
  optimizer = optax.adam(3e-3 if images else 1e-3)
  state = ms.init(jax.random.key(0), tasks, learner=learner, optimizer=optimizer)
  metric = ms.losses.cross_entropy if images else ms.losses.mean_squared_error
  loss = lambda meta: ms.evaluate(learner, meta, tasks, jax.random.key(9), metric_fn=metric, num_tasks=100)[
    ..., -1
  ].mean()
  before = loss(state.meta)
  state = ms.train(
    state, tasks, learner=learner, optimizer=optimizer, meta_iterations=150 if images else 500, meta_batch=4
  )
  assert loss(state.meta) < 0.9 * before


def test_maml_is_meta_sgd_with_alpha_held():
  meta_sgd, maml = sinusoid_learner(alpha_range=(0.03, 0.03), steps=2), sinusoid_learner(ms.maml, alpha=0.03, steps=2)
  batch = episodes(SINUSOIDS, 3)
  keys = jax.random.split(jax.random.key(0), 3)
  both = [learner.init(jax.random.key(1), task(batch, 0)) for learner in (meta_sgd, maml)]
  assert_trees_close(both[0].theta, both[1].theta)
  assert both[1].alpha is None
  (loss, _), grads = ms.value_and_grad(meta_sgd, both[0], batch, keys)
  (held_loss, _), held_grads = ms.value_and_grad(maml, both[1], batch, keys)
  np.testing.assert_allclose(loss, held_loss, rtol=1e-6)
  assert_trees_close(grads.theta, held_grads.theta)


@pytest.mark.parametrize(
  ('build', 'options', 'message'),
  [
    (ms.meta_sgd, dict(steps=-1), 'steps must be an integer of at least 0, got -1'),
    (ms.meta_sgd, dict(steps=1.5), 'steps must be an integer of at least 0, got 1.5'),
    (ms.maml, dict(steps=-1), 'steps must be an integer of at least 0, got -1'),
    (ms.meta_sgd, dict(alpha_range=(0.2, 0.1)), 'finite range low <= high, got low=0.2, high=0.1'),
    (ms.meta_sgd, dict(alpha_range=(0.0, float('inf'))), 'finite range low <= high, got low=0.0, high=inf'),
    (ms.meta_sgd, dict(alpha_per='layer'), r"alpha_per must be one of \('entry', 'leaf', 'all'\), got 'layer'"),
    (ms.maml, dict(alpha=None), 'alpha must be a number or a pytree of numbers, got None; meta_sgd learns it'),
    (ms.meta_sgd, dict(metrics={'loss': ms.losses.accuracy}), "a metric cannot be named 'loss'"),
  ],
)
def test_bad_options(build, options, message):
  model = ms.nn.from_linen(ms.nn.MLP())
  with pytest.raises(ValueError, match=message):
    build(model, ms.losses.mean_squared_error, **options)


def test_a_rate_that_does_not_fit_is_named_before_training():
  learner = sinusoid_learner(ms.maml, alpha={'Dense_9': 0.1})
  with pytest.raises(ValueError, match=r"alpha\['Dense_9'\] matches nothing in theta"):
    ms.init(jax.random.key(0), SINUSOIDS, learner=learner, optimizer=optax.identity())


class TestLosses:
  @pytest.mark.parametrize('loss', [ms.losses.cross_entropy, ms.losses.accuracy])
  @pytest.mark.parametrize('shapes', [((5, 3), (5, 1)), ((4, 3), (1,)), ((3,), (3,))])
  def test_labels_of_other_shapes(self, loss, shapes):
    with pytest.raises(ValueError, match=r'logits must be \[B, N\] and labels \[B\], got'):
      loss(jnp.zeros(shapes[0]), jnp.zeros(shapes[1], jnp.int32))

  def test_labels_that_are_not_integers(self):
    with pytest.raises(ValueError, match='labels must be integers, 0 to N - 1, got float32'):
      ms.losses.cross_entropy(jnp.zeros((5, 3)), jnp.zeros(5))

  def test_targets_of_another_shape(self):
    with pytest.raises(ValueError, match=r'must have one shape, got \(5, 1\) and \(5,\); reshape one'):
      ms.losses.mean_squared_error(jnp.zeros((5, 1)), jnp.zeros(5))

  def test_values(self):
    logits, labels = jnp.log(jnp.array([[0.5, 0.25, 0.25], [0.2, 0.2, 0.6]])), jnp.array([0, 1])
    np.testing.assert_allclose(ms.losses.cross_entropy(logits, labels), -np.log([0.5, 0.2]).mean(), rtol=1e-6)
    np.testing.assert_allclose(ms.losses.accuracy(logits, labels), 0.5)
    np.testing.assert_allclose(ms.losses.mean_squared_error(jnp.array([[1.0], [3.0]]), jnp.zeros((2, 1))), 5.0)
