"""One table: what holds of every learner."""

from typing import Any, NamedTuple

import flax.linen as nn
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
  sinusoid_learner,
  to_float64,
)

import metasgd_jax as ms

SINUSOIDS = ms.tasks.sinusoid()
IMAGES = ms.tasks.few_shot(random_bank(size=16), way=5, shot=1, query=2)
SEQUENCES = ms.tasks.few_shot(random_bank(size=16), way=5, shot=1, query=2)
CLASSES = ms.tasks.all_classes(random_bank(size=16), batch=20)
METRICS = {'accuracy': ms.losses.accuracy}


class SmallEmbedding(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = ms.nn.ConvBlock(8)(x)
    return nn.Dense(16, use_bias=False)(x.reshape(x.shape[0], -1))  # Twins' difference would cancel a bias.


def embedding_learner(build, **options):
  return build(ms.nn.from_linen(SmallEmbedding()), way=5, metrics=METRICS, **options)


CASES = {
  'meta_sgd': (sinusoid_learner(), SINUSOIDS),
  'meta_sgd, 3 steps': (sinusoid_learner(steps=3, alpha_range=(0.01, 0.01)), SINUSOIDS),
  'meta_sgd, first order': (sinusoid_learner(first_order=True), SINUSOIDS),
  'maml': (sinusoid_learner(ms.maml), SINUSOIDS),
  'maml, 3 steps': (sinusoid_learner(ms.maml, steps=3), SINUSOIDS),
  'anil': (sinusoid_learner(ms.maml, alpha={'Dense_0': 0.0, 'Dense_1': 0.0, 'Dense_2': 0.05}), SINUSOIDS),
  'meta_sgd, rates by step': (sinusoid_learner(steps=2, alpha_range=(0.01, 0.01), alpha_by_step=True), SINUSOIDS),
  'meta_sgd, multi-step loss': (
    sinusoid_learner(steps=2, alpha_range=(0.01, 0.01), step_weights=(0.4, 0.6)),
    SINUSOIDS,
  ),
  'meta_sgd on images': (conv_learner(), IMAGES),
  'meta_sgd, inductive': (conv_learner(inductive=True), IMAGES),
  'meta_lstm': (conv_learner(ms.learners.meta_lstm, steps=2, units=5), IMAGES),
  'prototypical': (embedding_learner(ms.learners.prototypical), IMAGES),
  'matching': (embedding_learner(ms.learners.matching), IMAGES),
  'matching, full context': (embedding_learner(ms.learners.matching, full_context=True, read_steps=2), IMAGES),
  'siamese': (embedding_learner(ms.learners.siamese), IMAGES),
  'mann': (ms.learners.mann(way=5, cell=ms.learners.MemoryCell(5, 32, 16, 8, 2), size=8, metrics=METRICS), SEQUENCES),
  'lstm': (ms.learners.mann(way=5, cell=ms.learners.PlainCell(5, 32), size=8, metrics=METRICS), SEQUENCES),
  'fine_tuning': (embedding_learner(ms.learners.fine_tuning, classes=8, steps=2), CLASSES),
}
BY_GRADIENT = [name for name in CASES if name.startswith(('meta_sgd', 'maml', 'anil', 'meta_lstm'))]
"""Those whose adapted state is θ."""
TRAINED_ON_SOMETHING_ELSE = ('siamese', 'mann', 'lstm', 'fine_tuning', 'meta_sgd, multi-step loss')
"""See tests/test_learners_by_hand.py, and the multi-step loss below."""
TRAINED_AS_JUDGED = [name for name in CASES if name not in TRAINED_ON_SOMETHING_ELSE]
BY_RECURRENCE = ('mann', 'lstm', 'meta_lstm')
"""Those that learn slowly."""
ON_IMAGES = [name for name in CASES if CASES[name][1] is not SINUSOIDS]


class Case(NamedTuple):
  name: str
  learner: ms.Learner
  tasks: ms.TaskDistribution
  batch: ms.Episode
  meta: Any


@pytest.fixture(scope='module', params=CASES)
def case(request):
  learner, tasks = CASES[request.param]
  batch = episodes(tasks, 3)
  first = jax.tree.map(lambda a: a[0], batch)
  return Case(request.param, learner, tasks, batch, learner.init(jax.random.key(0), first))


def task(batch, i):
  return jax.tree.map(lambda a: a[i], batch)


def support_of(case, i):
  """Labels of the ways; those of joint training are of all classes."""
  support = task(case.batch, i).support
  return support._replace(y=support.y % 5) if case.name == 'fine_tuning' else support


def test_adapt_keeps_structure_shapes_and_dtypes(case):
  adapted = case.learner.adapt(case.meta, support_of(case, 0), jax.random.key(0))
  described = lambda tree: jax.tree.map(lambda a: (a.shape, a.dtype), tree)
  if case.name in BY_GRADIENT:
    theta = adapted.theta if 'inductive' in case.name else adapted
    assert described(theta) == described(case.meta.theta)
  other = case.learner.adapt(case.meta, support_of(case, 1), jax.random.key(0))
  assert described(adapted) == described(other)
  for leaf in jax.tree.leaves(adapted):
    assert np.all(np.isfinite(leaf))


def test_path_ends_with_what_adapt_gives(case):
  support = support_of(case, 0)
  path = case.learner.path(case.meta, support, jax.random.key(0))
  adapted = case.learner.adapt(case.meta, support, jax.random.key(0))
  assert_trees_close(jax.tree.map(lambda a: a[-1], path), adapted, rtol=1e-4, atol=1e-5)
  if case.name in BY_GRADIENT:
    theta = path.theta if 'inductive' in case.name else path
    assert_trees_close(jax.tree.map(lambda a: a[0], theta), case.meta.theta)


def test_batched_equals_a_loop_and_compiled_equals_not(case, optimized):
  keys = jax.random.split(jax.random.key(0), 3)
  batched, info = jax.jit(jax.vmap(case.learner.loss, (None, 0, 0)))(case.meta, case.batch, keys)
  for i in range(3):
    loss, one_info = case.learner.loss(case.meta, task(case.batch, i), keys[i])
    assert loss.shape == ()
    np.testing.assert_allclose(batched[i], loss, rtol=1e-4)
    assert_trees_close(jax.tree.map(lambda a, i=i: a[i], info), one_info, rtol=1e-4)


@pytest.mark.parametrize('case', TRAINED_AS_JUDGED, indirect=True)
def test_loss_is_the_query_loss_after_adaptation(case):
  episode = task(case.batch, 1)
  adapted = case.learner.adapt(case.meta, episode.support, None)
  outputs = case.learner.predict(adapted, episode.query.x)
  loss_fn = ms.losses.cross_entropy if case.name in ON_IMAGES else ms.losses.mean_squared_error
  np.testing.assert_allclose(
    case.learner.loss(case.meta, episode, None)[0], loss_fn(outputs, episode.query.y), rtol=1e-5
  )


def test_every_part_that_is_learned_gets_a_gradient(case):
  keys = jax.random.split(jax.random.key(0), 3)
  grads = jax.jit(lambda: ms.value_and_grad(case.learner, case.meta, case.batch, keys)[1])()
  for path, grad in jax.tree_util.tree_leaves_with_path(grads):
    assert np.all(np.isfinite(grad)), path
    assert float(jnp.max(jnp.abs(grad))) > 0, path


def test_training_lowers_the_loss_on_unseen_tasks(case):
  images = case.name in ON_IMAGES
  optimizer = optax.adam(3e-3 if images else 1e-3)
  learner, tasks = case.learner, case.tasks
  state = ms.init(jax.random.key(0), tasks, learner=learner, optimizer=optimizer)

  @jax.jit
  def loss(meta):
    return ms.mean_loss(learner, meta, episodes(tasks, 100, seed=9), jax.random.split(jax.random.key(9), 100))[0]

  before = loss(state.meta)
  meta_iterations = 150 if images and case.name not in BY_RECURRENCE else 500
  state = ms.train(state, tasks, learner=learner, optimizer=optimizer, meta_iterations=meta_iterations, meta_batch=4)
  assert loss(state.meta) < 0.9 * before


def test_multi_step_loss_is_the_weighted_sum_of_the_losses_after_each_step():
  learner, _ = CASES['meta_sgd, multi-step loss']
  episode = task(episodes(SINUSOIDS, 1), 0)
  meta = learner.init(jax.random.key(0), episode)
  path = learner.path(meta, episode.support, None)
  answers = [learner.predict(jax.tree.map(lambda a, t=t: a[t], path), episode.query.x) for t in (1, 2)]
  after = [ms.losses.mean_squared_error(outputs, episode.query.y) for outputs in answers]
  np.testing.assert_allclose(learner.loss(meta, episode, None)[0], 0.4 * after[0] + 0.6 * after[1], rtol=1e-6)
  last = sinusoid_learner(steps=2, alpha_range=(0.01, 0.01))
  alone = sinusoid_learner(steps=2, alpha_range=(0.01, 0.01), step_weights=(0.0, 1.0))
  grads = [jax.grad(lambda m, learner=learner: learner.loss(m, episode, None)[0])(meta) for learner in (last, alone)]
  assert_trees_close(*grads, rtol=1e-5)


class TestInductive:
  @pytest.mark.parametrize('name', ['meta_sgd', 'meta_lstm', 'prototypical', 'matching', 'siamese', 'fine_tuning'])
  def test_an_answer_depends_on_no_other_query(self, name):
    build = {'meta_sgd': ms.meta_sgd, **vars(ms.learners)}[name]
    options = dict(classes=8) if name == 'fine_tuning' else {}
    by_gradient = name in ('meta_sgd', 'meta_lstm')
    make = conv_learner if by_gradient else embedding_learner
    support, query = task(episodes(IMAGES, 1), 0)
    for inductive in (True, False):
      learner = make(build, inductive=inductive, **options)
      meta = learner.init(jax.random.key(0), ms.Episode(support, query))
      adapted = learner.adapt(meta, support, None)
      together = learner.predict(adapted, query.x)
      alone = jnp.concatenate([learner.predict(adapted, query.x[i : i + 1]) for i in range(10)])
      assert np.allclose(together, alone, rtol=1e-4, atol=1e-4) == inductive, name

  def test_statistics_are_the_supports(self):
    model = ms.nn.from_linen(ms.nn.BatchNorm())
    x, query = np.asarray(jax.random.normal(jax.random.key(0), (2, 20, 3)) * 3 + 1)
    theta = {'scale': np.array([2.0, 1.0, -1.0], np.float32), 'bias': np.array([0.5, 0.0, 1.0], np.float32)}
    mean, variance = np.mean(x, 0), np.var(x, 0)
    expected = (query - mean) / np.sqrt(variance + 1e-3) * theta['scale'] + theta['bias']
    np.testing.assert_allclose(model.apply(theta, query, model.statistics(theta, x)), expected, rtol=1e-4, atol=1e-5)

  def test_the_support_by_its_own_statistics_is_the_support(self):
    """Conv4's block, pooled before it is normalised, and in parts, obeys them too."""
    model = ms.nn.from_linen(ms.nn.Conv4(5, filters=4))
    x = jax.random.normal(jax.random.key(1), (6, 28, 28, 1))
    theta = model.init(jax.random.key(0), x)
    np.testing.assert_allclose(
      model.apply(theta, x, model.statistics(theta, x)), model.apply(theta, x), rtol=1e-4, atol=1e-4
    )

  @pytest.mark.parametrize('steps', [1, 2])
  def test_the_meta_gradient_goes_through_the_statistics(self, steps):
    learner = conv_learner(inductive=True, steps=steps, alpha_range=(0.1, 0.1))
    episode = task(episodes(IMAGES, 1), 0)
    meta = learner.init(jax.random.key(1), episode)
    with jax.enable_x64(True):
      meta, episode = to_float64(meta), to_float64(episode)
      assert_slopes_by_differences(lambda m: learner.loss(m, episode, None)[0], meta)

  def test_a_model_without_statistics(self):
    model = ms.Model(lambda key, x: jnp.ones(3), lambda theta, x: x * theta)
    with pytest.raises(ValueError, match='inductive=True needs a Model with `statistics`, such as from_linen makes'):
      ms.meta_sgd(model, ms.losses.cross_entropy, inductive=True)


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
    (ms.meta_sgd, dict(alpha_per='row'), r"alpha_per must be one of \('entry', 'leaf', 'layer', 'all'\), got 'row'"),
    (ms.maml, dict(alpha=None), 'alpha must be a number or a pytree of numbers, got None; meta_sgd learns it'),
    (ms.meta_sgd, dict(metrics={'loss': ms.losses.accuracy}), "a metric cannot be named 'loss'"),
    (
      ms.meta_sgd,
      dict(steps=2, step_weights=(1.0,)),
      r'step_weights must be 2 finite numbers, one a step, got \(1.0,\)',
    ),
    (ms.meta_sgd, dict(steps=1, step_weights=(float('nan'),)), 'step_weights must be 1 finite numbers'),
    (ms.learners.meta_lstm, dict(steps=-1), 'steps must be an integer of at least 0, got -1'),
  ],
)
def test_bad_options(build, options, message):
  model = ms.nn.from_linen(ms.nn.MLP())
  with pytest.raises(ValueError, match=message):
    build(model, ms.losses.mean_squared_error, **options)


@pytest.mark.parametrize(
  ('build', 'options', 'message'),
  [
    (ms.learners.prototypical, dict(way=1), 'way must be an integer of at least 2, got 1'),
    (ms.learners.siamese, dict(way=2.5), 'way must be an integer of at least 2, got 2.5'),
    (ms.learners.matching, dict(way=5, read_steps=0), 'read_steps must be at least 1, got 0'),
    (ms.learners.matching, dict(way=5, scale=0.0), 'scale must be above 0, got 0.0'),
    (ms.learners.fine_tuning, dict(way=5, classes=1), 'classes must be at least 2, got 1'),
    (ms.learners.matching, dict(way=5, metrics={'loss': None}), "a metric cannot be named 'loss'"),
  ],
)
def test_bad_options_of_learners_with_an_embedding(build, options, message):
  with pytest.raises(ValueError, match=message):
    build(ms.nn.from_linen(SmallEmbedding()), **options)


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
