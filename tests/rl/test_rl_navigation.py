"""2D navigation against a loop in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import saying

from metasgd_jax.rl.navigation import Navigation, navigation
from metasgd_jax.rl.rollout import collect, undiscounted_return
from metasgd_jax.rl.types import Policy


def walk(start, goal, actions, max_step=0.1, tolerance=0.01):
  """Positions, rewards and the number of steps until the end, by a loop in float64."""
  position = np.array(start, np.float64)
  positions, rewards = [position.copy()], []
  for action in np.asarray(actions, np.float64):
    for i in range(2):
      position[i] += max_step * min(max(action[i], -1.0), 1.0)
    positions.append(position.copy())
    rewards.append(-np.hypot(position[0] - goal[0], position[1] - goal[1]))
    if abs(position[0] - goal[0]) < tolerance and abs(position[1] - goal[1]) < tolerance:
      return positions, rewards, True
  return positions, rewards, False


def straight(task):
  """A policy without noise that takes the largest step towards the goal that does not pass it, in each coordinate."""
  apply = lambda theta, position: (task.goal - position) / 0.1
  zeros = lambda distribution, actions: jnp.zeros(actions.shape[:-1], actions.dtype)
  return Policy(lambda key: {}, apply, lambda distribution, key: distribution, zeros, zeros)


@functools.partial(jax.jit, static_argnums=0)
def step(start, task, position, action):
  """The position after, the reward and whether the goal is reached; and what was observed before."""
  environment = navigation(start)
  return *environment.step(task, position, action, jax.random.key(0)), environment.observe(task, position)


@pytest.mark.parametrize('start', ['fixed', 'varying'])
def test_steps_are_those_of_a_loop(start):
  environment = navigation(start)
  rng = np.random.default_rng(0)
  with jax.enable_x64(True):
    begin = jax.jit(lambda key: (task := environment.sample(key), environment.reset(task, key)))
    for key in jax.random.split(jax.random.key(0), 5):
      task, state = begin(key)
      actions = rng.normal(size=(30, 2)) * 1.5  # A third of them is clipped.
      positions, rewards, ended = walk(task.start, task.goal, actions)
      for t, reward in enumerate(rewards):
        state, found, terminated, observed = step(start, task, state, actions[t])
        np.testing.assert_allclose(observed, positions[t], atol=1e-14)
        np.testing.assert_allclose(found, reward, rtol=1e-12)
        assert bool(terminated) == (ended and t == len(rewards) - 1)


def task_at(*goal):
  return Navigation(np.zeros(2, np.float32), np.array(goal, np.float32))


def points(*values):
  return [np.array(value, np.float32) for value in values]


@pytest.mark.parametrize(
  ('action', 'move'),
  [
    ((0.5, -0.25), (0.05, -0.025)),
    ((1.0, -1.0), (0.1, -0.1)),
    ((7.0, -0.3), (0.1, -0.03)),
    ((-9.0, -2.0), (-0.1, -0.1)),
  ],
)
def test_actions_are_cut_to_one_and_then_scaled(action, move):
  state, _, _, _ = step('fixed', task_at(0.3, 0.4), *points([0.2, -0.1], action))
  np.testing.assert_allclose(state, np.add([0.2, -0.1], move), atol=1e-7)


def test_a_position_may_leave_the_square():
  state, reward, _, _ = step('fixed', task_at(0, 0), *points([2.0, 0.0], [1.0, 0.0]))
  np.testing.assert_allclose(state, [2.1, 0])
  np.testing.assert_allclose(reward, -2.1, rtol=1e-6)


@pytest.mark.parametrize(
  ('gap', 'ends'),
  [((0.009, -0.009), True), ((0.0, 0.0), True), ((0.011, 0.0), False), ((0.0, -0.011), False), ((0.3, 0.3), False)],
)
def test_the_goal_is_reached_when_both_coordinates_are_near(gap, ends):
  task = task_at(0.3, -0.2)
  before, action = points([0.1, 0.0], [1.0, 0.0])
  _, reward, terminated, _ = step('fixed', task, task.goal - before + points(gap)[0], action)
  assert bool(terminated) == ends
  np.testing.assert_allclose(reward, -np.hypot(*gap), atol=1e-6)


@pytest.mark.parametrize('start', ['fixed', 'varying'])
def test_both_task_sets(start):
  draw = jax.jit(lambda key: jax.vmap(navigation(start).sample)(jax.random.split(key, 4000)))
  tasks = jax.device_get(draw(jax.random.key(0)))
  drawn = [tasks.goal] if start == 'fixed' else [tasks.goal, tasks.start]
  for values in drawn:
    assert values.shape == (4000, 2)
    assert np.abs(values).max() <= 0.5
    quartiles = np.quantile(values, [0.25, 0.5, 0.75], axis=0)
    np.testing.assert_allclose(quartiles, np.array([[-0.25] * 2, [0.0] * 2, [0.25] * 2]), atol=0.03)
    assert abs(np.corrcoef(values.T)[0, 1]) < 0.05
  if start == 'fixed':
    assert not np.any(tasks.start)
  else:
    assert np.abs(np.corrcoef(tasks.start.T, tasks.goal.T)[:2, 2:]).max() < 0.05


def test_walking_straight_to_the_goal_by_hand():
  # From (0, 0) to (0.25, −0.4), at most 0.1 in a coordinate: (0.1, −0.1), (0.2, −0.2), (0.25, −0.3), (0.25, −0.4).
  task = task_at(0.25, -0.4)
  expected = [-np.hypot(0.15, 0.3), -np.hypot(0.05, 0.2), -0.1, 0.0]
  act = jax.jit(functools.partial(collect, navigation(), straight(task), num=2))
  drawn = act({}, task, jax.random.key(0))
  assert drawn.observations.shape == (2, 100, 2)
  assert drawn.valid.sum(1).tolist() == [4, 4]
  assert drawn.terminated.tolist() == [True, True]
  np.testing.assert_allclose(drawn.rewards[0, :4], expected, atol=1e-6)
  np.testing.assert_allclose(undiscounted_return(drawn), [sum(expected)] * 2, rtol=1e-6)
  np.testing.assert_allclose(drawn.last_observation[0], task.goal, atol=1e-6)


def test_the_horizon_ends_a_walk_that_does_not_arrive():
  task = task_at(0.45, 0.0)
  drawn = jax.jit(functools.partial(collect, navigation(horizon=3), straight(task), num=1))({}, task, jax.random.key(0))
  assert drawn.valid.tolist() == [[True] * 3]
  assert not drawn.terminated[0]
  np.testing.assert_allclose(undiscounted_return(drawn), [-0.35 - 0.25 - 0.15], rtol=1e-6)


def test_dtypes_follow_the_task():
  environment = navigation('varying')

  def drawn(key):
    task = environment.sample(key)
    state, reward, _ = environment.step(task, environment.reset(task, key), jnp.ones(2), key)
    return task, state, reward

  for wide, dtype in ((False, np.float32), (True, np.float64)):
    with jax.enable_x64(wide):
      assert {leaf.dtype for leaf in jax.tree.leaves(jax.eval_shape(drawn, jax.random.key(0)))} == {np.dtype(dtype)}


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    (dict(start='random'), ['start', "'fixed', 'varying'", "'random'"]),
    (dict(horizon=0), ['horizon', 'at least 1', '0']),
    (dict(horizon=True), ['horizon', 'at least 1', 'True']),
    (dict(max_step=0.0), ['max_step', 'above 0', '0.0']),
    (dict(tolerance=float('nan')), ['tolerance', 'finite', 'nan']),
  ],
)
def test_what_it_refuses(options, message):
  with pytest.raises(ValueError, match=saying(*message)):
    navigation(**options)
