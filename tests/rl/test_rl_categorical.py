"""The policy for discrete actions."""

import finite_mdp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from problems import saying

import metasgd_jax as ms
from metasgd_jax import rl

POLICY = rl.categorical(3, 4, hidden=(5,))


def by_hand(theta, x):
  hidden = np.maximum(x @ theta['Dense_0']['kernel'] + theta['Dense_0']['bias'], 0)
  return scipy.special.log_softmax(hidden @ theta['Dense_1']['kernel'] + theta['Dense_1']['bias'], -1)


@pytest.fixture(scope='module')
def theta():
  return jax.tree.map(
    lambda a: np.asarray(a, np.float64) + 0.1, jax.device_get(jax.jit(POLICY.init)(jax.random.key(0)))
  )


def test_probabilities_and_divergence_are_those_of_numpy(theta):
  x = np.random.default_rng(0).normal(size=(2, 6, 3))
  other = jax.tree.map(lambda a: 0.5 * a, theta)
  actions = np.random.default_rng(1).integers(0, 4, (2, 6, 1)).astype(np.float64)
  with jax.enable_x64(True):
    p, q = POLICY.apply(theta, x), POLICY.apply(other, x)
    found = POLICY.log_prob(p, jnp.asarray(actions)), POLICY.kl(p, q)
  log_p, log_q = by_hand(theta, x), by_hand(other, x)
  np.testing.assert_allclose(found[0], np.take_along_axis(log_p, actions.astype(int), -1)[..., 0], rtol=1e-10)
  np.testing.assert_allclose(found[1], scipy.special.rel_entr(np.exp(log_p), np.exp(log_q)).sum(-1), rtol=1e-8)


def test_actions_are_drawn_with_their_probabilities(theta):
  distribution = POLICY.apply(theta, jnp.array([0.3, -1.0, 2.0]))
  keys = jax.random.split(jax.random.key(0), 20_000)
  actions = np.asarray(jax.jit(jax.vmap(lambda key: POLICY.sample(distribution, key)))(keys))
  assert actions.shape == (20_000, 1)
  assert actions.dtype == np.float32
  shares = np.bincount(actions[:, 0].astype(int), minlength=4) / len(actions)
  np.testing.assert_allclose(shares, np.exp(by_hand(theta, np.array([0.3, -1.0, 2.0]))), atol=0.015)


def test_an_inner_step_is_that_of_a_table_with_the_same_logits():
  """Without hidden layers, and with observations that are rows of the identity, θ is a table of logits."""
  environment = finite_mdp.environment(finite_mdp.random_mdp())
  linear, table = rl.categorical(finite_mdp.STATES, finite_mdp.ACTIONS, hidden=()), finite_mdp.table_policy()
  theta = linear.init(jax.random.key(0))

  def adapted(policy, theta):
    inner = rl.policy_gradient(environment, policy, trajectories=6, alpha=0.3)
    learner, tasks = rl.policy_learner(inner), rl.task_distribution(environment)
    episode = tasks.episode(tasks.sample(jax.random.key(1)), jax.random.key(2))
    return learner.adapt(ms.MetaParams(theta, None), episode.support, jax.random.key(3))

  ours, theirs = (
    jax.jit(lambda: adapted(linear, theta))(),
    jax.jit(lambda: adapted(table, theta['Dense_0']['kernel']))(),
  )
  moved = ours['Dense_0']['kernel'] - theta['Dense_0']['kernel']
  np.testing.assert_allclose(moved, theirs - theta['Dense_0']['kernel'], rtol=1e-4, atol=1e-6)
  assert float(jnp.abs(moved).max()) > 1e-3


@pytest.mark.parametrize(
  ('sizes', 'hidden', 'message'),
  [
    ((0, 2), (4,), ('observation_size', 'at least 1', 'got 0')),
    ((3, 1), (4,), ('choices', 'at least 2', 'got 1')),
    ((3, 2), (0,), ('hidden', 'at least 1', 'got 0')),
  ],
)
def test_sizes_that_cannot_be(sizes, hidden, message):
  with pytest.raises(ValueError, match=saying(*message)):
    rl.categorical(*sizes, hidden=hidden)
