import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import assert_trees_close, conv_learner, episodes, random_bank, sinusoid_learner

import metasgd_jax as ms


@pytest.mark.parametrize('kind', ['sinusoid', 'conv'])
def test_mappings_are_equal_and_equal_a_loop(kind, optimized):
  if kind == 'sinusoid':
    learner, tasks = sinusoid_learner(steps=2), ms.tasks.sinusoid()
  else:
    learner, tasks = conv_learner(), ms.tasks.few_shot(random_bank(size=16), way=5, shot=1, query=2)
  batch, keys = episodes(tasks, 3), jax.random.split(jax.random.key(7), 3)
  meta = learner.init(jax.random.key(0), jax.tree.map(lambda a: a[0], batch))
  one = jax.jit(jax.value_and_grad(learner.loss, has_aux=True))
  outs = [one(meta, jax.tree.map(lambda a, i=i: a[i], batch), keys[i]) for i in range(3)]
  looped = jax.tree.map(lambda *leaves: jnp.mean(jnp.stack(leaves), 0), *outs)
  for mapping in ('vmap', 'scan'):
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
  for mapping in ('vmap', 'scan'):
    (value, _), grad = ms.value_and_grad(learner, jnp.float32(2.0), batch, keys, mapping=mapping)
    np.testing.assert_allclose([value, grad], [2 * expected, expected], rtol=1e-6)


def test_an_unknown_mapping():
  with pytest.raises(ValueError, match=r"mapping must be one of \('vmap', 'scan'\), got 'pmap'"):
    ms.value_and_grad(sinusoid_learner(), None, None, None, mapping='pmap')
