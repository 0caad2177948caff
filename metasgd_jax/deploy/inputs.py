"""Checks the images and labels that people give to a few-shot classifier, and prepares them for the model."""

from typing import Any, Literal

import numpy as np

from metasgd_jax.deploy.model_file import ModelConfig


def as_images(images, shape: tuple[int, int, int]) -> np.ndarray:
  """Returns the images as floats `[n, H, W, D]`, with `shape` (H, W, D).

  Raises ValueError unless the images have one of the forms that `FewShotClassifier` documents.
  """
  x = as_array(images)
  if x.ndim and not len(x):
    raise ValueError(f'there must be at least one image, got an array of shape {x.shape}')
  if not fits(x.shape, shape):
    advice = 'resize them, and pass one image as images[None]'
    raise ValueError(f'images must be {forms(shape)}, got shape {x.shape}; {advice}')
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


def as_array(images: Any) -> np.ndarray:
  """Returns the images as an array. Raises ValueError if their shapes differ."""
  try:
    return np.asarray(images)
  except ValueError as e:
    raise ValueError(
      'images must all have the same shape, got a list of images of different shapes; resize them'
    ) from e


def fits(given: tuple[int, ...], shape: tuple[int, int, int]) -> bool:
  """Returns whether an array of the shape `given` may be images of the shape (H, W, D)."""
  height, width, channels = shape
  flat = height * width * channels
  return given[1:] in {shape, (flat,), (height, width) if channels == 1 else shape}


def forms(shape: tuple[int, int, int]) -> str:
  """Returns the text of an error message that says how images of the shape (H, W, D) are given."""
  return f'[n, {", ".join(map(str, shape))}], or flat [n, {np.prod(shape)}]'


def as_labels(labels, count: int) -> np.ndarray:
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


def text_kind(labels: np.ndarray) -> type:
  """Returns str or bytes for labels of these types, and object for others. Text and bytes are never equal."""
  return next((kind for kind in (str, bytes) if isinstance(labels[0], kind)), object)


def as_classes(labels, count: int, most: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns the sorted classes, and the index of each label among them. Raises ValueError if labels are not valid."""
  labels = as_labels(labels, count)
  try:
    classes, y = np.unique(labels, return_inverse=True)
  except TypeError as e:
    raise ValueError(f'labels must be of one kind, such as strings, but cannot be sorted ({e}); convert them') from e
  if len(classes) < 2:
    raise ValueError(f'there must be at least two classes, got {classes.tolist()[0]!r} alone; add another class')
  if len(classes) > most:
    raise ValueError(f'the model supports at most {most} classes, got {len(classes)}; give fewer classes')
  return classes, y.astype(np.int32)


def balanced(x, y) -> tuple[np.ndarray, np.ndarray]:
  """Returns the support with images of smaller classes repeated, so that each class has the same number of images.

  This is done because the model was trained with the same number of support images in each class.
  """
  members = [np.flatnonzero(y == c) for c in range(y.max() + 1)]
  rows = np.concatenate([np.resize(m, max(map(len, members))) for m in members])
  return x[rows], y[rows]


def prepared(images, invert: bool | Literal['auto'], config: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
  """Returns the images as float32, with light ones inverted, and whether each image was inverted, `[n, 1, 1, 1]`.

  Integer images arrive in float64, so that an inverted k becomes exactly the float32 number of 255 − k.
  """
  x = as_images(images, config.image_shape)
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
