"""One training of an experiment: kept by checkpoints, gone on with, watched for bad numbers, and looked into."""

import contextlib
import dataclasses
import math
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
import optax
from absl import logging

import metasgd_jax as ms
from experiments import processes, reporting, resuming
from experiments.options import option
from experiments.reporting import TrainingError
from experiments.resuming import Keeping, Run
from metasgd_jax.io import checkpoint, provenance
from metasgd_jax.outer import bad_numbers, host_memory
from metasgd_jax.tree import named_arrays

SECONDS = 15.0
"""Between checkpoints where their number is not given."""
PROFILED = 3
"""Meta-iterations that `--profile` traces."""

Callbacks = Sequence[Callable[[ms.Progress], Any]]


class Best(Protocol):
  """A callback that returns the accuracy of states that it validates, and `None` of others."""

  keep: int

  def __call__(self, progress: ms.Progress) -> float | None:
    """Takes a chunk."""

  def resume(self, step: int, found: list[tuple[float, int, Any]]) -> None:
    """Goes on after `step` with the best (accuracy, step, meta) so far, the best first."""


@dataclasses.dataclass(frozen=True)
class Training:
  """What is trained, before it is.

  Attributes:
    name: of its directory of checkpoints.
    label: what people read, in metrics too; no other training of the run has it.
    total: meta-iterations.
    chunk: of them between callbacks; a resumed training has the same boundaries, and so the same metrics.
    start: gives the state before the first.
    go: `(state, step, callbacks) → state` trains until `step`.
    inspect: `state of one run → StepReport` of the next meta-iteration; `None` where there is no such view.
    memory: plans what one run of it takes; `None` where there is no such plan.
  """

  name: str
  label: str
  total: int
  chunk: int
  start: Callable[[], ms.TrainState]
  go: Callable[[ms.TrainState, int, Callbacks], ms.TrainState]
  inspect: Callable[[ms.TrainState], bad_numbers.StepReport] | None = None
  memory: Callable[[], ms.MemoryPlan] | None = None


class Trained(NamedTuple):
  """The last state, and the curves over meta-iterations, `{name: (steps [n], values [n, R])}`."""

  state: ms.TrainState
  curves: dict[str, tuple[np.ndarray, np.ndarray]]

  @property
  def skipped(self) -> dict[str, Any]:
    """Returns how many steps were skipped, for a row of results; nothing where none can be."""
    count = bad_numbers.skipped(self.state)
    return {} if count is None else {'skipped_steps': count}


def by_gradient(
  name: str, label: str, start: Callable[[], ms.TrainState], tasks: Any, *, learner: ms.Learner,
  optimizer: optax.GradientTransformation, meta_iterations: int, meta_batch: int, chunk: int, **options: Any,
) -> Training:  # fmt: skip
  """Returns a training by `ms.train`, whose arguments these are."""

  def go(state, step, callbacks=()):
    if step == np.max(state.step):
      return state
    return ms.train(
      state, tasks, learner=learner, optimizer=optimizer, meta_iterations=step, meta_batch=meta_batch, chunk=chunk,
      callbacks=callbacks, **options,
    )  # fmt: skip

  def inspect(state):
    return bad_numbers.inspect_step(state, tasks, learner=learner, meta_batch=meta_batch)

  def memory():
    return ms.plan_memory(tasks, learner=learner, optimizer=optimizer, meta_batch=meta_batch, **options)

  return Training(name, label, meta_iterations, chunk, start, go, inspect, memory)


def bad_steps_option() -> Any:
  """Returns the field `bad_steps` of a configuration, which `optimizer_of` goes by."""
  return option(
    'stop', 'Where a loss or a gradient is not finite: stop, or skip the step and count it, up to 10 in a row.',
    choices=('stop', 'skip'),
  )  # fmt: skip


def optimizer_of(config: Any, optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
  """Returns the optimiser with a guard where `config.bad_steps` says that bad steps are skipped."""
  return bad_numbers.skip_bad_steps(optimizer) if config.bad_steps == 'skip' else optimizer


def train(training: Training, run: Run, best: Best | None = None) -> Trained:
  """Trains, from the newest checkpoint if there is one; saves as it goes, at the end, and when it is told to stop.

  Of several processes the first reads and saves; each is told to stop by itself or by another, after the same chunk.

  Raises:
    TrainingError: a loss or a gradient is not finite; the state before the chunk is saved.
    CheckpointError: a checkpoint cannot be used or written.
  """
  with run.stop.held():
    state = training.start()
    with contextlib.ExitStack() as opened:
      with processes.together():
        kept = opened.enter_context(_checkpoints(training, run, state, best))
        state, history, found = _resume(training, run, kept, state)
        recorder = reporting.Recorder(training.label, run.metrics, history)
      state = processes.from_first(state)
      if best is not None:
        best.resume(int(np.max(state.step)), _best_of_first(found, state))
      good, saved = state, time.monotonic()
      profiled: list[pathlib.Path] = []

      def after(progress: ms.Progress) -> None:
        nonlocal good, saved
        bad = bad_numbers.find(good, progress, lambda state, step: training.go(state, step, ()))
        if bad is not None:
          kept.save(good)
          kept.wait()
          raise TrainingError(_what_is_bad(training, bad, run, kept.last))
        if good is state:  # After the first chunk, and so after compiling.
          host_memory.release_freed()
        if run.keeping.profile and not profiled:
          profiled.append(profile(training, good, run.workdir))
        good = progress.state
        recorder(progress)
        accuracy = None if best is None else best(progress)
        stop = processes.any_of(run.stop.asked)
        every = run.keeping.checkpoint_every
        due = progress.step // every > max(kept.last, 0) // every if every else time.monotonic() - saved >= SECONDS
        if due or accuracy is not None or stop or progress.step == progress.total:
          run.file.sync()
          kept.save(good, accuracy)
          saved = time.monotonic()
        if stop:
          kept.wait()
          run.stop.leave(
            f'{training.label} is saved at meta-iteration {progress.step:,} of {progress.total:,} in {run.workdir}'
          )

      state = training.go(state, training.total, [after])
  return Trained(state, recorder.curves)


def profile(training: Training, state: ms.TrainState, workdir: pathlib.Path) -> pathlib.Path:
  """Traces a few meta-iterations from a state, whose results are dropped; the first process says where the trace is.

  They are taken once before, so that all is compiled.

  Returns:
    The directory: WORKDIR/profile/NAME, with a file for TensorBoard's profiler and one for Perfetto.
  """
  directory = workdir / 'profile' / training.name
  step = min(training.total, int(np.max(state.step)) + PROFILED)
  jax.block_until_ready(training.go(state, step, ()))
  with jax.profiler.trace(directory, create_perfetto_trace=True):
    jax.block_until_ready(training.go(state, step, ()))
  traces = sorted(directory.rglob('perfetto_trace.json.gz'))  # Those of earlier runs are in folders of earlier dates.
  if not processes.first():
    return directory
  if not traces:
    logging.warning('%s: the profiler wrote no trace to %s', training.label, directory)
    return directory
  logging.info(
    '%s: a trace of %d meta-iterations is in %s; open it at https://ui.perfetto.dev, or, after pip install xprof, with '
    'xprof --logdir=%s', training.label, step - int(np.max(state.step)), traces[-1], directory,
  )  # fmt: skip
  return directory


class _Unkept:
  """Takes the place of checkpoints in all processes but the first."""

  latest, best, last = None, (), -1

  def save(self, state: ms.TrainState, metric: float | None = None) -> None:
    """Notes what the first saves."""
    self.last = int(np.max(state.step))

  def wait(self) -> None:
    """Waits for nothing."""


def _checkpoints(training: Training, run: Run, state, best: Best | None) -> contextlib.AbstractContextManager[Any]:
  if not processes.first():
    return contextlib.nullcontext(_Unkept())
  return checkpoint.Checkpoints(
    run.directory(training.name), like=state, config=run.config, keep_best=0 if best is None else best.keep
  )


def _resume(training: Training, run: Run, kept, state):
  """Returns the state to go on from, the lines of metrics up to there, and the best checkpoints."""
  found = kept.latest
  history = run.file.cut(training.label, 0 if found is None else found.step)
  if found is None:
    return state, history, []
  done = [line['step'] for line in history if 'loss' in line]
  if found.step and (not done or done[-1] != found.step):
    raise checkpoint.CheckpointError(
      f'{run.workdir / "metrics.jsonl"} has lost lines of {training.label} before meta-iteration {found.step}; give '
      '--restart to begin anew'
    )
  at = 'is trained already' if found.step == training.total else f'goes on from meta-iteration {found.step:,}'
  print(f'{training.label}: {at}', flush=True)
  now = provenance.collect()['versions']
  changed = [f'{k} {v} → {now.get(k, "none")}' for k, v in found.versions.items() if now.get(k) != v]
  if changed:
    print(f'{training.label}: versions have changed ({", ".join(changed)}), so the rest may differ in its last digits')
  return found.state, history, [(float(c.metric or 0), c.step, jax.device_get(c.state.meta)) for c in kept.best]


def _best_of_first(found: list[tuple[float, int, Any]], state) -> list[tuple[float, int, Any]]:
  """Returns the best checkpoints of the first process in all."""
  count = int(processes.from_first(np.int32(len(found))))
  shapes = jax.device_get(state.meta)
  best = [processes.from_first(b) for b in found or [(0.0, 0, shapes)] * count]
  return [(float(accuracy), int(step), meta) for accuracy, step, meta in best]


def _what_is_bad(training: Training, bad: bad_numbers.BadStep, run: Run, saved: int) -> str:
  report = None if training.inspect is None else training.inspect(bad.before)
  said = f'{training.label}: {bad_numbers.describe(bad, report)}'
  if not processes.first():
    return f'{said}; the first process says where the state before is saved, and what to do'
  return (
    f'{said}; the state of meta-iteration {saved} is saved in {run.directory(training.name)}; '
    f'--debug_task={bad.step} shows the step; lower --alpha, --learning_rate or --inner_steps with --restart, or skip '
    'such steps with --restart --bad_steps=skip'
  )


def look(plan: Sequence[Training], config: Any, workdir: pathlib.Path, keeping: Keeping) -> Callable[[], None] | None:
  """Returns what `--plan`, `--debug_task` or `--check_determinism` ask for instead of a run; `None` without them.

  Raises:
    ValueError: more than one, a meta-iteration that there is not, nothing to train, or debug_task of several processes.
  """
  asked = {'plan': keeping.plan, 'debug_task': keeping.debug_task is not None}
  asked['check_determinism'] = keeping.check_determinism
  if not any(asked.values()):
    return None
  if sum(asked.values()) > 1:
    raise ValueError(f'{" and ".join(name for name in asked if asked[name])} are two commands; give one')
  if not plan:
    raise ValueError('there is nothing to look into: what is asked for is not trained')
  if keeping.plan:
    return lambda: print_memory(plan)
  if keeping.check_determinism:
    return lambda: check_determinism(plan)
  if jax.process_count() > 1:
    raise ValueError('debug_task reads the checkpoints, which the first process has; give it without --coordinator')
  step = keeping.debug_task
  if step >= plan[0].total:  # type: ignore[operator]
    raise ValueError(f'debug_task must be less than meta_iterations={plan[0].total}, got {step}; they count from 0')
  return lambda: debug(plan, config, workdir, step)  # type: ignore[arg-type]


def print_memory(plan: Sequence[Training]) -> None:
  """Prints what memory each training will take: of several runs side by side, that of one, and says so."""
  for training in plan:
    if training.memory is None:
      print(f'{training.label}: its memory cannot be planned', flush=True)
      continue
    print(f'{training.label}: {training.memory()}', flush=True)
    runs = math.prod(jax.eval_shape(training.start).step.shape)
    if runs > 1:
      print(f'this is of one run; {runs} are trained side by side and take about {runs} times as much', flush=True)


def debug(plan: Sequence[Training], config: Any, workdir: pathlib.Path, step: int) -> None:
  """Replays a meta-iteration, of the last training with checkpoints or else the first, and prints its tasks.

  From the newest checkpoint not past it, or from the beginning; the work directory is left as it is.

  Raises:
    CheckpointError: the directory holds a run of another configuration.
    TrainingError: the training cannot be looked into.
  """
  resuming.check(workdir, config)
  there = resuming.trainings(workdir)
  training = next((t for t in reversed(plan) if t.name in there), plan[0])
  if training.inspect is None:
    raise TrainingError(f'{training.label}: its meta-iterations cannot be shown task by task')
  state = training.start()
  found = checkpoint.newest(
    workdir / 'checkpoints' / training.name, like=state, config=dataclasses.asdict(config), until=step
  )
  state = state if found is None else found.state
  print(f'{training.label}: meta-iteration {step:,} (from 0), replayed from {int(np.max(state.step)):,}', flush=True)
  state = training.go(state, step, ())
  runs = [state] if state.step.ndim == 0 else [reporting.one_run(state, r) for r in range(len(state.step))]
  for r, one in enumerate(runs):
    if len(runs) > 1:
      print(f'run {r} (from 0)')
    print('\n'.join(bad_numbers.lines(training.inspect(one))), flush=True)


def check_determinism(plan: Sequence[Training]) -> None:
  """Takes each training's first two chunks twice, compiled anew, and prints whether all is equal to the bit.

  Raises:
    SystemExit: with 1, if it is not.
  """
  differ = False
  for training in plan:
    step = min(training.total, 2 * training.chunk)
    first, second = _beginning(training, step), _beginning(training, step)
    different = [name for name in first if first[name].tobytes() != second[name].tobytes()]
    differ |= bool(different)
    verdict = 'is the same to the bit'
    if different:
      verdict = f'differs in {different[0]} and {len(different) - 1} more arrays'
    print(f'{training.label}: the beginning, {step:,} meta-iterations, taken twice, {verdict}', flush=True)
  if differ:
    sys.exit(1)


def _beginning(training: Training, step: int) -> dict[str, np.ndarray]:
  """Returns the state and all that was reported, by name, of a training until `step`, compiled anew."""
  jax.clear_caches()
  cache = getattr(jax.config, 'jax_enable_compilation_cache', True)  # jax.config has no types.
  jax.config.update('jax_enable_compilation_cache', False)
  try:
    infos: list[dict[str, np.ndarray]] = []
    state = training.go(training.start(), step, [lambda progress: infos.append(progress.info)])
  finally:
    jax.config.update('jax_enable_compilation_cache', cache)
  return named_arrays({'state': state, 'reported': infos})
