"""The inner loop: θ′ = θ − α ∘ ∇L(θ), a pure function of one task."""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr, tree_flatten_with_path

from metasgd_jax.inner.adjoint import descend
from metasgd_jax.tree import named
from metasgd_jax.types import Adapts, PyTree

LossFn = Callable[[PyTree, Any], chex.Array]

Per = Literal['entry', 'leaf', 'layer', 'all']
"""What has a rate of its own in α; a layer is a child of θ's root."""

Backward = Literal['reverse', 'recompute', 'forward', 'sparse']
"""How the gradient of the outer loss goes back through the inner steps; all give the same, to rounding.

With v = dL/dθ_{t+1}, H_t the Hessian and g_t the gradient of the support loss at θ_t, a step back is
v ← v − H_t (α ∘ v) and dL/dα −= g_t ∘ v, the chain rule of θ_{t+1} = θ_t − α ∘ g_t.

- `reverse`: reverse mode over reverse mode; every step's intermediates are kept, so memory grows with the steps.
- `recompute`: the same, with a step's intermediates computed again when it is its turn; of each step θ_t alone is kept.
- `forward`: H_t (α ∘ v) by forward mode over the gradient, which keeps nothing but θ_t either. No forward mode through
  the result.
- `sparse`: as `forward`, but few of the θ_t are kept, of 200 steps 9, and the others are computed again, twice at most:
  for steps by the hundred. With rates by step, which are as many as the θ_t, it is `forward`.
"""


def adapt(
  theta: PyTree,
  alpha: PyTree,
  batch: Any,
  *,
  loss_fn: LossFn,
  steps: int = 1,
  first_order: bool = False,
  backward: Backward = 'reverse',
  alpha_by_step: bool = False,
) -> PyTree:
  """Returns θ adapted to one task.

  θ_{t+1} = θ_t − α ∘ ∇loss_fn(θ_t, batch), for t = 0 … steps − 1: the inner update of Meta-SGD (Li et al. 2017,
  equation 2). Differentiable in θ and α to any order; with `first_order` the inner gradient is a constant, so that
  dθ′/dθ = 1 while α still gets its gradient −∇L ∘ dL′.

  Args:
    theta: any pytree of floating-point arrays.
    alpha: a pytree of θ's structure, each leaf of θ's shape or a scalar; or a prefix of that structure whose leaves
      are scalars: `0.01`, or one number a layer. Entries may be negative. Where it has `None`, θ is not adapted: no
      inner gradient is computed for it, while the derivative of the result by it is as ever.
    batch: the task's support, handed to `loss_fn` as it is.
    loss_fn: `(θ, batch) → scalar`.
    steps: inner steps, 0 or more; the paper takes 1 everywhere.
    first_order: drop the second derivatives.
    backward: how derivatives of the result go back through the steps; see `Backward`.
    alpha_by_step: each leaf of α has `[steps]` in front, and step t takes its own, as in MAML++ (Antoniou et al. 2019).

  Returns:
    A pytree with θ's structure, shapes and dtypes.

  Raises:
    ValueError: α does not fit θ (naming the leaf), θ has a leaf that is not floating-point, steps that are no count,
      an unknown `backward`, or a loss that is not a floating-point scalar.

  Example:
    >>> theta = {'w': jnp.array([1.0, 2.0])}
    >>> loss = lambda theta, target: jnp.sum((theta['w'] - target) ** 2)  # Its gradient: 2 (w − target).
    >>> ms.adapt(theta, {'w': jnp.array([0.5, 0.25])}, jnp.zeros(2), loss_fn=loss)
    {'w': Array([0., 1.], dtype=float32)}
    >>> ms.adapt(theta, 0.25, jnp.zeros(2), loss_fn=loss, steps=2)
    {'w': Array([0.25, 0.5 ], dtype=float32)}
  """
  check_backward(backward)
  check_steps(steps)
  inner = _inner(theta, alpha, batch, loss_fn, first_order, steps if alpha_by_step else None)
  step, sparse = _step(inner.grad), backward == 'sparse'
  if sparse or (backward == 'forward' and not first_order):
    if not alpha_by_step:
      return inner.whole(descend(inner.grad, int(steps), inner.moving, inner.rates, sparse=sparse))
    step = functools.partial(descend, inner.grad, 1)
  if backward == 'recompute':
    step = jax.checkpoint(step, prevent_cse=steps == 1)
  if steps == 1 and not alpha_by_step:
    return inner.whole(step(inner.moving, inner.rates))
  return inner.whole(_over_steps(step, inner.moving, inner.rates, steps, alpha_by_step, keep=False))


def adapt_path(
  theta: PyTree,
  alpha: PyTree,
  batch: Any,
  *,
  loss_fn: LossFn,
  steps: int = 1,
  first_order: bool = False,
  alpha_by_step: bool = False,
) -> PyTree:
  """Returns θ after 0, 1, …, steps inner steps, stacked on a new leading axis `[steps + 1]`.

  Entry −1 is what `adapt` returns; errors are `adapt`'s.

  Args:
    theta: as in `adapt`, and so are the rest.
    alpha: as in `adapt`.
    batch: as in `adapt`.
    loss_fn: as in `adapt`.
    steps: as in `adapt`.
    first_order: as in `adapt`.
    alpha_by_step: as in `adapt`.

  Example:
    >>> loss = lambda theta, target: (theta - target) ** 2
    >>> ms.adapt_path(1.0, 0.25, 0.0, loss_fn=loss, steps=3)
    Array([1.   , 0.5  , 0.25 , 0.125], dtype=float32)
  """
  check_steps(steps)
  inner = _inner(theta, alpha, batch, loss_fn, first_order, steps if alpha_by_step else None)
  later = _over_steps(_step(inner.grad), inner.moving, inner.rates, steps, alpha_by_step, keep=True)
  path = jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest]), inner.moving, later)
  return inner.whole(path, copies=int(steps) + 1)


def _over_steps(step, theta, rates, steps, by_step, *, keep):
  """The last θ, or with `keep` θ after each of the steps."""

  def body(t, rates_now):
    t = step(t, rates_now if by_step else rates)
    return t, t if keep else None

  last, path = jax.lax.scan(body, theta, rates if by_step else None, length=int(steps))
  return path if keep else last


def init_alpha(
  key: chex.PRNGKey,
  theta: PyTree,
  *,
  low: float = 0.005,
  high: float = 0.1,
  per: Per = 'entry',
  steps: int | None = None,
  adapts: Adapts | None = None,
) -> PyTree:
  """Returns the starting α, every entry the same number, drawn once from U[low, high].

  The paper's own start for regression (section 4.1). `low == high` gives a constant.

  Args:
    key: consumed.
    theta: the pytree to match.
    low: the least value drawn.
    high: the greatest value drawn.
    per: what has a rate of its own: each 'entry' of θ, as in the paper; each 'leaf'; each 'layer'; or 'all' of θ.
    steps: where given, every inner step has rates of its own: `[steps]` in front of each leaf.
    adapts: says by name which of θ's leaves adapt; the others have no rate. All of them where left out.

  Raises:
    ValueError: low > high, a bound that is not finite, or an unknown `per`.

  Example:
    >>> theta = {'w': jnp.zeros((2, 3)), 'b': jnp.zeros(3)}
    >>> ms.init_alpha(jax.random.key(0), theta, low=0.5, high=0.5)['b']
    Array([0.5, 0.5, 0.5], dtype=float32)
    >>> ms.init_alpha(jax.random.key(0), theta, low=0.5, high=0.5, per='leaf', adapts=lambda name: name == 'w')
    {'b': None, 'w': Array(0.5, dtype=float32)}
  """
  check_alpha_range(low, high)
  if per not in get_args(Per):
    raise ValueError(f'per must be one of {get_args(Per)}, got {per!r}')
  value = jax.random.uniform(key, (), jnp.float32, low, high)
  front = () if steps is None else (steps,)
  if per == 'all':
    return jnp.full(front, value)
  moves = which_adapt(theta, adapts)
  if per == 'layer':
    of_layer = lambda layer, _: jnp.full(front, value) if any(jax.tree.leaves(layer)) else None
    return jax.tree.map(of_layer, moves, theta, is_leaf=lambda t: t is not moves)
  shape = lambda t: front if per == 'leaf' else front + jnp.shape(t)
  return jax.tree.map(lambda t, m: jnp.full(shape(t), value, jnp.result_type(t)) if m else None, theta, moves)


def which_adapt(theta: PyTree, adapts: Adapts | None) -> PyTree:
  """Returns for each leaf of θ whether it adapts, by its name; all do without `adapts`."""
  moves = [adapts is None or bool(adapts(name)) for name, _ in named(theta)]
  return jax.tree.unflatten(jax.tree.structure(theta), moves)


def held(alpha: PyTree, theta: PyTree, adapts: Adapts | None, by_step: int | None = None) -> PyTree:
  """Returns α with `None` for the leaves of θ that do not adapt; as it is without `adapts`.

  Raises:
    ValueError: as `adapt`.
  """
  if adapts is None:
    return alpha
  whole = broadcast_alpha(alpha, theta, by_step)
  return jax.tree.map(lambda move, a: a if move else None, which_adapt(theta, adapts), whole)


def check_alpha_range(low: float, high: float) -> None:
  """Raises ValueError unless −∞ < low ≤ high < ∞."""
  if not -math.inf < low <= high < math.inf:
    raise ValueError(f'alpha must start from a finite range low <= high, got low={low}, high={high}')


def check_steps(steps: int) -> None:
  """Raises ValueError unless steps is an integer of at least 0."""
  if isinstance(steps, bool) or not isinstance(steps, int | np.integer) or steps < 0:
    raise ValueError(f'steps must be an integer of at least 0, got {steps!r}')


def check_backward(backward: str) -> None:
  """Raises ValueError unless `backward` is a `Backward`."""
  if backward not in get_args(Backward):
    raise ValueError(f'backward must be one of {get_args(Backward)}, got {backward!r}')


class _Inner(NamedTuple):
  """The inner problem: what moves of θ, as a list of leaves, its rates, its gradient, and how it is put back."""

  moving: list[chex.Array]
  rates: list[chex.Array]
  grad: Callable[[list[chex.Array]], list[chex.Array]]
  whole: Callable[..., PyTree]


def _inner(theta, alpha, batch, loss_fn, first_order, by_step) -> _Inner:
  """`by_step` is the number of steps that each leaf of α has in front, or `None`."""
  structure: Any = jax.tree.structure(theta)
  rates = structure.flatten_up_to(broadcast_alpha(alpha, theta, by_step))
  leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(theta)]
  moves = [rate is not None for rate in rates]

  def whole(moving, copies=None):
    """θ from what moves of it and the rest, which has `copies` in front where they are given."""
    rest = lambda t: t if copies is None else jnp.broadcast_to(t[None], (copies, *t.shape))
    moving = iter(moving)
    return structure.unflatten([next(moving) if m else rest(t) for t, m in zip(leaves, moves, strict=True)])

  def grad(moving):
    grads = jax.grad(lambda moving: scalar_loss(loss_fn, whole(moving), batch))(moving)
    return jax.lax.stop_gradient(grads) if first_order else grads

  pairs = [(t, jnp.asarray(a, t.dtype)) for t, a in zip(leaves, rates, strict=True) if a is not None]
  return _Inner([t for t, _ in pairs], [a for _, a in pairs], grad, whole)


def scalar_loss(loss_fn: LossFn, theta: PyTree, batch: Any) -> chex.Array:
  """Returns loss_fn(θ, batch).

  Raises:
    ValueError: it is not a scalar, or not floating-point.
  """
  loss = loss_fn(theta, batch)
  if not hasattr(loss, 'dtype') and not isinstance(loss, int | float | complex):
    raise ValueError(
      f'loss_fn must return a scalar, got {type(loss).__name__}; leave auxiliary outputs out, '
      'and compute them where they are wanted, such as at the adapted theta'
    )
  if jnp.ndim(loss):
    raise ValueError(f'loss_fn must return a scalar, got shape {jnp.shape(loss)}; take its mean or sum')
  if not jnp.issubdtype(jnp.result_type(loss), jnp.floating):
    raise ValueError(
      f'loss_fn must return a floating-point scalar, got dtype {jnp.result_type(loss)}, which has no gradient; '
      'compute it without integers, and take the absolute value of a complex number'
    )
  return loss


def _step(grad):
  return lambda theta, alpha: jax.tree.map(lambda t, a, g: t - a * g, theta, alpha, grad(theta))


def check_theta(theta: PyTree) -> None:
  """Raises ValueError where a leaf of θ is no array or not floating-point, naming it."""
  for path, leaf in tree_flatten_with_path(theta)[0]:
    if (dtype := _dtype(leaf)) is None:
      raise ValueError(
        f'theta{keystr(path)} is no array but {leaf!r:.80}; keep functions and settings out of theta, '
        'as nn.from_equinox, nn.from_nnx and equinox.partition do'
      )
    if not jnp.issubdtype(dtype, jnp.floating):
      raise ValueError(
        f'theta{keystr(path)} has dtype {dtype}; adapt differentiates theta, which must be '
        'floating-point, so keep integers and flags out of it, and complex numbers as two real arrays'
      )


def _dtype(leaf: Any) -> Any:
  """The dtype of an array or a number; `None` of anything else."""
  if isinstance(leaf, type | str):  # jnp.result_type takes np.float32, and 'float32', for a dtype.
    return None
  try:
    return jnp.result_type(leaf if hasattr(leaf, 'dtype') else jnp.asarray(leaf))
  except (TypeError, ValueError):
    return None


def broadcast_alpha(
  alpha: PyTree, theta: PyTree, by_step: int | None = None, *, masked: type | tuple[type, ...] = ()
) -> PyTree:
  """Returns α, a prefix of θ's structure, with the whole of it; each leaf has θ's shape, or is a scalar or `None`.

  With `by_step`, a number of steps, each leaf has that many of these in front. Where θ has an instance of `masked` in
  place of a subtree, α may have what it likes.

  Raises:
    ValueError: as `adapt`, naming the leaf.
  """
  theta_leaves = tree_flatten_with_path(theta)[0]
  alpha_leaves = tree_flatten_with_path(alpha, is_leaf=lambda a: a is None)[0]
  empty = [path for path, leaf in tree_flatten_with_path(theta, is_leaf=lambda t: t is None)[0] if leaf is None]
  nodes = tree_flatten_with_path(theta, is_leaf=lambda t: isinstance(t, masked))[0] if masked else []
  hidden = [path for path, node in nodes if isinstance(node, masked)]
  check_theta(theta)
  owners: dict[int, int] = {}
  for index, (path, leaf) in enumerate(alpha_leaves):
    if leaf is None and not path:  # Of all of θ it is no α.
      continue
    if leaf is not None and ((dtype := _dtype(leaf)) is None or jnp.issubdtype(dtype, jnp.complexfloating)):
      raise ValueError(f'alpha{keystr(path)} must be a number, or an array of real numbers, got {leaf!r:.80}')
    shape = jnp.shape(leaf) if leaf is not None else ()
    if by_step is not None and leaf is not None:
      if shape[:1] != (by_step,):
        raise ValueError(
          f'alpha{keystr(path)} has shape {shape}, but each of {by_step} steps has its own; put [{by_step}] in front'
        )
      shape = shape[1:]
    covered = [i for i, (p, _) in enumerate(theta_leaves) if p[: len(path)] == path]
    if not covered:
      if leaf is None and any(p[: len(path)] == path for p in empty):  # θ's own `None` has no leaves.
        continue
      if any(p[: len(path)] == path[: len(p)] for p in hidden):  # One stands above the other.
        continue
      raise ValueError(
        f'alpha{keystr(path)} matches nothing in theta; alpha must have the structure of theta or a prefix of it'
      )
    for i in covered:
      full_path, t = theta_leaves[i]
      owners[i] = index
      if shape and (len(full_path) > len(path) or shape != jnp.shape(t)):
        raise ValueError(
          f'alpha{keystr(path)} has shape {shape} but theta{keystr(full_path)} has shape {jnp.shape(t)}; '
          'give alpha the same shape, or a scalar'
        )
  missing = [keystr(path) for i, (path, _) in enumerate(theta_leaves) if i not in owners]
  if missing:
    raise ValueError(f'alpha has no entry for theta{missing[0]}; give it one (None keeps a leaf as it is)')
  return jax.tree.unflatten(jax.tree.structure(theta), [alpha_leaves[owners[i]][1] for i in range(len(theta_leaves))])
