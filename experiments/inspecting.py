"""Shows what a run would train, or replays a meta-iteration of it, instead of training: --plan and --debug_task."""

import functools
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging

from experiments import replacing, reporting, resuming
from experiments.reporting import TrainingError
from experiments.resuming import Keeping
from experiments.trainings import Training
from metasgd_jax.io import checkpoint
from metasgd_jax.outer import bad_numbers


def look(plan: Sequence[Training], config: Any, workdir: pathlib.Path, keeping: Keeping) -> Callable[[], None] | None:
  """Returns the function that replaces the run if `--plan` or `--debug_task` is given, or `None` if neither is given.

  Raises:
    ValueError: if both flags are given, if the experiment trains nothing, if the number that `--debug_task` gives is
      not a meta-iteration of the training, or if `--debug_task` is given and there are several processes. The training
      is the last one of `plan` that has checkpoints, or the first one if none has.
  """
  step = keeping.debug_task
  if step is None and not keeping.plan:
    return None
  if step is not None and keeping.plan:
    raise ValueError('--plan and --debug_task cannot be given in the same command; give one of them')
  if not plan:
    raise ValueError('--plan and --debug_task need a training, but this command trains nothing; leave the flag out')
  if step is None:
    return functools.partial(print_memory, plan)
  if jax.process_count() > 1:
    raise ValueError(
      f'debug_task needs a single process, got {jax.process_count()}; leave out --coordinator or --distributed'
    )
  there = resuming.trainings(workdir)
  training = next((t for t in reversed(plan) if t.name in there), plan[0])
  if step >= training.total:
    raise ValueError(
      f'debug_task must be a meta-iteration from 0 to {training.total - 1} for {training.label}, got {step}; give a '
      'lower one, or another training with --only'
    )
  return functools.partial(debug, training, config, workdir, step)


def print_memory(plan: Sequence[Training]) -> None:
  """Prints the memory that each training needs. If it trains R runs side by side, this is the memory of one run."""
  for training in plan:
    if training.memory is not None:
      logging.info('%s: compiling, to plan its memory', training.label)
    planned = 'its memory cannot be planned' if training.memory is None else training.memory()
    print(f'{training.label}: {planned}', flush=True)
    runs = math.prod(jax.eval_shape(training.start).step.shape)
    if training.memory is not None and runs > 1:
      side = f'{runs} are trained side by side and take about {runs} times as much'
      print(f'this is the memory of one run; {side}', flush=True)


def debug(training: Training, config: Any, workdir: pathlib.Path, step: int) -> None:
  """Replays one meta-iteration of a training and prints its tasks. No file is changed.

  The replay starts at the newest checkpoint that is not past the meta-iteration, or at the beginning if there is no
  such checkpoint. The checkpoints are those in the run's directory, or in the directory of the training's own process.

  Raises:
    CheckpointError: if the checkpoints have another configuration.
    TrainingError: if the training cannot be inspected.
  """
  if training.inspect is None:
    raise TrainingError(
      f'--debug_task does not support {training.label}, whose outer update is not a mean of gradients of single tasks'
    )
  state, found = training.start(), None
  stored = resuming.check(workdir, config) if resuming.trainings(workdir) else {}
  for home in (workdir, workdir / replacing.JOBS / training.name):
    directory = resuming.checkpoints_of(home, training.name)
    found = found or checkpoint.newest(directory, like=state, config=stored, until=step)
  state = state if found is None else found.state
  print(f'{training.label}: meta-iteration {step:,} (from 0), replayed from {int(np.max(state.step)):,}', flush=True)
  state = training.go(state, step, ())
  runs = [state] if state.step.ndim == 0 else [reporting.one_run(state, r) for r in range(len(state.step))]
  for r, one in enumerate(runs):
    if len(runs) > 1:
      print(f'run {r} (from 0)')
    print('\n'.join(bad_numbers.lines(training.inspect(one))), flush=True)
