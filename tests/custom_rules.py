"""Layers with custom derivative rules, some of which are not the derivative of their function."""

import jax
import jax.numpy as jnp
import optax


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


def root_by_iteration():
  """√(1 + x²) by Newton's method in a while loop, which reverse mode needs a rule for."""

  @jax.custom_jvp
  def newton(x):
    square = 1 + x * x
    step = lambda y: (y + square / y) / 2
    return jax.lax.while_loop(lambda y: jnp.any(jnp.abs(y * y - square) > 1e-12 * square), step, square)

  @newton.defjvp
  def tangent(x, t):
    root = newton(*x)
    return root, t[0] * x[0] / root

  return newton


def by_vjp_of_other(forward):
  """The sine, whose backward pass is right and whose forward pass has another derivative."""
  custom = jax.custom_vjp(jnp.sin)
  custom.defvjp(lambda x: (forward(x), x), lambda x, g: (g * jnp.cos(x),))
  return custom


def unlike_its_transpose():
  """The identity, whose transpose reverses the gradient."""
  return lambda x: jax.custom_derivatives.linear_call(lambda _, x: x, lambda _, g: -g, (), x)


def reversed_beside_a_constant():
  """A product that reverses the gradient if the other factor is not differentiated."""
  custom = jax.custom_vjp(jnp.multiply)

  def backward(kept, g):
    x, y, perturbed = kept
    return g * y if perturbed else -g * y, g * x

  custom.defvjp(lambda x, y: (x.value * y.value, (x.value, y.value, y.perturbed)), backward, symbolic_zeros=True)
  return lambda x: custom(x, jnp.full_like(x, 2))


def first_entry(x):
  return jnp.arange(x.size).reshape(x.shape) == 0


def factor_where(condition):
  """A derivative that is doubled where a condition on the input and the cotangent holds."""
  return lambda: by_vjp(jnp.sin, lambda x, g: (1 + condition(x, g)).astype(x.dtype) * jnp.cos(x) * g)


FALSE_SOMEWHERE = {
  'near zero': factor_where(lambda x, g: jnp.abs(x) < 0.05),
  'between two small numbers': factor_where(lambda x, g: (x > 0.0501) & (x < 0.0502)),
  'far away': factor_where(lambda x, g: jnp.abs(x) > 1e6),
  'for large gradients': factor_where(lambda x, g: jnp.abs(g) > 1e5),
  'at zero': factor_where(lambda x, g: x == 0),
  'after rounding': factor_where(lambda x, g: jnp.floor(x) == 123456),
  'in one row of a table': factor_where(lambda x, g: (jnp.arange(1000) == 777)[jnp.clip(x, 0, 999).astype(int)]),
  'in an inner where': factor_where(lambda x, g: jnp.where(x > 0.0501, jnp.where(x < 0.0502, 1, 0), 0)),
  'in a product of comparisons': factor_where(
    lambda x, g: (x > 0.0501).astype(float) * (2 * x < 0.1004).astype(float) != 0
  ),
  'in a product over all entries': factor_where(lambda x, g: jnp.prod((x > 2).astype(float)) != 0),
  'between two bounds on equal numbers': factor_where(
    lambda x, g: jnp.where(jnp.abs(x) > 0.0501, jnp.where(jnp.abs(x) < 0.0502, 1, 0), 0)
  ),
  'beyond the bound of one entry': factor_where(
    lambda x, g: jnp.where(x > jnp.where(first_entry(x), 1e12, 0), jnp.where(first_entry(x), 1, 0), 0)
  ),
  'for one branch of cond': lambda: by_vjp(
    jnp.sin, lambda x, g: jax.lax.cond(jnp.sum(x) > 1e12, lambda c: 2 * c, lambda c: c, g * jnp.cos(x))
  ),
}
"""Rules that are the derivative of their function for most inputs."""


def by_labels(factor, backward):
  """A layer `(x, labels) → factor(labels) x`, whose backward pass multiplies by `backward(labels)`."""
  times = lambda which, labels, x: jnp.asarray(which(labels)).astype(x.dtype) * x
  custom = jax.custom_vjp(lambda x, labels: times(factor, labels, x))
  custom.defvjp(
    lambda x, labels: (times(factor, labels, x), labels), lambda labels, g: (times(backward, labels, g), None)
  )
  return custom


FALSE = {
  'reversal by vjp': lambda: by_vjp(lambda x: x, lambda x, g: -g),
  'reversal by jvp': lambda: by_jvp(lambda x: 1.0 * x, lambda x, t: -t),
  'clipping of entries': lambda: by_vjp(lambda x: x, lambda x, g: jnp.clip(g, -0.01, 0.01)),
  'clipping of the norm': lambda: by_vjp(lambda x: x, lambda x, g: g / jnp.maximum(1, jnp.linalg.norm(g) / 0.01)),
  'straight through': lambda: by_vjp(lambda x: jnp.round(4 * x) / 4, lambda x, g: g),
  'spikes': lambda: by_jvp(lambda x: (x > 0).astype(x.dtype), lambda x, t: t / (1 + x * x)),
  'half of the second derivative': partly_stopped,
  'forward pass without a derivative': lambda: by_vjp_of_other(lambda x: jax.lax.stop_gradient(jnp.sin(x))),
  'unlike its transpose': unlike_its_transpose,
  'reversed beside a constant': reversed_beside_a_constant,
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
  'safe cross-entropy': lambda: lambda x: x * optax.safe_softmax_cross_entropy(x, jnp.full_like(x, 0.2))[..., None],
  'in a scan': lambda: lambda x: jax.lax.scan(lambda x, _: (jax.nn.relu(x) + x, None), x, None, 2)[0],
}
CANNOT_BE_COMPARED = {'calls itself': calls_itself, 'root by iteration': root_by_iteration}
