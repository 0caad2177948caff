"""Benchmarks that compare metasgd_jax with other libraries and with plain JAX."""

from typing import NamedTuple

ALPHA = 0.1
"""Initial learning rate α of the inner step, in every program that is compared."""


class Setting(NamedTuple):
  """What is trained: N-way K-shot classification of images with the shape of a data set.

  Attributes:
    images: Name of the data set, a key of `IMAGES`.
    way: Number of classes of a task, N.
    shot: Number of support images per class, K.
    tasks: Number of tasks of a meta-iteration, T.
  """

  images: str
  way: int
  shot: int
  tasks: int

  @property
  def sizes(self) -> tuple[tuple[int, int, int], int, int]:
    """Returns the shape of an image, the number of filters, and the number of units of the fully connected layer."""
    return IMAGES[self.images]


IMAGES = {'omniglot': ((28, 28, 1), 64, 32), 'mini_imagenet': ((84, 84, 3), 32, 0)}
"""Shape of the images, filters and hidden units of Conv4, by data set, as in Li et al. 2017, section 4.2."""
