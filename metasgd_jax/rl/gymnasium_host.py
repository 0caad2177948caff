"""Gymnasium's environments, stepped on the host, as trajectories for the same inner loop.

Needs the extra `gym`. What is here can't be jitted or vmapped, but what it returns goes into functions that are.
"""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from metasgd_jax.rl.advantages import MAML_ADVANTAGES, AdvantageConfig, advantages
from metasgd_jax.rl.learner import Experience, PolicyGradient, explorer, policy_gradient
from metasgd_jax.rl.navigation import check_horizon
from metasgd_jax.rl.rollout import check_num
from metasgd_jax.rl.types import Environment, Policy, Trajectories
from metasgd_jax.types import PyTree

if TYPE_CHECKING:
  import gymnasium

Make = Callable[[Any], 'gymnasium.Env']
"""`task → environment`, a new one at each call; the task's arrays are NumPy's."""

Act = Callable[['gymnasium.Space', np.ndarray], Any]
"""`(action space, action [A] of the policy) →` the action that the environment takes."""


def to_box(space: 'gymnasium.Space', action: np.ndarray) -> np.ndarray:
  """Returns low + (clip(a, −1, 1) + 1) / 2 · (high − low): [−1, 1] onto the bounds of a `Box`, in its shape."""
  box: Any = space
  share = (np.clip(np.asarray(action, np.float64), -1, 1).reshape(box.shape) + 1) / 2
  return (box.low + share * (np.asarray(box.high, np.float64) - box.low)).astype(box.dtype)


def collect_on_host(
  make: Make,
  policy: Policy,
  theta: PyTree,
  task: PyTree,
  key: chex.PRNGKey,
  *,
  horizon: int,
  num: int = 20,
  act: Act = to_box,
) -> Trajectories:
  """Returns `num` trajectories of one task, `[num]` in front of every leaf, as `collect` does on the device.

  All `num` environments step together: at each step the policy is called once, jitted, for all of them. One that has
  ended waits. `terminated` is Gymnasium's; its `truncated` ends a trajectory as `horizon` does, by time. Observations
  are flattened by the space's own `flatten`. Arrays have JAX's default float type, whatever the environment's.

  Args:
    make: `task → environment`, called `num` times; each is closed at the end.
    policy: draws the actions.
    theta: the policy's parameters; no gradient goes through.
    task: handed to `make`, its arrays as NumPy's.
    key: consumed, split as in `collect`; an environment's seed is drawn from the key of its start.
    horizon: H, steps at the most.
    num: B.
    act: how the policy's action becomes the environment's.

  Raises:
    ImportError: Gymnasium is not installed.
    ValueError: num or horizon is no integer of at least 1, or an action space that is no bounded `Box` (unless `act`
      is given).

  Example:
    >>> import gymnasium
    >>> make = lambda gravity: gymnasium.make('Pendulum-v1', g=float(gravity))
    >>> policy = ms.rl.gaussian(3, 1, hidden=(8,))
    >>> theta, gravity = policy.init(jax.random.key(0)), jnp.array(9.8)
    >>> drawn = ms.rl.collect_on_host(make, policy, theta, gravity, jax.random.key(1), horizon=5, num=2)
    >>> drawn.observations.shape, drawn.actions.shape
    ((2, 5, 3), (2, 5, 1))
  """
  gymnasium = _gymnasium()
  check_num(num)
  check_horizon(horizon)
  theta, task = jax.lax.stop_gradient((theta, task))
  task = jax.device_get(task)
  reset_keys, action_keys = _keys(key, num, horizon)
  seeds = np.asarray(jax.vmap(jax.random.bits)(reset_keys))
  environments: list[Any] = []
  try:
    for _ in range(num):
      environments.append(make(task))
    _check_actions(environments[0].action_space, act)
    flat = lambda b, o: np.ravel(gymnasium.spaces.flatten(environments[b].observation_space, o))
    now = [flat(b, e.reset(seed=int(seed))[0]) for b, (e, seed) in enumerate(zip(environments, seeds, strict=True))]
    real = np.dtype(jnp.result_type(float))
    rewards, valid = np.zeros((num, horizon), real), np.zeros((num, horizon), bool)
    terminated, ended = np.zeros(num, bool), np.zeros(num, bool)
    observations, actions, log_probs = [], [], []
    for t in range(horizon):
      observations.append(np.stack(now).astype(real))
      drawn = jax.device_get(_draw(policy, theta, observations[-1], action_keys[t]))
      actions.append(drawn[0])
      log_probs.append(drawn[1])
      for b in np.flatnonzero(~ended):
        action = act(environments[b].action_space, drawn[0][b])
        observation, reward, terminated[b], truncated, _ = environments[b].step(action)
        now[b] = flat(b, observation)
        rewards[b, t], valid[b, t], ended[b] = reward, True, terminated[b] or truncated
      if ended.all():
        break
  finally:
    for environment in environments:
      environment.close()
  front = lambda steps: jnp.asarray(_filled(np.stack(steps, 1), horizon))
  return Trajectories(
    observations=front(observations),
    actions=front(actions),
    log_probs=front(log_probs),
    rewards=jnp.asarray(rewards),
    valid=jnp.asarray(valid),
    terminated=jnp.asarray(terminated),
    last_observation=jnp.asarray(np.stack(now).astype(real)),
  )


def policy_gradient_on_host(
  make: Make,
  sample: Callable[[chex.PRNGKey], PyTree],
  policy: Policy,
  *,
  horizon: int,
  trajectories: int = 20,
  advantage: AdvantageConfig = MAML_ADVANTAGES,
  act: Act = to_box,
  **options: Any,
) -> PolicyGradient:
  """Builds the inner loop of `policy_gradient` in Gymnasium's environments.

  `experience` and `explore` step environments on the host, so neither they nor what is made of them, such as
  `policy_learner`'s functions, can be jitted or vmapped: loop over tasks, and jit `replay`, `surrogate` and what is
  made of these. `jax.grad` of `policy_learner`'s loss works.

  Args:
    make: as in `collect_on_host`; called once here too, with a task of key 0, for the sizes.
    sample: `key → task`; consumes key.
    policy: what adapts.
    horizon: H, as in `collect_on_host`.
    trajectories: B, as in `policy_gradient`.
    advantage: as in `policy_gradient`.
    act: as in `collect_on_host`.
    **options: of `policy_gradient`.

  Raises:
    ImportError: Gymnasium is not installed.
    ValueError: as `collect_on_host` and `policy_gradient`.

  Example:
    >>> import gymnasium
    >>> make = lambda gravity: gymnasium.make('Pendulum-v1', g=float(gravity))
    >>> sample = lambda key: jax.random.uniform(key, minval=8, maxval=12)  # A task is its gravity.
    >>> policy = ms.rl.gaussian(3, 1, hidden=(8,))
    >>> inner = ms.rl.policy_gradient_on_host(make, sample, policy, horizon=5, trajectories=2)
    >>> meta, task = inner.init(jax.random.key(0)), sample(jax.random.key(1))
    >>> experiences, path = inner.explore(meta, task, jax.random.key(2))  # Not to be jitted; what follows may be.
    >>> adapted = jax.jit(inner.replay)(meta, experiences)
    >>> experiences[0].advantages.shape, jax.tree.structure(adapted) == jax.tree.structure(meta.theta)
    ((2, 5), True)
  """
  gymnasium = _gymnasium()
  check_horizon(horizon)
  example = make(jax.device_get(sample(jax.random.key(0))))
  try:
    _check_actions(example.action_space, act)
    size, action_size = (gymnasium.spaces.flatdim(space) for space in (example.observation_space, example.action_space))
  finally:
    example.close()
  environment = Environment(sample, _only_on_host, _only_on_host, _only_on_host, size, action_size, horizon)
  inner = policy_gradient(environment, policy, trajectories=trajectories, advantage=advantage, **options)

  step = jax.jit(inner.step, static_argnums=3)

  def experience(theta, task, key) -> Experience:
    drawn = collect_on_host(make, policy, theta, task, key, horizon=horizon, num=trajectories, act=act)
    return Experience(drawn, _advantages(drawn, advantage))

  return inner._replace(experience=experience, explore=explorer(experience, step, inner.steps))


_advantages = jax.jit(advantages, static_argnums=1)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _keys(key, num, horizon):
  """Each trajectory's key for its start `[B]`, and those for its actions `[H, B]`, split as `rollout` does."""

  def one(key):
    reset_key, steps_key = jax.random.split(key)
    return reset_key, jax.random.split(steps_key, (horizon, 2))[:, 0]

  return jax.vmap(one, out_axes=(0, 1))(jax.random.split(key, num))


@functools.partial(jax.jit, static_argnums=0)
def _draw(policy, theta, observations, keys):
  distributions = policy.apply(theta, observations)
  actions = jax.vmap(policy.sample)(distributions, keys)
  return actions, policy.log_prob(distributions, actions)


def _filled(values: np.ndarray, horizon: int) -> np.ndarray:
  """Values `[B, h, …]` with the last of them up to the horizon, `[B, H, …]`."""
  return np.concatenate([values, np.repeat(values[:, -1:], horizon - values.shape[1], 1)], 1)


def _check_actions(space, act: Act) -> None:
  bounded = isinstance(space, _gymnasium().spaces.Box) and bool(np.all(np.isfinite([space.low, space.high])))
  if act is to_box and not bounded:
    raise ValueError(f'to_box scales actions to the bounds of a Box, and the action space is {space}; give act')


def _only_on_host(*args):
  del args
  raise RuntimeError('a Gymnasium environment is stepped by collect_on_host, which experience and explore use')


def _gymnasium():
  try:
    import gymnasium
  except ImportError as error:
    raise ImportError("Gymnasium is not installed; pip install 'metasgd_jax[gym]'") from error
  return gymnasium
