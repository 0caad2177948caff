"""Small problems that several tests share."""

import contextlib
import functools
import re
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

import metasgd_jax as ms
from metasgd_jax.outer import loop


class SmallConvNet(nn.Module):
  """One block of Conv4 and a dense layer: compiles in a fraction of Conv4's time."""

  way: int

  @nn.compact
  def __call__(self, x):
    x = ms.nn.ConvBlock(4, native=True)(x)
    return nn.Dense(self.way)(x.reshape(x.shape[0], -1))


class OneLayer(nn.Module):
  """The least of networks for images."""

  way: int

  @nn.compact
  def __call__(self, x):
    return nn.Dense(self.way)(x.reshape(x.shape[0], -1))


def in_place_of_conv4(network):
  """A context in which learners are built of a small network, which compiles in a fraction of the time."""
  return mock.patch.object(ms.nn, 'Conv4', lambda way, filters, hidden, dtype=None, native=False: network(way or 4))


def sinusoid_learner(build=ms.meta_sgd, hidden=(40, 40), **kwargs):
  model = ms.nn.from_linen(ms.nn.MLP(hidden, stddev=0.2))
  return build(model, ms.losses.mean_squared_error, **kwargs)


def conv_learner(build=ms.meta_sgd, way=5, network=SmallConvNet, **kwargs):
  model = ms.nn.from_linen(network(way))
  return build(model, ms.losses.cross_entropy, metrics={'accuracy': ms.losses.accuracy}, **kwargs)


def episodes(tasks, count, seed=0):
  """`count` episodes stacked: leaves `[T, …]`."""
  sample_keys, episode_keys = jax.random.split(jax.random.key(seed), (2, count))
  return jax.jit(lambda: jax.vmap(tasks.episode)(jax.vmap(tasks.sample)(sample_keys), episode_keys))()


def random_bank(classes=8, instances=6, size=8, seed=0):
  """A class bank in which no two drawings are equal."""
  images = np.random.default_rng(seed).integers(0, 256, (classes, instances, size, size, 1), np.uint8)
  return ms.tasks.class_bank(images)


@contextlib.contextmanager
def compilations():
  """Gives a list that gets an entry for each program that is compiled, in this block."""
  found, inside = [], [True]

  def listen(event, duration, **_):
    if inside[0] and event == '/jax/core/compile/backend_compile_duration':
      found.append(duration)

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    yield found
  finally:
    inside[0] = False


@functools.cache
def curves():
  return ms.tasks.sinusoid()


def poisoned(steps, task=2, seed=0, how=jnp.nan, meta_batch=4):
  """Curves of which one task's targets at these meta-iterations of a run are not finite."""
  step_key = lambda step: jax.random.key_data(loop.step_keys(jax.random.key(seed), step, meta_batch)[1, task])
  keys = jax.jit(jax.vmap(step_key))(np.asarray(steps))
  episode = Partial(_poisoned_episode, keys, jnp.float32(how))
  return ms.TaskDistribution(curves().sample, episode)


def _poisoned_episode(bad, how, curve, key):
  found = curves().episode(curve, key)
  hit = jnp.any(jnp.all(jax.random.key_data(key)[None] == bad, axis=-1))
  return ms.Episode(found.support, ms.Batch(found.query.x, jnp.where(hit, how, found.query.y)))


def saying(*parts):
  """A pattern for `pytest.raises(match=…)`: the message has all of these parts, in any order and wording."""
  return '(?s)' + ''.join(f'(?=.*{re.escape(str(part))})' for part in parts)


def to_float64(tree):
  return jax.tree.map(
    lambda a: jnp.asarray(np.asarray(a), jnp.float64) if jnp.issubdtype(a.dtype, jnp.floating) else a, tree
  )


def assert_slopes_by_differences(loss, meta, *, directions=3, h=1e-7):
  """Compares jax.grad(loss) with central differences along random directions of θ and of α, which are float64."""
  rng = np.random.default_rng(0)
  value, grads = jax.jit(loss), jax.jit(jax.grad(loss))(meta)
  for part in ('theta', 'alpha'):
    at, grad = getattr(meta, part), getattr(grads, part)
    for _ in range(directions):
      along = jax.tree.map(lambda a: rng.normal(size=a.shape), at)
      ahead, behind = (
        value(meta._replace(**{part: jax.tree.map(lambda a, d, step=step: np.asarray(a) + step * d, at, along)}))
        for step in (h, -h)
      )
      expected = float(ahead - behind) / (2 * h)
      assert_close(sum(jax.tree.leaves(jax.tree.map(np.vdot, grad, along))), expected, rtol=1e-5, atol=1e-8)


def relative_error(a, b):
  """|a − b| / |b| over all leaves together."""
  a, b = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(t)]) for t in (a, b))
  return float(np.linalg.norm(a - b) / np.linalg.norm(b))


assert_close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6)


def assert_trees_close(a, b, **tolerance):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(lambda x, y: assert_close(x, y, **tolerance), a, b)


def table_row(**changes):
  """A row of a cell's results.json."""
  row = dict(
    learner='lstm', way=5, shot=1, test_shot=1, batch_norm='none', mean=0.5, ci95=0.1, mean_by_step=[0.5],
    meta_iterations=1, meta_batch=1, seeds=1, tasks=2, dataset='omniglot', query=1, eval_query=1,
  )  # fmt: skip
  return row | changes
