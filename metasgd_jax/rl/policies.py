"""Gaussian policies, whose mean is computed from the observation by a network."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from metasgd_jax.rl.mlp import mlp
from metasgd_jax.rl.types import Policy
from metasgd_jax.types import PyTree, check_count, equal_by_arguments


class Gaussian(NamedTuple):
  """Independent normal distributions, one for each entry of an action.

  Attributes:
    mean: Means, `[…, A]`, in the units of the actions.
    log_std: Logarithms of the standard deviations, `[…, A]`.

  Example:
    >>> ms.rl.Gaussian(mean=jnp.zeros(2), log_std=jnp.zeros(2)).mean.shape
    (2,)
  """

  mean: chex.Array
  log_std: chex.Array


@equal_by_arguments
def gaussian(
  observation_size: int,
  action_size: int,
  *,
  hidden: Sequence[int] = (100, 100),
  std: float = 1.0,
  min_std: float = 1e-6,
) -> Policy:
  """Builds the policy a ~ N(μ(o), diag σ²). μ is an MLP with ReLU, and log σ is a parameter that does not depend on o.

  The paper's policy for 2D navigation is a 2-100-100-2 network with 2 parameters for log σ (Li et al. 2017, section
  4.3). θ is a dict with the parameters of the MLP, see `rl.mlp`, and with `log_std [A]`.

  Args:
    observation_size: Number of entries O of an observation.
    action_size: Number of entries A of an action.
    hidden: Number of units of each hidden layer. Without hidden layers the mean is linear in the observation.
    std: Initial standard deviation σ, in the units of the actions. The default, 1, is that of rllab.
    min_std: Lower bound of σ, in the units of the actions. The default, 1e-6, is that of rllab.

  Raises:
    ValueError: if a size is not an integer of at least 1, or if 0 < min_std <= std < ∞ does not hold.

  Example:
    >>> policy = ms.rl.gaussian(observation_size=2, action_size=2, hidden=(8,))
    >>> theta = policy.init(jax.random.key(0))
    >>> policy.sample(policy.apply(theta, jnp.zeros(2)), jax.random.key(1)).shape
    (2,)
  """
  check_count('observation_size', observation_size)
  check_count('action_size', action_size)
  if not 0 < min_std <= std < math.inf:
    raise ValueError(
      f'std must be finite and at least min_std, and min_std must be above 0, got std={std} and min_std={min_std}'
    )
  init_mean, mean_of = mlp(observation_size, hidden, action_size)

  def init(key) -> PyTree:
    theta = init_mean(key)
    return {**theta, 'log_std': jnp.full(action_size, math.log(std), theta['Dense_0']['bias'].dtype)}

  def apply(theta, observations) -> Gaussian:
    mean = mean_of(theta, observations)
    log_std = jnp.maximum(theta['log_std'], math.log(min_std))
    return Gaussian(mean, jnp.broadcast_to(log_std, mean.shape))

  return Policy(init, apply, sample, log_prob, kl)


def sample(distribution: Gaussian, key: chex.PRNGKey) -> chex.Array:
  """Returns μ + σ ε with ε ~ N(0, 1), `[…, A]`; consumes key."""
  mean, log_std = distribution
  return mean + jnp.exp(log_std) * jax.random.normal(key, mean.shape, mean.dtype)


def log_prob(distribution: Gaussian, actions: chex.Array) -> chex.Array:
  """Returns Σ_j −½ ((a_j − μ_j) / σ_j)² − log σ_j − ½ log 2π, the log density `[…]` of actions `[…, A]`."""
  mean, log_std = distribution
  z = (actions - mean) * jnp.exp(-log_std)
  return -jnp.sum(0.5 * z * z + log_std, -1) - 0.5 * math.log(2 * math.pi) * mean.shape[-1]


def kl(p: Gaussian, q: Gaussian) -> chex.Array:
  """Returns KL(p ‖ q) = Σ_j [log(σ_q / σ_p) + (σ_p² + (μ_p − μ_q)²) / (2 σ_q²) − ½], in nats, `[…]`."""
  difference = p.log_std - q.log_std
  z = (p.mean - q.mean) * jnp.exp(-q.log_std)
  return jnp.sum(0.5 * (jnp.exp(2 * difference) + z * z - 1) - difference, -1)
