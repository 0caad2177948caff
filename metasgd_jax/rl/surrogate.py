"""Functions whose derivatives are those of the expected return, estimated from trajectories drawn before.

All take one trajectory: log π_θ(a_t | o_t) `[H]`, the same under the policy that sampled, `[H]`, advantages A_t `[H]`
and `valid [H]`; each returns a scalar to be raised.
"""

from collections.abc import Callable
from typing import Literal, get_args

import chex
import jax.numpy as jnp

Estimator = Literal['dice', 'lvc', 'score']
"""What the inner step differentiates. At the θ that sampled, all three have the same gradient: the policy gradient.

`dice`: Loaded DiCE; the gradient and the second derivatives are right.
`lvc`: low-variance curvature; the second derivatives are as though what an action is worth did not depend on θ.
`score`: MAML's released code; the second derivatives lack the dependence of the sampling on θ, and so are biased.
"""

Surrogate = Callable[[chex.Array, chex.Array, chex.Array, chex.Array], chex.Array]
"""`(log_probs [H], sampled_log_probs [H], advantages [H], valid [H]) → []`."""


def dice(log_probs: chex.Array, sampled: chex.Array, advantages: chex.Array, valid: chex.Array) -> chex.Array:
  """Returns Σ_t (w_{≤t} − w_{<t}) A_t with w_{≤t} = Π_{s ≤ t} π_θ(a_s | o_s) / π_sampled(a_s | o_s).

  Loaded DiCE (Farquhar et al. 2019, of Foerster et al. 2018), with the log-probabilities at sampling in place of a
  stopped gradient, so that it is right, by importance weights, at other θ too. With A_t the undiscounted return from t
  less any function of o_t and t, its expectation is the expected return as a function of θ, up to a constant, and so
  are the derivatives of every order. With γ < 1 advantages are discounted from t, not from the start: the usual policy
  gradient's bias.

  Args:
    log_probs: `[H]`, log π_θ of the actions.
    sampled: `[H]`, of the same under the policy that took them.
    advantages: `[H]`.
    valid: `[H]` bool.

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

  What TRPO raises (Schulman et al. 2015, equation 14), and of the same form as the low-variance curvature estimator
  (Rothfuss et al. 2019).

  Args:
    log_probs: as in `dice`.
    sampled: as in `dice`.
    advantages: as in `dice`.
    valid: as in `dice`.

  Example:
    >>> here = jnp.array([-1.0, -1.0])
    >>> print(ms.rl.likelihood_ratio(here, here, jnp.array([1.0, 2.0]), jnp.array([True, True])))
    3.0
  """
  return jnp.sum(jnp.exp(_log_ratios(log_probs, sampled, valid)) * jnp.where(valid, advantages, 0))


def score(log_probs: chex.Array, sampled: chex.Array, advantages: chex.Array, valid: chex.Array) -> chex.Array:
  """Returns Σ_t A_t log π_θ(a_t | o_t), as in MAML's released code.

  Its gradient is the policy gradient; its second derivatives are not those of the expected return.

  Args:
    log_probs: as in `dice`.
    sampled: not used.
    advantages: as in `dice`.
    valid: as in `dice`.

  Example:
    >>> here = jnp.array([-1.0, -1.0])
    >>> print(ms.rl.score(here, here, jnp.array([1.0, 2.0]), jnp.array([True, True])))
    -3.0
  """
  del sampled
  return jnp.sum(jnp.where(valid, log_probs, 0) * jnp.where(valid, advantages, 0))


def surrogate_of(estimator: Estimator) -> Surrogate:
  """Returns the function of that name.

  Raises:
    ValueError: an unknown estimator.
  """
  if estimator not in get_args(Estimator):
    raise ValueError(f'estimator must be one of {get_args(Estimator)}, got {estimator!r}')
  return {'dice': dice, 'lvc': likelihood_ratio, 'score': score}[estimator]


def _log_ratios(log_probs, sampled, valid):
  return jnp.where(valid, log_probs - sampled, 0)
