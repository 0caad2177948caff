"""The floor: plain gradient descent on the support, from a start that was trained on all classes jointly."""

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
  """What is trained.

  Attributes:
    theta: of the embedding.
    weights: `[D, C]`, of the classifier over all C training classes.
    bias: `[C]`.
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
  """Builds the learner that has no meta-learning in it.

  loss: the cross-entropy over all C classes of the query, whose labels are 0 to C − 1, as `tasks.all_classes` gives it;
  the support is not looked at. adapt: the classifier is replaced by one of N ways that starts at zero, and everything
  takes `steps` of θ ← θ − alpha ∇L_support(θ).

  Args:
    embedding: `[B, …]` → `[B, D]`.
    classes: C, to train on.
    way: N, of the tasks to adapt to.
    alpha: the rate; which the floor of a comparison should be given the best of.
    steps: inner steps.
    inductive: as in `meta_sgd`.
    metrics: as in `meta_sgd`; in training over the C classes.

  Raises:
    ValueError: a way or classes below 2, steps that are no count, a metric named 'loss', an embedding of which
      a part adapts, or inductive with one that has no statistics.

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
