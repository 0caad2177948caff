"""Images changed at random, on the device, as an episode is drawn."""

import dataclasses
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from metasgd_jax.types import Episode, Tasks

Augment = Callable[[chex.PRNGKey, chex.Array], chex.Array]
"""`(key, image [H, W, D] in 0 to 1) → image`; consumes key."""


def augmented(tasks: Tasks, augment: Augment) -> Tasks:
  """Returns the tasks with each image of an episode, support and query alike, changed by `augment`.

  Which images an episode has stays a function of its key alone, so that a stream sends the right ones. `chain` makes
  one augmentation of several.

  Raises:
    ValueError: tasks that are augmented already, whose keys would be used twice.

  Example:
    >>> augment = ms.tasks.augmentation.chain(ms.tasks.augmentation.flip, ms.tasks.augmentation.shift(2))
    >>> tasks = ms.tasks.augmented(ms.tasks.glyphs(way=5, shot=1, query=1), augment)
    >>> jax.jit(tasks.episode)(tasks.sample(jax.random.key(0)), jax.random.key(1)).support.x.shape
    (5, 28, 28, 1)
  """
  if any(isinstance(change, _Augmented) for change in tasks.changes):
    raise ValueError('the tasks are augmented already; chain the augmentations and give them at once')
  return tasks.map_episode(_Augmented(augment))


def chain(*augments: Augment) -> Augment:
  """Returns one after the other, each with a key of its own."""

  def all_of_them(key, image):
    for i, augment in enumerate(augments):
      image = augment(jax.random.fold_in(key, i), image)
    return image

  return all_of_them


def flip(key: chex.PRNGKey, image: chex.Array) -> chex.Array:
  """Mirrors left and right, every second time."""
  return jnp.where(jax.random.bernoulli(key), image[:, ::-1], image)


def shift(pixels: int) -> Augment:
  """Returns what moves an image by up to so many pixels up or down, and left or right; its edge is repeated.

  Raises:
    ValueError: pixels below 0.
  """
  if pixels < 0:
    raise ValueError(f'pixels must be at least 0, got {pixels}')

  def moved(key, image):
    padded = jnp.pad(image, ((pixels, pixels), (pixels, pixels), (0, 0)), mode='edge')
    down, right = jax.random.randint(key, (2,), 0, 2 * pixels + 1)
    return jax.lax.dynamic_slice(padded, (down, right, jnp.zeros_like(down)), image.shape)

  return moved


def light(strength: float) -> Augment:
  """Returns what multiplies brightness, then contrast around the mean, by numbers from U[1 − strength, 1 + strength].

  Raises:
    ValueError: a strength outside 0 to 1.
  """
  if not 0 <= strength <= 1:
    raise ValueError(f'strength must be from 0 to 1, got {strength}')

  def lit(key, image):
    brightness, contrast = jax.random.uniform(key, (2,), image.dtype, 1 - strength, 1 + strength)
    image = image * brightness
    mean = jnp.mean(image)
    return jnp.clip((image - mean) * contrast + mean, 0, 1)

  return lit


@dataclasses.dataclass(frozen=True)
class _Augmented:
  """The change of an episode function to one whose images are augmented."""

  augment: Augment

  def __call__(self, episode: Callable) -> Callable:
    return Partial(_episode, episode, Partial(self.augment))


def _episode(episode, augment, task, key) -> Episode:
  parts = []
  # `split(key)[i]` is `fold_in(key, i)`: a number that no split of the episode's own reaches.
  for i, part in enumerate(episode(task, key)):
    keys = jax.random.split(jax.random.fold_in(key, 2**31 + i), part.x.shape[0])
    parts.append(part._replace(x=jax.vmap(augment)(keys, part.x)))
  return Episode(*parts)
