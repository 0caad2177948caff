import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import assert_trees_close, conv_learner, episodes, random_bank, saying, sinusoid_learner

import metasgd_jax as ms
from metasgd_jax.outer.placement import LARGE


def test_mappings_are_equal_and_equal_a_loop(both_compilers):
  learner = sinusoid_learner(hidden=(8,), steps=2, metrics={'mse': ms.losses.mean_squared_error})
  assert_mappings_equal_a_loop(learner, ms.tasks.sinusoid())


def test_a_rate_that_is_a_number():
  """As `adapt` takes it: a number of Python or NumPy, or a dict of numbers."""
  learner, tasks = sinusoid_learner(hidden=(3,)), ms.tasks.sinusoid(shot=2, query=2)
  batch, keys = episodes(tasks, 4), jax.random.split(jax.random.key(7), 4)
  meta = learner.init(jax.random.key(0), jax.tree.map(lambda a: a[0], batch))
  gradient = jax.jit(lambda meta: ms.mean_loss_and_grad(learner, meta, batch, keys))
  (expected, _), slopes = gradient(meta._replace(alpha=jax.tree.map(lambda leaf: jnp.full_like(leaf, 0.1), meta.alpha)))
  for alpha in (0.1, np.float64(0.1), np.array(0.1), {'Dense_0': 0.1, 'Dense_1': np.float32(0.1)}):
    (loss, _), found = ms.mean_loss_and_grad(learner, meta._replace(alpha=alpha), batch, keys)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert_trees_close(found.theta, slopes.theta, rtol=1e-5, atol=1e-7)
    total = sum(np.sum(leaf) for leaf in jax.tree.leaves(slopes.alpha))
    np.testing.assert_allclose(sum(map(float, jax.tree.leaves(found.alpha))), total, rtol=1e-4)
  with pytest.raises(ValueError, match=saying('alpha', 'floating-point', 'got 1', '1.0')):
    ms.mean_loss_and_grad(learner, meta._replace(alpha=1), batch, keys)


@pytest.mark.slow
def test_mappings_are_equal_for_a_convolutional_network():
  tasks = ms.tasks.few_shot(random_bank(), way=3, shot=1, query=2)
  assert_mappings_equal_a_loop(conv_learner(way=3), tasks)


def assert_mappings_equal_a_loop(learner, tasks):
  batch, keys = jax.device_get(episodes(tasks, 4)), jax.random.split(jax.random.key(7), 4)
  task = lambda i: jax.tree.map(lambda a: a[i], batch)
  meta = jax.jit(learner.init)(jax.random.key(0), task(0))
  one = jax.jit(jax.value_and_grad(learner.loss, has_aux=True))
  outs = jax.device_get([one(meta, task(i), keys[i]) for i in range(4)])
  looped = jax.tree.map(lambda *leaves: np.mean(np.stack(leaves), 0), *outs)
  for mapping in ('all', 1, 2):
    got = jax.jit(lambda m, e, k, mapping=mapping: ms.mean_loss_and_grad(learner, m, e, k, tasks_at_once=mapping))(
      meta, batch, keys
    )
    assert_trees_close(got, looped, rtol=1e-4, atol=1e-6)
  loss, info = jax.jit(lambda m, e, k: ms.mean_loss(learner, m, e, k))(meta, batch, keys)
  np.testing.assert_allclose(loss, looped[0][0], rtol=1e-5)
  assert_trees_close(info, looped[0][1])


def test_each_task_gets_its_own_key():
  def loss(meta, episode, key):
    return meta * jax.random.uniform(key), {}

  learner = ms.Learner(None, None, None, None, loss)
  keys = jax.random.split(jax.random.key(0), 4)
  batch = ms.Episode(np.zeros(4), np.zeros(4))
  draw = jax.jit(jax.random.uniform)
  expected = np.mean([float(draw(k)) for k in keys])
  mapped = jax.jit(ms.mean_loss_and_grad, static_argnums=0, static_argnames='tasks_at_once')
  for mapping in ('all', 1, 2):
    (value, _), grad = mapped(learner, np.float32(2.0), batch, keys, tasks_at_once=mapping)
    np.testing.assert_allclose([value, grad], [2 * expected, expected], rtol=1e-6)


@pytest.mark.parametrize('mapping', ['pmap', 0, -2, True, 1.5])
def test_an_unknown_mapping(mapping):
  with pytest.raises(ValueError, match=saying('tasks_at_once', "'auto', 'all'", 'an integer', f'got {mapping!r}')):
    ms.mean_loss_and_grad(sinusoid_learner(), None, None, None, tasks_at_once=mapping)


def shapes_of(learner, tasks, count):
  """Shapes of the meta-parameters, of `count` episodes and of their keys."""

  def arguments(keys):
    batch = jax.vmap(lambda key: tasks.episode(tasks.sample(key), key))(keys)
    return learner.init(keys[0], jax.tree.map(lambda a: a[0], batch)), batch, keys

  return jax.eval_shape(arguments, jax.random.split(jax.random.key(0), count))


@pytest.mark.parametrize('group', [3, 8])
def test_groups_that_do_not_come_out_even(group):
  learner, arguments = sinusoid_learner(), shapes_of(sinusoid_learner(), ms.tasks.sinusoid(), 4)
  with pytest.raises(ValueError, match=saying(f'tasks_at_once={group}', 'does not divide', '4 tasks')):
    jax.eval_shape(lambda m, e, k: ms.mean_loss_and_grad(learner, m, e, k, tasks_at_once=group), *arguments)


def test_auto_takes_large_networks_one_task_after_the_other():
  small, large = (jax.ShapeDtypeStruct((n,), jnp.float32) for n in (LARGE - 1, LARGE))
  on_cpu = jax.default_backend() == 'cpu'
  assert ms.Placement().group(small, 8) == 8
  assert ms.Placement().group({'a': large}, 8) == (1 if on_cpu else 8)


def test_groups_bound_the_memory():
  learner, tasks = sinusoid_learner(hidden=(8,)), ms.tasks.sinusoid(shot=500, query=500)
  arguments = shapes_of(learner, tasks, 8)
  memory = {}
  for mapping in (8, 2, 1):
    f = jax.jit(lambda m, e, k, mapping=mapping: ms.mean_loss_and_grad(learner, m, e, k, tasks_at_once=mapping))
    memory[mapping] = f.lower(*arguments).compile().memory_analysis().temp_size_in_bytes
  assert memory[8] > 2 * memory[2] > 2.5 * memory[1]
