"""The loop of meta-iterations with TRPO: it is the meta-step repeated, for one run and for several."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metasgd_jax import rl
from metasgd_jax.rl import training


def small(steps=1):
  environment = rl.navigation(horizon=6)
  return rl.policy_gradient(environment, rl.gaussian(2, 2, hidden=(4,)), trajectories=3, steps=steps)


def assert_same(a, b, **tolerance):
  as_numbers = lambda tree: jax.tree.map(
    lambda x: np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x), tree
  )
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), as_numbers(a), as_numbers(b))


def run_of(tree, r):
  return jax.tree.map(lambda a: a[r], tree)


def test_the_loop_is_the_step_repeated():
  inner = small()
  state = training.init(jax.random.key(3), inner)
  meta = state.meta
  seen = []
  last = training.train(state, inner=inner, meta_iterations=3, meta_batch=2, chunk=2, callbacks=[seen.append])
  for i in range(3):
    meta, info = rl.trpo_meta_step(meta, jax.random.fold_in(jax.random.key(3), i), inner=inner, meta_batch=2)
  assert int(last.step) == 3
  assert_same(last.meta, meta, rtol=1e-4, atol=1e-5)
  assert [p.step for p in seen] == [2, 3]
  assert seen[-1].info['return_after'].shape == (1,)
  np.testing.assert_allclose(seen[-1].info['return_after'][0], info['return_after'], rtol=1e-4)
  np.testing.assert_array_equal(seen[-1].info['loss'], -seen[-1].info['return_after'])


def test_a_run_goes_on_from_its_state():
  inner = small()
  whole = training.train(training.init(jax.random.key(0), inner), inner=inner, meta_iterations=4, meta_batch=2, chunk=2)
  half = training.train(training.init(jax.random.key(0), inner), inner=inner, meta_iterations=2, meta_batch=2, chunk=2)
  rest = training.train(half, inner=inner, meta_iterations=4, meta_batch=2, chunk=2)
  assert_same(whole, rest, rtol=0)
  assert training.train(whole, inner=inner, meta_iterations=4, meta_batch=2) is whole


def test_a_gradient_that_is_not_finite_shows_in_the_loss():
  """It moves nothing, so the state does not tell."""
  inner = small()
  spoilt = inner._replace(surrogate=lambda *about: inner.surrogate(*about) * jnp.nan)
  state, seen = training.init(jax.random.key(0), inner), []
  last = training.train(state, inner=spoilt, meta_iterations=1, meta_batch=2, callbacks=[seen.append])
  assert_same(last.meta, state.meta, rtol=0)
  assert np.isfinite(seen[-1].info['return_after']).all()
  assert np.isnan(seen[-1].info['loss']).all()
  assert seen[-1].info['taken'] == [0]


def test_runs_side_by_side_are_the_runs():
  inner = small()
  keys = jax.vmap(jax.random.key)(jnp.arange(2))
  together = training.train(training.init(keys, inner), inner=inner, meta_iterations=2, meta_batch=2)
  for r in range(2):
    alone = training.train(training.init(keys[r], inner), inner=inner, meta_iterations=2, meta_batch=2)
    assert_same(run_of(together.meta, r), alone.meta, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (dict(meta_iterations=0), 'meta_iterations must be an integer of at least 1, got 0'),
    (dict(meta_batch=2.0), 'meta_batch must be an integer of at least 1, got 2.0'),
    (dict(chunk=True), 'chunk must be an integer of at least 1, got True'),
    (dict(max_kl=-1.0), 'max_kl must be above 0 and finite, got -1.0'),
  ],
)
def test_bad_arguments(changes, message):
  inner = small()
  with pytest.raises(ValueError, match=message):
    training.train(training.init(jax.random.key(0), inner), inner=inner, **(dict(meta_iterations=1) | changes))


def test_a_state_that_is_past_the_end_and_a_key_of_the_old_kind():
  inner = small()
  state = training.init(jax.random.key(0), inner)
  with pytest.raises(ValueError, match='has done 5 meta-iterations, more than meta_iterations=2'):
    training.train(state._replace(step=jnp.int32(5)), inner=inner, meta_iterations=2)
  with pytest.raises(ValueError, match=r'key must be jax.random.key\(seed\)'):
    training.init(jax.random.PRNGKey(0), inner)
