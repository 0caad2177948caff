"""Few-shot tasks from a bank that is too large for the device: the images stay in host memory."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from metasgd_jax.outer.sharding import host_device
from metasgd_jax.tasks.few_shot import ClassBank
from metasgd_jax.types import Batch, Episode, TaskDistribution, TaskStream


def stream(bank: ClassBank, indices: TaskDistribution) -> TaskStream:
  """Returns the tasks of a bank as a stream of chunks of episodes.

  For each chunk, the stream sends to the device only the images that the episodes of the chunk contain.

  The same keys give the same episodes as with `few_shot` or `all_classes`, bit for bit. From the keys that the device
  will use, the host computes which images a chunk needs. An image that was not sent would be NaN in the episode.

  On the device, a chunk of E episodes takes at most the memory of all images in these E episodes. While the next chunk
  is being sent, both chunks take this memory.

  Args:
    bank: Bank in host memory. A memory map is allowed.
    indices: Distribution of episodes with indices of images, from `image_indices` or `class_indices` for this bank.

  Raises (from the stream):
    ValueError: if data are sent inside of `jax.jit`.

  Example:
    >>> bank = ms.tasks.class_bank(np.zeros((20, 10, 28, 28, 1), np.uint8))
    >>> tasks = ms.tasks.stream(bank, ms.tasks.image_indices(bank, way=5, shot=1, query=3))
    >>> type(tasks).__name__  # `train` and `evaluate` accept it.
    'TaskStream'
  """
  indices = jax.device_get(indices)
  total = bank.images.shape[0]

  def send(sample_keys, episode_keys) -> TaskDistribution:
    if isinstance(sample_keys, jax.core.Tracer) or isinstance(episode_keys, jax.core.Tracer):
      raise ValueError(
        'a TaskStream cannot send images from the host inside jax.jit, where the values of the keys are not known; '
        'call tasks.prepare or tasks.send outside of jax.jit, and give the jitted function the result as an argument'
      )
    found = np.asarray(_rows(indices, *jax.device_put((sample_keys, episode_keys), host_device())))
    rows = np.unique(found)
    images = np.zeros((min(total, found.size), *bank.images.shape[1:]), np.uint8)  # All chunks have this shape.
    images[: len(rows)] = bank.images[rows]
    places = np.full(total, -1, np.int32)
    places[rows] = np.arange(len(rows))
    episode = Partial(_look_up_sent, indices.episode, jnp.asarray(places), jnp.asarray(images))
    return TaskDistribution(indices.sample, episode)

  return TaskStream(send)


@jax.jit
def _rows(indices, sample_keys, episode_keys):
  episodes = jax.vmap(lambda s, e: indices.episode(indices.sample(s), e))(sample_keys, episode_keys)
  return jnp.concatenate([part.x for part in episodes], 1)


def _look_up_sent(indices, places, images, task, key) -> Episode:
  def look_up(rows):
    at = places[rows]
    found = images[at].astype(jnp.float32) / 255.0
    return jnp.where((at >= 0).reshape(-1, 1, 1, 1), found, jnp.nan)

  return Episode(*(Batch(look_up(part.x), part.y) for part in indices(task, key)))
