"""A baseline without meta-learning: joint training on all classes, then gradient descent on the support."""

from collections.abc import Mapping
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from metasgd_jax.inner.adaptation import adapt, adapt_path
from metasgd_jax.inner.loop import check_steps
from metasgd_jax.learners.episodic import Metric, apply, check_adapts_all, check_way, measure, of_parameters
from metasgd_jax.losses import cross_entropy
from metasgd_jax.types import Batch, Episode, Learner, Model, PyTree


class JointParams(NamedTuple):
  """Parameters of the `fine_tuning` learner. In an adapted state the classifier has N ways instead of C classes.

  Attributes:
    theta: Parameters of the embedding.
    weights: Weights `[D, C]` of the classifier over all C training classes.
    bias: Bias `[C]` of the classifier.
  """

  theta: PyTree
  weights: chex.Array
  bias: chex.Array


def fine_tuning(
  embedding: Model,
  *,
  classes: int,
  way: int,
  alpha: float = 0.1,
  steps: int = 20,
  inductive: bool = False,
  metrics: Mapping[str, Metric] | None = None,
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
    alpha: Rate of the inner steps. For a fair comparison, tune this rate, so that the baseline is at its best.
    steps: Number of inner steps.
    inductive: Whether each query item is normalised by the batch-norm statistics of the support; see `meta_sgd`.
    metrics: Metrics of the query in training, over the C classes; see `meta_sgd`.

  Raises:
    ValueError: if `way` is not an integer of at least 2, if `classes` is below 2, if `steps` is not a count, if a
      metric is named 'loss', if only a part of the embedding adapts, or if `inductive` is set and the embedding has no
      statistics.

  Example:
    >>> learner = ms.learners.fine_tuning(ms.nn.from_linen(ms.nn.MLP(outputs=8)), classes=20, way=3)
    >>> support = ms.Batch(jnp.arange(6.0).reshape(6, 1), jnp.array([0, 0, 1, 1, 2, 2]))  # 3 ways, 2 shots.
    >>> meta = jax.jit(learner.init)(jax.random.key(0), ms.Episode(support, support))
    >>> adapted = jax.jit(learner.adapt)(meta, support, jax.random.key(1))
    >>> jax.jit(learner.predict)(adapted, jnp.zeros((4, 1))).shape
    (4, 3)
  """
  check_way(way)
  check_steps(steps)
  check_adapts_all(embedding)
  if classes < 2:
    raise ValueError(f'classes must be at least 2, got {classes}')

  def init(key, episode: Episode) -> JointParams:
    theta_key, weights_key = jax.random.split(key)
    theta = embedding.init(theta_key, episode.query.x)
    units = jax.eval_shape(embedding.apply, theta, episode.query.x).shape[-1]
    weights = jax.nn.initializers.glorot_uniform()(weights_key, (units, classes))
    return JointParams(theta, weights, jnp.zeros(classes))

  def classify(params: JointParams, x, statistics=None):
    return apply(embedding, params.theta, x, statistics) @ params.weights + params.bias[None]

  def start(meta: JointParams) -> JointParams:
    return JointParams(meta.theta, jnp.zeros((meta.weights.shape[0], way)), jnp.zeros(way))

  def support_loss(params, support: Batch):
    return cross_entropy(classify(params, support.x), support.y)

  def adapt_(meta, support):
    return adapt(start(meta), alpha, support, loss_fn=support_loss, steps=steps)

  def path(meta, support):
    return adapt_path(start(meta), alpha, support, loss_fn=support_loss, steps=steps)

  statistics = embedding.statistics
  model = Model(
    init=lambda key, x: None,
    apply=classify,
    statistics=None if statistics is None else lambda params, x: statistics(params.theta, x),
  )
  metrics = dict(metrics or {})
  learner = of_parameters(model, cross_entropy, init, adapt_, path, inductive=inductive, metrics=metrics)

  def loss(meta: JointParams, episode: Episode, key=None):
    del key
    logits = classify(meta, episode.query.x)
    return cross_entropy(logits, episode.query.y), measure(metrics, logits, episode.query.y)

  return learner._replace(loss=loss)
