"""MAML (Finn et al. 2017), which is Meta-SGD with fixed rates α."""

from typing import Any

import jax

from metasgd_jax.inner.adaptation import Adjoint
from metasgd_jax.inner.alpha import broadcast_alpha
from metasgd_jax.learners.episodic import Metric, Metrics, inner_loop, of_parameters
from metasgd_jax.types import Episode, Learner, MetaParams, Model, PyTree, equal_by_arguments


@equal_by_arguments
def maml(
  model: Model,
  loss_fn: Metric,
  *,
  alpha: PyTree = 0.01,
  steps: int = 1,
  first_order: bool = False,
  adjoint: Adjoint = 'reverse',
  inductive: bool = False,
  metrics: Metrics = None,
) -> Learner:
  """Builds the MAML learner: θ′ = θ − α ∇L_support(θ), where only θ is learned (Finn et al. 2017, Algorithm 1).

  Args:
    model: Network.
    loss_fn: Loss of the support and of the query, `(outputs, targets) → scalar`.
    alpha: Inner rate, a number or a pytree of rates; see `adapt`. The default 0.01 is MAML's rate for sinusoids, which
      Table 1 of Li et al. (2017) uses. MAML's rate for 5-way Omniglot is 0.4. The rate is not a part of `meta`, whose
      `alpha` is `None`, so that no outer optimiser and no weight decay can change the rate. A part of θ whose rate is
      `None`, as in {'body': None, 'head': 0.1}, does not adapt.
    steps: Number of inner steps.
    first_order: Whether second derivatives are dropped (FOMAML).
    adjoint: How the outer gradient goes back through the inner steps; see `Adjoint`.
    inductive: Whether each query item is normalised by the batch-norm statistics of the support; see `meta_sgd`.
    metrics: Metrics of the query; see `meta_sgd`.

  Raises:
    ValueError: if `alpha` is `None`, if `steps` is not an integer of at least 0, if `adjoint` is unknown, if a metric
      is named 'loss', or if `inductive` is set and the model has no statistics. The learner's `init` raises ValueError
      if α does not fit θ (the message names the leaf).

  Example:
    >>> tasks = ms.tasks.sinusoid(shot=5)
    >>> learner = ms.maml(ms.nn.from_linen(ms.nn.MLP()), ms.losses.mean_squared_error, alpha=0.01)
    >>> episode = tasks.episode(tasks.sample(jax.random.key(0)), jax.random.key(1))
    >>> learner.init(jax.random.key(2), episode).alpha is None  # A fixed rate is not a part of meta.
    True
  """
  if alpha is None:
    raise ValueError('alpha must be a number or a pytree of numbers, got None; use meta_sgd to learn the rates')

  def init(key, episode: Episode) -> MetaParams:
    theta = model.init(jax.random.split(key)[0], episode.support.x)
    broadcast_alpha(alpha, theta)
    return MetaParams(theta, None)

  inner = inner_loop(model, steps, adjoint, first_order=first_order)
  options: dict[str, Any] = dict(start=lambda meta: (meta.theta, alpha), inductive=inductive, metrics=metrics)
  return of_parameters(model, loss_fn, init, inner, **options)
