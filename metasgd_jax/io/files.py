"""Writes JSON, arrays and parameters to files that are never half-written. Checks that directories can be written."""

import contextlib
import errno
import json
import os
import pathlib
import re
import secrets
import tempfile
from collections.abc import Iterator, Mapping
from typing import IO, Any

import jax
import numpy as np

from metasgd_jax.tree import first_difference, leaf_types, named, native
from metasgd_jax.types import PyTree

PathLike = str | os.PathLike[str]

_STORED = {'bool', 'bfloat16', 'float16', 'float32', 'float64', 'complex64'} | {
  f'{kind}{bits}' for kind in ('int', 'uint') for bits in (8, 16, 32, 64)
}
"""Names of the dtypes that safetensors writes and reads with NumPy."""


_HALF = re.compile(r'\.metasgd_jax-[0-9a-f]{16}')
"""Name of a file that `atomic` has begun to write."""


class WriterError(Exception):
  """A file or directory cannot be written. The message says why, and what to do."""


def as_path(path: PathLike) -> pathlib.Path:
  """Returns `path` as a `pathlib.Path`, with the home directory in place of `~` at its beginning.

  Raises:
    ValueError: if `path` is neither a string nor a path, or if the user after `~` has no home directory.

  Example:
    >>> ms.files.as_path('runs/a').name
    'a'
  """
  if not isinstance(path, str | os.PathLike):
    raise ValueError(f'a path must be a string or a pathlib.Path, got {path!r:.80}; give such a path')
  try:
    return pathlib.Path(path).expanduser()
  except RuntimeError as e:
    raise ValueError(f'{path} begins with ~, but there is no such home directory; give another path') from e


def as_utf8_path(path: PathLike) -> pathlib.Path:
  """Returns an absolute path that orbax can use, with the home directory in place of `~` at its beginning.

  Raises:
    ValueError: if `as_path` refuses the path, or if the absolute path is not UTF-8.

  Example:
    >>> ms.files.as_utf8_path('runs/a').is_absolute()
    True
  """
  absolute = as_path(path).absolute()
  try:
    str(absolute).encode()
  except UnicodeEncodeError as e:
    raise ValueError(f'the path {str(absolute)!r} is not UTF-8, so orbax cannot write there; rename it') from e
  return absolute


def first_line(text: object) -> str:
  r"""Returns the first line of an error, or of text from a file, in a form that can be part of a message.

  At most 300 characters are kept, and those that are not printable become spaces. If an error has no text, the result
  is the name of the error's type.

  Example:
    >>> ms.files.first_line(ValueError('x is negative\nand y too'))
    'x is negative'
  """
  line = (str(text).strip().splitlines() or [type(text).__name__])[0]
  return ''.join(c if c.isprintable() else ' ' for c in line[:300])


def open_workdir(path: PathLike) -> pathlib.Path:
  """Creates a directory if it is missing, checks that files can be written to it, and returns its path.

  Args:
    path: Path of the directory. It may begin with ~.

  Raises:
    WriterError: if `path` is empty or not UTF-8, or if the directory cannot be created or written.

  Example:
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...   ms.files.open_workdir(f'{directory}/runs/a').is_dir()
    True
  """
  if path == '':  # An unset shell variable gives an empty path, which would be the current directory.
    raise WriterError("workdir is empty; give a directory, such as '.'")
  try:
    as_utf8_path(path)
  except (OSError, ValueError) as e:  # An OSError if the current directory has been removed.
    raise WriterError(f'the workdir cannot be used: {e}') from e
  if reason := why_not_writable(path):
    raise WriterError(f'workdir {path} cannot be written ({reason}); give another directory')
  return as_path(path)


def why_not_writable(directory: PathLike) -> str | None:
  """Creates a directory and writes to it once. Returns the reason if this fails, and `None` if it succeeds.

  Args:
    directory: Path of the directory. It may begin with ~.

  Example:
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...   print(ms.files.why_not_writable(f'{directory}/new'))
    None
  """
  try:
    path = as_path(directory)
    path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path):
      return None
  except (OSError, ValueError) as e:  # A NUL in the name, or a ~ of a user without a home directory.
    return str(getattr(e, 'strerror', None) or e)


@contextlib.contextmanager
def atomic(path: PathLike, advice: str | None = None) -> Iterator[IO[bytes]]:
  """Opens a file for writing, as a context manager. The file gets the name `path` only when it is complete.

  If an error is raised in the `with` block, a previous file at `path` is unchanged, and no new file is left.

  Args:
    path: Path of the file.
    advice: Advice that ends the error message if the file cannot be written. By default, it is that of `told`.

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
  path = as_path(path)
  aside = path.with_name(f'.metasgd_jax-{secrets.token_hex(8)}')  # The name of the file may be as long as names can be.
  with told(path, advice):
    try:
      with aside.open('xb') as file:  # tempfile makes files that only their owner can read.
        yield file
        file.flush()
        os.fsync(file.fileno())
      aside.replace(path)  # The file is closed by now, because Windows cannot rename an open file.
    finally:
      aside.unlink(missing_ok=True)


def half_written(directory: PathLike) -> list[pathlib.Path]:
  """Returns the files in a directory that `atomic` has begun to write. They stay if a program is killed meanwhile.

  Example:
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...   with ms.files.atomic(f'{directory}/a.txt'):
    ...     len(ms.files.half_written(directory))
    1
  """
  return [path for path in as_path(directory).glob('.metasgd_jax-*') if _HALF.fullmatch(path.name)]


@contextlib.contextmanager
def told(path: pathlib.Path, advice: str | None = None) -> Iterator[None]:
  """Turns an error of the operating system in a `with` block into a WriterError.

  Args:
    path: Path of the file that is written in the `with` block.
    advice: Advice that ends the error message. By default, it is to give another path, and to free disk space if the
      disk is full.

  Example:
    >>> import pathlib
    >>> path = pathlib.Path('nowhere/a.txt')
    >>> with ms.files.told(path, 'create the directory'):
    ...   path.write_text('')
    Traceback (most recent call last):
    ...
    metasgd_jax.io.files.WriterError: nowhere/a.txt cannot be written (No such file or directory); create the directory
  """
  try:
    yield
  except OSError as e:
    full = e.errno in (errno.ENOSPC, errno.EDQUOT)
    advice = advice or ('free disk space, or give another path' if full else 'give another path')
    raise WriterError(f'{path} cannot be written ({e.strerror or e}); {advice}') from e


def as_json(name: str, values: Mapping[str, Any], *, allow_nan: bool = False) -> dict[str, Any]:
  """Returns the values of a mapping as they are read back after JSON has stored them.

  Args:
    name: Name of the argument that holds the values, for the message.
    values: Mapping from names to values.
    allow_nan: Whether NaN and infinite numbers are accepted, which are not standard JSON.

  Raises:
    ValueError: if JSON cannot store a value.

  Example:
    >>> ms.files.as_json('config', {'way': (5, 20)})
    {'way': [5, 20]}
  """
  try:
    return json.loads(json.dumps(dict(values), allow_nan=allow_nan))
  except (TypeError, ValueError, RecursionError) as e:
    raise ValueError(
      f'the argument `{name}` has a value that JSON cannot store ({first_line(e)}); use numbers, strings, lists and '
      'dicts'
    ) from e


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
  """Writes the arrays of a pytree to a safetensors file, under names such as 'theta.Dense_0.kernel'.

  `read_params` reads such a file.

  Args:
    path: Path of the file, which is never half-written.
    params: Pytree of arrays. A train state cannot be written, because safetensors cannot store its random key; save
      train states with `Checkpoints`. Arrays are written in the byte order of this machine.

  Raises:
    ValueError: if `read_params` could not read a leaf, because of its dtype or its name.
    WriterError: if the file cannot be written.

  Example:
    >>> import tempfile
    >>> meta = ms.MetaParams({'w': np.ones(2)}, {'w': np.full(2, 0.1)})
    >>> with tempfile.TemporaryDirectory() as directory:
    ...   ms.files.write_params(f'{directory}/meta.safetensors', meta)
    ...   ms.files.read_params(f'{directory}/meta.safetensors', like=meta).alpha
    {'w': array([0.1, 0.1])}
  """
  import safetensors.numpy

  # safetensors writes the memory of an array as it is, so the memory must be in row-major (C) order.
  arrays = {name: np.asarray(native(leaf), order='C') for name, leaf in named(params)}
  for name, array in arrays.items():
    said = f'the leaf {name!r} of dtype {array.dtype} cannot be stored in a safetensors file'
    if array.dtype.name not in _STORED:
      raise ValueError(f'{said} because of its dtype; cast it to float32 or to another common dtype')
    if name == '__metadata__' or name.encode(errors='replace').decode() != name:
      raise ValueError(f'{said} because of its name; rename it')
  with atomic(path) as file:
    file.write(safetensors.numpy.save(arrays))


def read_params(path: PathLike, like: PyTree) -> PyTree:
  """Returns the pytree that `write_params` wrote, in the structure of `like`.

  Args:
    path: Path of the file.
    like: A pytree of the same structure, shapes and dtypes, such as the result of `init`.

  Raises:
    ValueError: if there is no such file, if `write_params` did not write it, or if its structure, a shape or a dtype is
      not that of `like`.

  Example:
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...   ms.files.write_params(f'{directory}/theta.safetensors', {'w': np.ones(2)})
    ...   ms.files.read_params(f'{directory}/theta.safetensors', like={'w': np.zeros(2)})
    {'w': array([1., 1.])}
  """
  import safetensors

  said = f'{path} does not hold the expected parameters'
  path = as_path(path)
  if not path.is_file():
    raise ValueError(f'{said}: there is no such file; check the path')
  try:
    with safetensors.safe_open(path, framework='np') as file:
      arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
  except (safetensors.SafetensorError, OSError) as e:
    raise ValueError(f'{said}: it is not a safetensors file, or is incomplete ({e}); get the file again') from e
  if difference := first_difference(leaf_types(arrays), leaf_types(like)):
    raise ValueError(f'{said}: {difference}; use the settings that the parameters were trained with')
  return jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name, _ in named(like)])


def plain(value: Any) -> Any:
  """Returns `value` with NumPy's types converted to Python's, and with None in place of infinities and NaN.

  Example:
    >>> ms.files.plain({'loss': np.float32(0.5), 'rates': np.array([0.1, np.nan])})
    {'loss': 0.5, 'rates': [0.1, None]}
  """
  if isinstance(value, dict):
    return {str(k): plain(v) for k, v in value.items()}
  if isinstance(value, list | tuple):
    return [plain(v) for v in value]
  if isinstance(value, np.ndarray | np.generic | jax.Array):
    return plain(np.asarray(value).tolist())
  if isinstance(value, float) and not np.isfinite(value):
    return None
  if isinstance(value, pathlib.Path):
    return str(value)
  return value
