"""Trajectories of Gymnasium's environments against those of the device."""

import functools
import sys
import types

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium.envs.classic_control.pendulum import PendulumEnv
from problems import saying

from metasgd_jax import adapt
from metasgd_jax.inner.alpha import AlphaConfig
from metasgd_jax.rl import gymnasium_host
from metasgd_jax.rl.advantages import AdvantageConfig, advantages
from metasgd_jax.rl.gymnasium_host import collect_on_host, policy_gradient_on_host, to_box
from metasgd_jax.rl.learner import RolloutRequest, policy_gradient, policy_learner
from metasgd_jax.rl.pendulum import pendulum
from metasgd_jax.rl.policies import gaussian
from metasgd_jax.rl.rollout import collect
from metasgd_jax.rl.surrogate import dice
from metasgd_jax.types import Batch, Episode

H, B = 30, 4
POLICY = gaussian(3, 1, hidden=(4,))
ADVANTAGE = AdvantageConfig(ridge=1e-2)  # cos² + sin² = 1 leaves the fit of few steps to the ridge.


class Starting(PendulumEnv):
  """Gymnasium's pendulum with a task's constants, from a given state."""

  def __init__(self, task, start):
    super().__init__(g=float(task.gravity))
    self.m, self.l, self.start = float(task.mass), float(task.length), start

  def reset(self, **options):
    super().reset(**options)
    self.state = np.array(self.start, np.float64)
    return self._get_obs(), {}


ENVIRONMENT = pendulum(horizon=H)


@jax.jit
def starts_of(task, key):
  """Where `collect` begins each trajectory."""
  reset = lambda key: ENVIRONMENT.reset(task, jax.random.split(key)[0])
  return jnp.stack(jax.vmap(reset)(jax.random.split(key, B)), -1)


def starting(keys):
  """`make`, whose environments start where trajectories do that `collect` draws with these keys, one after another."""
  starts = []

  def make(task):
    if not starts:
      starts.extend(np.asarray(starts_of(task, keys.pop(0))))
    return Starting(task, starts.pop(0))

  return make


class Count(gymnasium.Env):
  """Counts to `last`, and says how often each of these was closed."""

  observation_space = gymnasium.spaces.Dict(
    {'count': gymnasium.spaces.Discrete(9), 'seen': gymnasium.spaces.Box(-np.inf, np.inf, (2, 1), np.float64)}
  )
  action_space = gymnasium.spaces.Box(np.array([0.0, -3.0], np.float32), np.array([1.0, 5.0], np.float32))

  def __init__(self, last, log=None):
    self.last, self.log = last, [] if log is None else log

  def _now(self):
    return {'count': self.count, 'seen': np.array([[self.count], [self.start]])}

  def reset(self, *, seed=None, options=None):
    super().reset(seed=seed)
    self.log.append(seed)
    self.count, self.start = 0, float(self.np_random.random())
    return self._now(), {}

  def step(self, action):
    assert self.action_space.contains(action)
    assert self.count < self.last, 'stepped after the end'
    self.count += 1
    return self._now(), float(action[1]), self.count == self.last, False, {}

  def close(self):
    self.log.append('closed')


COUNTING = gaussian(11, 2, hidden=())
THETA = {'Dense_0': {'kernel': np.full((11, 2), 0.1, np.float32), 'bias': np.zeros(2, np.float32)}}
THETA |= {'log_std': np.zeros(2, np.float32)}


def close(a, b, rtol=2e-4, atol=2e-5):
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=rtol, atol=atol), a, b)


@jax.jit
def task_and_theta(key):
  return ENVIRONMENT.sample(key), POLICY.init(key)


collect_on_device = jax.jit(functools.partial(collect, ENVIRONMENT, POLICY, num=B))


def collect_both(seed):
  (task, theta), key = task_and_theta(jax.random.key(seed)), jax.random.key(seed + 2)
  found = collect_on_host(starting([key]), POLICY, theta, task, key, horizon=H, num=B)
  return theta, found, collect_on_device(theta, task, key)


@pytest.mark.parametrize('seed', [0, 10])
def test_pendulum_on_the_host_is_the_pendulum_on_the_device(seed):
  _, found, expected = collect_both(seed)
  assert [a.dtype for a in found] == [a.dtype for a in expected]
  close(found, expected)  # Gymnasium's actions and observations are float32, its state float64.


def test_adapt_runs_on_the_hosts_trajectories():
  theta, found, expected = collect_both(20)

  def loss_fn(theta, drawn):
    log_probs = POLICY.log_prob(POLICY.apply(theta, drawn.observations), drawn.actions)
    return -jnp.mean(jax.vmap(dice)(log_probs, drawn.log_probs, advantages(drawn, ADVANTAGE), drawn.valid))

  step = jax.jit(functools.partial(adapt, loss_fn=loss_fn))
  adapted = step(theta, 0.1, found)
  close(adapted, step(theta, 0.1, expected), rtol=1e-3, atol=1e-4)
  moved = jax.tree.leaves(jax.tree.map(lambda a, b: np.abs(np.subtract(a, b)).max(), adapted, theta))
  assert min(moved) > 2e-3


def after_one(make):
  """`make`, but for the first call, which asks for sizes."""
  calls = []

  def f(task):
    calls.append(task)
    return make(task) if len(calls) > 1 else Starting(task, (0, 0))

  return f


def test_inner_loop_and_meta_gradient_are_those_of_the_device():
  task, _ = task_and_theta(jax.random.key(30))
  options = dict(trajectories=B, steps=2, rates=(1.0, 0.5), alpha=AlphaConfig(0.1, 0.1), advantage=ADVANTAGE)
  key, act_key = jax.random.split(jax.random.key(3))
  keys = [*jax.random.split(key, 2), act_key]
  on_host = policy_gradient_on_host(after_one(starting(keys)), ENVIRONMENT.sample, POLICY, horizon=H, **options)
  assert on_host.environment[4:] == ENVIRONMENT[4:] == (3, 1, H)
  on_device = policy_gradient(ENVIRONMENT, POLICY, **options)
  meta = jax.jit(on_device.init)(jax.random.key(4))
  close(jax.jit(on_host.init)(jax.random.key(4)), meta, 0, 0)
  episode = Episode(task, Batch(RolloutRequest(task, act_key), task))
  of = lambda inner: jax.value_and_grad(policy_learner(inner).loss, has_aux=True)
  (_, found), grads = of(on_host)(meta, episode, key)
  (_, info), expected = jax.jit(of(on_device))(meta, episode, key)
  assert not keys
  close(found, info, rtol=1e-3)
  flat = lambda tree: np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
  assert np.linalg.norm(flat(grads) - flat(expected)) < 1e-3 * np.linalg.norm(flat(expected))


def test_ends_by_the_task_by_its_time_limit_and_by_the_horizon():
  lasts = iter([3, 6, 8, 8])  # The task's end, that and the time limit at once, the time limit, and again.
  make = lambda task: gymnasium.wrappers.TimeLimit(Count(next(lasts)), 6)
  drawn = collect_on_host(make, COUNTING, THETA, None, jax.random.key(1), horizon=7, num=4)
  assert drawn.valid.sum(1).tolist() == [3, 6, 6, 6]
  assert all(row == sorted(row, reverse=True) for row in drawn.valid.tolist())
  assert drawn.terminated.tolist() == [True, True, False, False]
  assert drawn.observations.shape == (4, 7, 11)
  assert not np.any(np.where(drawn.valid, 0, drawn.rewards))
  assert drawn.last_observation[:, 9].tolist() == [3, 6, 6, 6]
  lasts = iter([8, 2])
  drawn = collect_on_host(lambda task: Count(next(lasts)), COUNTING, THETA, None, jax.random.key(1), horizon=4, num=2)
  assert drawn.valid.sum(1).tolist() == [4, 2]
  assert drawn.terminated.tolist() == [False, True]


def test_what_is_stored_belongs_together():
  drawn = jax.device_get(
    collect_on_host(lambda task: Count(task), COUNTING, THETA, 8, jax.random.key(1), horizon=5, num=2)
  )
  for t in range(5):
    one_hot = np.eye(9)[t]
    np.testing.assert_array_equal(drawn.observations[:, t, :9], [one_hot, one_hot])  # Before the step.
  again = lambda drawn: COUNTING.log_prob(COUNTING.apply(THETA, drawn.observations), drawn.actions)
  log_probs = jax.jit(again)(drawn)
  close(drawn.log_probs, log_probs)
  close(drawn.rewards, -3 + 8 * (np.clip(drawn.actions[..., 1], -1, 1) + 1) / 2)


def test_trajectories_are_a_function_of_the_key():
  log = []
  collect_ = lambda seed: collect_on_host(
    lambda task: Count(5, log), COUNTING, THETA, None, jax.random.key(seed), horizon=5, num=3
  )
  first, again, other = collect_(0), collect_(0), collect_(1)
  jax.tree.map(np.testing.assert_array_equal, first, again)
  seeds = [s for s in log if s != 'closed']
  assert seeds[:3] == seeds[3:6]
  assert len(set(seeds)) == 6
  starts = [d.observations[:, 0, 10].tolist() for d in (first, other)]
  assert len(set(starts[0] + starts[1])) == 6
  assert len(set(np.ravel(first.actions).tolist() + np.ravel(other.actions).tolist())) == 60
  assert log.count('closed') == 9


def test_environments_are_closed_after_an_error():
  log = []
  make = lambda task: Count(2, log)
  with pytest.raises(RuntimeError, match='no action'):
    collect_on_host(make, COUNTING, THETA, None, jax.random.key(1), horizon=4, num=3, act=refuse)
  assert log.count('closed') == 3


def test_one_environment_for_all_trajectories_is_refused():
  shared = Count(5)
  for make in (lambda task: shared, lambda task: gymnasium.Wrapper(shared)):
    with pytest.raises(ValueError, match=saying('a new environment at each call', 'inside `make`')):
      collect_on_host(make, COUNTING, THETA, None, jax.random.key(1), horizon=2, num=2)


class Odd(Count):
  """An environment whose steps are not as Gymnasium's interface says."""

  def __init__(self, change):
    super().__init__(5)
    self.change = change

  def step(self, action):
    return self.change(*super().step(action))


@pytest.mark.parametrize(
  ('change', 'said'),
  [
    (lambda obs, reward, *rest: (obs, None, *rest), ('reward of a step must be a number', 'got None')),
    (lambda obs, reward, *rest: (obs, '1.5', *rest), ('reward of a step must be a number', "got '1.5'")),
    (lambda obs, reward, end, *rest: (obs, reward, np.nan, *rest), ('`terminated`', 'True or False', 'got nan')),
    (lambda obs, reward, end, *rest: (obs, reward, None, *rest), ('`terminated`', 'True or False', 'got None')),
    (lambda obs, reward, end, cut, info: (obs, reward, end, info), ('step must return', 'truncated', 'got (')),
    (lambda obs, *rest: ((*obs, 1), *rest), ('an observation must be from', 'got (', 'change what')),
  ],
)
def test_a_step_that_is_not_as_the_interface_says(change, said):
  with pytest.raises(ValueError, match=saying(*said)):
    collect_on_host(lambda task: Odd(change), COUNTING, THETA, None, jax.random.key(1), horizon=2, num=2)


def test_a_reset_that_is_not_as_the_interface_says(monkeypatch):
  for result, said in (
    (None, ('reset must return (observation, info)', 'got None', 'wrapper')),
    ((np.zeros(3), {}), ('an observation must be from', 'got array([0., 0., 0.])')),
  ):
    monkeypatch.setattr(Count, 'reset', lambda self, seed, result=result: result)
    with pytest.raises(ValueError, match=saying(*said)):
      collect_on_host(lambda task: Count(5), COUNTING, THETA, None, jax.random.key(1), horizon=2, num=2)


@pytest.mark.parametrize(
  ('space', 'value'), [(gymnasium.spaces.Discrete(3), 3), (gymnasium.spaces.Box(0, 255, (1,), np.uint8), 256)]
)
def test_an_observation_that_its_space_cannot_hold(space, value):
  with pytest.raises(ValueError, match=saying('an observation must be from', f'got {value}')):
    gymnasium_host._flat(types.SimpleNamespace(observation_space=space), value)


def test_what_is_no_environment():
  with pytest.raises(ValueError, match=saying('`make` must return a gymnasium.Env', 'got None')):
    collect_on_host(lambda task: None, COUNTING, THETA, None, jax.random.key(1), horizon=2, num=2)


@pytest.mark.parametrize(
  ('policy', 'message'),
  [
    (gaussian(3, 2, hidden=()), ['policy', 'observations', '(11,)', 'observation_size']),
    (gaussian(11, 1, hidden=()), ["policy's actions", '(1,)', '(2,)', 'action_size']),
  ],
  ids=['observation', 'action'],
)
def test_a_policy_of_another_size(policy, message):
  log = []
  make = lambda task: Count(5, log)
  for call in (
    lambda: collect_on_host(make, policy, policy.init(jax.random.key(0)), 0, jax.random.key(1), horizon=2, num=1),
    lambda: policy_gradient_on_host(make, lambda key: 0, policy, horizon=2),
  ):
    with pytest.raises(ValueError, match=saying(*message)):
      call()
  assert log == ['closed', 'closed']


def refuse(space, action):
  raise RuntimeError('no action')


def test_actions_of_another_kind():
  policy = gaussian(4, 1, hidden=())
  theta = {'Dense_0': {'kernel': np.full((4, 1), 0.1, np.float32), 'bias': np.zeros(1, np.float32)}}
  theta |= {'log_std': np.zeros(1, np.float32)}
  act = lambda space, action: int(action[0] > 0)
  make = lambda task: gymnasium.make('CartPole-v1', disable_env_checker=True)
  drawn = jax.device_get(collect_on_host(make, policy, theta, None, jax.random.key(1), horizon=40, num=3, act=act))
  steps = drawn.valid.sum(1)
  assert np.all((steps > 5) & (drawn.terminated | (steps == 40)))  # Chance does not balance a pole for long.
  np.testing.assert_array_equal(drawn.rewards.sum(1), steps)
  assert np.all(np.abs(drawn.observations[:, 0]) <= 0.05)
  inner = policy_gradient_on_host(make, lambda key: 0, policy, horizon=40, act=act)
  assert (inner.environment.observation_size, inner.environment.action_size) == (4, 1)
  with pytest.raises(ValueError, match=saying('bounds of a Box', 'Discrete(2)', 'set `act`')):
    collect_on_host(make, policy, theta, None, jax.random.key(1), horizon=40)
  endless = gymnasium.spaces.Box(-np.inf, 1, (1,))
  with pytest.raises(ValueError, match='bounds of a Box'):
    policy_gradient_on_host(lambda task: _with(Count(2), endless), lambda key: 0, COUNTING, horizon=3)


def _with(env, action_space):
  env.action_space = action_space
  return env


def test_actions_are_scaled_to_the_box():
  box = gymnasium.spaces.Box(np.array([[0.0], [-3.0]], np.float32), np.array([[1.0], [5.0]], np.float32))
  for action, expected in (((-1, -1), (0, -3)), ((1, 1), (1, 5)), ((0, 0.5), (0.5, 3)), ((9, -9), (1, -3))):
    found = to_box(box, np.array(action, np.float32))
    assert box.contains(found)
    np.testing.assert_allclose(found, np.reshape(expected, (2, 1)), rtol=1e-6)


def test_float64():
  with jax.enable_x64(True):
    (task, theta), key = task_and_theta(jax.random.key(0)), jax.random.key(2)
    drawn = collect_on_host(starting([key]), POLICY, theta, task, key, horizon=3, num=B)
    assert drawn.observations.dtype == drawn.rewards.dtype == np.float64


def test_built_anew_from_equal_arguments_it_is_equal():
  make, sample = lambda task: Count(5), lambda key: 0
  first, again, other = (policy_gradient_on_host(make, sample, COUNTING, horizon=h) for h in (5, 5, 6))
  assert first == again
  assert hash(first) == hash(again)
  assert first != other


def test_the_device_cannot_step_it():
  inner = policy_gradient_on_host(lambda task: Count(5), lambda key: 0, COUNTING, horizon=5)
  assert (inner.environment.observation_size, inner.environment.action_size) == (11, 2)
  with pytest.raises(RuntimeError, match='collect_on_host'):
    collect(inner.environment, COUNTING, THETA, 0, jax.random.key(0))


def test_without_gymnasium(monkeypatch):
  monkeypatch.setitem(sys.modules, 'gymnasium', None)
  for call in (
    lambda: collect_on_host(Count, COUNTING, {}, 3, jax.random.key(0), horizon=5),
    lambda: policy_gradient_on_host(Count, lambda key: 3, COUNTING, horizon=5),
  ):
    with pytest.raises(ImportError, match=saying('Gymnasium is not installed', 'pip install gymnasium')):
      call()


@pytest.mark.parametrize(
  ('options', 'message'),
  [(dict(horizon=0), ['horizon', 'at least 1', '0']), (dict(horizon=3, num=0), ['num', 'trajectories', '0'])],
)
def test_what_it_refuses(options, message):
  with pytest.raises(ValueError, match=saying(*message)):
    collect_on_host(Count, COUNTING, {}, 3, jax.random.key(0), **options)
