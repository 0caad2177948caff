"""Few-shot tasks from a bank that is too large for the device: the images stay on the host."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from metasgd_jax.tasks.few_shot import ClassBank, image_indices
from metasgd_jax.types import Batch, Episode, TaskDistribution, TaskStream


def stream(bank: ClassBank, *, way: int, shot: int, query: int) -> TaskStream:
  """Builds `few_shot`'s distribution as a stream: of each chunk only the images that its tasks show are sent.

  The same keys give the same episodes, to the bit. Which images a chunk needs is found on the host, from the keys that
  the device will use. An image that was not sent would be NaN.

  A chunk takes chunk · T · N · (K + query) images of device memory at the most, twice that while the next one comes.

  Args:
    bank: on the host; a memory map will do.
    way: N.
    shot: K, support images of a class.
    query: query images of a class.

  Raises:
    ValueError: as `few_shot`.
  """
  cpu = jax.devices('cpu')[0]
  with jax.default_device(cpu):
    indices = image_indices(bank, way=way, shot=shot, query=query).as_arguments()
  total = bank.images.shape[0]

  def send(sample_keys, episode_keys) -> TaskDistribution:
    rows = np.unique(_rows(indices, *jax.device_put((sample_keys, episode_keys), cpu)))
    most = min(total, sample_keys.shape[0] * way * (shot + query))  # One shape for all chunks.
    images = np.zeros((most, *bank.images.shape[1:]), np.uint8)
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
