"""Any optax optimiser in the inner loop, its numbers meta-learned."""

from collections.abc import Callable, Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp

from metasgd_jax.adaptation import check_steps
from metasgd_jax.inner_optax import InnerOptimizer, adapt_with, adapt_with_path, moving_part
from metasgd_jax.learners.episodic import Metric, of_parameters
from metasgd_jax.leaves import named
from metasgd_jax.types import Batch, Episode, Learner, MetaParams, Model, PyTree


def inner_optimizer(
  model: Model,
  loss_fn: Metric,
  *,
  optimizer: InnerOptimizer,
  hyper: PyTree | Callable[[chex.PRNGKey, PyTree], PyTree],
  steps: int = 1,
  first_order: bool = False,
  inductive: bool = False,
  metrics: Mapping[str, Metric] | None = None,
) -> Learner:
  """Builds the learner that adapts by `adapt_with`: Meta-SGD with another inner optimiser than α ∘ ∇L.

  `meta` is a `MetaParams(theta, hyper)`: what the inner optimiser learns stands where α does, as `meta.alpha`.

  Args:
    model: the network; where it says what `adapts`, the optimiser sees that part of θ, and `None` for the rest.
    loss_fn: `(outputs [B, …], targets [B, …]) → scalar`, the same for support and query.
    optimizer: `hyper → optax.GradientTransformation`; see `adapt_with` about Adam's `eps_root`.
    hyper: where it starts, a pytree of floats; or `(key, θ) → hyper`, for such as
      `lambda key, theta: {'alpha': ms.init_alpha(key, theta), 'clip': 1.0}`, θ with `None` for what does not adapt.
    steps: inner steps; the optimiser's state starts anew for each task.
    first_order: drop the second derivatives.
    inductive: as in `meta_sgd`.
    metrics: as in `meta_sgd`.

  Raises:
    ValueError: steps that are no count, a metric named 'loss', or inductive with a model that has no statistics. From
      `init`: a leaf of hyper that is not floating-point. From the others: as `adapt_with`.

  Example:
    >>> learner = ms.learners.inner_optimizer(
    ...   ms.nn.from_linen(ms.nn.MLP()),
    ...   ms.losses.mean_squared_error,
    ...   optimizer=lambda hyper: optax.sgd(hyper['rate'], hyper['momentum']),
    ...   hyper={'rate': 0.01, 'momentum': 0.9},
    ...   steps=3,
    ... )
    >>> tasks = ms.tasks.sinusoid()
    >>> episode = tasks.episode(tasks.sample(jax.random.key(0)), jax.random.key(1))
    >>> print(learner.init(jax.random.key(2), episode).alpha['momentum'])
    0.9
  """
  check_steps(steps)
  inner: dict[str, Any] = dict(optimizer=optimizer, steps=steps, first_order=first_order, adapts=model.adapts)

  def init(key, episode: Episode) -> MetaParams:
    theta_key, hyper_key = jax.random.split(key)
    theta = model.init(theta_key, episode.support.x)
    start = hyper(hyper_key, moving_part(theta, model.adapts)) if callable(hyper) else hyper
    for name, leaf in named(start):
      if not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
        raise ValueError(
          f'hyper{name and "." + name} must be floating-point, got {leaf!r}; '
          'what is not learned belongs into `optimizer` itself'
        )
    return MetaParams(theta, jax.tree.map(jnp.asarray, start))

  def support_loss(theta, batch: Batch):
    return loss_fn(model.apply(theta, batch.x), batch.y)

  def adapt_(meta: MetaParams, support: Batch) -> PyTree:
    return adapt_with(meta.theta, meta.alpha, support, loss_fn=support_loss, **inner)

  def path(meta: MetaParams, support: Batch) -> PyTree:
    return adapt_with_path(meta.theta, meta.alpha, support, loss_fn=support_loss, **inner)

  return of_parameters(model, loss_fn, init, adapt_, path, inductive=inductive, metrics=metrics)
