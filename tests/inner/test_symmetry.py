"""Losses with custom derivatives: every adjoint gives the gradient of reverse mode, whether or not a rule is true."""

import jax
import jax.numpy as jnp
import optax
import pytest
from problems import assert_trees_close

import metasgd_jax as ms
from metasgd_jax.inner.symmetry import has_symmetric_hessian


def by_vjp(function, backward):
  """Returns a function whose backward pass is `(x, cotangent) → cotangent`."""
  custom = jax.custom_vjp(function)
  custom.defvjp(lambda x: (function(x), x), lambda x, g: (backward(x, g),))
  return custom


def by_jvp(function, tangent):
  """Returns a function whose tangents are `(x, tangent) → tangent`."""
  custom = jax.custom_jvp(function)
  custom.defjvp(lambda x, t: (function(*x), tangent(*x, *t)))
  return custom


def calls_itself():
  """A true derivative whose forward pass calls the function itself, which forward mode refuses."""
  custom = jax.custom_vjp(jnp.sin)
  custom.defvjp(lambda x: (custom(x), x), lambda x, g: (g * jnp.cos(x),))
  return custom


def partly_stopped():
  """The first derivative is right, but the second lacks a part that depends on one of two inputs."""
  custom = by_vjp(lambda x: x[..., ::-1] * x, lambda x, g: jax.lax.stop_gradient(x[..., ::-1]) * (g + g[..., ::-1]))
  return lambda x: custom(x)


FALSE = {
  'reversal by vjp': lambda: by_vjp(lambda x: x, lambda x, g: -g),
  'reversal by jvp': lambda: by_jvp(lambda x: 1.0 * x, lambda x, t: -t),
  'clipping of entries': lambda: by_vjp(lambda x: x, lambda x, g: jnp.clip(g, -0.01, 0.01)),
  'clipping of the norm': lambda: by_vjp(lambda x: x, lambda x, g: g / jnp.maximum(1, jnp.linalg.norm(g) / 0.01)),
  'straight through': lambda: by_vjp(lambda x: jnp.round(4 * x) / 4, lambda x, g: g),
  'spikes': lambda: by_jvp(lambda x: (x > 0).astype(x.dtype), lambda x, t: t / (1 + x * x)),
  'half of the second derivative': partly_stopped,
  'narrow spikes': lambda: by_vjp(
    lambda x: (x > 0).astype(x.dtype), lambda x, g: g * jnp.maximum(0, 1e-3 - jnp.abs(x))
  ),
}
TRUE = {
  'none': lambda: jnp.tanh,
  'relu': lambda: jax.nn.relu,
  'softplus': lambda: jax.nn.softplus,
  'log_softmax': lambda: jax.nn.log_softmax,
  'sine by vjp': lambda: by_vjp(jnp.sin, lambda x, g: g * jnp.cos(x)),
  'square by jvp': lambda: by_jvp(jnp.square, lambda x, t: 2 * x * t),
  'in a scan': lambda: lambda x: jax.lax.scan(lambda x, _: (jax.nn.relu(x) + x, None), x, None, 2)[0],
}


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


@pytest.mark.parametrize('name', [*FALSE, 'calls itself'])
def test_a_rule_that_is_none_or_that_cannot_be_compared_is_not(name, problem):
  theta, batch = problem
  loss = loss_of({**FALSE, 'calls itself': calls_itself}[name]())
  assert not has_symmetric_hessian(lambda theta: loss(theta, batch), theta)


ALWAYS = ('clipping of the norm', 'spikes', 'calls itself', 'relu', 'sine by vjp')
"""A rule of each kind: false and true, by vjp and by jvp, and one that cannot be compared."""


@pytest.mark.parametrize(
  'name',
  [*ALWAYS, *(pytest.param(name, marks=pytest.mark.slow) for name in FALSE if name not in ALWAYS)],
)
def test_every_adjoint_gives_the_gradient_of_reverse_mode(name, problem):
  loss = loss_of({**FALSE, **TRUE, 'calls itself': calls_itself}[name]())

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
