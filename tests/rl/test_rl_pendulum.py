"""The pendulum against Gymnasium's own, step by step."""

import jax
import numpy as np
import pytest
from gymnasium.envs.classic_control.pendulum import PendulumEnv
from problems import saying

from metasgd_jax.rl.pendulum import GYMNASIUM, VARIED, Pendulum, PendulumConfig, Swing, pendulum
from metasgd_jax.rl.policies import gaussian
from metasgd_jax.rl.rollout import collect


def of_gymnasium(task, state):
  env = PendulumEnv(g=float(task.gravity))
  env.m, env.l = float(task.mass), float(task.length)
  env.reset(seed=0)
  env.state = np.array(state, np.float64)
  return env


@jax.jit
def step(task, state, action):
  """The state after, the reward, whether the task ended it, and what is observed then."""
  environment = pendulum()
  state, reward, ended = environment.step(task, state, action, jax.random.key(0))
  return state, reward, ended, environment.observe(task, state)


@pytest.mark.parametrize(
  'constants', [(10.0, 1.0, 1.0), (9.0, 0.8, 1.2), (12.0, 1.2, 0.8), (3.7, 1.0, 1.5), (10.0, 0.3, 0.5)]
)
def test_states_and_rewards_are_gymnasiums(constants):
  rng = np.random.default_rng(1)
  with jax.enable_x64(True):
    task = Pendulum(*map(np.asarray, constants))
    state = Swing(*map(np.asarray, rng.uniform(-1, 1, 2) * (np.pi, 1)))
    env = of_gymnasium(task, state)
    spun = False
    for _ in range(200):
      action = rng.normal(0.5, 1.0, 1)  # Some are clipped; leaning one way, so that it swings through several turns.
      expected, reward, terminated, _, _ = env.step(2 * action)
      state, found, ended, observed = step(task, state, action)
      np.testing.assert_allclose(state, env.state, rtol=1e-8, atol=1e-8)
      np.testing.assert_allclose(found, reward, rtol=1e-8)
      np.testing.assert_allclose(observed, expected, rtol=2e-6, atol=2e-6)  # Theirs is float32.
      assert bool(ended) is terminated is False
      spun |= abs(float(state.angle)) > np.pi
    assert spun, 'the angle was never wrapped'


def test_velocity_is_bounded_as_gymnasiums():
  with jax.enable_x64(True):
    task = Pendulum(*map(np.asarray, (10.0, 0.3, 0.3)))
    for velocity, action in ((7.9, 1.0), (-7.9, -1.0)):
      state = Swing(np.asarray(np.sign(velocity) * 1.5), np.asarray(velocity))
      env = of_gymnasium(task, state)
      env.step(np.array([2 * action]))
      state, _, _, _ = step(task, state, np.array([action]))
      assert abs(state.velocity) == 8
      np.testing.assert_allclose(state, env.state, rtol=1e-12)


@pytest.mark.parametrize(('action', 'torque'), [(0.5, 1.0), (1.0, 2.0), (4.0, 2.0), (-4.0, -2.0)])
def test_actions_are_cut_to_one_and_scaled_to_the_largest_torque(action, torque):
  # Upright and at rest, without gravity: ω′ = 3 u Δ / (m l²), and the reward is the torque's alone.
  task = Pendulum(*map(np.float32, (0.0, 2.0, 0.5)))
  state, reward, _, _ = step(task, Swing(np.float32(0), np.float32(0)), np.array([action], np.float32))
  np.testing.assert_allclose(state.velocity, 3 * torque * 0.05 / (2 * 0.25), rtol=1e-6)
  np.testing.assert_allclose(reward, -0.001 * torque**2, rtol=1e-6)


def test_starts_are_gymnasiums_box():
  environment = pendulum()
  reset = lambda key: environment.reset(environment.sample(jax.random.key(0)), key)
  starts = jax.jit(lambda key: jax.vmap(reset)(jax.random.split(key, 4000)))(jax.random.key(1))
  for values, high in zip(starts, (np.pi, 1.0), strict=True):
    assert np.abs(values).max() <= high * (1 + 1e-6)
    np.testing.assert_allclose(
      np.quantile(values, [0.25, 0.5, 0.75]), high * np.array([-0.5, 0, 0.5]), atol=0.06 * high
    )


@pytest.mark.parametrize('config', [VARIED, GYMNASIUM, PendulumConfig(gravity=(-1.0, 1.0))])
def test_tasks_are_uniform_in_their_ranges(config):
  draw = jax.jit(lambda key: jax.vmap(pendulum(config).sample)(jax.random.split(key, 4000)))
  tasks = jax.device_get(draw(jax.random.key(0)))
  for values, (low, high) in zip(tasks, (config.gravity, config.mass, config.length), strict=True):
    assert low <= values.min() <= values.max() <= high
    quartiles = np.quantile(values, [0.25, 0.5, 0.75])
    np.testing.assert_allclose(quartiles, low + (high - low) * np.array([0.25, 0.5, 0.75]), atol=0.04 * (high - low))


@pytest.mark.parametrize(('wide', 'dtype'), [(False, np.float32), (True, np.float64)])
def test_a_rollout_is_ended_by_time_alone(wide, dtype):
  with jax.enable_x64(wide):
    environment, policy = pendulum(horizon=20), gaussian(3, 1, hidden=())
    act = lambda key: collect(environment, policy, policy.init(key), environment.sample(key), key, num=3)
    drawn = jax.device_get(jax.jit(act)(jax.random.key(0)))
    assert drawn.observations.shape == (3, 20, 3)
    assert drawn.observations.dtype == drawn.rewards.dtype == dtype
    assert drawn.valid.all()
    assert not drawn.terminated.any()
    np.testing.assert_allclose(drawn.observations[..., 0] ** 2 + drawn.observations[..., 1] ** 2, 1, rtol=1e-6)


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (lambda: pendulum(horizon=0), ['horizon', 'at least 1', '0']),
    (lambda: PendulumConfig(gravity=(10.0, 9.0)), ['gravity', 'low <= high', '(10.0, 9.0)']),
    (lambda: PendulumConfig(mass=(0.0, 1.0)), ['mass', 'above 0', '(0.0, 1.0)']),
    (lambda: PendulumConfig(length=(-1.0, 1.0)), ['length', 'above 0', '(-1.0, 1.0)']),
  ],
)
def test_what_it_refuses(make, message):
  with pytest.raises(ValueError, match=saying(*message)):
    make()
