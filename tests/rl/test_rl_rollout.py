import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import assert_close, assert_trees_close, saying

from metasgd_jax import rl
from metasgd_jax.rl import policies

H = 9
POLICY = rl.gaussian(2, 1, hidden=(5,), std=0.5)


def walk(bound):
  """A walk with noise on a line, with a drift of its own in each task; ends where |x| goes beyond the bound."""

  def step(task, state, action, key):
    x, n = state
    x = x + action[0] + task + 0.3 * jax.random.normal(key)
    return (x, n + 1), -jnp.abs(x), jnp.abs(x) > bound

  return rl.Environment(
    sample=lambda key: 0.2 * jax.random.normal(key),
    reset=lambda task, key: (0.1 * jax.random.normal(key), jnp.zeros((), jnp.int32)),
    observe=lambda task, state: jnp.stack([state[0], state[1] / H]),
    step=step,
    observation_size=2,
    action_size=1,
    horizon=H,
  )


ENVIRONMENT = walk(bound=1.0)
THETA = jax.device_get(jax.jit(POLICY.init)(jax.random.key(5)))
TASK = np.float32(0.15)


@jax.jit
def reset(task, key):
  reset_key, steps_key = jax.random.split(key)
  return ENVIRONMENT.reset(task, reset_key), jax.random.split(steps_key, (H, 2))


@jax.jit
def step(task, state, keys):
  """What happens on one step, the state after it, whether the task ends there, and what is seen then."""
  observation = ENVIRONMENT.observe(task, state)
  distribution = POLICY.apply(THETA, observation)
  action = POLICY.sample(distribution, keys[0])
  state, reward, terminated = ENVIRONMENT.step(task, state, action, keys[1])
  happened = observation, action, POLICY.log_prob(distribution, action), reward
  return happened, state, terminated, ENVIRONMENT.observe(task, state)


def by_loop(task, key):
  """One trajectory as a list of what happened on each step, whether the task ended it, and what was seen last."""
  state, keys = reset(task, key)
  steps = []
  for step_keys in keys:
    happened, state, terminated, last = step(task, state, step_keys)
    steps.append(jax.device_get(happened))
    if terminated:
      break
  return steps, bool(terminated), last


@pytest.fixture(scope='module')
def drawn():
  key = jax.random.key(2)
  collect = jax.jit(functools.partial(rl.collect, ENVIRONMENT, POLICY, num=12))
  return jax.random.split(key, 12), jax.device_get(collect(THETA, TASK, key))


def test_trajectories_equal_a_loop_and_nothing_counts_after_the_end(drawn):
  keys, trajectories = drawn
  lengths = trajectories.valid.sum(-1)
  assert len(set(lengths)) > 1, lengths
  assert 0 < trajectories.terminated.sum() < 12  # Some the task ended, some time did.
  returns = rl.undiscounted_return(trajectories)
  for b in range(12):
    steps, terminated, last = by_loop(TASK, keys[b])
    one, n = jax.tree.map(lambda a, b=b: a[b], trajectories), len(steps)
    assert bool(one.terminated) == terminated
    np.testing.assert_array_equal(one.valid, np.arange(H) < n)
    found = (one.observations, one.actions, one.log_probs, one.rewards)
    for expected, values in zip(zip(*steps, strict=True), found, strict=True):
      assert_close(values[:n], np.stack(expected), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(one.rewards[n:], 0)
    assert_close(one.last_observation, last, rtol=1e-4, atol=1e-5)
    assert_close(returns[b], sum(float(step[3]) for step in steps), rtol=1e-4)


def test_an_end_on_the_last_step_is_the_tasks():
  """The step that time would have ended, had the task not."""
  environment = ENVIRONMENT._replace(
    step=lambda task, state, action, key: ((state[0], state[1] + 1), jnp.ones(()), state[1] + 1 == task)
  )
  roll = jax.jit(lambda task: rl.rollout(environment, POLICY, THETA, task, jax.random.key(0)))
  by_task, by_time, early = roll(H), roll(H + 1), roll(1)
  assert by_task.terminated
  assert by_task.valid.all()
  assert not by_time.terminated
  assert by_time.valid.all()
  assert early.terminated
  np.testing.assert_array_equal(early.valid, np.arange(H) == 0)
  assert rl.undiscounted_return(early) == 1


@pytest.mark.parametrize('dtype', [np.int32, bool])
def test_rewards_that_are_no_floats_become_floats(dtype):
  """The inner loop differentiates a surrogate of them."""
  environment = ENVIRONMENT._replace(
    step=lambda task, state, action, key: ((state[0], state[1] + 1), (state[1] < 4).astype(dtype), False)
  )
  inner = rl.policy_gradient(environment, POLICY, trajectories=2, advantage=rl.AdvantageConfig(baseline=False))
  explored, _ = jax.eval_shape(inner.explore, jax.eval_shape(inner.init, jax.random.key(0)), TASK, jax.random.key(1))
  assert explored[0].trajectories.rewards.dtype == explored[0].advantages.dtype == np.float32
  one = jax.jit(functools.partial(rl.rollout, environment, POLICY))(THETA, TASK, jax.random.key(0))
  np.testing.assert_array_equal(one.rewards, np.arange(H) < 4)


def test_collect_is_rollout_for_each_key(drawn):
  keys, trajectories = drawn
  roll = jax.jit(functools.partial(rl.rollout, ENVIRONMENT, POLICY))
  for b in range(3):
    one = roll(THETA, TASK, keys[b])
    assert_trees_close(jax.tree.map(lambda a, b=b: a[b], trajectories), one, rtol=1e-4, atol=1e-5)


def test_batched_over_tasks_equals_a_loop():
  keys = jax.random.split(jax.random.key(3), 4)
  tasks = jax.jit(jax.vmap(ENVIRONMENT.sample))(keys)
  collect = functools.partial(rl.collect, ENVIRONMENT, POLICY, THETA, num=3)
  batched, one_by_one = jax.jit(lambda *about: (jax.vmap(collect)(*about), jax.lax.map(lambda a: collect(*a), about)))(
    tasks, keys
  )
  assert_trees_close(batched, one_by_one, rtol=1e-4, atol=1e-5)


def test_no_gradient_goes_through():
  def total(theta, task):
    one = rl.rollout(ENVIRONMENT, POLICY, theta, task, jax.random.key(0))
    return sum(jnp.sum(leaf) for leaf in (one.rewards, one.log_probs, one.observations, one.last_observation))

  for grad in jax.tree.leaves(jax.jit(jax.grad(total, (0, 1)))(THETA, TASK)):
    np.testing.assert_array_equal(grad, 0)


def test_double_precision():
  with jax.enable_x64(True):
    draw = lambda key: rl.collect(ENVIRONMENT, POLICY, POLICY.init(key), ENVIRONMENT.sample(key), key, num=2)
    drawn = jax.eval_shape(draw, jax.random.key(0))
  floats = [leaf.dtype for leaf in (drawn.observations, drawn.actions, drawn.log_probs, drawn.rewards)]
  assert floats == [np.float64] * 4


@pytest.mark.parametrize('num', [0, -1, 2.0, True])
def test_a_number_of_trajectories_that_is_none(num):
  with pytest.raises(ValueError, match=saying('num (number of trajectories)', 'at least 1', num)):
    rl.collect(ENVIRONMENT, POLICY, THETA, TASK, jax.random.key(0), num=num)


@pytest.mark.parametrize(
  ('sizes', 'message'),
  [
    ((3, 1), ['observations', '(2,)', 'observation_size']),
    ((2, 2), ["policy's actions", '(2,)', '(1,)', 'action_size']),
  ],
)
def test_a_policy_of_another_size(sizes, message):
  with pytest.raises(ValueError, match=saying(*message)):
    policy = rl.gaussian(*sizes)
    rl.collect(ENVIRONMENT, policy, policy.init(jax.random.key(0)), TASK, jax.random.key(0), num=1)


class TestGaussian:
  @pytest.fixture(autouse=True)
  def float64(self):
    with jax.enable_x64(True):
      yield

  def test_network_against_numpy(self):
    policy = rl.gaussian(3, 2, hidden=(7, 4))
    theta = jax.tree.map(lambda a: np.asarray(a) + 0.1, jax.jit(policy.init)(jax.random.key(0)))
    observations = np.random.default_rng(0).normal(size=(5, 6, 3))
    x = observations
    for i in range(3):
      layer = theta[f'Dense_{i}']
      x = np.einsum('bhi,io->bho', x, layer['kernel']) + layer['bias'][None, None]
      x = np.maximum(x, 0) if i < 2 else x
    found, one = jax.jit(lambda *about: (policy.apply(*about), policy.apply(about[0], about[1][2, 3])))(
      theta, observations
    )
    np.testing.assert_allclose(found.mean, x, rtol=1e-12)
    np.testing.assert_allclose(found.log_std, 0.1, rtol=1e-12)
    np.testing.assert_allclose(one.mean, x[2, 3], rtol=1e-12)

  def test_start(self):
    theta = jax.device_get(jax.jit(rl.gaussian(30, 20, hidden=(50,), std=0.3).init)(jax.random.key(0)))
    for name, inputs, outputs in (('Dense_0', 30, 50), ('Dense_1', 50, 20)):
      kernel, limit = theta[name]['kernel'], math.sqrt(6 / (inputs + outputs))
      assert kernel.shape == (inputs, outputs)
      assert np.abs(kernel).max() <= limit
      np.testing.assert_allclose(kernel.std(), limit / math.sqrt(3), rtol=0.05)
      np.testing.assert_array_equal(theta[name]['bias'], 0)
    np.testing.assert_allclose(np.exp(theta['log_std']), 0.3)

  def test_deviation_has_a_floor(self):
    policy = rl.gaussian(2, 1, hidden=(), std=0.5, min_std=0.1)
    theta = {'Dense_0': {'kernel': np.ones((2, 1)), 'bias': np.zeros(1)}, 'log_std': np.full(1, -9.0)}
    np.testing.assert_allclose(np.exp(jax.jit(policy.apply)(theta, np.zeros(2)).log_std), 0.1)

  def test_log_prob_and_divergence_by_integration(self):
    p, q = (rl.Gaussian(np.array([m]), np.array([math.log(s)])) for m, s in ((0.3, 0.7), (-0.5, 1.2)))
    x = np.linspace(-12, 12, 200_001)
    spread = lambda d: rl.Gaussian(*(np.broadcast_to(leaf, (x.size, 1)) for leaf in d))
    log_p, log_q = (np.asarray(jax.jit(policies.log_prob)(spread(d), x[:, None])) for d in (p, q))
    np.testing.assert_allclose(np.trapezoid(np.exp(log_p), x), 1, rtol=1e-9)
    found = jax.jit(policies.kl)(p, q)
    np.testing.assert_allclose(found, np.trapezoid(np.exp(log_p) * (log_p - log_q), x), rtol=1e-9)

  def test_entries_are_independent(self):
    rng = np.random.default_rng(0)
    p, q = (rl.Gaussian(*rng.normal(size=(2, 3))) for _ in range(2))
    actions = rng.normal(size=3)
    log_prob, kl = jax.jit(policies.log_prob), jax.jit(policies.kl)
    entry = lambda d, j: jax.tree.map(lambda a: a[j : j + 1], d)
    expected = sum(log_prob(entry(p, j), actions[j : j + 1]) for j in range(3))
    np.testing.assert_allclose(log_prob(p, actions), expected, rtol=1e-12)
    np.testing.assert_allclose(kl(p, q), sum(kl(entry(p, j), entry(q, j)) for j in range(3)))

  def test_samples_have_its_moments(self):
    d = rl.Gaussian(np.array([0.3, -2.0]), np.log([0.5, 2.0]))
    draw = jax.jit(lambda key: jax.vmap(lambda key: POLICY.sample(d, key))(jax.random.split(key, 20_000)))
    draws = np.asarray(draw(jax.random.key(0)))
    np.testing.assert_allclose(draws.mean(0), d.mean, atol=0.05)
    np.testing.assert_allclose(np.cov(draws.T), np.diag([0.25, 4.0]), atol=0.1)

  @pytest.mark.parametrize(
    ('options', 'message'),
    [
      (dict(observation_size=0), ['observation_size', 'at least 1', '0']),
      (dict(action_size=1.5), ['action_size', 'at least 1', '1.5']),
      (dict(hidden=(4, 0)), ['hidden', 'at least 1', '0']),
      (dict(std=0.0), ['at least min_std', 'std=0.0']),
      (dict(std=0.1, min_std=0.2), ['at least min_std', 'std=0.1', 'min_std=0.2']),
    ],
  )
  def test_bad_options(self, options, message):
    with pytest.raises(ValueError, match=saying(*message)):
      rl.gaussian(**(dict(observation_size=2, action_size=1) | options))
