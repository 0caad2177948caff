"""N-way K-shot episodes, drawn on the device from a bank of classes."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from metasgd_jax.types import Batch, Episode, TaskDistribution


class ClassBank(NamedTuple):
  """Images by class; `class_bank` makes one.

  Attributes:
    images: `[M, H, W, D]` uint8, 0 to 255, the classes one after the other; a memory map will do.
    sizes: `[C]`, how many images each class has; M is their sum.

  Example:
    >>> ms.tasks.ClassBank(images=np.zeros((11, 28, 28, 1), np.uint8), sizes=np.array([4, 7])).sizes.sum()
    np.int64(11)
  """

  images: np.ndarray | chex.Array
  sizes: np.ndarray | chex.Array


def class_bank(images: np.ndarray | Sequence[np.ndarray]) -> ClassBank:
  """Returns a bank of images `[C, I, H, W, D]`, or of a sequence of C classes `[I_c, H, W, D]` of unequal sizes.

  Raises:
    ValueError: another rank or dtype, or classes whose images have different shapes.

  Example:
    >>> bank = ms.tasks.class_bank([np.zeros((count, 28, 28, 1), np.uint8) for count in (4, 7)])
    >>> bank.images.shape, bank.sizes
    ((11, 28, 28, 1), array([4, 7]))
  """
  if isinstance(images, np.ndarray | jax.Array):
    if images.ndim != 5:
      raise ValueError(f'a class bank has images [C, I, H, W, D], got shape {images.shape}')
    bank = ClassBank(images.reshape(-1, *images.shape[2:]), np.full(images.shape[0], images.shape[1]))
  else:
    shapes = {np.shape(one)[1:] for one in images}
    if len(shapes) != 1 or np.ndim(images[0]) != 4:
      raise ValueError(
        f'classes are [I, H, W, D] with one H, W, D for all, got shapes {sorted({np.shape(one) for one in images})}'
      )
    bank = ClassBank(np.concatenate(images), np.array([len(one) for one in images]))
  check_bank(bank)
  return bank


def few_shot(bank: ClassBank, *, way: int, shot: int, query: int) -> TaskDistribution:
  """Builds the distribution; a task is its N classes, int32 `[N]`, drawn without replacement and in random order.

  An episode has x `[N·K, H, W, D]` float32 in 0 to 1 and labels `[N·K]` int32, and the same for N·query items. No
  image is in both. A class's label is its place in the task, so it is random; items are shuffled, so that their
  order tells nothing either.

  Args:
    bank: where classes and images come from; put on the device once. One too large for it: `streaming.stream`.
    way: N.
    shot: K, support images of a class.
    query: query images of a class.

  Raises:
    ValueError: what is no bank, more ways than classes, K + query more than a class has, or a number below its least.

  Example:
    >>> bank = ms.tasks.class_bank(np.zeros((20, 10, 28, 28, 1), np.uint8))
    >>> tasks = ms.tasks.few_shot(bank, way=5, shot=1, query=3)
    >>> episode = tasks.episode(tasks.sample(jax.random.key(0)), jax.random.key(1))
    >>> episode.support.x.shape, sorted(episode.support.y.tolist()), episode.query.y.shape
    ((5, 28, 28, 1), [0, 1, 2, 3, 4], (15,))
  """
  indices = image_indices(bank, way=way, shot=shot, query=query)
  return few_shot_from(indices, jnp.asarray(bank.images))


def image_indices(bank: ClassBank, *, way: int, shot: int, query: int) -> TaskDistribution:
  """Builds `few_shot`'s distribution with places in the bank, int32 `[N·K]`, where it has images; errors as there.

  Args:
    bank: as in `few_shot`, and so are the rest.
    way: N.
    shot: K.
    query: query images of a class.

  Example:
    >>> bank = ms.tasks.class_bank(np.zeros((20, 10, 28, 28, 1), np.uint8))
    >>> indices = ms.tasks.image_indices(bank, way=5, shot=1, query=3)
    >>> indices.episode(indices.sample(jax.random.key(0)), jax.random.key(1)).query.x.shape
    (15,)
  """
  check_bank(bank)
  check_episode(way, shot, query)
  sizes = np.asarray(bank.sizes)
  if way > len(sizes):
    raise ValueError(f'way={way} asks for more classes than the bank has ({len(sizes)}); lower way')
  if shot + query > sizes.min():
    raise ValueError(
      f'shot + query = {shot} + {query} = {shot + query} is more than the {sizes.min()} images of class '
      f'{int(sizes.argmin())}; lower one, or leave the class out'
    )
  sample = functools.partial(_sample_classes, classes=len(sizes), way=way)
  episode = functools.partial(_episode_of_indices, most=int(sizes.max()), shot=shot, query=query)
  firsts = np.cumsum(sizes) - sizes
  return TaskDistribution(
    Partial(sample), Partial(episode, jnp.asarray(firsts, jnp.int32), jnp.asarray(sizes, jnp.int32))
  )


def few_shot_from(indices: TaskDistribution, images: chex.Array) -> TaskDistribution:
  """Returns the distribution with the images `[M, H, W, D]` that the indices point at, float32 in 0 to 1.

  Example:
    >>> bank = ms.tasks.class_bank(np.zeros((20, 10, 28, 28, 1), np.uint8))
    >>> tasks = ms.tasks.few_shot_from(ms.tasks.image_indices(bank, way=5, shot=1, query=3), jnp.asarray(bank.images))
    >>> tasks.episode(tasks.sample(jax.random.key(0)), jax.random.key(1)).support.x.shape
    (5, 28, 28, 1)
  """
  return TaskDistribution(indices.sample, Partial(_look_up, indices.episode, images))


def check_bank(bank: ClassBank) -> None:
  """Raises ValueError unless bank is a `ClassBank` of uint8 images `[M, H, W, D]` whose number the sizes add up to."""
  if not isinstance(bank, ClassBank):
    raise ValueError(f'expected a ClassBank, got {type(bank).__name__}; class_bank makes one of images [C, I, H, W, D]')
  if np.ndim(bank.images) != 4 or np.ndim(bank.sizes) != 1 or bank.images.shape[0] != np.sum(bank.sizes):
    raise ValueError(
      f'a ClassBank has images [M, H, W, D] and sizes [C] of sum M, got shape {np.shape(bank.images)} and sizes '
      f'{np.shape(bank.sizes)} of sum {np.sum(bank.sizes)}; class_bank makes one'
    )
  if bank.images.dtype != np.uint8:
    raise ValueError(f'a class bank has uint8 images (0 to 255), got {bank.images.dtype}')


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

  Example:
    >>> ms.tasks.rotate_classes(ms.tasks.class_bank(np.zeros((20, 10, 28, 28, 1), np.uint8))).sizes.shape
    (80,)
  """
  check_bank(bank)
  images = bank.images
  if images.shape[1] != images.shape[2]:
    raise ValueError(f'only square images can be turned by 90 degrees, got {images.shape[1:3]}')
  return ClassBank(np.concatenate([np.rot90(images, r, axes=(1, 2)) for r in range(4)]), np.tile(bank.sizes, 4))


def all_classes(bank: ClassBank, *, batch: int) -> TaskDistribution:
  """Builds the distribution of supervised batches: the query is `batch` images of any classes, labels 0 to C − 1.

  For training on all classes jointly, as `learners.fine_tuning` does. The support is one of them, for its shape.

  Args:
    bank: as in `few_shot`.
    batch: images at a time.

  Raises:
    ValueError: what is no bank, or a batch below 1.

  Example:
    >>> bank = ms.tasks.class_bank(np.zeros((20, 10, 28, 28, 1), np.uint8))
    >>> tasks = ms.tasks.all_classes(bank, batch=32)
    >>> tasks.episode(tasks.sample(jax.random.key(0)), jax.random.key(1)).query.x.shape
    (32, 28, 28, 1)
  """
  return few_shot_from(class_indices(bank, batch=batch), jnp.asarray(bank.images))


def class_indices(bank: ClassBank, *, batch: int) -> TaskDistribution:
  """Builds `all_classes`' distribution with places in the bank where it has images; errors as there.

  Args:
    bank: as in `all_classes`.
    batch: images at a time.

  Example:
    >>> indices = ms.tasks.class_indices(ms.tasks.class_bank(np.zeros((20, 10, 28, 28, 1), np.uint8)), batch=32)
    >>> int(indices.episode(indices.sample(jax.random.key(0)), jax.random.key(1)).query.x.max()) < 200
    True
  """
  check_bank(bank)
  if batch < 1:
    raise ValueError(f'batch must be at least 1, got {batch}')
  labels = np.repeat(np.arange(len(bank.sizes)), bank.sizes)
  episode = functools.partial(_any_images, batch=batch)
  return TaskDistribution(Partial(_no_task), Partial(episode, jnp.asarray(labels, jnp.int32)))


def _sample_classes(key, *, classes, way):
  return jax.random.choice(key, classes, (way,), replace=False).astype(jnp.int32)


def _episode_of_indices(firsts, sizes, task, key, *, most, shot, query) -> Episode:
  order_key, draw_key = jax.random.split(key)

  def draw(class_key, size):
    """Different images of one class: those of the greatest of random numbers, which images that are not there lack."""
    lots = jnp.where(jnp.arange(most) < size, jax.random.uniform(class_key, (most,)), -1.0)
    return jax.lax.top_k(lots, shot + query)[1]

  drawn = firsts[task][:, None] + jax.vmap(draw)(jax.random.split(draw_key, task.shape[0]), sizes[task])
  batches = []
  for labels, nth in split_labels(order_key, task.shape[0], shot, query):
    batches.append(Batch(drawn[labels, nth].astype(jnp.int32), labels.astype(jnp.int32)))
  return Episode(*batches)


def _look_up(indices, images, task, key) -> Episode:
  as_floats = lambda rows: images[rows].astype(jnp.float32) / 255.0
  return Episode(*(Batch(as_floats(part.x), part.y) for part in indices(task, key)))


def _no_task(key):
  del key
  return jnp.zeros((), jnp.int32)


def _any_images(labels, task, key, *, batch) -> Episode:
  del task
  rows = jax.random.randint(key, (batch,), 0, labels.shape[0])
  query = Batch(rows, labels[rows])
  return Episode(jax.tree.map(lambda a: a[:1], query), query)
