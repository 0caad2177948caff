"""MAML (Finn et al. 2017): Meta-SGD with α held still."""

from collections.abc import Mapping

from metasgd_jax.learners.meta_sgd import Metric, meta_sgd
from metasgd_jax.types import Learner, Model, PyTree


def maml(
  model: Model,
  loss_fn: Metric,
  *,
  alpha: PyTree = 0.01,
  steps: int = 1,
  first_order: bool = False,
  metrics: Mapping[str, Metric] | None = None,
) -> Learner:
  """Builds the MAML learner: θ′ = θ − α ∇L_support(θ), with θ alone learned (Finn et al. 2017, Algorithm 1).

  Args:
    model: the network.
    loss_fn: `(outputs, targets) → scalar`.
    alpha: the inner rate: a number, or a pytree as `adapt` takes it. 0.01 is MAML's for sinusoids, which Table 1 of
      Li et al. uses; for 5-way Omniglot MAML has 0.4.
    steps: inner steps.
    first_order: drop the second derivatives (FOMAML).
    metrics: as in `meta_sgd`.
  """
  return meta_sgd(model, loss_fn, steps=steps, first_order=first_order, held_alpha=alpha, metrics=metrics)
