"""Files that are never half-written: JSON, arrays and parameters; a directory that can be written."""

import contextlib
import json
import os
import pathlib
import secrets
import tempfile
from collections.abc import Iterator
from typing import IO, Any

import flax.serialization
import jax
import numpy as np

from metasgd_jax.types import PyTree

__all__ = [
  'PathLike',
  'WriterError',
  'atomic',
  'open_workdir',
  'read_params',
  'write_array',
  'write_json',
  'write_params',
]

PathLike = str | os.PathLike[str]

_ADVICE = 'make room, or give another --workdir'


class WriterError(Exception):
  """Something cannot be written; the message says why and what to do."""


def open_workdir(path: PathLike) -> pathlib.Path:
  """Returns the directory, made if need be, after writing to it once to see that it can be.

  Args:
    path: of the directory; may begin with ~.

  Raises:
    WriterError: path is empty, or the directory cannot be made or written.

  Example:
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...   ms.files.open_workdir(f'{directory}/runs/a').is_dir()
    True
  """
  if not os.fspath(path):  # As of a shell's variable that is not set; it would be where the program was started.
    raise WriterError('workdir is empty; give a directory, such as --workdir=.')
  try:
    workdir = pathlib.Path(path).expanduser()
  except RuntimeError as e:
    raise WriterError(f'workdir {path} begins with ~ of nobody who has a home; give another --workdir') from e
  if reason := why_not_writable(workdir):
    raise WriterError(f'workdir {workdir} cannot be written ({reason}); give another --workdir')
  return workdir


def why_not_writable(directory: pathlib.Path) -> str | None:
  """Makes a directory and writes to it once; returns why it cannot be made or written, `None` if it can."""
  try:
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=directory):
      return None
  except (OSError, ValueError) as e:  # ValueError for a name with a NUL.
    return str(getattr(e, 'strerror', None) or e)


@contextlib.contextmanager
def atomic(path: PathLike, advice: str = _ADVICE) -> Iterator[IO[bytes]]:
  """Opens a file that takes its name only when it is whole; after an error the old one, or none, is there.

  Args:
    path: of the file.
    advice: what to do where it cannot be written.

  Raises:
    WriterError: it cannot be written.

  Example:
    >>> import pathlib, tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...   with ms.files.atomic(f'{directory}/a.txt') as file:
    ...     _ = file.write(b'whole')
    ...   [path.name for path in pathlib.Path(directory).iterdir()]
    ['a.txt']
  """
  path = pathlib.Path(path)
  aside = path.with_name(f'.{path.name}-{secrets.token_hex(4)}')
  with told(path, advice), aside.open('xb') as file:  # Not tempfile's, which are their owner's alone to read.
    try:
      yield file
      file.flush()
      os.fsync(file.fileno())
      aside.replace(path)
    except BaseException:
      aside.unlink(missing_ok=True)
      raise


@contextlib.contextmanager
def told(path: pathlib.Path, advice: str = _ADVICE) -> Iterator[None]:
  """Makes a WriterError of what the system says."""
  try:
    yield
  except OSError as e:
    raise WriterError(f'{path} cannot be written ({e.strerror or e}); {advice}') from e


def write_json(path: PathLike, value: Any) -> None:
  """Writes a value as indented JSON; infinities and NaN become null, since JSON has neither.

  Args:
    path: of the file, which is never half-written.
    value: of dicts, lists, numbers, texts, paths and arrays.

  Raises:
    WriterError: it cannot be written.

  Example:
    >>> import pathlib, tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...   ms.files.write_json(f'{directory}/a.json', {'loss': np.float32(0.5), 'ci95': np.inf})
    ...   print(pathlib.Path(f'{directory}/a.json').read_text())
    {
      "loss": 0.5,
      "ci95": null
    }
    <BLANKLINE>
  """
  with atomic(path) as file:
    file.write((json.dumps(plain(value), indent=2, allow_nan=False) + '\n').encode())


def write_array(path: PathLike, array: np.ndarray) -> None:
  """Writes an array as .npy.

  Args:
    path: of the file, which is never half-written.
    array: of numbers; objects would be pickled, which no file of ours is.

  Raises:
    WriterError: it cannot be written.

  Example:
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...   ms.files.write_array(f'{directory}/a.npy', np.arange(3))
    ...   np.load(f'{directory}/a.npy')
    array([0, 1, 2])
  """
  with atomic(path) as file:
    np.save(file, np.asarray(array), allow_pickle=False)


def write_params(path: PathLike, params: PyTree) -> None:
  """Writes a pytree's arrays as flax's msgpack; `read_params` reads them.

  Args:
    path: of the file, which is never half-written.
    params: dicts, lists, NamedTuples and arrays; `Checkpoints` takes what flax does not, and train states.

  Raises:
    WriterError: it cannot be written.

  Example:
    >>> import tempfile
    >>> meta = ms.MetaParams({'w': np.ones(2)}, {'w': np.full(2, 0.1)})
    >>> with tempfile.TemporaryDirectory() as directory:
    ...   ms.files.write_params(f'{directory}/meta.msgpack', meta)
    ...   ms.files.read_params(f'{directory}/meta.msgpack', like=meta).alpha
    {'w': array([0.1, 0.1])}
  """
  with atomic(path) as file:
    file.write(flax.serialization.to_bytes(jax.device_get(params)))


def read_params(path: PathLike, like: PyTree) -> PyTree:
  """Returns what `write_params` wrote, in the structure of `like`.

  Args:
    path: of the file.
    like: a pytree of the same structure, shapes and dtypes, such as `init` gives.

  Raises:
    ValueError: there is no such file, it is not of this kind, or its structure, a shape or a dtype is not that of
      `like`.

  Example:
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...   ms.files.write_params(f'{directory}/theta.msgpack', {'w': np.ones(2)})
    ...   ms.files.read_params(f'{directory}/theta.msgpack', like={'w': np.zeros(2)})
    {'w': array([1., 1.])}
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


def plain(value: Any) -> Any:
  """Returns value with NumPy's types made Python's, and floats that JSON lacks made None."""
  if isinstance(value, dict):
    return {str(k): plain(v) for k, v in value.items()}
  if isinstance(value, list | tuple):
    return [plain(v) for v in value]
  if isinstance(value, np.ndarray | jax.Array):
    return plain(np.asarray(value).tolist())
  if isinstance(value, np.generic):
    return plain(value.item())
  if isinstance(value, float) and not np.isfinite(value):
    return None
  if isinstance(value, pathlib.Path):
    return str(value)
  return value
