"""One table: what holds of every learner."""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import (
  OneLayer,
  assert_slopes_by_differences,
  assert_trees_close,
  conv_learner,
  episodes,
  random_bank,
  saying,
  sinusoid_learner,
  to_float64,
)

import metasgd_jax as ms

SINUSOIDS = ms.tasks.sinusoid()
IMAGES = ms.tasks.few_shot(random_bank(size=16), way=5, shot=1, query=2)
CLASSES = ms.tasks.all_classes(random_bank(size=16), batch=20)
METRICS = {'accuracy': ms.losses.accuracy}


class SmallEmbedding(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = ms.nn.ConvBlock(8)(x)
    return nn.Dense(16, use_bias=False)(x.reshape(x.shape[0], -1))  # Twins' difference would cancel a bias.


def embedding_learner(build, network=SmallEmbedding, **options):
  return build(ms.nn.from_linen(network()), way=5, metrics=METRICS, **options)


CASES = {
  'meta_sgd': (sinusoid_learner(), SINUSOIDS),
  'meta_sgd, 3 steps': (sinusoid_learner(steps=3, alpha=ms.AlphaConfig(0.01, 0.01)), SINUSOIDS),
  'meta_sgd, first order': (sinusoid_learner(first_order=True), SINUSOIDS),
  'maml': (sinusoid_learner(ms.maml), SINUSOIDS),
  'maml, 3 steps': (sinusoid_learner(ms.maml, steps=3), SINUSOIDS),
  'anil': (sinusoid_learner(ms.maml, alpha={'Dense_0': 0.0, 'Dense_1': 0.0, 'Dense_2': 0.05}), SINUSOIDS),
  'meta_sgd, rates by step': (sinusoid_learner(steps=2, alpha=ms.AlphaConfig(0.01, 0.01, by_step=True)), SINUSOIDS),
  'meta_sgd, multi-step loss': (
    sinusoid_learner(steps=2, alpha=ms.AlphaConfig(0.01, 0.01), step_weights=(0.4, 0.6)),
    SINUSOIDS,
  ),
  'meta_sgd on images': (conv_learner(), IMAGES),
  'meta_sgd, inductive': (conv_learner(inductive=True), IMAGES),
  'meta_lstm': (conv_learner(ms.learners.meta_lstm, steps=2, units=5), IMAGES),
  'prototypical': (embedding_learner(ms.learners.prototypical), IMAGES),
  'matching': (embedding_learner(ms.learners.matching), IMAGES),
  'matching, full context': (
    embedding_learner(ms.learners.matching, lambda: OneLayer(16), full_context=True, read_steps=2),
    IMAGES,
  ),
  'siamese': (embedding_learner(ms.learners.siamese), IMAGES),
  'mann': (ms.learners.mann(way=5, cell=ms.learners.MemoryCell(5, 32, 16, 8, 2), size=8, metrics=METRICS), IMAGES),
  'lstm': (ms.learners.mann(way=5, cell=ms.learners.PlainCell(5, 32), size=8, metrics=METRICS), IMAGES),
  'fine_tuning': (embedding_learner(ms.learners.fine_tuning, classes=8, steps=2), CLASSES),
}
BY_GRADIENT = [name for name in CASES if name.startswith(('meta_sgd', 'maml', 'anil', 'meta_lstm'))]
"""Those whose adapted state is θ."""
TRAINED_ON_SOMETHING_ELSE = ('siamese', 'mann', 'lstm', 'fine_tuning', 'meta_sgd, multi-step loss')
"""See tests/learners/test_learners_by_hand.py, and the multi-step loss below."""
TRAINED_AS_JUDGED = [name for name in CASES if name not in TRAINED_ON_SOMETHING_ELSE]
BY_RECURRENCE = ('mann', 'lstm', 'meta_lstm')
"""Those that learn slowly."""
ON_IMAGES = [name for name in CASES if CASES[name][1] is not SINUSOIDS]


class Case:
  """A learner, three tasks, and what it makes of them."""

  def __init__(self, name):
    self.name = name
    self.learner, self.tasks = CASES[name]
    self.batch = three_of(self.tasks)
    self.keys = jax.random.split(jax.random.key(0), 3)
    self.meta = jax.jit(self.learner.init)(jax.random.key(0), task(self.batch, 0))
    # Labels of the ways; those of joint training are of all classes.
    support = self.batch.support
    self.support = support._replace(y=support.y % 5) if name == 'fine_tuning' else support

  def one_after_the_other(self, meta, batch, support, keys):
    """Adapted states, paths, and losses with their metrics: of the answers, where that is what training lowers."""
    learner = self.learner
    measure = ms.losses.cross_entropy if self.name in ON_IMAGES else ms.losses.mean_squared_error
    metrics = METRICS if self.name in ON_IMAGES else {}

    def one(of):
      episode, support, key = of
      adapted = learner.adapt(meta, support, key)
      if self.name in TRAINED_AS_JUDGED:
        outputs, y = learner.predict(adapted, episode.query.x), episode.query.y
        loss = measure(outputs, y), {name: metric(outputs, y) for name, metric in metrics.items()}
      else:
        loss = learner.loss(meta, episode, key)
      return adapted, learner.path(meta, support, key), loss

    return jax.lax.map(one, (batch, support, keys))

  @functools.cached_property
  def compiled(self):
    """The tasks one after the other, side by side, and their meta-gradient: all that the checks ask, in one program."""

    def mean(meta, batch, keys):
      losses, info = jax.vmap(self.learner.loss, (None, 0, 0))(meta, batch, keys)
      return jnp.mean(losses), (losses, info)

    @jax.jit
    def everything(meta, batch, support, keys):
      grads, side_by_side = jax.grad(mean, has_aux=True)(meta, batch, keys)
      return Found(*self.one_after_the_other(meta, batch, support, keys), side_by_side, grads)

    return lambda meta: jax.device_get(everything(meta, self.batch, self.support, self.keys))

  @functools.cached_property
  def found(self):
    return self.compiled(self.meta)


class Found(NamedTuple):
  """Leaves `[3, …]`, but for the gradient."""

  adapted: Any
  path: Any
  alone: Any
  side_by_side: Any
  grads: Any


@functools.cache
def three_of(tasks):
  return jax.device_get(episodes(tasks, 3))


NEAR_ANOTHER = ('meta_sgd, 3 steps', 'lstm')
"""MAML has three steps, too, and the memory cell is that of MANN: these compile once more for little."""


@pytest.fixture(
  scope='module',
  params=[pytest.param(name, marks=[pytest.mark.slow] if name in NEAR_ANOTHER else []) for name in CASES],
)
def case(request):
  return Case(request.param)


def all_slow_but(*names):
  """Each of the learners; all but these are slow."""
  return pytest.mark.parametrize(
    'case', [pytest.param(name, marks=() if name in names else pytest.mark.slow) for name in CASES], indirect=True
  )


def task(batch, i):
  return jax.tree.map(lambda a: jnp.asarray(a[i]), batch)


def test_adapt_keeps_structure_shapes_and_dtypes(case):
  described = lambda tree: jax.tree.map(lambda a: (a.shape, a.dtype), tree)
  each = jax.tree.map(lambda a: a[0], case.found.adapted)
  if case.name in BY_GRADIENT:
    theta = each.theta if 'inductive' in case.name else each
    assert described(theta) == described(case.meta.theta)
  for leaf in jax.tree.leaves(case.found.adapted):
    assert len(leaf) == 3
    assert np.all(np.isfinite(leaf))


def test_path_ends_with_what_adapt_gives(case):
  path = case.found.path
  assert_trees_close(jax.tree.map(lambda a: a[:, -1], path), case.found.adapted, rtol=1e-4, atol=1e-5)
  if case.name in BY_GRADIENT:
    theta = path.theta if 'inductive' in case.name else path
    for i in range(3):
      assert_trees_close(jax.tree.map(lambda a, i=i: a[i, 0], theta), jax.device_get(case.meta.theta))


def test_batched_equals_a_loop(case):
  (batched, info), (alone, each_info) = case.found.side_by_side, case.found.alone
  assert batched.shape == alone.shape == (3,)
  np.testing.assert_allclose(batched, alone, rtol=1e-4)
  assert_trees_close(info, each_info, rtol=1e-4)


@pytest.fixture
def not_compiled(case):
  """The loss of each task, one operation after the other; asked for before `optimized`, so that each compiles fast."""
  return jax.device_get([case.learner.loss(case.meta, task(case.batch, i), case.keys[i]) for i in range(3)])


@all_slow_but('meta_sgd')
def test_batched_equals_a_loop_and_compiled_equals_not(case, not_compiled, optimized):
  batched, info = jax.jit(jax.vmap(case.learner.loss, (None, 0, 0)))(case.meta, case.batch, case.keys)
  for i, (loss, one_info) in enumerate(not_compiled):
    assert loss.shape == ()
    np.testing.assert_allclose(batched[i], loss, rtol=1e-4)
    assert_trees_close(jax.tree.map(lambda a, i=i: a[i], info), one_info, rtol=1e-4)


@pytest.mark.slow
def test_a_learner_works_outside_of_jit(case):
  learner, episode, key = case.learner, task(case.batch, 0), case.keys[0]
  support = task(case.support, 0)
  adapted = learner.adapt(case.meta, support, key)
  assert_trees_close(jax.tree.map(lambda a: a[0], case.found.adapted), jax.device_get(adapted), rtol=1e-3, atol=1e-4)
  path = learner.path(case.meta, support, key)
  assert_trees_close(jax.tree.map(lambda a: a[0], case.found.path), jax.device_get(path), rtol=1e-3, atol=1e-4)
  assert np.all(np.isfinite(learner.predict(adapted, episode.query.x)))


@pytest.mark.parametrize(
  'case',
  [pytest.param(name, marks=[pytest.mark.slow] if name in NEAR_ANOTHER else []) for name in TRAINED_AS_JUDGED],
  indirect=True,
)
def test_loss_is_the_query_loss_after_adaptation(case):
  np.testing.assert_allclose(case.found.side_by_side[0], case.found.alone[0], rtol=1e-5)


def test_every_part_that_is_learned_gets_a_gradient(case):
  for path, grad in jax.tree_util.tree_leaves_with_path(case.found.grads):
    assert np.all(np.isfinite(grad)), path
    assert np.max(np.abs(grad)) > 0, path


def test_a_step_against_the_gradient_lowers_the_loss(case):
  """By about a thousandth, as the gradient has it."""
  loss, grads = case.found.side_by_side[0].mean(), case.found.grads
  size = 1e-3 * loss / sum(np.sum(g**2) for g in jax.tree.leaves(grads))
  moved = jax.tree.map(lambda m, g: m - size * g, jax.device_get(case.meta), grads)
  after = case.compiled(moved).side_by_side[0].mean()
  assert after < (1 - 5e-4) * loss


@all_slow_but('meta_sgd')
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
  last = sinusoid_learner(steps=2, alpha=ms.AlphaConfig(0.01, 0.01))
  alone = sinusoid_learner(steps=2, alpha=ms.AlphaConfig(0.01, 0.01), step_weights=(0.0, 1.0))

  @jax.jit
  def compare(episode):
    meta = learner.init(jax.random.key(0), episode)
    path = learner.path(meta, episode.support, None)
    answers = [learner.predict(jax.tree.map(lambda a, t=t: a[t], path), episode.query.x) for t in (1, 2)]
    after = [ms.losses.mean_squared_error(outputs, episode.query.y) for outputs in answers]
    grads = [jax.grad(lambda m, of=of: of.loss(m, episode, None)[0])(meta) for of in (last, alone)]
    return learner.loss(meta, episode, None)[0], after, grads

  loss, after, grads = jax.device_get(compare(task(three_of(SINUSOIDS), 0)))
  np.testing.assert_allclose(loss, 0.4 * after[0] + 0.6 * after[1], rtol=1e-6)
  assert_trees_close(*grads, rtol=1e-5)


class TestInductive:
  @pytest.mark.parametrize(
    'name',
    [
      'meta_sgd',
      pytest.param('meta_lstm', marks=pytest.mark.slow),
      'prototypical',
      'matching',
      'siamese',
      'fine_tuning',
    ],
  )
  def test_an_answer_depends_on_no_other_query(self, name):
    build = {'meta_sgd': ms.meta_sgd, **vars(ms.learners)}[name]
    options = dict(classes=8) if name == 'fine_tuning' else {}
    by_gradient = name in ('meta_sgd', 'meta_lstm')
    make = conv_learner if by_gradient else embedding_learner

    @functools.partial(jax.jit, static_argnums=1)
    def answers(episode, inductive):
      learner = make(build, inductive=inductive, **options)
      adapted = learner.adapt(learner.init(jax.random.key(0), episode), episode.support, None)
      alone = jax.lax.map(lambda x: learner.predict(adapted, x[None])[0], episode.query.x)
      return learner.predict(adapted, episode.query.x), alone

    for inductive in (True, False):
      together, alone = answers(task(three_of(IMAGES), 0), inductive)
      assert np.allclose(together, alone, rtol=1e-4, atol=1e-4) == inductive, name

  def test_statistics_are_the_supports(self):
    model = ms.nn.from_linen(ms.nn.BatchNorm())
    x, query = np.random.default_rng(0).normal(1, 3, size=(2, 20, 3)).astype(np.float32)
    theta = {'scale': np.array([2.0, 1.0, -1.0], np.float32), 'bias': np.array([0.5, 0.0, 1.0], np.float32)}
    mean, variance = np.mean(x, 0), np.var(x, 0)
    expected = (query - mean) / np.sqrt(variance + 1e-3) * theta['scale'] + theta['bias']
    found = jax.jit(lambda theta, x, query: model.apply(theta, query, model.statistics(theta, x)))(theta, x, query)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)

  def test_the_support_by_its_own_statistics_is_the_support(self):
    """Conv4's block, pooled before it is normalised, and in parts, obeys them too."""
    model = ms.nn.from_linen(ms.nn.Conv4(5, filters=4))

    @jax.jit
    def both(x):
      theta = model.init(jax.random.key(0), x)
      return model.apply(theta, x, model.statistics(theta, x)), model.apply(theta, x)

    x = np.random.default_rng(1).normal(size=(6, 28, 28, 1)).astype(np.float32)
    np.testing.assert_allclose(*both(x), rtol=1e-4, atol=1e-4)

  @pytest.mark.parametrize('steps', [pytest.param(1, marks=pytest.mark.slow), 2])
  def test_the_meta_gradient_goes_through_the_statistics(self, steps):
    learner = conv_learner(inductive=True, steps=steps, alpha=ms.AlphaConfig(0.1, 0.1))
    episode = task(three_of(IMAGES), 0)
    meta = jax.jit(learner.init)(jax.random.key(1), episode)
    with jax.enable_x64(True):
      meta, episode = to_float64(meta), to_float64(episode)
      assert_slopes_by_differences(lambda m: learner.loss(m, episode, None)[0], meta)

  def test_a_model_without_statistics(self):
    model = ms.Model(lambda key, x: jnp.ones(3), lambda theta, x: x * theta)
    with pytest.raises(ValueError, match=saying('inductive=True', '`statistics`', 'from_linen')):
      ms.meta_sgd(model, ms.losses.cross_entropy, inductive=True)


def test_maml_is_meta_sgd_with_alpha_held():
  meta_sgd, maml = (
    sinusoid_learner(alpha=ms.AlphaConfig(0.03, 0.03), steps=2),
    sinusoid_learner(ms.maml, alpha=0.03, steps=2),
  )

  @jax.jit
  def of_both(batch):
    keys = jax.random.split(jax.random.key(0), 3)
    first = jax.tree.map(lambda a: a[0], batch)
    metas = [learner.init(jax.random.key(1), first) for learner in (meta_sgd, maml)]
    return metas, [ms.mean_loss_and_grad(*of, batch, keys) for of in zip((meta_sgd, maml), metas, strict=True)]

  metas, (((loss, _), grads), ((held_loss, _), held_grads)) = jax.device_get(of_both(three_of(SINUSOIDS)))
  assert_trees_close(metas[0].theta, metas[1].theta)
  assert metas[1].alpha is None
  np.testing.assert_allclose(loss, held_loss, rtol=1e-6)
  assert_trees_close(grads.theta, held_grads.theta)


@pytest.mark.parametrize(
  ('build', 'options', 'parts'),
  [
    (ms.meta_sgd, dict(steps=-1), ('steps', '-1', 'integer of at least 0')),
    (ms.meta_sgd, dict(steps=1.5), ('steps', '1.5', 'integer of at least 0')),
    (ms.maml, dict(steps=-1), ('steps', '-1', 'integer of at least 0')),
    (ms.meta_sgd, dict(alpha=0.1), ('AlphaConfig', 'got 0.1', 'maml')),
    (ms.maml, dict(alpha=None), ('alpha', 'a number or a pytree', 'None', 'meta_sgd')),
    (ms.meta_sgd, dict(metrics={'loss': ms.losses.accuracy}), ('metric', 'loss')),
    (
      ms.meta_sgd,
      dict(steps=2, step_weights=(1.0,)),
      ('step_weights', '2 finite', '(1.0,)'),
    ),
    (ms.meta_sgd, dict(steps=1, step_weights=(float('nan'),)), ('step_weights', '1 finite', 'nan')),
    (ms.learners.meta_lstm, dict(steps=-1), ('steps', '-1', 'integer of at least 0')),
  ],
)
def test_bad_options(build, options, parts):
  model = ms.nn.from_linen(ms.nn.MLP())
  with pytest.raises(ValueError, match=saying(*parts)):
    build(model, ms.losses.mean_squared_error, **options)


@pytest.mark.parametrize(
  ('build', 'options', 'parts'),
  [
    (ms.learners.prototypical, dict(way=1), ('way', 'integer of at least 2', 'got 1')),
    (ms.learners.siamese, dict(way=2.5), ('way', 'integer of at least 2', '2.5')),
    (ms.learners.matching, dict(way=5, read_steps=0), ('read_steps', 'at least 1', 'got 0')),
    (ms.learners.matching, dict(way=5, scale=0.0), ('scale', 'above 0', '0.0')),
    (ms.learners.fine_tuning, dict(way=5, classes=1), ('classes', 'at least 2', 'got 1')),
    (ms.learners.matching, dict(way=5, metrics={'loss': None}), ('metric', 'loss')),
  ],
)
def test_bad_options_of_learners_with_an_embedding(build, options, parts):
  with pytest.raises(ValueError, match=saying(*parts)):
    build(ms.nn.from_linen(SmallEmbedding()), **options)


def test_mann_scales_images_alone():
  vectors = ms.Batch(jnp.ones((6, 4)), jnp.array([0, 0, 1, 1, 2, 2]))
  tasks = ms.TaskDistribution(lambda key: (), lambda task, key: ms.Episode(vectors, vectors))
  with pytest.raises(ValueError, match=saying('size=20', 'images [B, H, W, D]', '(6, 4)', 'size=None')):
    ms.init(jax.random.key(0), tasks, learner=ms.learners.mann(way=3), optimizer=optax.identity())
  with pytest.raises(ValueError, match=saying('size', 'at least 1', 'got 0')):
    ms.learners.mann(way=3, size=0)
  parts = vectors._replace(x={'a': vectors.x})
  with pytest.raises(ValueError, match=saying('`x` of a batch must be one array', 'got dict')):
    ms.learners.mann(way=3, size=None).init(jax.random.key(0), ms.Episode(parts, parts))


def test_a_rate_that_does_not_fit_is_named_before_training():
  learner = sinusoid_learner(ms.maml, alpha={'Dense_9': 0.1})
  with pytest.raises(ValueError, match=saying("alpha['Dense_9']", 'theta')):
    ms.init(jax.random.key(0), SINUSOIDS, learner=learner, optimizer=optax.identity())


class TestLosses:
  @pytest.mark.parametrize('loss', [ms.losses.cross_entropy, ms.losses.accuracy])
  @pytest.mark.parametrize('shapes', [((5, 3), (5, 1)), ((4, 3), (1,)), ((3,), (3,))])
  def test_labels_of_other_shapes(self, loss, shapes):
    with pytest.raises(ValueError, match=saying('logits', '[B, N]', 'labels', *shapes)):
      loss(np.zeros(shapes[0], np.float32), np.zeros(shapes[1], np.int32))

  def test_labels_that_are_not_integers(self):
    with pytest.raises(ValueError, match=saying('labels', 'integers', 'float32')):
      ms.losses.cross_entropy(np.zeros((5, 3), np.float32), np.zeros(5, np.float32))

  def test_targets_of_another_shape(self):
    with pytest.raises(ValueError, match=saying('shape', '(5, 1)', '(5,)', 'reshape')):
      ms.losses.mean_squared_error(np.zeros((5, 1)), np.zeros(5))

  def test_values(self):
    logits, labels = np.log(np.array([[0.5, 0.25, 0.25], [0.2, 0.2, 0.6]], np.float32)), np.array([0, 1])
    cross_entropy, accuracy = jax.jit(lambda *of: (ms.losses.cross_entropy(*of), ms.losses.accuracy(*of)))(
      logits, labels
    )
    np.testing.assert_allclose(cross_entropy, -np.log([0.5, 0.2]).mean(), rtol=1e-6)
    np.testing.assert_allclose(accuracy, 0.5)
    squared = jax.jit(ms.losses.mean_squared_error)(np.array([[1.0], [3.0]], np.float32), np.zeros((2, 1), np.float32))
    np.testing.assert_allclose(squared, 5.0)
