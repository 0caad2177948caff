"""Exports a trained learner to one file that runs without this package: two programs, parameters, and a description.

The file is a zip archive without compression. `adapt.bin` and `predict.bin` are programs of `jax.export` (StableHLO),
`parameters/NAME.npy` are the leaves of meta, and `about.json` describes the inputs and outputs. docs/export.md has the
code that reads the file with jax and numpy alone.
"""

import functools
import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any

import jax
import jax.export
import numpy as np
from jax.extend.core import InconclusiveDimensionOperation

from metasgd_jax.deploy import checks
from metasgd_jax.deploy.exported_file import FORMAT_VERSION, Exported, described, load_exported, member
from metasgd_jax.deploy.model_file import FewShotModel, build_learner, suits_native
from metasgd_jax.io.files import PathLike, as_json, atomic, first_line
from metasgd_jax.outer import sharding
from metasgd_jax.tree import is_key, named
from metasgd_jax.types import Batch, Episode, Learner, PyTree
from metasgd_jax.version import __version__

PLATFORMS = ('cpu', 'cuda', 'tpu')

_PREPARED = {
  'crop': 'cropped to the largest centred part with the aspect ratio of image_shape, then resized with Lanczos',
  'pad': 'padded with the median colour of the border to the aspect ratio of image_shape, then resized with Lanczos',
}
"""How picture files were brought to the size of the model."""


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
  """Writes a trained classifier as `export_learner` does, and returns the content read back from the file.

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
  if shot is not None and not (checks.is_int(shot) and 1 <= shot <= 10_000):
    raise ValueError(f'`shot` must be an integer from 1 to 10,000, got {shot!r}')
  config = model.config
  learner = build_learner(config, way, inductive, native=suits_native(config))
  n = config.way if way is None else way
  y = np.arange(n * (shot or 1), dtype=np.int32) % n
  x = np.random.default_rng(0).uniform(size=(len(y), *config.image_shape)).astype(np.float32)
  says = {
    'learner': config.learner,
    'classes': n,
    'image_shape': config.image_shape,
    'pixels': '0 to 1, light on dark' if config.background == 'dark' else '0 to 1',
    'pictures': _PREPARED[config.fit],
    'inner_steps': config.inner_steps,
    'batch_norm': 'inductive' if inductive else 'transductive',
    'outputs': 'logits',
    'temperature': config.temperature,
    'training': dict(config.training),
  }
  episode = Episode(Batch(x, y), Batch(x[:3], y[:3]))
  options: dict[str, Any] = dict(any_support=shot is None, platforms=platforms, says=says, report=report)
  return export_learner(path, learner, model.meta, episode, **options)


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
  """Writes `adapt`, `predict` and the parameters of a learner to a file, and returns what is then read from the file.

  The exported `predict` takes any number of query items. The file is first written under a temporary name. If this
  machine has one of the platforms, the programs of the file are then compared with the learner on `episode`, and the
  fact 'checked_on' of the file names that platform. Otherwise nothing is compared. The file gets the name `path` only
  if no check fails. The programs compute matrix products in the highest precision (`jax.default_matmul_precision`), so
  that all platforms give the same numbers.

  Args:
    path: Path of the file to write.
    learner: Learner to export. A stochastic learner always adapts with `jax.random.key(0)`.
    meta: Parameters of the learner, a pytree of numbers or arrays of numbers. They are converted to the dtypes that JAX
      gives them.
    episode: Episode that gives the shapes and dtypes, and the values for the comparison. Its support and its query are
      each a `Batch`. Leaves of the support have the leading axis S, leaves of the query the leading axis Q.
    any_support: Whether the exported `adapt` takes any number of support items. Otherwise it takes exactly S.
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
    >>> exported.predict(adapted, jnp.zeros((7, 1))).shape  # Any number of query items is allowed.
    (7, 1)
  """
  path, platforms = checks.writable(path), checks.known_platforms(platforms)
  meta, facts = checks.as_arrays(meta), as_json('says', says or {})
  checks.check_episode(episode)
  if report:
    report('exporting, and comparing the exported programs with the learner, which may take half a minute')
  programs = _programs(learner, meta, episode, any_support, platforms)
  checked_on, device = _where_to_check(platforms)
  about = {
    'format_version': FORMAT_VERSION,
    'made_with': {'metasgd_jax': __version__, 'jax': jax.__version__},
    'platforms': list(platforms),
    'checked_on': checked_on,
    'parameters': [name for name, _ in named(meta)],
    **{name: described(program) for name, program in programs.items()},
    'says': facts,
  }
  with atomic(path, 'give another path') as file:
    _write(file, about, programs, meta)
    file.flush()
    found = load_exported(file.name)
    if device:
      _check_numbers(found, learner, meta, episode, device)
  return found


def _adapt(learner: Learner, meta: PyTree, support: Batch) -> PyTree:
  return learner.adapt(meta, support, jax.random.key(0))


def _programs(learner: Learner, meta, episode: Episode, any_support: bool, platforms) -> dict[str, jax.export.Exported]:
  """Returns the two programs, `{'adapt': …, 'predict': …}`.

  `adapt` takes the leaves of meta as a dict by name. It returns the leaves of the adapted parameters as a dict by name,
  which `predict` takes.
  """
  adapted = _trace(learner, meta, episode)

  def adapt(parameters, x, y):
    return dict(named(_adapt(learner, _like(meta, parameters), Batch(x, y))))

  def predict(leaves, x):
    return learner.predict(_like(adapted, leaves), x)

  specs = functools.partial(jax.export.symbolic_args_specs, scope=jax.export.SymbolicScope())
  support = specs(episode.support, 'S, ...' if any_support else None)
  parameters = specs(dict(named(meta)), None)
  first = _program(adapt, platforms, any_support, parameters, *support)
  leaves = jax.eval_shape(adapt, parameters, *support)
  second = _program(predict, platforms, any_support, leaves, specs(episode.query.x, 'Q, ...'))
  return {'adapt': first, 'predict': second}


def _trace(learner: Learner, meta: PyTree, episode: Episode) -> PyTree:
  """Returns the shapes and dtypes of the adapted parameters.

  The learner is traced here with the fixed numbers of items of the episode. The export traces it with symbolic numbers
  of items. An error that is raised here is therefore caused by the learner, and not by the symbolic numbers.
  """
  adapted = jax.eval_shape(functools.partial(_adapt, learner), meta, episode.support)
  if any(map(is_key, jax.tree.leaves(adapted))):
    raise ValueError(
      'the adapted parameters contain a key of jax.random; let `adapt` return jax.random.key_data(key) instead'
    )
  jax.eval_shape(learner.predict, adapted, episode.query.x)
  return adapted


def _like(tree: PyTree, leaves: Mapping[str, Any]) -> PyTree:
  """Returns a pytree with the structure of `tree`. Each leaf is the value that `leaves` has for the leaf's name."""
  return jax.tree.unflatten(jax.tree.structure(tree), [leaves[name] for name, _ in named(tree)])


def _program(function, platforms, any_support: bool, *inputs) -> jax.export.Exported:
  """Returns the exported program of a function that has already been traced with fixed numbers of items.

  The program stores the names of source files without their folders, because the names of folders are private. A
  setting of JAX removes the folders. JAX cannot limit this setting to one thread, so it applies to all threads during
  the export.
  """
  setting = 'jax_hlo_source_file_canonicalization_regex'
  before = getattr(jax.config, setting)
  jax.config.update(setting, r'^.*[/\\]')
  try:
    with jax.default_matmul_precision('highest'):
      return jax.export.export(jax.jit(function), platforms=platforms)(*inputs)
  except (NotImplementedError, TypeError, ValueError, IndexError, InconclusiveDimensionOperation) as e:
    raise ValueError(_why_not(e, platforms, any_support)) from e
  finally:
    jax.config.update(setting, before)


def _why_not(e: Exception, platforms: Sequence[str], any_support: bool) -> str:
  why = first_line(e)
  if 'callback' in why:
    return f'the file cannot contain an operation that calls back into Python ({why}); remove the operation'
  if isinstance(e, NotImplementedError) and 'polymorphi' not in why:
    return f'the learner cannot be lowered for {", ".join(platforms)} ({why}); leave out the platform that fails'
  advice = 'any_support=False fixes the number of support items; ' if any_support else ''
  return f'the learner needs a fixed number of items ({why}); {advice}predict must take any number of query items'


def _write(file: IO[bytes], about: Any, programs: Mapping[str, jax.export.Exported], meta: PyTree) -> None:
  with zipfile.ZipFile(file, 'w') as archive:
    archive.writestr(zipfile.ZipInfo('about.json'), json.dumps(about, indent=2))
    for name, program in programs.items():
      archive.writestr(zipfile.ZipInfo(f'{name}.bin'), program.serialize())
    for name, array in named(jax.device_get(meta)):
      with archive.open(zipfile.ZipInfo(member(name)), 'w', force_zip64=array.nbytes > 2**31) as part:
        np.save(part, array, allow_pickle=False)


def _where_to_check(platforms: Sequence[str]) -> tuple[str | None, jax.Device | None]:
  """Returns the platform on which the file's outputs are compared with the learner's, and a device of this platform.

  It is JAX's default platform if `platforms` contains this platform, or else the CPU if `platforms` contains the CPU.
  If `platforms` contains neither, both results are None.
  """
  here, host = jax.export.default_export_platform(), sharding.host_device()
  if here in platforms:
    return here, jax.local_devices()[0]
  return ('cpu', host) if 'cpu' in platforms and host.platform == 'cpu' else (None, None)


def _check_numbers(found: Exported, learner: Learner, meta: PyTree, episode: Episode, device: jax.Device) -> None:
  """Raises WriterError unless the exported programs give the same outputs as the learner, up to float32 rounding."""
  meta, support, x = jax.device_get((meta, episode.support, episode.query.x))  # These may be on different devices.
  with jax.default_device(device), jax.default_matmul_precision('highest'):
    ours = jax.jit(learner.predict)(jax.jit(functools.partial(_adapt, learner))(meta, support), x)
    theirs = found.predict(found.adapt(found.parameters, *support), x)
  checks.check_close(ours, theirs)
