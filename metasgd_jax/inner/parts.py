"""Models of which a chosen part adapts: some leaves of θ, or low-rank changes of some matrices."""

import math

import jax
import jax.numpy as jnp

from metasgd_jax.tree import named
from metasgd_jax.types import Adapts, Model, check_count


def adapt_only(model: Model, adapts: Adapts) -> Model:
  """Returns the model with an inner loop that moves the leaves of θ that `adapts` names, of those that it moved before.

  The rest is meta-learned as ever, but is the same for all tasks: it has no α, and no inner gradient. That of leaves
  behind it, such as of an earlier layer, may be needed on the way.

  Args:
    model: the network.
    adapts: `name → bool`, of names such as 'Dense_0.kernel': `lambda name: name.startswith('Dense')`.

  Raises (from `init`):
    ValueError: none of the leaves is chosen; it lists their names.

  Example:
    >>> model = ms.adapt_only(ms.nn.from_linen(ms.nn.MLP()), lambda name: name.startswith('Dense_2'))
    >>> theta = model.init(jax.random.key(0), jnp.zeros((5, 1)))
    >>> alpha = ms.init_alpha(jax.random.key(1), theta, adapts=model.adapts)
    >>> alpha['Dense_0'], alpha['Dense_2']['kernel'].shape
    ({'bias': None, 'kernel': None}, (40, 1))
  """

  def both(name: str) -> bool:
    return bool(adapts(name)) and (model.adapts is None or model.adapts(name))

  def init(key, x):
    theta = model.init(key, x)
    _check_some([name for name, _ in named(theta) if both(name)], theta, 'adapts')
    return theta

  return model._replace(init=init, adapts=both)


def low_rank(model: Model, rank: int, where: Adapts) -> Model:
  """Returns the model with an inner loop that moves low-rank changes of the matrices that `where` names.

  W = W₀ + A B with A `[n, r]` and B `[r, m]` (Hu et al. 2021, section 4.1, whose letters stand for the transposes and
  whose factor α / r is left to the rates). A starts as N(0, 1/n), B at zero. All three are meta-learned; of them A and
  B adapt. θ is `{'base': θ of the model, 'factors': {name: {'a': A, 'b': B}}}`. A kernel of more axes than two is a
  matrix of its last axis and all others. Leaves that the model says it `adapts`, by `adapt_only`, go on to.

  The inner gradient by A and B goes through that by W, so a step takes as many products as one of W itself; α, and
  what is kept of a step, have r (n + m) entries in place of n m.

  Args:
    model: the network.
    rank: r, at least 1.
    where: `name → bool`, of names such as 'Dense_0.kernel'; it is asked of leaves with two axes or more.

  Raises:
    ValueError: a rank that is no integer of at least 1. From `init`: none of the matrices is chosen, or one is smaller
      than the rank.

  Example:
    >>> model = ms.low_rank(ms.nn.from_linen(ms.nn.MLP()), 4, lambda name: name == 'Dense_1.kernel')
    >>> theta = model.init(jax.random.key(0), jnp.zeros((5, 1)))
    >>> {name: leaf.shape for name, leaf in theta['factors']['Dense_1.kernel'].items()}  # In place of 40×40.
    {'a': (40, 4), 'b': (4, 40)}
  """
  check_count('rank', rank)

  def init(key, x):
    base_key, factors_key = jax.random.split(key)
    base = model.init(base_key, x)
    matrices = {name: leaf for name, leaf in named(base) if jnp.ndim(leaf) >= 2}
    chosen = [name for name in matrices if where(name)]
    _check_some(chosen, matrices, 'where')
    factors = {}
    for name, factor_key in zip(chosen, jax.random.split(factors_key, len(chosen)), strict=True):
      (n, m), dtype = _matrix(matrices[name].shape), matrices[name].dtype
      if rank > min(n, m):
        raise ValueError(f'rank must be at most {min(n, m)} for {name}, a matrix of {n}x{m}, got {rank}')
      factors[name] = {
        'a': jax.random.normal(factor_key, (n, rank), dtype) / math.sqrt(n),
        'b': jnp.zeros((rank, m), dtype),
      }
    return {'base': base, 'factors': factors}

  def merged(theta):
    def leaf(name, w):
      factors = theta['factors'].get(name)
      return w if factors is None else w + (factors['a'] @ factors['b']).reshape(w.shape)

    leaves = [leaf(name, w) for name, w in named(theta['base'])]
    return jax.tree.unflatten(jax.tree.structure(theta['base']), leaves)

  def adapts(name: str) -> bool:
    part, _, rest = name.partition('.')
    return part == 'factors' or (model.adapts is not None and model.adapts(rest))

  def apply(theta, x, *statistics):
    return model.apply(merged(theta), x, *statistics)

  of_model = model.statistics
  statistics = None if of_model is None else lambda theta, x: of_model(merged(theta), x)
  return Model(init, apply, statistics, adapts)


def _matrix(shape):
  """The rows and columns of a kernel as one matrix."""
  return math.prod(shape[:-1]), shape[-1]


def _check_some(chosen, tree, argument):
  if not chosen:
    names = ', '.join(name for name, _ in named(tree))
    raise ValueError(f'{argument} must be true of some leaf of theta, but is of none of: {names}')
