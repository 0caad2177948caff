"""A trained learner as one file that runs where this package is not: two programs, the parameters, what they are.

The file is a zip without compression. `adapt.bin` and `predict.bin` are programs of `jax.export` (StableHLO),
`parameters/NAME.npy` are the leaves of meta, and `about.json` says what goes in and what comes out. docs/export.md has
the lines that read it with jax and numpy alone.
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

__all__ = ['FORMAT_VERSION', 'PLATFORMS', 'Exported', 'export_learner', 'export_model', 'load_exported']

PLATFORMS = ('cpu', 'cuda', 'tpu')
_CLOSE = 1e-4  # Of the largest output: float32's rounding through an inner step, compiled in two ways.


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
    report: gets a line when all that was given is found to be right, before what takes long.

  Raises:
    ValueError: way that the model does not have, shot below 1, and as `export_learner`.
    WriterError: as `export_learner`.

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
  """Writes a learner's `adapt` and `predict` with its parameters, and returns what it reads back.

  The file takes any number of query items. It is compared with the learner on `episode` before it takes its name,
  where this machine has one of the platforms; `about['checked_on']` says which. Its products of matrices are of the
  highest precision (`jax.default_matmul_precision`), so that its numbers are the same on each.

  Args:
    path: of the file to write.
    learner: any; one that is stochastic adapts with `jax.random.key(0)`, always.
    meta: its parameters, arrays of numbers, or numbers; they get the dtypes that JAX gives them.
    episode: gives shapes and dtypes, and the values to compare on; support and query are a `Batch` each, with S and
      with Q in front of its leaves.
    any_support: whether the file takes any number of support items, or S alone.
    platforms: some of cpu, cuda, rocm and tpu.
    says: facts for people to read, kept in about.json.
    report: gets a line when all that was given is found to be right, before what takes long.

  Raises:
    ValueError: an unknown platform, one that an operation of the learner has no form for, an operation that calls
      back into Python, a number of items that cannot be left open, leaves of the episode without items in front,
      parameters or facts that the file cannot hold.
    WriterError: the file cannot be written, or what was read back gives other numbers.

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
    raise ValueError(f'support and query must be Batch(x, y), got {type(support).__name__}, {type(query).__name__}')
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
    raise ValueError('what adapt returns has a key of jax.random in it, which no file can hold; return its data')
  jax.eval_shape(learner.predict, like, _shapes(query.x))  # So that what fails after this is for an open number.
  whole_adapted = _by_name(like)[1]
  if report:
    report('exporting, and comparing what was written with the learner, which may take half a minute')
  scope = jax.export.SymbolicScope()  # Of S and Q, which JAX takes for at least 1.
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
  """A program of a function that is known to work with fixed numbers of items."""
  try:
    with _without_folders(), jax.default_matmul_precision('highest'):
      return jax.export.export(jax.jit(function), platforms=platforms)(*inputs)
  except (NotImplementedError, TypeError, ValueError, IndexError, InconclusiveDimensionOperation) as e:
    why = export_checks.first(e)
    if 'callback' in why:
      raise ValueError(f'the file cannot hold what calls back into Python ({why}); do without') from e
    if isinstance(e, NotImplementedError) and 'polymorphi' not in why:
      raise ValueError(f'it cannot be lowered for {", ".join(platforms)} ({why}); leave a platform out') from e
    advice = 'any_support=False fixes that of the support; ' if any_support else ''
    raise ValueError(
      f'the number of items cannot be left open ({why}); {advice}predict must take any number of query items'
    ) from e


def _serialized(program: jax.export.Exported) -> bytes:
  try:
    return bytes(program.serialize())
  except Exception as e:  # ValueError for a kind of node, RuntimeError for an effect, others of flatbuffers.
    raise ValueError(
      f'the file cannot hold this ({export_checks.first(e)}); inputs are arrays in dicts and lists'
    ) from e


def _where_to_check(platforms: Sequence[str]) -> tuple[str | None, jax.Device | None]:
  """The platform to compare on, and its device: JAX's own, or else a CPU; None where this machine has none of them."""
  here, host = jax.export.default_export_platform(), sharding.host_device()
  if here in platforms:
    return here, jax.local_devices()[0]
  return ('cpu', host) if 'cpu' in platforms and host.platform == 'cpu' else (None, None)


@contextlib.contextmanager
def _without_folders() -> Iterator[None]:
  """Has programs keep the names of source files, but not where they lie, which is nobody's business.

  JAX has no scoped form of this setting: it holds for all threads for as long as a program is traced and lowered.
  """
  setting = 'jax_hlo_source_file_canonicalization_regex'
  before = getattr(jax.config, setting)
  jax.config.update(setting, r'^.*[/\\]')
  try:
    yield
  finally:
    jax.config.update(setting, before)


def _check_numbers(found: Exported, learner: Learner, meta: PyTree, support: Batch, x: Any) -> None:
  """Raises WriterError unless the file's programs give the learner's numbers, to float32's rounding."""

  @jax.jit
  def ours(meta, support, x):
    return learner.predict(learner.adapt(meta, support, jax.random.key(0)), x)

  meta, support, x = jax.device_get((meta, support, x))  # From whatever device they are on.
  theirs = found.predict(found.adapt(found.parameters, *support), x)
  for a, b in zip(jax.tree.leaves(ours(meta, support, x)), jax.tree.leaves(theirs), strict=True):
    a, b = np.asarray(a), np.asarray(b)
    finite = np.isfinite(a) & np.isfinite(b)  # Logits of classes that are not there may be -inf.
    size = np.max(np.abs(a[finite]), initial=1e-30)
    if not np.allclose(a, b, rtol=0, atol=_CLOSE * size, equal_nan=True):
      off = np.max(np.abs(a[finite] - b[finite]), initial=0)
      raise WriterError(f'the exported programs differ from the learner, by {off:.3g} where both are finite; report it')
