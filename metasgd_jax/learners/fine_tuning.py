"""A baseline without meta-learning: joint training on all classes, then gradient descent on the support."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from metasgd_jax.learners.episodic import Metrics, apply, check_all_adapt, inner_loop, of_parameters, support_statistics
from metasgd_jax.losses import cross_entropy
from metasgd_jax.types import Episode, Learner, Model, PyTree, check_count, equal_by_arguments


class JointParams(NamedTuple):
  """Parameters of the `fine_tuning` learner.

  After adaptation, the classifier is over the N classes of the task instead of the C training classes.

  Attributes:
    theta: Parameters of the embedding.
    weights: Weights `[D, C]` of the classifier over all C training classes.
    bias: Bias `[C]` of the classifier.
  """

  theta: PyTree
  weights: jax.Array
  bias: jax.Array


@equal_by_arguments
def fine_tuning(
  embedding: Model,
  *,
  classes: int,
  way: int,
  alpha: float = 0.1,
  steps: int = 20,
  inductive: bool = False,
  metrics: Metrics = None,
) -> Learner:
  """Builds the fine-tuning learner, a baseline without meta-learning.

  `loss` is the cross-entropy of the query over all C training classes. The labels of the query must be 0 to C − 1, as
  in the episodes of `tasks.all_classes`. The support is not used in training. `adapt` replaces the classifier by a
  classifier with N ways that starts at zero. It then takes `steps` gradient steps θ ← θ − alpha ∇L_support(θ), where θ
  includes the embedding and the new classifier.

  Args:
    embedding: Network that computes features, `[B, …]` → `[B, D]`.
    classes: Number C of training classes.
    way: Number N of ways (classes of a task to adapt to).
    alpha: Rate of the inner steps. For a fair comparison, tune this rate for the best accuracy of the baseline.
    steps: Number of inner steps.
    inductive: Whether each query item is normalised by the batch-norm statistics of the support; see `meta_sgd`.
    metrics: Metrics of the query in training, over the C classes; see `meta_sgd`.

  Raises:
    ValueError: if `way` or `classes` is not an integer of at least 2, if `steps` is not an integer of at least 0, if a
      metric is named 'loss', if only a part of the embedding adapts (`Model.adapts`), or if `inductive` is set and the
      embedding has no statistics.

  Example:
    >>> learner = ms.learners.fine_tuning(ms.nn.from_linen(ms.nn.MLP(outputs=8)), classes=20, way=3)
    >>> support = ms.Batch(jnp.arange(6.0).reshape(6, 1), jnp.array([0, 0, 1, 1, 2, 2]))  # 3 ways, 2 shots.
    >>> meta = jax.jit(learner.init)(jax.random.key(0), ms.Episode(support, support))
    >>> adapted = jax.jit(learner.adapt)(meta, support, jax.random.key(1))
    >>> jax.jit(learner.predict)(adapted, jnp.zeros((4, 1))).shape
    (4, 3)
  """
  check_count('way', way, 2)
  check_count('classes', classes, 2)
  check_all_adapt(embedding)

  def init(key, episode: Episode) -> JointParams:
    theta_key, weights_key = jax.random.split(key)
    theta = embedding.init(theta_key, episode.query.x)
    units = jax.eval_shape(embedding.apply, theta, episode.query.x).shape[-1]
    weights = jax.nn.initializers.glorot_uniform()(weights_key, (units, classes))
    return JointParams(theta, weights, jnp.zeros(classes))

  def classify(params: JointParams, x, statistics=None):
    return apply(embedding, params.theta, x, statistics) @ params.weights + params.bias[None]

  def statistics(params: JointParams, x):
    return support_statistics(embedding, params.theta, x, inductive)

  def start(meta: JointParams) -> tuple[JointParams, float]:
    return JointParams(meta.theta, jnp.zeros((meta.weights.shape[0], way)), jnp.zeros(way)), alpha

  def objective(meta: JointParams, episode: Episode):
    logits = classify(meta, episode.query.x)
    return cross_entropy(logits, episode.query.y), logits

  model = embedding._replace(apply=classify, statistics=embedding.statistics and statistics)
  options: dict[str, Any] = dict(start=start, objective=objective, inductive=inductive, metrics=metrics)
  return of_parameters(model, cross_entropy, init, inner_loop(embedding, steps), **options)
