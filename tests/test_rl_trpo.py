import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from problems import assert_trees_close

import metasgd_jax as ms
from metasgd_jax import rl
from metasgd_jax.rl.trpo import largest_good

POLICY = rl.gaussian(2, 2, hidden=(4,))


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


def problem(seed=0, learned=True):
  """A policy that adapts by one step of a made-up loss, and states and actions to judge it on."""
  rng = np.random.default_rng(seed)
  theta = jax.tree.map(lambda a: a + 0.1 * jnp.asarray(rng.normal(size=a.shape)), POLICY.init(jax.random.key(seed)))
  alpha = jax.tree.map(lambda t: jnp.full(t.shape, 0.1), theta) if learned else None
  observations, actions = jnp.asarray(rng.normal(size=(2, 30, 2)))
  advantages, support = jnp.asarray(rng.normal(size=30)), jnp.asarray(rng.normal(size=(5, 2)))

  def distributions(meta):
    loss = lambda theta, x: sum(jnp.mean(leaf**2) for leaf in POLICY.apply(theta, x))
    rate = 0.1 if meta.alpha is None else meta.alpha
    return POLICY.apply(ms.adapt(meta.theta, rate, support, loss_fn=loss), observations)

  meta = ms.MetaParams(theta, alpha)
  old = POLICY.log_prob(distributions(meta), actions)
  surrogate = lambda d: jnp.mean(jnp.exp(POLICY.log_prob(d, actions) - old) * advantages)
  return meta, dict(distributions=distributions, surrogate=surrogate, kl=lambda p, q: jnp.mean(POLICY.kl(p, q)))


def dense_fisher(meta, distributions, kl):
  """The Hessian of KL(now ‖ m) in m at meta, and the flat meta."""
  flat, unravel = ravel_pytree(meta)
  old = distributions(meta)
  return jax.jit(jax.hessian(lambda m: kl(old, distributions(unravel(m)))))(flat), flat, unravel


def test_conjugate_gradients_against_a_dense_solve():
  rng = np.random.default_rng(0)
  a = rng.normal(size=(7, 7))
  a = jnp.asarray(a @ a.T + np.eye(7))
  b = {'x': jnp.asarray(rng.normal(size=(2, 3))), 'y': jnp.asarray(rng.normal())}
  flat, unravel = ravel_pytree(b)
  product = lambda v: unravel(a @ ravel_pytree(v)[0])
  x, residual = jax.jit(lambda b: rl.conjugate_gradient(product, b, steps=7, tolerance=0.0))(b)
  np.testing.assert_allclose(ravel_pytree(x)[0], np.linalg.solve(a, flat), rtol=1e-9)
  np.testing.assert_allclose(ravel_pytree(residual)[0], 0, atol=1e-9)
  for steps in (1, 3):
    x, residual = rl.conjugate_gradient(product, b, steps=steps)
    np.testing.assert_allclose(ravel_pytree(residual)[0], flat - a @ ravel_pytree(x)[0], rtol=1e-8, atol=1e-10)
    # Of all x in the span of b, A b, …, the one of least energy.
    span = np.stack([np.linalg.matrix_power(a, i) @ flat for i in range(steps)], 1)
    least = span @ np.linalg.solve(span.T @ a @ span, span.T @ flat)
    np.testing.assert_allclose(ravel_pytree(x)[0], least, rtol=1e-8)


def test_conjugate_gradients_stop_when_they_are_there():
  counted = lambda steps: rl.conjugate_gradient(lambda v: 2 * v, jnp.array([3.0, 4.0]), steps=steps)
  for steps in (1, 10):  # With 2 I one step is enough, and 0 / 0 would follow.
    x, residual = counted(steps)
    np.testing.assert_array_equal(x, [1.5, 2.0])
    np.testing.assert_array_equal(residual, 0)
  x, _ = rl.conjugate_gradient(lambda v: v, jnp.zeros(3))
  np.testing.assert_array_equal(x, 0)


@pytest.mark.parametrize('learned', [True, False])
def test_the_fisher_product_is_the_divergences_hessian(learned):
  meta, functions = problem(learned=learned)
  fisher, flat, unravel = dense_fisher(meta, functions['distributions'], functions['kl'])
  assert np.linalg.matrix_rank(fisher) > 10
  product = jax.jit(rl.fisher_product(functions['distributions'], functions['kl'], meta, damping=0.25))
  for seed in range(3):
    v = np.random.default_rng(seed).normal(size=flat.size)
    np.testing.assert_allclose(ravel_pytree(product(unravel(v)))[0], fisher @ v + 0.25 * v, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize('learned', [True, False])
def test_the_whole_step_by_dense_algebra(learned):
  meta, functions = problem(learned=learned)
  distributions, surrogate, kl = functions.values()
  fisher, flat, unravel = dense_fisher(meta, distributions, kl)
  fisher = fisher + 0.1 * np.eye(flat.size)
  gradient = ravel_pytree(jax.grad(lambda m: surrogate(distributions(m)))(meta))[0]
  direction = np.linalg.solve(fisher, gradient)
  direction *= np.sqrt(2 * 0.05 / (direction @ fisher @ direction))
  old = distributions(meta)
  for i in range(15):
    candidate = unravel(flat + 0.8**i * direction)
    new = distributions(candidate)
    if surrogate(new) > surrogate(old) and kl(old, new) <= 0.05:
      break
  # As many steps as there are unknowns give the solution itself.
  options = dict(damping=0.1, cg_steps=200, cg_tolerance=1e-26, max_kl=0.05)
  found, info = jax.jit(lambda meta: rl.trpo_update(meta, **functions, **options))(meta)
  assert_trees_close(found, candidate, rtol=1e-6, atol=1e-8)
  np.testing.assert_allclose(info.step, 0.8**i, rtol=1e-12)
  np.testing.assert_allclose(info.improvement, surrogate(new) - surrogate(old), rtol=1e-6)
  np.testing.assert_allclose(info.kl, kl(old, new), rtol=1e-6)


@pytest.mark.parametrize('learned', [True, False])
@pytest.mark.parametrize('seed', range(3))
def test_it_raises_the_surrogate_within_the_bound(seed, learned):
  meta, functions = problem(seed, learned)
  distributions, surrogate, kl = functions.values()
  new, info = jax.jit(lambda meta: rl.trpo_update(meta, **functions, max_kl=0.02))(meta)
  before, after = distributions(meta), distributions(new)
  assert jax.tree.structure(new) == jax.tree.structure(meta)
  assert info.step > 0
  assert 0.002 < kl(before, after) <= 0.02
  assert surrogate(after) > surrogate(before)
  np.testing.assert_allclose(info.improvement, surrogate(after) - surrogate(before), rtol=1e-8)
  np.testing.assert_allclose(info.kl, kl(before, after), rtol=1e-8)
  moved = jax.tree.map(lambda a, b: float(jnp.max(jnp.abs(a - b))), new, meta)
  assert min(jax.tree.leaves(moved)) > 0  # α moves with θ.


def test_it_backtracks_to_the_first_candidate_that_is_good():
  """Surrogates that allow no step beyond a certain divergence."""
  meta, functions = problem()
  old = functions['distributions'](meta)
  full, first = rl.trpo_update(meta, **functions)
  assert first.step == 1
  plain = functions['surrogate']
  towards = lambda share: jax.tree.map(lambda m, f: m + share * (f - m), meta, full)
  for allowed in (0.003, 0.0005):
    strict = lambda d, allowed=allowed: jnp.where(functions['kl'](old, d) <= allowed, plain(d), -jnp.inf)
    new, info = rl.trpo_update(meta, **(functions | {'surrogate': strict}))
    assert 0 < info.kl <= allowed
    assert functions['kl'](old, functions['distributions'](towards(info.step / 0.8))) > allowed
    assert_trees_close(new, towards(info.step), rtol=1e-6)


def search(improvements, divergences):
  """What `largest_good` finds among steps of which these are known, its index or none, and the number of tries."""
  improvements, divergences = (np.asarray(values, float) for values in (improvements, divergences))
  tries = []

  def try_out(share):
    i = jnp.round(jnp.log(share) / np.log(0.8)).astype(int)
    jax.debug.callback(lambda i: tries.append(int(i)), i)
    return jnp.asarray(improvements)[i], jnp.asarray(divergences)[i]

  found = largest_good(try_out, max_kl=0.01, ratio=0.8, count=len(divergences), like=jnp.zeros(()))
  jax.effects_barrier()
  improvement, divergence, share = (float(value) for value in found)
  if share == 0:
    assert (improvement, divergence) == (0, 0)
    return None, tries
  i = round(np.log(share) / np.log(0.8))
  assert (improvement, divergence) == (improvements[i], divergences[i])
  return i, tries


def test_the_search_finds_what_trying_all_finds_in_fewer_tries():
  rng = np.random.default_rng(0)
  saved = []
  for _ in range(40):
    # Divergences that fall with the step by powers between 1 and 3, from up to a hundred times the bound.
    powers = rng.uniform(1, 3, size=15)
    divergences = 0.01 * np.exp(rng.uniform(-1, 5)) * np.cumprod(0.8**powers)
    first = int(rng.integers(0, 4))  # Larger ones improve nothing.
    improvements = np.where(np.arange(15) < first, -1.0, 0.1)
    good = np.flatnonzero((improvements > 0) & (divergences <= 0.01))
    expected = good[0] if good.size else None
    found, tries = search(improvements, divergences)
    assert found == expected, (divergences, first)
    assert len(set(tries)) == len(tries) <= 15
    saved.append((expected + 1 if good.size else 15) - len(tries))
  assert min(saved) >= -2, saved
  assert np.mean(saved) > 1.5, saved


@pytest.mark.parametrize(
  ('improvements', 'divergences', 'expected'),
  [
    ([1.0] * 5, [0.005] * 5, 0),
    ([-1.0] * 5, [0.001] * 5, None),
    ([1.0] * 5, [1e9] * 5, None),
    ([np.nan, np.nan, 1.0, 1.0], [0.001] * 4, 2),
    ([1.0] * 4, [np.nan, np.inf, 0.02, 0.005], 3),
    ([1.0] * 15, [9.0] * 14 + [0.01], 14),
    ([1.0], [0.01], 0),
  ],
)
def test_searches_at_the_edges(improvements, divergences, expected):
  found, tries = search(improvements, divergences)
  assert found == expected
  assert all(0 <= i < len(divergences) for i in tries)


def test_a_search_ends_at_a_good_step_after_one_that_is_not():
  """Whatever the divergences are; or at the last step, which is not good, though a smaller i may have been missed."""
  rng = np.random.default_rng(1)
  for _ in range(30):
    improvements, divergences = rng.normal(size=12) + 0.5, 0.01 * np.exp(rng.normal(size=12))
    good = (improvements > 0) & (divergences <= 0.01)
    found, _ = search(improvements, divergences)
    if found is not None:
      assert good[found]
      assert found == 0 or not good[found - 1]
    else:
      assert not good[-1]


@pytest.mark.parametrize('why', ['nothing improves', 'no gradient', 'not a number'])
def test_meta_stays_where_nothing_is_better(why):
  meta, functions = problem()
  plain, old = functions['surrogate'], functions['distributions'](meta)
  spoilt = {
    'nothing improves': lambda d: jnp.where(functions['kl'](old, d) > 0, -jnp.inf, 0) + 0 * plain(d) + d.mean[0, 0],
    'no gradient': lambda d: 0 * plain(d),
    'not a number': lambda d: jnp.nan * plain(d),
  }[why]
  new, info = jax.jit(lambda m: rl.trpo_update(m, **(functions | {'surrogate': spoilt})))(meta)
  assert_trees_close(new, meta, rtol=0, atol=0)
  assert (info.step, info.kl) == (0, 0)
  np.testing.assert_equal(float(info.improvement), np.nan if why == 'not a number' else 0)


@pytest.mark.parametrize('unit', [1e-6, 1e6])
def test_the_rewards_unit_does_not_matter(unit):
  meta, functions = problem()
  expected, _ = rl.trpo_update(meta, **functions)
  plain = functions['surrogate']
  found, _ = rl.trpo_update(meta, **(functions | {'surrogate': lambda d: unit * plain(d)}))
  assert_trees_close(found, expected, rtol=1e-6, atol=1e-9)


def test_compiled_and_batched_give_the_same():
  functions = problem()[1]
  metas = [problem(seed)[0] for seed in range(3)]
  update = functools.partial(rl.trpo_update, **functions)
  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *metas)
  batched, infos = jax.jit(jax.vmap(update))(stacked)
  assert len(set(np.asarray(infos.step))) > 1, infos.step  # They backtrack differently.
  for i, meta in enumerate(metas):
    one, info = update(meta)
    assert_trees_close(jax.tree.map(lambda a, i=i: a[i], batched), one, rtol=1e-6, atol=1e-9)
    assert_trees_close(jax.tree.map(lambda a, i=i: a[i], infos), info, rtol=1e-6, atol=1e-9)


def test_fisher_of_a_part_of_the_data_is_used():
  meta, functions = problem()
  whole = rl.trpo_update(meta, **functions)
  given = rl.fisher_product(functions['distributions'], functions['kl'], meta, damping=1e-5)
  assert_trees_close(rl.trpo_update(meta, **functions, fisher=given), whole, rtol=1e-8)
  part = rl.fisher_product(
    lambda m: jax.tree.map(lambda a: a[:20], functions['distributions'](m)), functions['kl'], meta, damping=0.01
  )
  new, info = rl.trpo_update(meta, **functions, fisher=part)
  assert 0 < info.kl <= 0.01
  assert not np.allclose(new.theta['Dense_0']['kernel'], whole[0].theta['Dense_0']['kernel'], rtol=1e-3)


def test_single_precision_keeps_its_dtypes():
  meta, functions = problem()
  with jax.enable_x64(False):
    meta = jax.tree.map(lambda a: jnp.asarray(np.asarray(a), jnp.float32), meta)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(30, 2)), jnp.float32)
    new, info = rl.trpo_update(
      meta,
      distributions=lambda m: POLICY.apply(m.theta, x),
      surrogate=lambda d: jnp.mean(d.mean),
      kl=functions['kl'],
    )
  assert {leaf.dtype for leaf in jax.tree.leaves((new, info))} == {jnp.dtype('float32')}
  assert info.step > 0


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    (dict(max_kl=0.0), 'max_kl must be above 0 and finite, got 0.0'),
    (dict(cg_steps=0), 'cg_steps must be an integer of at least 1, got 0'),
    (dict(max_backtracks=True), 'max_backtracks must be an integer of at least 1, got True'),
    (dict(damping=-1.0), 'damping must be at least 0, got -1.0'),
    (dict(backtrack_ratio=1.0), 'backtrack_ratio must be between 0 and 1, got 1.0'),
  ],
)
def test_bad_options(options, message):
  meta, functions = problem()
  with pytest.raises(ValueError, match=message):
    rl.trpo_update(meta, **functions, **options)
