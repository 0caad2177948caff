"""Modules of flax NNX and of Equinox as a `Model`.

Haiku needs no function: `ms.Model(*hk.without_apply_rng(hk.transform(f)))`. Modules with state besides their parameters
are shown in docs/composition.md.
"""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from metasgd_jax.types import Model


def from_nnx(build: Callable[[Any], Any]) -> Model:
  """Returns an NNX module that has parameters only as a `Model`; θ is a dict of its parameters, nested as it is.

  Names for `partly` are as the attributes': 'layers.0.kernel'. `nnx.merge(nnx.graphdef(module), θ)` is a module again.

  Args:
    build: `nnx.Rngs → module`, such as `lambda rngs: nnx.Linear(3, 1, rngs=rngs)`. It is called by `init`, and once
      here for its structure, with no array made; the module is called with a batch `[B, …]`.

  Raises:
    ValueError: the module has other variables, such as running averages or keys of dropout.

  Example:
    >>> from flax import nnx
    >>> model = ms.nn.from_nnx(lambda rngs: nnx.Linear(3, 1, rngs=rngs))
    >>> theta = model.init(jax.random.key(0), jnp.zeros((5, 3)))
    >>> list(theta), model.apply(theta, jnp.zeros((5, 3))).shape
    (['bias', 'kernel'], (5, 1))
  """
  from flax import nnx

  abstract = nnx.eval_shape(lambda: build(nnx.Rngs(0)))
  graphdef, rest = nnx.graphdef(abstract), nnx.state(abstract, nnx.Not(nnx.Param))
  others = sorted({type(variable).__name__ for _, variable in nnx.to_flat_state(rest)})
  if others:
    raise ValueError(
      f'{type(abstract).__name__} has variables of the types {others} besides nnx.Param; a Model is a pure function of '
      'its parameters (docs/composition.md has batch norm and dropout)'
    )

  def init(key: chex.PRNGKey, x: Any):
    del x  # An NNX module knows its shapes.
    return nnx.to_pure_dict(nnx.state(build(nnx.Rngs(key)), nnx.Param))

  return Model(init, lambda theta, x: nnx.merge(graphdef, theta)(x))


def from_equinox(build: Callable[[chex.PRNGKey], Any]) -> Model:
  """Returns an Equinox module without state as a `Model`; θ is the module with `None` for what is no parameter.

  Parameters are its floating-point arrays. `eqx.combine(θ, eqx.filter(module, eqx.is_inexact_array, inverse=True))` is
  a module again. Names for `partly` are as the attributes': 'layers.0.weight'. `checkpoint` and
  `eqx.tree_serialise_leaves` save such a θ; `writers.write_params`, which takes flax's containers, does not.

  Args:
    build: `key → module`, such as `lambda key: eqx.nn.Linear(3, 1, key=key)`; consumes key. It is called by `init`,
      and once here for its structure, with no array made. The module is called with one item, as is Equinox's habit,
      under a `jax.vmap` over the batch.

  Raises:
    ImportError: Equinox is not installed.
    ValueError: the module has arrays that are not floating-point, or state, such as running averages.

  Example:
    >>> import equinox as eqx
    >>> model = ms.nn.from_equinox(lambda key: eqx.nn.Linear(3, 1, key=key))
    >>> theta = model.init(jax.random.key(0), jnp.zeros((5, 3)))
    >>> theta.weight.shape, model.apply(theta, jnp.zeros((5, 3))).shape
    ((1, 3), (5, 1))
  """
  try:
    import equinox as eqx
  except ImportError as error:
    raise ImportError("Equinox is not installed; pip install 'metasgd_jax[compose]'") from error

  abstract = eqx.filter_eval_shape(lambda: build(jax.random.key(0)))
  name, see = type(abstract).__name__, 'docs/composition.md has the way without from_equinox'
  is_state = lambda leaf: isinstance(leaf, eqx.nn.StateIndex)
  if any(is_state(leaf) for leaf in jax.tree.leaves(abstract, is_leaf=is_state)):
    raise ValueError(f'{name} has state (eqx.nn.StateIndex); a Model is a pure function of its parameters ({see})')
  is_shape = lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct)
  shapes, static = eqx.partition(abstract, is_shape)
  dtypes = {leaf.dtype for leaf in jax.tree.leaves(shapes)}
  wrong = sorted(str(dtype) for dtype in dtypes if not jnp.issubdtype(dtype, jnp.inexact))
  if wrong:
    raise ValueError(f'{name} has arrays of dtype {", ".join(wrong)}, which cannot be learned ({see})')

  def init(key: chex.PRNGKey, x: Any):
    del x  # An Equinox module knows its shapes.
    return eqx.filter(build(key), eqx.is_inexact_array)

  return Model(init, lambda theta, x: jax.vmap(eqx.combine(theta, static))(x))
