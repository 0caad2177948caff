import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import saying

from metasgd_jax import rl

H = 12


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


def draw(lengths=(12, 5, 1, 12, 7), terminated=(False, True, True, True, False), seed=0):
  """Trajectories of these lengths, junk after their ends."""
  rng = np.random.default_rng(seed)
  B = len(lengths)
  valid = np.arange(H)[None] < np.array(lengths)[:, None]
  return rl.Trajectories(
    observations=rng.normal(size=(B, H, 2)) * 6,
    actions=np.zeros((B, H, 1)),
    log_probs=np.zeros((B, H)),
    rewards=rng.normal(size=(B, H)),
    valid=valid,
    terminated=np.array(terminated),
    last_observation=rng.normal(size=(B, 2)),
  )


def steps_of(drawn, b):
  """One trajectory's valid steps, as lists."""
  n = int(drawn.valid[b].sum())
  return n, drawn.observations[b][:n], drawn.rewards[b][:n]


def returns_by_loop(rewards, discount):
  return [sum(discount ** (s - t) * rewards[s] for s in range(t, len(rewards))) for t in range(len(rewards))]


def advantages_by_loop(rewards, values, last, discount, decay):
  values = [*values, last]
  errors = [rewards[t] + discount * values[t + 1] - values[t] for t in range(len(rewards))]
  return [sum((discount * decay) ** (s - t) * errors[s] for s in range(t, len(errors))) for t in range(len(errors))]


def features_by_loop(observation, t):
  o = np.clip(observation, -10, 10)
  return np.array([*o, *o**2, t / 100, (t / 100) ** 2, (t / 100) ** 3, 1.0])


def padded(values):
  return np.pad(values, (0, H - len(values)))


discounted_returns = jax.jit(jax.vmap(rl.discounted_returns, (0, 0, None)))


@pytest.mark.parametrize('discount', [0.0, 0.9, 1.0])
def test_discounted_returns(discount):
  drawn = draw()
  found = discounted_returns(drawn.rewards, drawn.valid, discount)
  for b in range(5):
    _, _, rewards = steps_of(drawn, b)
    # After the end rewards are none, whatever stands there.
    np.testing.assert_allclose(found[b], padded(returns_by_loop(rewards, discount)), rtol=1e-12, atol=1e-12)


@jax.jit
def generalized_advantages(rewards, values, valid, last, decay):
  estimate = lambda *of_one: rl.generalized_advantages(*of_one, last, discount=0.9, decay=decay)
  return jax.vmap(estimate)(rewards, values, valid)


@pytest.mark.parametrize('decay', [0.0, 0.7, 1.0])
@pytest.mark.parametrize('last', [0.0, 2.5])
def test_generalized_advantages(decay, last):
  drawn = draw()
  values = np.random.default_rng(1).normal(size=(5, H))
  found = generalized_advantages(drawn.rewards, values, drawn.valid, last, decay)
  for b in range(5):
    n, _, rewards = steps_of(drawn, b)
    expected = advantages_by_loop(rewards, values[b][:n], last, 0.9, decay)
    np.testing.assert_allclose(found[b], padded(expected), rtol=1e-12, atol=1e-12)


def test_a_last_value_left_out_is_zero():
  drawn, values = draw(), np.random.default_rng(1).normal(size=(5, H))
  estimate = jax.jit(lambda *about: rl.generalized_advantages(*about, discount=0.9, decay=0.7))
  expected = generalized_advantages(drawn.rewards, values, drawn.valid, 0.0, 0.7)[1]
  np.testing.assert_allclose(estimate(drawn.rewards[1], values[1], drawn.valid[1]), expected, rtol=1e-12)


def test_features():
  observations = np.random.default_rng(0).normal(size=(H, 2)) * 12
  features = jax.jit(lambda observations: (rl.linear_features(observations), rl.linear_features(observations, 4)))
  found, later = features(observations)
  np.testing.assert_allclose(found, [features_by_loop(o, t) for t, o in enumerate(observations)], rtol=1e-12)
  np.testing.assert_allclose(later, [features_by_loop(o, t + 4) for t, o in enumerate(observations)], rtol=1e-12)


def baseline_by_normal_equations(drawn, discount, ridge):
  """Weights by NumPy's least squares on the normal equations over the valid steps, as rllab has it."""
  rows, targets = [], []
  for b in range(len(drawn.valid)):
    n, observations, rewards = steps_of(drawn, b)
    rows += [features_by_loop(observations[t], t) for t in range(n)]
    targets += returns_by_loop(rewards, discount)
  rows, targets = np.array(rows), np.array(targets)
  return np.linalg.lstsq(rows.T @ rows + ridge * np.eye(rows.shape[1]), rows.T @ targets)[0]


@jax.jit
def fit(drawn, ridge):
  returns = jax.vmap(rl.discounted_returns, (0, 0, None))(drawn.rewards, drawn.valid, 0.9)
  features = jax.vmap(rl.linear_features)(drawn.observations)
  return features, rl.fit_linear(features, returns, drawn.valid, ridge=ridge)


@pytest.mark.parametrize('ridge', [1e-5, 0.3])
def test_the_baseline_is_the_ridge_regression(ridge):
  drawn = draw()
  features, found = jax.device_get(fit(drawn, ridge))
  expected = baseline_by_normal_equations(drawn, 0.9, ridge)
  np.testing.assert_allclose(features @ found, features @ expected, rtol=1e-6, atol=1e-6)
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_the_baseline_in_single_precision_bears_dependent_features():
  rng = np.random.default_rng(0)
  angle = rng.uniform(0, 2 * np.pi, (20, 100))
  observations = np.stack([np.cos(angle), np.sin(angle)], -1)
  targets = 3 * observations[..., 0] + 1

  @jax.jit
  def fitted(observations, targets):
    features = jax.vmap(rl.linear_features)(observations)
    return features, rl.fit_linear(features, targets, jnp.ones((20, 100), bool))

  features, weights = jax.device_get(fitted(observations.astype(np.float32), targets.astype(np.float32)))
  assert weights.dtype == np.float32
  np.testing.assert_allclose(features @ weights, targets, atol=1e-4)


def test_normalize_sees_valid_steps_alone():
  drawn = draw()
  normalize = jax.jit(rl.normalize)
  x = np.where(drawn.valid, drawn.rewards, 1e6)
  inside = x[drawn.valid]
  found = np.asarray(normalize(x, drawn.valid))
  np.testing.assert_allclose(found[drawn.valid], (inside - inside.mean()) / (inside.std() + 1e-8), rtol=1e-12)
  np.testing.assert_array_equal(found[~drawn.valid], 0)
  np.testing.assert_array_equal(normalize(np.full((5, H), 7.0), np.ones((5, H), bool)), 0)


@pytest.mark.parametrize('dtype', [np.float16, jnp.bfloat16, np.float32])
def test_equal_values_are_normalized_to_zero(dtype):
  for shape, value in (((7,), 0.1), ((20, 20), 100.1)):
    values, valid = np.full(shape, value, dtype), np.ones(shape, bool)
    masked = valid & (np.arange(shape[-1]) < shape[-1] - 1)
    for found in (rl.normalize(jnp.array(values), valid), *map(jax.jit(rl.normalize), (values,) * 2, (valid, masked))):
      assert found.dtype == dtype
      np.testing.assert_array_equal(found, 0)


CONFIGS = {
  "MAML's": rl.MAML_ADVANTAGES,
  'neither baseline nor normalised': rl.AdvantageConfig(discount=0.8, baseline=False, normalized=False),
  'short-sighted': rl.AdvantageConfig(discount=0.9, decay=0.5, normalized=False),
  'bootstrapped': rl.AdvantageConfig(discount=0.9, decay=0.7, bootstrap=True, normalized=False),
}


advantages = jax.jit(rl.advantages, static_argnums=1)


@pytest.mark.parametrize('name', CONFIGS)
def test_all_together_against_loops(name):
  config, drawn = CONFIGS[name], draw()
  found = np.asarray(advantages(drawn, config))
  weights = baseline_by_normal_equations(drawn, config.discount, config.ridge) * config.baseline
  expected = []
  for b in range(5):
    n, observations, rewards = steps_of(drawn, b)
    values = [features_by_loop(observations[t], t) @ weights for t in range(n)]
    time_ended_it = not bool(drawn.terminated[b])
    beyond = features_by_loop(drawn.last_observation[b], n) @ weights
    last = beyond if config.bootstrap and time_ended_it else 0.0
    expected.append(advantages_by_loop(rewards, values, last, config.discount, config.decay))
  together = np.concatenate(expected)
  if config.normalized:
    expected = [(np.array(row) - together.mean()) / (together.std() + 1e-8) for row in expected]
  np.testing.assert_allclose(found, np.stack([padded(row) for row in expected]), rtol=1e-5, atol=1e-6)


def test_what_lies_after_the_end_counts_for_nothing():
  drawn = draw()
  spoilt = drawn._replace(
    rewards=np.where(drawn.valid, drawn.rewards, np.nan),
    observations=np.where(drawn.valid[..., None], drawn.observations, np.inf),
  )
  for config in CONFIGS.values():
    np.testing.assert_array_equal(advantages(spoilt, config), advantages(drawn, config))


def test_integer_rewards_and_observations_are_those_of_floats():
  whole = draw()
  whole = whole._replace(
    **{name: np.int32(np.round(getattr(whole, name) * 3)) for name in ('rewards', 'observations', 'last_observation')}
  )
  floats = jax.tree.map(lambda a: a.astype(np.float64) if a.dtype == np.int32 else a, whole)
  for name in ("MAML's", 'neither baseline nor normalised', 'bootstrapped'):
    found, expected = (advantages(drawn, CONFIGS[name]) for drawn in (whole, floats))
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)
  returns = rl.discounted_returns(jnp.array([1, 1, 1]), jnp.ones(3, bool), 0.5)
  np.testing.assert_array_equal(returns, [1.75, 1.5, 1.0])


@pytest.mark.parametrize('dtype', [np.float16, jnp.bfloat16])
def test_advantages_in_half_precision(dtype):
  drawn = draw()
  half = jax.tree.map(lambda a: a.astype(dtype) if a.dtype == np.float64 else a, drawn)
  found = advantages(half, rl.MAML_ADVANTAGES)
  assert found.dtype == dtype
  np.testing.assert_allclose(found.astype(np.float64), advantages(drawn, rl.MAML_ADVANTAGES), atol=0.1)


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    (dict(discount=1.1), ['discount', '[0, 1]', '1.1']),
    (dict(decay=-0.1), ['decay', '[0, 1]', '-0.1']),
    (dict(ridge=0.0), ['ridge', 'above 0', '0.0']),
    (dict(baseline=False, bootstrap=True), ['bootstrap=True', 'baseline']),
  ],
)
def test_bad_options(options, message):
  with pytest.raises(ValueError, match=saying(*message)):
    rl.AdvantageConfig(**options)
