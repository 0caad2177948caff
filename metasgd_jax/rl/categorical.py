"""Policies for discrete actions, whose logits are computed from the observation by a network."""

from collections.abc import Sequence
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from metasgd_jax.rl.mlp import mlp
from metasgd_jax.rl.types import Policy
from metasgd_jax.types import check_count, equal_by_arguments


class Categorical(NamedTuple):
  """A distribution over the choices 0 to n − 1.

  Attributes:
    logits: Logits, `[…, n]`. The probabilities are their softmax.

  Example:
    >>> ms.rl.Categorical(logits=jnp.zeros(3)).logits.shape
    (3,)
  """

  logits: chex.Array


@equal_by_arguments
def categorical(observation_size: int, choices: int, *, hidden: Sequence[int] = (100, 100)) -> Policy:
  """Builds the policy a ~ softmax(f(o)), where f is an MLP with ReLU.

  An action is an array `[1]` with the index of a choice, as a float of the logits' type. The environment therefore has
  `action_size=1`, and its `step` can convert the action by `action[0].astype(jnp.int32)`. θ and its initial values are
  those of `gaussian`, without `log_std`.

  Args:
    observation_size: Number of entries O of an observation.
    choices: Number of choices n.
    hidden: Number of units of each hidden layer. Without hidden layers the logits are linear in the observation.

  Raises:
    ValueError: if a size is not an integer of at least 1, or if there are fewer than 2 choices.

  Example:
    >>> policy = ms.rl.categorical(observation_size=4, choices=3, hidden=(8,))
    >>> theta = policy.init(jax.random.key(0))
    >>> action = policy.sample(policy.apply(theta, jnp.zeros(4)), jax.random.key(1))
    >>> action.shape, int(action[0]) in (0, 1, 2)
    ((1,), True)
  """
  check_count('observation_size', observation_size)
  check_count('choices', choices, 2)
  init, logits = mlp(observation_size, hidden, choices)
  return Policy(init, lambda theta, observations: Categorical(logits(theta, observations)), sample, log_prob, kl)


def sample(distribution: Categorical, key: chex.PRNGKey) -> chex.Array:
  """Returns the index of a choice for each distribution, `[…, 1]`, as a float; consumes key."""
  return jax.random.categorical(key, distribution.logits)[..., None].astype(distribution.logits.dtype)


def log_prob(distribution: Categorical, actions: chex.Array) -> chex.Array:
  """Returns the logarithm of the probability of actions `[…, 1]`, `[…]`."""
  chosen = actions.astype(jnp.int32)
  return jnp.take_along_axis(jax.nn.log_softmax(distribution.logits), chosen, -1)[..., 0]


def kl(p: Categorical, q: Categorical) -> chex.Array:
  """Returns KL(p ‖ q) = Σ_a p_a (log p_a − log q_a), in nats, `[…]`."""
  log_p, log_q = jax.nn.log_softmax(p.logits), jax.nn.log_softmax(q.logits)
  return jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1)
