"""How well a learner does on unseen tasks: a value for every task, and intervals made of them at the edge."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import scipy.special

from metasgd_jax.objective import Mapping, check_mapping
from metasgd_jax.types import Learner, PyTree, TaskDistribution


class Estimate(NamedTuple):
  """A mean and the half-width of its 95% confidence interval, in the units of the values."""

  mean: float
  ci95: float

  def __str__(self) -> str:
    return f'{self.mean:z.2f}±{self.ci95:.2f}'


def evaluate(
  learner: Learner,
  meta: PyTree,
  tasks: TaskDistribution,
  key: chex.PRNGKey,
  *,
  metric_fn: Callable[[Any, Any], chex.Array],
  num_tasks: int = 600,
  repeats: int = 1,
  mapping: Mapping = 'vmap',
  at_once: int = 32,
) -> np.ndarray:
  """Returns the metric of each task after 0, 1, …, k inner steps: `[num_tasks, repeats, k + 1]`.

  The tasks depend on `key` alone, so two learners with the same key are judged on the same tasks and episodes, and
  their values can be compared in pairs. A learner with more steps than it was trained with may be given.

  Args:
    learner: how to adapt and predict; its `path` gives the steps.
    meta: its meta-parameters, of one run.
    tasks: where unseen tasks come from; Q is its episodes'.
    key: consumed; split into one for each task.
    metric_fn: `(outputs [Q, …], targets [Q, …]) → scalar`, on the query.
    num_tasks: T.
    repeats: episodes drawn of each task.
    mapping: how tasks are laid over the machine.
    at_once: with 'vmap', the most tasks laid out at the same time (the greatest divisor of num_tasks up to it is
      taken); bounds the memory.

  Raises:
    ValueError: num_tasks, repeats or at_once below 1, or an unknown mapping.
  """
  check_mapping(mapping)
  for name, value in (('num_tasks', num_tasks), ('repeats', repeats), ('at_once', at_once)):
    if value < 1:
      raise ValueError(f'{name} must be at least 1, got {value}')
  keys = jax.random.split(key, num_tasks)
  group = max(n for n in range(1, min(at_once, num_tasks) + 1) if num_tasks % n == 0)
  values = _evaluate(
    meta,
    tasks.as_arguments(),
    keys,
    learner=learner,
    metric_fn=metric_fn,
    repeats=repeats,
    mapping=mapping,
    group=group,
  )
  return np.asarray(values)


@functools.partial(jax.jit, static_argnames=('learner', 'metric_fn', 'repeats', 'mapping', 'group'))
def _evaluate(meta, tasks, keys, *, learner, metric_fn, repeats, mapping, group):
  def one_episode(task, key):
    episode_key, adapt_key = jax.random.split(key)
    episode = tasks.episode(task, episode_key)
    path = learner.path(meta, episode.support, adapt_key)

    def judge(adapted):
      return metric_fn(learner.predict(adapted, episode.query.x), episode.query.y)

    return jax.vmap(judge)(path) if mapping == 'vmap' else jax.lax.map(judge, path)

  def one_task(key):
    sample_key, repeat_key = jax.random.split(key)
    task = tasks.sample(sample_key)
    return jax.vmap(one_episode, (None, 0))(task, jax.random.split(repeat_key, repeats))

  return jax.lax.map(one_task, keys, batch_size=group if mapping == 'vmap' else None)


def estimate(values: np.ndarray | jnp.ndarray) -> Estimate:
  """Returns the mean of n values `[n]` and its 95% interval, t_{0.975, n−1} · s / √n with Student's t.

  A single value has an infinite interval.

  Raises:
    ValueError: values that are not one-dimensional, or none at all.
  """
  values = np.asarray(values, np.float64)
  if values.ndim != 1 or values.size == 0:
    raise ValueError(f'estimate takes one value a task, [n] with n >= 1, got shape {values.shape}')
  n = values.size
  if n == 1:
    return Estimate(float(values[0]), float('inf'))
  quantile = scipy.special.stdtrit(n - 1, 0.975)
  return Estimate(float(values.mean()), float(quantile * values.std(ddof=1) / np.sqrt(n)))
