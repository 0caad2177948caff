"""The format of an exported learner's file: the names and descriptions of its members, and the code that reads it.

export.py writes the file. docs/export.md has the code that reads it with jax and numpy alone.
"""

import io
import json
import math
import pathlib
import zipfile
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.export
import numpy as np

from metasgd_jax.io.files import PathLike

FORMAT_VERSION = 1
PROGRAMS = ('adapt', 'predict')
_MOST_BYTES = 2**32  # Largest size of a file. It also limits the data that is read, since no member is compressed.
_MOST_ABOUT = 2**20


class Exported(NamedTuple):
  """The content of an exported file.

  Attributes:
    about: Content of about.json.
    parameters: Leaves of meta by name, such as 'theta.Dense_0.kernel'.
    adapt: Function `(parameters, support_x [S, …], support_y [S, …]) → adapted`, which is a dict of arrays by name.
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
  """Returns the content of the exported file at `path`. Its functions are compiled when they are first called.

  A program in such a file is code that XLA compiles and runs, so load only files from people whom you trust. The
  format, the sizes and the checksums of the members are checked here. An error inside a program may show only when the
  program is called.

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
  try:
    path = pathlib.Path(path).expanduser()
    if not path.is_file():
      raise ValueError('there is no such file')
    size = path.stat().st_size
    if size > _MOST_BYTES:
      raise ValueError(f'it has more than {_MOST_BYTES:,} bytes')
    with zipfile.ZipFile(path) as archive:
      exported = _read(archive, size)
  except Exception as e:  # zipfile, json and jax.export raise errors of many types for a broken file.
    reason = ''.join(c if c.isprintable() else ' ' for c in (str(e) or type(e).__name__)[:300])
    raise ValueError(f'{path} is not an exported learner, or only a part of one: {reason}; export it again') from e
  dtypes = {text.partition('[')[0] for text in jax.tree.leaves([exported.about[name] for name in PROGRAMS])}
  if wide := {name for name in dtypes if jax.dtypes.canonicalize_dtype(name) != name}:
    raise ValueError(
      f"{path} uses {min(wide)}, but JAX is limited to 32 bits; call jax.config.update('jax_enable_x64', True) first"
    )
  return exported


def described(program: jax.export.Exported) -> dict[str, Any]:
  """Returns the inputs and outputs of a program as JSON: trees of strings such as 'float32[S,28,28,1]'."""
  takes, by_keyword = jax.tree.unflatten(program.in_tree, [_text(a.shape, a.dtype) for a in program.in_avals])
  if by_keyword:
    raise ValueError('its programs take keyword arguments')
  gives = jax.tree.unflatten(program.out_tree, [_text(a.shape, a.dtype) for a in program.out_avals])
  return json.loads(json.dumps({'takes': takes, 'gives': gives}))  # JSON turns tuples into lists.


def member(name: str) -> str:
  """Returns the name of the zip archive's member that holds a parameter."""
  return f'parameters/{name}.npy'


def as_npy(array: Any) -> bytes:
  """Returns the bytes that `numpy.save` writes for an array."""
  file = io.BytesIO()
  np.save(file, np.asarray(jax.device_get(array)), allow_pickle=False)
  return file.getvalue()


def _read(archive: zipfile.ZipFile, size: int) -> Exported:
  sizes = {info.filename: info.file_size for info in archive.infolist()}
  if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
    raise ValueError('its members are compressed')
  if 'about.json' not in sizes or len(sizes) < len(archive.infolist()):
    raise ValueError('it has no about.json, or two members of the same name')
  if sizes['about.json'] > _MOST_ABOUT or sum(sizes.values()) > size:  # A larger sum means that members overlap.
    raise ValueError('its members are too large')
  about = json.loads(archive.read('about.json'))
  if not isinstance(about, dict) or type(about.get('format_version')) is not int or about['format_version'] < 1:
    raise ValueError('about.json has no format_version, which is 1 or more')
  if about['format_version'] > FORMAT_VERSION:
    raise ValueError(f'it is of format version {about["format_version"]}, newer than {FORMAT_VERSION}')
  names = about.get('parameters')
  if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
    raise ValueError('about.json does not name the parameters')
  wanted = {'about.json', *(f'{name}.bin' for name in PROGRAMS), *map(member, names)}
  if set(sizes) != wanted:
    raise ValueError(f'{min(wanted ^ set(sizes))} is {"missing" if wanted - set(sizes) else "more than belongs there"}')
  programs = {}
  for name in PROGRAMS:
    programs[name] = jax.export.deserialize(bytearray(archive.read(f'{name}.bin')))
    if about.get(name) != described(programs[name]) or about.get('platforms') != list(programs[name].platforms):
      raise ValueError(f'about.json describes another program than {name}.bin')
  takes = about['adapt']['takes'][0]
  if not isinstance(takes, dict) or set(takes) != set(names):
    raise ValueError('the parameters are not those that adapt.bin takes')
  parameters = {name: _read_npy(archive, name, takes[name]) for name in names}
  return Exported(about, parameters, *(jax.jit(programs[name].call) for name in PROGRAMS))


def _read_npy(archive: zipfile.ZipFile, name: str, wanted: str) -> np.ndarray:
  """Returns a parameter. Checks its header first, because NumPy allocates the array that the header describes."""
  with archive.open(member(name)) as file:
    if np.lib.format.read_magic(file) != (1, 0):
      raise ValueError('a parameter is not in the format of numpy.save')
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    if _text(shape, dtype) != wanted or dtype.kind not in 'biufc' or not dtype.isnative:
      raise ValueError(f'the parameters are not those that adapt.bin takes: {name} is not {wanted}')
    if math.prod(shape) * dtype.itemsize != archive.getinfo(member(name)).file_size - file.tell():
      raise ValueError('a parameter has another size than it says')
  return np.load(io.BytesIO(archive.read(member(name))), allow_pickle=False)


def _text(shape: Any, dtype: Any) -> str:
  return f'{np.dtype(dtype).name}[{",".join(map(str, shape))}]'
