"""A trained learner as one file that runs where this package is not: two programs, the parameters, what they are.

The file is a zip without compression. `adapt.bin` and `predict.bin` are programs of `jax.export` (StableHLO),
`parameters/NAME.npy` are the leaves of meta, and `about.json` says what goes in and what comes out. docs/export.md has
the lines that read it with jax and numpy alone.
"""

import contextlib
import io
import json
import math
import pathlib
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from metasgd_jax.leaves import named
from metasgd_jax.model_file import FewShotModel, build_learner
from metasgd_jax.types import Batch, Episode, Learner, PyTree
from metasgd_jax.version import __version__
from metasgd_jax.writers import PathLike, WriterError, atomic

FORMAT_VERSION = 1
PLATFORMS = ('cpu', 'cuda', 'tpu')
_KNOWN_PLATFORMS = (*PLATFORMS, 'rocm')
_PROGRAMS = ('adapt', 'predict')
_MOST_BYTES = 2**32  # Of a file, and so of what is read of it: nothing in it is compressed.
_MOST_ABOUT = 2**20
_CLOSE = 1e-4  # Of the largest output: float32's rounding through an inner step, compiled in two ways.


class Exported(NamedTuple):
  """What an exported file holds.

  Attributes:
    about: what about.json says.
    parameters: the leaves of meta by name, such as 'theta.Dense_0.kernel'.
    adapt: `(parameters, support_x [S, …], support_y [S, …]) → adapted`, a dict of arrays by name.
    predict: `(adapted, x [Q, …]) → outputs [Q, …]`.
  """

  about: dict[str, Any]
  parameters: dict[str, np.ndarray]
  adapt: Callable[[dict[str, Any], Any, Any], dict[str, jax.Array]]
  predict: Callable[[dict[str, Any], Any], Any]


def export_model(
  path: PathLike,
  model: FewShotModel,
  *,
  way: int | None = None,
  shot: int | None = None,
  inductive: bool = True,
  platforms: Sequence[str] = PLATFORMS,
) -> Exported:
  """Writes a trained classifier as `export_learner` does, and returns it as it was read back.

  It takes pictures float32 `[S, H, W, D]` of 0 to 1 with labels int32 `[S]` of 0 to N − 1, and answers with logits
  `[Q, N]`. Whoever calls it does what `FewShotClassifier` does before: turn light into dark where the model wants dark
  backgrounds, and give each class as many pictures.

  Args:
    path: of the file to write.
    model: what `load_model` returns.
    way: N, 2 to the model's, which it is where left out; no other number of classes can be told apart by the file.
    shot: K, where the file shall take N·K pictures to adapt to, and no other number.
    inductive: normalise by the support's statistics, so that no answer depends on the other pictures.
    platforms: some of cpu, cuda, rocm and tpu.

  Raises:
    ValueError: way that the model does not have, shot below 1, and as `export_learner`.
    WriterError: as `export_learner`.
  """
  if shot is not None and (isinstance(shot, bool) or not isinstance(shot, int) or not 1 <= shot <= 10_000):
    raise ValueError(f'shot must be an integer from 1 to 10,000, got {shot!r}')
  config = model.config
  learner = build_learner(config, way, inductive)
  n = config.way if way is None else way
  y = np.arange(n * (shot or 1), dtype=np.int32) % n
  draw = lambda count: np.random.default_rng(0).uniform(size=(count, *config.image_shape)).astype(np.float32)
  says = {
    'learner': config.learner,
    'classes': n,
    'image_shape': config.image_shape,
    'pixels': '0 to 1, light on dark' if config.background == 'dark' else '0 to 1',
    'inner_steps': config.inner_steps,
    'batch_norm': 'inductive' if inductive else 'transductive',
    'outputs': 'logits',
    'training': dict(config.training),
  }
  episode = Episode(Batch(draw(len(y)), y), Batch(draw(3), y[:3]))
  return export_learner(path, learner, model.meta, episode, any_support=shot is None, platforms=platforms, says=says)


def export_learner(
  path: PathLike,
  learner: Learner,
  meta: PyTree,
  episode: Episode,
  *,
  any_support: bool = True,
  platforms: Sequence[str] = PLATFORMS,
  says: Mapping[str, Any] | None = None,
) -> Exported:
  """Writes a learner's `adapt` and `predict` with its parameters, and returns what it reads back.

  The file takes any number of query items. It is compared with the learner on `episode` before it takes its name,
  where this machine has one of the platforms; `about['checked_on']` says which.

  Args:
    path: of the file to write.
    learner: any; one that is stochastic adapts with `jax.random.key(0)`, always.
    meta: its parameters, arrays of numbers.
    episode: gives shapes and dtypes, and the values to compare on; support and query are a `Batch` each, with S and
      with Q in front of its leaves.
    any_support: whether the file takes any number of support items, or S alone.
    platforms: some of cpu, cuda, rocm and tpu.
    says: facts for people to read, kept in about.json.

  Raises:
    ValueError: an unknown platform, one that an operation of the learner has no form for, a number of items that
      cannot be left open, parameters or facts that the file cannot hold.
    WriterError: the file cannot be written, or what was read back gives other numbers.
  """
  path, platforms = _place(path), _checked(platforms)
  parameters, whole_meta = _by_name(meta)
  support, query = episode
  if not isinstance(support, Batch) or not isinstance(query, Batch):
    raise ValueError(f'support and query must be Batch(x, y), got {type(support).__name__}, {type(query).__name__}')

  def adapt(parameters, x, y):
    return _by_name(learner.adapt(whole_meta(parameters), Batch(x, y), jax.random.key(0)))[0]

  def predict(adapted, x):
    return learner.predict(whole_adapted(adapted), x)

  scope = jax.export.SymbolicScope()  # Of S and Q, which JAX takes for at least 1.
  open_ = lambda tree, name: _shapes(tree, jax.export.symbolic_shape(name, scope=scope)[0])
  of_key = lambda meta, support: learner.adapt(meta, support, jax.random.key(0))
  whole_adapted = _by_name(jax.eval_shape(of_key, _shapes(meta), _shapes(support)))[1]
  x, y = open_(support, 'S') if any_support else _shapes(support)
  programs = {'adapt': _program(adapt, platforms, any_support, _shapes(parameters), x, y)}
  out = programs['adapt']
  adapted = jax.tree.unflatten(out.out_tree, [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in out.out_avals])
  programs['predict'] = _program(predict, platforms, any_support, adapted, open_(query.x, 'Q'))
  here = {'gpu': 'cuda'}.get(jax.default_backend(), jax.default_backend())
  about = {
    'format_version': FORMAT_VERSION,
    'made_with': {'metasgd_jax': __version__, 'jax': jax.__version__},
    'platforms': list(platforms),
    'checked_on': here if here in platforms else None,
    'parameters': list(parameters),
    **{name: _described(program) for name, program in programs.items()},
    'says': dict(says or {}),
  }
  try:
    members = {'about.json': json.dumps(about, indent=2, allow_nan=False).encode()}
    members |= {f'{name}.bin': bytes(program.serialize()) for name, program in programs.items()}
  except (TypeError, ValueError) as e:
    raise ValueError(f'the file cannot hold this ({e}); facts are JSON, inputs are arrays in dicts and lists') from e
  members |= {_member(name): _as_npy(array) for name, array in parameters.items()}
  try:
    with atomic(path) as file:
      with zipfile.ZipFile(file, 'w') as archive:
        for name, data in members.items():
          archive.writestr(zipfile.ZipInfo(name), data)
      file.flush()
      found = load_exported(file.name)
      if about['checked_on']:
        _check_numbers(found, learner, meta, support, query.x)
        if any_support:
          _check_numbers(found, learner, meta, jax.tree.map(lambda a: np.concatenate([a, a]), support), query.x)
  except OSError as e:
    raise WriterError(f'{path} cannot be written ({e.strerror}); give another path') from e
  return found


def load_exported(path: PathLike) -> Exported:
  """Returns what the exported file at `path` holds; its functions are compiled when they are first called.

  Raises:
    ValueError: there is no such file, it is not of this kind, is damaged, or is from a newer version.
  """
  try:
    path = pathlib.Path(path).expanduser()
    if not path.is_file():
      raise ValueError('there is no such file')
    if path.stat().st_size > _MOST_BYTES:
      raise ValueError(f'it has more than {_MOST_BYTES:,} bytes')
    with zipfile.ZipFile(path) as archive:
      return _read(archive)
  except Exception as e:  # zipfile, json and jax.export have a dozen errors of their own for a file that is broken.
    reason = ''.join(c if c.isprintable() else ' ' for c in (str(e) or type(e).__name__)[:300])
    raise ValueError(f'{path} is not an exported learner, or not the whole of it: {reason}; export it again') from e


def _read(archive: zipfile.ZipFile) -> Exported:
  sizes = {info.filename: info.file_size for info in archive.infolist()}
  if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
    raise ValueError('it is compressed')
  if 'about.json' not in sizes or len(sizes) < len(archive.infolist()):
    raise ValueError('it has no about.json, or a member twice')
  if sizes['about.json'] > _MOST_ABOUT or sum(sizes.values()) > _MOST_BYTES:
    raise ValueError('its members are too large')
  about = json.loads(archive.read('about.json'))
  if not isinstance(about, dict) or type(about.get('format_version')) is not int:
    raise ValueError('about.json has no format_version')
  if about['format_version'] > FORMAT_VERSION:
    raise ValueError(f'it is of format version {about["format_version"]}, newer than {FORMAT_VERSION}')
  names = about.get('parameters')
  if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
    raise ValueError('about.json does not name the parameters')
  wanted = {'about.json', *(f'{name}.bin' for name in _PROGRAMS), *map(_member, names)}
  if set(sizes) != wanted:
    raise ValueError(f'{min(wanted ^ set(sizes))} is {"missing" if wanted - set(sizes) else "more than belongs there"}')
  parameters = {name: _from_npy(archive.read(_member(name))) for name in names}
  programs = {}
  for name in _PROGRAMS:
    programs[name] = jax.export.deserialize(bytearray(archive.read(f'{name}.bin')))
    if about.get(name) != _described(programs[name]) or about.get('platforms') != list(programs[name].platforms):
      raise ValueError(f'about.json tells of another program than {name}.bin')
  given = {name: _text(array) for name, array in parameters.items()}
  if given != about['adapt']['takes'][0]:
    raise ValueError('the parameters are not those that adapt.bin takes')
  return Exported(about, parameters, *(jax.jit(programs[name].call) for name in _PROGRAMS))


def _place(path: PathLike) -> pathlib.Path:
  """Where to write; raises WriterError where there is no such folder, before anything is compiled."""
  try:
    found = pathlib.Path(path).expanduser()
    if '\0' in str(found):
      raise ValueError('a name with a NUL')
    if found.parent.is_dir() and not found.is_dir():
      return found
    reason = 'it is a folder' if found.is_dir() else f'there is no folder {found.parent}'
  except (RuntimeError, ValueError, OSError) as e:  # Of ~ of nobody, or a name with a NUL.
    reason = str(e)
  raise WriterError(f'{path} cannot be written ({reason}); give another path')


def _checked(platforms: Sequence[str]) -> tuple[str, ...]:
  names = tuple(platforms)
  if isinstance(platforms, str) or not names or len(set(names)) < len(names) or set(names) - set(_KNOWN_PLATFORMS):
    raise ValueError(f'platforms must be some of {", ".join(_KNOWN_PLATFORMS)}, each once, got {platforms!r}')
  return names


def _by_name(tree: PyTree) -> tuple[dict[str, Any], Callable[[Mapping[str, Any]], PyTree]]:
  """A tree's leaves by name, and what puts such leaves together again."""
  pairs, structure = named(tree), jax.tree.structure(tree)
  leaves = dict(pairs)
  if len(leaves) < len(pairs):
    raise ValueError(f'two leaves have one name among {", ".join(name for name, _ in pairs)[:200]}; rename one')
  return leaves, lambda found: jax.tree.unflatten(structure, [found[name] for name in leaves])


def _shapes(tree: PyTree, items: Any = None) -> PyTree:
  """The shapes and dtypes of a tree, with `items` as the first dimension where it is given."""
  front = lambda shape: shape if items is None else (items, *shape[1:])
  return jax.tree.map(lambda a: jax.ShapeDtypeStruct(front(jnp.shape(a)), jnp.result_type(a)), tree)


def _program(function, platforms, any_support: bool, *inputs) -> jax.export.Exported:
  try:
    with _without_folders():
      return jax.export.export(jax.jit(function), platforms=platforms)(*inputs)
  except jax.errors.InconclusiveDimensionOperation as e:
    advice = 'any_support=False fixes that of the support' if any_support else 'a query of any size cannot be had'
    raise ValueError(f'the number of items cannot be left open ({_first(e)}); {advice}') from e
  except NotImplementedError as e:
    raise ValueError(f'it cannot be lowered for {", ".join(platforms)} ({_first(e)}); leave a platform out') from e


@contextlib.contextmanager
def _without_folders() -> Iterator[None]:
  """Has programs keep the names of source files, but not where they lie, which is nobody's business."""
  setting = 'jax_hlo_source_file_canonicalization_regex'
  before = getattr(jax.config, setting)
  jax.config.update(setting, r'^.*[/\\]')
  try:
    yield
  finally:
    jax.config.update(setting, before)


def _first(e: Exception) -> str:
  return (str(e).strip().splitlines() or [type(e).__name__])[0][:200]


def _text(array: Any) -> str:
  return f'{np.dtype(array.dtype).name}[{",".join(map(str, array.shape))}]'


def _described(program: jax.export.Exported) -> dict[str, Any]:
  """What a program takes and gives, as JSON: trees of texts such as 'float32[S,28,28,1]'."""
  takes, by_keyword = jax.tree.unflatten(program.in_tree, list(map(_text, program.in_avals)))
  if by_keyword:
    raise ValueError('its programs take arguments by keyword')
  gives = jax.tree.unflatten(program.out_tree, list(map(_text, program.out_avals)))
  return json.loads(json.dumps({'takes': takes, 'gives': gives}))  # Tuples are lists there.


def _member(name: str) -> str:
  return f'parameters/{name}.npy'


def _as_npy(array: Any) -> bytes:
  array, file = np.asarray(jax.device_get(array)), io.BytesIO()
  if array.dtype.kind not in 'biufc':
    raise ValueError(f'parameters must be of a dtype that NumPy has, got {array.dtype}; cast them to float32')
  np.save(file, array, allow_pickle=False)
  return file.getvalue()


def _from_npy(data: bytes) -> np.ndarray:
  """An array, after a look at its header: NumPy makes room for what that says before it reads."""
  file = io.BytesIO(data)
  if np.lib.format.read_magic(file) != (1, 0):
    raise ValueError('a parameter is not as numpy.save writes it')
  shape, _, dtype = np.lib.format.read_array_header_1_0(file)
  if dtype.kind not in 'biufc' or math.prod(shape) * dtype.itemsize != len(data) - file.tell():
    raise ValueError('a parameter has another size than it says')
  return np.load(io.BytesIO(data), allow_pickle=False)


def _check_numbers(found: Exported, learner: Learner, meta: PyTree, support: Batch, x: Any) -> None:
  """Raises WriterError unless the file's programs give the learner's numbers, to float32's rounding."""

  @jax.jit
  def ours(meta, support, x):
    return learner.predict(learner.adapt(meta, support, jax.random.key(0)), x)

  theirs = found.predict(found.adapt(found.parameters, *support), x)
  for a, b in zip(jax.tree.leaves(ours(meta, support, x)), jax.tree.leaves(theirs), strict=True):
    a, b = np.asarray(a), np.asarray(b)
    if not np.allclose(a, b, rtol=0, atol=_CLOSE * np.max(np.abs(a), initial=1e-30), equal_nan=True):
      raise WriterError(f'the exported programs differ from the learner by {np.max(np.abs(a - b)):.3g}; report it')
