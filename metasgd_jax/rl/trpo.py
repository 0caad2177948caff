"""Trust region policy optimisation (Schulman et al. 2015) of any pytree that distributions are a function of."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from metasgd_jax.types import PyTree


class TrpoInfo(NamedTuple):
  """What a TRPO step did, scalars `[]`.

  Attributes:
    improvement: of the surrogate.
    kl: KL(old ‖ new), in nats.
    step: the share of the largest step that was taken; 0 where none was good, and meta is what it was.
  """

  improvement: chex.Array
  kl: chex.Array
  step: chex.Array


def trpo_update(
  meta: PyTree,
  *,
  distributions: Callable[[PyTree], Any],
  surrogate: Callable[[Any], chex.Array],
  kl: Callable[[Any, Any], chex.Array],
  fisher: Callable[[PyTree], PyTree] | None = None,
  mean: Callable[[PyTree], PyTree] = lambda tree: tree,
  max_kl: float = 0.01,
  cg_steps: int = 10,
  cg_tolerance: float = 1e-10,
  damping: float = 1e-5,
  backtrack_ratio: float = 0.8,
  max_backtracks: int = 15,
) -> tuple[PyTree, TrpoInfo]:
  """Returns meta after one step that raises the surrogate within max_kl, and what it did.

  s ≈ F⁻¹ g by conjugate gradients, with F = Jᵀ (∇²_q KL(p ‖ q) at q = p) J + damping I, J the derivative of the
  distributions and g the surrogate's gradient; then meta + r^i √(2 max_kl / sᵀ F s) s for the first i = 0, 1, … that
  raises the surrogate with KL(p ‖ new) ≤ max_kl (Schulman et al. 2015, appendix C). Where none does, meta stays.

  Both functions are of the distributions, so that each candidate needs them once; they are linearised once. The
  constants are rllab's. sᵀ F s is taken from conjugate gradients' own residual.

  Args:
    meta: any pytree of floating-point arrays, such as `MetaParams(theta, alpha)` or `MetaParams(theta, None)`.
    distributions: `meta → distributions`, any pytree.
    surrogate: `distributions → scalar`, to be raised.
    kl: `(old distributions, new) → scalar`, the mean divergence KL(old ‖ new) in nats.
    fisher: `v → F v`, such as `fisher_product` gives for a part of the data; that of all of it where left out.
    mean: over devices that have a part of the data each, inside shard_map: `sharding.mean_over`. It is taken of values
      and gradients, never differentiated.
    max_kl: the bound.
    cg_steps: conjugate-gradient steps at the most.
    cg_tolerance: stop when the residual's square is below.
    damping: added to F's diagonal, unless `fisher` is given.
    backtrack_ratio: r.
    max_backtracks: candidates tried.

  Raises:
    ValueError: max_kl, cg_steps or max_backtracks not positive, a negative damping, or backtrack_ratio not in (0, 1).
  """
  check_options(max_kl=max_kl, cg_steps=cg_steps, damping=damping, ratio=backtrack_ratio, backtracks=max_backtracks)
  if fisher is None:
    old, pushed = jax.linearize(distributions, meta)
    pulled = jax.linear_transpose(pushed, meta)
    fisher = _fisher(kl, old, pushed, pulled, damping)
  else:
    old, pulled = jax.vjp(distributions, meta)
  before, of_distributions = jax.value_and_grad(surrogate)(old)
  before, gradient = mean((before, pulled(of_distributions)[0]))
  direction, residual = conjugate_gradient(lambda v: mean(fisher(v)), gradient, steps=cg_steps, tolerance=cg_tolerance)
  # F s is the gradient less the residual.
  curvature = _dot(direction, jax.tree.map(jnp.subtract, gradient, residual))
  size = jnp.where(curvature > 0, jnp.sqrt(2 * max_kl / jnp.where(curvature > 0, curvature, 1)), 0)

  def candidate(share):
    return jax.tree.map(lambda m, d: m + (share * size).astype(m.dtype) * d, meta, direction)

  def unfinished(carry):
    i, step, _, _ = carry
    return (i < max_backtracks) & (step == 0)

  def try_next(carry):
    i, step, _, _ = carry
    share = jnp.asarray(backtrack_ratio, before.dtype) ** i
    new = distributions(candidate(share))
    after, divergence = mean((surrogate(new), kl(old, new)))
    improvement = after - before
    good = (improvement > 0) & (divergence <= max_kl)
    zero = jnp.zeros_like(step)
    return i + 1, jnp.where(good, share, zero), jnp.where(good, improvement, zero), jnp.where(good, divergence, zero)

  zero = jnp.zeros_like(before)
  _, step, improvement, divergence = jax.lax.while_loop(
    unfinished, try_next, (jnp.zeros((), jnp.int32), zero, zero, zero)
  )
  meta = jax.tree.map(lambda old, new: jnp.where(step > 0, new, old), meta, candidate(step))
  return meta, TrpoInfo(improvement, divergence, step)


def fisher_product(
  distributions: Callable[[PyTree], Any],
  kl: Callable[[Any, Any], chex.Array],
  meta: PyTree,
  *,
  damping: float = 0.0,
) -> Callable[[PyTree], PyTree]:
  """Returns `v → F v`, F = Jᵀ (∇²_q KL(p ‖ q) at q = p) J + damping I, with the distributions linearised once.

  It is the Hessian of KL(p ‖ distributions(m)) in m at meta, since the divergence's own gradient is zero there.

  Args:
    distributions: `meta → distributions`.
    kl: `(p, q) → scalar`.
    meta: where.
    damping: added to F's diagonal.

  Example:
    >>> policy = ms.rl.gaussian(2, 1, hidden=())
    >>> theta, seen = policy.init(jax.random.key(0)), jnp.ones((5, 2))
    >>> kl = lambda p, q: policy.kl(p, q).mean()
    >>> product = ms.rl.fisher_product(lambda theta: policy.apply(theta, seen), kl, theta)
    >>> jax.tree.structure(product(theta)) == jax.tree.structure(theta)
    True
  """
  old, pushed = jax.linearize(distributions, meta)
  return _fisher(kl, old, pushed, jax.linear_transpose(pushed, meta), damping)


def conjugate_gradient(
  product: Callable[[PyTree], PyTree], b: PyTree, *, steps: int = 10, tolerance: float = 1e-10
) -> tuple[PyTree, PyTree]:
  """Returns x with A x ≈ b for a symmetric positive definite A, from x = 0, and the residual b − A x.

  Args:
    product: `v → A v`, on pytrees of b's structure.
    b: the right-hand side.
    steps: products at the most.
    tolerance: stop when the residual's square, ‖b − A x‖², is below.

  Example:
    >>> matrix = jnp.array([[2.0, 0.0], [0.0, 4.0]])
    >>> x, residual = ms.rl.conjugate_gradient(lambda v: matrix @ v, jnp.array([2.0, 4.0]), steps=2)
    >>> print(x.round(3))
    [1. 1.]
  """

  def unfinished(carry):
    i, _, _, _, square = carry
    return (i < steps) & (square >= tolerance)

  def body(carry):
    i, x, residual, towards, square = carry
    image = product(towards)
    rate = square / _dot(towards, image)
    x = jax.tree.map(lambda x, p: x + rate.astype(x.dtype) * p, x, towards)
    residual = jax.tree.map(lambda r, a: r - rate.astype(r.dtype) * a, residual, image)
    after = _dot(residual, residual)
    towards = jax.tree.map(lambda r, p: r + (after / square).astype(r.dtype) * p, residual, towards)
    return i + 1, x, residual, towards, after

  start = (jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, b), b, b, _dot(b, b))
  _, x, residual, _, _ = jax.lax.while_loop(unfinished, body, start)
  return x, residual


def check_options(*, max_kl: float, cg_steps: int, damping: float, ratio: float, backtracks: int) -> None:
  """Raises ValueError for options that `trpo_update` does not take."""
  if not 0 < max_kl < math.inf:
    raise ValueError(f'max_kl must be above 0 and finite, got {max_kl}')
  for name, count in (('cg_steps', cg_steps), ('max_backtracks', backtracks)):
    if isinstance(count, bool) or not isinstance(count, int | np.integer) or count < 1:
      raise ValueError(f'{name} must be an integer of at least 1, got {count!r}')
  if not damping >= 0:
    raise ValueError(f'damping must be at least 0, got {damping}')
  if not 0 < ratio < 1:
    raise ValueError(f'backtrack_ratio must be between 0 and 1, got {ratio}')


def _fisher(kl, old, pushed, pulled, damping):
  _, curved = jax.linearize(jax.grad(lambda q: kl(old, q)), old)
  return lambda v: jax.tree.map(lambda f, v: f + damping * v, pulled(curved(pushed(v)))[0], v)


def _dot(a, b):
  return jax.tree.reduce(jnp.add, jax.tree.map(jnp.vdot, a, b))
