"""The file of a trained few-shot classifier: a safetensors file with the configuration as JSON in its metadata."""

import contextlib
import dataclasses
import importlib.resources
import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from metasgd_jax import losses, nn
from metasgd_jax.io.files import PathLike, WriterError, atomic
from metasgd_jax.learners import maml, meta_sgd
from metasgd_jax.types import Batch, Episode, Learner, MetaParams

FORMAT_VERSION = 1

LearnerName = Literal['meta_sgd', 'maml']
Background = Literal['dark', 'any']
"""Background of the training images. `dark` means light ink on black, like Omniglot in this package."""

_MOST = {'way': 10_000, 'filters': 10_000, 'hidden': 100_000, 'inner_steps': 1000}
_MOST_LEVELS = 10  # Depth to which facts may be nested.


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """The configuration of a trained model: its learner, its Conv4 network and its images.

  Attributes:
    learner: Name of the learner, 'meta_sgd' or 'maml'.
    way: Number of classes N that the model was trained with. The model serves any number of classes from 2 to N.
    image_shape: Shape (H, W, D) of an image. Its values are from 0 to 1.
    filters: Number of filters in each block of Conv4.
    hidden: Number of units in the fully connected layer of Conv4. With 0 there is no such layer.
    inner_steps: Number of inner steps k.
    alpha: Inner learning rate of MAML. It is None for Meta-SGD, whose α is a tensor among the parameters.
    background: Background of the training images, 'dark' or 'any'.
    training: Facts about the training by name, for people who read the file. Their values are anything that JSON can
      store.

  Raises:
    ValueError: if a field has another type or is out of its range. The message names the field.

  Example:
    >>> ms.ModelConfig('meta_sgd', way=5, image_shape=(28, 28, 1)).filters
    64
  """

  learner: LearnerName
  way: int
  image_shape: tuple[int, int, int]
  filters: int = 64
  hidden: int = 32
  inner_steps: int = 1
  alpha: float | None = None
  background: Background = 'dark'
  training: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)

  def __post_init__(self):
    _check_choice('learner', self.learner, get_args(LearnerName))
    _check_choice('background', self.background, get_args(Background))
    for name, least in (('way', 2), ('filters', 1), ('hidden', 0), ('inner_steps', 0)):
      value = getattr(self, name)
      if not _is_int(value) or not least <= value <= _MOST[name]:
        raise ValueError(f'{name} must be an integer from {least} to {_MOST[name]:,}, got {value!r}')
    shape = self.image_shape
    if not isinstance(shape, tuple) or len(shape) != 3 or not all(_is_int(v) and 1 <= v <= 4096 for v in shape):
      raise ValueError(f'image_shape must be a tuple (height, width, channels) of integers 1 to 4096, got {shape!r}')
    if min(shape[:2]) < 16:
      raise ValueError(f'image_shape must be at least 16x16, because Conv4 halves it four times, got {shape!r}')
    if self.learner == 'maml' and not _is_finite(self.alpha):
      raise ValueError(f"alpha must be MAML's rate, a finite number, got {self.alpha!r}")
    if self.learner == 'meta_sgd' and self.alpha is not None:
      raise ValueError(f'alpha must be None for meta_sgd, whose rates are among its parameters, got {self.alpha!r}')
    if not isinstance(self.training, dict) or not all(isinstance(k, str) for k in self.training):
      raise ValueError(f'training must be a dict of facts by name, got {self.training!r}')
    if not _is_shallow(self.training, _MOST_LEVELS):
      raise ValueError(f'training must be nested at most {_MOST_LEVELS} levels deep; make it flatter')
    try:
      json.dumps(self.training, allow_nan=False)
    except (TypeError, ValueError) as e:
      raise ValueError(f'training must have values that JSON can store ({e}); use numbers and strings') from e


class FewShotModel(NamedTuple):
  """A trained few-shot classifier.

  Attributes:
    config: Configuration that the parameters belong to.
    meta: Meta-parameters θ and α, float32. α is None for MAML.

  Example:
    >>> model = ms.load_model('omniglot')
    >>> model.config.learner, model.config.image_shape
    ('meta_sgd', (28, 28, 1))
    >>> jax.tree.structure(model.meta.theta) == jax.tree.structure(model.meta.alpha)
    True
    >>> classifier = ms.FewShotClassifier(model)
  """

  config: ModelConfig
  meta: MetaParams


def build_learner(config: ModelConfig, way: int | None = None, inductive: bool = False) -> Learner:
  """Returns the learner that a model's parameters belong to.

  If `way` is smaller than the way of the model, only the first `way` logits are used, both in the inner loss and in the
  predictions. A 20-way model therefore serves 2 to 20 classes.

  Args:
    config: Configuration of the model.
    way: Number of classes N in the new tasks, from 2 to `config.way`, which is the default.
    inductive: Whether each query item is normalised by the statistics of the support; see `meta_sgd`.

  Raises:
    ValueError: if `way` is not an integer from 2 to `config.way`.
  """
  n = config.way if way is None else way
  if not _is_int(n) or not 2 <= n <= config.way:
    raise ValueError(f'the model supports 2 to {config.way} classes, got {n!r}; choose a way in this range')
  network = nn.from_linen(nn.Conv4(config.way, filters=config.filters, hidden=config.hidden))
  model = network._replace(apply=lambda theta, x, *statistics: network.apply(theta, x, *statistics)[:, :n])
  common: dict[str, Any] = dict(
    steps=config.inner_steps, inductive=inductive, metrics={'accuracy': losses.accuracy}
  )  # fmt: skip
  if config.learner == 'maml':
    return maml(model, losses.cross_entropy, alpha=config.alpha, **common)
  return meta_sgd(model, losses.cross_entropy, **common)


def save_model(path: PathLike, model: FewShotModel) -> None:
  """Writes a model to a safetensors file, which is never half-written.

  Args:
    path: Path of the file. An existing file is replaced.
    model: Configuration and parameters of the model.

  Raises:
    ValueError: if the parameters do not fit the configuration, or are not finite.
    WriterError: if the file cannot be written.

  Example:
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...   ms.save_model(f'{directory}/mine.safetensors', ms.load_model('omniglot'))
    ...   ms.load_model(f'{directory}/mine.safetensors').config.learner
    'meta_sgd'
  """
  tensors = _by_name(jax.device_get(model.meta))
  shapes = {name: (np.shape(t), np.asarray(t).dtype.name) for name, t in tensors.items()}
  _check_tensors('the model', shapes, _by_name(_structure(model.config)))
  _check_finite('the model', tensors)
  metadata = {'format_version': str(FORMAT_VERSION), 'config': json.dumps(dataclasses.asdict(model.config))}
  data = safetensors.numpy.save({k: np.ascontiguousarray(t) for k, t in tensors.items()}, metadata)
  try:
    with atomic(pathlib.Path(path).expanduser(), 'give another path') as file:
      file.write(data)
  except (ValueError, RuntimeError) as e:  # A NUL in the name, or a ~ of an unknown user.
    raise WriterError(f'the model file {path} cannot be written ({e}); give another path') from e


def load_model(path_or_name: PathLike) -> FewShotModel:
  """Returns a model from a file, or a model that ships with the package.

  Args:
    path_or_name: Path of a file that `save_model` wrote, or the name of a shipped model, such as 'omniglot'.

  Raises:
    ValueError: if there is no such file or name, or if the file is not a model, is damaged, or is from a newer version.

  Example:
    >>> ms.load_model('omniglot').config.way
    20
  """
  with _opened(path_or_name) as path:
    try:
      with safetensors.safe_open(path, framework='np') as file:
        config = _read_config(path, file.metadata() or {})
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        shapes = {name: (tuple(s.get_shape()), _DTYPES.get(s.get_dtype(), s.get_dtype())) for name, s in slices.items()}
        structure = _structure(config)
        _check_tensors(str(path), shapes, _by_name(structure))
        tensors = {name: file.get_tensor(name) for name in slices}
    except (safetensors.SafetensorError, OSError) as e:
      reason = _shown(str(e))
      raise ValueError(f'{path} is not a safetensors file, or not the whole of it ({reason}); get it again') from e
  _check_finite(str(path), tensors)
  leaves = [tensors[name] for name in _by_name(structure)]
  return FewShotModel(config, jax.tree.unflatten(jax.tree.structure(structure), leaves))


def shipped_models() -> list[str]:
  """Returns the names of the models that ship with the package."""
  return sorted(_shipped())


def model_size(path_or_name: PathLike) -> int:
  """Returns the size of a model's file in bytes.

  Raises:
    ValueError: if there is no such file or name.
  """
  with _opened(path_or_name) as path:
    return path.stat().st_size


_DTYPES = {'F32': 'float32'}  # From names of safetensors to names of NumPy.


def _shipped() -> dict[str, Any]:
  folder = importlib.resources.files('metasgd_jax.deploy').joinpath('models')
  if not folder.is_dir():
    return {}
  ending = '.safetensors'
  return {f.name.removesuffix(ending): f for f in folder.iterdir() if f.name.endswith(ending)}


def _opened(path_or_name: PathLike) -> contextlib.AbstractContextManager[pathlib.Path]:
  """Returns a context manager for the path of a model's file.

  A model that ships inside a packed installation is unpacked while the context is open.
  """
  shipped = _shipped()
  if isinstance(path_or_name, str) and path_or_name in shipped:
    return importlib.resources.as_file(shipped[path_or_name])
  try:
    path = pathlib.Path(path_or_name).expanduser()
    if path.is_file():
      return contextlib.nullcontext(path)
  except (TypeError, ValueError, RuntimeError, OSError) as e:
    raise ValueError(f'a model is given by its path or name, got {path_or_name!r} ({e})') from e
  names = ', '.join(shipped) or 'none'
  raise ValueError(
    f'there is no model file {path}, and no model of that name ships with metasgd_jax (shipped models: {names}); '
    'check the path or the name'
  )


def _read_config(path: pathlib.Path, metadata: Mapping[str, str]) -> ModelConfig:
  if not {'format_version', 'config'} <= set(metadata):
    raise ValueError(f'{path} has no metadata of a metasgd_jax model; write the file with metasgd_jax.save_model')
  version = metadata['format_version']
  if not version.isascii() or not version.isdigit() or len(version) > 9 or int(version) < 1:
    shown = f"'{_shown(version)}'"
    raise ValueError(f'{path} has format version {shown}, which is no positive integer; get it again')
  if int(version) > FORMAT_VERSION:
    raise ValueError(
      f'{path} has format version {version}, but this metasgd_jax reads up to {FORMAT_VERSION}; upgrade metasgd_jax'
    )
  try:
    fields = json.loads(metadata['config'])
    if not isinstance(fields, dict):
      raise ValueError(f'the config must be a JSON object, got {type(fields).__name__}')
    if isinstance(fields.get('image_shape'), list):
      fields['image_shape'] = tuple(fields['image_shape'])
    return ModelConfig(**fields)
  except (ValueError, TypeError, RecursionError) as e:
    reason = _shown(str(e).replace('ModelConfig.__init__()', 'the config'))
    raise ValueError(f'{path} does not describe a model ({reason}); get it again, or save it again') from e


def _structure(config: ModelConfig) -> MetaParams:
  """Returns the shapes and dtypes of a model's parameters."""
  learner = build_learner(config)
  x = jax.ShapeDtypeStruct((config.way, *config.image_shape), jnp.float32)
  y = jax.ShapeDtypeStruct((config.way,), jnp.int32)
  init = lambda x, y: learner.init(jax.random.key(0), Episode(Batch(x, y), Batch(x, y)))
  return jax.eval_shape(init, x, y)


def _by_name(meta: MetaParams) -> dict[str, Any]:
  """Returns the leaves of a pytree by names such as 'theta/Dense_0/bias'."""
  return {jax.tree_util.keystr(p, simple=True, separator='/'): v for p, v in jax.tree_util.tree_leaves_with_path(meta)}


def _check_tensors(whose: str, found: Mapping[str, tuple[tuple, str]], wanted: Mapping[str, Any]) -> None:
  for names, what in ((set(wanted) - set(found), 'lacks'), (set(found) - set(wanted), 'has beside what belongs there')):
    if names:
      raise ValueError(
        f'{whose} {what} the tensor {_shown(min(names))} ({len(names)} in all); was it made with its config?'
      )
  for name, (shape, dtype) in found.items():
    want = wanted[name].shape, wanted[name].dtype.name
    if (shape, dtype) != want:
      raise ValueError(
        f'{whose} has {dtype} {shape} for the tensor {_shown(name)}, where its config asks for {want[1]} {want[0]}; '
        'was it made with another config?'
      )


def _check_finite(whose: str, tensors: Mapping[str, Any]) -> None:
  for name, tensor in tensors.items():
    if not np.all(np.isfinite(tensor)):
      raise ValueError(f'{whose} has values that are not finite in the tensor {_shown(name)}; did training diverge?')


def _check_choice(name: str, value: Any, choices: tuple) -> None:
  if value not in choices:
    raise ValueError(f'{name} must be one of {choices}, got {value!r}')


def _is_int(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
  try:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
  except OverflowError:  # The integer is larger than any float.
    return False


def _is_shallow(value: Any, levels: int) -> bool:
  if not isinstance(value, dict | list | tuple):
    return True
  return levels > 0 and all(_is_shallow(v, levels - 1) for v in (value.values() if isinstance(value, dict) else value))


def _shown(text: str) -> str:
  """Returns text from a file in a form that fits into a sentence: on one line and not too long."""
  text = ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in text[:300])
  return text if len(text) < 300 else f'{text[:300]}…'
