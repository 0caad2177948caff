"""All parts can be traced where JAX refuses to mix dtypes (`jax_numpy_dtype_promotion='strict'`)."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from problems import sinusoid_learner

import metasgd_jax as ms

KEY = jax.random.key(0)


def train_a_learner():
  tasks, learner = ms.tasks.sinusoid(shot=2, query=2), sinusoid_learner(hidden=(3,), steps=3, adjoint='hvp')
  options = dict(learner=learner, optimizer=optax.sgd(1e-3))  # Adam itself mixes integers and floats.
  state = jax.eval_shape(functools.partial(ms.init, tasks=tasks, **options), KEY)
  jax.eval_shape(functools.partial(ms.train_step, tasks=tasks, meta_batch=2, **options), state)
  support = tasks.episode(tasks.sample(KEY), KEY).support
  jax.eval_shape(learner.path, state.meta, support, KEY)


def train_a_policy():
  policy, advantage = ms.rl.gaussian(3, 1, hidden=(2,)), ms.rl.AdvantageConfig(bootstrap=True)
  inner = ms.rl.policy_gradient(ms.rl.pendulum(horizon=3), policy, trajectories=2, advantage=advantage)
  meta = jax.eval_shape(inner.init, KEY)
  jax.eval_shape(functools.partial(ms.rl.trpo_meta_step, inner=inner, meta_batch=2), meta, KEY)


def draw_tasks():
  for tasks in (ms.tasks.glyphs(way=2, shot=1, query=1), ms.tasks.markov_chains(shot=1, query=1)):
    jax.eval_shape(lambda key, tasks=tasks: tasks.episode(tasks.sample(key), key), KEY)


def train_a_siamese_network():
  tasks, embedding = ms.tasks.glyphs(ms.tasks.GlyphConfig(size=8), way=2, shot=1, query=1), ms.nn.from_linen(Flat())
  learner = ms.learners.siamese(embedding, way=2, metrics={'accuracy': ms.losses.accuracy})
  options = dict(learner=learner, optimizer=optax.sgd(1e-3))
  state = jax.eval_shape(functools.partial(ms.init, tasks=tasks, **options), KEY)
  jax.eval_shape(functools.partial(ms.train_step, tasks=tasks, meta_batch=2, **options), state)


class Flat(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dense(3)(x.reshape(x.shape[0], -1))


def measure_half_precision():
  logits, labels = jnp.ones((3, 2), jnp.bfloat16), jnp.zeros(3, jnp.int8)
  for metric in (ms.losses.accuracy, ms.losses.cross_entropy):
    jax.eval_shape(metric, logits, labels)
    jax.eval_shape(ms.losses.masked(metric), logits, (labels, jnp.ones(3, bool)))


@pytest.mark.parametrize(
  'run', [train_a_learner, train_a_policy, draw_tasks, train_a_siamese_network, measure_half_precision]
)
def test_no_dtypes_are_mixed(run):
  with jax.numpy_dtype_promotion('strict'):
    run()
