import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from problems import assert_trees_close, saying

import metasgd_jax as ms
from metasgd_jax import rl
from metasgd_jax.rl.trpo import largest_good

POLICY = rl.gaussian(2, 2, hidden=(4,))


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


class Seen(NamedTuple):
  """What a policy is judged on, and what it adapts to."""

  observations: np.ndarray
  actions: np.ndarray
  advantages: np.ndarray
  support: np.ndarray
  log_probs: np.ndarray


def distributions(meta, seen):
  """Of a policy that adapts by one step of a made-up loss."""
  loss = lambda theta, x: sum(jnp.mean(leaf**2) for leaf in POLICY.apply(theta, x))
  rate = 0.1 if meta.alpha is None else meta.alpha
  return POLICY.apply(ms.adapt(meta.theta, rate, seen.support, loss_fn=loss), seen.observations)


def surrogate(distributions, seen):
  return jnp.mean(jnp.exp(POLICY.log_prob(distributions, seen.actions) - seen.log_probs) * seen.advantages)


def kl(p, q):
  return jnp.mean(POLICY.kl(p, q))


class Change(NamedTuple):
  """Of the surrogate: a factor, the divergence beyond which it is −∞, and how much of an action's mean is added."""

  unit: float = 1.0
  allowed: float = np.inf
  shift: float = 0.0


PLAIN = Change()

init = jax.jit(POLICY.init)
log_prob_now = jax.jit(lambda meta, seen: POLICY.log_prob(distributions(meta, seen), seen.actions))


@functools.cache
def problem(seed=0, learned=True):
  """Meta-parameters, and states and actions to judge them on."""
  rng = np.random.default_rng(seed)
  theta = jax.tree.map(lambda a: np.asarray(a) + 0.1 * rng.normal(size=a.shape), init(jax.random.key(seed)))
  alpha = jax.tree.map(lambda t: np.full(t.shape, 0.1), theta) if learned else None
  observations, actions = rng.normal(size=(2, 30, 2))
  meta, seen = (
    ms.MetaParams(theta, alpha),
    Seen(observations, actions, rng.normal(size=30), rng.normal(size=(5, 2)), None),
  )
  return meta, seen._replace(log_probs=np.asarray(log_prob_now(meta, seen)))


def plain_update(meta, seen, change=PLAIN, **options):
  old = distributions(meta, seen)

  def changed(d):
    beyond = jnp.where(kl(old, d) > change.allowed, -jnp.inf, 0)
    return change.unit * surrogate(d, seen) + beyond + change.shift * d.mean[0, 0]

  of_meta = lambda meta: distributions(meta, seen)
  return rl.trpo_update(meta, distributions=of_meta, surrogate=changed, kl=kl, **options)


@functools.cache
def compiled(**options):
  return jax.jit(functools.partial(plain_update, **options))


def update(meta, seen, change=PLAIN, **options):
  return jax.device_get(compiled(**options)(meta, seen, change))


@jax.jit
def judged(old, new, seen):
  """The surrogate before and after, and the divergence."""
  before, after = distributions(old, seen), distributions(new, seen)
  return surrogate(before, seen), surrogate(after, seen), kl(before, after)


@jax.jit
def dense(meta, seen):
  """The Hessian of KL(now ‖ m) in m at meta, and the surrogate's gradient, flat."""
  flat, unravel = ravel_pytree(meta)
  old = jax.lax.stop_gradient(distributions(meta, seen))
  of_flat = lambda m: distributions(unravel(m), seen)
  return jax.hessian(lambda m: kl(old, of_flat(m)))(flat), jax.grad(lambda m: surrogate(of_flat(m), seen))(flat)


def flat_of(tree):
  return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def unflat(flat, like):
  leaves, structure = jax.tree.flatten(like)
  ends = np.cumsum([np.size(leaf) for leaf in leaves])[:-1]
  return jax.tree.unflatten(
    structure, [part.reshape(np.shape(leaf)) for part, leaf in zip(np.split(flat, ends), leaves, strict=True)]
  )


def towards(meta, other, share):
  return jax.tree.map(lambda m, o: m + share * (o - m), meta, other)


def test_conjugate_gradients_against_a_dense_solve():
  rng = np.random.default_rng(0)
  a = rng.normal(size=(7, 7))
  a = a @ a.T + np.eye(7)
  b = {'x': rng.normal(size=(2, 3)), 'y': rng.normal(size=())}
  flat = flat_of(b)

  @jax.jit
  def solve(b, steps, tolerance):
    product = lambda v: ravel_pytree(b)[1](jnp.asarray(a) @ ravel_pytree(v)[0])
    return rl.conjugate_gradient(product, b, steps=steps, tolerance=tolerance)

  x, residual = solve(b, 7, 0.0)
  np.testing.assert_allclose(flat_of(x), np.linalg.solve(a, flat), rtol=1e-9)
  np.testing.assert_allclose(flat_of(residual), 0, atol=1e-9)
  for steps in (1, 3):
    x, residual = solve(b, steps, 1e-10)
    np.testing.assert_allclose(flat_of(residual), flat - a @ flat_of(x), rtol=1e-8, atol=1e-10)
    # Of all x in the span of b, A b, …, the one of least energy.
    span = np.stack([np.linalg.matrix_power(a, i) @ flat for i in range(steps)], 1)
    least = span @ np.linalg.solve(span.T @ a @ span, span.T @ flat)
    np.testing.assert_allclose(flat_of(x), least, rtol=1e-8)


def test_conjugate_gradients_take_ten_steps_and_stop_when_they_are_there():
  solve = jax.jit(lambda b, steps: rl.conjugate_gradient(lambda v: 2 * v, b, steps=steps))
  for steps in (1, 10):  # With 2 I one step is enough, and 0 / 0 would follow.
    x, residual = solve(np.array([3.0, 4.0]), steps)
    np.testing.assert_array_equal(x, [1.5, 2.0])
    np.testing.assert_array_equal(residual, 0)
  x, _ = solve(np.zeros(2), 10)
  np.testing.assert_array_equal(x, 0)
  # By default a relative tolerance of 1e-10, of squares, and ten steps.
  scales = np.logspace(0, 3, 30)
  uneven = lambda **options: jax.jit(lambda b: rl.conjugate_gradient(lambda v: scales * v, b, **options))(np.ones(30))
  np.testing.assert_array_equal(uneven()[0], uneven(steps=10, tolerance=1e-10)[0])


@pytest.mark.parametrize('learned', [True, False])
def test_the_fisher_product_is_the_divergences_hessian(learned):
  meta, seen = problem(learned=learned)
  fisher, _ = dense(meta, seen)
  assert np.linalg.matrix_rank(fisher) > 10
  product = jax.jit(lambda meta, v: rl.fisher_product(lambda m: distributions(m, seen), kl, meta, damping=0.25)(v))
  for seed in range(3):
    v = np.random.default_rng(seed).normal(size=len(fisher))
    found = flat_of(product(meta, unflat(v, meta)))
    np.testing.assert_allclose(found, fisher @ v + 0.25 * v, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize('learned', [True, False])
def test_the_whole_step_by_dense_algebra(learned):
  meta, seen = problem(learned=learned)
  fisher, gradient = jax.device_get(dense(meta, seen))
  fisher = fisher + 0.1 * np.eye(len(gradient))
  direction = np.linalg.solve(fisher, gradient)
  direction *= np.sqrt(2 * 0.05 / (direction @ fisher @ direction))
  for i in range(15):
    candidate = unflat(flat_of(meta) + 0.8**i * direction, meta)
    before, after, divergence = judged(meta, candidate, seen)
    if after > before and divergence <= 0.05:
      break
  # As many steps as there are unknowns give the solution itself.
  found, info = update(meta, seen, config=rl.TrpoConfig(damping=0.1, cg_steps=200, cg_tolerance=1e-26, max_kl=0.05))
  assert_trees_close(found, candidate, rtol=1e-6, atol=1e-8)
  np.testing.assert_allclose(info.step, 0.8**i, rtol=1e-12)
  np.testing.assert_allclose(info.improvement, after - before, rtol=1e-6)
  np.testing.assert_allclose(info.kl, divergence, rtol=1e-6)


@pytest.mark.parametrize('learned', [True, False])
@pytest.mark.parametrize('seed', range(3))
def test_it_raises_the_surrogate_within_the_bound(seed, learned):
  meta, seen = problem(seed, learned)
  new, info = update(meta, seen)
  before, after, divergence = judged(meta, new, seen)
  assert jax.tree.structure(new) == jax.tree.structure(meta)
  assert info.step > 0
  assert 0.001 < divergence <= 0.01
  assert after > before
  np.testing.assert_allclose(info.improvement, after - before, rtol=1e-8)
  np.testing.assert_allclose(info.kl, divergence, rtol=1e-8)
  moved = jax.tree.map(lambda a, b: np.max(np.abs(a - b)), new, meta)
  assert min(jax.tree.leaves(moved)) > 0  # α moves with θ.


def test_it_backtracks_to_the_first_candidate_that_is_good():
  """Surrogates that allow no step beyond a certain divergence."""
  meta, seen = problem()
  full, first = update(meta, seen)
  assert first.step == 1
  for allowed in (0.003, 0.0005):
    new, info = update(meta, seen, Change(allowed=allowed))
    assert 0 < info.kl <= allowed
    assert judged(meta, towards(meta, full, info.step / 0.8), seen)[2] > allowed
    assert_trees_close(new, towards(meta, full, info.step), rtol=1e-6)


TRIES = []


@jax.jit
def search_compiled(improvements, divergences):
  def try_out(share):
    i = jnp.round(jnp.log(share) / np.log(0.8)).astype(int)
    jax.debug.callback(lambda i: TRIES.append(int(i)), i)
    return improvements[i], divergences[i]

  return largest_good(try_out, max_kl=0.01, ratio=0.8, count=len(divergences), like=jnp.zeros(()))


def search(improvements, divergences):
  """What `largest_good` finds among steps of which these are known, its index or none, and the number of tries."""
  improvements, divergences = (np.asarray(values, float) for values in (improvements, divergences))
  TRIES.clear()
  found = search_compiled(improvements, divergences)
  jax.effects_barrier()
  tries = list(TRIES)
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


@pytest.mark.parametrize(
  'change',
  [
    pytest.param(Change(unit=0.0, allowed=1e-12, shift=1.0), id='nothing improves'),
    pytest.param(Change(unit=0.0), id='no gradient'),
    pytest.param(Change(unit=np.nan), id='not a number'),
  ],
)
def test_meta_stays_where_nothing_is_better(change):
  meta, seen = problem()
  new, info = update(meta, seen, change)
  assert_trees_close(new, meta, rtol=0, atol=0)
  assert (info.step, info.kl) == (0, 0)
  np.testing.assert_equal(float(info.improvement), np.nan if np.isnan(change.unit) else 0)


@pytest.mark.parametrize('unit', [1e-6, 1e6])
def test_the_rewards_unit_does_not_matter(unit):
  meta, seen = problem()
  assert_trees_close(update(meta, seen, Change(unit=unit))[0], update(meta, seen)[0], rtol=1e-6, atol=1e-9)


def test_batched_gives_the_same():
  seen = problem()[1]
  metas = [problem(seed)[0] for seed in range(3)]
  together = jax.tree.map(lambda *leaves: np.stack(leaves), *metas)
  batched = jax.device_get(jax.jit(jax.vmap(lambda meta: plain_update(meta, seen)))(together))
  assert len(set(batched[1].step)) > 1, batched[1].step  # They backtrack differently.
  for i, meta in enumerate(metas):
    assert_trees_close(jax.tree.map(lambda a, i=i: a[i], batched), update(meta, seen), rtol=1e-6, atol=1e-9)


@pytest.mark.slow
def test_compiled_gives_the_same():
  assert_trees_close(update(*problem()), plain_update(*problem()), rtol=1e-6, atol=1e-9)


def test_fisher_of_a_part_of_the_data_is_used():
  meta, seen = problem()
  part = seen._replace(observations=seen.observations[:20])

  @jax.jit
  def with_fisher(meta, seen, of, damping):
    fisher = rl.fisher_product(lambda m: distributions(m, of), kl, meta, damping=damping)
    return plain_update(meta, seen, fisher=fisher)

  whole = update(meta, seen)
  assert_trees_close(with_fisher(meta, seen, seen, 1e-5), whole, rtol=1e-8)
  new, info = with_fisher(meta, seen, part, 0.01)
  assert 0 < info.kl <= 0.01
  assert not np.allclose(new.theta['Dense_0']['kernel'], whole[0].theta['Dense_0']['kernel'], rtol=1e-3)


def test_single_precision_keeps_its_dtypes():
  single = jax.tree.map(np.float32, problem())
  with jax.enable_x64(False):
    found = jax.eval_shape(plain_update, *single)
  assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {np.dtype('float32')}


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    (dict(max_kl=0.0), ['max_kl', 'above 0', '0.0']),
    (dict(cg_steps=0), ['cg_steps', 'at least 1', '0']),
    (dict(max_backtracks=True), ['max_backtracks', 'at least 1', 'True']),
    (dict(damping=-1.0), ['damping', 'at least 0', '-1.0']),
    (dict(backtrack_ratio=1.0), ['backtrack_ratio', 'above 0 and below 1', '1.0']),
  ],
)
def test_bad_options(options, message):
  with pytest.raises(ValueError, match=saying(*message)):
    rl.TrpoConfig(**options)


def test_numbers_of_numpy_make_an_equal_configuration():
  ours = rl.TrpoConfig(max_kl=0.5, cg_steps=3)
  theirs = rl.TrpoConfig(max_kl=np.array(0.5), cg_steps=np.int64(3))
  assert theirs == ours
  assert hash(theirs) == hash(ours)


@pytest.mark.parametrize(('name', 'value'), [('max_kl', '0.01'), ('damping', None), ('max_kl', np.array([0.1, 0.2]))])
def test_settings_that_are_no_numbers(name, value):
  with pytest.raises(ValueError, match=saying(name, 'must be a number', f'got {value!r}'.split('(')[0])):
    rl.TrpoConfig(**{name: value})
