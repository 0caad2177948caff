"""How well a learner does on unseen tasks: a value for every task, and intervals made of them at the edge."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from metasgd_jax.outer import sharding
from metasgd_jax.outer.placement import Placement
from metasgd_jax.types import Learner, PyTree, Tasks, check_count

AT_ONCE = 32
"""Largest number of tasks that are computed at the same time unless a number is asked for; it bounds the memory."""


class Interval(NamedTuple):
  """A mean and the half-width of its 95% confidence interval, in the units of the values.

  Attributes:
    mean: over tasks, or over runs.
    ci95: the half-width; infinite for a single value.

  Example:
    >>> print(ms.Interval(mean=0.8412, ci95=0.0789))
    0.84±0.08
  """

  mean: float
  ci95: float

  def __str__(self) -> str:
    return f'{self.mean:z.2f}±{self.ci95:.2f}'


def evaluate(
  learner: Learner,
  meta: PyTree,
  tasks: Tasks,
  key: chex.PRNGKey,
  *,
  metric_fn: Callable[[Any, Any], chex.Array],
  num_tasks: int = 600,
  repeats: int = 1,
  placement: Placement = Placement(),
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
    placement: How the tasks are placed on devices. `tasks_at_once='all'`, and a number that does not divide the tasks
      of a device, mean the greatest divisor up to 32, or up to that number. Of several processes all must call this
      function, and each receives all values.

  Raises:
    ValueError: if `num_tasks` or `repeats` is not an integer of at least 1, or if the devices cannot share the tasks
      evenly.

  Example:
    >>> tasks = ms.tasks.sinusoid(shot=5)
    >>> learner = ms.meta_sgd(ms.nn.from_linen(ms.nn.MLP()), ms.losses.mean_squared_error)
    >>> meta = ms.init(jax.random.key(0), tasks, learner=learner, optimizer=optax.adam(1e-3)).meta
    >>> values = ms.evaluate(
    ...   learner, meta, tasks, jax.random.key(1), metric_fn=ms.losses.mean_squared_error, num_tasks=6, repeats=2
    ... )
    >>> values.shape  # [task, draw, inner step]
    (6, 2, 2)
  """
  for name, value in (('num_tasks', num_tasks), ('repeats', repeats)):
    check_count(name, value)
  placement.check(num_tasks)
  mesh = placement.mesh
  keys = jax.random.split(key, num_tasks)
  group = _group(placement, meta, num_tasks // placement.devices)
  meta, tasks = sharding.on_all(mesh, (meta, tasks))
  judge = functools.partial(_evaluate, learner=learner, metric_fn=metric_fn, repeats=repeats, group=group, mesh=mesh)
  step = num_tasks if tasks.sent_at_once is None else _part(num_tasks, group * placement.devices, tasks.sent_at_once)
  values = []
  for start in range(0, num_tasks, step):
    part = keys[start : start + step]
    ready = tasks.prepare(functools.partial(_episode_keys, part, repeats=repeats))
    values.append(sharding.gathered(judge(meta, *sharding.on_all(mesh, (ready, part)))))
  return np.concatenate(values)


def _group(placement: Placement, meta: PyTree, num_tasks: int) -> int:
  """Returns the number of a device's tasks that are computed at the same time, a divisor of `num_tasks`."""
  at_once = placement.tasks_at_once
  most = min(AT_ONCE, placement.group(meta, num_tasks)) if isinstance(at_once, str) else int(at_once)
  return max(n for n in range(1, min(most, num_tasks) + 1) if num_tasks % n == 0)


def _part(num_tasks: int, group: int, sent_at_once: int) -> int:
  """Returns the number of tasks whose data are sent together: groups that divide all tasks evenly."""
  groups = max(n for n in range(1, max(1, sent_at_once // group) + 1) if num_tasks // group % n == 0)
  return group * groups


@functools.partial(jax.jit, static_argnames='repeats')
def _episode_keys(keys, *, repeats):
  """The keys of each task and of each of its episodes, as `_evaluate` draws them: `[tasks · repeats]` each."""

  def of_task(key):
    sample_key, repeat_key = jax.random.split(key)
    episode_keys = jax.vmap(lambda k: jax.random.split(k)[0])(jax.random.split(repeat_key, repeats))
    return jnp.broadcast_to(sample_key, (repeats,)), episode_keys

  sample_keys, episode_keys = jax.vmap(of_task)(keys)
  return sample_keys.ravel(), episode_keys.ravel()


@functools.partial(jax.jit, static_argnames=('learner', 'metric_fn', 'repeats', 'group', 'mesh'))
def _evaluate(meta, tasks, keys, *, learner, metric_fn, repeats, group, mesh):
  def of_tasks(shared, keys):
    meta, tasks = shared

    def one_episode(task, key):
      episode_key, adapt_key = jax.random.split(key)
      episode = tasks.episode(task, episode_key)
      path = learner.path(meta, episode.support, adapt_key)

      def judge(adapted):
        return metric_fn(learner.predict(adapted, episode.query.x), episode.query.y)

      return jax.vmap(judge)(path) if group > 1 else jax.lax.map(judge, path)

    def one_task(key):
      sample_key, repeat_key = jax.random.split(key)
      task = tasks.sample(sample_key)
      return jax.vmap(one_episode, (None, 0))(task, jax.random.split(repeat_key, repeats))

    return jax.lax.map(one_task, keys, batch_size=group if group > 1 else None)

  return sharding.share_tasks(of_tasks, mesh, average=False)((meta, tasks), keys)


def confidence_interval(values: np.ndarray | jnp.ndarray) -> Interval:
  """Returns the mean of n values `[n]` and its 95% interval, t_{0.975, n−1} · s / √n with Student's t.

  A single value has an infinite interval.

  Args:
    values: `[n]`, one a task, or one a run.

  Raises:
    ValueError: values that are not one-dimensional, or none at all.

  Example:
    >>> print(ms.confidence_interval(np.array([1.0, 2.0, 3.0])))
    2.00±2.48
  """
  values = np.asarray(values, np.float64)
  if values.ndim != 1 or values.size == 0:
    raise ValueError(f'confidence_interval takes one value a task, [n] with n >= 1, got shape {values.shape}')
  n = values.size
  if n == 1:
    return Interval(float(values[0]), float('inf'))
  from scipy.special import stdtrit  # scipy is imported where it is first used.

  quantile = stdtrit(n - 1, 0.975)
  return Interval(float(values.mean()), float(quantile * values.std(ddof=1) / np.sqrt(n)))
