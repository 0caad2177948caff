"""N-way K-shot episodes, drawn on the device from a bank of classes."""

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from metasgd_jax.types import Batch, Episode, TaskDistribution


class ClassBank(NamedTuple):
  """Images by class: `images [C, I, H, W, D]` in uint8, 0 to 255."""

  images: np.ndarray | chex.Array


def few_shot(bank: ClassBank, *, way: int, shot: int, query: int) -> TaskDistribution:
  """Builds the distribution; a task is its N classes, int32 `[N]`, drawn without replacement and in random order.

  An episode has x `[N·K, H, W, D]` float32 in 0 to 1 and labels `[N·K]` int32, and the same for N·query items. No
  drawing is in both. A class's label is its place in the task, so it is random; items are shuffled, so that their
  order tells nothing either.

  Args:
    bank: where classes and drawings come from; put on the device once.
    way: N.
    shot: K, support drawings of a class.
    query: query drawings of a class.

  Raises:
    ValueError: a bank of another rank or dtype, more ways than classes, K + query more than a class has, or a
      number below its least.
  """
  if not isinstance(bank, ClassBank):
    raise ValueError(f'few_shot takes a ClassBank, got {type(bank).__name__}; wrap images [C, I, H, W, D] in ClassBank')
  images = bank.images
  if np.ndim(images) != 5:
    raise ValueError(f'a class bank has images [C, I, H, W, D], got shape {np.shape(images)}')
  if images.dtype != np.uint8:
    raise ValueError(f'a class bank has uint8 images (0 to 255), got {images.dtype}')
  check_episode(way, shot, query)
  classes, instances = images.shape[:2]
  if way > classes:
    raise ValueError(f'way={way} asks for more classes than the bank has ({classes}); lower way')
  if shot + query > instances:
    raise ValueError(
      f'shot + query = {shot} + {query} = {shot + query} is more than the {instances} drawings of a class; lower one'
    )
  sample = functools.partial(_sample_classes, classes=classes, way=way)
  episode = functools.partial(_episode, shot=shot, query=query)
  return TaskDistribution(Partial(sample), Partial(episode, jnp.asarray(images)))


def check_episode(way: int, shot: int, query: int) -> None:
  """Raises ValueError unless way ≥ 2, shot ≥ 1 and query ≥ 1."""
  for name, value, least in (('way', way, 2), ('shot', shot, 1), ('query', query, 1)):
    if value < least:
      raise ValueError(f'{name} must be at least {least}, got {value}')


def split_labels(key: chex.PRNGKey, way: int, shot: int, query: int) -> tuple[tuple, tuple]:
  """Returns ((labels, nth), (labels, nth)) of support `[N·K]` and query `[N·query]`, each in shuffled order.

  `nth` says which of its class's `shot + query` drawings an item is: 0 … K − 1 in the support, the others in the
  query. Consumes key.
  """
  nth, labels = jnp.meshgrid(jnp.arange(shot + query), jnp.arange(way), indexing='ij')
  support_key, query_key = jax.random.split(key)
  parts = []
  for part_key, rows in ((support_key, slice(0, shot)), (query_key, slice(shot, None))):
    part_labels, part_nth = labels[rows].ravel(), nth[rows].ravel()
    order = jax.random.permutation(part_key, part_labels.shape[0])
    parts.append((part_labels[order], part_nth[order]))
  return parts[0], parts[1]


def rotate_classes(bank: ClassBank) -> ClassBank:
  """Returns a bank of 4·C classes: each class turned by 0, 90, 180 and 270 degrees is a class of its own.

  As Vinyals et al. 2016 and MAML do for Omniglot. Class c turned r times is class r·C + c.

  Raises:
    ValueError: images that are not square.
  """
  images = bank.images
  if images.shape[2] != images.shape[3]:
    raise ValueError(f'only square images can be turned by 90 degrees, got {images.shape[2:4]}')
  return ClassBank(np.concatenate([np.rot90(images, r, axes=(2, 3)) for r in range(4)]))


def _sample_classes(key, *, classes, way):
  return jax.random.choice(key, classes, (way,), replace=False).astype(jnp.int32)


def _episode(images, task, key, *, shot, query) -> Episode:
  order_key, draw_key = jax.random.split(key)
  way, instances = task.shape[0], images.shape[1]

  def draw(class_key):
    return jax.random.choice(class_key, instances, (shot + query,), replace=False)

  drawings = jax.vmap(draw)(jax.random.split(draw_key, way))  # [N, K + query]
  batches = []
  for labels, nth in split_labels(order_key, way, shot, query):
    x = images[task[labels], drawings[labels, nth]]
    batches.append(Batch(x.astype(jnp.float32) / 255.0, labels.astype(jnp.int32)))
  return Episode(*batches)
