"""A few-shot classifier in scikit-learn's manner: a trained model, adapted in `fit` to the classes at hand."""

import dataclasses
import functools
from typing import Any, Literal

import jax
import numpy as np

from metasgd_jax.deploy.model_file import FewShotModel, ModelConfig, build_learner, load_model
from metasgd_jax.io.files import PathLike
from metasgd_jax.types import Batch

AT_ONCE = 32
"""Pictures answered together where no answer depends on another: one compiled program serves any number of them."""


class NotFittedError(ValueError, AttributeError):
  """A classifier is asked for answers before `fit`; scikit-learn's error of this name has the same parents."""


class FewShotClassifier:
  """Tells 2 to N new classes of pictures apart, from one picture of each or more, after one step of adaptation.

  Pictures are `[n, H, W, D]`, `[n, H, W]` where D = 1, or flat `[n, H·W·D]`, in uint8 0 to 255 or floats 0 to 1, of the
  model's height, width and channels. It can be cloned, pickled, and used in scikit-learn's pipelines and searches.

  `inductive` chooses by what batch norm normalises the pictures to answer:

  - True, the default: by the support's statistics, so that an answer depends on its own picture alone.
  - False, transductive, as accuracies of MAML and its kin are mostly measured: by the statistics of all pictures of the
    call, so that each answer depends on the others. Only for calls with many pictures and all classes among them.

  A model trained transductively has only met batches with as many pictures of each class. The statistics of a call of
  one picture, or of pictures of one class, are not what it was trained with, and many of its answers are then wrong;
  the support's are, however the pictures to answer come.

  Classes with fewer examples than others have theirs repeated until all have as many, as the model was trained.

  After `fit`: `classes_`, the labels in order `[N]`; `image_shape_`, (H, W, D); `n_features_in_`, H·W·D; `inverted_`,
  whether any of its pictures was.

  Args:
    model: the name of a model that ships with the package, the path of a file of `save_model`, or a `FewShotModel`.
    inductive: see above.
    steps: inner steps; the model's own where left out.
    invert: whether to turn light into dark: 'auto' does so where the model was trained on dark backgrounds, for each
      picture that has a light border.

  Example:
    >>> images = np.zeros((4, 28, 28))  # Light strokes on black: two lie, two stand.
    >>> images[0, 10:12, 4:24] = images[1, 16:18, 4:24] = images[2, 4:24, 10:12] = images[3, 4:24, 16:18] = 1
    >>> labels = ['lying', 'lying', 'standing', 'standing']
    >>> classifier = ms.FewShotClassifier('omniglot').fit(images[::2], labels[::2])  # One drawing of each class.
    >>> print(classifier.predict(images[1::2]))
    ['lying' 'standing']
    >>> classifier.predict_proba(images[1::2]).shape  # In the order of classifier.classes_.
    (2, 2)
    >>> classifier.score(images, labels)
    1.0
  """

  def __init__(
    self,
    model: PathLike | FewShotModel = 'omniglot',
    *,
    inductive: bool = True,
    steps: int | None = None,
    invert: bool | Literal['auto'] = 'auto',
  ):
    self.model = model
    self.inductive = inductive
    self.steps = steps
    self.invert = invert

  def fit(self, images: Any, labels: Any) -> 'FewShotClassifier':
    """Adapts the model to the classes of a few pictures, and returns self.

    Args:
      images: the support; one of each class or more, and not necessarily as many of each.
      labels: `[n]`, anything that `np.unique` can sort.

    Raises:
      ValueError: a model that cannot be read, arguments that it does not take, pictures or labels that do not fit it
        or each other, one class alone, or more classes than it tells apart.
    """
    if not (self.invert == 'auto' or isinstance(self.invert, bool)):
      raise ValueError(f"invert must be 'auto', True or False, got {self.invert!r}")
    model = self.model if isinstance(self.model, FewShotModel) else load_model(self.model)
    config = dataclasses.replace(model.config, training={})  # Programs are kept by config, and facts change none.
    if self.steps is not None:
      config = dataclasses.replace(config, inner_steps=self.steps)
    x = _as_images(images, config.image_shape)
    classes, y = _as_classes(labels, len(x), config.way)
    light = _light(x, self.invert, config)
    x, y = _balanced(np.where(light, 1 - x, x), y)
    inductive = bool(self.inductive)
    adapted = _adapt(model.meta, x, y, config=config, way=len(classes), inductive=inductive)
    self.classes_ = classes
    self.image_shape_ = config.image_shape
    self.n_features_in_ = int(np.prod(config.image_shape))
    self.inverted_ = bool(light.any())
    self._fitted = config, inductive, jax.device_get(adapted)
    return self

  def decision_function(self, images: Any) -> np.ndarray:
    """Returns the logits `[n, N]`; with two classes, as scikit-learn has it, the second's less the first's `[n]`.

    Args:
      images: what to answer, in any of the forms that the class names.

    Raises:
      ValueError: pictures that do not fit the model.
      NotFittedError: before `fit`.
    """
    logits = self._logits(images)
    return logits[:, 1] - logits[:, 0] if len(self.classes_) == 2 else logits

  def predict_proba(self, images: Any) -> np.ndarray:
    """Returns each class's probability `[n, N]`, in the order of `classes_`; raises as `decision_function`.

    Args:
      images: what to answer, in any of the forms that the class names.
    """
    from scipy.special import softmax  # scipy is imported where it is first used.

    return softmax(self._logits(images).astype(np.float64), axis=1)

  def predict(self, images: Any) -> np.ndarray:
    """Returns the most probable label of each picture `[n]`; raises as `decision_function`.

    Args:
      images: what to answer, in any of the forms that the class names.
    """
    answers = np.argmax(self._logits(images), axis=1)
    return self.classes_[answers]

  def score(self, images: Any, labels: Any) -> float:
    """Returns the share of pictures answered right.

    Args:
      images: what to answer, in any of the forms that the class names.
      labels: `[n]`, their classes.

    Raises:
      ValueError: counts of pictures and labels that differ; as `decision_function`.
    """
    answers, labels = self.predict(images), np.asarray(labels)
    if answers.shape != labels.shape:
      raise ValueError(f'there must be a label for each of the {len(answers)} images, got shape {labels.shape}')
    return float(np.mean(answers == labels))

  def get_params(self, deep: bool = True) -> dict[str, Any]:
    """Returns the constructor's arguments by name; `deep` is scikit-learn's and changes nothing."""
    return {name: getattr(self, name) for name in ('model', 'inductive', 'steps', 'invert')}

  def set_params(self, **params: Any) -> 'FewShotClassifier':
    """Sets the constructor's arguments that params names, and returns self; raises ValueError for an unknown name."""
    known = self.get_params()
    for name in params:
      if name not in known:
        raise ValueError(f'{type(self).__name__} has no parameter {name!r}; it has {", ".join(known)}')
    for name, value in params.items():
      setattr(self, name, value)
    return self

  def __repr__(self) -> str:
    """Shows the arguments that are not the default."""
    defaults = type(self)().get_params()
    changed = lambda v, default: type(v) is not type(default) or v != default
    shown = {k: v for k, v in self.get_params().items() if changed(v, defaults[k])}
    texts = (f'{k}=FewShotModel(…)' if isinstance(v, FewShotModel) else f'{k}={v!r}' for k, v in shown.items())
    return f'{type(self).__name__}({", ".join(texts)})'

  def __sklearn_is_fitted__(self) -> bool:
    return hasattr(self, '_fitted')

  def __sklearn_tags__(self) -> Any:
    """Says to scikit-learn, which alone asks, that this is a classifier of arrays of two dimensions and more."""
    from sklearn.utils import ClassifierTags, InputTags, Tags, TargetTags

    return Tags(
      estimator_type='classifier',
      target_tags=TargetTags(required=True),
      classifier_tags=ClassifierTags(),
      input_tags=InputTags(two_d_array=True, three_d_array=True),
    )

  def _logits(self, images) -> np.ndarray:
    if not hasattr(self, '_fitted'):
      raise NotFittedError(f'this {type(self).__name__} is not fitted yet; call fit with a few pictures of each class')
    config, inductive, adapted = self._fitted
    x = _as_images(images, config.image_shape)
    x = np.where(_light(x, self.invert, config), 1 - x, x)
    how = dict(config=config, way=len(self.classes_), inductive=inductive)
    if not inductive:
      return np.asarray(_predict(adapted, x, **how))
    padded = np.concatenate([x, np.zeros((-len(x) % AT_ONCE, *x.shape[1:]), x.dtype)])
    parts = [_predict(adapted, padded[i : i + AT_ONCE], **how) for i in range(0, len(x), AT_ONCE)]
    return np.concatenate(parts)[: len(x)]


_static = functools.partial(jax.jit, static_argnames=('config', 'way', 'inductive'))


@_static
def _adapt(meta, x, y, *, config: ModelConfig, way: int, inductive: bool):
  return build_learner(config, way, inductive).adapt(meta, Batch(x, y), jax.random.key(0))


@_static
def _predict(adapted, x, *, config: ModelConfig, way: int, inductive: bool):
  return build_learner(config, way, inductive).predict(adapted, x)


def _as_images(images, shape: tuple[int, int, int]) -> np.ndarray:
  """Pictures in any of the forms that are taken as float32 `[n, H, W, D]`, checked."""
  try:
    x = np.asarray(images)
  except ValueError as e:
    raise ValueError('images must be one array, all of one shape, got a list of several shapes; resize them') from e
  height, width, channels = shape
  if x.ndim and not len(x):
    raise ValueError(f'there must be at least one image, got an array of shape {x.shape}')
  taken = {shape, (height * width * channels,), (height, width) if channels == 1 else shape}
  if x.ndim < 2 or x.shape[1:] not in taken:
    raise ValueError(
      f'the model takes images [n, {height}, {width}, {channels}], or flat [n, {height * width * channels}], '
      f'got shape {x.shape}; resize them, and give one image as images[None]'
    )
  x = x.reshape(-1, *shape)
  if x.dtype == np.uint8:
    return x.astype(np.float32) / np.float32(255)
  if not np.issubdtype(x.dtype, np.floating):
    raise ValueError(f'images must be uint8 (0 to 255) or floats (0 to 1), got {x.dtype}; convert them')
  if not np.all(np.isfinite(x)):
    raise ValueError('images must be finite numbers, got NaN or infinity; leave those pictures out')
  if x.min() < 0 or x.max() > 1:
    raise ValueError(
      f'images in floats must lie in 0 to 1, got {x.min():.4g} to {x.max():.4g}; divide by 255, or give uint8'
    )
  return x.astype(np.float32)


def _as_classes(labels, count: int, most: int) -> tuple[np.ndarray, np.ndarray]:
  """The classes in order, and each label's place among them, checked."""
  labels = np.asarray(labels)
  if labels.shape != (count,):
    raise ValueError(f'there must be a label for each of the {count} images, got labels of shape {labels.shape}')
  if np.any(labels != labels):
    raise ValueError('labels must not be NaN; leave those pictures out, or give them a class of their own')
  try:
    classes, y = np.unique(labels, return_inverse=True)
  except TypeError as e:
    raise ValueError(f'labels must be of one kind, such as all strings, to be sorted ({e}); convert them') from e
  if len(classes) < 2:
    raise ValueError(f'there must be at least two classes to tell apart, got {classes.tolist()[0]!r} alone')
  if len(classes) > most:
    raise ValueError(f'the model tells at most {most} classes apart, got {len(classes)}; give it fewer')
  return classes, y.astype(np.int32)


def _balanced(x, y) -> tuple[np.ndarray, np.ndarray]:
  """The support with smaller classes' pictures repeated, so that each class has as many: so the model was trained."""
  members = [np.flatnonzero(y == c) for c in range(y.max() + 1)]
  rows = np.concatenate([np.resize(m, max(map(len, members))) for m in members])
  return x[rows], y[rows]


def _light(x: np.ndarray, invert: bool | Literal['auto'], config: ModelConfig) -> np.ndarray:
  """Which pictures are to be turned dark, `[n, 1, 1, 1]`; 'auto' goes by each one's own outermost pixels."""
  if invert != 'auto':
    return np.full((len(x), 1, 1, 1), invert)
  borders = [part.reshape(len(x), -1) for part in (x[:, 0], x[:, -1], x[:, 1:-1, 0], x[:, 1:-1, -1])]
  light = np.median(np.concatenate(borders, 1), 1) > 0.5
  return (light & (config.background == 'dark'))[:, None, None, None]
