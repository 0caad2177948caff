"""Trajectories from Gymnasium environments, which are stepped on the host. The inner loop is the same as on the device.

This module needs the extra `gym`. Its functions cannot be jitted or vmapped, but their results can be passed to jitted
and vmapped functions.
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
from metasgd_jax.rl.rollout import check_sizes
from metasgd_jax.rl.types import Environment, Policy, Trajectories
from metasgd_jax.types import PyTree, check_count, equal_by_arguments

if TYPE_CHECKING:
  import gymnasium

Make = Callable[[Any], 'gymnasium.Env']
"""`task → environment`. Each call returns a new environment. The arrays of the task are NumPy arrays."""

Act = Callable[['gymnasium.Space', np.ndarray], Any]
"""`(action space, action) → action`: converts an action `[A]` of the policy to an action of the environment."""

_NEEDED = ('reset', 'step', 'close', 'unwrapped', 'observation_space', 'action_space')
_PARTS = {
  'reset': ('observation', 'info'),
  'step': ('observation', 'reward', 'terminated', 'truncated', 'info'),
}
"""Parts of the result of each method of a `gymnasium.Env`."""


def to_box(space: 'gymnasium.Space', action: np.ndarray) -> np.ndarray:
  """Returns low + (clip(a, −1, 1) + 1) / 2 · (high − low), which maps [−1, 1] to the bounds of a `Box`.

  The result has the shape and the dtype of the `Box`.
  """
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
  """Returns `num` trajectories of one task. Every leaf has the leading axis `[num]`, as in `collect` on the device.

  All `num` environments are stepped together: at each step one call of the jitted policy draws the actions for all
  environments. An environment that has ended is not stepped again. `terminated` of a trajectory is True if Gymnasium's
  `terminated` is True at its last step. If only Gymnasium's `truncated` is True there, the trajectory counts as ended
  by time, like one that reaches the horizon, and its `terminated` is False. Observations are flattened by
  `gymnasium.spaces.flatten`. Floating-point arrays have JAX's default float type, whatever the environment's type is.

  Args:
    make: Function `task → environment`. It is called `num` times, and each environment is closed at the end.
    policy: Policy that draws the actions.
    theta: Parameters of the policy. The trajectories have no gradient with respect to them.
    task: Task. Its arrays are converted to NumPy arrays before it is passed to `make`.
    key: Random key, consumed. It is split as in `collect`. Each trajectory has its own key for its start,
      and the seed of its environment is drawn from that key.
    horizon: Largest number of steps H of a trajectory.
    num: Number of trajectories B.
    act: Function that converts an action of the policy to an action of the environment; see `Act`.

  Raises:
    ImportError: if Gymnasium is not installed.
    ValueError: if `num` or `horizon` is not an integer of at least 1, if the action space is not a bounded `Box` and
      `act` is not given, if the policy has another observation size than the environment, or another action size while
      `act` is not given, if `make` returns the same environment twice, or if what an environment returns is not what
      Gymnasium's interface says. A reward may be NaN.

  Example:
    >>> import gymnasium
    >>> make = lambda gravity: gymnasium.make('Pendulum-v1', g=float(gravity))
    >>> policy = ms.rl.gaussian(3, 1, hidden=(8,))
    >>> theta, gravity = policy.init(jax.random.key(0)), jnp.array(9.8)
    >>> drawn = ms.rl.collect_on_host(make, policy, theta, gravity, jax.random.key(1), horizon=5, num=2)
    >>> drawn.observations.shape, drawn.actions.shape
    ((2, 5, 3), (2, 5, 1))
  """
  _gymnasium()  # Raises ImportError before anything else is done.
  check_count('num (number of trajectories)', num)
  check_count('horizon', horizon)
  theta, task = jax.lax.stop_gradient((theta, task))
  task = jax.device_get(task)
  reset_keys, action_keys = _keys(key, num, horizon)
  seeds = np.asarray(jax.vmap(jax.random.bits)(reset_keys))
  environments: list[Any] = []
  try:
    for _ in range(num):
      environments.append(_made(make, task))
    _check_distinct(environments)
    _check_actions(environments[0].action_space, act)
    check_sizes(policy, theta, *_sizes(environments[0], act))
    resets = [_parts(e.reset(seed=int(seed)), 'reset') for e, seed in zip(environments, seeds, strict=True)]
    now = [_flat(e, observation) for e, (observation, _) in zip(environments, resets, strict=True)]
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
        observation, reward, *flags, _ = _parts(environments[b].step(action), 'step')
        now[b] = _flat(environments[b], observation)
        terminated[b], truncated = map(_flag, flags)
        rewards[b, t], valid[b, t], ended[b] = _number(reward), True, terminated[b] or truncated
      if ended.all():
        break
  finally:
    for environment in environments:
      environment.close()
  return Trajectories(
    observations=_filled(observations, horizon),
    actions=_filled(actions, horizon),
    log_probs=_filled(log_probs, horizon),
    rewards=jnp.asarray(rewards),
    valid=jnp.asarray(valid),
    terminated=jnp.asarray(terminated),
    last_observation=jnp.asarray(np.stack(now).astype(real)),
  )


@equal_by_arguments
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
  """Builds the inner loop of `policy_gradient` for Gymnasium environments.

  `experience` and `explore` step environments on the host. They cannot be jitted or vmapped, and neither can functions
  that call them, such as those of `policy_learner`. Instead, loop over tasks, and jit `replay`, `surrogate` and
  functions that call only these two. `jax.grad` of the loss of `policy_learner` works.

  Args:
    make: Function `task → environment`, as in `collect_on_host`. `policy_gradient_on_host` itself calls `make` once,
      with the task that is sampled with key 0, to find the sizes of observations and actions.
    sample: Function `key → task`, which consumes key.
    policy: Policy that adapts.
    horizon: Largest number of steps H, as in `collect_on_host`.
    trajectories: Number of trajectories B, as in `policy_gradient`.
    advantage: How advantages are estimated, as in `policy_gradient`.
    act: Function that converts actions, as in `collect_on_host`.
    **options: Other options of `policy_gradient`.

  Raises:
    ImportError: if Gymnasium is not installed.
    ValueError: if `collect_on_host` or `policy_gradient` does not accept an argument.

  Example:
    >>> import gymnasium
    >>> make = lambda gravity: gymnasium.make('Pendulum-v1', g=float(gravity))
    >>> sample = lambda key: jax.random.uniform(key, minval=8, maxval=12)  # A task is its gravity.
    >>> policy = ms.rl.gaussian(3, 1, hidden=(8,))
    >>> inner = ms.rl.policy_gradient_on_host(make, sample, policy, horizon=5, trajectories=2)
    >>> meta, task = inner.init(jax.random.key(0)), sample(jax.random.key(1))
    >>> experiences, path = inner.explore(meta, task, jax.random.key(2))  # This call cannot be jitted.
    >>> adapted = jax.jit(inner.replay)(meta, experiences)
    >>> experiences[0].advantages.shape, jax.tree.structure(adapted) == jax.tree.structure(meta.theta)
    ((2, 5), True)
  """
  _gymnasium()  # Raises ImportError before anything else is done.
  check_count('horizon', horizon)
  example = _made(make, jax.device_get(sample(jax.random.key(0))))
  try:
    _check_actions(example.action_space, act)
    sizes = _sizes(example, act)
  finally:
    example.close()
  action_size = check_sizes(policy, jax.eval_shape(policy.init, jax.random.key(0)), *sizes)
  environment = Environment(sample, _only_on_host, _only_on_host, _only_on_host, sizes[0], action_size, horizon)
  inner = policy_gradient(environment, policy, trajectories=trajectories, advantage=advantage, **options)

  step = jax.jit(inner.step, static_argnums=3)

  def experience(theta, task, key) -> Experience:
    drawn = collect_on_host(make, policy, theta, task, key, horizon=horizon, num=trajectories, act=act)
    return Experience(drawn, _advantages(drawn, advantage))

  return inner._replace(experience=experience, explore=explorer(experience, step, inner.steps))


_advantages = jax.jit(advantages, static_argnums=1)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _keys(key, num, horizon):
  """Splits `key` as in `rollout`, into keys for the starts of trajectories, `[B]`, and for their actions, `[H, B]`."""

  def one(key):
    reset_key, steps_key = jax.random.split(key)
    return reset_key, jax.random.split(steps_key, (horizon, 2))[:, 0]

  return jax.vmap(one, out_axes=(0, 1))(jax.random.split(key, num))


@functools.partial(jax.jit, static_argnums=0)
def _draw(policy, theta, observations, keys):
  distributions = policy.apply(theta, observations)
  actions = jax.vmap(policy.sample)(distributions, keys)
  return actions, policy.log_prob(distributions, actions)


def _made(make: Make, task: PyTree) -> Any:
  environment: Any = make(task)
  if not all(hasattr(environment, name) for name in _NEEDED):
    raise ValueError(f'`make` must return a gymnasium.Env, got {environment!r:.80}; return the environment')
  return environment


def _parts(result: Any, method: str) -> tuple:
  """Returns the result of an environment's method. Raises ValueError if it does not have the parts in `_PARTS`."""
  if not isinstance(result, tuple) or len(result) != len(_PARTS[method]):
    raise ValueError(
      f'{method} must return ({", ".join(_PARTS[method])}), got {result!r:.80}; '
      'environments of the old gym need a wrapper, such as shimmy'
    )
  return result


def _flat(environment, observation) -> np.ndarray:
  space, spaces = environment.observation_space, _gymnasium().spaces
  try:
    flat = np.ravel(spaces.flatten(space, observation))
  except (LookupError, OverflowError, TypeError, ValueError):
    flat = np.empty(0)
  if flat.shape != (spaces.flatdim(space),):
    raise ValueError(f'an observation must be from {space}, got {observation!r:.80}; change what reset and step return')
  return flat


def _filled(steps: list[np.ndarray], horizon: int) -> jax.Array:
  """Stacks the arrays `[B, …]` of h steps into one array `[B, H, …]`. The last array is repeated H − h times."""
  return jnp.asarray(np.stack([*steps, *steps[-1:] * (horizon - len(steps))], 1))


def _sizes(environment, act: Act) -> tuple[int, int | None]:
  """Returns the observation size and the action size. The latter is `None` if `act` may accept actions of any size."""
  flatdim = _gymnasium().spaces.flatdim
  return flatdim(environment.observation_space), flatdim(environment.action_space) if act is to_box else None


def _check_actions(space, act: Act) -> None:
  bounded = isinstance(space, _gymnasium().spaces.Box) and bool(np.all(np.isfinite([space.low, space.high])))
  if act is to_box and not bounded:
    raise ValueError(
      f'the default `act` scales actions to the finite bounds of a Box, but the action space is {space}; '
      'set `act` to a function that converts actions'
    )


def _check_distinct(environments: list) -> None:
  if len({id(environment.unwrapped) for environment in environments}) < len(environments):
    raise ValueError(
      f'`make` must return a new environment at each call, got the same {environments[0].unwrapped} again; '
      'build the environment inside `make`'
    )


def _number(reward: Any) -> float:
  try:
    if not isinstance(reward, str | bytes):
      return float(reward)
  except (TypeError, ValueError):
    pass
  raise ValueError(f'the reward of a step must be a number, got {reward!r:.80}; change what step returns')


def _flag(value: Any) -> bool:
  if np.ndim(value) or not any(value is flag or value == flag for flag in (True, False)):
    raise ValueError(f'`terminated` and `truncated` of a step must be True or False, got {value!r:.80}')
  return bool(value)


def _only_on_host(*args):
  del args
  raise RuntimeError(
    'a Gymnasium environment runs only on the host, so its `reset`, `observe` and `step` cannot be called; '
    'call `collect_on_host`, or `experience` or `explore` of the result of `policy_gradient_on_host`'
  )


def _gymnasium():
  try:
    import gymnasium
  except ImportError as error:
    raise ImportError('Gymnasium is not installed; run pip install gymnasium') from error
  return gymnasium
