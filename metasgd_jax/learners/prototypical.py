"""Prototypical Networks (Snell et al. 2017), which assign a query item to the class with the nearest mean embedding."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from metasgd_jax.learners.episodic import Metrics, apply, check_inductive, class_means, episodic, support_statistics
from metasgd_jax.losses import cross_entropy
from metasgd_jax.types import Batch, Episode, Learner, Model, PyTree, check_count, equal_by_arguments


class Prototypes(NamedTuple):
  """Adapted state, which contains the class means that a query item is compared with.

  Attributes:
    theta: Parameters of the embedding.
    statistics: Batch-norm statistics of the support, or `None` if the query is normalised by its own statistics.
    means: Mean `[N, D]` of the embedded support items of each class.
  """

  theta: PyTree
  statistics: PyTree
  means: jax.Array


@equal_by_arguments
def prototypical(embedding: Model, *, way: int, inductive: bool = False, metrics: Metrics = None) -> Learner:
  """Builds the learner: logits_n = −‖f(x) − c_n‖² (Snell et al. 2017, equations 1 and 2).

  The prototype c_n is the mean of the embedding f over the support items of class n. The loss is the cross-entropy of
  the query. `meta` is θ, the parameters of the embedding.

  Args:
    embedding: Network f that computes features, `[B, …]` → `[B, D]`.
    way: Number N of ways (classes of a task).
    inductive: Whether each query item is normalised by the batch-norm statistics of the support; see `nn.BatchNorm`.
    metrics: Metrics of the query; see `meta_sgd`.

  Raises:
    ValueError: if `way` is not an integer of at least 2, if a metric is named 'loss', or if `inductive` is set and the
      model has no statistics.

  Example:
    >>> learner = ms.learners.prototypical(ms.nn.from_linen(ms.nn.MLP(outputs=8)), way=3)
    >>> support = ms.Batch(jnp.arange(6.0).reshape(6, 1), jnp.array([0, 0, 1, 1, 2, 2]))  # 3 ways, 2 shots.
    >>> meta = jax.jit(learner.init)(jax.random.key(0), ms.Episode(support, support))
    >>> adapted = jax.jit(learner.adapt)(meta, support, jax.random.key(1))
    >>> jax.jit(learner.predict)(adapted, jnp.zeros((4, 1))).shape
    (4, 3)
  """
  check_count('way', way, 2)
  check_inductive(embedding, inductive)

  def init(key, episode: Episode) -> PyTree:
    return embedding.init(key, episode.support.x)

  def adapt(theta, support: Batch) -> Prototypes:
    statistics = support_statistics(embedding, theta, support.x, inductive)
    means = class_means(embedding.apply(theta, support.x), support.y, way)
    return Prototypes(theta, statistics, means)

  def predict(adapted: Prototypes, x: Any):
    features = apply(embedding, adapted.theta, x, adapted.statistics)
    return -jnp.sum(jnp.square(features[:, None] - adapted.means[None]), -1)

  return episodic(init, adapt, predict, loss_fn=cross_entropy, metrics=metrics)
