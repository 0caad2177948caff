import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import assert_close, assert_trees_close

import metasgd_jax as ms


def loss_fn(theta, batch):
  """A loss that is not quadratic, on a θ with two layers."""
  hidden = jnp.tanh(batch.x @ theta['in']['w'] + theta['in']['b'][None])
  return jnp.mean((hidden @ theta['out']['w'] + theta['out']['b'][None] - batch.y) ** 2)


@pytest.fixture
def problem():
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  theta = {'in': {'w': draw(3, 4), 'b': draw(4)}, 'out': {'w': draw(4, 2), 'b': draw(2)}}
  alpha = jax.tree.map(lambda t: 0.1 * draw(*t.shape), theta)
  return theta, alpha, ms.Batch(draw(6, 3), draw(6, 2))


def test_one_step_is_the_papers_equation(problem):
  theta, alpha, batch = problem
  grads = jax.grad(loss_fn)(theta, batch)
  expected = jax.tree.map(lambda t, a, g: t - a * g, theta, alpha, grads)
  assert_trees_close(ms.adapt(theta, alpha, batch, loss_fn=loss_fn), expected)


@pytest.mark.parametrize('steps', [0, 1, 4])
def test_steps_repeat_the_step_and_path_holds_each(problem, steps):
  theta, alpha, batch = problem
  expected = [theta]
  for _ in range(steps):
    expected.append(ms.adapt(expected[-1], alpha, batch, loss_fn=loss_fn))
  assert_trees_close(ms.adapt(theta, alpha, batch, loss_fn=loss_fn, steps=steps), expected[-1])
  path = ms.adapt_path(theta, alpha, batch, loss_fn=loss_fn, steps=steps)
  assert_trees_close(path, jax.tree.map(lambda *leaves: jnp.stack(leaves), *expected))


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
      name: jnp.full(leaf.shape, per_layer[layer][name] if isinstance(per_layer[layer], dict) else per_layer[layer])
      for name, leaf in leaves.items()
    }
    for layer, leaves in theta.items()
  }
  got = ms.adapt(theta, prefix, batch, loss_fn=loss_fn)
  assert_trees_close(got, ms.adapt(theta, full, batch, loss_fn=loss_fn))


def test_a_prefix_gets_the_sum_of_its_entries_gradients(problem):
  theta, _, batch = problem
  outer = lambda alpha: loss_fn(ms.adapt(theta, alpha, batch, loss_fn=loss_fn), batch)
  per_entry = jax.grad(outer)(jax.tree.map(lambda t: jnp.full_like(t, 0.1), theta))
  per_layer = jax.grad(outer)({'in': jnp.float32(0.1), 'out': jnp.float32(0.1)})
  for layer in theta:
    assert_close(per_layer[layer], sum(float(jnp.sum(g)) for g in per_entry[layer].values()), rtol=1e-5)


def test_first_order_drops_the_second_derivative_and_still_trains_alpha(problem):
  theta, alpha, batch = problem
  outer = lambda first_order, t, a: loss_fn(ms.adapt(t, a, batch, loss_fn=loss_fn, first_order=first_order), batch)
  inner = jax.grad(loss_fn)(theta, batch)
  at_adapted = jax.grad(loss_fn)(ms.adapt(theta, alpha, batch, loss_fn=loss_fn), batch)
  d_theta, d_alpha = jax.grad(functools.partial(outer, True), argnums=(0, 1))(theta, alpha)
  assert_trees_close(d_theta, at_adapted)
  assert_trees_close(d_alpha, jax.tree.map(lambda g, v: -g * v, inner, at_adapted))
  second = jax.grad(functools.partial(outer, False))(theta, alpha)
  assert not np.allclose(second['in']['w'], d_theta['in']['w'], rtol=1e-3)


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16, jnp.float32])
def test_dtypes_are_kept(problem, dtype):
  theta, _, batch = problem
  theta = jax.tree.map(lambda t: t.astype(dtype), theta)
  batch = jax.tree.map(lambda t: t.astype(dtype), batch)
  for alpha in (0.1, jax.tree.map(lambda t: jnp.full(t.shape, 0.1, jnp.float32), theta)):
    with jax.numpy_dtype_promotion('strict'):
      adapted = ms.adapt(theta, alpha, batch, loss_fn=loss_fn, steps=2)
    assert {leaf.dtype for leaf in jax.tree.leaves(adapted)} == {jnp.dtype(dtype)}


def test_jit_vmap_and_numpy_arguments_give_the_same(problem):
  theta, alpha, batch = problem
  adapt = functools.partial(ms.adapt, loss_fn=loss_fn, steps=2)
  plain = adapt(theta, alpha, batch)
  assert_trees_close(jax.jit(adapt)(theta, alpha, batch), plain)
  assert_trees_close(adapt(*jax.tree.map(np.asarray, (theta, alpha)), batch), plain)
  batches = jax.tree.map(lambda a: jnp.stack([a, 2 * a, -a]), batch)
  batched = jax.vmap(adapt, (None, None, 0))(theta, alpha, batches)
  for i in range(3):
    one = adapt(theta, alpha, jax.tree.map(lambda a, i=i: a[i], batches))
    assert_trees_close(jax.tree.map(lambda a, i=i: a[i], batched), one)


def test_any_pytree_and_any_batch():
  theta = (jnp.float32(2.0), [jnp.ones(3)])
  adapted = ms.adapt(theta, 0.5, None, loss_fn=lambda t, _: 0.5 * t[0] ** 2 + jnp.sum(t[1][0]))
  assert_trees_close(adapted, (jnp.float32(1.0), [jnp.full(3, 0.5)]))


class TestBadInput:
  def adapt(self, problem, alpha, theta=None, **kwargs):
    return ms.adapt(problem[0] if theta is None else theta, alpha, problem[2], loss_fn=loss_fn, **kwargs)

  def test_names_the_leaf_with_the_wrong_shape(self, problem):
    alpha = {**problem[1], 'out': {'w': jnp.ones((4, 3)), 'b': jnp.ones(2)}}
    with pytest.raises(ValueError, match=r"alpha\['out'\]\['w'\] has shape \(4, 3\) but theta.* has shape \(4, 2\)"):
      self.adapt(problem, alpha)

  def test_names_the_leaf_that_is_missing(self, problem):
    with pytest.raises(ValueError, match=r"alpha has no entry for theta\['out'\]\['b'\]"):
      self.adapt(problem, {'in': 0.1, 'out': {'w': 0.1}})

  def test_names_the_leaf_that_is_no_array(self, problem):
    for leaf in (jax.nn.relu, np.float32, 'a', object()):
      theta = {**problem[0], 'out': {**problem[0]['out'], 'activation': leaf}}
      with pytest.raises(ValueError, match=r"theta\['out'\]\['activation'\] is no array but .*; keep functions and"):
        self.adapt(problem, 0.1, theta=theta)
    for alpha in (jax.nn.relu, 1j, 'a', jnp.ones(2, complex)):
      with pytest.raises(ValueError, match=r"alpha\['out'\] must be a number, or an array of real numbers, got "):
        self.adapt(problem, {'in': 0.1, 'out': alpha})

  def test_names_the_leaf_that_is_too_much(self, problem):
    with pytest.raises(ValueError, match=r"alpha\['middle'\] matches nothing in theta"):
      self.adapt(problem, {**problem[1], 'middle': 0.1})

  def test_a_prefix_must_be_a_scalar(self, problem):
    with pytest.raises(
      ValueError, match=r"alpha\['in'\] has shape \(4,\) but .*; give alpha the same shape, or a scalar"
    ):
      self.adapt(problem, {'in': jnp.ones(4), 'out': 0.1})

  def test_integers_in_theta(self, problem):
    with pytest.raises(ValueError, match=r"theta\['count'\] has dtype int32.*keep integers"):
      self.adapt(problem, 0.1, theta={**problem[0], 'count': jnp.arange(3)})

  @pytest.mark.parametrize('steps', [-1, 1.5, True, '2'])
  def test_steps(self, problem, steps):
    with pytest.raises(ValueError, match=f'steps must be an integer of at least 0, got {steps!r}'):
      self.adapt(problem, 0.1, steps=steps)

  def test_a_loss_for_each_item(self, problem):
    with pytest.raises(ValueError, match=r'loss_fn must return a scalar, got shape \(6,\); take its mean or sum'):
      ms.adapt(problem[0], 0.1, problem[2], loss_fn=lambda t, b: jnp.sum(b.x @ t['in']['w'], 1))

  def test_complex_numbers_in_theta(self, problem):
    with pytest.raises(ValueError, match=r"theta\['z'\] has dtype complex64.*complex numbers as two real arrays"):
      self.adapt(problem, 0.1, theta={**problem[0], 'z': jnp.ones(3, jnp.complex64)})

  @pytest.mark.parametrize(('loss', 'dtype'), [(jnp.int32(3), 'int32'), (3, 'int32'), (jnp.complex64(1j), 'complex64')])
  def test_a_loss_without_a_gradient(self, problem, loss, dtype):
    with pytest.raises(ValueError, match=f'loss_fn must return a floating-point scalar, got dtype {dtype}'):
      ms.adapt(problem[0], 0.1, problem[2], loss_fn=lambda t, b: loss)

  def test_auxiliary_outputs(self, problem):
    with pytest.raises(ValueError, match='must return a scalar, got tuple; leave auxiliary outputs out'):
      ms.adapt(problem[0], 0.1, problem[2], loss_fn=lambda t, b: (loss_fn(t, b), {}))

  def test_says_so_under_jit_too(self, problem):
    with pytest.raises(ValueError, match='alpha has no entry'):
      jax.jit(lambda t, a, b: ms.adapt(t, a, b, loss_fn=loss_fn))(problem[0], {'in': 0.1}, problem[2])


class TestInitAlpha:
  def test_one_value_in_the_papers_range_everywhere(self, problem):
    values = []
    for seed in range(200):
      alpha = ms.init_alpha(jax.random.key(seed), problem[0])
      assert jax.tree.map(jnp.shape, alpha) == jax.tree.map(jnp.shape, problem[0])
      entries = np.concatenate([np.ravel(a) for a in jax.tree.leaves(alpha)])
      assert np.ptp(entries) == 0
      values.append(entries[0])
    assert 0.005 <= min(values) < 0.01
    assert 0.095 < max(values) <= 0.1

  def test_a_constant(self, problem):
    alpha = ms.init_alpha(jax.random.key(0), problem[0], low=0.25, high=0.25)
    assert {float(v) for a in jax.tree.leaves(alpha) for v in np.ravel(a)} == {0.25}

  def test_an_empty_range(self, problem):
    with pytest.raises(ValueError, match='low <= high, got low=0.2, high=0.1'):
      ms.init_alpha(jax.random.key(0), problem[0], low=0.2, high=0.1)


def test_meta_params_keep_theta_before_alpha():
  leaves = jax.tree.leaves(ms.MetaParams(theta=jnp.zeros(1), alpha=jnp.ones(2)))
  assert [leaf.shape for leaf in leaves] == [(1,), (2,)]


class TestBackward:
  """The ways back through the inner steps are one and the same."""

  @pytest.mark.parametrize('steps', [0, 1, 3])
  @pytest.mark.parametrize('alpha', ['whole', 'scalar', 'prefix'])
  @pytest.mark.parametrize('backward', ['recompute', 'forward', 'sparse'])
  def test_equals_reverse_mode_also_in_the_support_and_in_what_the_loss_closes_over(self, backward, alpha, steps):
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
      theta = {'w': jnp.asarray(rng.normal(size=(3, 2))), 'b': jnp.asarray(rng.normal(size=2))}
      support = ms.Batch(jnp.asarray(rng.normal(size=(5, 3))), jnp.arange(5) % 2)
      rates = {
        'whole': jax.tree.map(lambda t: jnp.asarray(rng.normal(size=t.shape)), theta),
        'scalar': jnp.float64(0.3),
        'prefix': {'w': jnp.float64(0.3), 'b': jnp.asarray(rng.normal(size=2))},
      }[alpha]
      temperature = jnp.float64(1.7)

      def outer(theta, rates, x, temperature, backward):
        loss_fn = lambda t, batch: ms.losses.cross_entropy(
          jnp.tanh(batch.x @ t['w'] + t['b'][None]) * temperature, batch.y
        )
        adapted = ms.adapt(theta, rates, support._replace(x=x), loss_fn=loss_fn, steps=steps, backward=backward)
        return loss_fn(adapted, support._replace(x=2 * x + 1))

      gradients = [
        jax.jit(jax.grad(functools.partial(outer, backward=b), argnums=(0, 1, 2, 3)))(
          theta, rates, support.x, temperature
        )
        for b in ('reverse', backward)
      ]
      assert_trees_close(*gradients, rtol=1e-10, atol=1e-12)

  def test_first_order(self, problem):
    theta, alpha, batch = problem
    gradients = [
      jax.grad(
        lambda t, b=b: loss_fn(ms.adapt(t, alpha, batch, loss_fn=loss_fn, first_order=True, steps=2, backward=b), batch)
      )(theta)
      for b in ('reverse', 'recompute', 'forward', 'sparse')
    ]
    for other in gradients[1:]:
      assert_trees_close(gradients[0], other)

  def test_memory_does_not_grow_with_the_steps(self):
    """A hundred activations of each item for each entry of θ, so that the path of θ counts for little."""
    theta, support = {'w': jnp.ones((8, 8))}, ms.Batch(jnp.ones((2000, 8)), jnp.ones((2000, 8)))

    def loss_fn(t, batch):
      x = batch.x
      for _ in range(6):
        x = jnp.sin(x @ t['w'])
      return jnp.mean((x - batch.y) ** 2)

    def memory(steps, backward):
      loss = lambda t, a: loss_fn(ms.adapt(t, a, support, loss_fn=loss_fn, steps=steps, backward=backward), support)
      compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(theta, theta).compile()
      return compiled.memory_analysis().temp_size_in_bytes

    for backward in ('recompute', 'forward'):
      assert memory(32, backward) < 1.1 * memory(2, backward)
    assert memory(32, 'reverse') > 5 * memory(2, 'reverse')

  def test_an_unknown_way(self, problem):
    theta, alpha, batch = problem
    message = r"backward must be one of \('reverse', 'recompute', 'forward', 'sparse'\), got 'implicit'"
    with pytest.raises(ValueError, match=message):
      ms.adapt(theta, alpha, batch, loss_fn=loss_fn, backward='implicit')
    with pytest.raises(ValueError, match=message):
      ms.maml(None, loss_fn, backward='implicit')


RATES_THETA = {'a': jnp.array([1.0, -2.0]), 'b': jnp.float32(0.5)}
RATES_ALPHA = {'a': jnp.array([[0.1, 0.2], [0.3, -0.1], [0.05, 0.0]]), 'b': jnp.array([0.1, 0.0, 0.2])}


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

  @pytest.mark.parametrize('backward', ['reverse', 'recompute', 'forward', 'sparse'])
  def test_each_step_takes_its_own_and_gets_its_own_gradient(self, backward):
    adapt = lambda theta, alpha: ms.adapt(
      theta, alpha, 2.0, loss_fn=self.loss, steps=3, alpha_by_step=True, backward=backward
    )
    assert_trees_close(adapt(RATES_THETA, RATES_ALPHA), self.by_hand(RATES_THETA, RATES_ALPHA), rtol=1e-5)
    outer = lambda f: jax.grad(lambda *meta: self.loss(f(*meta), 1.0), (0, 1))(RATES_THETA, RATES_ALPHA)
    assert_trees_close(outer(adapt), outer(self.by_hand), rtol=1e-4, atol=1e-5)

  def test_path(self):
    path = ms.adapt_path(RATES_THETA, RATES_ALPHA, 2.0, loss_fn=self.loss, steps=3, alpha_by_step=True)
    assert_trees_close(jax.tree.map(lambda a: a[-1], path), self.by_hand(RATES_THETA, RATES_ALPHA), rtol=1e-5)

  def test_the_same_rates_are_the_same_as_one(self):
    alpha = jax.tree.map(lambda a: jnp.broadcast_to(a[0], a.shape), RATES_ALPHA)
    by_step = ms.adapt(RATES_THETA, alpha, 2.0, loss_fn=self.loss, steps=3, alpha_by_step=True)
    one = ms.adapt(RATES_THETA, jax.tree.map(lambda a: a[0], alpha), 2.0, loss_fn=self.loss, steps=3)
    assert_trees_close(by_step, one)

  def test_a_number_a_step(self):
    by_step = ms.adapt(RATES_THETA, jnp.array([0.1, 0.2]), 2.0, loss_fn=self.loss, steps=2, alpha_by_step=True)
    first = ms.adapt(RATES_THETA, 0.1, 2.0, loss_fn=self.loss)
    assert_trees_close(by_step, ms.adapt(first, 0.2, 2.0, loss_fn=self.loss))

  def test_rates_that_are_not_one_a_step(self):
    with pytest.raises(
      ValueError, match=r"alpha\['a'\] has shape \(3, 2\), but each of 2 steps has its own; put \[2\]"
    ):
      ms.adapt(RATES_THETA, RATES_ALPHA, 2.0, loss_fn=self.loss, steps=2, alpha_by_step=True)

  @pytest.mark.parametrize('per', ['entry', 'leaf', 'layer', 'all'])
  def test_init(self, per):
    alpha = ms.init_alpha(jax.random.key(0), RATES_THETA, per=per, steps=3)
    ms.adapt(RATES_THETA, alpha, 2.0, loss_fn=self.loss, steps=3, alpha_by_step=True)
    assert {leaf.shape[0] for leaf in jax.tree.leaves(alpha)} == {3}
