"""Surrogates against the exact expected return of a process whose every trajectory is enumerated."""

import functools
import itertools

import finite_mdp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from finite_mdp import HORIZON, STATES, all_trajectories, expected_return, random_mdp, table_policy, under

import metasgd_jax as ms
from metasgd_jax.rl import surrogate

POLICY = table_policy()
BASELINES = {
  'none': lambda: np.zeros((STATES, HORIZON)),
  'arbitrary': lambda: np.random.default_rng(7).normal(size=(STATES, HORIZON)) * 3,
}


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


@pytest.fixture(params=[0, 1])
def mdp(request):
  return random_mdp(request.param)


def draw_theta(seed=3):
  return jnp.asarray(np.random.default_rng(seed).normal(size=(STATES, finite_mdp.ACTIONS)))


def advantages_of(drawn, baseline):
  """Returns to go less a value of state and time, undiscounted."""
  values = jnp.einsum('nts,st->nt', drawn.observations, jnp.asarray(baseline))
  estimate = functools.partial(ms.rl.generalized_advantages, discount=1.0, decay=1.0)
  return jax.vmap(estimate)(drawn.rewards, values, drawn.valid)


def expected_surrogate(function, theta, data):
  """Σ_τ p(τ) surrogate(τ), p under the θ that sampled."""
  drawn, probabilities, advantages = data
  log_probs = POLICY.log_prob(POLICY.apply(theta, drawn.observations), drawn.actions)
  return probabilities @ jax.vmap(function)(log_probs, drawn.log_probs, advantages, drawn.valid)


def sampled(mdp, theta, baseline):
  drawn, weights = all_trajectories(mdp)
  drawn, probabilities = under(POLICY, theta, drawn, weights)
  return drawn, probabilities, advantages_of(drawn, baseline)


def test_the_enumeration_is_whole(mdp):
  theta = draw_theta()
  drawn, probabilities, _ = sampled(mdp, theta, BASELINES['none']())
  np.testing.assert_allclose(np.sum(probabilities), 1, rtol=1e-12)
  np.testing.assert_allclose(probabilities @ drawn.rewards.sum(-1), expected_return(mdp, theta), rtol=1e-12)


@pytest.mark.parametrize('baseline', BASELINES)
class TestDerivativesAtTheThetaThatSampled:
  def test_all_have_the_gradient_of_the_expected_return(self, mdp, baseline):
    theta = draw_theta()
    data = sampled(mdp, theta, BASELINES[baseline]())
    expected = jax.grad(expected_return, 1)(mdp, theta)
    for function in (surrogate.dice, surrogate.likelihood_ratio, surrogate.score):
      gradient = jax.grad(expected_surrogate, 1)(function, theta, data)
      np.testing.assert_allclose(gradient, expected, rtol=1e-10, atol=1e-12)

  def test_dice_has_its_second_and_third_derivatives_and_the_others_have_not(self, mdp, baseline):
    theta = draw_theta()
    data = sampled(mdp, theta, BASELINES[baseline]())
    expected = jax.hessian(expected_return, 1)(mdp, theta)
    hessian = jax.hessian(expected_surrogate, 1)
    np.testing.assert_allclose(hessian(surrogate.dice, theta, data), expected, rtol=1e-9, atol=1e-11)
    third = jax.jacfwd(jax.hessian(expected_return, 1), 1)(mdp, theta)
    np.testing.assert_allclose(jax.jacfwd(hessian, 1)(surrogate.dice, theta, data), third, rtol=1e-8, atol=1e-10)
    for function in (surrogate.likelihood_ratio, surrogate.score):
      difference = np.linalg.norm(hessian(function, theta, data) - expected)
      assert difference > 0.05 * np.linalg.norm(expected), function


@pytest.mark.parametrize('baseline', BASELINES)
def test_dice_is_the_expected_return_elsewhere_too(mdp, baseline):
  theta, elsewhere = draw_theta(3), draw_theta(4)
  data = sampled(mdp, theta, BASELINES[baseline]())
  value, gradient = jax.value_and_grad(expected_surrogate, 1)(surrogate.dice, elsewhere, data)
  gained = expected_return(mdp, elsewhere) - expected_return(mdp, theta)
  np.testing.assert_allclose(value, gained, rtol=1e-10)
  np.testing.assert_allclose(gradient, jax.grad(expected_return, 1)(mdp, elsewhere), rtol=1e-10, atol=1e-12)


def meta_gradient(mdp, theta, alpha, inner, baseline):
  """D/d(θ, α) of the outer surrogate after one inner step, each expectation a sum over all trajectories."""

  def outer(meta):
    data = sampled(mdp, theta, baseline)
    loss = lambda t, data: -expected_surrogate(inner, t, data)
    adapted = ms.adapt(meta.theta, meta.alpha, data, loss_fn=loss)
    return expected_surrogate(surrogate.likelihood_ratio, adapted, sampled(mdp, adapted, baseline))

  return jax.grad(outer)(ms.MetaParams(theta, alpha))


@pytest.mark.parametrize('baseline', BASELINES)
def test_the_meta_policy_gradient_is_that_of_the_return_after_adapting(mdp, baseline):
  theta = draw_theta()
  alpha = jnp.asarray(np.random.default_rng(5).uniform(-0.5, 2.0, theta.shape))

  def return_after(meta):
    gradient = jax.grad(expected_return, 1)(mdp, meta.theta)
    return expected_return(mdp, meta.theta + meta.alpha * gradient)

  expected = jax.grad(return_after)(ms.MetaParams(theta, alpha))
  found = meta_gradient(mdp, theta, alpha, surrogate.dice, BASELINES[baseline]())
  np.testing.assert_allclose(found.theta, expected.theta, rtol=1e-9, atol=1e-11)
  np.testing.assert_allclose(found.alpha, expected.alpha, rtol=1e-9, atol=1e-11)
  biased = meta_gradient(mdp, theta, alpha, surrogate.score, BASELINES[baseline]())
  np.testing.assert_allclose(biased.alpha, expected.alpha, rtol=1e-9, atol=1e-11)  # It has first derivatives only.
  assert np.linalg.norm(biased.theta - expected.theta) > 0.01 * np.linalg.norm(expected.theta)


def test_formulas_against_loops():
  rng = np.random.default_rng(0)
  log_probs, before, advantages = rng.normal(size=(3, 6))
  valid = np.arange(6) < 4
  dice = ratio = score = 0.0
  for t in range(4):
    until = np.prod([np.exp(log_probs[s] - before[s]) for s in range(t + 1)])
    earlier = np.prod([np.exp(log_probs[s] - before[s]) for s in range(t)])
    dice += (until - earlier) * advantages[t]
    ratio += np.exp(log_probs[t] - before[t]) * advantages[t]
    score += log_probs[t] * advantages[t]
  for name, expected in (('dice', dice), ('lvc', ratio), ('score', score)):
    function = surrogate.surrogate_of(name)
    np.testing.assert_allclose(function(*map(jnp.asarray, (log_probs, before, advantages, valid))), expected)


def test_what_lies_after_the_end_counts_for_nothing():
  valid = jnp.array([True, True, False, False])
  arrays = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)))
  for name, junk in itertools.product(('dice', 'lvc', 'score'), (1e3, np.inf, np.nan)):
    function = surrogate.surrogate_of(name)
    clean = jax.value_and_grad(function)(*arrays, valid)
    spoilt = jax.value_and_grad(function)(*jnp.where(valid[None], arrays, junk), valid)
    np.testing.assert_array_equal(clean[0], spoilt[0])
    np.testing.assert_array_equal(clean[1][:2], spoilt[1][:2])
    np.testing.assert_array_equal(spoilt[1][2:], 0)


def test_an_unknown_estimator_is_named():
  with pytest.raises(ValueError, match=r"estimator must be one of \('dice', 'lvc', 'score'\), got 'reinforce'"):
    surrogate.surrogate_of('reinforce')
