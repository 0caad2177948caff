"""The file of a trained few-shot classifier: a safetensors file with the configuration as JSON in its metadata."""

import dataclasses
import difflib
import functools
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from metasgd_jax import losses, nn
from metasgd_jax.deploy.checks import is_int, writable
from metasgd_jax.io.files import PathLike, as_json, as_path, atomic, first_line
from metasgd_jax.learners import maml, meta_sgd, prototypical
from metasgd_jax.types import Batch, Episode, Learner, Model, PyTree, check_choice, equal_partial

FORMAT_VERSION = 1

LearnerName = Literal['meta_sgd', 'maml', 'prototypical']
Background = Literal['dark', 'any']
"""Background of the training images. `dark` means light ink on black, like Omniglot in this package."""

_RANGES = {'way': (2, 10_000), 'filters': (1, 10_000), 'hidden': (0, 100_000), 'inner_steps': (0, 1000)}
_MOST_ALPHA = 1_000_000_000  # JAX cannot represent larger integers in 32 bits.
_MOST_LEVELS = 10  # Largest depth of nested facts.
_SHIPPED = pathlib.Path(__file__).with_name('models')


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """The configuration of a trained model: its learner, its Conv4 network and its images.

  Attributes:
    learner: Name of the learner: 'meta_sgd', 'maml' or 'prototypical'.
    way: Number of classes N that the model was trained with. The model serves any number of classes from 2 to N.
    image_shape: Shape (H, W, D) of the images, whose pixels are from 0 to 1.
    filters: Number of filters in each block of Conv4.
    hidden: Number of units in the fully connected layer of Conv4. With 0 there is no such layer, as in the embedding of
      Prototypical Networks.
    inner_steps: Number of inner steps k. It is 0 for Prototypical Networks, which take no inner steps.
    alpha: Inner learning rate of MAML. It is None for Meta-SGD, whose α is among the parameters, and for Prototypical
      Networks.
    background: Background of the training images: 'dark', which means light ink on black, or 'any'.
    temperature: Number T by which logits are divided before they become probabilities (Guo et al. 2017, equation 9). It
      changes how sure the model is, but not its answers. The classification experiment fits T on tasks of validation
      classes, if there are any, with inductive batch norm and the model's number of ways, or fewer ways if there are
      fewer validation classes. In transductive use, or with fewer classes, another T may suit the model better.
    least_likeness: The likeness that 99% of the images of validation classes exceed; see `FewShotClassifier.likeness`.
      It is a pair of numbers, for one and for five examples of each class, and None if it was not measured. It is
      measured like the temperature, with the model's own inner steps.
    training: Facts about the training, for people who read the file: a dict from names to values that JSON can store.

  Raises:
    ValueError: if a field has a wrong type or a value that is not allowed. The message names the field.

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
  temperature: float = 1.0
  least_likeness: tuple[float, float] | None = None
  training: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)

  def __post_init__(self):
    check_choice('learner', self.learner, LearnerName)
    check_choice('background', self.background, Background)
    for name, (least, most) in _RANGES.items():
      value = getattr(self, name)
      if not is_int(value) or not least <= value <= most:
        raise ValueError(f'`{name}` must be an integer from {least} to {most:,}, got {value!r}')
    shape = self.image_shape
    if not isinstance(shape, tuple) or len(shape) != 3 or not all(is_int(v) and 1 <= v <= 4096 for v in shape):
      raise ValueError(
        f'image_shape must be a tuple (height, width, channels) of integers from 1 to 4096, got {shape!r}'
      )
    if min(shape[:2]) < 16:
      raise ValueError(f'image_shape must be at least 16x16, because Conv4 halves both sizes four times, got {shape!r}')
    if not (_is_number(self.temperature) and 1e-6 <= self.temperature <= 1e6):
      raise ValueError(f'temperature must be a number from 1e-6 to 1e6, got {self.temperature!r}')
    likeness = self.least_likeness
    if not (likeness is None or (isinstance(likeness, tuple) and len(likeness) == 2 and all(map(_is_share, likeness)))):
      raise ValueError(f'least_likeness must be None, or a tuple of two numbers from 0 to 1, got {likeness!r}')
    if self.learner == 'meta_sgd' and self.alpha is not None:
      raise ValueError(f'alpha must be None for meta_sgd, whose rates are among its parameters, got {self.alpha!r}')
    if self.learner == 'prototypical' and (self.hidden, self.inner_steps, self.alpha) != (0, 0, None):
      raise ValueError(
        'a model of prototypical has hidden=0, inner_steps=0 and alpha=None, because it takes no inner steps, got '
        f'hidden={self.hidden}, inner_steps={self.inner_steps} and alpha={self.alpha!r}; set these three so'
      )
    if self.learner == 'maml' and not (_is_number(self.alpha) and abs(self.alpha) <= _MOST_ALPHA):
      raise ValueError(f"alpha must be MAML's rate, a finite number up to {_MOST_ALPHA:,}, got {self.alpha!r}")
    if not isinstance(self.training, dict):
      raise ValueError(f'`training` must be a dict, such as {{"seed": 0}}, got {self.training!r}')
    as_json('training', self.training)
    if _levels(self.training) > _MOST_LEVELS:
      levels = _levels(self.training)
      raise ValueError(f'`training` must be nested at most {_MOST_LEVELS} levels deep, got {levels}; make it flatter')

  def least_likeness_of(self, shot: int) -> float | None:
    """Returns `least_likeness` for `shot` examples of each class, or None if it was not measured.

    It is interpolated linearly in 1 / shot.
    """
    if self.least_likeness is None:
      return None
    one, five = self.least_likeness
    many = (5 * five - one) / 4
    return min(max(many + (one - many) / max(shot, 1), 0.0), 1.0)

  @property
  def fit(self) -> Literal['crop', 'pad']:
    """Returns how image files are brought to the aspect ratio of the model: see `datasets.image_files.Fit`.

    Drawings on dark backgrounds are padded, because cropping could cut off strokes.
    """
    return 'pad' if self.background == 'dark' else 'crop'


def _is_number(value: Any) -> TypeGuard[float]:
  return isinstance(value, int | float) and not isinstance(value, bool)


def _is_share(value: Any) -> bool:
  return _is_number(value) and 0 <= value <= 1


def _levels(facts: Any) -> int:
  """Returns how deep dicts and lists are nested in each other."""
  if not isinstance(facts, dict | list | tuple):
    return 0
  return 1 + max(map(_levels, facts.values() if isinstance(facts, dict) else facts), default=0)


class FewShotModel(NamedTuple):
  """A trained few-shot classifier.

  Attributes:
    config: Configuration that the parameters belong to.
    meta: Meta-parameters, float32: θ and α, where α is None for MAML. For Prototypical Networks they are the parameters
      of the embedding.

  Example:
    >>> model = ms.load_model('omniglot')
    >>> model.config.learner, model.config.image_shape
    ('meta_sgd', (28, 28, 1))
    >>> jax.tree.structure(model.meta.theta) == jax.tree.structure(model.meta.alpha)
    True
    >>> classifier = ms.FewShotClassifier(model)
  """

  config: ModelConfig
  meta: PyTree


def build_network(config: ModelConfig, native: bool = False) -> Model:
  """Returns the network of a model: a classifier, or for Prototypical Networks an embedding.

  Args:
    config: Configuration of the model.
    native: Whether to use XLA's own convolutions; see `nn.conv_block`. They suit a single task with `suits_native`.
  """
  way = None if config.learner == 'prototypical' else config.way
  return nn.from_linen(nn.Conv4(way, filters=config.filters, hidden=config.hidden, native=native))


def suits_native(config: ModelConfig) -> bool:
  """Returns whether XLA's own convolutions suit a model that adapts to one task at a time.

  They save seconds of compiling on a CPU. In a loop of several inner steps they are up to 27 times slower than the
  package's forms.
  """
  return config.inner_steps <= 1


def first_logits(model: Model, n: int) -> Model:
  """Returns a classifier with the first n outputs of a model, for tasks of n classes."""
  return model._replace(apply=equal_partial(_first, apply=model.apply, n=n))


def _first(theta, x, *statistics, apply, n):
  return apply(theta, x, *statistics)[:, :n]


def build_learner(
  config: ModelConfig, way: int | None = None, inductive: bool = False, native: bool = False
) -> Learner:
  """Returns the learner that a model's parameters belong to.

  If `way` is smaller than the way of the model, only the first `way` logits are used, both in the inner loss and in the
  predictions. A 20-way model therefore serves 2 to 20 classes.

  Args:
    config: Configuration of the model.
    way: Number of classes N in the new tasks, from 2 to `config.way`, which is the default.
    inductive: Whether each query item is normalised by the statistics of the support; see `meta_sgd`.
    native: As in `build_network`.

  Raises:
    ValueError: if `way` is not an integer from 2 to `config.way`.
  """
  n = config.way if way is None else way
  if not is_int(n) or not 2 <= n <= config.way:
    raise ValueError(f'the model supports 2 to {config.way} classes, got {n!r}; give a number in this range')
  metrics = {'accuracy': losses.accuracy}
  network = build_network(config, native)
  if config.learner == 'prototypical':
    return prototypical(network, way=n, inductive=inductive, metrics=metrics)
  model = first_logits(network, n)
  learner = functools.partial(maml, alpha=config.alpha) if config.learner == 'maml' else meta_sgd
  return learner(model, losses.cross_entropy, steps=config.inner_steps, inductive=inductive, metrics=metrics)


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
  tensors = {name: np.ascontiguousarray(leaf) for name, leaf in _by_name(jax.device_get(model.meta)).items()}
  _check_tensors('the model', {name: f'{t.dtype} {t.shape}' for name, t in tensors.items()}, _structure(model.config))
  _check_finite('the model', tensors)
  metadata = {'format_version': str(FORMAT_VERSION), 'config': json.dumps(dataclasses.asdict(model.config))}
  with atomic(writable(path), 'give another path') as file:
    file.write(safetensors.numpy.save(tensors, metadata))


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
  path = _find(path_or_name)
  try:
    return _read(path)
  except (safetensors.SafetensorError, OSError) as e:
    raise ValueError(f'{path} is not a safetensors file, or is incomplete ({first_line(e)}); get the file again') from e


def shipped_models() -> list[str]:
  """Returns the names of the models that ship with the package."""
  return sorted(path.stem for path in _SHIPPED.glob('*.safetensors'))


def model_size(path_or_name: PathLike) -> int:
  """Returns the size of a model's file in bytes.

  Raises:
    ValueError: if there is no file with this path, and no shipped model with this name.
  """
  return _find(path_or_name).stat().st_size


def model_sha256(path_or_name: PathLike) -> str:
  """Returns the SHA-256 checksum of a model's file, as hexadecimal text.

  Raises:
    ValueError: if there is no file with this path, and no shipped model with this name.
  """
  return hashlib.sha256(_find(path_or_name).read_bytes()).hexdigest()


def _find(path_or_name: PathLike) -> pathlib.Path:
  """Returns the path of a model's file, given this path or the name of a model that comes with the package.

  Raises:
    ValueError: if there is neither such a file nor such a model.
  """
  if path_or_name in shipped_models():
    return _SHIPPED / f'{path_or_name}.safetensors'
  path = as_path(path_or_name)
  if os.path.isfile(path):  # noqa: PTH113  # Path.is_file may raise OSError.
    return path
  near = difflib.get_close_matches(str(path_or_name)[:80], shipped_models(), 1)
  advice = f'did you mean {near[0]}?' if near else 'check the path or the name'
  raise ValueError(f'there is no model file {path}, and none of the models {shipped_models()} has this name; {advice}')


def _read(path: pathlib.Path) -> FewShotModel:
  """Returns the model that a file stores. Checks the tensors' names, shapes and dtypes before it reads the tensors."""
  with safetensors.safe_open(path, framework='np') as file:
    config = _read_config(path, file.metadata() or {})
    structure = _structure(config)
    found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
    texts = {name: f'{s.get_dtype().replace("F32", "float32")} {tuple(s.get_shape())}' for name, s in found.items()}
    _check_tensors(str(path), texts, structure)
    tensors = {name: file.get_tensor(name) for name in _by_name(structure)}
  _check_finite(str(path), tensors)
  return FewShotModel(config, jax.tree.unflatten(jax.tree.structure(structure), tensors.values()))


def _read_config(path: pathlib.Path, metadata: Mapping[str, str]) -> ModelConfig:
  if not {'format_version', 'config'} <= set(metadata):
    advice = 'write the file with metasgd_jax.save_model'
    if path.name.startswith('params_'):  # An experiment writes both files to its work directory.
      advice = f'give {path.name.replace("params_", "model_", 1)} of the same directory'
    raise ValueError(f'{path} has no metadata of a metasgd_jax model; {advice}')
  version = metadata['format_version']
  if not re.fullmatch('[1-9][0-9]{0,8}', version):
    raise ValueError(
      f"{path} has format version '{first_line(version)}', which is not a positive integer; get the file again"
    )
  if int(version) > FORMAT_VERSION:
    raise ValueError(
      f'{path} has format version {version}, which is newer than {FORMAT_VERSION}, the newest that this version of '
      'metasgd_jax reads; upgrade metasgd_jax'
    )
  try:
    fields = json.loads(metadata['config'])
    if not isinstance(fields, dict):
      raise ValueError(f'the config must be a JSON object, got {type(fields).__name__}')
    for name in ('image_shape', 'least_likeness'):
      if isinstance(fields.get(name), list):
        fields[name] = tuple(fields[name])
    return ModelConfig(**fields)
  except (ValueError, TypeError, RecursionError) as e:
    raise ValueError(f'{path} does not describe a model ({first_line(e)}); get the file again, or save it again') from e


def _structure(config: ModelConfig) -> PyTree:
  """Returns the shapes and dtypes of a model's parameters."""
  x = jax.ShapeDtypeStruct((config.way, *config.image_shape), jnp.float32)
  y = jax.ShapeDtypeStruct((config.way,), jnp.int32)
  return jax.eval_shape(build_learner(config).init, jax.random.key(0), Episode(Batch(x, y), Batch(x, y)))


def _by_name(meta: PyTree) -> dict[str, Any]:
  """Returns the leaves of a pytree by names such as 'theta/Dense_0/bias'."""
  return {jax.tree_util.keystr(p, simple=True, separator='/'): v for p, v in jax.tree_util.tree_leaves_with_path(meta)}


def _check_tensors(whose: str, found: Mapping[str, str], structure: PyTree) -> None:
  """Raises ValueError unless the tensors in `found` have the names, dtypes and shapes of the leaves of `structure`.

  `found` maps the name of each tensor to its dtype and shape as text, such as 'float32 (5,)'.
  """
  wanted = {name: f'{leaf.dtype} {leaf.shape}' for name, leaf in _by_name(structure).items()}
  if odd := sorted(wanted.keys() ^ found.keys()):
    what = 'lacks' if odd[0] in wanted else 'has, but should not have,'
    raise ValueError(
      f'{whose} {what} the tensor {first_line(odd[0])}; tensors that are missing or unexpected: {len(odd)}; '
      'was the file made with another config?'
    )
  for name, text in found.items():
    if text != wanted[name]:
      advice = f'but its config asks for {wanted[name]}; was it made with another config?'
      raise ValueError(f'{whose} has {text} for the tensor {name}, {advice}')


def _check_finite(whose: str, tensors: Mapping[str, Any]) -> None:
  for name, tensor in tensors.items():
    if not np.all(np.isfinite(tensor)):
      raise ValueError(f'{whose} has values that are not finite in the tensor {name}; did training diverge?')
