"""Random augmentations of images, applied on the device when an episode is drawn."""

import dataclasses
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from metasgd_jax.types import Episode, Tasks, equal_partial

Augment = Callable[[chex.PRNGKey, chex.Array], chex.Array]
"""Function `(key, image [H, W, D] from 0 to 1) → image`; consumes key."""


def augmented(tasks: Tasks, augment: Augment) -> Tasks:
  """Returns the tasks with `augment` applied to each image of an episode, in the support and in the query.

  The augmentation does not change which images an episode contains, because their choice still depends only on the key
  of the episode. Tasks from `stream` can therefore be augmented too: they still send the images that an episode needs.
  `chain` combines several augmentations into one.

  Raises:
    ValueError: if the tasks are augmented already, because both augmentations would use the same random keys.

  Example:
    >>> augment = ms.tasks.augmentation.chain(ms.tasks.augmentation.flip, ms.tasks.augmentation.shift(2))
    >>> tasks = ms.tasks.augmented(ms.tasks.glyphs(way=5, shot=1, query=1), augment)
    >>> jax.jit(tasks.episode)(tasks.sample(jax.random.key(0)), jax.random.key(1)).support.x.shape
    (5, 28, 28, 1)
  """
  if any(isinstance(change, _Augmented) for change in tasks.changes):
    raise ValueError('the tasks are augmented already; combine augmentations with `chain`, and call `augmented` once')
  return tasks.map_episode(_Augmented(augment))


def chain(*augments: Augment) -> Augment:
  """Returns an augmentation that applies the given ones in order, each with a separate key."""
  return equal_partial(_chained, augments=augments)


def flip(key: chex.PRNGKey, image: chex.Array) -> chex.Array:
  """Mirrors the image left to right with probability 1/2; consumes key."""
  return jnp.where(jax.random.bernoulli(key), image[:, ::-1], image)


def shift(pixels: int) -> Augment:
  """Returns an augmentation that shifts an image by at most `pixels` pixels vertically and horizontally.

  The shifts are random. The space that a shift leaves at an edge is filled with copies of the pixels at that edge.

  Raises:
    ValueError: if `pixels` is below 0.
  """
  if pixels < 0:
    raise ValueError(f'the shift `pixels` must be at least 0, got {pixels}')
  return equal_partial(_shifted, pixels=pixels)


def light(strength: float) -> Augment:
  """Returns an augmentation that multiplies the brightness, then the contrast around the mean, by random factors.

  Both factors are drawn from U[1 − strength, 1 + strength].

  Raises:
    ValueError: if `strength` is not from 0 to 1.
  """
  if not 0 <= strength <= 1:
    raise ValueError(f'`strength` must be from 0 to 1, got {strength}')
  return equal_partial(_lit, strength=strength)


def _chained(key, image, *, augments):
  for i, augment in enumerate(augments):
    image = augment(jax.random.fold_in(key, i), image)
  return image


def _shifted(key, image, *, pixels):
  padded = jnp.pad(image, ((pixels, pixels), (pixels, pixels), (0, 0)), mode='edge')
  down, right = jax.random.randint(key, (2,), 0, 2 * pixels + 1)
  return jax.lax.dynamic_slice(padded, (down, right, jnp.zeros_like(down)), image.shape)


def _lit(key, image, *, strength):
  brightness, contrast = jax.random.uniform(key, (2,), image.dtype, 1 - strength, 1 + strength)
  image = image * brightness
  mean = jnp.mean(image)
  return jnp.clip((image - mean) * contrast + mean, 0, 1)


@dataclasses.dataclass(frozen=True)
class _Augmented:
  """Turns an episode function into an episode function that also augments the images of each episode."""

  augment: Augment

  def __call__(self, episode: Callable) -> Callable:
    return Partial(_episode, episode, Partial(self.augment))


def _episode(episode, augment, task, key) -> Episode:
  parts = []
  # `split(key)[i]` equals `fold_in(key, i)`. The episode function splits the same key, but never into more than 2**31
  # keys, so that the keys below differ from its keys.
  for i, part in enumerate(episode(task, key)):
    keys = jax.random.split(jax.random.fold_in(key, 2**31 + i), part.x.shape[0])
    parts.append(part._replace(x=jax.vmap(augment)(keys, part.x)))
  return Episode(*parts)
