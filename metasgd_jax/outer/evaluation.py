"""Evaluation of a learner on unseen tasks: one value of the metric per task, and confidence intervals of the values."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from metasgd_jax.outer import sharding
from metasgd_jax.outer.loop import TrainState, check_key
from metasgd_jax.outer.placement import Placement, is_large
from metasgd_jax.types import Learner, PyTree, Tasks, check_count

AT_ONCE = 32
"""Largest number of tasks computed at the same time if the placement gives no number. The limit bounds the memory."""
PARTS = 20
"""Number of parts in which tasks are computed if their progress is reported."""


class Interval(NamedTuple):
  """A mean and the half-width of its 95% confidence interval, in the units of the values.

  Attributes:
    mean: Mean over tasks, or over runs.
    ci95: Half-width of the interval; infinite for a single value.

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
  report: Callable[[int], None] | None = None,
) -> np.ndarray:
  """Returns the metric of each task after 0, 1, …, k inner steps: `[num_tasks, repeats, k + 1, …]`.

  The tasks depend only on `key`. Two learners that are evaluated with the same key receive the same tasks and episodes,
  so their values can be compared in pairs. The learner may take more inner steps than in training.

  Args:
    learner: Learner, which adapts and predicts. Its `path` determines the number of inner steps.
    meta: Meta-parameters of one run of the learner.
    tasks: Unseen tasks. Q is the number of query items of their episodes.
    key: Random key, consumed. It is split into one key per task.
    metric_fn: Metric on the query, `(outputs [Q, …], targets [Q, …]) → scalar`. If it returns an array, its axes are
      the last ones of the result.
    num_tasks: Number of tasks T.
    repeats: Number of episodes drawn from each task.
    placement: How the tasks are placed on devices. A device computes its tasks in groups of equal size, one group after
      another. With `tasks_at_once=n` the groups have the largest size up to n that divides the number of the device's
      tasks, and with 'all' the largest such size up to 32. 'auto' means 1 or 'all', as `Placement` says. If the devices
      belong to several processes, every process must call this function, and every process receives all values.
    report: Function that is called with the number of tasks that are done so far. If it is given, the tasks are
      computed in about twenty parts, and it is called after each of them.

  Raises:
    ValueError: if `num_tasks` or `repeats` is not an integer of at least 1, if `meta` is a `TrainState`, if `key` is
      not a random key of the impl threefry2x32, or if the devices cannot share the tasks evenly.

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
  if isinstance(meta, TrainState):
    raise ValueError('`meta` must be the meta-parameters, got a TrainState; give state.meta')
  placement.check(num_tasks)
  check_key(key)
  mesh = placement.mesh
  keys = jax.random.split(key, num_tasks)
  group = _group(placement, meta, num_tasks // placement.devices)
  meta, tasks = sharding.on_all(mesh, (meta, tasks))
  judge = functools.partial(_evaluate, learner=learner, metric_fn=metric_fn, repeats=repeats, group=group, mesh=mesh)
  most = min(tasks.sent_at_once or num_tasks, num_tasks if report is None else -(-num_tasks // PARTS))
  step = num_tasks if most == num_tasks else _part(num_tasks, group * placement.devices, most)
  values = []
  for start in range(0, num_tasks, step):
    part = keys[start : start + step]
    ready = tasks.prepare(functools.partial(_episode_keys, part, repeats=repeats))
    values.append(sharding.gathered(judge(meta, *sharding.on_all(mesh, (ready, part)))))
    if report is not None:
      report(start + step)
  return np.concatenate(values)


def _group(placement: Placement, meta: PyTree, num_tasks: int) -> int:
  """Returns the number of a device's tasks that are computed at the same time, a divisor of `num_tasks`."""
  most = placement.at_once(num_tasks, large=is_large(meta))
  if isinstance(placement.tasks_at_once, str):
    most = min(most, AT_ONCE)
  return max(n for n in range(1, min(most, num_tasks) + 1) if num_tasks % n == 0)


def _part(num_tasks: int, group: int, most: int) -> int:
  """Returns the number of tasks that are computed by one call: a multiple of `group` that divides `num_tasks`.

  It is the largest such number that is at most `most`, or `group` if `group` is larger than `most`.
  """
  groups = max(n for n in range(1, max(1, most // group) + 1) if num_tasks // group % n == 0)
  return group * groups


@functools.partial(jax.jit, static_argnames='repeats')
def _episode_keys(keys, *, repeats):
  """Returns the keys with which `_evaluate` samples the tasks and draws the episodes, each `[tasks · repeats]`."""

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
  """Returns the mean of n values and the half-width of its 95% confidence interval.

  The half-width is t_{0.975, n−1} · s / √n. Here s is the standard deviation of the values, and t_{0.975, n−1} is the
  0.975 quantile of Student's t distribution with n − 1 degrees of freedom. For a single value the half-width is
  infinite.

  Args:
    values: Values `[n]`, one per task or one per run.

  Raises:
    ValueError: if `values` is not one-dimensional, or if it is empty.

  Example:
    >>> print(ms.confidence_interval(np.array([1.0, 2.0, 3.0])))
    2.00±2.48
  """
  values = np.asarray(values, np.float64)
  if values.ndim != 1 or values.size == 0:
    raise ValueError(
      f'`values` must have shape [n] with n >= 1, one value per task or per run, got shape {values.shape}'
    )
  n = values.size
  if n == 1:
    return Interval(float(values[0]), float('inf'))
  from scipy.special import stdtrit  # SciPy is imported only when it is needed.

  quantile = stdtrit(n - 1, 0.975)
  return Interval(float(values.mean()), float(quantile * values.std(ddof=1) / np.sqrt(n)))
