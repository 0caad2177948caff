"""Checkpoints of a training by orbax: the latest and the best, written in the background, each whole or not there.

Of several processes one reads and writes them, and by itself: the arrays are whole in each.
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
"""So many are kept, so that there is one before the newest should that be damaged."""

_REMOVED = 'removed'  # Checkpoints are renamed into it before they are deleted, so that half of one is never seen.


class Checkpoint(NamedTuple):
  """One checkpoint, read.

  Attributes:
    step: meta-iterations done.
    state: the train state.
    metric: what `Checkpoints.save` was given; `None` without.
    versions: of the packages that wrote it.
  """

  step: int
  state: TrainState
  metric: float | None
  versions: dict[str, str]


class Checkpoints:
  """A directory of one training's checkpoints: STEP/state, the arrays by name, and STEP/about, what they are.

  To be closed, or used as a context: closing waits for what is still being written.

  Attributes:
    latest: the newest that can be read when the directory is opened; `None` where there is none.
    best: those of the greatest metric among them and older ones, the best first; of equals the later.
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
    """Opens the directory, made if need be; what is damaged or newer than `latest` is removed.

    Args:
      directory: of this training alone.
      like: a state of the structure, shapes and dtypes that checkpoints must have.
      config: stands in each checkpoint; those of another are refused.
      keep_best: how many with the greatest metric are kept beside the latest.
      report: told in a sentence of each that cannot be read.

    Raises:
      CheckpointError: those there are of another configuration or of other arrays, none can be read, or the directory
        cannot be written.
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
    """Returns the step of the newest, whether read or saved; -1 for none."""
    return self._last

  def save(self, state: TrainState, metric: float | None = None) -> None:
    """Begins to write a checkpoint, and returns when its arrays have been copied; does nothing if it is there.

    Args:
      state: of one run, or of R at the same step.
      metric: such as the accuracy on tasks to validate on; the greatest are kept.

    Raises:
      CheckpointError: this or the one before cannot be written.
    """
    import orbax.checkpoint as ocp

    step = int(np.max(state.step))
    if step == self._last:
      return
    arrays = {name: array for name, array in named_arrays(state).items() if array.size}  # orbax takes no other.
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
    """Returns when all is written.

    Raises:
      CheckpointError: it cannot be.
    """
    try:
      self._manager.wait_until_finished()
    except (OSError, ValueError) as e:
      raise self._unwritable(e) from e

  def close(self) -> None:
    """Waits, and frees what is held."""
    self.wait()
    self._manager.close()
    shutil.rmtree(self._directory / _REMOVED, ignore_errors=True)

  def _refuse_links(self) -> None:
    """Raises CheckpointError where a step is a link, which `steps` leaves out and orbax takes for a checkpoint."""
    for path in self._directory.glob('[0-9]*') if self._directory.is_dir() else ():
      if path.name.isdecimal() and path.is_symlink():
        raise CheckpointError(f'{path} is a link, not a checkpoint; remove the link, or give another --workdir')

  def _read_best(self, like) -> list[Checkpoint]:
    """Reads the best, and removes what is damaged or newer than the latest."""
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
    """Removes what orbax would have, had the program not been killed between writing one and removing another."""
    for step in steps(self._directory):
      path = self._directory / str(step)
      try:
        _check_files(path)
      except Exception as e:  # Orbax, which opens them all, would raise it anew.
        self._report(f'checkpoint {path} is damaged ({_first_line(e)}), and removed')
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
    if self._keep_best:  # With the best alone, the newest would go, and a training with it.
      kept.append(policies.BestN(get_metric_fn=metric, n=self._keep_best, keep_checkpoints_without_metrics=False))
    options = ocp.CheckpointManagerOptions(
      preservation_policy=policies.AnyPreservationPolicy(kept),
      best_fn=metric if self._keep_best else None,
      cleanup_tmp_directories=True,
      todelete_subdir=_REMOVED,
      create=False,  # It is there; orbax makes none for a process by itself.
      multiprocessing_options=_by_itself(),
    )
    return ocp.CheckpointManager(self._directory, options=options)

  def _unwritable(self, e: Exception) -> CheckpointError:
    return CheckpointError(
      f'a checkpoint cannot be written to {self._directory} ({_first_line(e)}); make room, or give another --workdir'
    )


def steps(directory: files.PathLike) -> list[int]:
  """Returns the steps of a directory's checkpoints, damaged ones too, in order; none where there is no directory."""
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
  """Returns a directory's newest checkpoint that can be read, or `None` where there is none; changes nothing.

  Args:
    directory: of one training.
    like: a state of the structure, shapes and dtypes that it must have.
    config: that it must have been written with.
    until: the last step to look at.
    report: told in a sentence of each that cannot be read.

  Raises:
    CheckpointError: it is of another configuration or of other arrays, or none can be read.
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
    except Exception as e:  # What orbax and tensorstore raise for a damaged file is of many kinds.
      before = [s for s in there if s < step]
      then = f'; the one before, {before[-1]}, is taken' if before else ''
      report(f'checkpoint {path / str(step)} cannot be read ({_first_line(e)}){then}')
  if there:
    raise CheckpointError(f'none of the checkpoints in {path} can be read; give --restart to begin anew')
  return None


def read_config(directory: files.PathLike) -> dict[str, Any] | None:
  """Returns the configuration of the newest checkpoint whose description can be read; `None` without one."""
  for step in reversed(steps(directory)):
    try:
      return _read_about(pathlib.Path(directory).absolute() / str(step))['config']
    except Exception:  # Damaged; whoever reads the arrays tells of it.
      continue
  return None


def _read(path: pathlib.Path, like: TrainState) -> Checkpoint:
  """Returns a checkpoint in the structure of `like`; raises CheckpointError if it is of other arrays."""
  import orbax.checkpoint as ocp

  about = _read_about(path)
  check_leaves(about['leaves'], like, path)
  _check_arrays(path / 'state', about['leaves'])
  arrays: dict[str, np.ndarray] = {}
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(), multiprocessing_options=_by_itself()) as reader:
    for name in (name for name, leaf in about['leaves'].items() if 0 not in leaf['shape']):
      # One at a time: where one of several is damaged, orbax leaves the others to a loop that is closed, and Python
      # prints a traceback for each.
      which = {name: ocp.RestoreArgs(restore_type=np.ndarray)}
      args = ocp.args.PyTreeRestore(item={name: 0}, restore_args=which, partial_restore=True)
      arrays |= reader.restore(path / 'state', args=args)
  values = []
  for name, leaf in named(like):
    described = about['leaves'][name]
    array = np.asarray(arrays[name] if name in arrays else np.zeros(described['shape'], described['dtype']))
    if crc32(array) != described['crc32']:
      raise ValueError(f'{name} is not what was written')
    value = jax.numpy.asarray(array, described['dtype'])
    values.append(jax.random.wrap_key_data(value, impl=jax.random.key_impl(leaf)) if is_key(leaf) else value)
  state = jax.tree.unflatten(jax.tree.structure(like), values)
  if np.any(np.asarray(state.step) != about['step']):
    raise ValueError(f'its state is of step {int(np.max(state.step))}, its description of {about["step"]}')
  return Checkpoint(about['step'], state, about['metric'], about['versions'])


def _read_about(path: pathlib.Path) -> dict[str, Any]:
  """Returns a checkpoint's description; raises ValueError if it is not what was written."""
  import orbax.checkpoint as ocp

  _check_files(path)
  with ocp.Checkpointer(ocp.CompositeCheckpointHandler(), multiprocessing_options=_by_itself()) as reader:
    about = reader.restore(path, args=ocp.args.Composite(about=ocp.args.JsonRestore()))['about']
  check_about(about, int(path.name))
  return about


def _check_arrays(path: pathlib.Path, described: Mapping[str, Any]) -> None:
  """Raises ValueError unless arrays are of the shapes described, before room is made for any.

  By tensorstore, which orbax reads them with, since orbax itself looks at all at once; see `_read`.
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
    chunk = array.chunk_layout.read_chunk.shape or ()  # Of a scalar there is none.
    # A chunk is decoded whole, however little of it is asked for.
    if math.prod(side or 1 for side in chunk) > math.prod(array.shape):
      raise ValueError(f'{name} is {leaf["dtype"]}{leaf["shape"]} in chunks of {list(chunk)}')


def _by_itself():
  """Returns options with which orbax does not wait for other processes."""
  from orbax.checkpoint.options import MultiprocessingOptions

  if jax.process_count() == 1:
    return MultiprocessingOptions()
  here = jax.process_index()
  return MultiprocessingOptions(primary_host=here, active_processes={here})


def _check_files(path: pathlib.Path) -> None:
  """Raises ValueError where orbax would wait for ever, at what is no file, or fail, at broken metrics or dates."""
  for part in path.rglob('*'):
    if part.is_symlink() or not (part.is_file() or part.is_dir()):
      raise ValueError(f'{part.relative_to(path)} is no file')
  metrics = path / 'metrics' / 'metrics'
  if metrics.exists():
    found = json.loads(metrics.read_bytes())
    # Orbax sorts checkpoints by this number, and lets a training fail at any other kind of value.
    if not isinstance(found, dict) or not isinstance(found.get('metric', 0.0), int | float):
      raise ValueError('its metrics are not those of a checkpoint')
  import orbax.checkpoint as ocp

  _ = ocp.path.step.standard_name_format().find_step(path.parent, int(path.name)).commit_timestamp


def _remove(path: pathlib.Path) -> None:
  """Deletes a checkpoint so that half of it is never seen."""
  aside = path.parent / _REMOVED
  _clear(aside)
  aside.mkdir(exist_ok=True)
  path.rename(aside / path.name)
  shutil.rmtree(aside, ignore_errors=True)


def _clear(aside: pathlib.Path) -> None:
  """Deletes the directory of what is removed; of a link, which may lead anywhere, the link alone."""
  if aside.is_symlink() or aside.is_file():
    aside.unlink()
  shutil.rmtree(aside, ignore_errors=True)


def _first_line(e: BaseException) -> str:
  text = str(e).strip()
  return (text.splitlines()[0] if text else type(e).__name__)[:200]
