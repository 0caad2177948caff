"""Meta-SGD: θ and α, both learned (Li et al. 2017), and the same with α held still."""

from collections.abc import Callable, Mapping
from typing import Any

import chex
import jax

from metasgd_jax.adaptation import adapt, adapt_path, init_alpha
from metasgd_jax.types import Batch, Episode, Learner, MetaParams, Model, PyTree

Metric = Callable[[Any, Any], chex.Array]


def meta_sgd(
  model: Model,
  loss_fn: Metric,
  *,
  steps: int = 1,
  first_order: bool = False,
  alpha_range: tuple[float, float] = (0.005, 0.1),
  held_alpha: PyTree = None,
  metrics: Mapping[str, Metric] | None = None,
) -> Learner:
  """Builds the Meta-SGD learner.

  adapt: θ′ = θ − α ∘ ∇L_support(θ), `steps` times; loss: L_query(θ′) (Li et al. 2017, Algorithm 1). `meta` is a
  `MetaParams(theta, alpha)`.

  Args:
    model: the network.
    loss_fn: `(outputs [B, …], targets [B, …]) → scalar`, the same for support and query.
    steps: inner steps; the paper's 1.
    first_order: drop the second derivatives.
    alpha_range: α starts as one number drawn from U[low, high] (the paper's range).
    held_alpha: if given, α is this pytree (θ's structure or a prefix of it) and is not learned; `meta.alpha` is
      then `None`, so that no optimiser can move it.
    metrics: `{name: (outputs, targets) → scalar}`, measured on the query after adaptation and returned as info.

  Raises:
    ValueError: an empty alpha_range, or steps below 0.
  """
  if steps < 0:
    raise ValueError(f'steps must be at least 0, got {steps}')
  low, high = alpha_range
  if not low <= high:
    raise ValueError(f'alpha_range must be (low, high) with low <= high, got {alpha_range}')
  metrics = dict(metrics or {})

  def support_loss(theta, batch: Batch):
    return loss_fn(model.apply(theta, batch.x), batch.y)

  def alpha_of(meta: MetaParams) -> PyTree:
    return meta.alpha if held_alpha is None else held_alpha

  def init(key, episode: Episode) -> MetaParams:
    theta_key, alpha_key = jax.random.split(key)
    theta = model.init(theta_key, episode.support.x)
    alpha = init_alpha(alpha_key, theta, low=low, high=high) if held_alpha is None else None
    return MetaParams(theta, alpha)

  inner: dict[str, Any] = dict(loss_fn=support_loss, steps=steps, first_order=first_order)

  def adapt_(meta: MetaParams, support: Batch, key=None) -> PyTree:
    del key
    return adapt(meta.theta, alpha_of(meta), support, **inner)

  def path(meta: MetaParams, support: Batch, key=None) -> PyTree:
    del key
    return adapt_path(meta.theta, alpha_of(meta), support, **inner)

  def loss(meta: MetaParams, episode: Episode, key=None):
    outputs = model.apply(adapt_(meta, episode.support, key), episode.query.x)
    info = {name: metric(outputs, episode.query.y) for name, metric in metrics.items()}
    return loss_fn(outputs, episode.query.y), info

  return Learner(init, adapt_, path, model.apply, loss)
