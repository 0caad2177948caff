"""A policy's tasks to solve at once, which compile fast."""

import jax
import jax.numpy as jnp

from metasgd_jax import rl


def aiming(ends=lambda state, action: (state >= 2) & (action > 2)):
  """Stand at 0 and each step say the task's number; the reward is less the squared error."""
  return rl.Environment(
    sample=lambda key: jax.random.uniform(key, minval=-1.0, maxval=1.0),
    reset=lambda task, key: jnp.zeros((), jnp.int32),
    observe=lambda task, state: jnp.stack([jnp.ones_like(task), state / 4]),
    step=lambda task, state, action, key: (state + 1, -((action[0] - task) ** 2), ends(state, action[0])),
    observation_size=2,
    action_size=1,
    horizon=4,
  )


def light(ends=lambda state, action: action > 0.5, **options):
  """An inner loop of few operations: a linear policy, no baseline; who acts above 0.5 leaves, so lengths differ."""
  plain = rl.AdvantageConfig(baseline=False)
  defaults = dict(trajectories=3, estimator='score', advantage=plain)
  return rl.policy_gradient(aiming(ends), rl.gaussian(2, 1, hidden=()), **(defaults | options))
