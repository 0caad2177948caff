"""Losses with custom derivatives: every adjoint gives the gradient of reverse mode, whether or not a rule is true."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from custom_rules import CANNOT_BE_COMPARED, FALSE, FALSE_SOMEWHERE, TRUE, by_jvp, by_labels, by_vjp
from problems import assert_trees_close

import metasgd_jax as ms
from metasgd_jax.inner import symmetry
from metasgd_jax.inner.symmetry import has_symmetric_hessian


def loss_of(layer):
  def loss(theta, batch):
    outputs = jnp.tanh(layer(batch.x @ theta['w1'])) @ theta['w2']
    return jnp.mean(optax.huber_loss(outputs[:, 0], batch.y))

  return loss


@pytest.fixture(scope='module')
def problem():
  keys = jax.random.split(jax.random.key(0), 4)
  theta = {'w1': jax.random.normal(keys[0], (3, 4)), 'w2': jax.random.normal(keys[1], (4, 1))}
  return theta, ms.Batch(jax.random.normal(keys[2], (5, 3)), jax.random.normal(keys[3], (5,)))


@pytest.mark.parametrize('name', TRUE)
def test_a_rule_that_is_a_derivative_is_known_to_be_one(name, problem):
  theta, batch = problem
  loss = loss_of(TRUE[name]())
  assert has_symmetric_hessian(lambda theta: loss(theta, batch), theta)
  assert jax.jit(lambda theta: jnp.asarray(has_symmetric_hessian(lambda theta: loss(theta, batch), theta)))(theta)


@pytest.mark.parametrize('name', [*FALSE, *FALSE_SOMEWHERE, *CANNOT_BE_COMPARED])
def test_a_rule_that_is_none_or_that_cannot_be_compared_is_not(name, problem):
  theta, batch = problem
  loss = loss_of((FALSE | FALSE_SOMEWHERE | CANNOT_BE_COMPARED)[name]())
  assert not has_symmetric_hessian(lambda theta: loss(theta, batch), theta)


HALF_FALSE = {
  'half': lambda: by_vjp(jnp.sin, lambda x, g: g * jnp.cos(x) / 2),
  'seven tenths': lambda: by_jvp(jnp.sin, lambda x, t: (0.7 * jnp.cos(x)).astype(x.dtype) * t),
  'leaky': lambda: by_vjp(jax.nn.relu, lambda x, g: jnp.where(x > 0, g, g / 10)),
}
HALF_TRUE = {name: TRUE[name] for name in ('relu', 'softplus', 'log_softmax', 'sine by vjp', 'square by jvp')}


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize('name', [*HALF_FALSE, *HALF_TRUE])
def test_half_precision_hides_no_false_rule(name, dtype, problem):
  theta, batch = jax.tree.map(lambda leaf: leaf.astype(dtype), problem)
  loss = loss_of((HALF_FALSE | HALF_TRUE)[name]())
  assert has_symmetric_hessian(lambda theta: loss(theta, batch), theta) == (name in HALF_TRUE)


@pytest.mark.parametrize('kind', [jnp.int32, jnp.uint8, bool])
def test_a_rule_that_reads_integers(kind):
  """A gradient that is reversed for the labels of one domain, and one that is scaled as the values are."""
  labels, marked = jnp.asarray([0, 1, 1, 0], kind), lambda labels: jnp.where(labels > 0, -1, 1)
  for forward, symmetric in ((jnp.ones_like, False), (marked, True)):
    layer = by_labels(forward, marked)
    assert has_symmetric_hessian(lambda theta, f=layer: jnp.sum(jnp.sin(f(theta, labels))), jnp.ones(4)) == symmetric


def test_equal_rules_are_compared_once(monkeypatch):
  compared = []
  monkeypatch.setattr(symmetry, '_compare', lambda *given: compared.append(given) or [jnp.ones(1, bool)])
  layers = lambda theta: jnp.sum(jax.nn.relu(jax.nn.relu(theta)) + by_vjp(jnp.sin, lambda x, g: -g)(theta))
  assert has_symmetric_hessian(layers, jnp.ones(4))
  assert len(compared) == 2


def test_a_rule_of_complex_numbers_is_not_compared():
  layer = by_vjp(lambda x: x, lambda x, g: -g)
  loss = lambda theta: jnp.sum(jnp.abs(layer(jnp.fft.fft(theta))) ** 2)
  assert not has_symmetric_hessian(loss, jnp.ones(4))


def called(seen, x):
  seen.append(x)
  return x


@pytest.mark.parametrize('pure', [True, False])
def test_a_rule_with_a_callback_is_not_called_at_invented_inputs(problem, pure):
  seen = []

  def backward(x, g):
    if pure:
      return g * jnp.cos(jax.pure_callback(functools.partial(called, seen), x, jax.lax.stop_gradient(x)))
    jax.debug.callback(seen.append, x)
    return g * jnp.cos(x)

  theta, batch = problem
  loss = loss_of(by_vjp(jnp.sin, backward))
  assert not has_symmetric_hessian(lambda theta: loss(theta, batch), theta)
  jax.effects_barrier()
  assert not seen


@pytest.mark.parametrize('adjoint', ['hvp', 'revolve'])
def test_a_rule_that_uses_a_traced_array(adjoint):

  @functools.partial(jax.jit, static_argnums=1)
  def gradient(scale, adjoint):
    layer = by_jvp(lambda x: jnp.sin(scale * x), lambda x, t: scale * jnp.cos(scale * x) * t)
    adapted = lambda theta: ms.adapt(theta, 0.1, None, loss_fn=lambda t, _: jnp.sum(layer(t)), steps=3, adjoint=adjoint)
    return jax.grad(lambda theta: jnp.sum(adapted(theta) ** 2))(jnp.array([0.3, 1.2]))

  np.testing.assert_allclose(gradient(2.0, adjoint), gradient(2.0, 'reverse'), rtol=1e-5)


def test_a_false_rule_with_rates_for_each_step():
  reversal = FALSE['reversal by vjp']()

  def outer(theta, alpha, adjoint):
    loss = lambda theta, _: reversal(theta[0]) * jnp.sin(theta[1])
    adapted = ms.adapt(theta, alpha, None, loss_fn=loss, steps=2, alpha_by_step=True, adjoint=adjoint)
    return jnp.sum(adapted**2)

  gradients = jax.jit(lambda *meta: [jax.grad(outer, (0, 1))(*meta, by) for by in ('reverse', 'hvp', 'revolve')])
  reverse, hvp, revolve = gradients(np.float32([0.5, 0.7]), np.float32([0.3, 0.2]))
  assert_trees_close(hvp, reverse, rtol=1e-5)
  assert_trees_close(revolve, reverse, rtol=1e-5)


ALWAYS = ('clipping of the norm', 'spikes', 'calls itself', 'relu', 'sine by vjp')
"""A rule of each kind: false and true, by vjp and by jvp, and one that cannot be compared."""


@pytest.mark.parametrize(
  'name',
  [*ALWAYS, *(pytest.param(name, marks=pytest.mark.slow) for name in FALSE | FALSE_SOMEWHERE if name not in ALWAYS)],
)
def test_every_adjoint_gives_the_gradient_of_reverse_mode(name, problem):
  loss = loss_of((FALSE | FALSE_SOMEWHERE | TRUE | CANNOT_BE_COMPARED)[name]())

  def outer(theta, alpha, batch, adjoint, steps):
    adapted = ms.adapt(theta, alpha, batch, loss_fn=loss, adjoint=adjoint, steps=steps)
    return jnp.sum(jnp.square(batch.x @ adapted['w1']) @ jnp.square(adapted['w2']))

  with jax.enable_x64(True):
    theta, batch = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), problem)
    alpha = jax.tree.map(lambda leaf: jnp.full_like(leaf, 0.1), theta)

    def gradients(*given):
      return [
        jax.grad(outer, (0, 1, 2))(*given, adjoint, steps)
        for steps in (1, 4)
        for adjoint in ('reverse', 'checkpoint', 'hvp', 'revolve')
      ]

    found = jax.jit(gradients)(theta, alpha, batch)
  for four in (found[:4], found[4:]):
    for other in four[1:]:
      assert_trees_close(other, four[0], rtol=1e-9, atol=1e-12)
