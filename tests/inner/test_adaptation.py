import functools
import gc
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import assert_close, assert_trees_close, compilations, saying

import metasgd_jax as ms


def loss_fn(theta, batch):
  """A loss that is not quadratic, on a θ with two layers."""
  hidden = jnp.tanh(batch.x @ theta['in']['w'] + theta['in']['b'][None])
  return jnp.mean((hidden @ theta['out']['w'] + theta['out']['b'][None] - batch.y) ** 2)


@pytest.fixture
def problem():
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  theta = {'in': {'w': draw(3, 4), 'b': draw(4)}, 'out': {'w': draw(4, 2), 'b': draw(2)}}
  alpha = jax.tree.map(lambda t: np.float32(0.1) * draw(*t.shape), theta)
  return jax.device_put((theta, alpha, ms.Batch(draw(6, 3), draw(6, 2))))


def test_one_step_is_the_papers_equation(problem):

  @jax.jit
  def both(theta, alpha, batch):
    by_hand = jax.tree.map(lambda t, a, g: t - a * g, theta, alpha, jax.grad(loss_fn)(theta, batch))
    return ms.adapt(theta, alpha, batch, loss_fn=loss_fn), by_hand

  assert_trees_close(*both(*problem))


@pytest.mark.parametrize('steps', [0, 1, 4])
def test_steps_repeat_the_step_and_path_holds_each(problem, steps):

  @jax.jit
  def ways(theta, alpha, batch):
    one_by_one = [theta]
    for _ in range(steps):
      one_by_one.append(ms.adapt(one_by_one[-1], alpha, batch, loss_fn=loss_fn))
    return one_by_one, *(how(theta, alpha, batch, loss_fn=loss_fn, steps=steps) for how in (ms.adapt, ms.adapt_path))

  expected, adapted, path = ways(*problem)
  assert_trees_close(adapted, expected[-1])
  assert_trees_close(path, jax.tree.map(lambda *leaves: np.stack(leaves), *expected))


def test_outside_of_jit_nothing_is_compiled_twice(problem):
  theta, alpha, batch = problem
  for how, options in ((ms.adapt, dict(adjoint='revolve')), (ms.adapt_path, {}), (ms.adapt, dict(alpha_by_step=True))):
    rates = jax.tree.map(lambda a: jnp.stack([a] * 3), alpha) if options.get('alpha_by_step') else alpha
    call = lambda: how(theta, rates, batch, loss_fn=loss_fn, steps=3, **options)  # noqa: B023
    with compilations() as first:
      expected = call()
    with compilations() as again:
      assert_trees_close(call(), expected, rtol=0, atol=0)
    assert first
    assert not again


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path('/proc/self/status').exists(), reason='resident memory is read as Linux tells it')
def test_two_hundred_calls_outside_of_jit_keep_no_memory(problem):
  resident = lambda: int(re.search(r'VmRSS:\s+(\d+) kB', pathlib.Path('/proc/self/status').read_text())[1]) / 1024
  call = lambda: ms.adapt(*problem, loss_fn=loss_fn, steps=3, adjoint='revolve')
  call()
  gc.collect()
  before = resident()
  for _ in range(200):
    call()
  gc.collect()
  assert resident() - before < 5  # MiB; a program that is compiled in each call takes more than one MiB.


def test_a_loss_with_a_loop_is_compiled_once_a_call(problem):
  theta, alpha, batch = problem
  looped = lambda theta, batch: jax.lax.map(lambda x: loss_fn(theta, ms.Batch(x[None], batch.y[:1])), batch.x).mean()
  ms.adapt(theta, alpha, batch, loss_fn=looped, steps=5)
  with compilations() as found:
    ms.adapt(theta, alpha, batch, loss_fn=looped, steps=5)
  assert len(found) <= 1


@pytest.mark.parametrize('adjoint', ['reverse', 'revolve'])
def test_a_loss_that_closes_over_what_is_traced_is_scanned_too(problem, adjoint):
  theta, alpha, batch = problem

  def adapted(x):
    loss = lambda theta, y: loss_fn(theta, ms.Batch(x, y))
    return ms.adapt(theta, alpha, batch.y, loss_fn=loss, steps=50, adjoint=adjoint)

  program = str(jax.make_jaxpr(adapted)(batch.x))
  assert program.count(' tanh ') <= 6
  expected = ms.adapt(theta, alpha, batch, loss_fn=loss_fn, steps=50)
  assert_trees_close(jax.jit(adapted)(batch.x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
  'prefix',
  [
    pytest.param(0.3, id='one number'),
    pytest.param({'in': 0.3, 'out': -0.2}, id='one a layer'),
    pytest.param({'in': {'w': 0.3, 'b': 0.0}, 'out': 0.1}, id='mixed'),
    pytest.param(np.float64(0.3), id="NumPy's number"),
  ],
)
def test_alpha_may_be_a_prefix(problem, prefix):
  theta, _, batch = problem
  per_layer = prefix if isinstance(prefix, dict) else {'in': prefix, 'out': prefix}
  full = {
    layer: {
      name: np.full(
        leaf.shape, per_layer[layer][name] if isinstance(per_layer[layer], dict) else per_layer[layer], np.float32
      )
      for name, leaf in leaves.items()
    }
    for layer, leaves in theta.items()
  }
  adapted = jax.jit(lambda theta, batch: [ms.adapt(theta, a, batch, loss_fn=loss_fn) for a in (prefix, full)])
  assert_trees_close(*adapted(theta, batch))


def test_a_prefix_gets_the_sum_of_its_entries_gradients(problem):
  theta, _, batch = problem
  outer = lambda alpha: loss_fn(ms.adapt(theta, alpha, batch, loss_fn=loss_fn), batch)
  forms = jax.tree.map(lambda t: np.full(t.shape, 0.1, np.float32), theta), {'in': 0.1, 'out': 0.1}
  per_entry, per_layer = jax.device_get(jax.jit(lambda *alphas: [jax.grad(outer)(alpha) for alpha in alphas])(*forms))
  for layer in theta:
    assert_close(per_layer[layer], sum(g.sum() for g in per_entry[layer].values()), rtol=1e-5)


def test_first_order_drops_the_second_derivative_and_still_trains_alpha(problem):

  @jax.jit
  def gradients(theta, alpha, batch):
    adapted = lambda t, a, **options: ms.adapt(t, a, batch, loss_fn=loss_fn, **options)
    outer = lambda first_order: lambda t, a: loss_fn(adapted(t, a, first_order=first_order), batch)
    inner, at_adapted = (jax.grad(loss_fn)(t, batch) for t in (theta, adapted(theta, alpha)))
    first = jax.grad(outer(True), argnums=(0, 1))(theta, alpha)
    return inner, at_adapted, first, jax.grad(outer(False))(theta, alpha)

  inner, at_adapted, (d_theta, d_alpha), second = jax.device_get(gradients(*problem))
  assert_trees_close(d_theta, at_adapted)
  assert_trees_close(d_alpha, jax.tree.map(lambda g, v: -g * v, inner, at_adapted))
  assert not np.allclose(second['in']['w'], d_theta['in']['w'], rtol=1e-3)


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16, jnp.float32])
def test_dtypes_are_kept(problem, dtype):
  theta, _, batch = problem
  in_dtype = jax.tree.map(lambda t: jax.ShapeDtypeStruct(t.shape, dtype), (theta, batch))
  for alpha in (0.1, jax.device_put(jax.tree.map(lambda t: np.full(t.shape, 0.1, np.float32), theta))):
    with jax.numpy_dtype_promotion('strict'):
      adapted = jax.eval_shape(lambda t, b, a=alpha: ms.adapt(t, a, b, loss_fn=loss_fn, steps=2), *in_dtype)
    assert {leaf.dtype for leaf in jax.tree.leaves(adapted)} == {jnp.dtype(dtype)}


def test_jit_vmap_and_numpy_arguments_give_the_same(problem):
  theta, alpha, batch = problem
  adapt = functools.partial(ms.adapt, loss_fn=loss_fn, steps=2)
  plain = adapt(theta, alpha, batch)
  compiled = jax.jit(adapt)
  assert_trees_close(compiled(theta, alpha, batch), plain)
  assert_trees_close(adapt(*jax.device_get((theta, alpha)), batch), plain)
  batches = jax.tree.map(lambda a: np.stack([a, 2 * a, -a]), jax.device_get(batch))
  batched = jax.device_get(jax.jit(jax.vmap(adapt, (None, None, 0)))(theta, alpha, batches))
  for i in range(3):
    one = compiled(theta, alpha, jax.tree.map(lambda a, i=i: a[i], batches))
    assert_trees_close(jax.tree.map(lambda a, i=i: a[i], batched), one)


def test_any_pytree_and_any_batch():
  theta = (np.float32(2.0), [np.ones(3, np.float32)])
  loss_fn = lambda t, _: 0.5 * t[0] ** 2 + jnp.sum(t[1][0])
  adapted = jax.jit(lambda theta: ms.adapt(theta, 0.5, None, loss_fn=loss_fn))(theta)
  assert_trees_close(adapted, (np.float32(1.0), [np.full(3, 0.5)]))


class TestBadInput:
  def adapt(self, problem, alpha, theta=None, **kwargs):
    return ms.adapt(problem[0] if theta is None else theta, alpha, problem[2], loss_fn=loss_fn, **kwargs)

  def test_names_the_leaf_with_the_wrong_shape(self, problem):
    alpha = {**problem[1], 'out': {'w': np.ones((4, 3)), 'b': np.ones(2)}}
    with pytest.raises(ValueError, match=saying("alpha['out']['w'] has shape (4, 3)", 'theta', 'has shape (4, 2)')):
      self.adapt(problem, alpha)

  def test_names_the_leaf_that_is_missing(self, problem):
    with pytest.raises(ValueError, match=saying('alpha has no entry', "theta['out']['b']")):
      self.adapt(problem, {'in': 0.1, 'out': {'w': 0.1}})

  def test_names_the_leaf_that_is_no_array(self, problem):
    for leaf in (jax.nn.relu, np.float32, 'a', object()):
      theta = {**problem[0], 'out': {**problem[0]['out'], 'activation': leaf}}
      with pytest.raises(ValueError, match=saying("theta['out']['activation']", 'must be an array', 'keep functions')):
        self.adapt(problem, 0.1, theta=theta)
    for alpha in (jax.nn.relu, 1j, 'a', np.ones(2, complex)):
      with pytest.raises(ValueError, match=saying("alpha['out']", 'a number', 'array of real numbers', 'got ')):
        self.adapt(problem, {'in': 0.1, 'out': alpha})

  def test_names_the_leaf_that_is_too_much(self, problem):
    with pytest.raises(ValueError, match=saying("alpha['middle']", 'nothing in theta')):
      self.adapt(problem, {**problem[1], 'middle': 0.1})

  def test_a_prefix_must_be_a_scalar(self, problem):
    with pytest.raises(ValueError, match=saying("alpha['in'] has shape (4,)", 'the same shape', 'a scalar')):
      self.adapt(problem, {'in': np.ones(4), 'out': 0.1})

  def test_integers_in_theta(self, problem):
    with pytest.raises(ValueError, match=saying("theta['count']", 'int32', 'keep integers')):
      self.adapt(problem, 0.1, theta={**problem[0], 'count': np.arange(3, dtype=np.int32)})

  @pytest.mark.parametrize('steps', [-1, 1.5, True, '2'])
  def test_steps(self, problem, steps):
    with pytest.raises(ValueError, match=saying('steps', 'an integer of at least 0', f'got {steps!r}')):
      self.adapt(problem, 0.1, steps=steps)

  def test_a_loss_for_each_item(self, problem):
    with pytest.raises(ValueError, match=saying('loss_fn', 'a scalar', 'got shape (6,)', 'mean or sum')):
      ms.adapt(problem[0], 0.1, problem[2], loss_fn=lambda t, b: jnp.sum(b.x @ t['in']['w'], 1))

  def test_complex_numbers_in_theta(self, problem):
    with pytest.raises(ValueError, match=saying("theta['z']", 'complex64', 'two real arrays')):
      self.adapt(problem, 0.1, theta={**problem[0], 'z': np.ones(3, np.complex64)})

  @pytest.mark.parametrize(('loss', 'dtype'), [(jnp.int32(3), 'int32'), (3, 'int32'), (jnp.complex64(1j), 'complex64')])
  def test_a_loss_without_a_gradient(self, problem, loss, dtype):
    with pytest.raises(ValueError, match=saying('loss_fn', 'floating-point scalar', f'got dtype {dtype}')):
      ms.adapt(problem[0], 0.1, problem[2], loss_fn=lambda t, b: loss)

  def test_auxiliary_outputs(self, problem):
    with pytest.raises(ValueError, match=saying('loss_fn', 'a scalar', 'got tuple', 'auxiliary outputs')):
      ms.adapt(problem[0], 0.1, problem[2], loss_fn=lambda t, b: (loss_fn(t, b), {}))

  def test_says_so_under_jit_too(self, problem):
    with pytest.raises(ValueError, match='alpha has no entry'):
      jax.jit(lambda t, a, b: ms.adapt(t, a, b, loss_fn=loss_fn))(problem[0], {'in': 0.1}, problem[2])


class TestInitAlpha:
  def test_one_value_in_the_papers_range_everywhere(self, problem):
    draw = jax.jit(jax.vmap(lambda seed: ms.init_alpha(jax.random.key(seed), problem[0])))
    alpha = draw(np.arange(200))
    assert jax.tree.map(lambda a: a.shape[1:], alpha) == jax.tree.map(jnp.shape, problem[0])
    entries = np.concatenate([np.reshape(a, (200, -1)) for a in jax.tree.leaves(alpha)], 1)
    assert np.ptp(entries, axis=1).max() == 0
    assert 0.005 <= entries.min() < 0.01
    assert 0.095 < entries.max() <= 0.1

  def test_a_constant(self, problem):
    alpha = ms.init_alpha(jax.random.key(0), problem[0], ms.AlphaConfig(0.25, 0.25))
    assert {float(v) for a in jax.tree.leaves(alpha) for v in np.ravel(a)} == {0.25}

  def test_a_layer_has_a_rate_if_any_of_its_leaves_adapts(self, problem):
    init = functools.partial(ms.init_alpha, config=ms.AlphaConfig(0.25, 0.25, per='layer'))
    alpha = init(jax.random.key(0), problem[0], adapts=lambda name: name == 'in.w')
    assert alpha == {'in': 0.25, 'out': None}

  @pytest.mark.parametrize(
    ('options', 'parts'),
    [
      (dict(low=0.2, high=0.1), ('low <= high', 'low=0.2', 'high=0.1')),
      (dict(low=0.0, high=float('inf')), ('low=0.0', 'high=inf', 'finite')),
      (dict(per='row'), ('per must be', 'entry', 'leaf', 'layer', 'all', 'row')),
    ],
  )
  def test_a_config_that_says_nothing_of_use(self, options, parts):
    with pytest.raises(ValueError, match=saying(*parts)):
      ms.AlphaConfig(**options)

  def test_a_config_of_arrays_is_hashable_and_equals_one_of_numbers(self):
    of_arrays, of_numbers = ms.AlphaConfig(np.array(0.5), np.float64(1)), ms.AlphaConfig(0.5, 1)
    assert of_arrays == of_numbers
    assert hash(of_arrays) == hash(of_numbers)


def test_meta_params_keep_theta_before_alpha():
  leaves = jax.tree.leaves(ms.MetaParams(theta=np.zeros(1), alpha=np.ones(2)))
  assert [leaf.shape for leaf in leaves] == [(1,), (2,)]


class TestAdjoint:
  """The ways back through the inner steps are one and the same."""

  @pytest.mark.parametrize(
    ('alpha', 'steps'),
    [  # The prefix has both a scalar and a whole leaf.
      *[('prefix', 0), ('prefix', 1), ('prefix', 3), ('whole', 3), pytest.param('scalar', 3, marks=pytest.mark.slow)],
      *[pytest.param(alpha, steps, marks=pytest.mark.slow) for alpha in ('whole', 'scalar') for steps in (0, 1)],
    ],
  )
  def test_equals_reverse_mode_also_in_the_support_and_in_what_the_loss_closes_over(self, alpha, steps):
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
      theta = {'w': rng.normal(size=(3, 2)), 'b': rng.normal(size=2)}
      support = ms.Batch(rng.normal(size=(5, 3)), np.arange(5) % 2)
      rates = {
        'whole': jax.tree.map(lambda t: rng.normal(size=t.shape), theta),
        'scalar': np.float64(0.3),
        'prefix': {'w': np.float64(0.3), 'b': rng.normal(size=2)},
      }[alpha]

      def outer(theta, rates, x, temperature, adjoint):
        loss_fn = lambda t, batch: ms.losses.cross_entropy(
          jnp.tanh(batch.x @ t['w'] + t['b'][None]) * temperature, batch.y
        )
        adapted = ms.adapt(theta, rates, support._replace(x=x), loss_fn=loss_fn, steps=steps, adjoint=adjoint)
        return loss_fn(adapted, support._replace(x=2 * x + 1))

      def gradient(adjoint):
        by_all = jax.jit(jax.grad(functools.partial(outer, adjoint=adjoint), argnums=(0, 1, 2, 3)))
        return by_all(theta, rates, support.x, np.float64(1.7))

      expected = gradient('reverse')
      for adjoint in ('checkpoint', 'hvp', 'revolve'):
        assert_trees_close(expected, gradient(adjoint), rtol=1e-10, atol=1e-12)

  def test_first_order(self, problem):
    options = dict(loss_fn=loss_fn, first_order=True, steps=2)

    @jax.jit
    def gradients(theta, alpha, batch):
      outer = lambda t, adjoint: loss_fn(ms.adapt(t, alpha, batch, adjoint=adjoint, **options), batch)
      return [jax.grad(outer)(theta, adjoint) for adjoint in ('reverse', 'checkpoint', 'hvp', 'revolve')]

    expected, *others = gradients(*problem)
    for other in others:
      assert_trees_close(expected, other)

  def test_memory_does_not_grow_with_the_steps(self):
    """A hundred activations of each item for each entry of θ, so that the path of θ counts for little."""
    ones = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    theta, support = {'w': ones(8, 8)}, ms.Batch(ones(2000, 8), ones(2000, 8))

    def loss_fn(t, batch):
      x = batch.x
      for _ in range(3):
        x = jnp.sin(jnp.sin(x @ t['w']))
      return jnp.mean((x - batch.y) ** 2)

    def memory(steps, adjoint):
      loss = lambda t, a, b: loss_fn(ms.adapt(t, a, b, loss_fn=loss_fn, steps=steps, adjoint=adjoint), b)
      compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(theta, theta, support).compile()
      return compiled.memory_analysis().temp_size_in_bytes

    for adjoint in ('checkpoint', 'hvp'):
      assert memory(32, adjoint) < 1.1 * memory(2, adjoint)
    assert memory(32, 'reverse') > 5 * memory(2, 'reverse')

  def test_an_unknown_way(self, problem):
    theta, alpha, batch = problem
    message = saying('adjoint', *map(repr, ('reverse', 'checkpoint', 'hvp', 'revolve')), "got 'implicit'")
    with pytest.raises(ValueError, match=message):
      ms.adapt(theta, alpha, batch, loss_fn=loss_fn, adjoint='implicit')
    with pytest.raises(ValueError, match=message):
      ms.maml(ms.nn.from_linen(ms.nn.MLP()), loss_fn, adjoint='implicit')


RATES_THETA = {'a': np.float32([1.0, -2.0]), 'b': np.float32(0.5)}
RATES_ALPHA = {'a': np.float32([[0.1, 0.2], [0.3, -0.1], [0.05, 0.0]]), 'b': np.float32([0.1, 0.0, 0.2])}


class TestRatesByStep:
  """θ_{t+1} = θ_t − α_t ∘ ∇L(θ_t)."""

  @staticmethod
  def loss(theta, batch):
    return jnp.sum(jnp.sin(theta['a']) * batch) + theta['b'] ** 2 * jnp.sum(theta['a'] ** 2)

  def by_hand(self, theta, alpha):
    for t in range(3):
      grads = jax.grad(self.loss)(theta, 2.0)
      theta = jax.tree.map(lambda p, a, g, t=t: p - a[t] * g, theta, alpha, grads)
    return theta

  def adapted_and_gradients(self, adapt):
    """`adapt(θ, α)`, and a loss's gradient through it by both."""
    both = lambda *meta: (adapt(*meta), jax.grad(lambda *meta: self.loss(adapt(*meta), 1.0), (0, 1))(*meta))
    return jax.jit(both)(RATES_THETA, RATES_ALPHA)

  @pytest.mark.parametrize('adjoint', ['reverse', 'checkpoint', 'hvp', 'revolve'])
  def test_each_step_takes_its_own_and_gets_its_own_gradient(self, adjoint):
    adapt = lambda theta, alpha: ms.adapt(
      theta, alpha, 2.0, loss_fn=self.loss, steps=3, alpha_by_step=True, adjoint=adjoint
    )
    (adapted, grads), (expected, expected_grads) = map(self.adapted_and_gradients, (adapt, self.by_hand))
    assert_trees_close(adapted, expected, rtol=1e-5)
    assert_trees_close(grads, expected_grads, rtol=1e-4, atol=1e-5)

  def test_path(self):
    path = jax.jit(
      lambda *meta: ms.adapt_path(*meta, 2.0, loss_fn=self.loss, steps=3, alpha_by_step=True)
    )(RATES_THETA, RATES_ALPHA)  # fmt: skip
    expected = self.adapted_and_gradients(self.by_hand)[0]
    assert_trees_close(jax.tree.map(lambda a: a[-1], jax.device_get(path)), expected, rtol=1e-5)

  def test_the_same_rates_are_the_same_as_one(self):
    one = jax.tree.map(lambda a: a[0], RATES_ALPHA)
    alpha = jax.tree.map(lambda a: np.broadcast_to(a[0], a.shape), RATES_ALPHA)
    adapt = lambda alpha, **options: ms.adapt(RATES_THETA, alpha, 2.0, loss_fn=self.loss, steps=3, **options)
    assert_trees_close(*jax.jit(lambda: (adapt(alpha, alpha_by_step=True), adapt(one)))())

  def test_a_number_a_step(self):
    adapt = lambda theta, alpha, **options: ms.adapt(theta, alpha, 2.0, loss_fn=self.loss, **options)
    by_step = lambda: adapt(RATES_THETA, np.float32([0.1, 0.2]), steps=2, alpha_by_step=True)
    assert_trees_close(*jax.jit(lambda: (by_step(), adapt(adapt(RATES_THETA, 0.1), 0.2)))())

  def test_rates_that_are_not_one_a_step(self):
    with pytest.raises(ValueError, match=saying("alpha['a'] has shape (3, 2)", 'each of 2 steps', 'starts with 2')):
      ms.adapt(RATES_THETA, RATES_ALPHA, 2.0, loss_fn=self.loss, steps=2, alpha_by_step=True)

  @pytest.mark.parametrize('per', ['entry', 'leaf', 'layer', 'all'])
  def test_init(self, per):
    config = ms.AlphaConfig(per=per, by_step=True)
    alpha = jax.eval_shape(lambda key: ms.init_alpha(key, RATES_THETA, config, steps=3), jax.random.key(0))
    adapt = lambda alpha: ms.adapt(RATES_THETA, alpha, 2.0, loss_fn=self.loss, steps=3, alpha_by_step=True)
    assert jax.eval_shape(adapt, alpha)['a'].shape == (2,)
    assert {leaf.shape[0] for leaf in jax.tree.leaves(alpha)} == {3}
