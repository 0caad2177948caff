"""Exports a trained learner to one file that runs without this package: two programs, parameters, and a description.

The file is a zip archive without compression. `adapt.bin` and `predict.bin` are programs of `jax.export` (StableHLO),
`parameters/NAME.npy` are the leaves of meta, and `about.json` describes the inputs and outputs. docs/export.md has the
code that reads the file with jax and numpy alone.
"""

import contextlib
import json
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax.extend.core import InconclusiveDimensionOperation

from metasgd_jax.deploy import export_checks
from metasgd_jax.deploy.exported_file import FORMAT_VERSION, Exported, as_npy, described, load_exported, member
from metasgd_jax.deploy.model_file import FewShotModel, build_learner
from metasgd_jax.io.files import PathLike, WriterError, atomic
from metasgd_jax.outer import sharding
from metasgd_jax.tree import is_key, named
from metasgd_jax.types import Batch, Episode, Learner, PyTree
from metasgd_jax.version import __version__

PLATFORMS = ('cpu', 'cuda', 'tpu')
_CLOSE = 1e-4  # Relative to the largest output. Two compilations of an inner step round differently in float32.


def export_model(
  path: PathLike,
  model: FewShotModel,
  *,
  way: int | None = None,
  shot: int | None = None,
  inductive: bool = True,
  platforms: Sequence[str] = PLATFORMS,
  report: Callable[[str], None] | None = None,
) -> Exported:
  """Writes a trained classifier as `export_learner` does, and returns the content of the file, which it reads back.

  The file takes support images, float32 `[S, H, W, D]` with values from 0 to 1, and their labels, int32 `[S]` from 0 to
  N − 1. It returns logits `[Q, N]` for Q query images. The user of the file must do the preprocessing that
  `FewShotClassifier` does: invert images with a light background if the model was trained on dark backgrounds, and give
  each class the same number of support images.

  Args:
    path: Path of the file to write.
    model: Trained model, such as `load_model` returns.
    way: Number of classes N, from 2 to the way of the model, which is the default. The file serves no other number of
      classes.
    shot: Number of support images per class, K. The file then takes exactly N·K support images. By default it takes any
      number.
    inductive: Whether batch norm uses the statistics of the support, so that no prediction depends on the other query
      images.
    platforms: Platforms that the file runs on, some of cpu, cuda, rocm and tpu.
    report: Function that receives a line of text when all arguments have been checked, before the slow part begins.

  Raises:
    ValueError: if the model does not support `way` classes, if `shot` is not an integer from 1 to 10,000, or if
      `export_learner` raises it.
    WriterError: if `export_learner` raises it.

  Example:
    >>> import tempfile
    >>> model = ms.load_model('omniglot')
    >>> with tempfile.TemporaryDirectory() as directory:
    ...   exported = ms.export_model(f'{directory}/two.zip', model, way=2, shot=1, platforms=['cpu'])
    >>> exported.about['predict']['takes'][1], exported.about['says']['pixels']
    ('float32[Q,28,28,1]', '0 to 1, light on dark')
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
  return export_learner(
    path, learner, model.meta, episode, any_support=shot is None, platforms=platforms, says=says, report=report
  )  # fmt: skip


def export_learner(
  path: PathLike,
  learner: Learner,
  meta: PyTree,
  episode: Episode,
  *,
  any_support: bool = True,
  platforms: Sequence[str] = PLATFORMS,
  says: Mapping[str, Any] | None = None,
  report: Callable[[str], None] | None = None,
) -> Exported:
  """Writes `adapt` and `predict` of a learner with its parameters, and returns the content of the file, read back.

  The file takes any number of query items. Before the file gets its name, its programs are compared with the learner on
  `episode`, if this machine has one of the platforms; `about['checked_on']` names that platform. The programs compute
  matrix products in the highest precision (`jax.default_matmul_precision`), so that all platforms give the same
  numbers.

  Args:
    path: Path of the file to write.
    learner: Learner to export. A stochastic learner always adapts with `jax.random.key(0)`.
    meta: Parameters of the learner, a pytree of numbers or arrays of numbers. They are converted to the dtypes that JAX
      gives them.
    episode: Episode that gives the shapes and dtypes, and the values for the comparison. Its support and its query are
      each a `Batch`. Leaves of the support have the leading axis S, leaves of the query the leading axis Q.
    any_support: Whether the file takes any number of support items. Otherwise it takes exactly S.
    platforms: Platforms that the file runs on, some of cpu, cuda, rocm and tpu.
    says: Facts for people who read the file, stored in about.json.
    report: Function that receives a line of text when all arguments have been checked, before the slow part begins.

  Raises:
    ValueError: if a platform is unknown, if a platform does not support an operation of the learner, if an operation
      calls back into Python, if the learner needs a fixed number of items and the file is to take any number, if leaves
      of the episode have no leading axis of items, or if the file cannot hold the parameters or the facts.
    WriterError: if the file cannot be written, or if the programs that were read back give other numbers.

  Example:
    >>> import tempfile
    >>> tasks = ms.tasks.sinusoid(shot=5)
    >>> learner = ms.meta_sgd(ms.nn.from_linen(ms.nn.MLP((8,))), ms.losses.mean_squared_error)
    >>> episode = tasks.episode(tasks.sample(jax.random.key(0)), jax.random.key(1))
    >>> meta = learner.init(jax.random.key(2), episode)  # Or state.meta, after ms.train.
    >>> with tempfile.TemporaryDirectory() as directory:
    ...   exported = ms.export_learner(f'{directory}/sine.zip', learner, meta, episode)
    >>> adapted = exported.adapt(exported.parameters, *episode.support)
    >>> exported.predict(adapted, jnp.zeros((7, 1))).shape  # Of any number of query items.
    (7, 1)
  """
  path, platforms = export_checks.place(path), export_checks.known_platforms(platforms)
  meta, (support, query) = export_checks.as_arrays(meta), episode
  if not isinstance(support, Batch) or not isinstance(query, Batch):
    raise ValueError(f'support and query must be Batch(x, y), got {type(support).__name__} and {type(query).__name__}')
  export_checks.check_items(support, 'support')
  export_checks.check_items(Batch(query.x, None), 'query')
  facts = export_checks.as_json(says or {})
  parameters, whole_meta = _by_name(meta)

  def adapt(parameters, x, y):
    return _by_name(learner.adapt(whole_meta(parameters), Batch(x, y), jax.random.key(0)))[0]

  def predict(adapted, x):
    return learner.predict(whole_adapted(adapted), x)

  of_key = lambda meta, support: learner.adapt(meta, support, jax.random.key(0))
  like = jax.eval_shape(of_key, _shapes(meta), _shapes(support))
  if any(map(is_key, jax.tree.leaves(like))):
    raise ValueError(
      'what adapt returns contains a key of jax.random, which no file can hold; return jax.random.key_data(key) instead'
    )
  # If this line passes, later errors are due to the open numbers of items.
  jax.eval_shape(learner.predict, like, _shapes(query.x))
  whole_adapted = _by_name(like)[1]
  if report:
    report('exporting, and comparing what was written with the learner, which may take half a minute')
  scope = jax.export.SymbolicScope()  # The scope of S and Q, which JAX assumes to be at least 1.
  open_ = lambda tree, name: _shapes(tree, jax.export.symbolic_shape(name, scope=scope)[0])
  x, y = open_(support, 'S') if any_support else _shapes(support)
  programs = {'adapt': _program(adapt, platforms, any_support, _shapes(parameters), x, y)}
  out = programs['adapt']
  adapted = jax.tree.unflatten(out.out_tree, [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in out.out_avals])
  programs['predict'] = _program(predict, platforms, any_support, adapted, open_(query.x, 'Q'))
  checked_on, device = _where_to_check(platforms)
  about = {
    'format_version': FORMAT_VERSION,
    'made_with': {'metasgd_jax': __version__, 'jax': jax.__version__},
    'platforms': list(platforms),
    'checked_on': checked_on,
    'parameters': list(parameters),
    **{name: described(program) for name, program in programs.items()},
    'says': facts,
  }
  members = {'about.json': json.dumps(about, indent=2).encode()}
  members |= {f'{name}.bin': _serialized(program) for name, program in programs.items()}
  members |= {member(name): as_npy(array) for name, array in parameters.items()}
  with atomic(path, 'give another path') as file:
    with zipfile.ZipFile(file, 'w') as archive:
      for name, data in members.items():
        archive.writestr(zipfile.ZipInfo(name), data)
    file.flush()
    found = load_exported(file.name)
    if checked_on:
      with jax.default_device(device), jax.default_matmul_precision('highest'):
        _check_numbers(found, learner, meta, support, query.x)
        if any_support:
          _check_numbers(found, learner, meta, jax.tree.map(lambda a: np.concatenate([a, a]), support), query.x)
  return found


def _by_name(tree: PyTree) -> tuple[dict[str, Any], Callable[[Mapping[str, Any]], PyTree]]:
  """Returns the leaves of a tree by name, and a function that rebuilds the tree from such leaves."""
  pairs, structure = named(tree), jax.tree.structure(tree)
  leaves = dict(pairs)
  if len(leaves) < len(pairs):
    raise ValueError(f'two leaves have the same name, among {", ".join(name for name, _ in pairs)[:200]}; rename one')
  return leaves, lambda found: jax.tree.unflatten(structure, [found[name] for name in leaves])


def _shapes(tree: PyTree, items: Any = None) -> PyTree:
  """Returns the shapes and dtypes of a tree. If `items` is given, it replaces the first dimension of each leaf."""
  front = lambda shape: shape if items is None else (items, *shape[1:])
  return jax.tree.map(lambda a: jax.ShapeDtypeStruct(front(jnp.shape(a)), jnp.result_type(a)), tree)


def _program(function, platforms, any_support: bool, *inputs) -> jax.export.Exported:
  """Returns the exported program of a function that is known to work with fixed numbers of items."""
  try:
    with _without_folders(), jax.default_matmul_precision('highest'):
      return jax.export.export(jax.jit(function), platforms=platforms)(*inputs)
  except (NotImplementedError, TypeError, ValueError, IndexError, InconclusiveDimensionOperation) as e:
    why = export_checks.first(e)
    if 'callback' in why:
      raise ValueError(f'the file cannot hold an operation that calls back into Python ({why}); remove it') from e
    if isinstance(e, NotImplementedError) and 'polymorphi' not in why:
      raise ValueError(f'the learner cannot be lowered for {", ".join(platforms)} ({why}); leave a platform out') from e
    advice = 'any_support=False fixes the number of support items; ' if any_support else ''
    raise ValueError(
      f'the number of items cannot be left open ({why}); {advice}predict must take any number of query items'
    ) from e


def _serialized(program: jax.export.Exported) -> bytes:
  try:
    return bytes(program.serialize())
  except Exception as e:  # ValueError for a kind of pytree node, RuntimeError for an effect, and errors of flatbuffers.
    raise ValueError(
      f'the file cannot hold this program ({export_checks.first(e)}); its inputs must be arrays in dicts and lists'
    ) from e


def _where_to_check(platforms: Sequence[str]) -> tuple[str | None, jax.Device | None]:
  """Returns the platform to compare on, and its device.

  The platform is JAX's default platform if it is one of `platforms`, or else the CPU if that is one of `platforms`.
  Otherwise both results are None.
  """
  here, host = jax.export.default_export_platform(), sharding.host_device()
  if here in platforms:
    return here, jax.local_devices()[0]
  return ('cpu', host) if 'cpu' in platforms and host.platform == 'cpu' else (None, None)


@contextlib.contextmanager
def _without_folders() -> Iterator[None]:
  """Makes programs store the names of source files without their folders, because the folders are private.

  JAX has no scoped form of this setting. It applies to all threads while a program is traced and lowered.
  """
  setting = 'jax_hlo_source_file_canonicalization_regex'
  before = getattr(jax.config, setting)
  jax.config.update(setting, r'^.*[/\\]')
  try:
    yield
  finally:
    jax.config.update(setting, before)


def _check_numbers(found: Exported, learner: Learner, meta: PyTree, support: Batch, x: Any) -> None:
  """Raises WriterError unless the programs of the file give the numbers of the learner, to float32 rounding."""

  @jax.jit
  def ours(meta, support, x):
    return learner.predict(learner.adapt(meta, support, jax.random.key(0)), x)

  meta, support, x = jax.device_get((meta, support, x))  # They may be on different devices.
  theirs = found.predict(found.adapt(found.parameters, *support), x)
  for a, b in zip(jax.tree.leaves(ours(meta, support, x)), jax.tree.leaves(theirs), strict=True):
    a, b = np.asarray(a), np.asarray(b)
    finite = np.isfinite(a) & np.isfinite(b)  # Logits of absent classes may be -inf.
    size = np.max(np.abs(a[finite]), initial=1e-30)
    if not np.allclose(a, b, rtol=0, atol=_CLOSE * size, equal_nan=True):
      off = np.max(np.abs(a[finite] - b[finite]), initial=0)
      raise WriterError(f'the exported programs differ from the learner by {off:.3g} where both are finite; report it')
