"""Meta-SGD: θ and α, both learned (Li et al. 2017)."""

from collections.abc import Callable, Mapping
from typing import Any, get_args

import chex
import jax

from metasgd_jax.adaptation import (
  Backward,
  Per,
  adapt,
  adapt_path,
  check_alpha_range,
  check_backward,
  check_steps,
  init_alpha,
)
from metasgd_jax.types import Batch, Episode, Learner, MetaParams, Model, PyTree

Metric = Callable[[Any, Any], chex.Array]


def meta_sgd(
  model: Model,
  loss_fn: Metric,
  *,
  steps: int = 1,
  first_order: bool = False,
  backward: Backward = 'reverse',
  alpha_range: tuple[float, float] = (0.005, 0.1),
  alpha_per: Per = 'entry',
  metrics: Mapping[str, Metric] | None = None,
) -> Learner:
  """Builds the Meta-SGD learner.

  adapt: θ′ = θ − α ∘ ∇L_support(θ), `steps` times; loss: L_query(θ′) (Li et al. 2017, Algorithm 1). `meta` is a
  `MetaParams(theta, alpha)`.

  Nothing bounds α. With several steps and a large α training can diverge; `optax.clip_by_global_norm` before the outer
  optimiser, or a smaller alpha_range, are the usual remedies.

  Args:
    model: the network.
    loss_fn: `(outputs [B, …], targets [B, …]) → scalar`, the same for support and query.
    steps: inner steps; the paper's 1.
    first_order: drop the second derivatives.
    backward: how the outer gradient goes through the inner steps; see `adaptation.Backward`.
    alpha_range: α starts as one number drawn from U[low, high] (the paper's range, for regression).
    alpha_per: what has a rate of its own: each 'entry' of θ, as in the paper; each 'leaf'; or 'all' of θ has one.
    metrics: `{name: (outputs, targets) → scalar}`, measured on the query after adaptation and returned as info.

  Raises:
    ValueError: an empty alpha_range, an unknown alpha_per, steps that are no count, an unknown backward, or a metric
      named 'loss'.
  """
  low, high = alpha_range
  check_alpha_range(low, high)
  if alpha_per not in get_args(Per):
    raise ValueError(f'alpha_per must be one of {get_args(Per)}, got {alpha_per!r}')

  def init(key, episode: Episode) -> MetaParams:
    theta_key, alpha_key = jax.random.split(key)
    theta = model.init(theta_key, episode.support.x)
    return MetaParams(theta, init_alpha(alpha_key, theta, low=low, high=high, per=alpha_per))

  return gradient_learner(
    model,
    loss_fn,
    init,
    lambda meta: meta.alpha,
    steps=steps,
    first_order=first_order,
    backward=backward,
    metrics=metrics,
  )


def gradient_learner(
  model: Model,
  loss_fn: Metric,
  init: Callable[[chex.PRNGKey, Episode], MetaParams],
  alpha_of: Callable[[MetaParams], PyTree],
  *,
  steps: int,
  first_order: bool,
  backward: Backward,
  metrics: Mapping[str, Metric] | None,
) -> Learner:
  """Builds a learner that adapts by `adapt`; `meta_sgd` and `maml` differ in where α comes from.

  Args:
    model: the network.
    loss_fn: as in `meta_sgd`.
    init: `(key, episode) → MetaParams`; consumes key.
    alpha_of: `meta → α`.
    steps: inner steps.
    first_order: drop the second derivatives.
    backward: as in `meta_sgd`.
    metrics: as in `meta_sgd`.

  Raises:
    ValueError: steps that are no count, an unknown backward, or a metric named 'loss'.
  """
  check_steps(steps)
  check_backward(backward)
  metrics = dict(metrics or {})
  if 'loss' in metrics:
    raise ValueError("a metric cannot be named 'loss', which is loss_fn's own name in info; give it another")
  inner: dict[str, Any] = dict(steps=steps, first_order=first_order)

  def support_loss(theta, batch: Batch):
    return loss_fn(model.apply(theta, batch.x), batch.y)

  def adapt_(meta: MetaParams, support: Batch, key=None) -> PyTree:
    del key  # Nothing here is random.
    return adapt(meta.theta, alpha_of(meta), support, loss_fn=support_loss, backward=backward, **inner)

  def path(meta: MetaParams, support: Batch, key=None) -> PyTree:
    del key
    return adapt_path(meta.theta, alpha_of(meta), support, loss_fn=support_loss, **inner)

  def loss(meta: MetaParams, episode: Episode, key=None):
    outputs = model.apply(adapt_(meta, episode.support, key), episode.query.x)
    info = {name: metric(outputs, episode.query.y) for name, metric in metrics.items()}
    return loss_fn(outputs, episode.query.y), info

  return Learner(init, adapt_, path, model.apply, loss)
