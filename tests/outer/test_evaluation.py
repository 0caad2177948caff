import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
from problems import conv_learner, random_bank, saying, sinusoid_learner

import metasgd_jax as ms
from metasgd_jax.outer import evaluation

TASKS = ms.tasks.sinusoid(query=20)
LEARNER = sinusoid_learner(hidden=(8,))


def evaluate(learner, meta, seed=0, tasks=TASKS, metric_fn=ms.losses.mean_squared_error, **kwargs):
  return ms.evaluate(learner, meta, tasks, jax.random.key(seed), metric_fn=metric_fn, **kwargs)


def meta_of(learner=LEARNER, tasks=TASKS):
  return ms.init(jax.random.key(0), tasks, learner=learner, optimizer=optax.identity()).meta


def test_a_value_for_every_task_repeat_and_step():
  after = [sinusoid_learner(hidden=(8,), steps=step) for step in range(4)]
  meta = meta_of(after[3])
  values = evaluate(after[3], meta, num_tasks=4, repeats=2)
  assert values.shape == (4, 2, 4)

  @jax.jit
  def second_of_second(meta):
    sample_key, repeat_key = jax.random.split(jax.random.split(jax.random.key(0), 4)[1])
    episode_key, adapt_key = jax.random.split(jax.random.split(repeat_key, 2)[1])
    episode = TASKS.episode(TASKS.sample(sample_key), episode_key)
    predict = lambda learner: learner.predict(learner.adapt(meta, episode.support, adapt_key), episode.query.x)
    return [predict(learner) for learner in after], episode.query.y

  predictions, y = jax.device_get(second_of_second(meta))
  for step, predicted in enumerate(predictions):
    np.testing.assert_allclose(values[1, 1, step], np.mean((predicted - y) ** 2), rtol=1e-4)


@pytest.mark.slow
def test_mappings_are_equal_for_a_convolutional_network():
  learner = conv_learner(way=3)
  tasks = ms.tasks.few_shot(random_bank(), way=3, shot=1, query=3)
  meta = meta_of(learner, tasks)
  by = {
    n: evaluate(learner, meta, tasks=tasks, metric_fn=ms.losses.cross_entropy, num_tasks=5, placement=ms.Placement(n))
    for n in ('all', 1)
  }
  np.testing.assert_allclose(by['all'], by[1], rtol=1e-4)


def test_mappings_and_groups_change_nothing(both_compilers):
  meta = meta_of()
  whole = evaluate(LEARNER, meta, num_tasks=6, placement=ms.Placement('all'))
  for mapping in (1, 4, 100):
    np.testing.assert_allclose(evaluate(LEARNER, meta, num_tasks=6, placement=ms.Placement(mapping)), whole, rtol=1e-5)


@pytest.mark.parametrize(('count', 'at_once', 'parts'), [(60, 1, range(3, 61, 3)), (6, 2, (2, 4, 6)), (6, 6, (6,))])
def test_progress_is_reported_and_changes_nothing(count, at_once, parts):
  meta, found = meta_of(), []
  options = dict(num_tasks=count, placement=ms.Placement(at_once))
  values = evaluate(LEARNER, meta, report=found.append, **options)
  assert found == list(parts)
  np.testing.assert_allclose(values, evaluate(LEARNER, meta, **options), rtol=1e-5)


@pytest.mark.parametrize('group', [1, 2, 6])
def test_tasks_are_computed_in_groups(group):
  meta, keys = meta_of(), jax.random.split(jax.random.key(0), 6)
  options = dict(learner=LEARNER, metric_fn=ms.losses.mean_squared_error, repeats=1, group=group, mesh=None)
  program = jax.make_jaxpr(functools.partial(evaluation._evaluate, **options))(meta, TASKS, keys)
  assert f'length={6 // group}\n' in str(program)


def test_devices_change_nothing(both_compilers):
  meta = meta_of()
  whole, shared = (
    evaluate(LEARNER, meta, num_tasks=6, repeats=2, placement=ms.Placement(mesh=m))
    for m in (None, ms.sharding.task_mesh(6))
  )
  np.testing.assert_allclose(shared, whole, rtol=1e-5)


def test_another_run_of_the_same_learner_does_not_compile_again():
  meta = meta_of()
  evaluate(LEARNER, meta, num_tasks=5)
  size = evaluation._evaluate._cache_size()
  evaluate(LEARNER, jax.tree.map(lambda a: a + 1, meta), seed=3, num_tasks=5)
  assert evaluation._evaluate._cache_size() == size


def test_the_key_alone_says_which_tasks():
  """Two learners are judged on the same tasks: before adaptation equal parameters give equal values."""
  fast = sinusoid_learner(hidden=(8,), alpha=ms.AlphaConfig(0.1, 0.1))
  slow = sinusoid_learner(ms.maml, hidden=(8,), alpha=0.001)
  meta = meta_of(fast)
  a = evaluate(fast, meta, num_tasks=10)
  b = evaluate(slow, meta._replace(alpha=None), num_tasks=10)
  np.testing.assert_allclose(a[..., 0], b[..., 0], rtol=1e-6)
  assert not np.allclose(a[..., 1], b[..., 1])
  assert not np.allclose(a[..., 0], evaluate(fast, meta, seed=1, num_tasks=10)[..., 0])


def test_no_key_is_used_twice():
  """The task, the episode and the learner each write the first word of their key, and `path` returns all three."""
  word = lambda key: jax.random.key_data(key)[0]
  episode = lambda task, key: ms.Episode(jnp.stack([task, word(key)]), ms.Batch(jnp.zeros(1), jnp.zeros(1)))
  tasks = ms.TaskDistribution(word, episode)
  path = lambda meta, support, key: jnp.append(support, word(key))
  learner = ms.Learner(None, None, path, lambda adapted, x: adapted, None)
  words = evaluate(learner, jnp.zeros(()), tasks=tasks, metric_fn=lambda output, y: output, num_tasks=3, repeats=2)
  assert words.shape == (3, 2, 3)
  assert len(np.unique(words)) == 3 + 3 * 2 * 2  # A key for each task, and two for each of its episodes.


@pytest.mark.parametrize(('option', 'value'), [('num_tasks', 0), ('num_tasks', 4.0), ('repeats', -1)])
def test_counts_below_one(option, value):
  with pytest.raises(ValueError, match=saying(option, 'an integer of at least 1', f'got {value}')):
    evaluate(sinusoid_learner(), None, **{option: value})


class TestEstimate:
  def test_equals_scipys_t_interval(self):
    values = np.random.default_rng(0).gamma(2.0, size=30)
    mean, ci95 = ms.confidence_interval(values)
    low, high = scipy.stats.t.interval(0.95, 29, values.mean(), scipy.stats.sem(values))
    np.testing.assert_allclose([mean - ci95, mean + ci95], [low, high], rtol=1e-12)

  def test_covers_the_truth_95_times_in_100(self):
    draws = np.random.default_rng(0).normal(3.0, 2.0, (4000, 5))
    estimates = [ms.confidence_interval(d) for d in draws]
    assert abs(np.mean([abs(e.mean - 3.0) <= e.ci95 for e in estimates]) - 0.95) < 0.01

  def test_one_value_has_no_interval(self):
    assert ms.confidence_interval(np.array([2.0])) == (2.0, float('inf'))

  def test_jax_arrays_and_text(self):
    assert str(ms.confidence_interval(jnp.array([1.0, 2.0, 3.0]))) == '2.00±2.48'

  @pytest.mark.parametrize('shape', [(0,), (3, 2), ()])
  def test_wrong_ranks(self, shape):
    with pytest.raises(ValueError, match=saying('one value per task', '[n]', f'got shape {shape}')):
      ms.confidence_interval(np.zeros(shape))


def test_a_train_state_is_no_meta():
  state = ms.init(jax.random.key(0), TASKS, learner=LEARNER, optimizer=optax.identity())
  with pytest.raises(ValueError, match=saying('got a TrainState', 'give state.meta')):
    evaluate(LEARNER, state)
