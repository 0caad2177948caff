"""Optax inside: Meta-SGD's update as a transformation, and an inner loop by any transformation."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from metasgd_jax.inner.alpha import broadcast_alpha, check_theta, which_adapt
from metasgd_jax.inner.loop import (
  InnerProblem,
  LossFn,
  check_steps,
  inner_problem,
  repeat,
  repeat_with_path,
  with_frozen,
)
from metasgd_jax.types import Adapts, PyTree

InnerOptimizer = Callable[[PyTree], optax.GradientTransformation]
"""`hyper → optax.GradientTransformation`, such as `lambda hyper: optax.sgd(hyper['rate'], hyper['momentum'])`."""


def scale_by_alpha(alpha: PyTree) -> optax.GradientTransformation:
  """Returns the transformation g ↦ −α ∘ g: Meta-SGD's update (Li et al. 2017, equation 2), sign included.

  `optax.apply_updates` adds what comes out, so that θ + (−α ∘ g) is the step of `adapt`. It stands last in an
  `optax.chain`, as `optax.scale_by_learning_rate` does, with no `optax.scale(-1)` after it. Stateless; differentiable
  in α to any order.

  Args:
    alpha: as `adapt` takes it: of θ's structure or a prefix of it, scalars, entries of any sign. Where it has `None`
      the update is zero.

  Raises (from its `init` and `update`):
    ValueError: α does not fit θ, naming the leaf. What `optax.masked` or `optax.partition` keeps from it may have an α.

  Example:
    >>> inner = optax.chain(optax.clip_by_global_norm(1.0), ms.scale_by_alpha({'w': 0.5}))
    >>> updates, _ = inner.update({'w': jnp.array([3.0, 4.0])}, inner.init({'w': jnp.zeros(2)}))
    >>> print(updates['w'].round(3))
    [-0.3 -0.4]

  In such a chain `optax.clip_by_global_norm` takes a root of the gradient: see `adapt_with_optimizer` on gradients of
  zero.
  """

  def init(params):
    broadcast_alpha(alpha, params, masked=optax.MaskedNode)
    return optax.EmptyState()

  def update(updates, state, params=None):
    del params
    structure: Any = jax.tree.structure(updates)
    rates = structure.flatten_up_to(broadcast_alpha(alpha, updates, masked=optax.MaskedNode))
    scale = lambda a, g: jnp.zeros_like(g) if a is None else -jnp.asarray(a, jnp.result_type(g)) * g
    return structure.unflatten([scale(a, g) for a, g in zip(rates, jax.tree.leaves(updates), strict=True)]), state

  return optax.GradientTransformation(init, update)


def adapt_with_optimizer(
  theta: PyTree,
  hyper: PyTree,
  batch: Any,
  *,
  loss_fn: LossFn,
  optimizer: InnerOptimizer,
  steps: int = 1,
  first_order: bool = False,
  adapts: Adapts | None = None,
) -> PyTree:
  """Returns θ adapted to one task by `steps` updates of an optax transformation, whose state starts anew.

  s_0 = init(θ_0);  u_t, s_{t+1} = update(∇loss_fn(θ_t, batch), s_t, θ_t);  θ_{t+1} = θ_t + u_t

  With `optimizer=ms.scale_by_alpha` and hyper = α it is `adapt`. Differentiable in θ and in hyper, through the state
  too, by reverse mode: all steps' intermediates are kept.

  A root, or a norm, of a gradient that is exactly zero has no finite derivative there, and the meta-gradient is NaN;
  by what is learned inside of it, such as Adam's `b2`, also with `first_order`. It happens to an entry behind a ReLU
  that is off (Adam and its kin, LAMB, Adafactor, RMSProp with `eps_in_sqrt=False`), and to the whole gradient in a task
  with no shot or a loss at its minimum (also clipping by a norm, LARS, NovoGrad, Polyak's step). What helps stands
  under the root: `eps_root` (such as 1e-8) for Adam's kin; `eps` stands beside it. Where there is none, write the root
  so that it never sees zero: docs/composition.md has such a clipping. `optax.clip`, by entries, is safe.

  Transformations that ask for them get the loss as `value`, its gradient as `grad` and `value_fn`. A line search runs
  a loop of unknown length, through which JAX has no reverse mode: with one there is an adapted θ, but no meta-gradient.

  Args:
    theta: any pytree of floating-point arrays.
    hyper: any pytree, handed to `optimizer`: what is meta-learned of the inner optimiser.
    batch: the task's support, handed to `loss_fn` as it is.
    loss_fn: `(θ, batch) → scalar`.
    optimizer: `hyper → optax.GradientTransformation`. Bounds are its own affair: `jax.nn.sigmoid(hyper['b1'])`.
    steps: 0 or more.
    first_order: gradients, and the loss where `value` is asked for, are constants; what is made of `value_fn` is not.
    adapts: says by name which of θ's leaves move; the transformation sees `None` for the others. All where left out.

  Returns:
    A pytree with θ's structure, shapes and dtypes.

  Raises:
    ValueError: an `optimizer` that is no function or does not return a transformation, θ has a leaf that is not
      floating-point, steps that are no count, or a loss that is not a floating-point scalar.

  Example:
    >>> momentum = lambda hyper: optax.sgd(hyper['rate'], hyper['momentum'])
    >>> loss = lambda theta, batch: (theta - batch) ** 2
    >>> learned = {'rate': 0.25, 'momentum': 0.5}
    >>> print(ms.adapt_with_optimizer(jnp.array(0.0), learned, 1.0, loss_fn=loss, optimizer=momentum, steps=2))
    1.0
  """
  inner = _inner(theta, hyper, batch, loss_fn, optimizer, steps, first_order, adapts)
  adapting, _ = repeat(inner.update, inner.carry, steps, arrays=inner.arrays)
  return inner.problem.merge(adapting)


def adapt_path_with_optimizer(
  theta: PyTree,
  hyper: PyTree,
  batch: Any,
  *,
  loss_fn: LossFn,
  optimizer: InnerOptimizer,
  steps: int = 1,
  first_order: bool = False,
  adapts: Adapts | None = None,
) -> PyTree:
  """Returns θ after 0, 1, …, steps updates, stacked on a new leading axis `[steps + 1]`.

  Entry −1 is what `adapt_with_optimizer` returns, whose errors these are too.

  Args:
    theta: as in `adapt_with_optimizer`, and so are the others.
    hyper: what is meta-learned of the inner optimiser.
    batch: the task's support.
    loss_fn: `(θ, batch) → scalar`.
    optimizer: `hyper → optax.GradientTransformation`.
    steps: 0 or more.
    first_order: gradients are constants.
    adapts: which of θ's leaves move, by name.

  Example:
    >>> loss = lambda theta, batch: (theta - batch) ** 2
    >>> print(ms.adapt_path_with_optimizer(jnp.array(0.0), 0.25, 1.0, loss_fn=loss, optimizer=optax.sgd, steps=2))
    [0.   0.5  0.75]
  """
  inner = _inner(theta, hyper, batch, loss_fn, optimizer, steps, first_order, adapts)
  path = repeat_with_path(inner.update, inner.carry, steps, arrays=inner.arrays, parameters=lambda carry: carry[0])
  return with_frozen(inner.problem, path, steps)


class _Inner(NamedTuple):
  """The updates of one task: the problem, the carry (adapting leaves, optimiser state), one update, arrays in use."""

  problem: InnerProblem
  carry: tuple[PyTree, PyTree]
  update: Callable[[tuple[PyTree, PyTree], None], tuple[PyTree, PyTree]]
  arrays: Any


def _inner(theta, hyper, batch, loss_fn, optimizer, steps, first_order, adapts) -> _Inner:
  check_steps(steps)
  check_theta(theta)
  theta = jax.tree.map(jnp.asarray, theta)
  problem = inner_problem(theta, which_adapt(theta, adapts), batch, loss_fn)
  transformation = _transformation(optimizer, hyper)

  def update(carry, _):
    adapting, state = carry
    value, grad = jax.value_and_grad(problem.loss)(adapting)
    if first_order:
      value, grad = jax.lax.stop_gradient((value, grad))
    updates, after = transformation.update(grad, state, adapting, value=value, grad=grad, value_fn=problem.loss)
    return optax.apply_updates(adapting, updates), jax.tree.map(_of_dtype, after, state)

  carry = problem.adapting, transformation.init(problem.adapting)
  return _Inner(problem, carry, update, (theta, hyper, batch))


def _of_dtype(new: chex.Array, old: chex.Array) -> chex.Array:
  """The state after a step in the dtypes of that before, which a learned number of another dtype would widen."""
  dtype = jnp.result_type(old)
  return new if jnp.result_type(new) == dtype else jnp.asarray(new, dtype)


def _transformation(optimizer, hyper) -> optax.GradientTransformationExtraArgs:
  if not callable(optimizer):
    raise ValueError(
      f'optimizer must be a function, hyper → optax.GradientTransformation, got {type(optimizer).__name__}; '
      'for one with nothing to learn write lambda hyper: …'
    )
  transformation = optimizer(hyper)
  if not isinstance(transformation, optax.GradientTransformation):
    raise ValueError(
      f'optimizer must return an optax.GradientTransformation, got {type(transformation).__name__}; '
      'it is a function of hyper, such as lambda rate: optax.adam(rate, eps_root=1e-8)'
    )
  return optax.with_extra_args_support(transformation)
