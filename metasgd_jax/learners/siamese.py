"""Siamese networks (Koch et al. 2015): is this pair of one class? The most similar support item gives the label."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from metasgd_jax.learners.episodic import (
  Metric,
  apply,
  check_inductive,
  check_metrics,
  check_way,
  episodic,
  measure,
  support_statistics,
)
from metasgd_jax.learners.matching import by_class
from metasgd_jax.losses import cross_entropy
from metasgd_jax.types import Batch, Episode, Learner, Model, PyTree


class SiameseParams(NamedTuple):
  """What a Siamese network learns: the twins' θ, and the weights `[D]` and bias `[]` of the unit that compares them."""

  theta: PyTree
  weights: chex.Array
  bias: chex.Array


class Twins(NamedTuple):
  """An embedded support: the parameters, batch norm's statistics or `None`, features `[S, D]` and labels `[S]`."""

  params: SiameseParams
  statistics: PyTree
  features: chex.Array
  labels: chex.Array


def siamese(
  embedding: Model, *, way: int, inductive: bool = False, metrics: Mapping[str, Metric] | None = None
) -> Learner:
  """Builds the learner: `p(same | x, x′) = σ(Σ_j w_j |f(x)_j − f(x′)_j| + b)` (Koch et al. 2015, section 3.1).

  Trained on pairs: the binary cross-entropy of every query item with every support item of the episode, those of one
  class and those of two weighing the same together. That is the mean of Koch's batches, which are half and half.
  A query item's logit for a class is that of the class's most similar support item. `meta` is a `SiameseParams`.

  Args:
    embedding: the twins, `[B, …]` → `[B, D]`: Conv4's features, as in the comparison's table, or `nn.KochNet`.
    way: N.
    inductive: normalise each query item by the support's statistics; see `nn.BatchNorm`.
    metrics: as in `meta_sgd`.

  Raises:
    ValueError: a way below 2, a metric named 'loss', or inductive with a model that has no statistics.

  Example:
    >>> learner = ms.learners.siamese(ms.nn.from_linen(ms.nn.MLP(outputs=8)), way=3)
    >>> support = ms.Batch(jnp.arange(6.0).reshape(6, 1), jnp.array([0, 0, 1, 1, 2, 2]))  # 3 ways, 2 shots.
    >>> meta = jax.jit(learner.init)(jax.random.key(0), ms.Episode(support, support))
    >>> adapted = jax.jit(learner.adapt)(meta, support, jax.random.key(1))
    >>> jax.jit(learner.predict)(adapted, jnp.zeros((4, 1))).shape
    (4, 3)
  """
  check_way(way)
  check_inductive(embedding, inductive)
  metrics = check_metrics(metrics)

  def init(key, episode: Episode) -> SiameseParams:
    theta = embedding.init(key, episode.support.x)
    units = jax.eval_shape(embedding.apply, theta, episode.support.x).shape[-1]
    # The further apart, the less alike; that this is where it starts is ours.
    return SiameseParams(theta, jnp.full(units, -(units**-0.5)), jnp.zeros(()))

  def adapt(meta: SiameseParams, support: Batch) -> Twins:
    statistics = support_statistics(embedding, meta.theta, support.x, inductive)
    return Twins(meta, statistics, embedding.apply(meta.theta, support.x), support.y)

  def similarities(adapted: Twins, x: Any):
    theta, weights, bias = adapted.params
    features = apply(embedding, theta, x, adapted.statistics)
    return jnp.abs(features[:, None] - adapted.features[None]) @ weights + bias  # [Q, S]

  def nearest(similar, labels):
    return by_class(similar, labels, way, jnp.max)

  def predict(adapted: Twins, x: Any):
    return nearest(similarities(adapted, x), adapted.labels)

  def loss(meta: SiameseParams, episode: Episode, key=None):
    del key
    adapted = adapt(meta, episode.support)
    similar = similarities(adapted, episode.query.x)
    outputs = nearest(similar, adapted.labels)
    info = measure(metrics, outputs, episode.query.y)
    return pair_loss(similar, episode.query.y[:, None] == adapted.labels[None]), info

  return episodic(init, adapt, predict, loss_fn=cross_entropy, metrics=metrics)._replace(loss=loss)


def pair_loss(logits: chex.Array, same: chex.Array) -> chex.Array:
  """Returns ½ (the mean over pairs of one class + the mean over pairs of two) of the binary cross-entropy, in nats.

  Args:
    logits: `[Q, S]`, of being the same.
    same: `[Q, S]` bool.
  """
  losses = optax.losses.sigmoid_binary_cross_entropy(logits, same.astype(logits.dtype))
  mean = lambda chosen: jnp.sum(jnp.where(chosen, losses, 0)) / jnp.maximum(jnp.sum(chosen), 1)
  return (mean(same) + mean(~same)) / 2
