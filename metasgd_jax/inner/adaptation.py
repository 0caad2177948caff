"""The inner update of Meta-SGD and MAML: θ′ = θ − α ∘ ∇L(θ), as a pure function of one task."""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp

from metasgd_jax.inner.adjoint import descend
from metasgd_jax.inner.alpha import broadcast_alpha
from metasgd_jax.inner.loop import (
  LossFn,
  gradient_step,
  inner_problem,
  is_traced,
  repeat,
  repeat_with_path,
  with_frozen,
)
from metasgd_jax.inner.symmetry import has_symmetric_hessian
from metasgd_jax.types import Adapts, PyTree, check_choice, check_count

Adjoint = Literal['reverse', 'checkpoint', 'hvp', 'revolve']
"""How the gradient of the outer loss goes back through the inner steps. All give the same gradient, to rounding.

With v = dL/dθ_{t+1}, and with the gradient g_t and the Hessian H_t of the support loss at θ_t, one step back is
v ← v − H_t (α ∘ v) and dL/dα −= g_t ∘ v. This is the chain rule for θ_{t+1} = θ_t − α ∘ g_t.

- `reverse`: reverse mode over reverse mode. The intermediates of all steps are kept, so memory grows with the number of
  steps.
- `checkpoint`: like `reverse`, but only θ_t is kept for each step. The backward pass computes the intermediates of each
  step again.
- `hvp`: the Hessian-vector product H_t (α ∘ v) is computed by forward mode over the gradient. Only θ_t is kept for each
  step. The result has no forward-mode derivative. With `first_order` this method is the same as `reverse`. If the loss
  contains a custom derivative rule that is not the true derivative of its function, such as gradient reversal, H_t is
  not symmetric. H_tᵀ (α ∘ v) is then computed by reverse mode, which stores the intermediates of one step. Rules are
  tested at random inputs; see `has_symmetric_hessian` in inner/symmetry.py for rules that this test does not find.
- `revolve`: like `hvp`, but only a few of the θ_t are kept (9 for 200 steps). The others are computed again, at most
  twice each. This method is meant for hundreds of steps. If each step has its own rates (`alpha_by_step`), the memory
  for the rates grows with the steps anyway. All θ_t are then kept, and `revolve` is the same as `hvp`.
"""


def adapt(
  theta: PyTree,
  alpha: PyTree,
  batch: Any,
  *,
  loss_fn: LossFn,
  steps: int = 1,
  first_order: bool = False,
  adjoint: Adjoint = 'reverse',
  alpha_by_step: bool = False,
  adapts: Adapts | None = None,
) -> PyTree:
  """Returns θ adapted to one task.

  θ_{t+1} = θ_t − α ∘ ∇loss_fn(θ_t, batch) for t = 0, …, steps − 1. This is the inner update of Meta-SGD (Li et al.
  2017, equation 2). It is differentiable in θ and α to any order. With `first_order` the inner gradient is treated as a
  constant. For one step from θ to θ′, dθ′/dθ is then the identity. The gradient of an outer loss L′(θ′) with respect to
  α is still −∇L(θ) ∘ dL′/dθ′, where L is the support loss.

  Outside of `jax.jit`, `jax.grad` of a function that calls `adapt` compiles programs at each call if `steps` is 2 or
  more, and JAX keeps them. Put `jax.jit` around the whole gradient.

  Args:
    theta: Parameters, any pytree of floating-point arrays.
    alpha: Rates, a pytree with θ's structure whose leaves have the shape of θ's leaves or are scalars; or a prefix of
      that structure whose leaves are scalars, such as `0.01` or one number per layer. Rates may be negative. A part
      of θ whose rate is `None` does not adapt: no inner gradient is computed for it, but the result is still
      differentiable in it.
    batch: Support of the task, passed to `loss_fn` unchanged.
    loss_fn: Support loss, `(θ, batch) → scalar`.
    steps: Number of inner steps, 0 or more. The paper uses 1 everywhere.
    first_order: Whether second derivatives are dropped.
    adjoint: How derivatives of the result go back through the steps; see `Adjoint`.
    alpha_by_step: Whether each step has its own rates, as in MAML++ (Antoniou et al. 2019). Each leaf of α then has
      shape `[steps, …]`.
    adapts: Function that receives the name of a leaf of θ and returns whether the leaf adapts, such as `Model.adapts`.
      By default every leaf that has a rate adapts.

  Returns:
    A pytree with θ's structure, shapes and dtypes.

  Raises:
    ValueError: if α does not fit θ (the message names the leaf), if a leaf of θ is not floating-point, if `steps` is
      not an integer of at least 0, if `adjoint` is unknown, or if the loss is not a floating-point scalar.

  Example:
    >>> theta = {'w': jnp.array([1.0, 2.0])}
    >>> loss = lambda theta, target: jnp.sum((theta['w'] - target) ** 2)  # Its gradient is 2 (w − target).
    >>> ms.adapt(theta, {'w': jnp.array([0.5, 0.25])}, jnp.zeros(2), loss_fn=loss)
    {'w': Array([0., 1.], dtype=float32)}
    >>> ms.adapt(theta, 0.25, jnp.zeros(2), loss_fn=loss, steps=2)
    {'w': Array([0.25, 0.5 ], dtype=float32)}
  """
  check_choice('adjoint', adjoint, Adjoint)
  problem, grad, rates, update = _inner(theta, alpha, batch, loss_fn, steps, first_order, alpha_by_step, adapts)
  arrays = theta, rates, batch
  by_products = adjoint == 'revolve' or (adjoint == 'hvp' and not first_order)
  if adjoint == 'reverse' or not (is_traced(arrays) or is_traced(problem.loss(problem.adapting))):
    pass  # If no array is traced, JAX is not differentiating, and all methods give the same result.
  elif by_products:
    symmetric = has_symmetric_hessian(problem.loss, problem.adapting)
    if not alpha_by_step:
      sparse = adjoint == 'revolve'
      return problem.merge(descend(grad, int(steps), problem.adapting, rates, symmetric=symmetric, sparse=sparse))
    update = functools.partial(descend, grad, 1, symmetric=symmetric)
  elif adjoint == 'checkpoint':
    update = jax.checkpoint(update, prevent_cse=steps == 1)
  inputs = rates if alpha_by_step else None
  return problem.merge(repeat(update, problem.adapting, steps, inputs=inputs, arrays=arrays))


def adapt_path(
  theta: PyTree,
  alpha: PyTree,
  batch: Any,
  *,
  loss_fn: LossFn,
  steps: int = 1,
  first_order: bool = False,
  alpha_by_step: bool = False,
  adapts: Adapts | None = None,
) -> PyTree:
  """Returns θ after 0, 1, …, `steps` inner steps, stacked: leaves `[steps + 1, …]`.

  The last entry along the leading axis is the result of `adapt`. This function raises the same errors as `adapt`.

  Args:
    theta: Parameters; see `adapt` for this and all other arguments.
    alpha: Rates.
    batch: Support of the task.
    loss_fn: Support loss, `(θ, batch) → scalar`.
    steps: Number of inner steps, 0 or more.
    first_order: Whether second derivatives are dropped.
    alpha_by_step: Whether each step has its own rates.
    adapts: Function from the name of a leaf of θ to whether the leaf adapts.

  Example:
    >>> loss = lambda theta, target: (theta - target) ** 2
    >>> ms.adapt_path(1.0, 0.25, 0.0, loss_fn=loss, steps=3)
    Array([1.   , 0.5  , 0.25 , 0.125], dtype=float32)
  """
  problem, _, rates, update = _inner(theta, alpha, batch, loss_fn, steps, first_order, alpha_by_step, adapts)
  inputs = rates if alpha_by_step else None
  path = repeat_with_path(update, problem.adapting, steps, inputs=inputs, arrays=(theta, rates, batch))
  return with_frozen(problem, path, steps)


def _inner(theta, alpha, batch, loss_fn, steps, first_order, alpha_by_step, adapts):
  """Returns `(problem, grad, rates, update)` for the inner loop of one task.

  `problem` is an `InnerProblem`. The function `grad(adapting)` returns the gradient of the problem's loss. `rates`
  contains a rate for each adapting leaf. The function `update(adapting, rates of the step)` returns the adapting leaves
  after one step. If `rates of the step` is `None`, `update` uses `rates`.
  """
  check_count('steps', steps, 0)
  rates = broadcast_alpha(alpha, theta, adapts=adapts, steps=steps if alpha_by_step else None)
  theta = jax.tree.map(jnp.asarray, theta)
  has_rate = jax.tree.map(lambda _, rate: rate is not None, theta, rates)
  problem = inner_problem(theta, has_rate, batch, loss_fn)
  rates = jax.tree.map(lambda leaf, rate: jnp.asarray(rate, leaf.dtype), problem.adapting, rates)

  def grad(adapting):
    grads = jax.grad(problem.loss)(adapting)
    return jax.lax.stop_gradient(grads) if first_order else grads

  def update(adapting, rates_of_step):
    return gradient_step(adapting, rates if rates_of_step is None else rates_of_step, grad(adapting))

  return problem, grad, rates, update
