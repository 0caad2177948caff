"""Gradient steps whose derivatives keep no intermediates of the inner gradient."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from metasgd_jax.inner.loop import gradient_step
from metasgd_jax.types import PyTree

AGAIN = 2
"""How often a step is taken again at most where few of the θ_t are kept, of 200 steps 9."""


def descend(
  grad: Callable[[PyTree], PyTree], steps: int, theta: PyTree, alpha: PyTree, *, sparse: bool = False
) -> PyTree:
  """Returns θ after `steps` of θ − α ∘ grad(θ), with a reverse mode of its own.

  Back from v = dL/dθ_{t+1}, with g_t = grad(θ_t) and H_t its derivative, which is symmetric:

      dL/dα −= g_t ∘ v        dL/dθ_t = v − H_t (α ∘ v)

  g_t and H_t (α ∘ v) come from one `jax.jvp` of grad, which keeps nothing; of the way forward the θ_t are kept. What
  grad closes over, such as the support, gets its derivative too. Compare MixFlow-MG (Kemaev et al. 2025).

  With `sparse`, some of the θ_t are kept and the others computed again on the way back, by `schedule`.

  Args:
    grad: the gradient of a scalar function of θ.
    steps: 0 or more.
    theta: a pytree of arrays.
    alpha: a pytree of θ's structure; leaves of θ's shapes, or scalars.
    sparse: keep few of the θ_t.
  """
  alpha = jax.tree.map(lambda a, t: jnp.broadcast_to(a, t.shape), alpha, theta)
  closed, constants = _closed(grad, theta)
  return (_descend_sparsely if sparse and steps > 2 else _descend)(closed, steps, theta, alpha, constants)


def _closed(grad, theta):
  """The gradient as a function of θ and of all that it closes over: arrays with derivatives, and others like labels.

  `jax.closure_convert` leaves the others in the closure, where a vmap's tracers would outlive it.
  """
  traced, shape = jax.make_jaxpr(grad, return_shape=True)(theta)
  inexact = [jnp.issubdtype(jnp.result_type(c), jnp.inexact) for c in traced.consts]

  def closed(theta, differentiable, others):
    parts = iter(differentiable), iter(others)
    constants = [next(parts[0] if smooth else parts[1]) for smooth in inexact]
    out = jaxpr_as_fun(ClosedJaxpr(traced.jaxpr, constants))(*jax.tree.leaves(theta))
    return jax.tree.unflatten(jax.tree.structure(shape), out)

  pick = lambda smooth: [c for c, i in zip(traced.consts, inexact, strict=True) if i == smooth]
  return closed, (pick(True), pick(False))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _descend(grad, steps, theta, alpha, constants):
  return _forward(grad, steps, theta, alpha, constants)[0]


def _forward(grad, steps, theta, alpha, constants):
  def body(t, _):
    return _step(grad, t, alpha, constants), t

  adapted, path = _scan(body, theta, None, steps)
  return adapted, (path, alpha, constants)


def _backward(grad, steps, kept, v):
  path, alpha, constants = kept

  def body(carry, t):
    return _step_back(grad, carry, t, alpha, constants), None

  return _ended(_scan(body, _start_back(v, alpha, constants), path, steps, reverse=True)[0])


_descend.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _descend_sparsely(grad, steps, theta, alpha, constants):
  return _scan(lambda t, _: (_step(grad, t, alpha, constants), None), theta, None, steps)[0]


def _forward_sparsely(grad, steps, theta, alpha, constants):
  plan = schedule(steps)
  rooms = jax.tree.map(lambda t: jnp.zeros((plan.rooms, *t.shape), t.dtype).at[0].set(t), theta)
  before, last = plan.moves[: steps - 1], plan.moves[steps - 1]

  def body(rooms, move):
    return _put(rooms, move[1], _step(grad, _take(rooms, move[0]), alpha, constants)), None

  rooms, _ = jax.lax.scan(body, rooms, before)
  return _step(grad, _take(rooms, last[0]), alpha, constants), (rooms, alpha, constants)


def _backward_sparsely(grad, steps, kept, v):
  rooms, alpha, constants = kept

  def body(carry, move):
    def again(rooms, back):
      return _put(rooms, move[1], _step(grad, _take(rooms, move[0]), alpha, constants)), back

    def go_back(rooms, back):
      return rooms, _step_back(grad, back, _take(rooms, move[0]), alpha, constants)

    return jax.lax.cond(move[1] < 0, go_back, again, *carry), None

  moves = schedule(steps).moves[steps - 1 :]
  return _ended(jax.lax.scan(body, (rooms, _start_back(v, alpha, constants)), moves)[0][1])


_descend_sparsely.defvjp(_forward_sparsely, _backward_sparsely)


class Schedule(NamedTuple):
  """The order of steps forward and back.

  Attributes:
    rooms: for θ_t that are kept at the same time; room 0 has θ_0, and the last is where steps are taken.
    moves: `[n, 2]`, the room of a θ_t, and that which its θ_{t+1} goes to; −1 for a step back.
  """

  rooms: int
  moves: np.ndarray


@functools.cache
def schedule(steps: int) -> Schedule:
  """Returns the order in which `steps` are taken back with the least rooms for which none is taken again too often.

  Griewank and Walther 2000 (revolve): with s of the θ_t kept, and every step taken r times at most before it is taken
  back, the most steps are (s + r)! / (s! r!). r is `AGAIN` + 1: the first time is that of the way forward.
  """
  most = lambda kept, times: math.comb(kept + times, kept)
  kept = next(s for s in range(1, steps + 1) if most(s, AGAIN + 1) >= steps)
  moves: list[tuple[int, int]] = []

  def forward(source: int, count: int, target: int) -> None:
    for i in range(count):
      moves.append((source if i == 0 else kept, target if i == count - 1 else kept))

  def back(first: int, count: int) -> None:
    """Takes back `count` steps, whose first θ is in room `first`; the rooms after it are free."""
    free = kept - first
    if count == 1:
      moves.append((first, -1))
    elif free == 1:
      for t in range(count - 1, -1, -1):
        forward(first, t, kept)
        moves.append((kept if t else first, -1))
    else:
      times = next(r for r in range(1, count) if most(free, r) >= count)
      ahead = max(count - most(free - 1, times), most(free, times - 2) if times > 1 else 1)
      forward(first, ahead, first + 1)
      back(first + 1, count - ahead)
      back(first, ahead)

  back(0, steps)
  return Schedule(kept + 1, np.array(moves, np.int32))


def _step(grad, theta, alpha, constants):
  return gradient_step(theta, alpha, grad(theta, *constants))


def _start_back(v, alpha, constants):
  """v, and the derivatives by α and by the constants, which are sums over steps."""
  zeros = functools.partial(jax.tree.map, jnp.zeros_like)
  return v, zeros(alpha), zeros(constants[0])


def _ended(carry):
  """The derivatives by θ, α and the constants, of which the others have none."""
  v, d_alpha, d_constants = carry
  return v, d_alpha, (d_constants, None)


def _step_back(grad, carry, t, alpha, constants):
  v, d_alpha, d_constants = carry
  u = jax.tree.map(jnp.multiply, alpha, v)
  g, hu = jax.jvp(lambda t: grad(t, *constants), (t,), (u,))
  (more,) = jax.vjp(lambda c: grad(t, c, constants[1]), constants[0])[1](u)
  return (
    jax.tree.map(jnp.subtract, v, hu),
    jax.tree.map(lambda total, g, v: total - g * v, d_alpha, g, v),
    jax.tree.map(jnp.subtract, d_constants, more),
  )


def _take(rooms, i):
  return jax.tree.map(lambda r: jax.lax.dynamic_index_in_dim(r, i, keepdims=False), rooms)


def _put(rooms, i, theta):
  return jax.tree.map(lambda r, t: jax.lax.dynamic_update_index_in_dim(r, t, i, 0), rooms, theta)


def _scan(body, carry, xs, steps, *, reverse=False):
  """`jax.lax.scan`; a single step without a loop."""
  if steps != 1:
    return jax.lax.scan(body, carry, xs, steps, reverse=reverse)
  carry, out = body(carry, jax.tree.map(lambda a: a[0], xs))
  return carry, jax.tree.map(lambda a: a[None], out)
