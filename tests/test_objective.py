import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import assert_trees_close, conv_learner, episodes, random_bank, sinusoid_learner

import metasgd_jax as ms
from metasgd_jax import objective


@pytest.mark.parametrize('kind', ['sinusoid', 'conv'])
def test_mappings_are_equal_and_equal_a_loop(kind, optimized):
  if kind == 'sinusoid':
    learner, tasks = sinusoid_learner(steps=2), ms.tasks.sinusoid()
  else:
    learner, tasks = conv_learner(), ms.tasks.few_shot(random_bank(size=16), way=5, shot=1, query=2)
  batch, keys = episodes(tasks, 4), jax.random.split(jax.random.key(7), 4)
  meta = learner.init(jax.random.key(0), jax.tree.map(lambda a: a[0], batch))
  one = jax.jit(jax.value_and_grad(learner.loss, has_aux=True))
  outs = [one(meta, jax.tree.map(lambda a, i=i: a[i], batch), keys[i]) for i in range(4)]
  looped = jax.tree.map(lambda *leaves: jnp.mean(jnp.stack(leaves), 0), *outs)
  for mapping in ('vmap', 'scan', 2):
    got = jax.jit(lambda m, e, k, mapping=mapping: ms.value_and_grad(learner, m, e, k, mapping=mapping))(
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
  batch = ms.Episode(jnp.zeros(4), jnp.zeros(4))
  expected = np.mean([float(jax.random.uniform(k)) for k in keys])
  for mapping in ('vmap', 'scan', 2):
    (value, _), grad = ms.value_and_grad(learner, jnp.float32(2.0), batch, keys, mapping=mapping)
    np.testing.assert_allclose([value, grad], [2 * expected, expected], rtol=1e-6)


@pytest.mark.parametrize('mapping', ['pmap', 0, -2, True, 1.5])
def test_an_unknown_mapping(mapping):
  with pytest.raises(ValueError, match=f"mapping must be 'auto', 'vmap', 'scan' or a number .*, got {mapping!r}"):
    ms.value_and_grad(sinusoid_learner(), None, None, None, mapping=mapping)


@pytest.mark.parametrize('group', [3, 8])
def test_groups_that_do_not_come_out_even(group):
  batch = episodes(ms.tasks.sinusoid(), 4)
  learner = sinusoid_learner()
  meta = learner.init(jax.random.key(0), jax.tree.map(lambda a: a[0], batch))
  with pytest.raises(ValueError, match=f'4 tasks on a device cannot be split into groups of mapping={group}'):
    ms.value_and_grad(learner, meta, batch, jax.random.split(jax.random.key(0), 4), mapping=group)


def test_auto_takes_large_networks_one_task_after_the_other():
  small, large = jnp.zeros(objective.LARGE - 1), jnp.zeros(objective.LARGE)
  on_cpu = jax.default_backend() == 'cpu'
  assert objective.tasks_at_once('auto', small, 8) == 8
  assert objective.tasks_at_once('auto', {'a': large}, 8) == (1 if on_cpu else 8)


def test_groups_bound_the_memory():
  learner, tasks = conv_learner(), ms.tasks.few_shot(random_bank(size=16, instances=11), way=5, shot=1, query=10)
  batch, keys = episodes(tasks, 8), jax.random.split(jax.random.key(7), 8)
  meta = learner.init(jax.random.key(0), jax.tree.map(lambda a: a[0], batch))
  memory = {}
  for mapping in (8, 2, 1):
    f = jax.jit(lambda m, e, k, mapping=mapping: ms.value_and_grad(learner, m, e, k, mapping=mapping))
    memory[mapping] = f.lower(meta, batch, keys).compile().memory_analysis().temp_size_in_bytes
  assert memory[8] > 2 * memory[2] > 2.5 * memory[1]
