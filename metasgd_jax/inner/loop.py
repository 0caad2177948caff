"""The inner loop for any update rule: it splits θ into adapting and frozen leaves, and repeats the rule."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from metasgd_jax.types import PyTree

LossFn = Callable[[PyTree, Any], chex.Array]
"""Support loss of one task, `(θ, batch) → scalar`."""

Carry = Any

LOOPS = ' scan[', ' while[', ' cond['
"""Names, as a jaxpr prints them, of the operations that JAX compiles again whenever they run outside of `jax.jit`."""


class InnerProblem(NamedTuple):
  """The support loss of one task as a function of the adapting leaves of θ.

  Attributes:
    adapting: Adapting leaves: θ with `None` in place of every frozen leaf.
    loss: Support loss, `adapting → scalar`.
    merge: Function `adapting → θ` that puts the frozen leaves back.
  """

  adapting: PyTree
  loss: Callable[[PyTree], chex.Array]
  merge: Callable[[PyTree], PyTree]


def inner_problem(theta: PyTree, adapts: PyTree, batch: Any, loss_fn: LossFn) -> InnerProblem:
  """Returns the support loss as a function of the leaves of θ that adapt. The other leaves keep their values.

  Args:
    theta: Parameters, a pytree of floating-point arrays.
    adapts: Pytree of booleans with θ's structure: whether each leaf adapts.
    batch: Support of the task.
    loss_fn: Support loss, `(θ, batch) → scalar`.
  """
  adapting = adapting_part(theta, adapts)

  def merge(adapting):
    return jax.tree.map(lambda leaf, moves, new: new if moves else leaf, theta, adapts, adapting)

  def loss(adapting):
    return scalar_loss(loss_fn, merge(adapting), batch)

  return InnerProblem(adapting, loss, merge)


def adapting_part(theta: PyTree, adapts: PyTree) -> PyTree:
  """Returns θ with `None` in place of every leaf for which `adapts`, a pytree of booleans, is False."""
  return jax.tree.map(lambda leaf, moves: leaf if moves else None, theta, adapts)


def gradient_step(theta: PyTree, alpha: PyTree, grads: PyTree) -> PyTree:
  """Returns θ − α ∘ g (Li et al. 2017, equation 2)."""
  return jax.tree.map(lambda t, a, g: t - a * g, theta, alpha, grads)


def repeat(
  update: Callable[[Carry, Any], Carry], carry: Carry, steps: int, *, inputs: PyTree = None, arrays: Any
) -> Carry:
  """Returns the carry after `steps` updates.

  A traced loop is a `jax.lax.scan`. Outside of a trace the updates run one after another, because the scan would be
  compiled anew at every call. An update that contains a loop is an exception: it is scanned outside of a trace
  too, because the loop that it contains would otherwise be compiled anew at every step.

  Args:
    update: Function `(carry, input of the step) → carry`.
    carry: Carry before the first update.
    steps: Number of updates, 0 or more.
    inputs: Inputs of the steps, a pytree with leaves `[steps, …]`. By default the input of every step is `None`.
    arrays: Arrays that `update` uses. If one of them is traced, the loop is traced.
  """
  if steps == 1 and inputs is None:
    return update(carry, None)
  if (path := _path_outside_of_a_trace(update, carry, steps, inputs, arrays)) is not None:
    return path[-1]

  def body(carry, x):
    return update(carry, x), None

  return jax.lax.scan(body, carry, inputs, length=int(steps))[0]


def repeat_with_path(
  update: Callable[[Carry, Any], Carry],
  carry: Carry,
  steps: int,
  *,
  inputs: PyTree = None,
  arrays: Any,
  parameters: Callable[[Carry], PyTree] = lambda carry: carry,
) -> PyTree:
  """Returns `parameters(carry)` after 0, 1, …, `steps` updates, stacked: leaves `[steps + 1, …]`; see `repeat`."""
  if (path := _path_outside_of_a_trace(update, carry, steps, inputs, arrays)) is not None:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(parameters, path))

  def body(carry, x):
    carry = update(carry, x)
    return carry, parameters(carry)

  later = jax.lax.scan(body, carry, inputs, length=int(steps))[1]
  return jax.tree.map(lambda first, later: jnp.concatenate([first[None], later]), parameters(carry), later)


def _path_outside_of_a_trace(update, carry, steps, inputs, arrays) -> list[Carry] | None:
  """Returns a list of the carries after 0, 1, …, `steps` updates, which run one after another without `jax.lax.scan`.

  Returns `None` if `repeat` must scan instead: if the loop is traced, or if `update` itself contains a loop.
  """
  if is_traced((carry, inputs, arrays)):
    return None
  path = [carry]
  for t in range(steps):
    x = jax.tree.map(lambda leaf, t=t: leaf[t], inputs)
    if t == 0 and any(loop in str(jax.make_jaxpr(update)(carry, x)) for loop in LOOPS):
      return None
    path.append(update(path[-1], x))
    if is_traced(path[-1]):  # `update` closes over a traced array that is not in `arrays`.
      return None
  return path


def with_frozen(problem: InnerProblem, path: PyTree, steps: int) -> PyTree:
  """Returns θ after 0, 1, …, `steps` updates, stacked along a leading axis.

  `path` holds the adapting leaves after each of these updates, stacked in the same way.

  Each frozen leaf is repeated `steps + 1` times.
  """
  frozen = problem.merge(jax.tree.map(lambda _: None, problem.adapting))

  def along_path(leaf, new):
    return new if leaf is None else jnp.broadcast_to(leaf[None], (steps + 1, *leaf.shape))

  return jax.tree.map(along_path, frozen, path, is_leaf=lambda node: node is None)


def is_traced(tree: PyTree) -> bool:
  """Returns whether a leaf of the tree is a tracer, which means that JAX is tracing a function of the tree."""
  return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


def scalar_loss(loss_fn: LossFn, theta: PyTree, batch: Any) -> chex.Array:
  """Returns loss_fn(θ, batch).

  Raises:
    ValueError: if the loss is not a scalar, or not floating-point.
  """
  loss = loss_fn(theta, batch)
  if not hasattr(loss, 'dtype') and not isinstance(loss, int | float | complex):
    raise ValueError(
      f'loss_fn must return a scalar, got {type(loss).__name__}; return no auxiliary outputs, '
      'and compute them separately, for example from the adapted theta'
    )
  if jnp.ndim(loss):
    raise ValueError(f'loss_fn must return a scalar, got shape {jnp.shape(loss)}; take its mean or sum')
  if not jnp.issubdtype(jnp.result_type(loss), jnp.floating):
    raise ValueError(
      f'loss_fn must return a floating-point scalar, got dtype {jnp.result_type(loss)}, which has no gradient; '
      'compute the loss without integers, and take the absolute value if the loss is complex'
    )
  return loss
