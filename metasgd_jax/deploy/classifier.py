"""A few-shot classifier with the interface of scikit-learn: `fit` adapts a trained model to new classes."""

import dataclasses
import functools
from typing import Any, Literal

import jax
import numpy as np

from metasgd_jax.deploy.model_file import FewShotModel, ModelConfig, build_learner, load_model
from metasgd_jax.io.files import PathLike
from metasgd_jax.types import Batch

AT_ONCE = 32
"""Number of images that an inductive classifier predicts at once.

A call is split into batches of this number, and the last batch is padded. One compiled program then serves calls with
any number of images.
"""


class NotFittedError(ValueError, AttributeError):
  """A classifier was used before `fit`. The error of this name in scikit-learn has the same base classes."""


@dataclasses.dataclass(eq=False, repr=False)
class FewShotClassifier:
  """Classifies images into N new classes, after it has adapted a trained model to one or more examples of each class.

  N is at least 2, and at most the number of ways that the model was trained with. Images are an array `[n, H, W, D]`,
  or flat `[n, H·W·D]`, where H, W and D are the height, width and channels of the model. If D = 1, they may also be
  `[n, H, W]`. Their values are integers from 0 to 255, floats from 0 to 1, or booleans. The classifier can be cloned,
  pickled, and used in pipelines and searches of scikit-learn.

  `inductive` chooses the statistics with which batch norm normalises the query images:

  - True, the default: the statistics of the support. Each prediction then depends on its own image alone.
  - False, which is called transductive: the statistics of all images of the call. Each prediction then depends on the
    other images. Accuracies of MAML and similar methods are mostly measured in this mode. The transductive mode is
    meant only for calls with many images, among which are images of all classes.

  A model that was trained transductively has only seen batches with the same number of images of each class. If a call
  has a single image, or images of a single class, the statistics of that call differ from those of the training, and
  many predictions are wrong. The statistics of the support are like those of the training, whatever the query
  images are.

  If some classes have fewer examples than others, their examples are repeated until all classes have the same number.
  The model was trained with the same number of examples of each class.

  `fit` sets these attributes:

  - `classes_`: the labels in sorted order, `[N]`.
  - `image_shape_`: (H, W, D).
  - `n_features_in_`: H·W·D.
  - `inverted_`: whether any image of the support was inverted.

  Args:
    model: Name of a model that ships with the package, path of a file that `save_model` wrote, or a `FewShotModel`.
    inductive: Whether batch norm uses the statistics of the support; see above.
    steps: Number of inner steps. By default it is the model's own number.
    invert: Whether to invert the images, so that light becomes dark. With 'auto' each image that has a light border is
      inverted, if the model was trained on dark backgrounds.

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

  model: PathLike | FewShotModel = 'omniglot'
  _: dataclasses.KW_ONLY
  inductive: bool = True
  steps: int | None = None
  invert: bool | Literal['auto'] = 'auto'

  def fit(self, X: Any, y: Any) -> 'FewShotClassifier':
    """Adapts the model to the classes of the support, and returns self.

    Args:
      X: Support images, one or more of each class. The number of images may differ between classes.
      y: Labels of the images, `[n]`, of any type that `np.unique` can sort.

    Raises:
      ValueError: if the model cannot be read, if an argument of the constructor is not valid, if the images or labels
        do not fit the model or each other, if there is only one class, or if there are more classes than the model
        supports.
    """
    if not (self.invert == 'auto' or isinstance(self.invert, bool)):
      raise ValueError(f"`invert` must be 'auto', True or False, got {self.invert!r}")
    model = self.model if isinstance(self.model, FewShotModel) else load_model(self.model)
    steps = model.config.inner_steps if self.steps is None else self.steps
    # Compiled programs are cached by config. Facts about the training, and the temperature, do not change them.
    config = dataclasses.replace(model.config, training={}, temperature=1.0, inner_steps=steps)
    images, light = _prepared(X, self.invert, config)
    classes, labels = _as_classes(y, len(images), config.way)
    images, labels = _balanced(images, labels)
    inductive = bool(self.inductive)
    adapted = _adapt((config, len(classes), inductive), model.meta, images, labels)
    self.classes_ = classes
    self.image_shape_ = config.image_shape
    self.n_features_in_ = int(np.prod(config.image_shape))
    self.inverted_ = bool(light.any())
    self._fitted = config, inductive, jax.device_get(adapted)
    self._temperature = model.config.temperature
    return self

  def decision_function(self, X: Any) -> np.ndarray:
    """Returns the logits, `[n, N]`.

    With two classes, it returns the second logit minus the first, `[n]`, as scikit-learn does.

    Args:
      X: Query images, in any of the forms that `FewShotClassifier` accepts.

    Raises:
      ValueError: if the images do not fit the model.
      NotFittedError: if `fit` has not been called.
    """
    logits = self._logits(X)
    return logits[:, 1] - logits[:, 0] if len(self.classes_) == 2 else logits

  def predict_proba(self, X: Any) -> np.ndarray:
    """Returns the probability of each class for each image, `[n, N]`. The classes are in the order of `classes_`.

    The probabilities are the softmax of the logits divided by `ModelConfig.temperature`. This method raises the same
    errors as `decision_function`.

    Args:
      X: Query images, in any of the forms that `FewShotClassifier` accepts.
    """
    from scipy.special import softmax  # Imported here, because only this method needs scipy.

    logits = self._logits(X).astype(np.float64)
    return softmax(logits / self._temperature, axis=1)

  def predict(self, X: Any) -> np.ndarray:
    """Returns the most probable label of each image, `[n]`.

    This method raises the same errors as `decision_function`.

    Args:
      X: Query images, in any of the forms that `FewShotClassifier` accepts.
    """
    answers = np.argmax(self._logits(X), axis=1)
    return self.classes_[answers]

  def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
    """Returns the accuracy, which is the share of images whose predicted label is right.

    Args:
      X: Query images, in any of the forms that `FewShotClassifier` accepts.
      y: True labels of the images, `[n]`.
      sample_weight: Weights of the images, `[n]`. By default all images have the same weight.

    Raises:
      ValueError: if `y` does not have one label for each image, if a label is None or NaN, or if one of the labels and
        the classes are text or bytes and the others are not. This method also raises the errors of `decision_function`.
      TypeError: if `sample_weight` does not have one weight for each image.
    """
    answers = self.predict(X)
    labels = _as_labels(y, len(answers))
    if _kind(labels) != _kind(self.classes_):
      ours, theirs = self.classes_.tolist()[0], labels.tolist()[0]
      wanted = f'of type {type(ours).__name__}, such as {ours!r}'
      raise ValueError(
        f'the labels must be {wanted}, like the classes, got {type(theirs).__name__} {theirs!r}; convert them'
      )
    return float(np.average(answers == labels, weights=sample_weight))

  def get_params(self, deep: bool = True) -> dict[str, Any]:
    """Returns the constructor's arguments by name. `deep` has no effect; scikit-learn passes it."""
    return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

  def set_params(self, **params: Any) -> 'FewShotClassifier':
    """Sets the constructor's arguments that `params` names, and returns self. Raises ValueError for an unknown name."""
    known = self.get_params()
    if unknown := sorted(params.keys() - known.keys()):
      raise ValueError(f'{type(self).__name__} has no parameter {unknown[0]!r}; it has {", ".join(known)}')
    vars(self).update(params)
    return self

  def __repr__(self) -> str:
    """Shows the arguments that differ from their defaults."""
    changed = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if getattr(self, f.name) != f.default}
    texts = [f'{k}=FewShotModel(…)' if isinstance(v, FewShotModel) else f'{k}={v!r}' for k, v in changed.items()]
    return f'{type(self).__name__}({", ".join(texts)})'

  def __sklearn_tags__(self) -> Any:
    """Returns tags for scikit-learn: this is a classifier, and its inputs are arrays of two or more dimensions."""
    from sklearn.utils import ClassifierTags, InputTags, Tags, TargetTags

    inputs = InputTags(three_d_array=True)
    return Tags('classifier', TargetTags(required=True), classifier_tags=ClassifierTags(), input_tags=inputs)

  def _logits(self, images) -> np.ndarray:
    if not hasattr(self, '_fitted'):
      raise NotFittedError(f'this {type(self).__name__} is not fitted yet; call fit with a few images of each class')
    config, inductive, adapted = self._fitted
    x, _ = _prepared(images, self.invert, config)
    options = config, len(self.classes_), inductive
    if not inductive:
      return np.asarray(_predict(options, adapted, x))
    padded = np.concatenate([x, np.zeros((-len(x) % AT_ONCE, *x.shape[1:]), x.dtype)])
    parts = [_predict(options, adapted, padded[i : i + AT_ONCE]) for i in range(0, len(x), AT_ONCE)]
    return np.concatenate(parts)[: len(x)]


@functools.partial(jax.jit, static_argnums=0)
def _adapt(options: tuple[ModelConfig, int, bool], meta, x, y):
  """Returns the adapted parameters. The options are the arguments of `build_learner`."""
  return build_learner(*options).adapt(meta, Batch(x, y), jax.random.key(0))


@functools.partial(jax.jit, static_argnums=0)
def _predict(options: tuple[ModelConfig, int, bool], adapted, x):
  return build_learner(*options).predict(adapted, x)


def _as_images(images, shape: tuple[int, int, int]) -> np.ndarray:
  """Returns the images as floats `[n, H, W, D]`, with `shape` (H, W, D).

  Raises ValueError unless the images have one of the forms that `FewShotClassifier` documents.
  """
  try:
    x = np.asarray(images)
  except ValueError as e:
    raise ValueError(
      'images must all have the same shape, got a list of images of different shapes; resize them'
    ) from e
  height, width, channels = shape
  flat = height * width * channels
  if x.ndim and not len(x):
    raise ValueError(f'there must be at least one image, got an array of shape {x.shape}')
  if x.ndim < 2 or x.shape[1:] not in {shape, (flat,), (height, width) if channels == 1 else shape}:
    takes = f'[n, {height}, {width}, {channels}], or flat [n, {flat}]'
    raise ValueError(f'images must be {takes}, got shape {x.shape}; resize them, and pass one image as images[None]')
  x = x.reshape(-1, *shape)
  if x.dtype == np.bool_:
    return x.astype(np.float32)
  if np.issubdtype(x.dtype, np.integer):
    if x.min() < 0 or x.max() > 255:
      raise ValueError(f'integer images must have values from 0 to 255, got {x.min()} to {x.max()}; scale them')
    if x.max() == 1:
      raise ValueError(
        'integer images must have values from 0 to 255, where 255 is white, but these images have only 0 and 1; '
        'pass booleans or floats'
      )
    return x / 255.0
  if not np.issubdtype(x.dtype, np.floating):
    raise ValueError(f'images must be integers (0 to 255), floats (0 to 1) or booleans, got {x.dtype}; convert them')
  if not np.all(np.isfinite(x)):
    raise ValueError('images must be finite numbers, but some have NaN or infinity; leave those pictures out')
  if x.min() < 0 or x.max() > 1:
    raise ValueError(
      f'float images must have values from 0 to 1, got {x.min():.4g} to {x.max():.4g}; divide by 255, or pass uint8'
    )
  return x.astype(np.promote_types(x.dtype, np.float32))


def _as_labels(labels, count: int) -> np.ndarray:
  """Returns the labels as an array `[count]`.

  Raises:
    ValueError: if the number of labels is not `count`, if a label is None or NaN, or if only some labels are text.
  """
  if isinstance(labels, np.ma.MaskedArray):
    hidden, labels = np.ma.getmaskarray(labels), np.ma.getdata(labels).astype(object)
    labels[hidden] = None
  if isinstance(labels, list | tuple):  # NumPy would make None and numbers text, if there is text beside them.
    if len({isinstance(label, str) for label in labels if not _is_missing(label)}) > 1:
      raise ValueError('labels must all be of one kind, such as strings, but only some of them are text; convert them')
    has_missing = any(map(_is_missing, labels))
    labels = np.asarray(labels, object if has_missing else None)
  labels = np.asarray(labels)
  if labels.shape != (count,):
    raise ValueError(f'there must be a label for each of the {count} images, got labels of shape {labels.shape}')
  if any(map(_is_missing, labels)):
    raise ValueError('some pictures have missing labels (NaN or None); leave those pictures out, or give them labels')
  return labels


def _is_missing(label: Any) -> bool:
  try:
    return label is None or bool(label != label)
  except (TypeError, ValueError):  # pandas.NA has no truth value when compared; an array is no label.
    return np.ndim(label) == 0


def _kind(labels: np.ndarray) -> type:
  """Returns str or bytes for labels of these types, and object for others. Text and bytes are never equal."""
  return next((kind for kind in (str, bytes) if isinstance(labels[0], kind)), object)


def _as_classes(labels, count: int, most: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns the sorted classes, and the index of each label among them. Raises ValueError if labels are not valid."""
  labels = _as_labels(labels, count)
  try:
    classes, y = np.unique(labels, return_inverse=True)
  except TypeError as e:
    raise ValueError(f'labels must be of one kind, such as strings, but cannot be sorted ({e}); convert them') from e
  if len(classes) < 2:
    raise ValueError(f'there must be at least two classes, got {classes.tolist()[0]!r} alone; add another class')
  if len(classes) > most:
    raise ValueError(f'the model supports at most {most} classes, got {len(classes)}; give fewer classes')
  return classes, y.astype(np.int32)


def _balanced(x, y) -> tuple[np.ndarray, np.ndarray]:
  """Returns the support with images of smaller classes repeated, so that each class has the same number of images.

  This is done because the model was trained with the same number of support images in each class.
  """
  members = [np.flatnonzero(y == c) for c in range(y.max() + 1)]
  rows = np.concatenate([np.resize(m, max(map(len, members))) for m in members])
  return x[rows], y[rows]


def _prepared(images, invert: bool | Literal['auto'], config: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
  """Returns the images as float32, with light ones inverted, and whether each image was inverted, `[n, 1, 1, 1]`.

  Integer images arrive in float64, so that an inverted k becomes exactly the float32 number of 255 − k.
  """
  x = _as_images(images, config.image_shape)
  light = to_invert(x, invert, config)
  return np.where(light, 1 - x, x).astype(np.float32), light


def to_invert(x: np.ndarray, invert: bool | Literal['auto'], config: ModelConfig) -> np.ndarray:
  """Returns whether each image is to be inverted, `[n, 1, 1, 1]`. The images are floats `[n, H, W, D]` from 0 to 1.

  If `invert` is 'auto' and the model was trained on dark backgrounds, the images with a light border are inverted.
  """
  if invert != 'auto':
    return np.full((len(x), 1, 1, 1), invert)
  return (has_light_border(x, white=1) & (config.background == 'dark'))[:, None, None, None]


def has_light_border(images: np.ndarray, white: int) -> np.ndarray:
  """Returns whether each image has a light border, `[n]`: the median of its outermost pixels is above `white` / 2.

  Args:
    images: Images `[n, H, W, D]`.
    white: Value of a white pixel, 1 for floats and 255 for uint8.
  """
  borders = [images[:, 0], images[:, -1], images[:, 1:-1, 0], images[:, 1:-1, -1]]
  return np.median(np.concatenate([part.reshape(len(images), -1) for part in borders], 1), 1) > white / 2
