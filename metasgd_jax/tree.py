"""A pytree's leaves by name, such as 'meta.theta.Dense_0.kernel'."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metasgd_jax.types import PyTree


def named(tree: PyTree) -> list[tuple[str, Any]]:
  """Returns the names and the leaves, in order."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return [(jax.tree_util.keystr(path, simple=True, separator='.'), leaf) for path, leaf in leaves]


def named_arrays(tree: PyTree) -> dict[str, np.ndarray]:
  """Returns the leaves on the host, by name; of keys their data."""
  data = lambda leaf: jax.random.key_data(leaf) if is_key(leaf) else leaf
  return {name: np.asarray(jax.device_get(data(leaf))) for name, leaf in named(tree)}


def strong(tree: PyTree) -> PyTree:
  """Returns the leaves as arrays of strong dtypes; a weak one, as of `jnp.asarray(0.1)`, is another type for jit."""

  def of_leaf(leaf):
    if is_key(leaf):
      return leaf
    array = jnp.asarray(leaf)
    return jax.lax.convert_element_type(array, array.dtype) if array.weak_type else array

  return jax.tree.map(of_leaf, tree)


def is_key(leaf: Any) -> bool:
  """Whether a leaf, or what a leaf looks like, is a key or an array of keys."""
  return isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
