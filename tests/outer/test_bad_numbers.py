"""Numbers that are not finite are traced to the meta-iteration, the run, the task and the leaf."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import curves, poisoned, sinusoid_learner

import metasgd_jax as ms
from experiments import few_shot_learners
from metasgd_jax.outer import bad_numbers, loop

pytestmark = pytest.mark.filterwarnings('ignore:the loss is not finite:RuntimeWarning')

LEARNER = sinusoid_learner(hidden=(4,))
SGD = optax.sgd(1e-3)
BATCH, CHUNK = 4, 10


def runs(tasks, *, learner=LEARNER, optimizer=SGD, seeds=0, meta_iterations=30):
  """Trains as experiments do; returns what was found, and the last good state."""
  key = jax.random.key(seeds) if isinstance(seeds, int) else jax.vmap(jax.random.key)(jnp.asarray(seeds))
  state = ms.init(key, tasks, learner=learner, optimizer=optimizer)
  kept = [state]
  options = dict(learner=learner, optimizer=optimizer, meta_batch=BATCH, chunk=CHUNK)
  go = lambda state, step: ms.train(state, tasks, meta_iterations=step, **options)

  class FoundError(Exception):
    pass

  def watch(progress):
    bad = bad_numbers.find(kept[0], progress, go)
    if bad is not None:
      raise FoundError(bad)
    kept[0] = progress.state

  try:
    ms.train(state, tasks, meta_iterations=meta_iterations, callbacks=[watch], **options)
  except FoundError as e:
    return e.args[0], kept[0]
  return None, kept[0]


def test_nothing_is_found_where_all_is_finite():
  bad, state = runs(curves())
  assert bad is None
  assert int(state.step) == 30


@pytest.mark.parametrize('step', [0, 9, 10, 17, 19])
@pytest.mark.parametrize('how', [jnp.nan, jnp.inf])
def test_a_loss_is_traced_to_its_task(step, how):
  tasks = poisoned([step, 25], how=how)
  bad, good = runs(tasks)
  assert (bad.step, bad.run, int(bad.before.step)) == (step, 0, step)
  assert int(good.step) == step // CHUNK * CHUNK
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((bad.before.meta, good.meta)))
  report = bad_numbers.inspect_step(bad.before, tasks, learner=LEARNER, meta_batch=BATCH)
  assert report.bad_tasks == [2]
  said = bad_numbers.describe(bad, report)
  assert said.startswith(
    f'the loss of run 0 (from 0) is not finite at meta-iteration {step} (from 0), in task 2 of 4 (from 0): loss '
  )
  assert 'gradient of theta.Dense_0.bias and' in said
  key = eval(said[said.index('jax.random.wrap') :], {'jax': jax})  # What is printed is Python.
  expected = loop.step_keys(jax.random.key(0), step, BATCH)[0, 2]
  assert np.array_equal(jax.random.key_data(key), jax.random.key_data(expected))


def test_a_gradient_alone_is_traced_to_its_leaf():
  """√x at 0 is finite and its gradient is not: of one leaf, of one task, in a loss that is finite."""

  def episode(curve, key):
    found = curves().episode(curve, key)
    x, y = found.query
    mark = jnp.all(jax.random.key_data(key) == bad)
    return ms.Episode(found.support, ms.Batch(jnp.where(mark, 0.0, x), y))

  bad = jax.random.key_data(loop.step_keys(jax.random.key(0), 13, BATCH)[1, 1])

  def marked(meta, episode, key):
    value, info = LEARNER.loss(meta, episode, key)
    bias = meta.theta['Dense_1']['bias']
    hit = jnp.all(episode.query.x == 0)
    root = jnp.sqrt(jnp.where(hit, jnp.sum(bias - jax.lax.stop_gradient(bias)), 1.0))
    return value + jnp.where(hit, root, 0.0), info

  tasks, learner = ms.TaskDistribution(curves().sample, episode), LEARNER._replace(loss=marked)
  bad_step, _ = runs(tasks, learner=learner)
  assert bad_step.step == 13
  assert np.isfinite(bad_step.loss)
  report = bad_numbers.inspect_step(bad_step.before, tasks, learner=learner, meta_batch=BATCH)
  assert report.bad_tasks == [1]
  assert [name for name, ok in report.finite.items() if not ok[1]] == ['theta.Dense_1.bias']
  said = bad_numbers.describe(bad_step, report)
  assert said.startswith('the gradient of run 0 (from 0) is not finite at meta-iteration 13 (from 0), in task 1 of 4')
  assert 'gradient of theta.Dense_1.bias;' in said


def test_an_update_of_a_finite_gradient_is_the_optimisers():
  def update(updates, count, params=None):
    return jax.tree.map(lambda g: jnp.where(count == 7, jnp.inf, 0 * g), updates), count + 1

  optimizer = optax.GradientTransformation(lambda params: jnp.zeros((), jnp.int32), update)
  bad, _ = runs(curves(), optimizer=optimizer)
  report = bad_numbers.inspect_step(bad.before, curves(), learner=LEARNER, meta_batch=BATCH)
  assert (bad.step, report.bad_tasks) == (7, [])
  said = bad_numbers.describe(bad, report)
  assert said.startswith('the update of run 0 (from 0) is not finite at meta-iteration 7 (from 0), although')
  assert 'the gradient of each task is finite' in said
  assert bad.leaves[0] == '0.theta.Dense_0.bias'


def test_of_runs_side_by_side_the_bad_one_is_named():
  tasks = poisoned([12], seed=5)
  bad, good = runs(tasks, seeds=[3, 4, 5])
  assert (bad.step, bad.run, bad.before.step.ndim) == (12, 2, 0)
  assert int(good.step[0]) == 10
  report = bad_numbers.inspect_step(bad.before, tasks, learner=LEARNER, meta_batch=BATCH)
  assert report.bad_tasks == [2]


def test_a_report_is_of_the_tasks_that_were_trained_on():
  """The mean of its losses is the loss of the step."""
  losses = []
  start = ms.init(jax.random.key(0), curves(), learner=LEARNER, optimizer=SGD)
  train = functools.partial(ms.train, tasks=curves(), learner=LEARNER, optimizer=SGD, meta_batch=BATCH, chunk=CHUNK)
  train(start, meta_iterations=10, callbacks=[lambda p: losses.extend(p.info['loss'])])
  state = train(start, meta_iterations=6)
  report = bad_numbers.inspect_step(state, curves(), learner=LEARNER, meta_batch=BATCH)
  np.testing.assert_allclose(report.losses.mean(), losses[6], rtol=1e-5)
  text = '\n'.join(bad_numbers.lines(report))
  assert 'meta-iteration 6 (from 0): 0 of 4 tasks are not finite' in text
  assert 'alpha.Dense_1.kernel' in text


def test_a_stream_is_looked_into_too():
  bank = ms.tasks.class_bank(np.random.default_rng(0).integers(0, 256, (6, 8, 8, 8, 1), np.uint8))
  indices = ms.tasks.image_indices(bank, way=3, shot=1, query=2)
  learner = ms.learners.prototypical(
    ms.Model(lambda key, x: {'w': jnp.eye(64)[:, :3]}, lambda t, x: x.reshape(len(x), -1) @ t['w']), way=3
  )
  reports = []
  for tasks in (ms.tasks.stream(bank, indices), ms.tasks.few_shot_from(indices, jnp.asarray(bank.images))):
    state = ms.init(jax.random.key(0), tasks, learner=learner, optimizer=SGD)
    reports.append(bad_numbers.inspect_step(state, tasks, learner=learner, meta_batch=2))
  assert np.array_equal(reports[0].losses, reports[1].losses)
  assert np.isfinite(reports[0].losses).all()


def test_a_bad_step_is_skipped_and_counted():
  """It is as if it had not been: the others change the same meta as with a zero gradient there."""
  optimizer = bad_numbers.skip_bad_steps(optax.adam(1e-2))
  bad, state = runs(poisoned([3, 4, 15]), optimizer=optimizer)
  assert bad is None
  assert int(bad_numbers.skipped(state)) == 3
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.meta))
  assert int(optax.tree_utils.tree_get(state.opt_state, 'count')) == 27


def test_of_runs_side_by_side_each_counts_its_own():
  optimizer = bad_numbers.skip_bad_steps(SGD)
  bad, state = runs(poisoned([3, 15], seed=4), optimizer=optimizer, seeds=[3, 4])
  assert bad is None
  assert bad_numbers.skipped(state).tolist() == [0, 2]
  assert bad_numbers.skipped(runs(curves())[1]) is None


def test_too_many_in_a_row_are_not_skipped():
  bad, good = runs(poisoned(list(range(5, 29))), optimizer=bad_numbers.skip_bad_steps(SGD))
  assert bad.step == 5 + bad_numbers.MOST_SKIPPED
  assert int(good.step) == 10


def test_a_loss_that_is_not_finite_while_its_gradient_is_is_not_skipped_in_silence():
  def episode(curve, key):
    found = curves().episode(curve, key)
    mark = jnp.all(jax.random.key_data(key) == marked)
    y = found.query.y.at[0, 0].set(jnp.where(mark, jnp.inf, found.query.y[0, 0]))
    return ms.Episode(found.support, ms.Batch(found.query.x, y))

  marked = jax.random.key_data(loop.step_keys(jax.random.key(0), 4, BATCH)[1, 0])

  def infinite(meta, episode, key):
    zeroed = jax.tree.map(lambda leaf: jnp.where(jnp.isinf(leaf), 0.0, leaf), episode.query)
    value, info = LEARNER.loss(meta, episode._replace(query=zeroed), key)
    return value + jnp.where(jnp.isinf(episode.query.y).any(), jnp.inf, 0.0), info

  tasks, learner = ms.TaskDistribution(curves().sample, episode), LEARNER._replace(loss=infinite)
  bad, _ = runs(tasks, learner=learner, optimizer=bad_numbers.skip_bad_steps(SGD))
  assert (bad.step, bad.loss) == (4, np.inf)


def test_clipping_does_not_hide_an_infinite_gradient():
  config = type('Config', (), dict(learning_rate=1e-3, schedule='constant', clip=10.0, meta_iterations=10))
  params = {'w': np.zeros(3, np.float32)}
  for name in ('meta_sgd', 'meta_lstm'):
    optimizer = few_shot_learners.build_optimizer(name, config)
    update = jax.jit(lambda grads, optimizer=optimizer: optimizer.update(grads, optimizer.init(params), params)[0])
    assert np.isnan(update({'w': np.float32([np.inf, 1, 2])})['w'][0])
  assert np.isfinite(update({'w': np.float32([1e6, 1, 2])})['w']).all()
