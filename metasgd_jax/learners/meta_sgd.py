"""Meta-SGD: θ and α, both learned (Li et al. 2017)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

import chex
import jax
import jax.numpy as jnp
import numpy as np

from metasgd_jax.inner.adaptation import Adjoint, adapt, adapt_path, check_adjoint
from metasgd_jax.inner.alpha import Per, check_alpha_range, init_alpha
from metasgd_jax.inner.loop import check_steps
from metasgd_jax.learners.episodic import Metric, measure, of_parameters
from metasgd_jax.types import Batch, Episode, Learner, MetaParams, Model, PyTree


def meta_sgd(
  model: Model,
  loss_fn: Metric,
  *,
  steps: int = 1,
  first_order: bool = False,
  adjoint: Adjoint = 'reverse',
  inductive: bool = False,
  alpha_range: tuple[float, float] = (0.005, 0.1),
  alpha_per: Per = 'entry',
  alpha_by_step: bool = False,
  step_weights: Sequence[float] | None = None,
  metrics: Mapping[str, Metric] | None = None,
) -> Learner:
  """Builds the Meta-SGD learner.

  adapt: θ′ = θ − α ∘ ∇L_support(θ), `steps` times; loss: L_query(θ′) (Li et al. 2017, Algorithm 1). `meta` is a
  `MetaParams(theta, alpha)`.

  Nothing bounds α. With several steps and a large α training can diverge; `optax.clip_by_global_norm` before the outer
  optimiser, or a smaller alpha_range, are the usual remedies.

  Args:
    model: the network; where it says what `adapts`, α has rates for that part of θ alone.
    loss_fn: `(outputs [B, …], targets [B, …]) → scalar`, the same for support and query.
    steps: inner steps; the paper's 1.
    first_order: drop the second derivatives.
    adjoint: how the outer gradient goes through the inner steps; see `Adjoint`. 'revolve' is for hundreds of steps.
    inductive: normalise each query item by the support's statistics, so that no answer depends on the other items, as
      the paper's does; see `nn.BatchNorm`.
    alpha_range: α starts as one number drawn from U[low, high] (the paper's range, for regression).
    alpha_per: what has a rate of its own: each 'entry' of θ, as in the paper; each 'leaf'; each 'layer'; or 'all' of θ.
    alpha_by_step: every inner step has rates of its own (MAML++, Antoniou et al. 2019).
    step_weights: w_1 … w_k; the loss is then Σ_t w_t L_query(θ_t) in place of L_query(θ_k): MAML++'s multi-step loss,
      but for its weights' annealing. Intermediates are kept as with adjoint='reverse'.
    metrics: `{name: (outputs, targets) → scalar}`, measured on the query after adaptation and returned as info.

  Raises:
    ValueError: an empty alpha_range, an unknown alpha_per, steps that are no count, an unknown adjoint, weights that
      are not one a step, a metric named 'loss', or inductive with a model that has no statistics.

  Example:
    >>> tasks = ms.tasks.sinusoid(shot=5)
    >>> learner = ms.meta_sgd(ms.nn.from_linen(ms.nn.MLP()), ms.losses.mean_squared_error, steps=2)
    >>> episode = tasks.episode(tasks.sample(jax.random.key(0)), jax.random.key(1))
    >>> meta = learner.init(jax.random.key(2), episode)
    >>> meta.alpha['Dense_0']['kernel'].shape == meta.theta['Dense_0']['kernel'].shape
    True
    >>> theta = learner.adapt(meta, episode.support, jax.random.key(3))
    >>> learner.predict(theta, episode.query.x).shape
    (10, 1)
  """
  low, high = alpha_range
  check_alpha_range(low, high)
  if alpha_per not in get_args(Per):
    raise ValueError(f'alpha_per must be one of {get_args(Per)}, got {alpha_per!r}')

  def init(key, episode: Episode) -> MetaParams:
    theta_key, alpha_key = jax.random.split(key)
    theta = model.init(theta_key, episode.support.x)
    start: dict[str, Any] = dict(low=low, high=high, per=alpha_per, steps=steps if alpha_by_step else None)
    return MetaParams(theta, init_alpha(alpha_key, theta, adapts=model.adapts, **start))

  return gradient_learner(
    model,
    loss_fn,
    init,
    lambda meta: meta.alpha,
    steps=steps,
    first_order=first_order,
    adjoint=adjoint,
    inductive=inductive,
    alpha_by_step=alpha_by_step,
    step_weights=step_weights,
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
  adjoint: Adjoint,
  inductive: bool,
  alpha_by_step: bool = False,
  step_weights: Sequence[float] | None = None,
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
    adjoint: as in `meta_sgd`.
    inductive: as in `meta_sgd`.
    alpha_by_step: as in `meta_sgd`.
    step_weights: as in `meta_sgd`.
    metrics: as in `meta_sgd`.

  Raises:
    ValueError: steps that are no count, an unknown adjoint, weights that are not one a step, and as `of_parameters`.
  """
  check_steps(steps)
  check_adjoint(adjoint)
  if step_weights is not None and not (
    np.shape(step_weights) == (steps,) and steps and np.all(np.isfinite(step_weights))
  ):
    raise ValueError(f'step_weights must be {steps} finite numbers, one a step, got {step_weights!r}')
  inner: dict[str, Any] = dict(steps=steps, first_order=first_order, alpha_by_step=alpha_by_step, adapts=model.adapts)

  def support_loss(theta, batch: Batch):
    return loss_fn(model.apply(theta, batch.x), batch.y)

  def adapt_(meta: MetaParams, support: Batch) -> PyTree:
    return adapt(meta.theta, alpha_of(meta), support, loss_fn=support_loss, adjoint=adjoint, **inner)

  def path(meta: MetaParams, support: Batch) -> PyTree:
    return adapt_path(meta.theta, alpha_of(meta), support, loss_fn=support_loss, **inner)

  metrics = dict(metrics or {})
  learner = of_parameters(model, loss_fn, init, adapt_, path, inductive=inductive, metrics=metrics)
  if step_weights is None:
    return learner

  def loss(meta: MetaParams, episode: Episode, key=None):
    later = jax.tree.map(lambda a: a[1:], learner.path(meta, episode.support, key))
    outputs = jax.lax.map(lambda adapted: learner.predict(adapted, episode.query.x), later)
    losses = jax.vmap(loss_fn, (0, None))(outputs, episode.query.y)
    info = measure(metrics, outputs[-1], episode.query.y)
    return jnp.dot(jnp.asarray(step_weights, losses.dtype), losses), info

  return learner._replace(loss=loss)
