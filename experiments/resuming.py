"""A run in its work directory: alone there, begun or gone on with, and left in order when it is told to stop."""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import signal
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from absl import flags

from experiments import options, processes, reporting
from experiments.options import option
from metasgd_jax.io import checkpoint, files, provenance, writers
from metasgd_jax.io.checkpoint import CheckpointError

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
  restart: bool = option(False, 'Begin anew where workdir holds an unfinished run, or this one finished.')
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
    'Where config.json, metrics, results and pictures go. This run goes on there if it is unfinished, and stays if '
    'it is finished; another that is finished is replaced.',
  )
  flags.DEFINE_string('config', None, "Settings, from a run's results.json or config.json; other flags override them.")


class Stop:
  """Whether SIGTERM came. While `held`, whoever holds it leaves when its state is saved; else it leaves at once.

  Of several processes none leaves by itself, as the others would wait for it: they leave together, where all `ask`.
  """

  def __init__(self, restart: bool = False):
    """Starts with no signal.

    Args:
      restart: whether the command has --restart, which would delete what it saved if it were given again.
    """
    self.asked = False
    self.finished = False
    self._holds = 0
    self._command = 'the same command without --restart' if restart else 'the same command'

  @contextlib.contextmanager
  def held(self) -> Iterator[None]:
    """Puts the leaving off while there is something to be saved."""
    self._holds += 1
    try:
      yield
    finally:
      self._holds -= 1
    self.ask()

  def ask(self) -> None:
    """Leaves if the signal has come, to any process; all must come here, when what was trained is saved."""
    if processes.any_of(self.asked) and not self._holds:
      self.leave('all that was trained is saved')

  def come(self, *_) -> None:
    """Takes the signal; of a run that is finished it changes nothing."""
    self.asked = True
    if not self._holds and not self.finished and jax.process_count() == 1:
      self.leave('what was trained is saved')

  def leave(self, what: str) -> None:
    """Ends the program with a sentence."""
    print(f'stopped by SIGTERM: {what}; {self._command} goes on from there', flush=True)
    raise SystemExit(STOPPED)


class Run(NamedTuple):
  """A run that is open.

  Attributes:
    workdir: where it keeps everything.
    config: as the checkpoints have it.
    keeping: how it is kept.
    metrics: where metrics go; the first is the file that a resumed run cuts.
    stop: whether it is to stop.
    rows: of results.json, where the run is finished already and nothing is to be done; else `None`.
  """

  workdir: pathlib.Path
  config: dict[str, Any]
  keeping: Keeping
  metrics: list[Any]
  stop: Stop
  rows: list[dict[str, Any]] | None = None

  @property
  def file(self) -> writers.MetricsWriter:
    """Returns the writer of metrics.jsonl."""
    return self.metrics[0]

  def directory(self, training: str) -> pathlib.Path:
    """Returns where a training's checkpoints are."""
    return _checkpoints(self.workdir) / training


@contextlib.contextmanager
def open_run(workdir: files.PathLike, config: Any, keeping: Keeping | None = None) -> Iterator[Run]:
  """Opens a work directory for a run: one of the same configuration that was not finished goes on.

  One of the same configuration and versions that is finished stays as it is, with its rows in `Run.rows`, unless
  `keeping.restart` is set. When the block ends without an error the run is finished; it is marked so before its
  checkpoints go, unless they are to be kept, so a kill at any moment loses nothing.

  Raises:
    WriterError: another program runs there, or it cannot be written.
    CheckpointError: it holds an unfinished run of another configuration, and `keeping.restart` is not set.
  """
  with contextlib.ExitStack() as held:
    with processes.together():
      workdir, keeping = files.open_workdir(workdir), keeping or Keeping()
      held.enter_context(_alone(workdir))
      stop = held.enter_context(_sigterm(keeping.restart))
      reporting.clear_leftovers(workdir)
      rows = None if keeping.restart else _finished_rows(workdir, config)
      metrics: list[Any] = []
      if rows is not None:
        print(f'{workdir} holds this run, finished; --restart makes it again')
      elif unfinished(workdir) and not keeping.restart:
        check(workdir, config)
        print(f'{workdir} holds an unfinished run of this configuration, which goes on; --restart begins anew')
        metrics = reporting.go_on(workdir, config)
      else:
        _remove(_checkpoints(workdir))
        _finished(workdir).unlink(missing_ok=True)
        metrics = reporting.start(workdir, config)
    rows = processes.json_from_first(rows)
    with contextlib.ExitStack() as written:
      for writer in metrics:
        if isinstance(writer, writers.TensorBoardWriter):
          written.callback(writer.close)
      yield Run(workdir, dataclasses.asdict(config), keeping, metrics, stop, rows)
    stop.finished = True
    if rows is None:
      files.write_json(_finished(workdir), _mark(workdir))
      if not keeping.keep_checkpoints:
        _remove(_checkpoints(workdir))
    processes.any_of(False)  # The first has drawn its pictures; the others wait for it, lest it be taken for lost.


def unfinished(workdir: files.PathLike) -> bool:
  """Whether a directory holds checkpoints of a run that did not end."""
  workdir = pathlib.Path(workdir)
  return bool(trainings(workdir)) and not _finished(workdir).exists()


def trainings(workdir: files.PathLike) -> list[str]:
  """Returns the names of the trainings that have checkpoints."""
  found = _checkpoints(pathlib.Path(workdir))
  return [path.name for path in sorted(found.iterdir()) if checkpoint.steps(path)] if found.is_dir() else []


def check(workdir: files.PathLike, config: Any) -> None:
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
  return workdir / 'finished.json'


def _mark(workdir: pathlib.Path) -> dict[str, Any]:
  """Returns what finished.json holds: the versions, and the digest of the results, which tells them from others."""
  results = workdir / 'results.json'
  digest = hashlib.sha256(results.read_bytes()).hexdigest() if results.exists() else None
  return {'versions': provenance.collect()['versions'], 'results_sha256': digest}


def _finished_rows(workdir: pathlib.Path, config: Any) -> list[dict[str, Any]] | None:
  """Returns the rows of a finished run of this configuration with these versions; `None` if there is none."""
  try:
    config_there, mark, results = (
      json.loads((workdir / name).read_bytes()) for name in ('config.json', _finished(workdir).name, 'results.json')
    )
    same = config_there == json.loads(json.dumps(dataclasses.asdict(config))) and mark == _mark(workdir)
    return (results['rows'] or None) if same else None
  except (OSError, ValueError, RecursionError):
    return None  # Not there, or damaged.


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
        raise files.WriterError(
          f'another program trains in {workdir}; wait until it has ended, or give another --workdir'
        ) from e
    yield
  finally:
    os.close(directory)


@contextlib.contextmanager
def _sigterm(restart: bool) -> Iterator[Stop]:
  """Has SIGTERM noted, where this is the main thread; afterwards it does what it did before."""
  stop = Stop(restart)
  if threading.current_thread() is not threading.main_thread():
    yield stop
    return
  before = signal.signal(signal.SIGTERM, stop.come)
  try:
    yield stop
  finally:
    signal.signal(signal.SIGTERM, before)
