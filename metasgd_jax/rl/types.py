"""The data that passes between environments, policies and policy gradients.

Shape letters, in addition to those of `metasgd_jax.types`:

- H: largest number of steps of a trajectory.
- B: trajectories of a task.
- O: entries of an observation.
- A: entries of an action.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex

from metasgd_jax.types import Adapts, PyTree


class Environment(NamedTuple):
  """A distribution of tasks and the dynamics of each task, as pure functions. Each task is a Markov decision process.

  Attributes:
    sample: `key → task`, a pytree; consumes key.
    reset: `(task, key) → state`, a pytree; consumes key.
    observe: `(task, state) → observation [O]`.
    step: `(task, state, action [A], key) → (state, reward [], terminated [])`; consumes key. `terminated` says whether
      the task ends the trajectory, for example because a goal is reached. `step` does not report the time
      limit: `rollout` itself ends a trajectory after `horizon` steps. `rollout` converts integer rewards to floats.
    observation_size: Number of entries O of an observation.
    action_size: Number of entries A of an action.
    horizon: Time limit H, the largest number of steps of a trajectory.

  Example:
    >>> environment = ms.rl.Environment(  # A point on a line walks to a goal that it cannot see; O = A = 1.
    ...   sample=jax.random.normal,
    ...   reset=lambda goal, key: jnp.zeros(()),
    ...   observe=lambda goal, x: x[None],
    ...   step=lambda goal, x, a, key: (x + a[0], -jnp.abs(x + a[0] - goal), jnp.abs(x + a[0] - goal) < 0.01),
    ...   observation_size=1,
    ...   action_size=1,
    ...   horizon=5,
    ... )
    >>> policy, goal = ms.rl.gaussian(1, 1, hidden=(8,)), environment.sample(jax.random.key(0))
    >>> ms.rl.rollout(environment, policy, policy.init(jax.random.key(1)), goal, jax.random.key(2)).rewards.shape
    (5,)
  """

  sample: Callable[[chex.PRNGKey], PyTree]
  reset: Callable[[PyTree, chex.PRNGKey], PyTree]
  observe: Callable[[PyTree, PyTree], chex.Array]
  step: Callable[[PyTree, PyTree, chex.Array, chex.PRNGKey], tuple[PyTree, chex.Array, chex.Array]]
  observation_size: int
  action_size: int
  horizon: int


class Policy(NamedTuple):
  """A stochastic policy, as pure functions. A distribution over actions is a pytree with the distribution's parameters.

  Attributes:
    init: `key → θ`; consumes key.
    apply: `(θ, observations […, O]) → distribution […]`.
    sample: `(distribution, key) → action`, for one distribution; consumes key.
    log_prob: `(distribution […], actions […, A]) → […]`.
    kl: `(p […], q […]) → […]`, the divergence KL(p ‖ q).
    adapts: Function from the name of a leaf of θ to whether an inner step changes the leaf, such as
      `lambda name: name.startswith('Dense_1')`. By default all leaves adapt.

  Example:
    >>> policy = ms.rl.gaussian(observation_size=3, action_size=2, hidden=(8,))
    >>> theta = policy.init(jax.random.key(0))
    >>> distributions = policy.apply(theta, jnp.zeros((5, 3)))  # For five observations.
    >>> actions = jax.vmap(policy.sample)(distributions, jax.random.split(jax.random.key(1), 5))
    >>> actions.shape, policy.log_prob(distributions, actions).shape, policy.kl(distributions, distributions).shape
    ((5, 2), (5,), (5,))
  """

  init: Callable[[chex.PRNGKey], PyTree]
  apply: Callable[[PyTree, chex.Array], Any]
  sample: Callable[[Any, chex.PRNGKey], chex.Array]
  log_prob: Callable[[Any, chex.Array], chex.Array]
  kl: Callable[[Any, Any], chex.Array]
  adapts: Adapts | None = None


class Trajectories(NamedTuple):
  """Observations, actions and rewards of one trajectory, or of several trajectories of one task.

  The shapes below are those of one trajectory. Several trajectories have the leading axis `[B]` in every leaf. After
  the end of a trajectory `valid` is False, and the values of the other leaves are ignored.

  Attributes:
    observations: Observations before each step, `[H, O]`.
    actions: Actions, `[H, A]`.
    log_probs: Log-probabilities of the actions under the policy that took the actions, `[H]`.
    rewards: Rewards, `[H]`. They are zero after the end.
    valid: Whether each step was taken, `[H]`, bool.
    terminated: Whether the trajectory was ended by the task and not by time, `[]`, bool.
    last_observation: Observation after the last valid step, `[O]`. If time ended the trajectory, the rewards
      that would have followed are unknown; `AdvantageConfig.bootstrap` estimates them from this observation.

  Example:
    >>> environment, policy = ms.rl.navigation(horizon=5), ms.rl.gaussian(2, 2, hidden=(8,))
    >>> theta, task = policy.init(jax.random.key(0)), environment.sample(jax.random.key(1))
    >>> drawn = ms.rl.collect(environment, policy, theta, task, jax.random.key(2), num=3)
    >>> drawn.observations.shape, drawn.rewards.shape, drawn.terminated.shape
    ((3, 5, 2), (3, 5), (3,))
    >>> drawn.valid.sum(-1).shape  # How many steps each trajectory took.
    (3,)
  """

  observations: chex.Array
  actions: chex.Array
  log_probs: chex.Array
  rewards: chex.Array
  valid: chex.Array
  terminated: chex.Array
  last_observation: chex.Array
