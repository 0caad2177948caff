"""MAML (Finn et al. 2017): Meta-SGD with α held still."""

from collections.abc import Mapping

import jax

from metasgd_jax.inner.adaptation import Adjoint
from metasgd_jax.inner.alpha import broadcast_alpha
from metasgd_jax.learners.episodic import Metric
from metasgd_jax.learners.meta_sgd import gradient_learner
from metasgd_jax.types import Episode, Learner, MetaParams, Model, PyTree


def maml(
  model: Model,
  loss_fn: Metric,
  *,
  alpha: PyTree = 0.01,
  steps: int = 1,
  first_order: bool = False,
  adjoint: Adjoint = 'reverse',
  inductive: bool = False,
  metrics: Mapping[str, Metric] | None = None,
) -> Learner:
  """Builds the MAML learner: θ′ = θ − α ∇L_support(θ), with θ alone learned (Finn et al. 2017, Algorithm 1).

  Args:
    model: the network.
    loss_fn: `(outputs, targets) → scalar`.
    alpha: the inner rate: a number, or a pytree as `adapt` takes it. 0.01 is MAML's for sinusoids, which Table 1 of
      Li et al. uses; for 5-way Omniglot MAML has 0.4. It is no part of `meta`, whose alpha is `None`, so that no
      optimiser and no weight decay can move it. A part of θ whose α is `None`, as in {'body': None, 'head': 0.1},
      does not adapt.
    steps: inner steps.
    first_order: drop the second derivatives (FOMAML).
    adjoint: as in `meta_sgd`.
    inductive: as in `meta_sgd`.
    metrics: as in `meta_sgd`.

  Raises:
    ValueError: alpha is `None`; as `meta_sgd`. From `init`: alpha does not fit θ, naming the leaf.

  Example:
    >>> tasks = ms.tasks.sinusoid(shot=5)
    >>> learner = ms.maml(ms.nn.from_linen(ms.nn.MLP()), ms.losses.mean_squared_error, alpha=0.01)
    >>> episode = tasks.episode(tasks.sample(jax.random.key(0)), jax.random.key(1))
    >>> learner.init(jax.random.key(2), episode).alpha is None  # It is held, so is no part of meta.
    True
  """
  if alpha is None:
    raise ValueError('alpha must be a number or a pytree of numbers, got None; meta_sgd learns it')

  def init(key, episode: Episode) -> MetaParams:
    theta = model.init(jax.random.split(key)[0], episode.support.x)
    broadcast_alpha(alpha, theta)
    return MetaParams(theta, None)

  return gradient_learner(
    model,
    loss_fn,
    init,
    lambda meta: alpha,
    steps=steps,
    first_order=first_order,
    adjoint=adjoint,
    inductive=inductive,
    metrics=metrics,
  )
