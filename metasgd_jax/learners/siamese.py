"""Siamese networks (Koch et al. 2015), which give a query item the label of the most similar support item."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from metasgd_jax.learners.episodic import EmbeddedSupport, Metrics, apply, check_inductive, embed_support, episodic
from metasgd_jax.learners.matching import by_class
from metasgd_jax.losses import are_classes, cross_entropy
from metasgd_jax.types import Batch, Episode, Learner, Model, PyTree, check_count, equal_by_arguments


class SiameseParams(NamedTuple):
  """Meta-parameters of a Siamese network.

  Attributes:
    theta: Parameters of the embedding, which both twins share.
    weights: Weights `[D]` of the unit that compares the two embeddings of a pair.
    bias: Bias `[]` of this unit.
  """

  theta: PyTree
  weights: jax.Array
  bias: jax.Array


@equal_by_arguments
def siamese(embedding: Model, *, way: int, inductive: bool = False, metrics: Metrics = None) -> Learner:
  """Builds the learner: `p(same | x, x′) = σ(Σ_j w_j |f(x)_j − f(x′)_j| + b)` (Koch et al. 2015, section 3.1).

  The loss is the binary cross-entropy over all pairs of a query item and a support item of the episode. The pairs of
  items from the same class and the pairs of items from different classes have equal total weight. The loss is thus the
  expected loss of the batches of Koch et al., in which half of the pairs are from the same class. The logit of a query
  item for a class is the largest logit of its pairs with the support items of this class. `meta` is a `SiameseParams`.

  Args:
    embedding: Network f of both twins, `[B, …]` → `[B, D]`, such as `nn.KochNet` or the features of `nn.Conv4`. The
      comparison of learners in docs/results.md uses the features of `nn.Conv4`.
    way: Number N of ways (classes of a task).
    inductive: Whether each query item is normalised by the batch-norm statistics of the support; see `nn.BatchNorm`.
    metrics: Metrics of the query; see `meta_sgd`.

  Raises:
    ValueError: if `way` is not an integer of at least 2, if a metric is named 'loss', or if `inductive` is set and the
      model has no statistics.

  Example:
    >>> learner = ms.learners.siamese(ms.nn.from_linen(ms.nn.MLP(outputs=8)), way=3)
    >>> support = ms.Batch(jnp.arange(6.0).reshape(6, 1), jnp.array([0, 0, 1, 1, 2, 2]))  # 3 ways, 2 shots.
    >>> meta = jax.jit(learner.init)(jax.random.key(0), ms.Episode(support, support))
    >>> adapted = jax.jit(learner.adapt)(meta, support, jax.random.key(1))
    >>> jax.jit(learner.predict)(adapted, jnp.zeros((4, 1))).shape
    (4, 3)
  """
  check_count('way', way, 2)
  check_inductive(embedding, inductive)

  def init(key, episode: Episode) -> SiameseParams:
    theta = embedding.init(key, episode.support.x)
    units = jax.eval_shape(embedding.apply, theta, episode.support.x).shape[-1]
    # The weights start negative, so that distant pairs are dissimilar. The paper initialises them in another way.
    return SiameseParams(theta, jnp.full(units, -(units**-0.5)), jnp.zeros(()))

  def adapt(meta: SiameseParams, support: Batch) -> EmbeddedSupport:
    return embed_support(embedding, meta, support, way, inductive)

  def similarities(adapted: EmbeddedSupport, x: Any):
    theta, weights, bias = adapted.meta
    features = apply(embedding, theta, x, adapted.statistics)
    return jnp.abs(features[:, None] - adapted.features[None]) @ weights + bias  # [Q, S]

  def predict(adapted: EmbeddedSupport, x: Any):
    return by_class(similarities(adapted, x), adapted.labels, way, jnp.max)

  def objective(meta: SiameseParams, episode: Episode):
    adapted = adapt(meta, episode.support)
    similar = similarities(adapted, episode.query.x)
    same = episode.query.y[:, None] == adapted.labels[None]
    valid = jnp.all(are_classes(jnp.concatenate([episode.query.y, adapted.labels]), way))
    loss = pair_loss(similar, same)
    loss *= jnp.where(valid, 1, jnp.nan).astype(loss.dtype)  # A product makes the gradient NaN too.
    return loss, by_class(similar, adapted.labels, way, jnp.max)

  return episodic(init, adapt, predict, loss_fn=cross_entropy, metrics=metrics, objective=objective)


def pair_loss(logits: jax.Array, same: jax.Array) -> jax.Array:
  """Returns the binary cross-entropy in nats, with equal total weight for same-class pairs and for all other pairs.

  It is the average of two means: the mean over the same-class pairs, and the mean over the other pairs.

  Args:
    logits: Logits `[Q, S]`. The sigmoid of a logit is the probability that the two items are from the same class.
    same: Whether the two items of a pair are from the same class, bool `[Q, S]`.
  """
  losses = optax.losses.sigmoid_binary_cross_entropy(logits, same.astype(logits.dtype))

  def mean(chosen):
    total = jnp.sum(jnp.where(chosen, losses, jnp.zeros_like(losses)))
    return total / jnp.maximum(jnp.sum(chosen), 1).astype(losses.dtype)

  return (mean(same) + mean(~same)) / 2
