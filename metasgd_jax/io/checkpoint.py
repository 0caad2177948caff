"""Writes and reads the latest and the best checkpoints of a training run with orbax.

The checkpoints are written in the background. A checkpoint is never half-written.

If a run has several processes, its program must read and write the checkpoints in only one process. After that process
has read a state, the program must send the state to the other processes. The process that reads and writes does not
wait for the others and needs nothing from them, because each process has complete copies of the arrays.
"""

import contextlib
import json
import math
import pathlib
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from metasgd_jax.io import files, provenance
from metasgd_jax.outer.training import TrainState
from metasgd_jax.tree import first_difference, from_named_arrays, leaf_types, named, named_arrays
from metasgd_jax.types import check_count

LATEST = 2
"""Number of latest checkpoints that are kept. If the newest is damaged, the one before it can be read."""

Config = Mapping[str, Any]
Report = Callable[[str], None]

# Orbax moves a checkpoint into this folder before it deletes its files, so that no checkpoint is found half-deleted.
_REMOVED = '.metasgd_removed'

# Bytes of a checkpoint besides its arrays, at most: names, types, configuration and the files of orbax.
_MARGIN = 1 << 18

# A folder with a step's name is a checkpoint only if it has one of these.
_PARTS = ('state', 'about', '_CHECKPOINT_METADATA')


class CheckpointError(Exception):
  """A checkpoint cannot be used or written. The message says why, and what to do."""


class Checkpoint(NamedTuple):
  """A checkpoint that has been read.

  Attributes:
    step: Number of meta-iterations done.
    state: The train state.
    metric: Metric that was passed to `Checkpoints.save`, or `None` if there was none.
    versions: Versions of the packages that wrote the checkpoint.
  """

  step: int
  state: TrainState
  metric: float | None
  versions: dict[str, str]


def rank(metric: float, step: int) -> tuple[bool, float, int]:
  """Returns a key that sorts checkpoints from the worst to the best.

  The best checkpoint has the greatest metric. If two metrics are equal, the later checkpoint is better. A metric that
  is NaN is the worst of all, because a comparison with NaN is never true and gives no order.
  """
  return (False, 0.0, step) if math.isnan(metric) else (True, metric, step)


class Checkpoints(contextlib.AbstractContextManager):
  """The checkpoints of one training run, in one directory.

  The folder STEP/state contains the arrays of a checkpoint by name. The folder STEP/about contains their types and
  checksums, the metric, the configuration and the versions of the software.

  The object must be closed, or used as a context manager. Closing waits until all checkpoints are written.

  Attributes:
    latest: Newest checkpoint that could be read when the directory was opened, or `None` if there was none. It does not
      change when a checkpoint is saved.
    best: The `keep_best` checkpoints with the greatest metrics when the directory was opened, the best first. If two
      metrics are equal, the later checkpoint comes first. A metric that is NaN comes last. The list does not change
      when a checkpoint is saved.
    last: Step of the newest checkpoint, or -1 if there is none. Unlike `latest`, it changes when `save` is called.
  """

  def __init__(
    self, directory: files.PathLike, *, like: TrainState, config: Config, keep_best: int = 0, report: Report = print
  ):
    """Opens the directory, and creates it if necessary.

    Checkpoints that are newer than the newest readable one are removed.

    Args:
      directory: Directory for the checkpoints of this training run. It may begin with ~. No other run may use the
        directory.
      like: A state with the structure, shapes and dtypes that the checkpoints must have.
      config: Configuration, which is stored in each checkpoint. Checkpoints of another configuration are refused.
      keep_best: Number of checkpoints with the greatest metrics that are kept in addition to the latest.
      report: Function that receives a sentence about each checkpoint that cannot be read.

    Raises:
      CheckpointError: if the configuration of the checkpoints is not `config`, if their arrays do not match `like`, if
        none of them can be read, if the directory cannot be written, or if it has a folder whose name is a number and
        which is no checkpoint, because orbax would remove it.
      ValueError: if `keep_best` is no integer of at least 0, if `config` is no mapping or JSON cannot store it, or if
        the path of the directory is not UTF-8, because orbax cannot write there.
    """
    check_count('keep_best', keep_best, 0)
    self._directory, self._config = files.as_utf8_path(directory), _as_json(config)
    if foreign := [path for path in _step_folders(self._directory) if not _is_checkpoint(path)]:
      raise CheckpointError(
        f'{foreign[0]} is no checkpoint, but has the name of one; move it away, or give another directory'
      )
    self.latest = newest(self._directory, like=like, config=self._config, report=report)
    self.last = -1 if self.latest is None else self.latest.step
    there = [step for step in steps(self._directory) if step <= self.last]
    older = [self._directory / str(step) for step in there[:-1]] if keep_best else []
    found = [
      _try_read(path, like, self._config, report, 'it is left out when the best checkpoints are chosen')
      for path in older
    ] + [self.latest]
    with_metric = [checkpoint for checkpoint in found if checkpoint and checkpoint.metric is not None]
    self.best = sorted(with_metric, key=lambda c: rank(c.metric, c.step), reverse=True)[:keep_best]
    self._metrics = {checkpoint.step: checkpoint.metric for checkpoint in self.best}
    options = ocp.CheckpointManagerOptions(
      preservation_policy=_LatestAndBest(keep_best, self._metrics),
      cleanup_tmp_directories=True,
      todelete_subdir=_REMOVED,
      lightweight_initialize=True,  # Otherwise orbax would raise an error if a file of any checkpoint is damaged.
      create=False,  # Orbax cannot create the directory if `active_processes` is set.
      multiprocessing_options=_by_itself(),
    )
    with self._told():
      self._directory.mkdir(parents=True, exist_ok=True)
      self._manager = ocp.CheckpointManager(self._directory, options=options)
      self.wait()
      # A run that was killed may have left older checkpoints, which orbax would have removed a moment later.
      for step in {*self._manager.all_steps()} - {*there[-LATEST:], *self._metrics}:
        self._manager.delete(step)

  def __exit__(self, *_) -> None:
    self.close()

  def save(self, state: TrainState, metric: float | None = None) -> None:
    """Begins to write a checkpoint in the background, and returns as soon as its arrays have been copied.

    The method does nothing if the newest checkpoint already has the step of `state`.

    Args:
      state: State of one run, or of R runs at the same step.
      metric: Metric of the state, such as the validation accuracy. It may be any real scalar. Checkpoints with the
        greatest metrics are kept; NaN is less than every number.

    Raises:
      CheckpointError: if this checkpoint, or the one before it, cannot be written.
      ValueError: if `metric` is an array with axes.
    """
    if shape := getattr(metric, 'shape', ()):
      raise ValueError(f'metric must be one number, got an array of shape {shape}; give its mean')
    step = int(np.max(state.step))
    if step == self.last:
      return
    about: dict[str, Any] = {'metric': None, 'config': self._config, 'versions': provenance.collect()['versions']}
    if metric is not None:
      about['metric'] = self._metrics[step] = float(metric)
    arrays = named_arrays(state)
    about['leaves'] = leaf_types(state)
    about['crc32'] = {name: zlib.crc32(array.tobytes()) for name, array in arrays.items()}
    about['checksum'] = _checksum(about)
    stored = {name: array for name, array in arrays.items() if array.size}  # Orbax refuses empty arrays.
    self._check_space(sum(array.nbytes for array in stored.values()))
    items = ocp.args.Composite(state=ocp.args.StandardSave(stored), about=ocp.args.JsonSave(about))
    self.wait()
    with self._told():
      self._manager.save(step, args=items, force=True)
    self.last = step

  def wait(self) -> None:
    """Waits until all checkpoints are written.

    Raises:
      CheckpointError: if a checkpoint cannot be written.
    """
    with self._told():
      self._manager.wait_until_finished()
    shutil.rmtree(self._directory / _REMOVED, ignore_errors=True)

  def close(self) -> None:
    """Waits until all checkpoints are written, and releases the resources of orbax."""
    self.wait()
    self._manager.close()

  def _check_space(self, needed: int) -> None:
    """Raises CheckpointError if the disk has no room. Orbax would find out in a thread, and print many tracebacks."""
    with self._told():
      free = shutil.disk_usage(self._directory).free
      if free < needed + _MARGIN:
        raise OSError(f'{needed:,} bytes are needed, and {free:,} are free on the disk')

  @contextlib.contextmanager
  def _told(self) -> Iterator[None]:
    try:
      yield
    except (OSError, ValueError) as e:  # tensorstore raises ValueError for a full or vanished disk.
      raise CheckpointError(
        f'a checkpoint cannot be written to {self._directory} ({files.first_line(e)}); '
        'free disk space, or give another directory'
      ) from e


class _LatestAndBest(NamedTuple):
  """A preservation policy of orbax. It keeps the latest checkpoints and the `keep_best` ones with the greatest metrics.

  Orbax's own policy for the best checkpoints reads the metrics from files, and raises an error if a file is damaged.
  """

  keep_best: int
  metrics: dict[int, Any]  # Metrics by step. `Checkpoints.save` adds each new metric.

  def should_preserve(self, checkpoints, *, context) -> list[bool]:
    there = [checkpoint.step for checkpoint in checkpoints]
    best = sorted(self.metrics, key=lambda step: rank(self.metrics[step], step), reverse=True)[: self.keep_best]
    return [step in there[-LATEST:] or step in best for step in there]


def steps(directory: files.PathLike) -> list[int]:
  """Returns the steps of the checkpoints in a directory, in order, including damaged checkpoints.

  If there is no such directory, the list is empty. A folder whose name is a number, but which contains no part of a
  checkpoint, is left out.
  """
  return sorted(int(path.name) for path in _step_folders(files.as_path(directory)) if _is_checkpoint(path))


def remove_all(directory: files.PathLike) -> None:
  """Removes all checkpoints of a directory, and the directory itself if nothing else is in it.

  The directory must not be in use. A checkpoint that was being written when the program was killed is removed too.
  """
  directory = files.as_path(directory)
  half_written = [path for path in directory.glob('*.orbax-checkpoint-tmp*') if path.is_dir()]
  removed = directory / _REMOVED
  for path in [*(directory / str(step) for step in steps(directory)), *half_written]:
    removed.mkdir(exist_ok=True)
    path.rename(removed / path.name)
  shutil.rmtree(removed, ignore_errors=True)
  with contextlib.suppress(OSError):  # It holds other files, or does not exist.
    directory.rmdir()


def _step_folders(directory: pathlib.Path) -> list[pathlib.Path]:
  return [directory / str(found.step) for found in ocp.path.step.standard_name_format().find_all(directory)]


def _is_checkpoint(path: pathlib.Path) -> bool:
  return any((path / part).exists() for part in _PARTS)


def newest(
  directory: files.PathLike, *, like: TrainState, config: Config, until: int | None = None, report: Report = print
) -> Checkpoint | None:
  """Returns the newest readable checkpoint of a directory. No file is changed.

  If the directory has no checkpoint at all up to the step `until`, the result is `None`.

  Args:
    directory: Directory of one training run.
    like: A state with the structure, shapes and dtypes that the checkpoint must have.
    config: Configuration that the checkpoint must have been written with.
    until: Last step to consider. By default all steps are considered.
    report: Function that receives a sentence about each checkpoint that cannot be read.

  Raises:
    CheckpointError: if the checkpoint has another configuration or other arrays, or if there are checkpoints and
      none of them can be read.
    ValueError: if `config` is no mapping, or if JSON cannot store it.
  """
  path, config = files.as_path(directory).absolute(), _as_json(config)
  there = [step for step in steps(path) if until is None or step <= until]
  if not there:
    return None
  while there:
    step = there.pop()
    otherwise = f'the checkpoint before it, {there[-1]}, is used' if there else 'there is no checkpoint before it'
    if found := _try_read(path / str(step), like, config, report, otherwise):
      return found
  raise CheckpointError(f'none of the checkpoints in {path} can be read; remove them, or give another directory')


def check_config(found: Config, asked: Config, where: files.PathLike) -> None:
  """Raises CheckpointError unless `found` and `asked` are equal. The message names the fields that differ."""
  ours = json.loads(json.dumps(asked))
  differ = [name for name in {**found, **ours} if (name in found, found.get(name)) != (name in ours, ours.get(name))]
  if differ:
    there, here = ({name: repr(value) for name, value in config.items()} for config in (found, ours))
    fields = [f'{n}: {there.get(n, "nothing")} there, {here.get(n, "nothing")} asked for' for n in differ]
    raise CheckpointError(
      f'{where} holds an unfinished run of another configuration ({"; ".join(fields)}); give another directory, or the '
      'same configuration to continue that run'
    )


def _as_json(config: Config) -> dict[str, Any]:
  """Returns a configuration as it is read back after JSON has stored it. Raises ValueError if JSON cannot store it."""
  if not isinstance(config, Mapping):
    raise ValueError(f'config must be a mapping, such as a dict of settings, got {config!r:.80}; give {{}} for none')
  return files.as_json('config', config, allow_nan=True)


def _by_itself():
  """Returns options with which orbax does not wait for other processes."""
  here = jax.process_index()
  return ocp.options.MultiprocessingOptions(primary_host=here, active_processes={here})


def _try_read(path: pathlib.Path, like: TrainState, config: Config, report: Report, otherwise: str):
  """Returns the checkpoint at `path`, or `None` if it is damaged.

  If the checkpoint is damaged, `report` receives a sentence that gives the reason and ends with the text `otherwise`.
  This text says what is done without the checkpoint.
  """
  try:
    return _read(path, like, config)
  except CheckpointError:
    raise
  except Exception as e:  # For a damaged file, orbax and tensorstore raise errors of many types.
    report(f'checkpoint {path} cannot be read ({files.first_line(e)}); {otherwise}')
    return None


def _read(path: pathlib.Path, like: TrainState, config: Config) -> Checkpoint:
  """Returns a checkpoint in the structure of `like`. If it is damaged, an exception of any type may be raised.

  Raises:
    CheckpointError: if the configuration is not `config`, or if the arrays do not fit `like`.
  """
  about = _read_about(path)
  check_config(about['config'], config, path.parent)
  if difference := first_difference(about['leaves'], leaf_types(like)):
    raise CheckpointError(
      f'checkpoint {path} does not fit the state that is trained: {difference}; give another directory'
    )
  arrays = {}
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(), multiprocessing_options=_by_itself()) as reader:
    for name, leaf in named(like):
      # Each array is read by a separate call. If one call read all arrays and one array were damaged, orbax would close
      # the event loop while the other arrays are being read, and Python would print a traceback for each of them.
      only = ocp.args.PyTreeRestore(item={name: 0}, partial_restore=True)
      empty = np.size(leaf) == 0  # `save` has not stored it.
      arrays[name] = np.zeros(leaf.shape, leaf.dtype) if empty else reader.restore(path / 'state', args=only)[name]
      if zlib.crc32(arrays[name].tobytes()) != about['crc32'][name]:
        raise ValueError(f'its stored array {name} is damaged')
  return Checkpoint(int(path.name), from_named_arrays(arrays, like), about['metric'], about['versions'])


def _read_about(path: pathlib.Path) -> dict[str, Any]:
  """Returns the description of a checkpoint: its metric, configuration, versions, and its arrays' types and checksums.

  If the description is damaged, an exception is raised, which may be of any type.
  """
  about = json.loads((path / 'about' / 'metadata').read_bytes())
  if about.pop('checksum') != _checksum(about):
    raise ValueError('its file about/metadata is damaged')
  return about


def _checksum(value: Any) -> int:
  return zlib.crc32(json.dumps(value, sort_keys=True).encode())
