"""α, the learned rates of the inner loop: how α starts, and how a prefix of θ's structure covers all of θ."""

import dataclasses
import math
from typing import Any, Literal

import chex
import jax
import jax.numpy as jnp
from jax.tree_util import keystr, tree_flatten_with_path

from metasgd_jax.tree import named
from metasgd_jax.types import Adapts, PyTree, check_choice

Per = Literal['entry', 'leaf', 'layer', 'all']
"""The part of θ that shares one rate: an entry of an array, a leaf, a child of θ's root, or all of θ."""


@dataclasses.dataclass(frozen=True)
class AlphaConfig:
  """How learned rates α start, and which parts of θ and which inner steps share a rate.

  Every entry of the initial α is the same number, drawn once from U[low, high]. If `low == high`, α starts at this
  constant.

  Attributes:
    low: Lower end of the range. The default range is the one that the paper uses for regression (Li et al. 2017,
      section 4.1).
    high: Upper end of the range.
    per: Part of θ that has its own rate: each 'entry' of an array (as in the paper), each 'leaf', each 'layer', or
      'all' of θ. A layer is a child of θ's root.
    by_step: Whether each inner step has its own rates, as in MAML++ (Antoniou et al. 2019). Each leaf of α then has
      shape `[steps, …]`.

  Raises:
    ValueError: if `low > high`, if a bound is not finite, or if `per` is unknown.

  Example:
    >>> ms.AlphaConfig(0.1, 0.1, per='layer')
    AlphaConfig(low=0.1, high=0.1, per='layer', by_step=False)
  """

  low: float = 0.005
  high: float = 0.1
  per: Per = 'entry'
  by_step: bool = False

  def __post_init__(self):
    if not -math.inf < self.low <= self.high < math.inf:
      raise ValueError(f'alpha must start from a finite range low <= high, got low={self.low}, high={self.high}')
    check_choice('per', self.per, Per)
    for name in ('low', 'high'):
      object.__setattr__(self, name, float(getattr(self, name)))  # A NumPy array would not be hashable.


def init_alpha(
  key: chex.PRNGKey,
  theta: PyTree,
  config: AlphaConfig = AlphaConfig(),
  *,
  steps: int = 1,
  adapts: Adapts | None = None,
) -> PyTree:
  """Returns the initial α. Every entry is the same number, drawn once from U[low, high].

  If `config.per` is 'entry' or 'leaf', α has θ's structure. If it is 'layer', α has one array for each child of θ's
  root. If it is 'all', α is a single array.

  Args:
    key: Random key, consumed.
    theta: Parameters θ that the rates are for.
    config: Range of the number, and which parts of θ and which steps share a rate; see `AlphaConfig`.
    steps: Number of inner steps. It is used only if `config.by_step` is set.
    adapts: Function from the name of a leaf of θ to whether the leaf adapts. A leaf that does not adapt has the rate
      `None`. By default all leaves adapt.

  Example:
    >>> theta, config = {'w': jnp.zeros((2, 3)), 'b': jnp.zeros(3)}, ms.AlphaConfig(0.5, 0.5)
    >>> ms.init_alpha(jax.random.key(0), theta, config)['b']
    Array([0.5, 0.5, 0.5], dtype=float32)
    >>> config = ms.AlphaConfig(0.5, 0.5, per='leaf')
    >>> ms.init_alpha(jax.random.key(0), theta, config, adapts=lambda name: name == 'w')
    {'b': None, 'w': Array(0.5, dtype=float32)}
  """
  value = jax.random.uniform(key, (), jnp.float32, config.low, config.high)
  front = (steps,) if config.by_step else ()
  if config.per == 'all':
    return jnp.full(front, value)
  adapting = which_adapt(theta, adapts)

  def for_layer(layer, _):
    return jnp.full(front, value) if any(jax.tree.leaves(layer)) else None

  def for_leaf(leaf, adapts):
    shape = front if config.per == 'leaf' else front + jnp.shape(leaf)
    return jnp.full(shape, value, jnp.result_type(leaf)) if adapts else None

  if config.per == 'layer':
    return jax.tree.map(for_layer, adapting, theta, is_leaf=lambda node: node is not adapting)
  return jax.tree.map(for_leaf, theta, adapting)


def which_adapt(theta: PyTree, adapts: Adapts | None) -> PyTree:
  """Returns a boolean for each leaf of θ: `adapts(name of the leaf)`, or True for all leaves if `adapts` is `None`."""
  adapting = [adapts is None or bool(adapts(name)) for name, _ in named(theta)]
  return jax.tree.unflatten(jax.tree.structure(theta), adapting)


def broadcast_alpha(
  alpha: PyTree,
  theta: PyTree,
  *,
  adapts: Adapts | None = None,
  steps: int | None = None,
  masked: type | tuple[type, ...] = (),
) -> PyTree:
  """Broadcasts α, a prefix of θ's structure, to the full structure of θ.

  Each leaf of the result is a scalar, an array of the shape of θ's leaf, or `None` for a leaf that does not adapt. If
  `steps` is given, the shape of the scalar or array has the leading axis `[steps]` in addition.

  Paths are compared, not node types, so that α may be a dict where θ is a `FrozenDict`.

  Args:
    alpha: Rates.
    theta: Parameters.
    adapts: Function from the name of a leaf of θ to whether the leaf adapts; the rates of other leaves become `None`.
    steps: Number of inner steps, if each step has its own rates; each leaf of α then has shape `[steps, …]`. By default
      all steps share the rates.
    masked: Node types that stand for a hidden part of θ, such as `optax.MaskedNode`. α may have any entries in place of
      such a node.

  Raises:
    ValueError: if α does not fit θ, or if a leaf of θ is not a floating-point array. The message names the leaf.
  """
  check_theta(theta)
  rates = dict(tree_flatten_with_path(alpha, is_leaf=_is_none)[0])
  # A bare `None` cannot stand for all of θ. It is dropped here, so that an error is raised for the first leaf of θ.
  rates = {path: rate for path, rate in rates.items() if path or rate is not None}
  for path, rate in rates.items():
    _check_rate(path, rate, steps)
  leaves = tree_flatten_with_path(theta)[0]
  owners = [next((path[:n] for n in range(len(path) + 1) if path[:n] in rates), None) for path, _ in leaves]
  _check_unused({path: rate for path, rate in rates.items() if path not in set(owners)}, theta, masked)
  found = []
  for owner, (path, leaf) in zip(owners, leaves, strict=True):
    if owner is None:
      raise ValueError(f'alpha has no entry for theta{keystr(path)}; add one, or None if the leaf does not adapt')
    _check_fits(owner, rates[owner], path, leaf, steps)
    found.append(rates[owner])
  if adapts is not None:
    adapting = jax.tree.leaves(which_adapt(theta, adapts))
    found = [rate if moves else None for rate, moves in zip(found, adapting, strict=True)]
  return jax.tree.unflatten(jax.tree.structure(theta), found)


def _is_none(node: Any) -> bool:
  return node is None


def _check_rate(path, rate, steps) -> None:
  if rate is None:
    return
  dtype = dtype_of(rate)
  if dtype is None or jnp.issubdtype(dtype, jnp.complexfloating):
    raise ValueError(f'alpha{keystr(path)} must be a number or an array of real numbers, got {rate!r:.80}')
  if steps is not None and jnp.shape(rate)[:1] != (steps,):
    raise ValueError(
      f'alpha{keystr(path)} has shape {jnp.shape(rate)}, but each of {steps} steps has its own rates; '
      f'stack the rates of the steps, so that the shape starts with {steps}'
    )


def _check_fits(owner, rate, path, leaf, steps) -> None:
  shape = () if rate is None else jnp.shape(rate)[0 if steps is None else 1 :]
  if shape and (len(path) > len(owner) or shape != jnp.shape(leaf)):
    raise ValueError(
      f'alpha{keystr(owner)} has shape {shape} but theta{keystr(path)} has shape {jnp.shape(leaf)}; '
      'give alpha the same shape, or a scalar'
    )


def _check_unused(rates: dict, theta, masked) -> None:
  """Raises ValueError if one of the rates, which belong to no leaf of θ, has no reason to be there.

  A rate may be `None` where θ has a `None`. Any rate may be where θ has a node of a type in `masked`.
  """
  if not rates:
    return
  nodes = tree_flatten_with_path(theta, is_leaf=lambda node: node is None or isinstance(node, masked))[0]
  hidden = {at for at, node in nodes if node is not None}
  above_empty, above_hidden = (
    {at[:n] for at, node in nodes if (node is None) == empty for n in range(len(at) + 1)} for empty in (True, False)
  )
  for path, rate in rates.items():
    if rate is None and path in above_empty:
      continue
    if path not in above_hidden and not any(path[:n] in hidden for n in range(len(path) + 1)):
      raise ValueError(
        f'alpha{keystr(path)} matches nothing in theta; alpha must have the structure of theta or a prefix of it'
      )


def check_theta(theta: PyTree) -> None:
  """Raises ValueError if a leaf of θ is not an array or not floating-point. The message names the leaf."""
  for path, leaf in tree_flatten_with_path(theta)[0]:
    if (dtype := dtype_of(leaf)) is None:
      raise ValueError(
        f'theta{keystr(path)} must be an array, got {leaf!r:.80}; keep functions and settings out of theta, '
        'as nn.from_equinox, nn.from_nnx and equinox.partition do'
      )
    if not jnp.issubdtype(dtype, jnp.floating):
      raise ValueError(
        f'theta{keystr(path)} must be floating-point, because its gradient is needed, got dtype {dtype}; '
        'keep integers and flags out of theta, and store complex numbers as two real arrays'
      )


def dtype_of(leaf: Any) -> Any:
  """Returns the dtype of an array or a number, and `None` for anything else."""
  if isinstance(leaf, type | str):  # jnp.result_type interprets np.float32 and 'float32' as dtypes.
    return None
  try:
    return jnp.result_type(leaf if hasattr(leaf, 'dtype') else jnp.asarray(leaf))
  except (TypeError, ValueError):
    return None
