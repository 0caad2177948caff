"""What a run leaves behind: JSON, arrays and parameters, never half-written; metrics as they come; a progress line."""

import contextlib
import importlib.metadata
import json
import os
import pathlib
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any, Protocol

import flax.serialization
import jax
import numpy as np

from metasgd_jax.types import PyTree

PathLike = str | os.PathLike[str]

_PACKAGES = ('metasgd_jax', 'jax', 'jaxlib', 'optax', 'flax', 'chex', 'numpy', 'tensorflow-datasets')


class WriterError(Exception):
  """Something cannot be written; the message says why and what to do."""


def open_workdir(path: PathLike) -> pathlib.Path:
  """Returns the directory, made if need be, after writing to it once to see that it can be.

  Raises:
    WriterError: it cannot be made or written.
  """
  workdir = pathlib.Path(path).expanduser()
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=workdir):
      pass
  except OSError as e:
    raise WriterError(f'workdir {workdir} cannot be written ({e.strerror}); give another --workdir') from e
  return workdir


@contextlib.contextmanager
def atomic(path: PathLike) -> Iterator[IO[bytes]]:
  """Opens a file that takes its name only when it is whole; after an error the old one, or none, is there."""
  path = pathlib.Path(path)
  with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f'.{path.name}-', delete=False) as file:
    try:
      yield file
      file.flush()
      os.fsync(file.fileno())
      os.fchmod(file.fileno(), 0o644)
      pathlib.Path(file.name).replace(path)
    except BaseException:
      pathlib.Path(file.name).unlink()
      raise


def write_json(path: PathLike, value: Any) -> None:
  """Writes value as indented JSON; infinities and NaN become null, since JSON has neither."""
  with atomic(path) as file:
    file.write((json.dumps(_plain(value), indent=2, allow_nan=False) + '\n').encode())


def write_array(path: PathLike, array: np.ndarray) -> None:
  """Writes an array as .npy."""
  with atomic(path) as file:
    np.save(file, np.asarray(array))


def write_params(path: PathLike, params: PyTree) -> None:
  """Writes a pytree's arrays as flax's msgpack."""
  with atomic(path) as file:
    file.write(flax.serialization.to_bytes(jax.device_get(params)))


def read_params(path: PathLike, like: PyTree) -> PyTree:
  """Returns what `write_params` wrote, in the structure of `like`.

  Raises:
    ValueError: the file is not such a file, or its structure or a shape is not that of `like`.
  """
  data = pathlib.Path(path).read_bytes()
  try:
    params = flax.serialization.from_bytes(like, data)
  except Exception as e:  # msgpack has a dozen errors of its own for a file that is broken.
    raise ValueError(f'{path} does not hold the parameters asked for: {e}') from e
  for (name, want), got in zip(jax.tree_util.tree_leaves_with_path(like), jax.tree.leaves(params), strict=True):
    if np.shape(want) != np.shape(got):
      raise ValueError(
        f'{path} has shape {np.shape(got)} for {jax.tree_util.keystr(name)}, expected {np.shape(want)}; '
        'was it trained with other settings?'
      )
  return params


def provenance() -> dict[str, Any]:
  """Returns the versions and the device that a figure was made with."""
  versions = {'python': platform.python_version()}
  for name in _PACKAGES:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      versions[name] = importlib.metadata.version(name)
  devices = jax.devices()
  device = {'platform': devices[0].platform, 'kind': devices[0].device_kind, 'count': len(devices)}
  if devices[0].platform == 'cpu':
    device['cores'] = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    device['cpu'] = _cpu_model()
  return {'versions': versions, 'device': device}


class Writer(Protocol):
  """Takes a run's metrics as they come."""

  def write(self, label: str, step: int, values: Mapping[str, Any]) -> None:
    """Takes the values of one moment.

    Args:
      label: the run's name.
      step: meta-iterations done.
      values: numbers, or arrays `[R]` with one of each of R runs.
    """


class MetricsWriter:
  """A `Writer` that appends lines of JSON to a file."""

  def __init__(self, path: PathLike):
    """Starts the file anew."""
    self._path = pathlib.Path(path)
    self._path.write_text('')

  def write(self, label: str, step: int, values: Mapping[str, Any]) -> None:
    """Appends one line."""
    line = _plain({'label': label, 'step': step, **values})
    with self._path.open('a') as file:
      file.write(json.dumps(line, allow_nan=False) + '\n')


class TensorBoardWriter:
  """A `Writer` of TensorBoard's event files, by tensorboardX, which does not need TensorFlow."""

  def __init__(self, directory: PathLike):
    """Raises WriterError if tensorboardX is missing."""
    try:
      import tensorboardX
    except ImportError as e:
      raise WriterError("no tensorboardX for --tensorboard; pip install 'metasgd_jax[tensorboard]'") from e
    self._writer = tensorboardX.SummaryWriter(os.fspath(directory))

  def write(self, label: str, step: int, values: Mapping[str, Any]) -> None:
    """Adds a scalar for each value, the mean over runs, as LABEL/NAME."""
    for name, value in values.items():
      self._writer.add_scalar(f'{label}/{name}', float(np.mean(value)), step)
    self._writer.flush()


class ProgressLine:
  """Prints how far a run is, its rate and the time left: in place on a terminal, else a line now and then."""

  def __init__(
    self,
    label: str,
    *,
    every: float = 10.0,
    out: IO[str] | None = None,
    clock: Callable[[], float] = time.monotonic,
  ):
    """Starts the line.

    Args:
      label: begins it.
      every: seconds between lines where the output is not a terminal.
      out: where to; standard error if not given.
      clock: gives the time in seconds.
    """
    self._label, self._clock = label, clock
    self._out = out or sys.stderr
    self._every = 0.2 if self._out.isatty() else every
    self._last = clock()

  def show(self, step: int, total: int, seconds: float, rate: float, **values: float) -> None:
    """Prints, unless it did so a moment ago; always when step is total.

    Args:
      step: meta-iterations done.
      total: meta-iterations to do.
      seconds: what was spent on them in this call.
      rate: meta-iterations a second.
      values: shown by name.
    """
    now = self._clock()
    if step < total and now - self._last < self._every:
      return
    self._last = now
    text = f'{self._label}  {step:,}/{total:,}'
    text += ''.join(f'  {name} {value:.4g}' for name, value in values.items())
    text += f'  {rate:,.0f} it/s' if rate >= 10 else f'  {rate:.2f} it/s'
    text += f'  {duration((total - step) / rate)} left' if step < total else f'  took {duration(seconds)}'
    if self._out.isatty():
      print(f'\r\x1b[K{text}', end='' if step < total else '\n', file=self._out, flush=True)
    else:
      print(text, file=self._out, flush=True)


def duration(seconds: float) -> str:
  """Returns a time as people say it: '42 s', '3 min 20 s', '5 h 12 min'."""
  seconds = round(seconds)
  if seconds < 60:
    return f'{seconds} s'
  if seconds < 3600:
    return f'{seconds // 60} min {seconds % 60:02d} s'
  return f'{seconds // 3600} h {seconds % 3600 // 60:02d} min'


def _plain(value: Any) -> Any:
  """Returns value with NumPy's types made Python's, and floats that JSON lacks made None."""
  if isinstance(value, dict):
    return {str(k): _plain(v) for k, v in value.items()}
  if isinstance(value, list | tuple):
    return [_plain(v) for v in value]
  if isinstance(value, np.ndarray | jax.Array):
    return _plain(np.asarray(value).tolist())
  if isinstance(value, np.generic):
    return _plain(value.item())
  if isinstance(value, float) and not np.isfinite(value):
    return None
  if isinstance(value, pathlib.Path):
    return str(value)
  return value


def _cpu_model() -> str:
  with contextlib.suppress(OSError):
    for line in pathlib.Path('/proc/cpuinfo').read_text().splitlines():
      if line.startswith('model name'):
        return line.split(':', 1)[1].strip()
  return platform.processor() or platform.machine()
