"""Adaptation by any optax optimiser, whose hyper-parameters are meta-learned."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from metasgd_jax.inner.alpha import dtype_of, which_adapt
from metasgd_jax.inner.loop import adapting_part
from metasgd_jax.inner.optimizer import OptimizerFn, adapt_path_with_optimizer, adapt_with_optimizer
from metasgd_jax.learners.episodic import Metric, Metrics, of_parameters
from metasgd_jax.tree import named, strong
from metasgd_jax.types import Episode, Learner, Model, PyTree, check_count, check_model, equal_by_arguments


class WithHyper(NamedTuple):
  """Meta-parameters of the `inner_optimizer` learner.

  Attributes:
    theta: Initial parameters θ, any pytree of floating-point arrays.
    hyper: Learned hyper-parameters of the inner optimiser, such as its learning rate: a pytree of floating-point
      arrays. `optimizer_fn` receives this pytree unchanged.

  Example:
    >>> meta = ms.learners.WithHyper(theta={'w': jnp.ones(2)}, hyper={'rate': jnp.float32(0.1)})
    >>> len(jax.tree.leaves(meta))
    2
  """

  theta: PyTree
  hyper: PyTree


@equal_by_arguments
def inner_optimizer(
  model: Model,
  loss_fn: Metric,
  *,
  optimizer_fn: OptimizerFn,
  hyper: PyTree | Callable[[chex.PRNGKey, PyTree], PyTree],
  steps: int = 1,
  first_order: bool = False,
  inductive: bool = False,
  metrics: Metrics = None,
) -> Learner:
  """Builds a learner that adapts by `adapt_with_optimizer`, with an optax optimiser in place of Meta-SGD's α ∘ ∇L.

  `meta` is a `WithHyper(theta, hyper)`.

  Args:
    model: Network. If the model has `adapts`, the optimiser receives the adapting leaves of θ, and `None` in place of
      the others.
    loss_fn: Loss of the support and of the query, `(outputs [B, …], targets [B, …]) → scalar`.
    optimizer_fn: Function `hyper → optax.GradientTransformation`. If the optimiser computes roots or norms of
      gradients, the meta-gradient can be NaN; `adapt_with_optimizer` describes the remedy.
    hyper: Initial hyper-parameters, a pytree of floating-point numbers or arrays, or a function `(key, θ) → hyper` that
      returns this pytree, such as `lambda key, theta: {'alpha': ms.init_alpha(key, theta), 'clip': 1.0}`. The function
      receives θ with `None` in place of every leaf that does not adapt. A callable pytree that has numbers or arrays as
      leaves, such as an Equinox module, is interpreted as the hyper-parameters, not as a function.
    steps: Number of inner steps. The state of the optimiser is initialised again for each task.
    first_order: Whether second derivatives are dropped.
    inductive: Whether each query item is normalised by the batch-norm statistics of the support; see `meta_sgd`.
    metrics: Metrics of the query; see `meta_sgd`.

  Raises:
    ValueError: if `steps` is not an integer of at least 0, if a metric is named 'loss', or if `inductive` is set and
      the model has no statistics. The learner's `init` raises ValueError if a leaf of `hyper` is not floating-point.
      The learner's other functions raise the errors of `adapt_with_optimizer`.

  Example:
    >>> learner = ms.learners.inner_optimizer(
    ...   ms.nn.from_linen(ms.nn.MLP()),
    ...   ms.losses.mean_squared_error,
    ...   optimizer_fn=lambda hyper: optax.sgd(hyper['rate'], hyper['momentum']),
    ...   hyper={'rate': 0.01, 'momentum': 0.9},
    ...   steps=3,
    ... )
    >>> tasks = ms.tasks.sinusoid()
    >>> episode = tasks.episode(tasks.sample(jax.random.key(0)), jax.random.key(1))
    >>> print(learner.init(jax.random.key(2), episode).hyper['momentum'])
    0.9
  """
  check_model(model)
  check_count('steps', steps, 0)
  # A module of parameters is callable too, but it has numbers or arrays as leaves.
  is_function = callable(hyper) and all(dtype_of(leaf) is None for leaf in jax.tree.leaves(hyper))

  def init(key, episode: Episode) -> WithHyper:
    theta_key, hyper_key = jax.random.split(key)
    theta = model.init(theta_key, episode.support.x)
    adapting = adapting_part(theta, which_adapt(theta, model.adapts))
    start = hyper(hyper_key, adapting) if is_function else hyper
    for name, leaf in named(start):
      if (dtype := dtype_of(leaf)) is None or not jnp.issubdtype(dtype, jnp.floating):
        where = f'hyper.{name}' if name else 'hyper'
        raise ValueError(
          f'{where} must be floating-point, got {leaf!r}; if a value is not learned, set it inside `optimizer_fn`'
        )
    return WithHyper(theta, strong(start))

  inner: dict[str, Any] = dict(optimizer_fn=optimizer_fn, steps=steps, first_order=first_order, adapts=model.adapts)
  loop = functools.partial(adapt_with_optimizer, **inner), functools.partial(adapt_path_with_optimizer, **inner)
  return of_parameters(model, loss_fn, init, loop, inductive=inductive, metrics=metrics)
