"""A few-shot classifier with the interface of scikit-learn: `fit` adapts a trained model to new classes."""

import dataclasses
import functools
from typing import Any, Literal

import jax
import numpy as np

from metasgd_jax.deploy import kinds, likeness
from metasgd_jax.deploy.inputs import as_classes, as_labels, balanced, prepared, text_kind
from metasgd_jax.deploy.model_file import (
  FewShotModel,
  ModelConfig,
  build_learner,
  build_network,
  load_model,
  suits_native,
)
from metasgd_jax.io.files import PathLike
from metasgd_jax.types import Batch, Learner, Model

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
  - `model_`: the model. With 'auto', it is the name of the shipped model that was chosen.

  Args:
    model: Name of a model that ships with the package, path of a file that `save_model` wrote, or a `FewShotModel`.
      With 'auto' it is the shipped model that takes images of the size and channels of the support.
    inductive: Whether batch norm uses the statistics of the support; see above.
    steps: Number of inner steps. By default it is the model's own number.
    invert: Whether to invert the images, so that light becomes dark. With 'auto' each image that has a light border is
      inverted, if the model was trained on dark backgrounds.

  Example:
    >>> images = np.zeros((4, 28, 28))  # Light strokes on black: two lie, two stand.
    >>> images[0, 10:12, 4:24] = images[1, 16:18, 4:24] = images[2, 4:24, 10:12] = images[3, 4:24, 16:18] = 1
    >>> labels = ['lying', 'lying', 'standing', 'standing']
    >>> classifier = ms.FewShotClassifier().fit(images[::2], labels[::2])  # One drawing of each class.
    >>> print(classifier.predict(images[1::2]))
    ['lying' 'standing']
    >>> classifier.predict_proba(images[1::2]).shape  # In the order of classifier.classes_.
    (2, 2)
    >>> classifier.score(images, labels)
    1.0
  """

  model: PathLike | FewShotModel = 'auto'
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
    chosen = kinds.shipped_that_fits(X) if self.model == 'auto' else self.model
    model = chosen if isinstance(chosen, FewShotModel) else load_model(chosen)
    steps = model.config.inner_steps if self.steps is None else self.steps
    # Compiled programs are cached by config. These three fields do not change them.
    unused: Any = dict(training={}, temperature=1.0, least_likeness=None)
    config = dataclasses.replace(model.config, inner_steps=steps, **unused)
    images, light = prepared(X, self.invert, config)
    classes, labels = as_classes(y, len(images), config.way)
    images, labels = balanced(images, labels)
    inductive = bool(self.inductive)
    adapted, means = _adapt((config, len(classes), inductive), model.meta, images, labels)
    self.classes_, self.model_ = classes, chosen
    self.image_shape_ = config.image_shape
    self.n_features_in_ = int(np.prod(config.image_shape))
    self.inverted_ = bool(light.any())
    self._fitted = config, inductive, jax.device_get(adapted)
    self._means = np.asarray(means)
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

  def likeness(self, X: Any) -> np.ndarray:
    """Returns how similar each image is to the most similar class, from 0 to 1: `[n]`.

    An image that belongs to none of the classes mostly has a lower likeness than the other images, whereas one of its
    probabilities may be high. The likeness is the cosine of two vectors of features: those of the image, and their mean
    over the examples of the class, which are repeated as in `fit`. The features are the inputs of the first dense layer
    of the adapted network. Usual values are lower with fewer examples; see `ModelConfig.least_likeness_of`.

    This method raises the same errors as `decision_function`.

    Args:
      X: Query images, in any of the forms that `FewShotClassifier` accepts.
    """
    self._options()  # Raises NotFittedError before `fit`.
    return self._in_batches(_likeness, X, self._means)

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
    labels = as_labels(y, len(answers))
    if text_kind(labels) != text_kind(self.classes_):
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
    return self._in_batches(_predict, images)

  def _in_batches(self, function, images, *operands) -> np.ndarray:
    """Returns `function(options, adapted, *operands, x)` for the images, in batches if the classifier is inductive."""
    options, adapted = self._options()
    config, _, inductive = options
    x, _ = prepared(images, self.invert, config)
    if not inductive:
      return np.asarray(function(options, adapted, *operands, x))
    padded = np.concatenate([x, np.zeros((-len(x) % AT_ONCE, *x.shape[1:]), x.dtype)])
    parts = [function(options, adapted, *operands, padded[i : i + AT_ONCE]) for i in range(0, len(x), AT_ONCE)]
    return np.concatenate(parts)[: len(x)]

  def _options(self) -> tuple[tuple[ModelConfig, int, bool], Any]:
    """Returns the arguments of `build_learner`, and the adapted state. Raises NotFittedError before `fit`."""
    if not hasattr(self, '_fitted'):
      raise NotFittedError(f'this {type(self).__name__} is not fitted yet; call fit with a few images of each class')
    config, inductive, adapted = self._fitted
    return (config, len(self.classes_), inductive), adapted


def _learner(options: tuple[ModelConfig, int, bool]) -> Learner:
  return build_learner(*options, native=suits_native(options[0]))


def _network(options: tuple[ModelConfig, int, bool]) -> Model:
  return build_network(options[0], native=suits_native(options[0]))


@functools.partial(jax.jit, static_argnums=0)
def _adapt(options: tuple[ModelConfig, int, bool], meta, x, y):
  """Returns the adapted state, and the mean features of each class. The options are arguments of `build_learner`."""
  support = Batch(x, y)
  adapted = _learner(options).adapt(meta, support, jax.random.key(0))
  return adapted, likeness.class_means(_network(options), adapted, support, options[1])


@functools.partial(jax.jit, static_argnums=0)
def _predict(options: tuple[ModelConfig, int, bool], adapted, x):
  return _learner(options).predict(adapted, x)


@functools.partial(jax.jit, static_argnums=0)
def _likeness(options: tuple[ModelConfig, int, bool], adapted, means, x):
  return likeness.likeness(_network(options), adapted, means, x)
