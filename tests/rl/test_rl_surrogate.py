"""Surrogates against the exact expected return of a process whose every trajectory is enumerated."""

import functools
import itertools

import finite_mdp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from finite_mdp import HORIZON, STATES, all_trajectories, expected_return, random_mdp, table_policy, under
from problems import saying

import metasgd_jax as ms
from metasgd_jax.rl import surrogate

POLICY = table_policy()
BASELINES = {
  'none': np.zeros((STATES, HORIZON)),
  'arbitrary': np.random.default_rng(7).normal(size=(STATES, HORIZON)) * 3,
}
FUNCTIONS = {'dice': surrogate.dice, 'lvc': surrogate.likelihood_ratio, 'score': surrogate.score}


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


@functools.cache
def enumerated(seed):
  """A process, and its trajectories with what of their probability is not the policy's."""
  mdp = random_mdp(seed)
  return mdp, jax.device_get(all_trajectories(mdp))


@pytest.fixture(params=[0, 1])
def process(request):
  return enumerated(request.param)


def draw_theta(seed=3):
  return np.random.default_rng(seed).normal(size=(STATES, finite_mdp.ACTIONS))


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


def sampled(trajectories, theta, baseline):
  drawn, probabilities = under(POLICY, theta, *trajectories)
  return drawn, probabilities, advantages_of(drawn, baseline)


def test_the_enumeration_is_whole(process):
  mdp, trajectories = process
  theta = draw_theta()
  drawn, probabilities, _ = jax.jit(sampled)(trajectories, theta, BASELINES['none'])
  np.testing.assert_allclose(np.sum(probabilities), 1, rtol=1e-12)
  np.testing.assert_allclose(probabilities @ drawn.rewards.sum(-1), expected_return(mdp, theta), rtol=1e-12)


@jax.jit
def derivatives(process, theta, baseline):
  """First to third of the expected return, and of the surrogates: of these but DiCE the third are left out."""
  mdp, trajectories = process
  data = sampled(trajectories, theta, baseline)
  found = {'return': functools.partial(expected_return, mdp)}
  found |= {name: functools.partial(expected_surrogate, f, data=data) for name, f in FUNCTIONS.items()}
  third = {name: jax.jacfwd(jax.hessian(found[name]))(theta) for name in ('return', 'dice')}
  return *({name: of(f)(theta) for name, f in found.items()} for of in (jax.grad, jax.hessian)), third


@pytest.mark.parametrize('baseline', BASELINES)
class TestDerivativesAtTheThetaThatSampled:
  def test_all_have_the_gradient_of_the_expected_return(self, process, baseline):
    gradient, _, _ = derivatives(process, draw_theta(), BASELINES[baseline])
    for name in FUNCTIONS:
      np.testing.assert_allclose(gradient[name], gradient['return'], rtol=1e-10, atol=1e-12)

  def test_dice_has_its_second_and_third_derivatives_and_the_others_have_not(self, process, baseline):
    _, hessian, third = derivatives(process, draw_theta(), BASELINES[baseline])
    expected = hessian['return']
    np.testing.assert_allclose(hessian['dice'], expected, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(third['dice'], third['return'], rtol=1e-8, atol=1e-10)
    for name in ('lvc', 'score'):
      assert np.linalg.norm(hessian[name] - expected) > 0.05 * np.linalg.norm(expected), name


@jax.jit
def dice_elsewhere(process, theta, elsewhere, baseline):
  """The return at θ; and there with its slope, and DiCE's, of the trajectories of θ."""
  mdp, trajectories = process
  data = sampled(trajectories, theta, baseline)
  of_dice = lambda theta: expected_surrogate(surrogate.dice, theta, data)
  of_return = functools.partial(expected_return, mdp)
  return of_return(theta), jax.value_and_grad(of_return)(elsewhere), jax.value_and_grad(of_dice)(elsewhere)


@pytest.mark.parametrize('baseline', BASELINES)
def test_dice_is_the_expected_return_elsewhere_too(process, baseline):
  here, there, found = dice_elsewhere(process, draw_theta(3), draw_theta(4), BASELINES[baseline])
  np.testing.assert_allclose(found[0], there[0] - here, rtol=1e-10)
  np.testing.assert_allclose(found[1], there[1], rtol=1e-10, atol=1e-12)


@jax.jit
def meta_gradients(process, theta, alpha, baseline):
  """D/d(θ, α) of the return after an exact step; and of the outer surrogate after one step by DiCE, and by score.

  Each expectation is a sum over all trajectories.
  """
  mdp, trajectories = process

  def return_after(meta):
    gradient = jax.grad(expected_return, 1)(mdp, meta.theta)
    return expected_return(mdp, meta.theta + meta.alpha * gradient)

  def outer(inner, meta):
    data = sampled(trajectories, theta, baseline)
    loss = lambda t, data: -expected_surrogate(inner, t, data)
    adapted = ms.adapt(meta.theta, meta.alpha, data, loss_fn=loss)
    return expected_surrogate(surrogate.likelihood_ratio, adapted, sampled(trajectories, adapted, baseline))

  objectives = return_after, *(functools.partial(outer, inner) for inner in (surrogate.dice, surrogate.score))
  return [jax.grad(objective)(ms.MetaParams(theta, alpha)) for objective in objectives]


@pytest.mark.parametrize('baseline', BASELINES)
def test_the_meta_policy_gradient_is_that_of_the_return_after_adapting(process, baseline):
  theta = draw_theta()
  alpha = np.random.default_rng(5).uniform(-0.5, 2.0, theta.shape)
  expected, found, biased = meta_gradients(process, theta, alpha, BASELINES[baseline])
  np.testing.assert_allclose(found.theta, expected.theta, rtol=1e-9, atol=1e-11)
  np.testing.assert_allclose(found.alpha, expected.alpha, rtol=1e-9, atol=1e-11)
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
  about = log_probs, before, advantages, valid
  found = jax.jit(lambda *about: [surrogate.surrogate_of(name)(*about) for name in ('dice', 'lvc', 'score')])(*about)
  np.testing.assert_allclose(found, [dice, ratio, score])


def test_what_lies_after_the_end_counts_for_nothing():
  valid = np.array([True, True, False, False])
  arrays = np.random.default_rng(0).normal(size=(3, 4))
  sloped = jax.jit(
    lambda *about: {name: jax.value_and_grad(surrogate.surrogate_of(name))(*about) for name in FUNCTIONS}
  )
  clean = sloped(*arrays, valid)
  for junk, name in itertools.product((1e3, np.inf, np.nan), FUNCTIONS):
    spoilt = sloped(*np.where(valid[None], arrays, junk), valid)
    np.testing.assert_array_equal(clean[name][0], spoilt[name][0])
    np.testing.assert_array_equal(clean[name][1][:2], spoilt[name][1][:2])
    np.testing.assert_array_equal(spoilt[name][1][2:], 0)


def test_an_unknown_estimator_is_named():
  with pytest.raises(ValueError, match=saying('estimator', "'dice', 'lvc', 'score'", "'reinforce'")):
    surrogate.surrogate_of('reinforce')
