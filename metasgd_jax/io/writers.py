"""Writers of a run's metrics, as JSON lines or as event files of TensorBoard, while the run goes on."""

import contextlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from metasgd_jax.io.files import PathLike, WriterError, as_path, atomic, plain, told
from metasgd_jax.tree import named
from metasgd_jax.types import PyTree


class Writer(Protocol):
  """Receives the metrics of a run while the run goes on.

  Example:
    >>> class Printer:
    ...   def write(self, label, step, values):
    ...     print(label, step, sorted(values))
    >>> Printer().write('MAML', 100, {'loss': 0.5, 'seconds': 2.0})
    MAML 100 ['loss', 'seconds']
  """

  def write(self, label: str, step: int, values: Mapping[str, Any]) -> None:
    """Receives the values after one step.

    Args:
      label: Name of the training.
      step: Number of meta-iterations done.
      values: Values by their names. A value is a number, or an array `[R]` with one number for each of R runs.
    """


class MetricsWriter:
  """A `Writer` that appends JSON lines to a file, such as metrics.jsonl, and wall-clock times to a second file.

  The times have a separate file so that a repeated run writes the same metrics, byte for byte. The times for
  metrics.jsonl go to timings.jsonl, and the times for valid.jsonl go to valid_timings.jsonl.

  Example:
    >>> import pathlib, tempfile
    >>> from metasgd_jax.io.writers import MetricsWriter
    >>> with tempfile.TemporaryDirectory() as directory:
    ...   writer = MetricsWriter(f'{directory}/metrics.jsonl')
    ...   for step in (1, 2):
    ...     writer.write('MAML', step, {'loss': 0.5, 'seconds': 2.0})
    ...   kept = writer.cut('MAML', step=1)  # Removes the lines after step 1.
    ...   writer.sync()
    ...   print(pathlib.Path(f'{directory}/metrics.jsonl').read_text().strip())
    {"label": "MAML", "step": 1, "loss": 0.5}
  """

  def __init__(self, path: PathLike, *, go_on: bool = False):
    """Empties the metrics file and removes the separate file of times (see `write`), unless `go_on` is true.

    Args:
      path: Path of the metrics file.
      go_on: Whether to keep existing lines, in order to continue a run that was stopped.

    Raises:
      WriterError: if the files cannot be written.
    """
    self._path = as_path(path)
    stem = '' if self._path.name == 'metrics.jsonl' else f'{self._path.stem}_'
    self._timings = self._path.with_name(f'{stem}timings.jsonl')
    if not go_on:
      with told(self._path):
        self._timings.unlink(missing_ok=True)
        self._path.write_text('')

  def write(self, label: str, step: int, values: Mapping[str, Any]) -> None:
    """Appends one line of metrics. The value `seconds` is not in this line, but in the separate file of times.

    Args:
      label: Name of the training.
      step: Number of meta-iterations done.
      values: Values by their names. A value is a number, or an array `[R]` with one number for each of R runs.

    Raises:
      ValueError: if a value is called label or step.
      WriterError: if a line cannot be written.
    """
    values = dict(values)
    if taken := {'label', 'step'} & values.keys():
      raise ValueError(f'a value cannot be called {min(taken)!r}, as each line has a field of this name; rename it')
    if 'seconds' in values:
      _append(self._timings, {'label': label, 'step': step, 'seconds': values.pop('seconds')})
    if values:
      _append(self._path, {'label': label, 'step': step, **values})

  def cut(self, label: str, step: int) -> list[dict[str, Any]]:
    """Removes the lines of a training after a step, and all incomplete lines.

    Returns the lines of the metrics file that remain of this training, each as a dict.

    Args:
      label: Name of the training.
      step: Last step whose lines are kept.

    Raises:
      WriterError: if the files cannot be read or written.
    """
    _cut(self._timings, label, step)
    return [line for line in _cut(self._path, label, step) if line['label'] == label]

  def sync(self) -> None:
    """Waits until the written metrics are on the disk. Raises WriterError if they cannot be written."""
    with told(self._path), self._path.open('ab') as file:
      os.fsync(file.fileno())


def _append(path: pathlib.Path, line: Mapping[str, Any]) -> None:
  text = json.dumps(plain(line), allow_nan=False) + '\n'
  with told(path), path.open('a') as file:
    file.write(text)


def _cut(path: pathlib.Path, label: str, step: int) -> list[dict[str, Any]]:
  """Removes lines as `MetricsWriter.cut` does. Returns the kept lines of all runs, each as a dict.

  The file is replaced as a whole, and only if a line is removed.
  """
  with told(path):
    old = path.read_bytes().splitlines(keepends=True) if path.exists() else []
  kept, lines = [], []
  for text in old:
    with contextlib.suppress(ValueError):  # A run that is killed may leave an incomplete line.
      line = json.loads(text)
      if text.endswith(b'\n') and (line['label'] != label or line['step'] <= step):
        kept.append(text)
        lines.append(line)
  if len(kept) < len(old):
    with atomic(path) as file:
      file.writelines(kept)
  return lines


class TensorBoardWriter:
  """A `Writer` of event files for TensorBoard. It uses tensorboardX, which does not need TensorFlow.

  Example:
    >>> import os, tempfile
    >>> from metasgd_jax.io.writers import TensorBoardWriter
    >>> with tempfile.TemporaryDirectory() as directory:
    ...   writer = TensorBoardWriter(directory)
    ...   writer.write('MAML', 100, {'loss': np.array([0.5, 0.7])})  # Writes the mean over two runs.
    ...   writer.histograms('MAML', 100, {'alpha': np.array([0.1, -0.1])})
    ...   writer.close()
    ...   len(os.listdir(directory))
    1
  """

  def __init__(self, directory: PathLike):
    """Opens an event file.

    Args:
      directory: Directory of the event file, which TensorBoard reads.

    Raises:
      ValueError: if `directory` is not a path.
      WriterError: if tensorboardX is not installed.
    """
    try:
      import tensorboardX
    except ImportError as e:
      raise WriterError('TensorBoardWriter needs tensorboardX; run pip install tensorboardX') from e
    self._writer = tensorboardX.SummaryWriter(os.fspath(as_path(directory)), flush_secs=5)

  def write(self, label: str, step: int, values: Mapping[str, Any]) -> None:
    """Adds a scalar LABEL/NAME for each value. The scalar is the mean of the value over the runs.

    Args:
      label: Name of the training.
      step: Number of meta-iterations done.
      values: Values by their names. A value is a number, or an array `[R]` with one number for each of R runs.
    """
    for name, value in values.items():
      self._writer.add_scalar(f'{label}/{name}', float(np.mean(value)), step)

  def histograms(self, label: str, step: int, tree: PyTree) -> None:
    """Adds a histogram LABEL/LEAF of the finite entries of each leaf, such as 'MAML/alpha.Dense_0.kernel'.

    Args:
      label: Name of the training.
      step: Number of meta-iterations done.
      tree: Pytree of arrays, such as `state.meta`.
    """
    for name, leaf in named(tree):
      entries = np.ravel(np.asarray(leaf, np.float64))
      if np.any(finite := np.isfinite(entries)):
        self._writer.add_histogram(f'{label}/{name}', entries[finite], step)

  def figure(self, name: str, figure: Any) -> None:
    """Adds an image of a matplotlib `figure` under `name`."""
    self._writer.add_figure(name, figure, close=False)

  def close(self) -> None:
    """Writes all values that are not in the file yet. Before that, a value reaches the file after some seconds."""
    if '_writer' in vars(self):
      self._writer.close()
