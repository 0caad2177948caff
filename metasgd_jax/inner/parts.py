"""Models that adapt only in part: in some leaves of θ, or in low-rank changes of some matrices."""

import math

import jax
import jax.numpy as jnp

from metasgd_jax.tree import named
from metasgd_jax.types import Adapts, Model, check_count, check_model, equal_by_arguments


@equal_by_arguments
def adapt_only(model: Model, adapts: Adapts) -> Model:
  """Returns the model with an inner loop that adapts only the leaves of θ that `adapts` selects.

  A leaf that did not adapt in the given model still does not adapt. The leaves that do not adapt are meta-learned as
  before, but they are the same for all tasks: they have no α, and no inner gradient is computed for them. The inner
  gradient of an adapting earlier layer still passes through a later layer that does not adapt.

  Args:
    model: Model, such as `nn.from_linen(nn.MLP())`.
    adapts: Function from the name of a leaf of θ, such as 'Dense_0.kernel', to whether the leaf adapts. An example is
      `lambda name: name.startswith('Dense')`.

  Raises (from `init`):
    ValueError: if no leaf is selected (the message lists the names of all leaves).

  Example:
    >>> model = ms.adapt_only(ms.nn.from_linen(ms.nn.MLP()), lambda name: name.startswith('Dense_2'))
    >>> theta = model.init(jax.random.key(0), jnp.zeros((5, 1)))
    >>> alpha = ms.init_alpha(jax.random.key(1), theta, adapts=model.adapts)
    >>> alpha['Dense_0'], alpha['Dense_2']['kernel'].shape
    ({'bias': None, 'kernel': None}, (40, 1))
  """
  check_model(model)

  def both(name: str) -> bool:
    return bool(adapts(name)) and (model.adapts is None or model.adapts(name))

  def init(key, x):
    theta = model.init(key, x)
    _check_some([name for name, _ in named(theta) if both(name)], theta, 'adapts')
    return theta

  return model._replace(init=init, adapts=both)


@equal_by_arguments
def low_rank(model: Model, rank: int, where: Adapts) -> Model:
  """Returns the model with an inner loop that adapts low-rank changes of the matrices that `where` selects.

  Each selected matrix is W = W₀ + A B with A `[n, r]` and B `[r, m]` (Hu et al. 2021, section 4.1). In that paper the
  inputs are column vectors, so that its A and B are the transposes of A and B here. The paper's factor α / r is
  omitted, because it can be part of the rates. The entries of A are drawn from N(0, 1/n), and B is initialised to zero.
  A kernel with more than two axes is treated as a matrix: m is the length of its last axis, and n is the product of the
  lengths of the other axes.

  θ is `{'base': θ of the model, 'factors': {name: {'a': A, 'b': B}}}`. All of it is meta-learned. The factors A and B
  adapt. A leaf of the base, such as W₀, adapts only if the given model comes from `adapt_only` and the leaf adapts in
  the given model.

  The inner gradient with respect to A and B is computed from the gradient with respect to W. An inner step therefore
  needs as many matrix products as a step on W itself. However, α and the values that are stored for a step have
  r (n + m) entries instead of n m.

  Args:
    model: Model, such as `nn.from_linen(nn.MLP())`.
    rank: Rank r of the change, at least 1.
    where: Function from the name of a leaf, such as 'Dense_0.kernel', to whether the leaf gets a low-rank change. It is
      called for the leaves that have two or more axes.

  Raises:
    ValueError: if `rank` is not an integer of at least 1. `init` raises ValueError if no matrix is selected, or
      if a selected matrix has fewer rows or columns than `rank`.

  Example:
    >>> model = ms.low_rank(ms.nn.from_linen(ms.nn.MLP()), 4, lambda name: name == 'Dense_1.kernel')
    >>> theta = model.init(jax.random.key(0), jnp.zeros((5, 1)))
    >>> {name: leaf.shape for name, leaf in theta['factors']['Dense_1.kernel'].items()}  # The matrix is 40×40.
    {'a': (40, 4), 'b': (4, 40)}
  """
  check_model(model)
  check_count('rank', rank)

  def init(key, x):
    base_key, factors_key = jax.random.split(key)
    base = model.init(base_key, x)
    matrices = {name: leaf for name, leaf in named(base) if jnp.ndim(leaf) >= 2}
    chosen = {name: w for name, w in matrices.items() if where(name)}
    _check_some(chosen, matrices, 'where')
    factors = {}
    for (name, w), factor_key in zip(chosen.items(), jax.random.split(factors_key, len(chosen)), strict=True):
      n, m = math.prod(w.shape[:-1]), w.shape[-1]
      if rank > min(n, m):
        raise ValueError(f'`rank` must be at most {min(n, m)} for {name}, a {n}x{m} matrix, got {rank}; lower it')
      factors[name] = {
        'a': jax.random.normal(factor_key, (n, rank), w.dtype) / math.sqrt(n),
        'b': jnp.zeros((rank, m), w.dtype),
      }
    return {'base': base, 'factors': factors}

  def merged(theta):
    def leaf(name, w):
      factors = theta['factors'].get(name)
      return w if factors is None else w + (factors['a'] @ factors['b']).reshape(w.shape)

    leaves = [leaf(name, w) for name, w in named(theta['base'])]
    return jax.tree.unflatten(jax.tree.structure(theta['base']), leaves)

  def adapts(name: str) -> bool:
    if name.startswith(('factors.', "['factors']")):
      return True
    return model.adapts is not None and model.adapts(name.removeprefix('base.').removeprefix("['base']"))

  def apply(theta, x, *statistics):
    return model.apply(merged(theta), x, *statistics)

  of_model = model.statistics
  statistics = None if of_model is None else lambda theta, x: of_model(merged(theta), x)
  return Model(init, apply, statistics, adapts)


def _check_some(chosen, tree, argument):
  if not chosen:
    names = ', '.join(name for name, _ in named(tree))
    raise ValueError(f'`{argument}` must select at least one leaf of theta, but it selects none of: {names}')
