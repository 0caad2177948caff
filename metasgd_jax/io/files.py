"""Files that are never half-written: JSON, arrays and parameters. Also the check that a directory can be written."""

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

PathLike = str | os.PathLike[str]

_ADVICE = 'make room, or give another --workdir'


class WriterError(Exception):
  """A file or directory cannot be written. The message says why, and what to do."""


def open_workdir(path: PathLike) -> pathlib.Path:
  """Returns the path of a directory, after it has created the directory if necessary and has written to it once.

  Args:
    path: Path of the directory. It may begin with ~.

  Raises:
    WriterError: if `path` is empty, or if the directory cannot be created or written.

  Example:
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...   ms.files.open_workdir(f'{directory}/runs/a').is_dir()
    True
  """
  if not os.fspath(path):  # An unset shell variable gives an empty path, which would be the current directory.
    raise WriterError('workdir is empty; give a directory, such as --workdir=.')
  try:
    workdir = pathlib.Path(path).expanduser()
  except RuntimeError as e:
    raise WriterError(f'workdir {path} begins with ~ of a user without a home directory; give another --workdir') from e
  if reason := why_not_writable(workdir):
    raise WriterError(f'workdir {workdir} cannot be written ({reason}); give another --workdir')
  return workdir


def why_not_writable(directory: pathlib.Path) -> str | None:
  """Creates a directory and writes to it once. Returns the reason if this fails, and `None` if it succeeds."""
  try:
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=directory):
      return None
  except (OSError, ValueError) as e:  # ValueError: a NUL in the name.
    return str(getattr(e, 'strerror', None) or e)


@contextlib.contextmanager
def atomic(path: PathLike, advice: str = _ADVICE) -> Iterator[IO[bytes]]:
  """Opens a file that gets its name only when it is complete.

  After an error, a previous file of that name is unchanged. If there was none, there is still none.

  Args:
    path: Path of the file.
    advice: Advice that ends the error message if the file cannot be written.

  Raises:
    WriterError: if the file cannot be written.

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
  with told(path, advice), aside.open('xb') as file:  # Files of tempfile are readable by their owner alone.
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
  """Turns an error of the operating system into a WriterError, whose message ends with `advice`."""
  try:
    yield
  except OSError as e:
    raise WriterError(f'{path} cannot be written ({e.strerror or e}); {advice}') from e


def write_json(path: PathLike, value: Any) -> None:
  """Writes a value as indented JSON. Infinities and NaN become null, because JSON has neither.

  Args:
    path: Path of the file, which is never half-written.
    value: Value made of dicts, lists, numbers, strings, paths and arrays.

  Raises:
    WriterError: if the file cannot be written.

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
  """Writes an array as a .npy file.

  Args:
    path: Path of the file, which is never half-written.
    array: Array of numbers. An array of objects is refused, because it would be pickled, and this package writes no
      pickles.

  Raises:
    WriterError: if the file cannot be written.

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
  """Writes the arrays of a pytree as msgpack of flax. `read_params` reads them.

  Args:
    path: Path of the file, which is never half-written.
    params: Pytree of dicts, lists, NamedTuples and arrays. Train states, and pytrees that flax does not support, can be
      written with `Checkpoints`.

  Raises:
    WriterError: if the file cannot be written.

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
  """Returns the pytree that `write_params` wrote, in the structure of `like`.

  Args:
    path: Path of the file.
    like: A pytree of the same structure, shapes and dtypes, such as the result of `init`.

  Raises:
    ValueError: if there is no such file, if it is not a file of `write_params`, or if its structure, a shape or a dtype
      is not that of `like`.

  Example:
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...   ms.files.write_params(f'{directory}/theta.msgpack', {'w': np.ones(2)})
    ...   ms.files.read_params(f'{directory}/theta.msgpack', like={'w': np.zeros(2)})
    {'w': array([1., 1.])}
  """
  try:
    if not pathlib.Path(path).is_file():  # Reading a pipe would wait forever.
      raise ValueError('there is no such file')
    params = flax.serialization.from_bytes(like, pathlib.Path(path).read_bytes())
    if str(jax.tree.structure(params)) != str(jax.tree.structure(like)):
      raise ValueError('they have another structure')
  except Exception as e:  # msgpack raises errors of many types for a broken file.
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
  """Returns `value` with NumPy's types converted to Python's, and with None in place of floats that JSON lacks."""
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
