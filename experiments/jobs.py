"""Trains several networks at the same time: one process on each core of the CPU.

XLA hands small operations from thread to thread. Two programs that share cores therefore slow each other down, up to
ten times. Here each process is bound to a core of its own before JAX starts in it.
"""

import contextlib
import dataclasses
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TextIO

import jax
import tqdm

from experiments import replacing, reporting, resuming
from experiments.reporting import TrainingError
from experiments.resuming import Keeping, Run
from metasgd_jax.io import checkpoint

SECONDS = 0.2
"""Time between two looks at the processes."""
_IS_JOB = 'METASGD_JAX_IS_JOB'
"""Variable of the environment that is set in the processes of jobs."""


@dataclasses.dataclass(frozen=True)
class Job:
  """A command that trains in a directory of its own.

  Attributes:
    label: Name in printed text.
    directory: Work directory of the command.
    arguments: Module and flags of the command, without `--workdir`.
    total: Number of meta-iterations of all its trainings.
  """

  label: str
  directory: pathlib.Path
  arguments: Sequence[str]
  total: int

  @property
  def log(self) -> pathlib.Path:
    """File with what the command prints."""
    return _log_of(self.directory)


@dataclasses.dataclass(frozen=True)
class Jobs:
  """How the trainings of a command get processes of their own.

  Attributes:
    command: Module and flags of the command, without those of `Keeping` and without `--workdir`.
    cores: Core of each process that may run at the same time. With one core, there are no such processes.
    least: Smallest number of trainings that get such processes.
  """

  command: Sequence[str]
  cores: Sequence[int]
  least: int = 2

  def train(self, plan: Sequence[Any], run: Run) -> None:
    """Trains the unfinished ones of the `trainings.Training` of a plan, each in its own process.

    The processes run the same command with the flag `--only`. Afterwards `trainings.train` adopts the results. If fewer
    than `least` trainings are left, or if there is only one core, nothing is done. A training that this program has
    begun itself is left to `trainings.train`.

    Raises:
      TrainingError: as `run_all`.
      StoppedError: if a signal stops the program. The processes have then saved their states.
      WriterError: if there is a folder `JOBS`, or a log in it, that the run has not written.
    """
    left = [training for training in plan if not (run.begun and _is_elsewhere(training, run.workdir))]
    if self.are_useful(len(left)):
      run.begin()
      todo = [self._of(training, run.workdir) for training in left]
      _claim(todo, run)
      if number := run_all(todo, self.cores):
        run.asked = number
        run.leave('all that was trained is saved')
      run.keep()

  def are_useful(self, count: int) -> bool:
    """Returns whether `count` trainings, or cells of a table, get processes of their own."""
    return len(self.cores) > 1 and count >= self.least

  def _of(self, training: Any, workdir: pathlib.Path) -> Job:
    directory = workdir / replacing.JOBS / training.name
    return Job(training.label, directory, [*self.command, f'--only={training.name}'], training.total)


SINGLE = Jobs((), (0,))
"""All trainings in one process, one after the other."""


def cores(keeping: Keeping, devices: int | None) -> list[int]:
  """Returns the core of each process that may run at the same time.

  There is only one process if `keeping.jobs` is 1, if `keeping.profile` is set, if `devices` is given, because the
  trainings then use these devices, if the program has several processes, or if its device is not a CPU.

  Args:
    keeping: Options of the run.
    devices: Value of `--devices`.
  """
  single = devices or keeping.jobs == 1 or keeping.profile or jax.process_count() > 1
  if single or jax.default_backend() != 'cpu' or not hasattr(os, 'sched_setaffinity'):  # Only Linux has it.
    return [0]
  there = sorted(os.sched_getaffinity(0))
  return [there[i % len(there)] for i in range(keeping.jobs or len(there))]


def adopt(name: str, label: str, run: Run) -> None:
  """Moves the checkpoints and metrics of a training that had a process of its own to the run, and removes the rest.

  If the program is killed meanwhile, the next call does what is left. `name` and `label` are those of the
  `trainings.Training`.
  """
  source = run.workdir / replacing.JOBS / name
  if replacing.read_record(source) is None:
    return
  theirs, ours = resuming.checkpoints_of(source, name), run.checkpoints(name)
  if checkpoint.steps(theirs) and not checkpoint.steps(ours):  # Otherwise the lines are there already.
    run.metrics[0].cut(label, 0)
    for lines in ('metrics.jsonl', 'timings.jsonl'):
      if (source / lines).exists():
        with (run.workdir / lines).open('a') as file:
          file.write((source / lines).read_text())
  ours.mkdir(parents=True, exist_ok=True)
  for step in checkpoint.steps(theirs):
    if not (ours / str(step)).exists():
      (theirs / str(step)).rename(ours / str(step))
  if (tested := source / resuming.tested_file(name)).exists():
    tested.replace(run.path(tested.name))
  for events in source.glob('events.out.tfevents.*'):
    events.rename(run.path(f'{events.name}.{name}'))  # Processes that start in the same second give equal names.
  replacing.remove_run(source)
  with contextlib.suppress(OSError):  # It holds the logs, which `Run.finish` removes.
    source.parent.rmdir()


def run_all(jobs: Sequence[Job], on: Sequence[int]) -> int:
  """Runs all jobs, at most one at a time on each core of `on`, and shows their progress and warnings.

  Returns:
    0, or the number of the signal that stopped the program. The jobs have then saved their states.

  Raises:
    TrainingError: if a job fails. The other jobs are finished first.
    KeyboardInterrupt: if a second signal comes. The jobs are killed, and keep what they have saved.
  """
  waiting, failed, told = list(jobs), [], False
  running: dict[int, _Running] = {}
  progress = reporting.progress([job.directory for job in jobs], sum(job.total for job in jobs))
  with _signals() as asked, progress as show, _ended(running):
    while running or (waiting and not asked):
      for place in set(range(len(on))) - set(running):
        if waiting and not asked:
          running[place] = _start(waiting.pop(0), on[place])
      time.sleep(SECONDS)
      show()
      if asked and not told:
        told = True
        for one in running.values():
          one.process.send_signal(signal.SIGTERM)
        print(f'{signal.Signals(asked[0]).name}: stops when the trainings have saved their states', flush=True)
      if len(asked) > 1:
        raise KeyboardInterrupt
      for place, one in list(running.items()):
        code = one.process.poll()
        _relay(one.output)
        if code is not None:
          running.pop(place).close()
          failed += [_failure(one.job, code)] if code else []
  if failed and not asked:
    raise TrainingError(f'{len(failed)} of {len(jobs)} trainings failed: {"; ".join(failed)}')
  return asked[0] if asked else 0


def stop_with_parent() -> None:
  """If this program is a job, stops it as SIGTERM does when the program that started it ends, even if it is killed."""
  if os.environ.pop(_IS_JOB, None):
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
  os.read(0, 1)  # The parent writes nothing, and its end of the pipe is closed when it ends.
  os.kill(os.getpid(), signal.SIGTERM)


class _Running(NamedTuple):
  job: Job
  process: subprocess.Popen[bytes]
  output: TextIO

  def close(self) -> None:
    """Closes the pipe to the process, and its log."""
    assert self.process.stdin
    self.process.stdin.close()
    self.output.close()


@contextlib.contextmanager
def _ended(running: dict[int, _Running]) -> Iterator[None]:
  """Ends the processes that are left if the block raises an error, and kills them if it is KeyboardInterrupt."""
  end = subprocess.Popen.terminate
  try:
    yield
  except KeyboardInterrupt:
    end = subprocess.Popen.kill
    raise
  finally:
    for one in running.values():
      end(one.process)
    for one in running.values():
      one.process.wait()
      one.close()


def _relay(output: TextIO) -> None:
  for line in output:
    if line.startswith(reporting.WARNING):
      tqdm.tqdm.write(line.rstrip())


def _log_of(directory: pathlib.Path) -> pathlib.Path:
  return directory.with_name(f'{directory.name}.log')  # It is beside the directory, in which only the run writes.


def _claim(jobs: Sequence[Job], run: Run) -> None:
  """Records that the folder of the jobs and their logs are the run's. `Run.path` refuses those of the user.

  A job that has a record was begun by an earlier program, whose version may not have listed these files.
  """
  begun = {resuming.log_file(job.directory.name) for job in jobs if replacing.read_record(job.directory)}
  run.written |= begun | ({replacing.JOBS} if replacing.runs_in(run.workdir) else set())
  for name in (replacing.JOBS, *(resuming.log_file(job.directory.name) for job in jobs)):
    run.path(name)


def _is_elsewhere(training: Any, workdir: pathlib.Path) -> bool:
  """Returns whether a training was begun by this program itself, or was finished by a process of its own."""
  own = workdir / replacing.JOBS / training.name
  finished = training.total in checkpoint.steps(resuming.checkpoints_of(own, training.name))
  return finished or bool(checkpoint.steps(resuming.checkpoints_of(workdir, training.name)))


def _start(job: Job, core: int) -> _Running:
  """Starts a process that is bound to a core."""
  job.directory.parent.mkdir(parents=True, exist_ok=True)
  command = [sys.executable, '-m', *job.arguments, f'--workdir={job.directory}', '--jobs=1']
  before = os.sched_getaffinity(0)
  os.sched_setaffinity(0, {core})  # The affinity is that of this thread alone, and the process inherits it.
  try:
    with job.log.open('ab') as log:
      output = job.log.open(errors='replace')
      output.seek(0, os.SEEK_END)
      # The process has a group of its own, so that Ctrl-C does not reach it before it reaches this program. It stays in
      # this session: Linux divides the processor among sessions first, and `nice` works only within a session.
      how: dict[str, Any] = dict(stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.PIPE, process_group=0)
      return _Running(job, subprocess.Popen(command, env=os.environ | {_IS_JOB: '1'}, **how), output)
  finally:
    os.sched_setaffinity(0, before)


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
  """Gives a list to which the number of each signal to stop is appended."""
  asked: list[int] = []
  numbers = (signal.SIGTERM, signal.SIGINT)
  before = [signal.signal(number, lambda number, _: asked.append(number)) for number in numbers]
  try:
    yield asked
  finally:
    for number, handler in zip(numbers, before, strict=True):
      signal.signal(number, handler)


def _failure(job: Job, code: int) -> str:
  """Returns which job failed and why, given its exit code, which is negative if a signal ended it."""
  if code > 0:
    return f'{job.label}: {_last_line(job.log)} (its output is in {job.log})'
  advice = ' (often too little memory); lower --jobs, and' if code == -signal.SIGKILL else ';'
  return f'{job.label} was ended by {signal.Signals(-code).name}{advice} give the same command to go on'


def _last_line(path: pathlib.Path) -> str:
  with contextlib.suppress(OSError):
    lines = path.read_text(errors='replace').strip().splitlines()
    return lines[-1].removeprefix('error: ') if lines else 'it printed nothing'
  return 'its output cannot be read'
