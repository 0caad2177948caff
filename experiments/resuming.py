"""Manages a run in its work directory: locks the directory, begins or resumes the run, and ends it after a signal."""

import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from absl import flags

from experiments import options, processes, replacing
from experiments.options import option
from experiments.replacing import RECORD, read_record, refuse, trainings
from experiments.reporting import StoppedError
from metasgd_jax.io import checkpoint, files, provenance, writers
from metasgd_jax.io.checkpoint import CheckpointError

flags.disclaim_key_flags()  # Then --help lists the flags defined here as flags of the experiment.

OWN_PATTERNS = (
  *('config.json', 'metrics.jsonl', 'timings.jsonl', 'results.json', 'checkpoints', 'profile', 'per_task_*.npy'),
  *('params_*.safetensors', 'model_*.safetensors', 'events.out.tfevents.*', 'learning_curves.png', 'curves_*.png'),
  *('alpha_*.png', 'task_*.png', 'instances_*.png', 'paths_*.png', 'adaptation_*.gif'),
)
"""Names of the files that runs write. A run does not begin in a directory that has such files but no `RECORD`."""


@dataclasses.dataclass(frozen=True)
class Keeping:
  """Options for saving and inspecting a run. They do not change what is computed, and so are not part of a `Config`."""

  checkpoint_every: int = option(
    0, 'Meta-iterations between checkpoints, rounded up to whole chunks; 0 saves one about every 15 seconds.', low=0
  )
  keep_checkpoints: bool = option(False, 'Keep the checkpoints after the run has ended.')
  restart: bool = option(False, 'Replace the run that the work directory holds.')
  profile: bool = option(False, 'Write a trace of a few meta-iterations of each training to WORKDIR/profile.')
  debug_task: int | None = option(
    None, 'Replay this meta-iteration (from 0) and show its tasks; nothing is trained.', low=0, high=2**31 - 1, kind=int
  )
  jobs: int = option(
    0, 'Trainings at the same time, each on a core of a CPU; 0 for one on each core.', low=0, high=1000
  )
  only: str | None = option(None, 'Only train the training of this name, as --jobs does.', kind=str)
  plan: bool = option(False, 'Print the memory that each training needs; nothing is trained.')

  def __post_init__(self):
    options.check(self)


def define_flags(*configs: type) -> None:
  """Defines the flags of an experiment: those of its configurations, --config, and --workdir."""
  for config in configs:
    options.define_flags(config)
  about = 'Directory of the run, by default in runs/. An unfinished run continues; for a finished one see --restart.'
  flags.DEFINE_string('workdir', None, about)
  flags.DEFINE_string('config', None, "Settings, from a run's results.json or config.json; other flags override them.")


@dataclasses.dataclass
class Run:
  """The run of an experiment for which `open_run` has opened a work directory.

  After SIGTERM or Ctrl-C, a training finishes its current chunk of meta-iterations, saves its state and ends the
  program. If no training is in progress, a program with a single process ends at once. Several processes end together,
  when all of them call `ask` the next time. Otherwise a process that has not ended would wait for the others. A second
  Ctrl-C raises KeyboardInterrupt.

  Attributes:
    workdir: Directory of the run.
    config: Configuration, as values that JSON can store. A resumed run has the configuration that its record stores.
    keeping: Options for saving and inspecting the run, which do not change what is computed.
    cell: Whether the run computes one cell of a table of results.
    metrics: Writers of metrics. The first is the `MetricsWriter`.
    rows: Rows of results.json if the run is finished already and there is nothing to do, otherwise `None`.
    begun: Whether the directory is marked as the directory of this run. Until then, it may hold an earlier run.
    written: Names of the files that the run in the directory has written, or is about to write.
    trained: Names of the trainings whose checkpoints the run in the directory has written, or is about to write.
    asked: Number of the signal that was received, SIGTERM or SIGINT, or 0 if there was none.
    idle: Whether the program may end at once, because there is no training whose state must be saved first.
    finished: Whether all is done, so that signals are ignored.
    halves: Half-written files that were there when the directory was opened: an earlier program was killed.
  """

  workdir: pathlib.Path
  config: dict[str, Any]
  keeping: Keeping
  cell: bool = False
  metrics: list[Any] = dataclasses.field(default_factory=list)
  rows: list[dict[str, Any]] | None = None
  begun: bool = False
  written: set[str] = dataclasses.field(default_factory=set)
  trained: set[str] = dataclasses.field(default_factory=set)
  asked: int = 0
  idle: bool = True
  finished: bool = False
  halves: Sequence[pathlib.Path] = ()

  def path(self, name: str) -> pathlib.Path:
    """Returns the path of a file that the run is about to write, and records that the file is the run's.

    Raises:
      WriterError: if there is a file of that name that the run has not written.
    """
    if name not in self.written:
      refuse([self.workdir / name])
      self.written.add(name)
      self.note()
    return self.workdir / name

  def checkpoints(self, training: str) -> pathlib.Path:
    """Returns the directory for the checkpoints of a training, and records that these checkpoints are the run's.

    Raises:
      WriterError: if there are checkpoints that the run has not written.
    """
    directory = checkpoints_of(self.workdir, training)
    if training not in self.trained:
      refuse([directory / str(step) for step in checkpoint.steps(directory)])
      self.trained.add(training)
      self.note()
    return directory

  def begin(self) -> None:
    """Puts the files of an earlier run aside, and marks the directory as this run's.

    This method must be called before the run writes any file. `trainings.train` first tries one meta-iteration, which
    writes no file, and then calls this method. The earlier run is removed when `keep` is called. If the run ends before
    that, the earlier run is put back.
    """
    if self.begun:
      return
    names, old = {'config.json', 'metrics.jsonl', 'timings.jsonl', 'checkpoints'}, set(self.written)
    refuse([self.workdir / name for name in sorted(names - old)])
    replacing.set_aside(self.workdir)
    self.begun, self.written, self.trained = True, names | ({'profile', replacing.JOBS} & old), set()
    self.note()
    self.open_events()
    files.write_json(self.workdir / 'config.json', self.config)
    self.note()

  def keep(self) -> None:
    """Removes the earlier run for good. It must be called when the first checkpoint is on the disk."""
    replacing.settle(self.workdir)

  def note(self, finished: bool = False) -> None:
    """Writes the file `RECORD`: whether the run is finished, its configuration, the versions, and the run's files."""
    record = {'finished': finished, 'config': self.config, 'versions': provenance.collect()['versions']}
    lists = {'files': sorted(self.written), 'trainings': sorted(self.trained)}
    files.write_json(self.workdir / RECORD, record | lists)

  def close(self) -> None:
    """Closes the event file of TensorBoard."""
    for writer in self.metrics[1:]:
      writer.close()

  def finish(self) -> None:
    """Marks the run as finished, and then removes its checkpoints and its other files that only resuming needs.

    In this order, nothing is lost if the program is killed at any moment.
    """
    for half in self.halves:
      half.unlink(missing_ok=True)
    self.note(finished=True)
    self.keep()
    if not self.keeping.keep_checkpoints:
      replacing.remove_checkpoints(self.workdir, self.trained)
    names = [name for training in self.trained for name in (tested_file(training), log_file(training))]
    for name in self.written.intersection(names):
      (self.workdir / name).unlink(missing_ok=True)
    if replacing.JOBS in self.written:
      with contextlib.suppress(OSError):  # It holds files of the user, or does not exist.
        (self.workdir / replacing.JOBS).rmdir()
      names += [] if (self.workdir / replacing.JOBS).exists() else [replacing.JOBS]
    self.written.difference_update(names)  # Later files of these names would be the user's.
    self.note(finished=True)

  def come(self, number: int = signal.SIGTERM, _: Any = None) -> None:
    """Handles a signal: records its `number`, and ends the program if it is idle and has a single process."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if self.finished:
      return
    self.asked = number
    if self.idle and jax.process_count() == 1:
      self.leave('what was trained is saved')
    if not self.idle:
      print(f'{signal.Signals(number).name}: stops when this chunk of meta-iterations is saved', flush=True)

  def ask(self) -> None:
    """Ends the program if a signal has come to any process. All processes must call it, after they have saved."""
    if processes.any_of(self.asked > 0):
      self.leave('all that was trained is saved')

  def leave(self, what: str) -> None:
    """Prints what is saved and which command continues the run, and ends the program.

    The exit code is 128 plus the number of the signal. Shells report the same code for a program that a signal ended.
    """
    number = self.asked or signal.SIGTERM  # The signal may have come to another process.
    command = 'the same command without --restart' if self.keeping.restart and not self.cell else 'the same command'
    said = f'{what}; {command} goes on from there'
    if not (self.begun and trainings(self.workdir)):
      unchanged = not self.begun or replacing.is_pending(self.workdir)
      earlier = ', and the earlier run is unchanged' if unchanged else ''
      said = f'nothing is saved yet{earlier}; the same command begins again'
    print(f'stopped by {signal.Signals(number).name}: {said}', flush=True)
    raise StoppedError(128 + number)

  def open_events(self) -> None:
    """Opens an event file of TensorBoard, if the configuration asks for it."""
    if self.config.get('tensorboard'):
      there = set(self.workdir.glob('events.out.tfevents.*'))
      self.metrics.append(writers.TensorBoardWriter(self.workdir))
      self.written |= {path.name for path in set(self.workdir.glob('events.out.tfevents.*')) - there}


@contextlib.contextmanager
def open_run(workdir: files.PathLike, config: Any, keeping: Keeping | None = None, cell: bool = False) -> Iterator[Run]:
  """Opens a work directory for a run. The run is finished when the `with` block ends without an error.

  An unfinished run of the same configuration continues. A finished run of the same configuration stays as it is, and
  `Run.rows` has its rows of results.json. With `keeping.restart`, an earlier run is replaced when the new run has its
  first checkpoint, and only files that the record of the earlier run lists are removed. If the run is a `cell` of a
  table, `keeping.restart` replaces only an earlier run that `check` refuses, so that a table can be made by running the
  same command several times.

  Raises:
    WriterError: if another program trains in the directory, if the directory cannot be written, or if it holds files
      with the names that runs write and is not marked as the directory of a run.
    CheckpointError: if the directory holds a run that `check` refuses and `keeping.restart` is not set, or if the
      record of the run cannot be read.
  """
  with contextlib.ExitStack() as held:
    with processes.together():
      workdir = files.open_workdir(workdir)
      _lock(workdir, held)
      run = Run(workdir, _plain(config), keeping or Keeping(), cell, halves=files.half_written(workdir))
      run.metrics.append(writers.MetricsWriter(workdir / 'metrics.jsonl', go_on=True))
      if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
          held.callback(signal.signal, number, signal.signal(number, run.come))
      _enter(run, config)
    run.rows = processes.json_from_first(run.rows)
    try:
      with contextlib.closing(run):
        yield run
        run.finished = True
    except BaseException:
      replacing.settle(workdir)
      raise
    if run.begun and run.keeping.only is None:
      run.finish()
    processes.any_of(False)  # The other processes wait until the first one has drawn the pictures.


def _enter(run: Run, config: Any) -> None:
  """Decides whether the run begins, continues or is finished already, and prints the decision."""
  workdir = run.workdir
  replacing.settle(workdir)  # A program may have been killed while it replaced a run.
  record = read_record(workdir)
  if record is None:
    there = sorted(path.name for pattern in OWN_PATTERNS for path in workdir.glob(pattern))
    if there:
      raise files.WriterError(f'{workdir} holds {", ".join(there)}, which no run has written; give another --workdir')
    run.begin()
    return
  run.written, run.trained = set(record['files']) - {RECORD}, set(record['trainings'])
  try:
    found = check(workdir, config)
  except CheckpointError:
    if not run.keeping.restart:
      raise
    return  # The earlier run stays until the new one begins to write.
  if run.keeping.restart and not run.cell:
    return
  run.config = found
  if record['finished']:
    run.rows, run.finished = _read_rows(workdir), True
    changed = changed_versions(record['versions'])
    versions = f', with other versions ({changed})' if changed else ''
    print(f'{workdir} holds a finished run of this configuration{versions}; --restart runs it again')
  elif trainings(workdir):
    run.begun = True
    run.open_events()
    run.note()
    hint = '' if run.cell else '; --restart begins anew'
    print(f'{workdir} holds an unfinished run of this configuration, which goes on{hint}')
  else:
    run.begin()


def check(workdir: files.PathLike, config: Any) -> dict[str, Any]:
  """Checks that a run can begin or resume in a directory. Returns its configuration, as values that JSON can store.

  If the directory holds an earlier run, the result is the configuration of that run, which may lack options that were
  added later. Otherwise the result is `config`. An earlier run that has neither checkpoints nor results is ignored.

  Raises:
    CheckpointError: if the earlier run has another configuration, if it is finished and its results cannot be read, or
      if its record cannot be read. If the configurations differ, the message names the fields that differ.
  """
  workdir = replacing.standing(files.as_path(workdir))
  record = read_record(workdir)
  if record is None or not (record['finished'] or trainings(workdir) or _has_results(workdir, record['files'])):
    return _plain(config)
  if fields := differences(record['config'], config):
    kind = 'a finished' if record['finished'] else 'an unfinished'
    advice = 'give another --workdir, the configuration of that run, or --restart to replace it'
    raise CheckpointError(f'{workdir} holds {kind} run of another configuration ({fields}); {advice}')
  if record['finished']:
    _read_rows(workdir)
  return record['config']


def differences(found: dict[str, Any], config: Any) -> str:
  """Returns the fields in which a stored configuration differs from `config`, as text; '' if there are none."""
  defaults = {field.name: field.default for field in dataclasses.fields(config)}  # For options newer than the run.
  there, here = files.plain(defaults) | found, _plain(config)
  names = [name for name in there | here if there.get(name) != here.get(name)]
  return '; '.join(f'{name}: {there.get(name)!r} there, {here.get(name)!r} asked for' for name in names)


def unfinished(workdir: files.PathLike) -> bool:
  """Returns whether a directory holds checkpoints of a run that is not finished."""
  record = read_record(workdir)
  return record is not None and not record['finished'] and bool(trainings(workdir))


def checkpoints_of(workdir: files.PathLike, training: str) -> pathlib.Path:
  """Returns the directory with the checkpoints of a training."""
  return pathlib.Path(workdir, 'checkpoints', training)


def tested_file(training: str) -> str:
  """Returns the name of the file with the values of one run on unseen tasks; see `Training.test`."""
  return f'per_task_{training}.npy'


def log_file(training: str) -> str:
  """Returns the name of the file with what the process of a training prints; see `jobs`."""
  return f'{replacing.JOBS}/{training}.log'


def changed_versions(before: dict[str, str]) -> str:
  """Returns, as text, the versions of Python and packages that have changed since an earlier run; '' if none has."""
  now = provenance.collect()['versions']
  return ', '.join(f'{name} {old} → {now.get(name, "none")}' for name, old in before.items() if now.get(name) != old)


def _plain(config: Any) -> dict[str, Any]:
  return files.plain(dataclasses.asdict(config))


def _read_rows(workdir: pathlib.Path) -> list[dict[str, Any]]:
  try:
    return list(json.loads((workdir / 'results.json').read_bytes())['rows'])
  except (OSError, KeyError, RecursionError, TypeError, ValueError) as e:
    reason = f'its results.json cannot be read ({e!r:.200})'
    raise CheckpointError(f'{workdir} holds a finished run, but {reason}; --restart runs it again') from e


def _has_results(workdir: files.PathLike, names: Sequence[str]) -> bool:
  results = [name for name in names if name == 'results.json' or name.startswith(('params_', 'model_'))]
  return any(pathlib.Path(workdir, name).exists() for name in results)


def _lock(workdir: pathlib.Path, held: contextlib.ExitStack) -> None:
  """Locks the directory. The lock is released when the exit stack `held` is closed, or when the process ends."""
  try:
    import fcntl

    directory = os.open(workdir, os.O_RDONLY)
    held.callback(os.close, directory)
    fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError as e:
    advice = 'wait until it has ended, or give another --workdir'
    raise files.WriterError(f'another program trains in {workdir}; {advice}') from e
  except (ImportError, OSError):  # Windows and some network file systems have no such locks.
    return
