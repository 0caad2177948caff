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

from metasgd_jax.leaves import named
from metasgd_jax.types import PyTree

PathLike = str | os.PathLike[str]

_PACKAGES = (
  'metasgd_jax',
  'jax',
  'jaxlib',
  'optax',
  'flax',
  'chex',
  'numpy',
  'orbax-checkpoint',
  'tensorflow-datasets',
)

_JAX_SETTINGS = (
  'jax_enable_x64',
  'jax_default_matmul_precision',
  'jax_default_prng_impl',
  'jax_threefry_partitionable',
)
"""Those that change numbers."""

_ADVICE = 'make room, or give another --workdir'


class WriterError(Exception):
  """Something cannot be written; the message says why and what to do."""


def open_workdir(path: PathLike) -> pathlib.Path:
  """Returns the directory, made if need be, after writing to it once to see that it can be.

  Raises:
    WriterError: it cannot be made or written.
  """
  try:
    workdir = pathlib.Path(path).expanduser()
  except RuntimeError as e:
    raise WriterError(f'workdir {path} begins with ~ of nobody who has a home; give another --workdir') from e
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=workdir):
      pass
  except (OSError, ValueError) as e:  # ValueError for a name with a NUL.
    reason = getattr(e, 'strerror', None) or e
    raise WriterError(f'workdir {workdir} cannot be written ({reason}); give another --workdir') from e
  return workdir


@contextlib.contextmanager
def atomic(path: PathLike, advice: str = _ADVICE) -> Iterator[IO[bytes]]:
  """Opens a file that takes its name only when it is whole; after an error the old one, or none, is there.

  Args:
    path: of the file.
    advice: what to do where it cannot be written.

  Raises:
    WriterError: it cannot be written.
  """
  path = pathlib.Path(path)
  with (
    _told(path, advice),
    tempfile.NamedTemporaryFile(dir=path.parent, prefix=f'.{path.name}-', delete=False) as file,
  ):
    try:
      yield file
      file.flush()
      os.fsync(file.fileno())
      os.fchmod(file.fileno(), 0o644)
      pathlib.Path(file.name).replace(path)
    except BaseException:
      pathlib.Path(file.name).unlink()
      raise


@contextlib.contextmanager
def _told(path: pathlib.Path, advice: str = _ADVICE) -> Iterator[None]:
  """Makes a WriterError of what the system says."""
  try:
    yield
  except OSError as e:
    raise WriterError(f'{path} cannot be written ({e.strerror or e}); {advice}') from e


def write_json(path: PathLike, value: Any) -> None:
  """Writes value as indented JSON; infinities and NaN become null, since JSON has neither. Raises WriterError."""
  with atomic(path) as file:
    file.write((json.dumps(_plain(value), indent=2, allow_nan=False) + '\n').encode())


def write_array(path: PathLike, array: np.ndarray) -> None:
  """Writes an array as .npy. Raises WriterError where it cannot be."""
  with atomic(path) as file:
    np.save(file, np.asarray(array), allow_pickle=False)


def write_params(path: PathLike, params: PyTree) -> None:
  """Writes a pytree's arrays as flax's msgpack. Raises WriterError where they cannot be."""
  with atomic(path) as file:
    file.write(flax.serialization.to_bytes(jax.device_get(params)))


def read_params(path: PathLike, like: PyTree) -> PyTree:
  """Returns what `write_params` wrote, in the structure of `like`.

  Raises:
    ValueError: there is no such file, it is not of this kind, or its structure, a shape or a dtype is not that of
      `like`.
  """
  try:
    if not pathlib.Path(path).is_file():  # To read a pipe would wait for ever.
      raise ValueError('there is no such file')
    params = flax.serialization.from_bytes(like, pathlib.Path(path).read_bytes())
    if str(jax.tree.structure(params)) != str(jax.tree.structure(like)):
      raise ValueError('they are of another structure')
  except Exception as e:  # msgpack has a dozen errors of its own for a file that is broken.
    reason = repr(str(e) or type(e).__name__)[1:-1][:300]
    raise ValueError(f'{path} does not hold the parameters asked for: {reason}') from e
  for (name, want), got in zip(jax.tree_util.tree_leaves_with_path(like), jax.tree.leaves(params), strict=True):
    if np.shape(want) != np.shape(got):
      raise ValueError(
        f'{path} has shape {np.shape(got)} for {jax.tree_util.keystr(name)}, expected {np.shape(want)}; '
        'was it trained with other settings?'
      )
    if np.result_type(want) != (dtype := np.asarray(got).dtype):
      raise ValueError(
        f'{path} has {dtype} for {jax.tree_util.keystr(name)}, expected {np.result_type(want)}; '
        'was it trained with other settings?'
      )
  return params


def provenance() -> dict[str, Any]:
  """Returns the versions, the device and JAX's settings that a figure was made with."""
  versions = {'python': platform.python_version()}
  for name in _PACKAGES:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      versions[name] = importlib.metadata.version(name)
  devices = jax.devices()
  device = {'platform': devices[0].platform, 'kind': devices[0].device_kind, 'count': len(devices)}
  if devices[0].platform == 'cpu':
    device['cores'] = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    device['cpu'] = _cpu_model()
  settings = {name: getattr(jax.config, name) for name in _JAX_SETTINGS}
  settings['XLA_FLAGS'] = os.environ.get('XLA_FLAGS')
  return {'versions': versions, 'device': device, 'jax_settings': settings}


class Writer(Protocol):
  """Takes a run's metrics as they come.

  Example:
    >>> class Printer:
    ...   def write(self, label, step, values):
    ...     print(label, step, sorted(values))
    >>> Printer().write('MAML', 100, {'loss': 0.5, 'seconds': 2.0})
    MAML 100 ['loss', 'seconds']
  """

  def write(self, label: str, step: int, values: Mapping[str, Any]) -> None:
    """Takes the values of one moment.

    Args:
      label: the run's name.
      step: meta-iterations done.
      values: numbers, or arrays `[R]` with one of each of R runs.
    """


class MetricsWriter:
  """A `Writer` that appends lines of JSON to a file; clock times go to timings.jsonl beside it.

  So that the same run leaves the same metrics, byte for byte.

  Example:
    >>> import pathlib, tempfile
    >>> from metasgd_jax.writers import MetricsWriter
    >>> with tempfile.TemporaryDirectory() as directory:
    ...   writer = MetricsWriter(f'{directory}/metrics.jsonl')
    ...   for step in (1, 2):
    ...     writer.write('MAML', step, {'loss': 0.5, 'seconds': 2.0})
    ...   kept = writer.cut('MAML', step=1)  # To go on from step 1.
    ...   writer.sync()
    ...   print(pathlib.Path(f'{directory}/metrics.jsonl').read_text().strip())
    {"label": "MAML", "step": 1, "loss": 0.5}
  """

  def __init__(self, path: PathLike, *, go_on: bool = False):
    """Starts both files anew, or with `go_on` leaves what is in them.

    Raises:
      WriterError: they cannot be written, or where they should be is no file.
    """
    self._path = pathlib.Path(path)
    self._timings = self._path.with_name('timings.jsonl')
    if not go_on:
      _check_place(self._path)
      with _told(self._path):
        self._timings.unlink(missing_ok=True)
        self._path.write_text('')

  def write(self, label: str, step: int, values: Mapping[str, Any]) -> None:
    """Appends one line; `seconds` stands in one of its own, of timings. Raises WriterError where it cannot be."""
    values = dict(values)
    if 'seconds' in values:
      _append(self._timings, {'label': label, 'step': step, 'seconds': values.pop('seconds')})
    if values:
      _append(self._path, {'label': label, 'step': step, **values})

  def cut(self, label: str, step: int) -> list[dict[str, Any]]:
    """Takes away a run's lines past a step, and any that is not whole; returns its lines of metrics that stay.

    Raises:
      WriterError: they cannot be read, or where they should be is no file.
    """
    _cut(self._timings, label, step)
    return [line for line in _cut(self._path, label, step) if line['label'] == label]

  def sync(self) -> None:
    """Returns when what was written is on the disk. Raises WriterError where it cannot be."""
    _check_place(self._path)
    with _told(self._path), self._path.open('ab') as file:
      os.fsync(file.fileno())


def _append(path: pathlib.Path, line: Mapping[str, Any]) -> None:
  text = json.dumps(_plain(line), allow_nan=False) + '\n'
  _check_place(path)
  with _told(path), path.open('a') as file:
    file.write(text)


def _check_place(path: pathlib.Path) -> None:
  """Raises WriterError where something is that is no file: to open a pipe would wait for ever, a link leads away."""
  if path.is_symlink():
    raise WriterError(f'{path} is not a file but a link; remove the link, or give another --workdir')
  if path.exists() and not path.is_file():
    raise WriterError(f'{path} is not a file; move it away, or give another --workdir')


def _cut(path: pathlib.Path, label: str, step: int) -> list[dict[str, Any]]:
  """Returns the lines that stay; the file is replaced as a whole, and only if one goes."""
  _check_place(path)
  try:
    old, kept, lines = path.read_bytes() if path.exists() else b'', [], []
  except OSError as e:
    raise WriterError(f'{path} cannot be read ({e.strerror}); move it away, or give another --workdir') from e
  for text in old.splitlines(keepends=True):
    try:
      line = json.loads(text)
      gone = not text.endswith(b'\n') or (line['label'] == label and not line['step'] <= step)
    except (ValueError, KeyError, TypeError, RecursionError):
      continue  # What a run that was killed half-way through it left.
    if not gone:
      kept.append(text)
      lines.append(line)
  new = b''.join(kept)
  if new != old:
    with atomic(path) as file:
      file.write(new)
  return lines


class TensorBoardWriter:
  """A `Writer` of TensorBoard's event files, by tensorboardX, which does not need TensorFlow.

  Example:
    >>> import os, tempfile
    >>> from metasgd_jax.writers import TensorBoardWriter
    >>> with tempfile.TemporaryDirectory() as directory:
    ...   writer = TensorBoardWriter(directory)
    ...   writer.write('MAML', 100, {'loss': np.array([0.5, 0.7])})  # Of two runs: their mean.
    ...   writer.histograms('MAML', 100, {'alpha': np.array([0.1, -0.1])})
    ...   writer.close()
    ...   len(os.listdir(directory))
    1
  """

  def __init__(self, directory: PathLike):
    """Raises WriterError if tensorboardX is missing."""
    try:
      import tensorboardX
    except ImportError as e:
      raise WriterError("no tensorboardX for --tensorboard; pip install 'metasgd_jax[tensorboard]'") from e
    self._writer = tensorboardX.SummaryWriter(os.fspath(directory), flush_secs=5)

  def write(self, label: str, step: int, values: Mapping[str, Any]) -> None:
    """Adds a scalar for each value, the mean over runs, as LABEL/NAME."""
    for name, value in values.items():
      self._writer.add_scalar(f'{label}/{name}', float(np.mean(value)), step)

  def histograms(self, label: str, step: int, tree: PyTree) -> None:
    """Adds a histogram of each leaf's finite entries, as LABEL/LEAF, such as 'MAML/alpha.Dense_0.kernel'."""
    for name, leaf in named(tree):
      entries = np.ravel(np.asarray(leaf, np.float64))
      if np.any(finite := np.isfinite(entries)):
        self._writer.add_histogram(f'{label}/{name}', entries[finite], step)

  def figure(self, name: str, figure: Any) -> None:
    """Adds a picture, a figure of matplotlib, by its name."""
    self._writer.add_figure(name, figure, close=False)

  def close(self) -> None:
    """Returns when all is in the file; till then it is there within some seconds."""
    self._writer.close()


class ProgressLine:
  """Tells how far a run is, its figures, its rate and the time left: in place on a terminal, else line by line.

  Off a terminal a line comes with each tenth of the run, and in between where that takes longer than `every`.

  Example:
    >>> from metasgd_jax.writers import ProgressLine
    >>> line = ProgressLine('Meta-SGD', say=print)
    >>> line.show(4, 4, seconds=80.0, rate=0.05, loss=0.5)
    Meta-SGD  4/4  loss 0.5  0.05 it/s  took 1 min 20 s
  """

  def __init__(
    self,
    label: str,
    *,
    every: float = 30.0,
    out: IO[str] | None = None,
    say: Callable[[str], object] | None = None,
    clock: Callable[[], float] = time.monotonic,
  ):
    """Starts the line.

    Args:
      label: begins it.
      every: seconds between lines where the output is not a terminal.
      out: where to; standard error where left out.
      say: gets the lines where the output is not a terminal, such as a logger's `info`; printed where left out.
      clock: gives the time in seconds.
    """
    self._label, self._clock = label, clock
    self._out = out or sys.stderr
    self._in_place = self._out.isatty()
    self._say = say or (lambda line: print(line, file=self._out, flush=True))
    self._every = 0.2 if self._in_place else every
    self._last, self._tenth = clock(), 0

  def show(self, step: int, total: int, seconds: float, rate: float, **values: float) -> None:
    """Prints, unless it did so a moment ago; always when step is total.

    Args:
      step: meta-iterations done.
      total: meta-iterations to do.
      seconds: what was spent on them in this call.
      rate: meta-iterations a second.
      values: shown by name.
    """
    now, tenth = self._clock(), 10 * step // total
    waited = now - self._last
    next_tenth = not self._in_place and tenth > self._tenth and waited >= 1
    if step < total and waited < self._every and not next_tenth:
      return
    self._last, self._tenth = now, tenth
    text = f'{self._label}  {step:,}/{total:,}'
    text += ''.join(f'  {name} {value:.4g}' for name, value in values.items())
    text += f'  {rate:,.0f} it/s' if rate >= 10 else f'  {rate:.2f} it/s'
    text += f'  {duration((total - step) / rate)} left' if step < total else f'  took {duration(seconds)}'
    if self._in_place:
      print(f'\r\x1b[K{text}', end='' if step < total else '\n', file=self._out, flush=True)
    else:
      self._say(text)


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
