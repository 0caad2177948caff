"""Gradient steps whose derivatives keep no intermediates of the inner gradient."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from metasgd_jax.types import PyTree


def descend(grad: Callable[[PyTree], PyTree], steps: int, theta: PyTree, alpha: PyTree) -> PyTree:
  """Returns θ after `steps` of θ − α ∘ grad(θ), with a reverse mode of its own.

  Back from v = dL/dθ_{t+1}, with g_t = grad(θ_t) and H_t its derivative, which is symmetric:

      dL/dα −= g_t ∘ v        dL/dθ_t = v − H_t (α ∘ v)

  g_t and H_t (α ∘ v) come from one `jax.jvp` of grad, which keeps nothing; of the way forward the θ_t are kept. What
  grad closes over, such as the support, gets its derivative too. Compare MixFlow-MG (Kemaev et al. 2025).

  Args:
    grad: the gradient of a scalar function of θ.
    steps: 0 or more.
    theta: a pytree of arrays.
    alpha: a pytree of θ's structure; leaves of θ's shapes, or scalars.
  """
  alpha = jax.tree.map(lambda a, t: jnp.broadcast_to(a, t.shape), alpha, theta)
  closed, constants = jax.closure_convert(grad, theta)
  return _descend(closed, steps, theta, alpha, constants)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _descend(grad, steps, theta, alpha, constants):
  return _forward(grad, steps, theta, alpha, constants)[0]


def _forward(grad, steps, theta, alpha, constants):
  def body(t, _):
    return jax.tree.map(lambda p, a, g: p - a * g, t, alpha, grad(t, *constants)), t

  adapted, path = _scan(body, theta, None, steps)
  return adapted, (path, alpha, constants)


def _backward(grad, steps, kept, v):
  path, alpha, constants = kept

  def body(carry, t):
    v, d_alpha, d_constants = carry
    u = jax.tree.map(jnp.multiply, alpha, v)
    g, hu = jax.jvp(lambda t: grad(t, *constants), (t,), (u,))
    more = jax.vjp(lambda *c: grad(t, *c), *constants)[1](u)
    return (
      jax.tree.map(jnp.subtract, v, hu),
      jax.tree.map(lambda total, g, v: total - g * v, d_alpha, g, v),
      jax.tree.map(jnp.subtract, d_constants, list(more)),
    ), None

  zeros = functools.partial(jax.tree.map, jnp.zeros_like)
  return _scan(body, (v, zeros(alpha), zeros(list(constants))), path, steps, reverse=True)[0]


_descend.defvjp(_forward, _backward)


def _scan(body, carry, xs, steps, *, reverse=False):
  """`jax.lax.scan`; a single step without a loop."""
  if steps != 1:
    return jax.lax.scan(body, carry, xs, steps, reverse=reverse)
  carry, out = body(carry, jax.tree.map(lambda a: a[0], xs))
  return carry, jax.tree.map(lambda a: a[None], out)
