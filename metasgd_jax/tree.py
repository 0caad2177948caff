"""Leaves of pytrees: their names, such as 'meta.theta.Dense_0.kernel', and their types."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metasgd_jax.types import PyTree


def named(tree: PyTree) -> list[tuple[str, Any]]:
  """Returns the pairs of name and leaf of a pytree, in the order of its leaves."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return [(jax.tree_util.keystr(path, simple=True, separator='.'), leaf) for path, leaf in leaves]


def named_arrays(tree: PyTree) -> dict[str, np.ndarray]:
  """Returns the leaves by name, as NumPy arrays on the host. Random keys are replaced by their data."""
  data = lambda leaf: jax.random.key_data(leaf) if is_key(leaf) else leaf
  return {name: np.asarray(jax.device_get(data(leaf))) for name, leaf in named(tree)}


def strong(tree: PyTree) -> PyTree:
  """Returns the tree with its leaves as strongly typed arrays.

  For `jax.jit` a weakly typed array, such as `jnp.asarray(0.1)`, has another type than a strongly typed one.
  """

  def of_leaf(leaf):
    if is_key(leaf):
      return leaf
    array = jnp.asarray(leaf)
    return jax.lax.convert_element_type(array, array.dtype) if array.weak_type else array

  return jax.tree.map(of_leaf, tree)


def is_key(leaf: Any) -> bool:
  """Returns whether a leaf, or its `jax.ShapeDtypeStruct`, is a random key or an array of random keys."""
  return isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
