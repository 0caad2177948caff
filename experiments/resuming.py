"""A run in its work directory: alone there, begun or gone on with, and left in order when it is told to stop."""

import contextlib
import dataclasses
import os
import pathlib
import shutil
import signal
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

from absl import flags

from experiments import options, processes, reporting
from experiments.options import option
from metasgd_jax import checkpoint, writers
from metasgd_jax.checkpoint import CheckpointError

flags.disclaim_key_flags()  # As in options.

STOPPED = 128 + signal.SIGTERM
"""The exit code of a run that SIGTERM stopped, as shells give it."""


@dataclasses.dataclass(frozen=True)
class Keeping:
  """How a run is kept and looked into; none of it changes what is computed, so none of it is in the configuration."""

  checkpoint_every: int = option(
    0, 'Meta-iterations between checkpoints, in whole chunks; 0 for one about every 15 seconds.', low=0
  )
  keep_checkpoints: bool = option(False, 'Leave the checkpoints where they are when the run has ended.')
  restart: bool = option(False, 'Begin anew where workdir holds an unfinished run.')
  profile: bool = option(False, 'Trace a few meta-iterations of each training, compiled, to WORKDIR/profile.')
  debug_task: int | None = option(
    None, 'Replay this meta-iteration, from 0, of the training under way, and show its tasks; nothing else is done.',
    low=0, high=2**31 - 1, kind=int,
  )  # fmt: skip
  plan: bool = option(False, 'Print what memory each training will take, and whether it fits; nothing else is done.')
  check_determinism: bool = option(
    False, 'Begin each training twice, and compare to the bit; nothing else is done. The exit code is 1 if they differ.'
  )

  def __post_init__(self):
    options.check(self)


def define_flags(*configs: type, workdir: str) -> None:
  """Defines the flags of an experiment: those of its configurations, and where it writes, `workdir` if not given."""
  for config in configs:
    options.define_flags(config)
  flags.DEFINE_string(
    'workdir',
    workdir,
    'Where config.json, metrics, results and pictures go; a finished run there is replaced, an unfinished one goes on.',
  )
  flags.DEFINE_string('config', None, "Settings, from a run's results.json or config.json; other flags override them.")


class Stop:
  """Whether SIGTERM came. While `held`, whoever holds it leaves when its state is saved; else it leaves at once."""

  def __init__(self):
    """Starts with no signal."""
    self.asked = False
    self._holds = 0

  @contextlib.contextmanager
  def held(self) -> Iterator[None]:
    """Puts the leaving off while there is something to be saved."""
    self._holds += 1
    try:
      yield
    finally:
      self._holds -= 1
    if self.asked and not self._holds:
      self.leave('all that was trained is saved')

  def come(self, *_) -> None:
    """Takes the signal."""
    self.asked = True
    if not self._holds:
      self.leave('what was trained is saved')

  def leave(self, what: str) -> None:
    """Ends the program with a sentence."""
    print(f'stopped by SIGTERM: {what}; the same command goes on from there', flush=True)
    raise SystemExit(STOPPED)


class Run(NamedTuple):
  """A run that is open.

  Attributes:
    workdir: where it keeps everything.
    config: as the checkpoints have it.
    keeping: how it is kept.
    metrics: where metrics go; the first is the file that a resumed run cuts.
    stop: whether it is to stop.
  """

  workdir: pathlib.Path
  config: dict[str, Any]
  keeping: Keeping
  metrics: list[Any]
  stop: Stop

  @property
  def file(self) -> writers.MetricsWriter:
    """Returns the writer of metrics.jsonl."""
    return self.metrics[0]

  def directory(self, training: str) -> pathlib.Path:
    """Returns where a training's checkpoints are."""
    return _checkpoints(self.workdir) / training


@contextlib.contextmanager
def open_run(workdir: writers.PathLike, config: Any, keeping: Keeping | None = None) -> Iterator[Run]:
  """Opens a work directory for a run: one of the same configuration that was not finished goes on.

  When the block ends without an error the run is finished, and its checkpoints go unless they are to be kept.

  Raises:
    WriterError: another program runs there, or it cannot be written.
    CheckpointError: it holds an unfinished run of another configuration, and `keeping.restart` is not set.
  """
  with contextlib.ExitStack() as held:
    with processes.together():
      workdir, keeping = writers.open_workdir(workdir), keeping or Keeping()
      held.enter_context(_alone(workdir))
      stop = held.enter_context(_sigterm())
      reporting.clear_leftovers(workdir)
      if unfinished(workdir) and not keeping.restart:
        check(workdir, config)
        print(f'{workdir} holds an unfinished run of this configuration, which goes on; --restart begins anew')
        metrics = reporting.go_on(workdir, config)
      else:
        _remove(_checkpoints(workdir))
        metrics = reporting.start(workdir, config)
    for writer in metrics:
      if isinstance(writer, writers.TensorBoardWriter):
        held.callback(writer.close)
    yield Run(workdir, dataclasses.asdict(config), keeping, metrics, stop)
    if not keeping.keep_checkpoints:
      _remove(_checkpoints(workdir))
    elif _checkpoints(workdir).exists():
      with writers.atomic(_finished(workdir)) as file:
        file.write(b'')
    processes.any_of(False)  # The first has drawn its pictures; the others wait for it, lest it be taken for lost.


def unfinished(workdir: writers.PathLike) -> bool:
  """Whether a directory holds checkpoints of a run that did not end."""
  workdir = pathlib.Path(workdir)
  return bool(trainings(workdir)) and not _finished(workdir).exists()


def trainings(workdir: writers.PathLike) -> list[str]:
  """Returns the names of the trainings that have checkpoints."""
  found = _checkpoints(pathlib.Path(workdir))
  return [path.name for path in sorted(found.iterdir()) if checkpoint.steps(path)] if found.is_dir() else []


def check(workdir: writers.PathLike, config: Any) -> None:
  """Raises CheckpointError if the directory holds an unfinished run of another configuration, naming the fields."""
  if not unfinished(workdir):
    return
  for name in trainings(workdir):
    found = checkpoint.read_config(_checkpoints(pathlib.Path(workdir)) / name)
    if found is not None:
      checkpoint.check_config(found, dataclasses.asdict(config), workdir)
      return
  raise CheckpointError(f'none of the checkpoints in {workdir} can be read; give --restart to begin anew')


def _checkpoints(workdir: pathlib.Path) -> pathlib.Path:
  return workdir / 'checkpoints'


def _finished(workdir: pathlib.Path) -> pathlib.Path:
  return _checkpoints(workdir) / 'finished'


def _remove(path: pathlib.Path) -> None:
  """Deletes a directory so that half of it is never taken for a run."""
  aside = path.with_name(f'.{path.name}-removed')
  shutil.rmtree(aside, ignore_errors=True)
  if path.exists():
    path.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def _alone(workdir: pathlib.Path) -> Iterator[None]:
  """Holds a lock on the directory, which goes with the process, however that ends."""
  try:
    import fcntl
  except ImportError:  # Windows.
    yield
    return
  directory = os.open(workdir, os.O_RDONLY)
  try:
    with contextlib.suppress(OSError):  # Some network file systems have no locks.
      try:
        fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError as e:
        raise writers.WriterError(
          f'another program trains in {workdir}; wait until it has ended, or give another --workdir'
        ) from e
    yield
  finally:
    os.close(directory)


@contextlib.contextmanager
def _sigterm() -> Iterator[Stop]:
  """Has SIGTERM noted, where this is the main thread; afterwards it does what it did before."""
  stop = Stop()
  if threading.current_thread() is not threading.main_thread():
    yield stop
    return
  before = signal.signal(signal.SIGTERM, stop.come)
  try:
    yield stop
  finally:
    signal.signal(signal.SIGTERM, before)
