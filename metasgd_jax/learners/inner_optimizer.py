"""Any optax optimiser in the inner loop, its numbers meta-learned."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from metasgd_jax.inner.alpha import which_adapt
from metasgd_jax.inner.loop import check_steps
from metasgd_jax.inner.optimizer import InnerOptimizer, adapt_path_with_optimizer, adapt_with_optimizer
from metasgd_jax.learners.episodic import Metric, of_parameters
from metasgd_jax.tree import named, strong
from metasgd_jax.types import Batch, Episode, Learner, Model, PyTree


class WithHyper(NamedTuple):
  """What `inner_optimizer` learns: θ, and what is learned of the inner optimiser.

  Attributes:
    theta: the initialisation, any pytree of floating-point arrays.
    hyper: a pytree of floating-point arrays, in the optimiser's own units; it is no α.

  Example:
    >>> meta = ms.learners.WithHyper(theta={'w': jnp.ones(2)}, hyper={'rate': jnp.float32(0.1)})
    >>> len(jax.tree.leaves(meta))
    2
  """

  theta: PyTree
  hyper: PyTree


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
  """Builds the learner that adapts by `adapt_with_optimizer`: Meta-SGD with another inner optimiser than α ∘ ∇L.

  `meta` is a `WithHyper(theta, hyper)`.

  Args:
    model: the network; where it says what `adapts`, the optimiser sees that part of θ, and `None` for the rest.
    loss_fn: `(outputs [B, …], targets [B, …]) → scalar`, the same for support and query.
    optimizer: `hyper → optax.GradientTransformation`; see `adapt_with_optimizer` about roots and norms of gradients.
    hyper: where it starts, a pytree of floats; or `(key, θ) → hyper`, for such as
      `lambda key, theta: {'alpha': ms.init_alpha(key, theta), 'clip': 1.0}`, θ with `None` for what does not adapt.
      A callable that JAX sees numbers or arrays in, such as an Equinox module's parameters, is a pytree.
    steps: inner steps; the optimiser's state starts anew for each task.
    first_order: drop the second derivatives.
    inductive: as in `meta_sgd`.
    metrics: as in `meta_sgd`.

  Raises:
    ValueError: steps that are no count, a metric named 'loss', or inductive with a model that has no statistics. From
      `init`: a leaf of hyper that is not floating-point. From the others: as `adapt_with_optimizer`.

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
    >>> print(learner.init(jax.random.key(2), episode).hyper['momentum'])
    0.9
  """
  check_steps(steps)
  inner: dict[str, Any] = dict(optimizer=optimizer, steps=steps, first_order=first_order, adapts=model.adapts)

  def init(key, episode: Episode) -> WithHyper:
    theta_key, hyper_key = jax.random.split(key)
    theta = model.init(theta_key, episode.support.x)
    adapting = jax.tree.map(lambda leaf, adapts: leaf if adapts else None, theta, which_adapt(theta, model.adapts))
    start = hyper(hyper_key, adapting) if _is_function(hyper) else hyper
    for name, leaf in named(start):
      if not _is_floating(leaf):
        raise ValueError(
          f'hyper{name and "." + name} must be floating-point, got {leaf!r}; '
          'what is not learned belongs into `optimizer` itself'
        )
    return WithHyper(theta, strong(start))

  def support_loss(theta, batch: Batch):
    return loss_fn(model.apply(theta, batch.x), batch.y)

  def adapt_(meta: WithHyper, support: Batch) -> PyTree:
    return adapt_with_optimizer(meta.theta, meta.hyper, support, loss_fn=support_loss, **inner)

  def path(meta: WithHyper, support: Batch) -> PyTree:
    return adapt_path_with_optimizer(meta.theta, meta.hyper, support, loss_fn=support_loss, **inner)

  return of_parameters(model, loss_fn, init, adapt_, path, inductive=inductive, metrics=metrics)


_ARRAYS = jax.Array, np.ndarray, np.generic


def _is_function(hyper) -> bool:
  """Whether hyper is called for its start, rather than being it: JAX sees no number and no array in it."""
  return callable(hyper) and not any(isinstance(leaf, (*_ARRAYS, int, float)) for leaf in jax.tree.leaves(hyper))


def _is_floating(leaf) -> bool:
  return isinstance(leaf, float) or (isinstance(leaf, _ARRAYS) and jnp.issubdtype(leaf.dtype, jnp.floating))
