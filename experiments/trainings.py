"""Runs one training of an experiment: resumes it, saves it, and stops it at numbers that are not finite."""

import contextlib
import dataclasses
import pathlib
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from absl import logging

import metasgd_jax as ms
from experiments import jobs, processes, replacing, reporting, resuming
from experiments.options import option
from experiments.reporting import TrainingError
from experiments.resuming import Keeping, Run
from metasgd_jax.io import checkpoint, files
from metasgd_jax.outer import bad_numbers

SECONDS = 15.0
"""Seconds between checkpoints if `checkpoint_every` is 0."""
PROFILED = 3
"""Number of meta-iterations that `--profile` traces."""

Callbacks = Sequence[Callable[[ms.Progress], Any]]
Curves = dict[str, tuple[np.ndarray, np.ndarray]]
"""Metrics over the meta-iterations, `{name: (steps [n], values [n, R])}`."""


class Best:
  """Callback of `ms.train` that validates the train state, and keeps the checkpoints with the best accuracies.

  `found` is the list of the kept checkpoints, each as (accuracy, step, meta). The best one is the first.
  """

  def __init__(self, judge: Callable[[int, Any], float], every: int, keep: int):
    """Starts with no checkpoints.

    Args:
      judge: Function `(step, meta) → accuracy`.
      every: Number of meta-iterations between validations, a multiple of the number in a chunk. The last state is also
        validated.
      keep: Number of checkpoints to keep.
    """
    self.judge, self.every, self.keep = judge, every, keep
    self.found: list[tuple[float, int, Any]] = []

  def __call__(self, progress: ms.Progress) -> float | None:
    """Validates the state after a chunk, if a validation is due, and returns the accuracy. Else it returns `None`."""
    if progress.step % self.every and progress.step < progress.total:
      return None
    meta = jax.device_get(progress.state.meta)
    accuracy = self.judge(progress.step, meta)
    found = [*self.found, (accuracy, progress.step, meta)]
    self.found = sorted(found, key=lambda one: checkpoint.rank(*one[:2]), reverse=True)[: self.keep]
    return accuracy


@dataclasses.dataclass(frozen=True)
class Training:
  """A training before it is run.

  Attributes:
    name: Name of the training's directory of checkpoints.
    label: Name of the training in printed text and in metrics. Each training of a run has a different label.
    total: Number of meta-iterations.
    chunk: Number of meta-iterations between callbacks. A training that is stopped and resumed has the same chunks as
      one that is not, and therefore the same metrics.
    start: Function that returns the state before the first meta-iteration.
    go: Function `(state, step, callbacks) → state` that trains until `step`.
    inspect: Function that takes the state of one run and returns the `StepReport` of the next meta-iteration. It is
      `None` if the training cannot be inspected.
    memory: Function that plans the memory of one run, or `None` if the memory cannot be planned.
    best: Function from the run to the callback that validates states, or `None` if no state is validated.
    watch: Function from the curves so far to a warning, or to `None` if nothing is wrong. A warning is printed once.
    test: Function from the last state of one run to its values on unseen tasks, `[T, k + 1]`, or `None` if the run is
      tested elsewhere. A training that has a process of its own is tested in this process.
  """

  name: str
  label: str
  total: int
  chunk: int
  start: Callable[[], ms.TrainState]
  go: Callable[[ms.TrainState, int, Callbacks], ms.TrainState]
  inspect: Callable[[ms.TrainState], bad_numbers.StepReport] | None = None
  memory: Callable[[], ms.MemoryPlan] | None = None
  best: Callable[[Run], Best] | None = None
  watch: Callable[[Curves], str | None] | None = None
  test: Callable[[ms.TrainState], np.ndarray] | None = None


class Trained(NamedTuple):
  """The result of a training.

  Attributes:
    state: State after the last meta-iteration.
    curves: Metrics over the meta-iterations; see `Curves`.
    best: Meta-parameters of the best states, the best one first, if states were validated.
    values: Result of `Training.test`.
  """

  state: ms.TrainState
  curves: Curves
  best: Sequence[Any] = ()
  values: np.ndarray | None = None

  @property
  def skipped(self) -> dict[str, Any]:
    """Returns `{'skipped_steps': number of skipped steps}`, which becomes a part of a row of results.

    The dict is empty if the optimiser is not from `skip_bad_steps`, because then no step can be skipped.
    """
    count = bad_numbers.skipped(self.state)
    return {} if count is None else {'skipped_steps': count}


def by_gradient(
  name: str, label: str, start: Callable[[], ms.TrainState], tasks: Any, *, meta_iterations: int, chunk: int, **options
) -> Training:
  """Returns a `Training` that calls `ms.train` with `options`, such as the learner and the optimiser."""

  def go(state, step, callbacks=()):
    if step == np.max(state.step):
      return state
    return ms.train(state, tasks, meta_iterations=step, chunk=chunk, callbacks=callbacks, progress=False, **options)

  def inspect(state):
    return bad_numbers.inspect_step(state, tasks, learner=options['learner'], meta_batch=options['meta_batch'])

  def memory():
    return ms.plan_memory(tasks, **options)

  return Training(name, label, meta_iterations, chunk, start, go, inspect, memory)


def bad_steps_option() -> Any:
  """Returns a dataclass field for the option `bad_steps`, which a configuration declares and `optimizer_of` reads."""
  about = 'If a loss or a gradient is not finite: stop, or skip the step and count it, up to 10 in a row.'
  return option('stop', about, choices=('stop', 'skip'))


def optimizer_of(config: Any, optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
  """Returns the optimiser, wrapped in `skip_bad_steps` if `config.bad_steps` is 'skip'."""
  return bad_numbers.skip_bad_steps(optimizer) if config.bad_steps == 'skip' else optimizer


def train(training: Training, run: Run) -> Trained:
  """Continues from the newest checkpoint, if there is one, and trains and saves checkpoints until the end or a signal.

  If there are several processes, only the first process reads and saves the checkpoints. After a signal, all processes
  finish the same chunk of meta-iterations and then stop.

  Raises:
    TrainingError: if a loss or a gradient is not finite. The state before the chunk in which this happens is saved,
      unless it would be the first checkpoint of a run that replaces an earlier one.
    CheckpointError: if a checkpoint cannot be used or written.
  """
  logging.info('%s: compiling', training.label)
  best = None if training.best is None else training.best(run)
  with contextlib.ExitStack() as opened:
    opened.enter_context(warnings.catch_warnings())
    warnings.filterwarnings('ignore', 'the loss is not finite', RuntimeWarning)  # `_AfterChunk` reports more.
    if processes.any_of(not run.begun):  # Earlier files stay until one meta-iteration has worked.
      jax.block_until_ready(training.go(training.start(), 1, ()))
    run.idle = False
    state = training.start()
    with processes.together():
      run.begin()
      jobs.adopt(training.name, training.label, run)
      kept = None
      if processes.first():
        how: Any = dict(like=state, config=run.config, keep_best=0 if best is None else best.keep)
        kept = opened.enter_context(checkpoint.Checkpoints(run.checkpoints(training.name), **how))
      recorder, state = _resume(training, run, kept, state)
      opened.callback(recorder.close)
    state = processes.from_first(state)
    if best is not None:
      best.found = _best_so_far(kept, state)
    after_chunk = _AfterChunk(training, run, kept, recorder, best, state)
    state = training.go(state, training.total, [after_chunk])
  run.idle = True
  run.ask()
  values = None if training.test is None else _tested(training.name, training.test, run, state)
  return Trained(state, recorder.curves, [] if best is None else [meta for _, _, meta in best.found], values)


def _tested(name: str, test: Callable[[ms.TrainState], np.ndarray], run: Run, state: ms.TrainState) -> np.ndarray:
  """Returns the values of a test, which is done once. Then they are in the file `resuming.tested_file`."""
  path = run.path(resuming.tested_file(name))
  if processes.any_of(not path.exists()):
    values = test(state)
    if processes.first():
      files.write_array(path, values)
    return values
  return np.load(path, allow_pickle=False)


def _resume(training: Training, run: Run, kept: checkpoint.Checkpoints | None, state: ms.TrainState):
  """Returns `(recorder, state)` of the newest checkpoint: the recorder has the metrics up to it."""
  found = None if kept is None else kept.latest
  history = run.metrics[0].cut(training.label, 0 if found is None else found.step)
  if found is None:
    return reporting.Recorder(training.label, run.metrics), state
  if found.step and found.step not in [line['step'] for line in history if 'loss' in line]:
    lost = f'has lost lines of {training.label} before meta-iteration {found.step}'
    advice = f'remove {run.workdir / "checkpoints"}' if run.cell else 'give --restart'
    raise checkpoint.CheckpointError(f'{run.workdir / "metrics.jsonl"} {lost}; {advice} to begin anew')
  at = 'is trained already' if found.step == training.total else f'goes on from meta-iteration {found.step:,}'
  print(f'{training.label}: {at}', flush=True)
  changed = resuming.changed_versions(found.versions)
  if changed:
    print(f'{training.label}: versions have changed ({changed}), so the results may differ in the last digits')
  return reporting.Recorder(training.label, run.metrics, history), found.state


def _best_so_far(kept: checkpoint.Checkpoints | None, state: ms.TrainState) -> list[tuple[float, int, Any]]:
  """Returns `(accuracy, step, meta)` of each best checkpoint. All processes get the list of the first process."""
  found = [] if kept is None else kept.best
  ranks = processes.json_from_first([(c.metric, c.step) for c in found])
  metas = [jax.device_get(c.state.meta) for c in found] or [jax.device_get(state.meta)] * len(ranks)
  return [(accuracy, step, processes.from_first(meta)) for (accuracy, step), meta in zip(ranks, metas, strict=True)]


@dataclasses.dataclass
class _AfterChunk:
  """A callback of `ms.train` that checks, records and saves each chunk.

  Attributes:
    training: The training.
    run: The run that the training is part of.
    kept: Checkpoints of the training in the first process, and `None` in the other processes.
    recorder: Receives the metrics.
    best: Callback that validates states, or `None` if no state is validated.
    good: The last state whose numbers are known to be finite.
    saved: Time of the last checkpoint.
    first: Whether the next chunk is the first one since the training was started or resumed.
    warned: Whether the warning of `training.watch` has been printed.
  """

  training: Training
  run: Run
  kept: checkpoint.Checkpoints | None
  recorder: reporting.Recorder
  best: Best | None
  good: ms.TrainState
  saved: float = dataclasses.field(default_factory=time.monotonic)
  first: bool = True
  warned: bool = False

  def __call__(self, progress: ms.Progress) -> None:
    """Checks, records and saves the chunk that has just been trained."""
    self.stop_at_bad_numbers(progress)
    if self.first and self.run.keeping.profile:
      profile(self.training, self.good, self.run.path('profile'))
    self.first = False
    self.good = progress.state
    self.recorder(progress)
    self.warn()
    accuracy = None if self.best is None else self.best(progress)
    stop = processes.any_of(self.run.asked > 0)
    if self.kept is not None and (stop or accuracy is not None or self.is_due(progress, self.kept.last)):
      self.run.metrics[0].sync()
      self.kept.save(self.good, accuracy)
      self.saved = time.monotonic()
      if replacing.is_pending(self.run.workdir):
        self.kept.wait()
        self.run.keep()
    if stop:
      if self.kept is not None:
        self.kept.wait()
      at = f'meta-iteration {progress.step:,} of {progress.total:,}'
      self.run.leave(f'{self.training.label} is saved at {at} in {self.run.workdir}')

  def warn(self) -> None:
    """Prints the warning of `training.watch`, if there is one and it has not been printed."""
    if self.training.watch and not self.warned and (said := self.training.watch(self.recorder.curves)):
      print(f'{reporting.WARNING}{self.training.label}: {said}', flush=True)
      self.warned = True

  def stop_at_bad_numbers(self, progress: ms.Progress) -> None:
    """Raises TrainingError if a number of the chunk is not finite.

    Before that, it saves a checkpoint of the last good state, which is the state that preceded the chunk. If there is
    no checkpoint yet and the run would replace an earlier one, nothing is saved.
    """
    bad = bad_numbers.find(self.good, progress, lambda state, step: self.training.go(state, step, ()))
    if bad is None:
      return
    report = None if self.training.inspect is None else self.training.inspect(bad.before)
    said = f'{self.training.label}: {bad_numbers.describe(bad, report)}'
    if self.kept is None:
      raise TrainingError(
        f'{said}; the output of the first process says what to do, and where the state before this chunk is saved'
      )
    if replacing.is_pending(self.run.workdir):
      saved = 'nothing is saved, and the earlier run is unchanged'
    else:
      self.kept.save(self.good)
      self.kept.wait()
      directory = resuming.checkpoints_of(self.run.workdir, self.training.name)
      saved = f'the state of meta-iteration {self.kept.last} is saved in {directory}'
    if self.training.inspect is None:  # TRPO has neither a learning rate nor steps that are skipped.
      raise TrainingError(f'{said}; {saved}; lower --alpha or --inner_steps with --restart')
    lower = 'lower --alpha, --learning_rate or --inner_steps with --restart'
    skip = 'skip such steps with --restart --bad_steps=skip'
    only = f'--only={self.training.name} --debug_task={bad.step}'
    raise TrainingError(f'{said}; {saved}; {only} shows the tasks of meta-iteration {bad.step}; {lower}, or {skip}')

  def is_due(self, progress: ms.Progress, last: int) -> bool:
    """Returns whether a checkpoint is due now. The newest checkpoint is that of meta-iteration `last`."""
    every = self.run.keeping.checkpoint_every
    waited = progress.step // every > max(last, 0) // every if every else time.monotonic() - self.saved >= SECONDS
    return waited or progress.step == progress.total


def profile(training: Training, state: ms.TrainState, profiles: pathlib.Path) -> pathlib.Path:
  """Profiles a few meta-iterations from `state` with JAX's profiler, and logs where the trace is.

  The new states of these meta-iterations are discarded.

  Returns:
    The directory of the trace, with a file for TensorBoard's profiler and one for Perfetto.
  """
  directory = profiles / training.name
  before = int(np.max(state.step))
  step = min(training.total, before + PROFILED)
  jax.block_until_ready(training.go(state, step, ()))  # Compiles before the trace begins.
  with jax.profiler.trace(directory, create_perfetto_trace=True):
    jax.block_until_ready(training.go(state, step, ()))
  traces = sorted(directory.rglob('perfetto_trace.json.gz'))  # Earlier traces are in folders with earlier dates.
  if processes.first() and traces:
    how = f'open it at https://ui.perfetto.dev, or, after pip install xprof, with xprof --logdir={directory}'
    logging.info('%s: a trace of %d meta-iterations is in %s; %s', training.label, step - before, traces[-1], how)
  elif processes.first():
    logging.warning('%s: the profiler wrote no trace to %s', training.label, directory)
  return directory


def named(name: str, plan: Sequence[Training]) -> Training:
  """Returns the training of this name. Raises ValueError if the plan has none."""
  names = [training.name for training in plan]
  if name not in names:
    raise ValueError(f'--only must be one of {", ".join(names) or "no trainings"}, got {name!r}')
  return plan[names.index(name)]


def train_only(training: Training, config: Any, workdir: pathlib.Path, keeping: Keeping) -> None:
  """Trains a single training of a run. Its checkpoints stay, and the run is not finished.

  If the run in the directory is finished already, nothing is done.
  """
  with resuming.open_run(workdir, config, keeping) as opened:
    if opened.rows is None:
      train(training, opened)
