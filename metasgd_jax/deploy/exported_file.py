"""The format of the zip archive that stores an exported learner: names of the archived files, and how they are read.

export.py writes the archive. docs/export.md has the code that reads it with jax and numpy alone.
"""

import json
import math
import pathlib
import zipfile
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.export
import numpy as np

from metasgd_jax.io.files import PathLike, as_path, first_line

FORMAT_VERSION = 1
PROGRAMS = ('adapt', 'predict')
_MOST_ABOUT = 2**20  # Largest size of about.json in bytes.


class _NewerError(ValueError):
  """The file was written by a newer version of this package. It may be intact."""


class Exported(NamedTuple):
  """The content of an exported file.

  Attributes:
    about: Content of about.json.
    parameters: Leaves of meta by name, such as 'theta.Dense_0.kernel'.
    adapt: Function `(parameters, support_x [S, …], support_y [S, …]) → adapted`, a dict of arrays by name.
    predict: Function `(adapted, x [Q, …]) → outputs [Q, …]`.

  Both functions may be jitted, and mapped over tasks with `jax.lax.map`. JAX supports neither `vmap` nor derivatives of
  exported programs.

  Example:
    >>> import tempfile
    >>> tasks = ms.tasks.sinusoid(shot=5)
    >>> learner = ms.meta_sgd(ms.nn.from_linen(ms.nn.MLP((8,))), ms.losses.mean_squared_error)
    >>> episode = tasks.episode(tasks.sample(jax.random.key(0)), jax.random.key(1))
    >>> meta = learner.init(jax.random.key(2), episode)  # Or state.meta, after ms.train.
    >>> with tempfile.TemporaryDirectory() as directory:
    ...   exported = ms.export_learner(f'{directory}/sine.zip', learner, meta, episode, platforms=['cpu'])
    >>> sorted(exported.parameters)[:2], exported.about['platforms'], exported.about['adapt']['takes'][1]
    (['alpha.Dense_0.bias', 'alpha.Dense_0.kernel'], ['cpu'], 'float32[S,1]')
  """

  about: dict[str, Any]
  parameters: dict[str, np.ndarray]
  adapt: Callable[[dict[str, Any], Any, Any], dict[str, jax.Array]]
  predict: Callable[[dict[str, Any], Any], Any]


def load_exported(path: PathLike) -> Exported:
  """Returns the content of the exported file at `path`. The programs are compiled when they are first called.

  The file is a zip archive. Its programs are code that XLA compiles and runs, so load only files from people whom you
  trust. The format, the sizes and the checksums of the archived files are checked here. An error inside a program may
  show only when the program is called.

  Raises:
    ValueError: if there is no such file, if it is not an exported learner, if it is damaged, if it is from a newer
      version, or if it has 64-bit numbers while JAX is limited to 32 bits.

  Example:
    >>> import tempfile
    >>> tasks = ms.tasks.sinusoid(shot=5)
    >>> learner = ms.meta_sgd(ms.nn.from_linen(ms.nn.MLP((8,))), ms.losses.mean_squared_error)
    >>> episode = tasks.episode(tasks.sample(jax.random.key(0)), jax.random.key(1))
    >>> meta = learner.init(jax.random.key(2), episode)  # Or state.meta, after ms.train.
    >>> with tempfile.TemporaryDirectory() as directory:
    ...   _ = ms.export_learner(f'{directory}/sine.zip', learner, meta, episode)
    ...   exported = ms.load_exported(f'{directory}/sine.zip')
    >>> adapted = exported.adapt(exported.parameters, *episode.support)
    >>> exported.predict(adapted, episode.query.x).shape == episode.query.y.shape
    True
  """
  path = as_path(path)
  try:
    about, parameters, programs = _read(path)
  except _NewerError:
    raise
  except Exception as e:  # zipfile, json and jax.export raise errors of many types for a broken file.
    raise ValueError(
      f'{path} cannot be read as an exported learner ({first_line(e)}); check the path, or export it again'
    ) from e
  for program in programs:
    _check_bits(path, program)
  return Exported(about, parameters, *(jax.jit(program.call) for program in programs))


def _check_bits(path: pathlib.Path, program: jax.export.Exported) -> None:
  for dtype in {aval.dtype for aval in (*program.in_avals, *program.out_avals)}:
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
      raise ValueError(f"{path} uses {dtype}; call jax.config.update('jax_enable_x64', True), which allows 64 bits")


def described(program: jax.export.Exported) -> dict[str, Any]:
  """Returns the types of a program's inputs and outputs, `{'takes': inputs, 'gives': outputs}`.

  Inputs and outputs are trees in which a text such as 'float32[S,28,28,1]' stands for each array.
  """
  takes, _ = jax.tree.unflatten(program.in_tree, map(_text, program.in_avals))
  gives = jax.tree.unflatten(program.out_tree, map(_text, program.out_avals))
  return json.loads(json.dumps({'takes': takes, 'gives': gives}))  # JSON turns tuples into lists.


def _text(aval: Any) -> str:
  return f'{np.dtype(aval.dtype).name}[{",".join(map(str, aval.shape))}]'


def member(name: str) -> str:
  """Returns the name, inside the zip archive, of the file that stores a parameter."""
  return f'parameters/{name}.npy'


def _read(path: pathlib.Path) -> tuple[dict[str, Any], dict[str, np.ndarray], list[jax.export.Exported]]:
  if not path.is_file():
    raise ValueError('there is no such file')
  with zipfile.ZipFile(path) as archive:
    _check_sizes(archive, path.stat().st_size)
    about = _read_about(archive)
    _check_members(archive, about)
    programs = [_read_program(archive, name, about) for name in PROGRAMS]
    return about, _read_parameters(archive, about['parameters'], programs[0]), programs


def _check_sizes(archive: zipfile.ZipFile, size: int) -> None:
  """Raises ValueError if reading the archive could take much more memory than the `size` bytes of its file."""
  infos = archive.infolist()
  if any(info.compress_type != zipfile.ZIP_STORED for info in infos):
    raise ValueError('the files in it are compressed')
  if sum(info.file_size for info in infos) > size:  # Archived files overlap.
    raise ValueError(
      f'according to their headers, the archived files have more bytes in all than the archive ({size:,} bytes)'
    )


def _read_about(archive: zipfile.ZipFile) -> dict[str, Any]:
  if 'about.json' not in archive.namelist():
    raise ValueError('it has no about.json')
  if archive.getinfo('about.json').file_size > _MOST_ABOUT:
    raise ValueError(f'its about.json is larger than {_MOST_ABOUT >> 20} MiB')
  about = json.loads(archive.read('about.json'))
  version = about.get('format_version') if isinstance(about, dict) else None
  if not isinstance(version, int) or version < 1:
    raise ValueError(f'format_version in about.json must be an integer of at least 1, got {version!r:.80}')
  if version > FORMAT_VERSION:
    raise _NewerError(
      f'{archive.filename} is of format version {version}, newer than {FORMAT_VERSION}, the newest that this version '
      'of metasgd_jax reads; upgrade metasgd_jax'
    )
  return about


def _check_members(archive: zipfile.ZipFile, about: dict[str, Any]) -> None:
  names = about.get('parameters')
  if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
    raise ValueError('about.json does not name the parameters')
  wanted = {'about.json', *(f'{name}.bin' for name in PROGRAMS), *map(member, names)}
  if odd := sorted(wanted ^ set(archive.namelist())):
    raise ValueError(f'its file {odd[0]} is {"missing" if odd[0] in wanted else "not part of an exported learner"}')


def _read_program(archive: zipfile.ZipFile, name: str, about: dict[str, Any]) -> jax.export.Exported:
  program = jax.export.deserialize(bytearray(archive.read(f'{name}.bin')))
  if about.get(name) != described(program) or about.get('platforms') != list(program.platforms):
    raise ValueError(f'about.json describes another program than {name}.bin')
  return program


def _read_parameters(archive: zipfile.ZipFile, names: list[str], adapt: jax.export.Exported) -> dict[str, np.ndarray]:
  (takes, *_), _ = jax.tree.unflatten(adapt.in_tree, adapt.in_avals)
  if not isinstance(takes, dict) or set(takes) != set(names):
    raise ValueError('its parameters have other names than the parameters of its program adapt.bin')
  return {name: _read_npy(archive, name, takes[name]) for name in names}


def _read_npy(archive: zipfile.ZipFile, name: str, wanted: Any) -> np.ndarray:
  """Returns the parameter `name`, which is stored as a .npy file in the archive.

  Raises ValueError if the header of this file does not fit the program, before the data are read, or if the header does
  not fit the size of the data.
  """
  with archive.open(member(name)) as file:
    np.lib.format.read_magic(file)
    shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
    if (shape, dtype) != (wanted.shape, wanted.dtype):
      raise ValueError(
        f'its parameter {name} has the dtype {dtype} and the shape {shape}, but adapt.bin takes {_text(wanted)}'
      )
    data = bytearray(file.read())
  if len(data) != math.prod(shape) * dtype.itemsize:
    raise ValueError(
      f'its parameter {name} has {len(data)} bytes, but its header describes {math.prod(shape) * dtype.itemsize}'
    )
  return np.ndarray(shape, dtype, data, order='F' if fortran_order else 'C')
