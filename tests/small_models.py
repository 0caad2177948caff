"""Small models and easy pictures that tests of the classifier and of the command share."""

import jax
import numpy as np

import metasgd_jax as ms
from metasgd_jax.deploy import model_file

WAY = 5


def small_model(learner='meta_sgd', seed=0, training=None, **config):
  """A model that no one trained."""
  config = dict(way=WAY, image_shape=(28, 28, 1), filters=4, hidden=8) | config
  if learner == 'maml':
    config = dict(alpha=0.4) | config
  if learner == 'prototypical':
    config |= dict(hidden=0, inner_steps=0)
  config = ms.ModelConfig(learner, training=training or {}, **config)
  x = np.zeros((config.way, *config.image_shape), np.float32)
  batch = ms.Batch(x, np.arange(config.way, dtype=np.int32))
  init = jax.jit(model_file.build_learner(config, native=True).init)
  return ms.FewShotModel(config, jax.device_get(init(jax.random.key(seed), ms.Episode(batch, batch))))


def able_model(**config):
  """A model that tells `pictures` apart though it is not trained: for these many steps of descent are enough."""
  return small_model('maml', **(dict(alpha=0.2, inner_steps=20, filters=8, hidden=0) | config))


def pictures(labels, size=28, seed=0):
  """A noisy drawing `[size, size]` uint8 for each label 0 to 4, light on black: lines three ways, a blot, a frame."""
  rng = np.random.default_rng(seed)
  rows, columns = np.indices((size, size))
  edge = np.minimum(np.minimum(rows, columns), size - 1 - np.maximum(rows, columns))
  period = size // 4
  shapes = np.stack(
    [
      rows % period < 2,
      columns % period < 2,
      (rows + columns) % period < 2,
      np.hypot(rows - size / 2, columns - size / 2) < size / 4,
      (edge > 3) & (edge < 7),
    ]
  )
  drawn = shapes[np.asarray(labels)] & (edge > 2)
  return np.where(drawn, rng.integers(160, 256, drawn.shape), rng.integers(0, 40, drawn.shape)).astype(np.uint8)
