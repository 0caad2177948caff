"""Gradient steps with a custom reverse mode: the forward pass stores θ, but no intermediates of the inner gradients."""

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
"""Largest number of times that `revolve` computes a step again. For 200 steps it stores 9 of the θ_t."""


def descend(
  grad: Callable[[PyTree], PyTree],
  steps: int,
  theta: PyTree,
  alpha: PyTree,
  *,
  symmetric: bool = True,
  sparse: bool = False,
) -> PyTree:
  """Returns θ after `steps` steps θ ← θ − α ∘ grad(θ), with a custom reverse mode.

  Let L be the outer loss, v = dL/dθ_{t+1} and g_t = grad(θ_t). Let H_t be the derivative of grad at θ_t. One step of
  the backward pass is then

      dL/dα −= g_t ∘ v        dL/dθ_t = v − H_tᵀ (α ∘ v)

  If H_t is symmetric, both g_t and H_t (α ∘ v) come from one `jax.jvp` of `grad`, which stores no intermediates.
  Otherwise H_tᵀ (α ∘ v) comes from `jax.vjp`, which stores the intermediates of one step. The forward pass stores only
  the θ_t. Arrays that `grad` closes over, such as the support, receive their derivatives too. MixFlow-MG (Kemaev et al.
  2025) is a similar method.

  With `sparse`, the forward pass stores only some of the θ_t. The backward pass computes the others again, in the order
  of `schedule`.

  Args:
    grad: Gradient of a scalar function of θ, `θ → pytree with θ's structure`.
    steps: Number of steps, 0 or more.
    theta: Parameters, a pytree of arrays.
    alpha: Rates, a pytree with θ's structure whose leaves have the shape of θ's leaves or are scalars.
    symmetric: Whether H_t is known to be symmetric; see `has_symmetric_hessian`.
    sparse: Whether only a few of the θ_t are stored.
  """
  alpha = jax.tree.map(lambda a, t: jnp.broadcast_to(a, t.shape), alpha, theta)
  closed, constants = _closed(grad, theta)
  step_back = _step_back_by_symmetry if symmetric else _step_back
  return (_descend_sparsely if sparse and steps > 2 else _descend)(closed, step_back, steps, theta, alpha, constants)


def _closed(grad, theta):
  """Returns `(closed, constants)`: `grad` as a function of θ and of the arrays that it closes over, and these arrays.

  The arrays are returned in two lists: those that have derivatives, and the others, such as integer labels.
  `jax.closure_convert` would leave the others in the closure, and tracers of a surrounding `vmap` would leak.
  """
  traced, shape = jax.make_jaxpr(grad, return_shape=True)(theta)
  jaxpr, constants, structure = traced.jaxpr, traced.consts, jax.tree.structure(shape)
  inexact = [jnp.issubdtype(jnp.result_type(c), jnp.inexact) for c in constants]

  def closed(theta, differentiable, others):  # Closes over no array, or tracers of a surrounding `vmap` would leak.
    parts = iter(differentiable), iter(others)
    given = [next(parts[0] if smooth else parts[1]) for smooth in inexact]
    return jax.tree.unflatten(structure, jaxpr_as_fun(ClosedJaxpr(jaxpr, given))(*jax.tree.leaves(theta)))

  differentiable = [c for c, smooth in zip(constants, inexact, strict=True) if smooth]
  others = [c for c, smooth in zip(constants, inexact, strict=True) if not smooth]
  return closed, (differentiable, others)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _descend(grad, step_back, steps, theta, alpha, constants):
  return _forward(grad, step_back, steps, theta, alpha, constants)[0]


def _forward(grad, step_back, steps, theta, alpha, constants):
  del step_back

  def body(t, _):
    return _step(grad, t, alpha, constants), t

  adapted, path = _scan(body, theta, None, steps)
  return adapted, (path, alpha, constants)


def _backward(grad, step_back, steps, kept, v):
  path, alpha, constants = kept

  def body(carry, t):
    return step_back(grad, carry, t, alpha, constants), None

  return _ended(_scan(body, _start_back(v, alpha, constants), path, steps, reverse=True)[0])


_descend.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _descend_sparsely(grad, step_back, steps, theta, alpha, constants):
  del step_back
  return _scan(lambda t, _: (_step(grad, t, alpha, constants), None), theta, None, steps)[0]


def _forward_sparsely(grad, step_back, steps, theta, alpha, constants):
  del step_back
  plan = schedule(steps)
  rooms = jax.tree.map(lambda t: jnp.zeros((plan.rooms, *t.shape), t.dtype).at[0].set(t), theta)
  before, last = plan.moves[: steps - 1], plan.moves[steps - 1]

  def body(rooms, move):
    return _put(rooms, move[1], _step(grad, _take(rooms, move[0]), alpha, constants)), None

  rooms, _ = jax.lax.scan(body, rooms, before)
  return _step(grad, _take(rooms, last[0]), alpha, constants), (rooms, alpha, constants)


def _backward_sparsely(grad, step_back, steps, kept, v):
  rooms, alpha, constants = kept

  def body(carry, move):
    def again(rooms, back):
      return _put(rooms, move[1], _step(grad, _take(rooms, move[0]), alpha, constants)), back

    def go_back(rooms, back):
      return rooms, step_back(grad, back, _take(rooms, move[0]), alpha, constants)

    return jax.lax.cond(move[1] < 0, go_back, again, *carry), None

  moves = schedule(steps).moves[steps - 1 :]
  return _ended(jax.lax.scan(body, (rooms, _start_back(v, alpha, constants)), moves)[0][1])


_descend_sparsely.defvjp(_forward_sparsely, _backward_sparsely)


class Schedule(NamedTuple):
  """The order in which the forward steps and the backward steps are computed.

  Attributes:
    rooms: Number of buffers, each of which stores one θ_t. Buffer 0 stores θ_0. The last buffer is a working buffer,
      which consecutive steps overwrite.
    moves: Array `[n, 2]` with one row per step: the index of the buffer that stores θ_t, and the index of the buffer
      for θ_{t+1}. A second index of −1 marks a step back, which computes dL/dθ_t from dL/dθ_{t+1}.
  """

  rooms: int
  moves: np.ndarray


@functools.cache
def schedule(steps: int) -> Schedule:
  """Returns the schedule with the fewest buffers among those that recompute no step more than `AGAIN` times.

  The algorithm is revolve (Griewank and Walther 2000). Suppose that s of the θ_t are stored, and that every step is
  computed at most r times before the backward pass has gone through it. Then at most (s + r)! / (s! r!) steps are
  possible. Here r is `AGAIN` + 1, because the forward pass computes every step once.

  Args:
    steps: Number of steps, 1 or more.
  """
  kept = next(s for s in range(1, steps + 1) if _most_steps(s, AGAIN + 1) >= steps)
  moves: list[tuple[int, int]] = []

  def forward(source: int, count: int, target: int) -> None:
    for i in range(count):
      moves.append((source if i == 0 else kept, target if i == count - 1 else kept))

  def back(first: int, count: int) -> None:
    """Appends to the schedule `moves` the rows that go back through `count` steps.

    Buffer `first` stores θ before the first of these steps. All buffers after `first` may be overwritten.
    """
    free = kept - first
    if count == 1:
      moves.append((first, -1))
    elif free == 1:
      for t in range(count - 1, -1, -1):
        forward(first, t, kept)
        moves.append((kept if t else first, -1))
    else:
      times = next(r for r in range(1, count) if _most_steps(free, r) >= count)
      ahead = max(count - _most_steps(free - 1, times), _most_steps(free, times - 2) if times > 1 else 1)
      forward(first, ahead, first + 1)
      back(first + 1, count - ahead)
      back(first, ahead)

  back(0, steps)
  return Schedule(kept + 1, np.array(moves, np.int32))


def _most_steps(kept: int, times: int) -> int:
  """Returns the largest number of inner steps for which it is enough to store `kept` of the θ_t at a time.

  The condition is that the forward and backward passes compute no step more than `times` times; see `schedule`.
  """
  return math.comb(kept + times, kept)


def _step(grad, theta, alpha, constants):
  return gradient_step(theta, alpha, grad(theta, *constants))


def _start_back(v, alpha, constants):
  """Returns the initial carry of the backward pass: the derivative v with respect to the last θ, and zeros.

  The zeros are the derivatives with respect to α and the constants, to which every step back adds a term.
  """
  zeros = functools.partial(jax.tree.map, jnp.zeros_like)
  return v, zeros(alpha), zeros(constants[0])


def _ended(carry):
  """Returns the derivatives with respect to θ, α and the constants, given the last carry of the backward pass.

  Constants that have no derivative, such as integer labels, get `None`.
  """
  v, d_alpha, d_constants = carry
  return v, d_alpha, (d_constants, None)


def _step_back(grad, carry, t, alpha, constants):
  u = jax.tree.map(jnp.multiply, alpha, carry[0])
  g, transposed = jax.vjp(lambda t, c: grad(t, c, constants[1]), t, constants[0])
  return _accumulated(carry, g, *transposed(u))


def _step_back_by_symmetry(grad, carry, t, alpha, constants):
  u = jax.tree.map(jnp.multiply, alpha, carry[0])
  g, hu = jax.jvp(lambda t: grad(t, *constants), (t,), (u,))
  (more,) = jax.vjp(lambda c: grad(t, c, constants[1]), constants[0])[1](u)
  return _accumulated(carry, g, hu, more)


def _accumulated(carry, g, hu, more):
  """Returns the carry `(dL/dθ_t, dL/dα, dL/dconstants)` after one step of the backward pass; see `descend`.

  Args:
    carry: Carry before this step. Its first entry is v = dL/dθ_{t+1}.
    g: Gradient g_t.
    hu: Product H_tᵀ (α ∘ v).
    more: Product Cᵀ (α ∘ v), where C is the derivative of g_t with respect to the constants. It is subtracted from
      dL/dconstants.
  """
  v, d_alpha, d_constants = carry
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
  """Does the same as `jax.lax.scan`, but computes a single step without a loop."""
  if steps != 1:
    return jax.lax.scan(body, carry, xs, steps, reverse=reverse)
  carry, out = body(carry, jax.tree.map(lambda a: a[0], xs))
  return carry, jax.tree.map(lambda a: a[None], out)
