"""Diagnosis of numbers that are not finite in meta-training: finds the step, the run, the tasks and the leaves."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from metasgd_jax.outer.loop import Progress, TrainState, check_key, step_keys
from metasgd_jax.tree import named
from metasgd_jax.types import Learner, Tasks, equal_by_arguments

MOST_SKIPPED = 10
"""Largest number of consecutive bad steps that `skip_bad_steps` skips. More of these steps mean a divergence."""


class StepReport(NamedTuple):
  """One meta-iteration of one run, task by task.

  Attributes:
    step: Index of the meta-iteration, from 0.
    keys: Random keys `[3, T]` from `loop.step_keys`: to sample each task, to draw its episode, and for the learner.
    losses: Loss of each task on its query after adaptation, `[T]`.
    norms: Norm of the gradient of each task's loss, for each leaf of the meta-parameters: `{leaf: [T]}`.
    finite: Whether every entry of the gradient of each task's loss is finite: `{leaf: [T]}`.
  """

  step: int
  keys: chex.PRNGKey
  losses: np.ndarray
  norms: dict[str, np.ndarray]
  finite: dict[str, np.ndarray]

  @property
  def bad_tasks(self) -> list[int]:
    """Returns the indices, from 0, of the tasks whose loss or gradient is not finite."""
    return np.flatnonzero(~np.isfinite(self.losses) | ~np.all(list(self.finite.values()), axis=0)).tolist()


class BadStep(NamedTuple):
  """The first meta-iteration of a chunk whose loss or update is not finite.

  Attributes:
    step: Index of the meta-iteration, from 0.
    run: Index of the run among R runs side by side, from 0.
    loss: Loss of the meta-iteration, the mean over its tasks.
    before: State of the run before the meta-iteration; its numbers are finite.
    leaves: Names of the leaves of the meta-parameters and of the optimiser's state that the meta-iteration made
      non-finite.
  """

  step: int
  run: int
  loss: float
  before: TrainState
  leaves: list[str]


@equal_by_arguments
def skip_bad_steps(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
  """Wraps an optimiser in `optax.apply_if_finite`: a step whose gradient is not finite is skipped and counted.

  After `MOST_SKIPPED` skipped steps in a row, the next bad step is applied, so that a divergence becomes visible.

  Args:
    optimizer: Outer optimiser.
  """
  return optax.apply_if_finite(optimizer, MOST_SKIPPED)


def skipped(state: TrainState) -> np.ndarray | None:
  """Returns the number of skipped steps, `[]` or `[R]`, or `None` if the optimiser is not from `skip_bad_steps`."""
  counts = optax.tree_utils.tree_get_all_with_path(state.opt_state, 'total_notfinite')
  return np.sum([np.asarray(count) for _, count in counts], axis=0) if counts else None


def find(good: TrainState, progress: Progress, go: Callable[[TrainState, int], TrainState]) -> BadStep | None:
  """Returns the first meta-iteration of a chunk whose loss or update is not finite, or `None` if there is none.

  First the losses of the chunk and the state after the chunk are checked, because a gradient that is not finite leaves
  non-finite entries in the state. This check computes nothing on the device. If a number is not finite, a binary search
  for the first bad meta-iteration computes some meta-iterations again. Steps that `skip_bad_steps` has skipped are not
  reported.

  Args:
    good: State before the chunk; its numbers are finite.
    progress: Progress after the chunk.
    go: Function `(state, step) → state` that trains until `step` in the same way as the chunk was trained.
  """
  losses = np.atleast_2d(progress.info['loss'].T).T  # [n, R]
  first = int(np.max(good.step))

  def damage(state, done):
    """Returns `{run: names of the leaves that became non-finite}` for the runs with a bad number.

    A bad number is a loss of the first `done` steps, or an entry of the state after them, that is not finite. Losses of
    skipped steps do not count.
    """
    found = _newly_bad(good, state)
    more = np.sum(~np.isfinite(losses[:done]), axis=0)
    before, now = skipped(good), skipped(state)
    if before is not None and now is not None:
      more = more - np.atleast_1d(now - before)
    return {run: [] for run in np.flatnonzero(more > 0).tolist()} | found

  marks, low, high = damage(progress.state, len(losses)), 0, len(losses)
  if not marks:
    return None
  before = good
  while high - low > 1:
    middle = (low + high) // 2
    state = go(before, first + middle)
    found = damage(state, middle)
    if found:
      marks, high = found, middle
    else:
      before, low = state, middle
  run, leaves = min(marks.items())
  one = before if before.step.ndim == 0 else jax.tree.map(lambda leaf: leaf[run], before)
  return BadStep(first + low, run, float(losses[low, run]), one, leaves)


def inspect_step(state: TrainState, tasks: Tasks, *, learner: Learner, meta_batch: int) -> StepReport:
  """Returns a report of the meta-iteration that follows `state`, task by task. Nothing is trained.

  Args:
    state: State of one run.
    tasks: Tasks that the run is trained on.
    learner: Learner that the run trains.
    meta_batch: Number of tasks in a meta-iteration of the run.
  """
  check_key(state.key)
  keys = step_keys(state.key, state.step, meta_batch)
  tasks = tasks.prepare(lambda: (keys[0], keys[1]))
  losses, norms, finite = jax.device_get(_by_task(state.meta, tasks, tuple(keys), learner=learner))
  return StepReport(int(state.step), keys, losses, dict(named(norms)), dict(named(finite)))


@functools.partial(jax.jit, static_argnames='learner')
def _by_task(meta, tasks, keys, *, learner):
  def of_task(keys):
    sample_key, episode_key, adapt_key = keys
    episode = tasks.episode(tasks.sample(sample_key), episode_key)
    (loss, _), grads = jax.value_and_grad(learner.loss, has_aux=True)(meta, episode, adapt_key)
    norms = jax.tree.map(lambda g: jnp.sqrt(jnp.sum(jnp.square(g))), grads)
    return loss, norms, jax.tree.map(lambda g: jnp.all(jnp.isfinite(g)), grads)

  return jax.lax.map(of_task, keys)


def describe(bad: BadStep, report: StepReport | None = None) -> str:
  """Returns a sentence that says what is not finite, and in which run and meta-iteration.

  If a report is given, the sentence also says in which task, if there is one, with its key and the leaves of its
  gradient that are not finite.

  Args:
    bad: Meta-iteration that is not finite, from `find`.
    report: Report of this meta-iteration from `inspect_step`.
  """
  where = f'of run {bad.run} (from 0) is not finite at meta-iteration {bad.step} (from 0)'
  loss_is_bad = not np.isfinite(bad.loss)
  if report is None or not report.bad_tasks:
    of = f': {_some(bad.leaves)}' if bad.leaves else ''
    if loss_is_bad:
      return f'the loss {where}{of}'
    alone = '' if report is None else ', although the gradient of each task is finite'
    return f'the update {where}{alone}{of}'
  task = report.bad_tasks[0]
  others = f' and in {len(report.bad_tasks) - 1} more' if len(report.bad_tasks) > 1 else ''
  leaves = [name for name, finite in report.finite.items() if not finite[task]]
  gradient = f', gradient of {_some(leaves)}' if leaves else ''
  return (
    f'the {"loss" if loss_is_bad else "gradient"} {where}, in task {task} of {len(report.losses)} (from 0){others}: '
    f'loss {report.losses[task]:.4g}{gradient}; the task is drawn with the key {key_texts(report, task)[0]}'
  )


def key_texts(report: StepReport, task: int) -> list[str]:
  """Returns the three keys of a task as Python expressions.

  The first key samples the task, the second one draws its episode, and the third one is the key of the learner.
  """
  data = np.asarray(jax.random.key_data(report.keys[:, task])).tolist()
  impl = f'impl={str(jax.random.key_impl(report.keys))!r}'
  return [f'jax.random.wrap_key_data(jax.numpy.uint32({value}), {impl})' for value in data]


def lines(report: StepReport) -> list[str]:
  """Returns a report as lines of text: the loss and keys of each task, and the gradient norm of each leaf and task."""
  bad = report.bad_tasks
  found = [f'meta-iteration {report.step} (from 0): {len(bad)} of {len(report.losses)} tasks are not finite']
  for task, loss in enumerate(report.losses):
    mark = '  not finite' if task in bad else ''
    found.append(f'  task {task}: loss {loss:.6g}{mark}')
    names = ('task', 'episode', 'learner')
    found += [f'    key of the {name}: {text}' for name, text in zip(names, key_texts(report, task), strict=True)]
  found.append("  norms of the gradient of each task's loss (! means that the gradient is not finite):")
  width = max(map(len, report.norms))
  for name, norms in report.norms.items():
    values = [f'{norm:.4g}' + ('' if ok else '!') for norm, ok in zip(norms, report.finite[name], strict=True)]
    found.append(f'  {name:<{width}}  ' + '  '.join(f'{value:>10}' for value in values))
  return found


def _newly_bad(before: TrainState, after: TrainState) -> dict[int, list[str]]:
  """Returns `{run: names of the leaves in which a finite entry became non-finite}`. Other runs are omitted."""
  found: dict[int, list[str]] = {}
  runs = before.step.ndim
  parts = [(state.meta, state.opt_state) for state in (before, after)]
  for (name, old), (_, new) in zip(*map(named, map(jax.device_get, parts)), strict=True):
    if not jnp.issubdtype(new.dtype, jnp.inexact):
      continue
    bad = np.asarray(np.isfinite(old) & ~np.isfinite(new))
    for run in np.flatnonzero(bad.any(axis=tuple(range(runs, bad.ndim)))).tolist():
      found.setdefault(run, []).append(name)
  return found


def _some(names: list[str]) -> str:
  return names[0] + (f' and {len(names) - 1} more leaves' if len(names) > 1 else '')
