"""Tells drawings from photographs, and chooses the model that ships for them."""

from typing import Any, Literal

import numpy as np

from metasgd_jax.deploy.inputs import as_array, fits, forms
from metasgd_jax.deploy.model_file import ModelConfig, load_model, shipped_models

Kind = Literal['drawings', 'photographs']

NEAR = 1 / 8
"""Largest difference of two shades of the same paper. Shades are from 0 to 1."""
SHARE_OF_PAPER = 0.7
"""Mean share of paper from which pictures are called drawings.

It was chosen on pictures of all classes of Omniglot and mini-ImageNet, on glyphs, and on drawings with the simulated
light and noise of a phone's camera. The share is 0.85 on average for drawings, and 0.48 for photographs. Of sets of 2,
4 and 10 photographs, 5%, 1.3% and 0.03% are taken for drawings. Of sets of 2 and 4 drawings, at most 1.4% and 0.1% are
taken for photographs.
"""
_DATASETS: dict[str, Kind] = {
  'omniglot': 'drawings',
  'glyphs': 'drawings',
  'mini_imagenet': 'photographs',
  'cifar_fs': 'photographs',
}


def kind_of(images: np.ndarray) -> Kind:
  """Returns whether most of the images are drawings or photographs.

  A drawing is strokes on paper, so that most of its pixels have the shade of its border. Photographs of objects on an
  even background have this property too, and are called drawings.

  Args:
    images: Images `[n, H, W, D]`, of integers from 0 to 255 or floats from 0 to 1, with D = 1 or 3.
  """
  return 'drawings' if share_of_paper(images).mean() >= SHARE_OF_PAPER else 'photographs'


def share_of_paper(images: np.ndarray) -> np.ndarray:
  """Returns for each image the share of pixels whose shade is near the median shade of the image's border, `[n]`."""
  scale = 255 if np.issubdtype(images.dtype, np.integer) else 1
  shades = images.mean(-1, dtype=np.float32) / scale  # [n, H, W]
  border = np.concatenate([shades[:, 0], shades[:, -1], shades[:, :, 0], shades[:, :, -1]], 1)
  paper = np.median(border, 1)[:, None, None]
  return (np.abs(shades - paper) < NEAR).mean((1, 2))


def kind_of_model(config: ModelConfig) -> Kind | None:
  """Returns the kind of images that a model was trained on, or None if its file does not say it."""
  return _DATASETS.get(str(config.training.get('dataset')))


def shipped_for(kind: Kind) -> str | None:
  """Returns the name of the model that ships with the package for images of this kind, or None if there is none."""
  by_kind = {kind_of_model(load_model(name).config): name for name in shipped_models()}
  return by_kind.get(kind)


def shipped_that_fits(images: Any) -> str:
  """Returns the name of the shipped model that takes images of this shape.

  Args:
    images: Images in one of the forms that `FewShotClassifier` accepts.

  Raises:
    ValueError: if no shipped model takes them.
  """
  given = as_array(images).shape
  shapes = {name: load_model(name).config.image_shape for name in shipped_models()}
  found = [name for name, shape in shapes.items() if fits(given, shape)]
  if not found:
    takes = ', or '.join(f'{forms(shape)} for {name}' for name, shape in shapes.items())
    raise ValueError(f'images must be {takes}, got shape {given}; resize them, or give another `model`')
  return found[0]
