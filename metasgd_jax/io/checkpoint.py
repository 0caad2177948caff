"""Checkpoints of a training run by orbax: the latest and the best, written in the background, never half-written.

With several processes, one of them reads and writes the checkpoints, and does not wait for the others. This is possible
because each process has the whole arrays.
"""

import json
import math
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from metasgd_jax.io import files
from metasgd_jax.io.checkpoint_record import CheckpointError, check_about, check_config, check_leaves, crc32, describe
from metasgd_jax.outer.training import TrainState
from metasgd_jax.tree import is_key, named, named_arrays

LATEST = 2
"""Number of latest checkpoints that are kept. If the newest is damaged, the one before it can be read."""

_REMOVED = 'removed'  # A checkpoint is moved into this folder before it is deleted, so that no half of it is ever seen.


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


class Checkpoints:
  """The checkpoints of one training run in a directory: STEP/state has the arrays by name, STEP/about describes them.

  The object must be closed, or used as a context manager. Closing waits until all checkpoints are written.

  Attributes:
    latest: Newest checkpoint that could be read when the directory was opened, or `None` if there was none.
    best: The `keep_best` checkpoints with the greatest metrics among `latest` and the older ones, the best first. If
      two metrics are equal, the later checkpoint comes first.
  """

  def __init__(
    self,
    directory: files.PathLike,
    *,
    like: TrainState,
    config: Mapping[str, Any],
    keep_best: int = 0,
    report: Callable[[str], None] = print,
  ):
    """Opens the directory, and creates it if necessary. Removes checkpoints that are damaged or newer than `latest`.

    Args:
      directory: Directory of this training run alone.
      like: A state with the structure, shapes and dtypes that the checkpoints must have.
      config: Configuration, which is stored in each checkpoint. Checkpoints of another configuration are refused.
      keep_best: Number of checkpoints with the greatest metrics that are kept in addition to the latest.
      report: Function that receives a sentence about each checkpoint that cannot be read.

    Raises:
      CheckpointError: if the checkpoints have another configuration or other arrays, if none of them can be read, or if
        the directory cannot be written.
    """
    self._directory = pathlib.Path(directory).absolute()
    self._config, self._keep_best, self._report = config, keep_best, report
    self._refuse_links()
    self.latest = newest(self._directory, like=like, config=config, report=report)
    self._last = -1 if self.latest is None else self.latest.step
    try:
      self.best = self._read_best(like)
      self._tidy()
      self._directory.mkdir(parents=True, exist_ok=True)
      self._manager = self._open()
    except OSError as e:
      raise self._unwritable(e) from e

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, *_) -> None:
    self.close()

  @property
  def last(self) -> int:
    """Step of the newest checkpoint, whether it was read or saved, or -1 if there is none."""
    return self._last

  def save(self, state: TrainState, metric: float | None = None) -> None:
    """Begins to write a checkpoint, and returns when its arrays have been copied.

    Does nothing if the newest checkpoint already has the step of `state`.

    Args:
      state: State of one run, or of R runs at the same step.
      metric: Metric of the state, such as the validation accuracy. Checkpoints with the greatest metrics are kept.

    Raises:
      CheckpointError: if this checkpoint, or the one before it, cannot be written.
    """
    import orbax.checkpoint as ocp

    step = int(np.max(state.step))
    if step == self._last:
      return
    arrays = {name: array for name, array in named_arrays(state).items() if array.size}  # orbax refuses empty arrays.
    about = describe(state, step=step, metric=metric, config=self._config)
    items = ocp.args.Composite(state=ocp.args.StandardSave(arrays), about=ocp.args.JsonSave(about))
    self.wait()
    try:
      _clear(self._directory / _REMOVED)
      self._manager.save(step, args=items, metrics={} if metric is None else {'metric': metric}, force=True)
    except (OSError, ValueError) as e:  # tensorstore raises ValueError for a full or vanished disk.
      raise self._unwritable(e) from e
    self._last = step

  def wait(self) -> None:
    """Waits until all checkpoints are written.

    Raises:
      CheckpointError: if a checkpoint cannot be written.
    """
    try:
      self._manager.wait_until_finished()
    except (OSError, ValueError) as e:
      raise self._unwritable(e) from e

  def close(self) -> None:
    """Waits until all checkpoints are written, and releases the resources of orbax."""
    self.wait()
    self._manager.close()
    shutil.rmtree(self._directory / _REMOVED, ignore_errors=True)

  def _refuse_links(self) -> None:
    """Raises CheckpointError if a step is a link. `steps` ignores links, but orbax would read one as a checkpoint."""
    for path in self._directory.glob('[0-9]*') if self._directory.is_dir() else ():
      if path.name.isdecimal() and path.is_symlink():
        raise CheckpointError(f'{path} is a link, not a checkpoint; remove the link, or give another --workdir')

  def _read_best(self, like) -> list[Checkpoint]:
    """Returns the best checkpoints, and removes checkpoints that are damaged or newer than the latest."""
    found = []
    for step in steps(self._directory):
      path = self._directory / str(step)
      if step > self._last:
        _remove(path)
      elif self._keep_best and step < self._last:
        try:
          found.append(_read(path, like))
        except Exception as e:
          self._report(f'checkpoint {path} cannot be read ({_first_line(e)}); the best are chosen without it')
          _remove(path)
    if self.latest is not None:
      found.append(self.latest)
    found = [checkpoint for checkpoint in found if checkpoint.metric is not None]
    found.sort(key=lambda checkpoint: (checkpoint.metric, checkpoint.step), reverse=True)
    return found[: self._keep_best]

  def _tidy(self) -> None:
    """Removes damaged checkpoints, and old ones that are left over.

    Old checkpoints are left over if the program was killed after orbax wrote a new checkpoint, and before it removed an
    old one.
    """
    for step in steps(self._directory):
      path = self._directory / str(step)
      try:
        _check_files(path)
      except Exception as e:  # Orbax opens all checkpoints, and would raise the error again.
        self._report(f'checkpoint {path} is damaged ({_first_line(e)}) and is removed')
        _remove(path)
    there = steps(self._directory)
    for step in {*there[:-LATEST]} - {checkpoint.step for checkpoint in self.best}:
      _remove(self._directory / str(step))

  def _open(self):
    import orbax.checkpoint as ocp
    from orbax.checkpoint import checkpoint_managers as policies

    _clear(self._directory / _REMOVED)
    metric = lambda metrics: metrics.get('metric', -np.inf)
    kept: list[Any] = [policies.LatestN(LATEST)]
    if self._keep_best:  # With BestN alone, orbax would remove the newest, and the run could not resume.
      kept.append(policies.BestN(get_metric_fn=metric, n=self._keep_best, keep_checkpoints_without_metrics=False))
    options = ocp.CheckpointManagerOptions(
      preservation_policy=policies.AnyPreservationPolicy(kept),
      best_fn=metric if self._keep_best else None,
      cleanup_tmp_directories=True,
      todelete_subdir=_REMOVED,
      create=False,  # It exists already, and orbax does not create it for one process of several.
      multiprocessing_options=_by_itself(),
    )
    return ocp.CheckpointManager(self._directory, options=options)

  def _unwritable(self, e: Exception) -> CheckpointError:
    return CheckpointError(
      f'a checkpoint cannot be written to {self._directory} ({_first_line(e)}); make room, or give another --workdir'
    )


def steps(directory: files.PathLike) -> list[int]:
  """Returns the steps of the checkpoints in a directory, in order, including damaged checkpoints.

  If there is no such directory, the list is empty.
  """
  path = pathlib.Path(directory)
  if not path.is_dir():
    return []
  return sorted(int(p.name) for p in path.iterdir() if _is_step(p.name) and p.is_dir() and not p.is_symlink())


def _is_step(name: str) -> bool:
  return name.isdecimal() and name == str(int(name))


def newest(
  directory: files.PathLike,
  *,
  like: TrainState,
  config: Mapping[str, Any],
  until: int | None = None,
  report: Callable[[str], None] = print,
) -> Checkpoint | None:
  """Returns the newest checkpoint in a directory that can be read, or `None` if there is none. It changes no files.

  Args:
    directory: Directory of one training run.
    like: A state with the structure, shapes and dtypes that the checkpoint must have.
    config: Configuration that the checkpoint must have been written with.
    until: Last step to consider. By default all steps are considered.
    report: Function that receives a sentence about each checkpoint that cannot be read.

  Raises:
    CheckpointError: if the checkpoint has another configuration or other arrays, or if no checkpoint can be read.
  """
  path = pathlib.Path(directory).absolute()
  there = [step for step in steps(path) if until is None or step <= until]
  for step in reversed(there):
    try:
      about = _read_about(path / str(step))
      check_config(about['config'], config, path)
      return _read(path / str(step), like)
    except CheckpointError:
      raise
    except Exception as e:  # For a damaged file, orbax and tensorstore raise errors of many types.
      before = [s for s in there if s < step]
      then = f'; the one before, {before[-1]}, is taken' if before else ''
      report(f'checkpoint {path / str(step)} cannot be read ({_first_line(e)}){then}')
  if there:
    raise CheckpointError(f'none of the checkpoints in {path} can be read; give --restart to start again')
  return None


def read_config(directory: files.PathLike) -> dict[str, Any] | None:
  """Returns the configuration of the newest checkpoint whose description can be read, or `None` if there is none."""
  for step in reversed(steps(directory)):
    try:
      return _read_about(pathlib.Path(directory).absolute() / str(step))['config']
    except Exception:  # The damage is reported when the arrays are read.
      continue
  return None


def _read(path: pathlib.Path, like: TrainState) -> Checkpoint:
  """Returns a checkpoint in the structure of `like`. Raises CheckpointError if its arrays do not fit `like`."""
  import orbax.checkpoint as ocp

  about = _read_about(path)
  check_leaves(about['leaves'], like, path)
  _check_arrays(path / 'state', about['leaves'])
  arrays: dict[str, np.ndarray] = {}
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(), multiprocessing_options=_by_itself()) as reader:
    for name in (name for name, leaf in about['leaves'].items() if 0 not in leaf['shape']):
      # Arrays are read one at a time. If one of several arrays is damaged, orbax leaves the others to a closed event
      # loop, and Python prints a traceback for each of them.
      which = {name: ocp.RestoreArgs(restore_type=np.ndarray)}
      args = ocp.args.PyTreeRestore(item={name: 0}, restore_args=which, partial_restore=True)
      arrays |= reader.restore(path / 'state', args=args)
  values = []
  for name, leaf in named(like):
    described = about['leaves'][name]
    array = np.asarray(arrays[name] if name in arrays else np.zeros(described['shape'], described['dtype']))
    if crc32(array) != described['crc32']:
      raise ValueError(f'{name} has changed since it was written')
    value = jax.numpy.asarray(array, described['dtype'])
    values.append(jax.random.wrap_key_data(value, impl=jax.random.key_impl(leaf)) if is_key(leaf) else value)
  state = jax.tree.unflatten(jax.tree.structure(like), values)
  if np.any(np.asarray(state.step) != about['step']):
    raise ValueError(f'its state is of step {int(np.max(state.step))}, its description of {about["step"]}')
  return Checkpoint(about['step'], state, about['metric'], about['versions'])


def _read_about(path: pathlib.Path) -> dict[str, Any]:
  """Returns the description of a checkpoint. Raises ValueError if it has changed since it was written."""
  import orbax.checkpoint as ocp

  _check_files(path)
  with ocp.Checkpointer(ocp.CompositeCheckpointHandler(), multiprocessing_options=_by_itself()) as reader:
    about = reader.restore(path, args=ocp.args.Composite(about=ocp.args.JsonRestore()))['about']
  check_about(about, int(path.name))
  return about


def _check_arrays(path: pathlib.Path, described: Mapping[str, Any]) -> None:
  """Raises ValueError unless the arrays have the described shapes, before memory is allocated for any of them.

  The check uses tensorstore, with which orbax reads the arrays, because orbax itself would inspect all arrays at once;
  see `_read`.
  """
  import tensorstore

  driver = 'zarr3' if json.loads((path / '_METADATA').read_bytes()).get('use_zarr3') else 'zarr'
  for name, leaf in described.items():
    if 0 in leaf['shape']:
      continue
    base = {'driver': 'file', 'path': f'{path}/'}
    spec = {'driver': driver, 'kvstore': {'driver': 'ocdbt', 'base': base, 'path': f'{name}/'}}
    array = tensorstore.open(spec, open=True, read=True).result()
    if list(array.shape) != leaf['shape'] or array.dtype.name != leaf['dtype']:
      raise ValueError(f'{name} is {array.dtype.name}{list(array.shape)}, not {leaf["dtype"]}{leaf["shape"]}')
    chunk = array.chunk_layout.read_chunk.shape or ()  # A scalar has no chunk shape.
    # The whole chunk is decoded, even if the array needs only a small part of it.
    if math.prod(side or 1 for side in chunk) > math.prod(array.shape):
      raise ValueError(f'{name} is {leaf["dtype"]}{leaf["shape"]} in larger chunks of {list(chunk)}')


def _by_itself():
  """Returns options with which orbax does not wait for other processes."""
  from orbax.checkpoint.options import MultiprocessingOptions

  if jax.process_count() == 1:
    return MultiprocessingOptions()
  here = jax.process_index()
  return MultiprocessingOptions(primary_host=here, active_processes={here})


def _check_files(path: pathlib.Path) -> None:
  """Raises ValueError if orbax would wait forever or fail.

  It would wait for a pipe or another special file, and it would fail on broken metrics or dates.
  """
  for part in path.rglob('*'):
    if part.is_symlink() or not (part.is_file() or part.is_dir()):
      raise ValueError(f'{part.relative_to(path)} is no file')
  metrics = path / 'metrics' / 'metrics'
  if metrics.exists():
    found = json.loads(metrics.read_bytes())
    # Orbax sorts checkpoints by this number. Any other kind of value would make a training run fail.
    if not isinstance(found, dict) or not isinstance(found.get('metric', 0.0), int | float):
      raise ValueError('its metrics are not a JSON object whose metric is a number')
  import orbax.checkpoint as ocp

  _ = ocp.path.step.standard_name_format().find_step(path.parent, int(path.name)).commit_timestamp


def _remove(path: pathlib.Path) -> None:
  """Deletes a checkpoint in such a way that no half of it is ever seen."""
  aside = path.parent / _REMOVED
  _clear(aside)
  aside.mkdir(exist_ok=True)
  path.rename(aside / path.name)
  shutil.rmtree(aside, ignore_errors=True)


def _clear(aside: pathlib.Path) -> None:
  """Deletes the directory of removed checkpoints. If it is a link, which may lead anywhere, deletes only the link."""
  if aside.is_symlink() or aside.is_file():
    aside.unlink()
  shutil.rmtree(aside, ignore_errors=True)


def _first_line(e: BaseException) -> str:
  text = str(e).strip()
  return (text.splitlines()[0] if text else type(e).__name__)[:200]
