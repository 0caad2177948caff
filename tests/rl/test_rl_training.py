"""The loop of meta-iterations with TRPO: it is the meta-step repeated, for one run and for several."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from aiming import light
from problems import saying

from metasgd_jax import rl
from metasgd_jax.rl import training

INNER = light(steps=0, alpha=0.1)
"""The loop is the same whatever a step does; without inner steps it compiles fast."""
LEARNED = light()
"""With one inner step and rates that are learned."""
train = functools.partial(training.train, inner=INNER, meta_batch=2, chunk=2, trpo=rl.TrpoConfig(damping=0.01))


def assert_same(a, b, **tolerance):
  as_numbers = lambda tree: jax.tree.map(
    lambda x: np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x), tree
  )
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), as_numbers(a), as_numbers(b))


def run_of(tree, r):
  return jax.tree.map(lambda a: a[r], tree)


@pytest.fixture(scope='module')
def keys():
  return jax.random.split(jax.random.key(3), 2)


@pytest.fixture(scope='module')
def two_runs(keys):
  return jax.jit(lambda: training.init(keys, INNER))()


@pytest.mark.parametrize('inner', [INNER, pytest.param(LEARNED, marks=pytest.mark.slow)], ids=['no step', 'a step'])
def test_the_loop_is_the_step_repeated_and_runs_side_by_side_are_the_runs(keys, inner, both_compilers):
  seen = []
  two_runs = jax.jit(lambda: training.init(keys, inner))()
  last = train(two_runs, inner=inner, meta_iterations=3, callbacks=[seen.append])
  assert last.step.tolist() == [3, 3]
  assert [p.step for p in seen] == [2, 3]
  assert seen[-1].info['return_after'].shape == (1, 2)
  assert np.all(seen[-1].info['taken'] > 0)
  np.testing.assert_array_equal(seen[-1].info['loss'], -seen[-1].info['return_after'])
  step = jax.jit(functools.partial(rl.trpo_meta_step, inner=inner, meta_batch=2, trpo=rl.TrpoConfig(damping=0.01)))
  for r in range(2):
    meta = run_of(two_runs.meta, r)
    for i in range(3):
      meta, info = step(meta, jax.random.fold_in(keys[r], i))
    assert_same(run_of(last.meta, r), meta, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(seen[-1].info['return_after'][0, r], info['return_after'], rtol=1e-4)


def test_a_run_goes_on_from_its_state(two_runs):
  whole = train(two_runs, meta_iterations=4)
  rest = train(train(two_runs, meta_iterations=2), meta_iterations=4)
  assert_same(whole, rest, rtol=0)
  assert train(whole, meta_iterations=4) is whole


def test_a_gradient_that_is_not_finite_shows_in_the_loss(keys):
  """It moves nothing, so the state does not tell."""
  spoilt = INNER._replace(surrogate=lambda *about: INNER.surrogate(*about) * jnp.nan)
  state, seen = jax.jit(lambda: training.init(keys[0], INNER))(), []
  with pytest.warns(RuntimeWarning, match='the loss is not finite at meta-iteration 0'):
    last = train(state, inner=spoilt, meta_iterations=1, callbacks=[seen.append])
  assert_same(last.meta, state.meta, rtol=0)
  assert np.isfinite(seen[-1].info['return_after']).all()
  assert np.isnan(seen[-1].info['loss']).all()
  assert seen[-1].info['taken'] == [0]


def test_runs_side_by_side_are_runs_alone(keys, two_runs):
  together = train(two_runs, meta_iterations=2)
  for r in range(2):
    alone = train(run_of(two_runs, r), meta_iterations=2)
    assert_same(run_of(together.meta, r), alone.meta, rtol=1e-3, atol=1e-4)


def test_a_run_alone_starts_as_it_does_beside_others(keys, two_runs):
  alone = jax.jit(lambda: training.init(keys[1], INNER))()
  assert_same(run_of(two_runs, 1), alone, rtol=0)
  assert_same(alone.meta, jax.jit(INNER.init)(jax.random.fold_in(keys[1], 2**32 - 1)), rtol=1e-6)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (dict(meta_iterations=0), ['meta_iterations', 'at least 1', '0']),
    (dict(meta_batch=2.0), ['meta_batch', 'at least 1', '2.0']),
    (dict(chunk=True), ['chunk', 'at least 1', 'True']),
  ],
)
def test_bad_arguments(two_runs, changes, message):
  with pytest.raises(ValueError, match=saying(*message)):
    train(two_runs, **(dict(meta_iterations=1) | changes))


def test_a_state_that_is_past_the_end_and_a_key_of_the_old_kind(two_runs):
  with pytest.raises(ValueError, match=saying('5', 'meta_iterations=2')):
    train(two_runs._replace(step=np.full(2, 5, np.int32)), meta_iterations=2)
  with pytest.raises(ValueError, match=saying('key', 'jax.random.key(seed)')):
    training.init(jax.random.PRNGKey(0), INNER)


def test_runs_at_different_steps_are_refused(two_runs):
  with pytest.raises(ValueError, match=saying('same number of meta-iterations', '[0 2]')):
    train(two_runs._replace(step=np.array([0, 2], np.int32)), meta_iterations=3)
