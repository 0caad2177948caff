"""Optax in the inner loop: Meta-SGD's update as a gradient transformation, and adaptation by any optax optimiser."""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from metasgd_jax.inner.alpha import broadcast_alpha, check_theta, which_adapt
from metasgd_jax.inner.loop import LossFn, inner_problem, repeat, repeat_with_path, with_frozen
from metasgd_jax.types import Adapts, PyTree, check_count

OptimizerFn = Callable[[PyTree], optax.GradientTransformation]
"""Function from `hyper` to an optimiser, such as `lambda hyper: optax.sgd(hyper['rate'], hyper['momentum'])`."""


def scale_by_alpha(alpha: PyTree) -> optax.GradientTransformation:
  """Returns the transformation g ↦ −α ∘ g, the update of Meta-SGD with its minus sign (Li et al. 2017, equation 2).

  `optax.apply_updates` adds the result to θ, so that θ + (−α ∘ g) is the step of `adapt`. In an `optax.chain` this
  transformation comes last, like `optax.scale_by_learning_rate`, and no `optax.scale(-1)` follows it. It has no state,
  and it is differentiable in α to any order.

  Args:
    alpha: Rates, as in `adapt`: a pytree with θ's structure, or a prefix of that structure whose leaves are scalars.
      Rates may be negative. The update of a leaf whose rate is `None` is zero.

  Raises (from the transformation's `init` and `update`):
    ValueError: if α does not fit θ (the message names the leaf). α may have entries for the leaves of θ that
      `optax.masked` or `optax.partition` hides.

  Example:
    >>> inner = optax.chain(optax.clip_by_global_norm(1.0), ms.scale_by_alpha({'w': 0.5}))
    >>> updates, _ = inner.update({'w': jnp.array([3.0, 4.0])}, inner.init({'w': jnp.zeros(2)}))
    >>> print(updates['w'].round(3))
    [-0.3 -0.4]

  In this chain `optax.clip_by_global_norm` computes the norm of the gradient, which is a square root. The docstring of
  `adapt_with_optimizer` says what happens if the gradient is zero.
  """

  def init(params):
    broadcast_alpha(alpha, params, masked=optax.MaskedNode)
    return optax.EmptyState()

  def update(updates, state, params=None):
    del params
    structure: Any = jax.tree.structure(updates)
    rates = structure.flatten_up_to(broadcast_alpha(alpha, updates, masked=optax.MaskedNode))
    scaled = [
      jnp.zeros_like(g) if a is None else -jnp.asarray(a, jnp.result_type(g)) * g
      for a, g in zip(rates, jax.tree.leaves(updates), strict=True)
    ]
    return structure.unflatten(scaled), state

  return optax.GradientTransformation(init, update)


def adapt_with_optimizer(
  theta: PyTree,
  hyper: PyTree,
  batch: Any,
  *,
  loss_fn: LossFn,
  optimizer_fn: OptimizerFn,
  steps: int = 1,
  first_order: bool = False,
  adapts: Adapts | None = None,
) -> PyTree:
  """Returns θ adapted to one task by `steps` updates of an optax optimiser, whose state is initialised for each task.

  s_0 = init(θ_0);  u_t, s_{t+1} = update(∇loss_fn(θ_t, batch), s_t, θ_t);  θ_{t+1} = θ_t + u_t

  With `optimizer_fn=ms.scale_by_alpha` and hyper = α, the result is that of `adapt`. The result is differentiable in θ
  and in hyper by reverse mode, also through the state of the optimiser. The intermediates of all steps are kept.

  The meta-gradient is NaN if the optimiser computes a square root or a norm of a gradient that is exactly zero, because
  the derivative of the root is not finite there. With `first_order`, the meta-gradient is NaN only for learned values
  that appear under the root, such as Adam's `b2`. A gradient is exactly zero in two common cases:

  - A single entry of the gradient is zero, for example because a ReLU is inactive. This affects Adam and its variants,
    LAMB, Adafactor, and RMSProp with `eps_in_sqrt=False`.
  - The whole gradient is zero, because a task has no support items or its loss is at the minimum. This affects the same
    optimisers, and also clipping by a norm, LARS, NovoGrad and Polyak's step size.

  The remedy is a small number inside of the root: `eps_root` (such as 1e-8) for Adam and its variants. `eps` does not
  help, because it is added outside of the root. If an optimiser has no such number, write the root so that its argument
  is never zero; docs/composition.md shows this for clipping. `optax.clip` is safe, because it clips each entry.

  A transformation that takes extra arguments receives the loss as `value`, the gradient of the loss as `grad`, and the
  loss function as `value_fn`. A line search runs a loop of unknown length, and JAX has no reverse mode for such a loop.
  With a line search θ can be adapted, but there is no meta-gradient.

  Args:
    theta: Parameters, any pytree of floating-point arrays.
    hyper: Meta-learned values of the inner optimiser, any pytree, passed to `optimizer_fn`.
    batch: Support of the task, passed to `loss_fn` unchanged.
    loss_fn: Support loss, `(θ, batch) → scalar`.
    optimizer_fn: Function `hyper → optax.GradientTransformation`. If a value needs bounds, this function must apply
      them, for example with `jax.nn.sigmoid(hyper['b1'])`.
    steps: Number of inner steps, 0 or more.
    first_order: Whether second derivatives are dropped: the inner gradient and the loss in `value` are then constants.
      Values that a transformation computes with `value_fn` are still differentiated.
    adapts: Function from the name of a leaf of θ to whether the leaf adapts. The transformation receives `None` in
      place of the other leaves. By default all leaves adapt.

  Returns:
    A pytree with θ's structure, shapes and dtypes.

  Raises:
    ValueError: if `optimizer_fn` is not a function or does not return a transformation, if the update of the
      transformation fails, such as that of `optax.lookahead`, if a leaf of θ is not floating-point, if `steps` is
      not an integer of at least 0, or if the loss is not a floating-point scalar.

  Example:
    >>> momentum = lambda hyper: optax.sgd(hyper['rate'], hyper['momentum'])
    >>> loss = lambda theta, batch: (theta - batch) ** 2
    >>> learned = {'rate': 0.25, 'momentum': 0.5}
    >>> print(ms.adapt_with_optimizer(jnp.array(0.0), learned, 1.0, loss_fn=loss, optimizer_fn=momentum, steps=2))
    1.0
  """
  problem, carry, update = _inner(theta, hyper, batch, loss_fn, optimizer_fn, steps, first_order, adapts)
  adapting, _ = repeat(update, carry, steps, arrays=(theta, hyper, batch))
  return problem.merge(adapting)


def adapt_path_with_optimizer(
  theta: PyTree,
  hyper: PyTree,
  batch: Any,
  *,
  loss_fn: LossFn,
  optimizer_fn: OptimizerFn,
  steps: int = 1,
  first_order: bool = False,
  adapts: Adapts | None = None,
) -> PyTree:
  """Returns θ after 0, 1, …, `steps` inner steps, stacked: leaves `[steps + 1, …]`.

  The last entry along the leading axis is the result of `adapt_with_optimizer`. This function raises the same errors as
  `adapt_with_optimizer`.

  Args:
    theta: Parameters; see `adapt_with_optimizer` for this and all other arguments.
    hyper: Meta-learned values of the inner optimiser.
    batch: Support of the task.
    loss_fn: Support loss, `(θ, batch) → scalar`.
    optimizer_fn: Function `hyper → optax.GradientTransformation`.
    steps: Number of inner steps, 0 or more.
    first_order: Whether second derivatives are dropped.
    adapts: Function from the name of a leaf of θ to whether the leaf adapts.

  Example:
    >>> loss = lambda theta, batch: (theta - batch) ** 2
    >>> print(ms.adapt_path_with_optimizer(jnp.array(0.0), 0.25, 1.0, loss_fn=loss, optimizer_fn=optax.sgd, steps=2))
    [0.   0.5  0.75]
  """
  problem, carry, update = _inner(theta, hyper, batch, loss_fn, optimizer_fn, steps, first_order, adapts)
  path = repeat_with_path(update, carry, steps, arrays=(theta, hyper, batch), parameters=lambda carry: carry[0])
  return with_frozen(problem, path, steps)


def _inner(theta, hyper, batch, loss_fn, optimizer_fn, steps, first_order, adapts):
  """Returns `(problem, carry, update)` for the inner loop of one task.

  `problem` is an `InnerProblem`. `carry` is the initial pair (adapting leaves, optimiser state), and the function
  `update(carry, None)` returns this pair after one step.
  """
  check_count('steps', steps, 0)
  check_theta(theta)
  theta = jax.tree.map(jnp.asarray, theta)
  problem = inner_problem(theta, which_adapt(theta, adapts), batch, loss_fn)
  transformation = _transformation(optimizer_fn, hyper)

  def update(carry, _):
    adapting, state = carry
    value, grad = jax.value_and_grad(problem.loss)(adapting)
    if first_order:
      value, grad = jax.lax.stop_gradient((value, grad))
    given = dict(value=value, grad=grad, value_fn=problem.loss)
    adapted, after = apply_optimizer('optimizer_fn', transformation, adapting, state, **given)
    return adapted, jax.tree.map(_of_dtype, after, state)

  carry = problem.adapting, transformation.init(problem.adapting)
  return problem, carry, update


def apply_optimizer(
  name: str, optimizer: optax.GradientTransformation, params: PyTree, state: PyTree, *, grad: PyTree, **given: Any
) -> tuple[PyTree, PyTree]:
  """Returns `(params, state)` after one update of an optax optimiser, which receives `grad` and `given` as extra args.

  Raises:
    ValueError: if the update raises an error, for example because the optimiser needs anything else. The message
      contains this error, and calls the optimiser `name`.
  """
  try:
    update = optax.with_extra_args_support(optimizer).update
    updates, state = update(grad, state, params, grad=grad, **given)
    return optax.apply_updates(params, updates), state
  except (AttributeError, TypeError, ValueError) as error:
    first = str(error).partition('\n')[0]
    raise ValueError(
      f'the update of `{name}` fails with {type(error).__name__}: {first}. It receives the gradient, the state, the '
      f'parameters, and the extra arguments {sorted([*given, "grad"])}; if it needs anything else, use another'
    ) from error


def _of_dtype(new: chex.Array, old: chex.Array) -> chex.Array:
  """Returns a leaf of the new optimiser state in the dtype of the old leaf.

  A learned hyperparameter of a wider dtype would otherwise widen the leaf. But `jax.lax.scan` needs the same dtypes in
  every step.
  """
  dtype = jnp.result_type(old)
  return new if jnp.result_type(new) == dtype else jnp.asarray(new, dtype)


def _transformation(optimizer_fn, hyper) -> optax.GradientTransformation:
  if not callable(optimizer_fn):
    raise ValueError(
      f'optimizer_fn must be a function, hyper → optax.GradientTransformation, got {type(optimizer_fn).__name__}; '
      'if no value of the optimizer is learned, write lambda hyper: …'
    )
  transformation = optimizer_fn(hyper)
  if not isinstance(transformation, optax.GradientTransformation):
    raise ValueError(
      f'optimizer_fn must return an optax.GradientTransformation, got {type(transformation).__name__}; '
      'give a function of hyper, such as lambda rate: optax.adam(rate, eps_root=1e-8)'
    )
  return transformation
