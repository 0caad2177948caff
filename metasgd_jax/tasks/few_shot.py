"""N-way K-shot episodes, which are drawn on the device from a bank of classes."""

from collections.abc import Sequence
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from metasgd_jax.types import Batch, Episode, TaskDistribution, check_count, equal_partial


class ClassBank(NamedTuple):
  """A bank of images that are grouped by class. `class_bank` creates one from arrays.

  Attributes:
    images: Images of all classes, one class after another: `[M, H, W, D]` uint8 from 0 to 255. A memory map is allowed.
    sizes: Number of images of each class, `[C]`. The sum of the sizes is M.

  Example:
    >>> ms.tasks.ClassBank(images=np.zeros((11, 28, 28, 1), np.uint8), sizes=np.array([4, 7])).sizes.sum()
    np.int64(11)
  """

  images: np.ndarray | chex.Array
  sizes: np.ndarray | chex.Array


def class_bank(images: np.ndarray | Sequence[np.ndarray]) -> ClassBank:
  """Returns a bank of C classes. Each class may have a different number of images.

  Args:
    images: Images of all classes, uint8. They are one array `[C, I, H, W, D]` if each class has I images, or a sequence
      of C arrays `[I_c, H, W, D]`, one for each class.

  Raises:
    ValueError: if the images do not have this rank and dtype, or if the images of two classes have different shapes.

  Example:
    >>> bank = ms.tasks.class_bank([np.zeros((count, 28, 28, 1), np.uint8) for count in (4, 7)])
    >>> bank.images.shape, bank.sizes
    ((11, 28, 28, 1), array([4, 7]))
  """
  if isinstance(images, np.ndarray | jax.Array):
    if images.ndim != 5:
      raise ValueError(f'`images` must be [C, I, H, W, D] or a list of arrays [I, H, W, D], got shape {images.shape}')
    bank = ClassBank(images.reshape(-1, *images.shape[2:]), np.full(images.shape[0], images.shape[1]))
  else:
    shapes = sorted({np.shape(one) for one in images})
    if len({shape[1:] for shape in shapes}) != 1 or len(shapes[0]) != 4:
      raise ValueError(
        f'each class must be an array [I, H, W, D], and all images must have the same shape [H, W, D], got arrays '
        f'of shapes {shapes}; resize the images'
      )
    bank = ClassBank(np.concatenate(images), np.array([len(one) for one in images]))
  check_bank(bank)
  return bank


def few_shot(bank: ClassBank, *, way: int, shot: int, query: int) -> TaskDistribution:
  """Returns the distribution of N-way K-shot tasks from a bank of classes.

  A task consists of N classes, int32 `[N]`, drawn without replacement and in random order. The support of an episode
  has images x `[N·K, H, W, D]`, float32 from 0 to 1, and labels y `[N·K]`, int32. The query has N·query such items. No
  image is in both the support and the query. The label of a class is its position in the task, so labels are random.
  The items are shuffled, so that their order says nothing about their labels.

  Args:
    bank: Bank of classes and images, which is copied to the device once. If the bank is too large for the device, use
      `streaming.stream`.
    way: Number of classes in a task, N.
    shot: Number of support images per class, K.
    query: Number of query images per class.

  Raises:
    ValueError: if `bank` is not a `ClassBank`, if `way` is below 2 or more than the number of classes, if `shot` or
      `query` is below 1, or if `shot` + `query` is more than the number of images of some class.

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
  """Returns the distribution of `few_shot` with indices of images in place of images.

  The indices are positions in the bank, int32 `[N·K]` in the support and `[N·query]` in the query. The same errors are
  raised as by `few_shot`.

  Args:
    bank: Bank of classes and images, as in `few_shot`.
    way: Number of classes in a task, N.
    shot: Number of support images per class, K.
    query: Number of query images per class.

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
    raise ValueError(f'way={way} is more than the number of classes in the bank ({len(sizes)}); lower `way`')
  if shot + query > sizes.min():
    limit, advice = f'the {sizes.min()} images of class {int(sizes.argmin())}', 'lower shot or query, or omit the class'
    raise ValueError(f'shot + query = {shot} + {query} = {shot + query} is more than {limit}; {advice}')
  sample = equal_partial(_sample_classes, classes=len(sizes), way=way)
  episode = equal_partial(_episode_of_indices, most=int(sizes.max()), shot=shot, query=query)
  firsts = jnp.asarray(np.cumsum(sizes) - sizes, jnp.int32)
  return TaskDistribution(sample, Partial(episode, firsts, jnp.asarray(sizes, jnp.int32)))


def few_shot_from(indices: TaskDistribution, images: chex.Array) -> TaskDistribution:
  """Returns a distribution of episodes with images, from a distribution of episodes with indices of images.

  The images of an episode are float32 from 0 to 1.

  Args:
    indices: Distribution whose episodes contain indices of images, such as the result of `image_indices`.
    images: Array `[M, H, W, D]` of all images of the bank that the indices refer to.

  Example:
    >>> bank = ms.tasks.class_bank(np.zeros((20, 10, 28, 28, 1), np.uint8))
    >>> tasks = ms.tasks.few_shot_from(ms.tasks.image_indices(bank, way=5, shot=1, query=3), jnp.asarray(bank.images))
    >>> tasks.episode(tasks.sample(jax.random.key(0)), jax.random.key(1)).support.x.shape
    (5, 28, 28, 1)
  """
  return TaskDistribution(indices.sample, Partial(_look_up, indices.episode, images))


def check_bank(bank: ClassBank) -> None:
  """Raises ValueError unless `bank` is a `ClassBank` of uint8 images `[M, H, W, D]` whose class sizes sum to M."""
  if not isinstance(bank, ClassBank):
    raise ValueError(f'`bank` must be a ClassBank, got {type(bank).__name__}; class_bank creates one from images')
  images, sizes, total = np.shape(bank.images), np.shape(bank.sizes), np.sum(bank.sizes)
  if len(images) != 4 or len(sizes) != 1 or images[0] != total:
    got = f'images of shape {images} and sizes of shape {sizes} with sum {total}'
    raise ValueError(f'a ClassBank must have images [M, H, W, D] and sizes [C] with sum M, got {got}; call class_bank')
  if bank.images.dtype != np.uint8:
    raise ValueError(f'the images of a ClassBank must be uint8 (0 to 255), got {bank.images.dtype}; convert them')


def check_episode(way: int, shot: int, query: int) -> None:
  """Raises ValueError unless way ≥ 2, shot ≥ 1 and query ≥ 1."""
  check_count('way', way, 2)
  check_count('shot', shot)
  check_count('query', query)


def split_labels(key: chex.PRNGKey, way: int, shot: int, query: int) -> tuple[tuple, tuple]:
  """Returns two pairs `(labels, nth)`, one for the support and one for the query; consumes key.

  The arrays have the shape `[N·K]` for the support, and `[N·query]` for the query. `nth` is the index of each item
  among the `shot + query` items of its class: 0 … K − 1 in the support, and K … K + query − 1 in the query. The items
  of the support are shuffled, and so are those of the query.
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
  """Returns a bank of 4·C classes: each class gives four classes, rotated by 0, 90, 180 and 270 degrees.

  Vinyals et al. 2016 and MAML do this for Omniglot. Class c, rotated r times by 90 degrees, becomes class r·C + c.

  Raises:
    ValueError: if the images are not square.

  Example:
    >>> ms.tasks.rotate_classes(ms.tasks.class_bank(np.zeros((20, 10, 28, 28, 1), np.uint8))).sizes.shape
    (80,)
  """
  check_bank(bank)
  images = bank.images
  if images.shape[1] != images.shape[2]:
    raise ValueError(f'only square images can be rotated by 90 degrees, got {images.shape[1:3]}; crop or pad them')
  return ClassBank(np.concatenate([np.rot90(images, r, axes=(1, 2)) for r in range(4)]), np.tile(bank.sizes, 4))


def all_classes(bank: ClassBank, *, batch: int) -> TaskDistribution:
  """Returns the distribution of supervised batches: the query is `batch` images of any classes.

  The labels are from 0 to C − 1. The distribution is meant for training on all classes jointly, as
  `learners.fine_tuning` does. The support is only there to give the shapes: it repeats the first item of the query.

  Args:
    bank: Bank of classes and images, as in `few_shot`.
    batch: Number of images in the query.

  Raises:
    ValueError: if `bank` is not a `ClassBank`, or if `batch` is below 1.

  Example:
    >>> bank = ms.tasks.class_bank(np.zeros((20, 10, 28, 28, 1), np.uint8))
    >>> tasks = ms.tasks.all_classes(bank, batch=32)
    >>> tasks.episode(tasks.sample(jax.random.key(0)), jax.random.key(1)).query.x.shape
    (32, 28, 28, 1)
  """
  return few_shot_from(class_indices(bank, batch=batch), jnp.asarray(bank.images))


def class_indices(bank: ClassBank, *, batch: int) -> TaskDistribution:
  """Returns the distribution of `all_classes` with indices of images in place of images.

  The indices are positions in the bank: int32 `[batch]` in the query, and `[1]` in the support, which repeats the first
  item of the query. The same errors are raised as by `all_classes`.

  Args:
    bank: Bank of classes and images, as in `all_classes`.
    batch: Number of images in the query.

  Example:
    >>> indices = ms.tasks.class_indices(ms.tasks.class_bank(np.zeros((20, 10, 28, 28, 1), np.uint8)), batch=32)
    >>> int(indices.episode(indices.sample(jax.random.key(0)), jax.random.key(1)).query.x.max()) < 200
    True
  """
  check_bank(bank)
  check_count('batch', batch)
  labels = np.repeat(np.arange(len(bank.sizes)), bank.sizes)
  episode = equal_partial(_any_images, batch=batch)
  return TaskDistribution(_no_task, Partial(episode, jnp.asarray(labels, jnp.int32)))


def _sample_classes(key, *, classes, way):
  return jax.random.choice(key, classes, (way,), replace=False).astype(jnp.int32)


def _episode_of_indices(firsts, sizes, task, key, *, most, shot, query) -> Episode:
  order_key, draw_key = jax.random.split(key)

  def draw(class_key, size):
    """Returns the indices of `shot + query` distinct images of one class.

    Each index receives a random number, and the indices with the greatest numbers are drawn. An index at which the
    class has no image receives −1, so that it is not drawn.
    """
    lots = jnp.where(jnp.arange(most) < size, jax.random.uniform(class_key, (most,)), -1.0)
    return jax.lax.top_k(lots, shot + query)[1]

  drawn = firsts[task][:, None] + jax.vmap(draw)(jax.random.split(draw_key, task.shape[0]), sizes[task])
  batches = []
  for labels, nth in split_labels(order_key, task.shape[0], shot, query):
    batches.append(Batch(drawn[labels, nth].astype(jnp.int32), labels.astype(jnp.int32)))
  return Episode(*batches)


def _look_up(indices, images, task, key) -> Episode:
  return Episode(*(Batch(images[x].astype(jnp.float32) / 255.0, y) for x, y in indices(task, key)))


def _no_task(key):
  del key
  return ()


def _any_images(labels, task, key, *, batch) -> Episode:
  del task
  rows = jax.random.randint(key, (batch,), 0, labels.shape[0])
  query = Batch(rows, labels[rows])
  return Episode(jax.tree.map(lambda a: a[:1], query), query)
