"""Trajectories of a policy in an environment, computed on the device."""

import functools

import chex
import jax
import jax.numpy as jnp

from metasgd_jax.rl.types import Environment, Policy, Trajectories
from metasgd_jax.types import PyTree, check_count


def rollout(environment: Environment, policy: Policy, theta: PyTree, task: PyTree, key: chex.PRNGKey) -> Trajectories:
  """Returns one trajectory of the policy in one task, with H steps.

  The task may end the trajectory before H steps. The arrays still have H steps: in the steps after the end, the state
  does not change, rewards are zero and `valid` is False. No gradient flows through the trajectory, neither through the
  dynamics nor through the log-probabilities.

  Args:
    environment: Environment that defines the dynamics.
    policy: Policy that draws the actions.
    theta: Parameters of the policy.
    task: Task from `environment.sample`.
    key: Random key, consumed. It is split into one key for the start and one key for the steps. The key for the steps
      is split into keys `[H, 2]`: for each step one key for the action and one for the dynamics.

  Raises:
    ValueError: if the sizes of the policy are not those of the environment.

  Example:
    >>> environment, policy = ms.rl.navigation(horizon=20), ms.rl.gaussian(2, 2, hidden=(8,))
    >>> theta, task = policy.init(jax.random.key(0)), environment.sample(jax.random.key(1))
    >>> ms.rl.rollout(environment, policy, theta, task, jax.random.key(2)).rewards.shape
    (20,)
  """
  check_sizes(policy, theta, environment.observation_size, environment.action_size)
  theta, task = jax.lax.stop_gradient((theta, task))
  reset_key, steps_key = jax.random.split(key)

  def body(carry, keys):
    state, ended = carry
    observation = environment.observe(task, state)
    distribution = policy.apply(theta, observation)
    action = policy.sample(distribution, keys[0])
    log_prob = policy.log_prob(distribution, action)
    after, reward, terminated = environment.step(task, state, action, keys[1])
    after = jax.tree.map(lambda new, old: jnp.where(ended, old, new), after, state)
    reward = jnp.where(ended, 0, jnp.asarray(reward, jnp.result_type(reward, float)))
    return (after, ended | terminated), (observation, action, log_prob, reward, ~ended)

  start = (environment.reset(task, reset_key), jnp.zeros((), bool))
  keys = jax.random.split(steps_key, (environment.horizon, 2))
  (state, ended), (observations, actions, log_probs, rewards, valid) = jax.lax.scan(body, start, keys)
  last_observation = environment.observe(task, state)
  return Trajectories(observations, actions, log_probs, rewards, valid, ended, last_observation)


def collect(
  environment: Environment, policy: Policy, theta: PyTree, task: PyTree, key: chex.PRNGKey, *, num: int = 20
) -> Trajectories:
  """Returns `num` trajectories of one task, which are stepped together. Every leaf has the leading axis `[num]`.

  Args:
    environment: Environment that defines the dynamics.
    policy: Policy that draws the actions.
    theta: Parameters of the policy.
    task: Task from `environment.sample`.
    key: Random key, consumed. It is split into one key per trajectory.
    num: Number of trajectories B. The paper uses 20 before and 20 after the update (Li et al. 2017, section 4.3).

  Raises:
    ValueError: if `num` is not an integer of at least 1, or if the sizes of the policy are not those of the
      environment.

  Example:
    >>> environment, policy = ms.rl.navigation(horizon=20), ms.rl.gaussian(2, 2, hidden=(8,))
    >>> theta, task = policy.init(jax.random.key(0)), environment.sample(jax.random.key(1))
    >>> ms.rl.collect(environment, policy, theta, task, jax.random.key(2), num=3).actions.shape
    (3, 20, 2)
  """
  check_count('num (number of trajectories)', num)
  return jax.vmap(functools.partial(rollout, environment, policy, theta, task))(jax.random.split(key, num))


def undiscounted_return(trajectories: Trajectories) -> chex.Array:
  """Returns the sum of the rewards up to the end of each trajectory, `[…]`, in the environment's units.

  Args:
    trajectories: One or several trajectories, with rewards `[…, H]`.

  Example:
    >>> environment, policy = ms.rl.navigation(horizon=20), ms.rl.gaussian(2, 2, hidden=(8,))
    >>> theta, task = policy.init(jax.random.key(0)), environment.sample(jax.random.key(1))
    >>> trajectories = ms.rl.collect(environment, policy, theta, task, jax.random.key(2), num=3)
    >>> ms.rl.undiscounted_return(trajectories).shape
    (3,)
  """
  return jnp.sum(jnp.where(trajectories.valid, trajectories.rewards, 0), -1)


def check_sizes(policy: Policy, theta: PyTree, observation_size: int, action_size: int | None) -> int:
  """Returns the action size A of the policy with parameters `theta`, which may be abstract.

  Raises ValueError unless the policy has the given observation size O and action size A of an environment. If
  `action_size` is `None`, any action size is accepted.
  """
  observation = jax.ShapeDtypeStruct((observation_size,), jnp.result_type(float))
  try:
    distribution = jax.eval_shape(policy.apply, theta, observation)
    (found,) = jax.eval_shape(policy.sample, distribution, jax.random.key(0)).shape
  except Exception as e:  # Any error of the policy.
    raise ValueError(
      f"the policy cannot be applied to the environment's observations, whose shape is {observation.shape}, or its "
      "actions are not of shape (A,); build the policy with the environment's observation_size and action_size, and "
      f'give the parameters of this policy. The error is {type(e).__name__}: {e}'
    ) from e
  if found != (action_size or found):
    raise ValueError(
      f"the policy's actions have shape {(found,)}, and the environment's actions {(action_size,)}; "
      "build the policy with the environment's observation_size and action_size"
    )
  return found
