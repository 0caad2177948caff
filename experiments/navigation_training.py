"""The trainings of navigation: the inner loop, the outer optimisers, and a watch for runs that run away."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, cast

import jax
import numpy as np
import optax

import metasgd_jax as ms
from experiments import reporting, running, trainings
from experiments.navigation_table import label, updates
from experiments.trainings import Curves, Training
from metasgd_jax import rl
from metasgd_jax.outer import evaluation
from metasgd_jax.rl.learner import explorer
from metasgd_jax.rl.meta_step import check_curvature

STARTS = ('fixed', 'varying')
CURVED = 4
"""Number of tasks from which TRPO computes the Fisher matrix, unless there are fewer."""
ADAM_B2 = 0.99
"""Decay of Adam's mean of squared gradients. With optax's 0.999, the mean hardly forgets within a training."""
RUNAWAY = 50.0
"""A run has run away if its mean return is lower than its best one by this number: policies leave the square."""
WATCHED = 50
"""Smallest number of tasks whose mean return shows whether a run has run away."""
TESTED_AT_ONCE = 640
"""Number of trajectories that a test samples at the same time, unless those of a single task are more."""

CellKey = tuple[str, str, str]
"""The start, the learner and the outer optimiser of a cell."""


def build_environments() -> dict[str, rl.Environment]:
  """Returns `{start: environment}`, with one environment for each of the task sets 'fixed' and 'varying'."""
  return {start: rl.navigation(cast(Any, start)) for start in STARTS}


def build_inner(environment: rl.Environment, cell: Any, steps: int | None = None) -> rl.PolicyGradient:
  """Returns the inner loop of a learner, with a policy of layer sizes 2-100-100-2, as in the paper.

  MAML and Meta-SGD differ only in α. `steps` is the number of updates, `cell.inner_steps` by default. The updates
  beyond `cell.inner_steps` have one rate for all parameters, `cell.later_rate`.
  """
  (learner,), (optimizer,), steps = cell.learner, cell.optimizer, steps or cell.inner_steps
  how: dict[str, Any] = running.settings(cell, 'trajectories', 'estimator')
  how['alpha'] = cell.alpha if learner == 'maml' else ms.AlphaConfig(cell.alpha, cell.alpha)
  how['advantage'] = dataclasses.replace(rl.MAML_ADVANTAGES, discount=cell.discount, decay=cell.decay)
  how['mean_over'] = 'trajectory' if optimizer == 'adam' else 'step'
  policy = rl.gaussian(environment.observation_size, environment.action_size)
  inner = rl.policy_gradient(environment, policy, steps=steps, **how)
  if steps <= cell.inner_steps:
    return inner
  return _then(inner, cell.inner_steps, rl.policy_gradient(environment, policy, **how | {'alpha': cell.later_rate}))


def _then(inner: rl.PolicyGradient, first: int, later: rl.PolicyGradient) -> rl.PolicyGradient:
  """Returns `inner`, whose steps from number `first` on are replaced by the first step of `later`, which is MAML."""

  def step(meta, theta, experience, i):
    if i < first:
      return inner.step(meta, theta, experience, i)
    return later.step(ms.MetaParams(theta, None), theta, experience, 0)

  def replay(meta, experiences):
    theta = meta.theta
    for i, experience in enumerate(experiences):
      theta = step(meta, theta, experience, i)
    return theta

  return inner._replace(step=step, explore=explorer(inner.experience, step, inner.steps), replay=replay)


def plan(config: Any, environments: dict[str, rl.Environment], devices: int | None = None) -> list[list[Training]]:
  """Returns the trainings of `config.cells`, before anything is trained: for each cell the list of its R runs.

  Args:
    config: Configuration of the experiment.
    environments: Environments of both task sets, from `build_environments`.
    devices: Number of devices of each process; `None` uses all that can share the tasks evenly.

  Raises:
    ValueError: if the devices cannot evenly share the tasks of a meta-iteration, or the tasks from which TRPO computes
      the curvature.
  """
  return [_runs(cell, environments[cell.start[0]], devices) for cell in config.cells]


def _runs(cell: Any, environment: rl.Environment, devices: int | None) -> list[Training]:
  build = (_by_adam if cell.optimizer == ('adam',) else _by_trpo)(cell, environment, devices)
  called, keys = label(*key(cell)), reporting.seed_keys(cell.seed, cell.seeds)
  labels = [called] if cell.seeds == 1 else [f'{called}, run {r + 1} of {cell.seeds}' for r in range(cell.seeds)]
  runs = [build(f'{file_name(*key(cell))}_run{r}', labels[r], keys[r]) for r in range(cell.seeds)]
  learner = rl.policy_learner(build_inner(environment, cell, steps=cell.eval_updates))
  test = functools.partial(_test, learner, rl.task_distribution(environment), cell, devices)
  watch = functools.partial(runs_away, cell.meta_iterations, runs[0].chunk * cell.meta_batch)
  return [dataclasses.replace(run, watch=watch, test=test) for run in runs]


def _test(learner: ms.Learner, tasks: Any, cell: Any, devices: int | None, state: ms.TrainState) -> np.ndarray:
  """Returns the mean returns on each unseen task after 0, 1, …, k updates, `[T, k + 1]`."""
  at_once = max(1, min(evaluation.AT_ONCE, TESTED_AT_ONCE // cell.trajectories))
  return running.evaluate(learner, [state.meta], tasks, cell, devices, at_once, metric_fn=rl.mean_return)[0]


def _by_adam(cell: Any, environment: rl.Environment, devices: int | None) -> Callable[..., Training]:
  """Returns a function from the name, the label and the key of a run to its training. All runs share one program."""
  mesh, tasks = ms.sharding.task_mesh(cell.meta_batch, devices=devices), rl.task_distribution(environment)
  learner = rl.policy_learner(build_inner(environment, cell))
  optimizer = trainings.optimizer_of(cell, _adam(cell))
  how: dict[str, Any] = dict(learner=learner, optimizer=optimizer, placement=_placement(mesh))

  def build(name, label, key):
    return running.by_gradient(cell, name, label, key, tasks, chunk=running.chunk(cell, 5), **how)

  return build


def _by_trpo(cell: Any, environment: rl.Environment, devices: int | None) -> Callable[..., Training]:
  """Returns a function as `_by_adam` does."""
  inner, batch, chunk = build_inner(environment, cell), cell.meta_batch, running.chunk(cell, 5)
  curved = cell.curvature_tasks or min(CURVED, batch)
  mesh = ms.sharding.task_mesh(batch if devices else math.gcd(batch, curved), devices=devices)
  check_curvature(mesh, curved)
  trpo = rl.TrpoConfig(max_kl=cell.max_kl, damping=cell.damping)
  train = functools.partial(rl.train, inner=inner, meta_batch=batch, curvature_tasks=curved, trpo=trpo, chunk=chunk)

  def go(state, step, callbacks):
    placement = ms.Placement(mesh=mesh)
    return train(state, meta_iterations=step, placement=placement, callbacks=callbacks, progress=False)

  def build(name, label, key):
    start = functools.partial(rl.init, key, inner)
    return Training(name, label, cell.meta_iterations, chunk, start, go)

  return build


def runs_away(total: int, tasks: int, curves: Curves) -> str | None:
  """Returns a warning if the mean return is much lower than the best one so far, which no loss shows.

  The means are over chunks in succession that have at least `WATCHED` tasks, because fewer tasks have such returns by
  chance.

  Args:
    total: Number of meta-iterations of the training.
    tasks: Number of tasks in a chunk.
    curves: Metrics of the chunks so far.
  """
  steps, returns = curves['return_after']
  chunks = -(-WATCHED // tasks)
  if len(steps) < chunks:
    return None
  means = np.convolve(np.mean(returns, 1), np.full(chunks, 1 / chunks), 'valid')
  now, best = means[-1], np.max(means)
  if now > best - RUNAWAY:
    return None
  stop = 'stop the program, and ' if steps[-1] < total else ''
  return (
    f'the run runs away: the mean return after the update is {now:.0f} at meta-iteration {steps[-1]:,}, and was '
    f'{best:.0f}; {stop}train with --restart and lower rates, or with a higher --decay'
  )


def is_not_finite(values: np.ndarray, cell: Any) -> str | None:
  """Returns a warning if there are returns of the test that are not finite.

  Args:
    values: Mean returns of R runs on T tasks after 0, 1, …, k updates, `[R, T, k + 1]`.
    cell: Configuration of the runs.
  """
  bad = ~np.isfinite(values).all(0)
  if not bad.any():
    return None
  count = int(np.argmax(bad.any(0)))
  rates = '--later_rate or --eval_updates' if count > cell.inner_steps else '--alpha or --learning_rate'
  said = f'after {updates(count)} the return is not finite on {bad[:, count].sum()} of {len(bad)} tasks of the test'
  return f'{said}; lower {rates} with --restart'


def _adam(cell: Any) -> optax.GradientTransformation:
  """Returns Adam with a rate for θ and another for α, which both fall to zero along a cosine."""

  def adam(rate):
    return optax.adam(optax.cosine_decay_schedule(rate, cell.meta_iterations), b2=ADAM_B2)

  def parts(meta: ms.MetaParams):
    return ms.MetaParams(jax.tree.map(lambda _: 'theta', meta.theta), jax.tree.map(lambda _: 'alpha', meta.alpha))

  rates = {'theta': adam(cell.learning_rate), 'alpha': adam(cell.alpha_learning_rate)}
  return optax.chain(optax.clip_by_global_norm(cell.clip), optax.partition(rates, parts))


def _placement(mesh) -> ms.Placement:
  """Returns the placement of tasks. A core of a CPU is fastest with one task at a time."""
  return ms.Placement(1 if jax.default_backend() == 'cpu' else 'all', mesh)


def key(cell: Any) -> CellKey:
  """Returns the start, the learner and the outer optimiser of a cell."""
  return cell.start[0], cell.learner[0], cell.optimizer[0]


def file_name(start: str, learner: str, optimizer: str) -> str:
  """Returns the name of a training in the names of files."""
  return f'{learner}_{start}' + ('' if optimizer == 'adam' else f'_{optimizer}')
