"""A run's metrics as they come: lines of JSON, TensorBoard's event files."""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from metasgd_jax.io.files import PathLike, WriterError, atomic, plain, told
from metasgd_jax.tree import named
from metasgd_jax.types import PyTree

__all__ = ['MetricsWriter', 'TensorBoardWriter', 'Writer']


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
  """A `Writer` that appends lines of JSON to a file, such as metrics.jsonl; clock times go to another beside it.

  So that the same run leaves the same metrics, byte for byte. That of metrics.jsonl is timings.jsonl, that of
  valid.jsonl valid_timings.jsonl.

  Example:
    >>> import pathlib, tempfile
    >>> from metasgd_jax.io.writers import MetricsWriter
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

    Args:
      path: of the file of metrics.
      go_on: after a run that was stopped.

    Raises:
      WriterError: they cannot be written, or where they should be is no file.
    """
    self._path = pathlib.Path(path)
    self._timings = self._path.with_name(f'{self._path.stem}_timings.jsonl')
    if self._path.name == 'metrics.jsonl':
      self._timings = self._path.with_name('timings.jsonl')
    if not go_on:
      _check_place(self._path)
      with told(self._path):
        self._timings.unlink(missing_ok=True)
        self._path.write_text('')

  def write(self, label: str, step: int, values: Mapping[str, Any]) -> None:
    """Appends one line; `seconds` stands in one of its own, of timings.

    Args:
      label: the run's name.
      step: meta-iterations done.
      values: numbers, or arrays `[R]` with one of each of R runs.

    Raises:
      ValueError: a value is called label or step.
      WriterError: it cannot be written.
    """
    values = dict(values)
    if taken := {'label', 'step'} & values.keys():
      raise ValueError(f'a value cannot be called {min(taken)!r}, which each line has of its own; give it another name')
    if 'seconds' in values:
      _append(self._timings, {'label': label, 'step': step, 'seconds': values.pop('seconds')})
    if values:
      _append(self._path, {'label': label, 'step': step, **values})

  def cut(self, label: str, step: int) -> list[dict[str, Any]]:
    """Takes away a run's lines past a step, and any that is not whole; returns its lines of metrics that stay.

    Args:
      label: the run's name.
      step: the last to stay.

    Raises:
      WriterError: they cannot be read, or where they should be is no file.
    """
    _cut(self._timings, label, step)
    return [line for line in _cut(self._path, label, step) if line['label'] == label]

  def sync(self) -> None:
    """Returns when what was written is on the disk. Raises WriterError where it cannot be."""
    _check_place(self._path)
    with told(self._path), self._path.open('ab') as file:
      os.fsync(file.fileno())


def _append(path: pathlib.Path, line: Mapping[str, Any]) -> None:
  text = json.dumps(plain(line), allow_nan=False) + '\n'
  _check_place(path)
  with told(path), path.open('a') as file:
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
    >>> from metasgd_jax.io.writers import TensorBoardWriter
    >>> with tempfile.TemporaryDirectory() as directory:
    ...   writer = TensorBoardWriter(directory)
    ...   writer.write('MAML', 100, {'loss': np.array([0.5, 0.7])})  # Of two runs: their mean.
    ...   writer.histograms('MAML', 100, {'alpha': np.array([0.1, -0.1])})
    ...   writer.close()
    ...   len(os.listdir(directory))
    1
  """

  def __init__(self, directory: PathLike):
    """Opens a file.

    Args:
      directory: where TensorBoard is to look.

    Raises:
      WriterError: tensorboardX is missing.
    """
    try:
      import tensorboardX
    except ImportError as e:
      raise WriterError("no tensorboardX for --tensorboard; pip install 'metasgd_jax[tensorboard]'") from e
    self._writer = tensorboardX.SummaryWriter(os.fspath(directory), flush_secs=5)

  def write(self, label: str, step: int, values: Mapping[str, Any]) -> None:
    """Adds a scalar for each value, the mean over runs, as LABEL/NAME.

    Args:
      label: the run's name.
      step: meta-iterations done.
      values: numbers, or arrays `[R]` with one of each of R runs.
    """
    for name, value in values.items():
      self._writer.add_scalar(f'{label}/{name}', float(np.mean(value)), step)

  def histograms(self, label: str, step: int, tree: PyTree) -> None:
    """Adds a histogram of each leaf's finite entries, as LABEL/LEAF, such as 'MAML/alpha.Dense_0.kernel'.

    Args:
      label: the run's name.
      step: meta-iterations done.
      tree: of arrays, such as `state.meta`.
    """
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
