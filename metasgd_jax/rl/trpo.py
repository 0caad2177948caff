"""Trust region policy optimisation (Schulman et al. 2015) of a pytree on which action distributions depend."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from metasgd_jax.types import PyTree, check_count


class TrpoInfo(NamedTuple):
  """The result of a TRPO step, scalars `[]`.

  Attributes:
    improvement: New surrogate minus old surrogate. It is NaN if the surrogate or its gradient is not finite; meta is
      then unchanged.
    kl: Divergence KL(old ‖ new), in nats.
    step: Size of the step that was taken, as a fraction r^i of the full step, which has i = 0. It is 0 if none of the
      steps that were tried was good; meta is then unchanged. See `trpo_update` for r and for which steps are good.

  Example:
    >>> info = ms.rl.TrpoInfo(improvement=jnp.zeros(()), kl=jnp.zeros(()), step=jnp.zeros(()))
    >>> bool(info.step > 0)  # No step was good, so meta is unchanged.
    False
  """

  improvement: chex.Array
  kl: chex.Array
  step: chex.Array


@dataclasses.dataclass(frozen=True)
class TrpoConfig:
  """Settings of a TRPO step. The defaults are those of rllab, which MAML's released code uses.

  Attributes:
    max_kl: Bound on the mean divergence KL(old ‖ new), in nats.
    cg_steps: Largest number of conjugate-gradient steps.
    cg_tolerance: Tolerance of the conjugate-gradient method; see `conjugate_gradient`.
    damping: Number that is added to the diagonal of the Fisher matrix F, unless `trpo_update` receives `fisher`.
    backtrack_ratio: Ratio r of one candidate step to the next larger one.
    max_backtracks: Number of candidate steps.

  Raises:
    ValueError: if a setting is not a number, if `max_kl` is not positive and finite, if `cg_steps` or `max_backtracks`
      is not an integer of at least 1, if `damping` is negative, or if `backtrack_ratio` is not in (0, 1).

  Example:
    >>> ms.rl.TrpoConfig(damping=0.01).max_kl
    0.01
  """

  max_kl: float = 0.01
  cg_steps: int = 10
  cg_tolerance: float = 1e-10
  damping: float = 1e-5
  backtrack_ratio: float = 0.8
  max_backtracks: int = 15

  def __post_init__(self):
    for name, value in vars(self).items():
      if np.ndim(value) or np.asarray(value).dtype.kind not in 'biuf':
        raise ValueError(f'{name} must be a number, got {value!r:.80}')
    if not 0 < self.max_kl < math.inf:
      raise ValueError(f'max_kl must be above 0 and finite, got {self.max_kl}')
    for name in ('cg_steps', 'max_backtracks'):
      check_count(name, getattr(self, name))
    if not self.damping >= 0:
      raise ValueError(f'damping must be at least 0, got {self.damping}')
    if not 0 < self.backtrack_ratio < 1:
      raise ValueError(f'backtrack_ratio must be above 0 and below 1, got {self.backtrack_ratio}')
    for name, value in vars(self).items():
      kind = int if name in ('cg_steps', 'max_backtracks') else float
      object.__setattr__(self, name, kind(value))  # A NumPy array would not be hashable.


def trpo_update(
  meta: PyTree,
  *,
  distributions: Callable[[PyTree], Any],
  surrogate: Callable[[Any], chex.Array],
  kl: Callable[[Any, Any], chex.Array],
  gradient: Callable[[PyTree], tuple[tuple[chex.Array, Any], PyTree]] | None = None,
  fisher: Callable[[PyTree], PyTree] | None = None,
  mean: Callable[[PyTree], PyTree] = lambda tree: tree,
  config: TrpoConfig = TrpoConfig(),
) -> tuple[PyTree, TrpoInfo]:
  """Returns the new meta and a `TrpoInfo` after one step that raises the surrogate and satisfies the bound `max_kl`.

  The direction s ≈ F⁻¹ g is computed by conjugate gradients. Here g is the gradient of the surrogate, p are the old
  distributions, J is the derivative of the distributions, and F = Jᵀ (∇²_q KL(p ‖ q) at q = p) J + damping I.

  The new meta is meta + r^i √(2 max_kl / sᵀ F s) s for some i = 0, 1, …, where r is `backtrack_ratio`. A step is good
  if it raises the surrogate and KL(p ‖ new) ≤ max_kl. The step that is taken is good, and the next larger step either
  is not good or does not exist (i = 0). Schulman et al. 2015, appendix C, take the first good i. Here not every i is
  tried; see `largest_good`. If no step that was tried is good, meta is unchanged.

  The surrogate and the divergence are functions of the distributions, so that the distributions are computed only once
  for each candidate step. The default settings are those of rllab. sᵀ F s is computed from the residual of the
  conjugate gradients.

  Args:
    meta: Any pytree of floating-point arrays, such as `MetaParams(theta, alpha)` or `MetaParams(theta, None)`.
    distributions: Function `meta → distributions`. The distributions are any pytree.
    surrogate: Function `distributions → scalar` that is to be maximised.
    kl: Function `(old distributions, new distributions) → scalar`, the mean divergence KL(old ‖ new) in nats.
    gradient: Function `meta → ((surrogate, distributions), gradient)`, for a gradient that is summed over parts of the
      data. By default it is `jax.value_and_grad` of the surrogate, with the distributions as auxiliary output.
    fisher: Function `v → F v`, such as `fisher_product` for a part of the data. By default it is the `fisher_product`
      of `distributions` and `kl`.
    mean: Function that returns the mean of a pytree over devices, for use inside shard_map if each device has a part of
      the data; see `sharding.mean_over`. It is applied to values and gradients and is never differentiated.
    config: Settings of the step.

  Example:
    >>> policy = ms.rl.gaussian(2, 1, hidden=())
    >>> theta, seen = policy.init(jax.random.key(0)), jax.random.normal(jax.random.key(1), (20, 2))
    >>> theta, info = ms.rl.trpo_update(
    ...   theta,
    ...   distributions=lambda theta: policy.apply(theta, seen),
    ...   surrogate=lambda new: new.mean.mean(),  # Larger actions are better here.
    ...   kl=lambda old, new: policy.kl(old, new).mean(),
    ... )
    >>> bool(info.improvement > 0), bool(info.kl <= 0.01)
    (True, True)
  """
  if gradient is None:
    gradient = jax.value_and_grad(lambda meta: (surrogate(new := distributions(meta)), new), has_aux=True)
  if fisher is None:
    fisher = fisher_product(distributions, kl, meta, damping=config.damping)
  (before, old), slope = gradient(meta)
  before, slope = mean((before, slope))
  steps, tolerance = config.cg_steps, config.cg_tolerance
  direction, residual = conjugate_gradient(lambda v: mean(fisher(v)), slope, steps=steps, tolerance=tolerance)
  # F s is the gradient minus the residual.
  curvature = _dot(direction, jax.tree.map(jnp.subtract, slope, residual))
  size = jnp.where(curvature > 0, jnp.sqrt(2 * config.max_kl / jnp.where(curvature > 0, curvature, 1)), 0)

  def candidate(share):
    return jax.tree.map(lambda m, d: m + (share * size).astype(m.dtype) * d, meta, direction)

  def try_out(share):
    new = distributions(candidate(share))
    after, divergence = mean((surrogate(new), kl(old, new)))
    return after - before, divergence

  improvement, divergence, step = largest_good(
    try_out, max_kl=config.max_kl, ratio=config.backtrack_ratio, count=config.max_backtracks, like=before
  )
  meta = jax.tree.map(lambda old, new: jnp.where(step > 0, new, old), meta, candidate(step))
  finite = jax.tree.reduce(jnp.logical_and, jax.tree.map(lambda a: jnp.all(jnp.isfinite(a)), (before, slope)))
  improvement = jnp.where(finite, improvement, jnp.nan)
  return meta, TrpoInfo(improvement, divergence, step)


def largest_good(
  try_out: Callable[[chex.Array], tuple[chex.Array, chex.Array]],
  *,
  max_kl: float,
  ratio: float,
  count: int,
  like: chex.Array,
) -> tuple[chex.Array, chex.Array, chex.Array]:
  """Returns (improvement, divergence, r^i) for the largest good step that was found, or zeros if none was found.

  The candidate steps are the fractions r^i of the full step, for i = 0, …, count − 1.

  A step is good if its improvement is above 0 and its divergence is at most `max_kl`. The divergence is nearly
  proportional to the square of the step, so the divergence of step i predicts that of every other step. If step i is
  not good, the next step to try is the step j ≥ i + 1 whose predicted divergence is nearest to `max_kl`, on a
  logarithmic scale. If step i is good, step i − 1 is tried next. The search stops when step 0 is good, when step i is
  good and step i − 1 is not, or when step count − 1 is not good.

  If all steps smaller than a good step are good too, the result is the one that trying i = 0, 1, 2, … in order gives,
  with about half as many tries. A good step between two steps that are not good may be missed.

  Args:
    try_out: Function `r^i → (improvement, divergence)` that tries one candidate step.
    max_kl: Bound on the divergence.
    ratio: Ratio r of one step to the next larger one, in (0, 1).
    count: Number of candidate steps.
    like: Scalar that has the dtype of the results.
  """

  def unfinished(carry):
    bad, good, _, _ = carry
    return good > bad + 1

  def try_next(carry):
    bad, good, i, found = carry
    share = jax.lax.pow(jnp.asarray(ratio, like.dtype), i)
    improvement, divergence = try_out(share)
    fine = (improvement > 0) & (divergence <= max_kl)
    too_far = jnp.log(divergence / max_kl) / (-2 * math.log(ratio))
    ahead = jnp.where(jnp.isfinite(too_far), jnp.clip(jnp.round(too_far), 1, count), 1).astype(i.dtype)
    found = jax.tree.map(lambda new, old: jnp.where(fine, new, old), (improvement, divergence, share), found)
    bad, good = jnp.where(fine, bad, i), jnp.where(fine, i, good)
    return bad, good, jnp.clip(jnp.where(fine, i - 1, i + ahead), bad + 1, good - 1), found

  first = jnp.zeros((), jnp.int32)
  zeros = (jnp.zeros_like(like),) * 3
  return jax.lax.while_loop(unfinished, try_next, (first - 1, first + count, first, zeros))[-1]


def fisher_product(
  distributions: Callable[[PyTree], Any],
  kl: Callable[[Any, Any], chex.Array],
  meta: PyTree,
  *,
  damping: float = 0.0,
) -> Callable[[PyTree], PyTree]:
  """Returns the function `v → F v` with F = Jᵀ (∇²_q KL(p ‖ q) at q = p) J + damping I.

  Here p is `distributions(meta)`, and J is its derivative with respect to `meta`. `distributions` is linearised only
  once. Without damping, F is the Hessian of KL(p ‖ distributions(m)) with respect to m, at m = meta, because the
  gradient of the divergence is zero there.

  Args:
    distributions: Function `meta → distributions`.
    kl: Function `(p, q) → scalar`, the mean divergence.
    meta: Point at which F is computed, a pytree.
    damping: Number that is added to the diagonal of F.

  Example:
    >>> policy = ms.rl.gaussian(2, 1, hidden=())
    >>> theta, seen = policy.init(jax.random.key(0)), jnp.ones((5, 2))
    >>> kl = lambda p, q: policy.kl(p, q).mean()
    >>> product = ms.rl.fisher_product(lambda theta: policy.apply(theta, seen), kl, theta)
    >>> jax.tree.structure(product(theta)) == jax.tree.structure(theta)
    True
  """
  old, pushed = jax.linearize(distributions, meta)
  pulled = jax.linear_transpose(pushed, meta)
  _, curved = jax.linearize(jax.grad(lambda q: kl(old, q)), old)
  return lambda v: jax.tree.map(lambda f, v: f + damping * v, pulled(curved(pushed(v)))[0], v)


def conjugate_gradient(
  product: Callable[[PyTree], PyTree], b: PyTree, *, steps: int = 10, tolerance: float = 1e-10
) -> tuple[PyTree, PyTree]:
  """Returns x with A x ≈ b for a symmetric positive definite A, and the residual b − A x.

  The iteration starts from x = 0.

  Args:
    product: Function `v → A v` on pytrees with b's structure.
    b: Right-hand side, a pytree.
    steps: Largest number of iterations. Each iteration computes one product A v.
    tolerance: Bound on ‖b − A x‖² / ‖b‖² at which the iteration stops. rllab bounds ‖b − A x‖² instead, which makes the
      TRPO step depend on the unit of the reward.

  Example:
    >>> matrix = jnp.array([[2.0, 0.0], [0.0, 4.0]])
    >>> x, residual = ms.rl.conjugate_gradient(lambda v: matrix @ v, jnp.array([2.0, 4.0]), steps=2)
    >>> print(x.round(3))
    [1. 1.]
  """

  def unfinished(carry):
    i, _, _, _, square = carry
    return (i < steps) & (square > tolerance * whole)

  def body(carry):
    i, x, residual, towards, square = carry
    image = product(towards)
    rate = square / _dot(towards, image)
    x = jax.tree.map(lambda x, p: x + rate.astype(x.dtype) * p, x, towards)
    residual = jax.tree.map(lambda r, a: r - rate.astype(r.dtype) * a, residual, image)
    after = _dot(residual, residual)
    towards = jax.tree.map(lambda r, p: r + (after / square).astype(r.dtype) * p, residual, towards)
    return i + 1, x, residual, towards, after

  whole = _dot(b, b)
  start = (jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, b), b, b, whole)
  _, x, residual, _, _ = jax.lax.while_loop(unfinished, body, start)
  return x, residual


def _dot(a, b):
  return jax.tree.reduce(jnp.add, jax.tree.map(jnp.vdot, a, b))
