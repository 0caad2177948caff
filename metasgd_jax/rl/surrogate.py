"""Surrogates: functions of θ and sampled trajectories. Their gradients estimate the gradient of the expected return.

Each function takes four arrays `[H]` of one trajectory: the log-probabilities log π_θ(a_t | o_t) of the actions, the
log-probabilities under the policy that sampled the actions, the advantages A_t, and `valid`. It returns a scalar that
is to be maximised.
"""

from collections.abc import Callable
from typing import Literal

import chex
import jax.numpy as jnp

from metasgd_jax.types import check_choice

Estimator = Literal['dice', 'lvc', 'score']
"""Name of the surrogate that the inner step differentiates.

At the θ that sampled the trajectories, all three surrogates have the same gradient, which is the policy gradient.

- `dice`: Loaded DiCE. The gradient and the second derivatives are correct.
- `lvc`: low-variance curvature. The second derivatives are computed as if the value of an action did not depend on θ.
- `score`: the surrogate of MAML's released code. The second derivatives lack the dependence of the sampling on θ, and
  they are therefore biased.
"""

Surrogate = Callable[[chex.Array, chex.Array, chex.Array, chex.Array], chex.Array]
"""Function `(log_probs [H], sampled_log_probs [H], advantages [H], valid [H]) → []` of one trajectory."""


def dice(log_probs: chex.Array, sampled: chex.Array, advantages: chex.Array, valid: chex.Array) -> chex.Array:
  """Returns Σ_t (w_{≤t} − w_{<t}) A_t with w_{≤t} = Π_{s ≤ t} π_θ(a_s | o_s) / π_sampled(a_s | o_s).

  This is Loaded DiCE (Farquhar et al. 2019), which extends DiCE (Foerster et al. 2018). DiCE divides by π_θ with the
  gradient stopped. This function divides by the recorded π_sampled instead. The weights w are therefore importance
  weights, and the surrogate is correct also at a θ that differs from the one that sampled the actions.

  Let A_t be the undiscounted return from t minus any function of o_t and t. Then the expectation of the surrogate is
  the expected return as a function of θ, up to a constant, and the derivatives of every order agree too. If γ < 1,
  advantages are discounted from t and not from the start, which is the usual bias of the policy gradient.

  Args:
    log_probs: Log-probabilities log π_θ of the actions, `[H]`.
    sampled: Log-probabilities of the same actions under the policy that took the actions, `[H]`.
    advantages: Advantages A_t, `[H]`.
    valid: Whether each step was taken, `[H]`, bool.

  Example:
    >>> here = jnp.log(jnp.array([0.5, 0.5]))  # The same policy as at sampling: all weights are 1, so the sum is 0.
    >>> print(ms.rl.dice(here, here, jnp.array([1.0, 2.0]), jnp.array([True, True])))
    0.0
  """
  log_ratios = _log_ratios(log_probs, sampled, valid)
  until = jnp.cumsum(log_ratios)
  return jnp.sum((jnp.exp(until) - jnp.exp(until - log_ratios)) * jnp.where(valid, advantages, 0))


def likelihood_ratio(
  log_probs: chex.Array, sampled: chex.Array, advantages: chex.Array, valid: chex.Array
) -> chex.Array:
  """Returns Σ_t A_t π_θ(a_t | o_t) / π_sampled(a_t | o_t).

  TRPO maximises this surrogate (Schulman et al. 2015, equation 14). It has the same form as the low-variance curvature
  estimator (Rothfuss et al. 2019).

  Args:
    log_probs: Log-probabilities log π_θ of the actions, `[H]`.
    sampled: Log-probabilities of the same actions under the policy that took the actions, `[H]`.
    advantages: Advantages A_t, `[H]`.
    valid: Whether each step was taken, `[H]`, bool.

  Example:
    >>> here = jnp.array([-1.0, -1.0])
    >>> print(ms.rl.likelihood_ratio(here, here, jnp.array([1.0, 2.0]), jnp.array([True, True])))
    3.0
  """
  return jnp.sum(jnp.exp(_log_ratios(log_probs, sampled, valid)) * jnp.where(valid, advantages, 0))


def score(log_probs: chex.Array, sampled: chex.Array, advantages: chex.Array, valid: chex.Array) -> chex.Array:
  """Returns Σ_t A_t log π_θ(a_t | o_t), as in MAML's released code.

  The gradient of this surrogate is the policy gradient. The second derivatives are not those of the expected return.

  Args:
    log_probs: Log-probabilities log π_θ of the actions, `[H]`.
    sampled: Not used.
    advantages: Advantages A_t, `[H]`.
    valid: Whether each step was taken, `[H]`, bool.

  Example:
    >>> here = jnp.array([-1.0, -1.0])
    >>> print(ms.rl.score(here, here, jnp.array([1.0, 2.0]), jnp.array([True, True])))
    -3.0
  """
  del sampled
  return jnp.sum(jnp.where(valid, log_probs, 0) * jnp.where(valid, advantages, 0))


def surrogate_of(estimator: Estimator) -> Surrogate:
  """Returns the surrogate with the name `estimator`.

  Raises:
    ValueError: if `estimator` is unknown.
  """
  check_choice('estimator', estimator, Estimator)
  return {'dice': dice, 'lvc': likelihood_ratio, 'score': score}[estimator]


def _log_ratios(log_probs, sampled, valid):
  return jnp.where(valid, log_probs - sampled, 0)
