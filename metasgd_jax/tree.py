"""Leaves of pytrees: their names, such as 'meta.theta.Dense_0.kernel', and their types."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metasgd_jax.types import PyTree


def named(tree: PyTree) -> list[tuple[str, Any]]:
  """Returns the pairs of name and leaf of a pytree, in the order of its leaves. No two leaves have the same name.

  A name is a simple path, such as 'a.b'. In a tree in which two leaves have the same simple path, such as
  `{'a': {'b': x}, 'a.b': y}`, all names are paths of `jax.tree_util.keystr`, such as "['a']['b']".
  """
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  names = [jax.tree_util.keystr(path, simple=True, separator='.') for path, _ in leaves]
  if len(set(names)) < len(names):
    names = [jax.tree_util.keystr(path) for path, _ in leaves]
  return [(name, leaf) for name, (_, leaf) in zip(names, leaves, strict=True)]


def native(leaf: Any) -> np.ndarray:
  """Returns a leaf as a NumPy array on the host, with its bytes in the order of this machine."""
  array = np.asarray(jax.device_get(leaf))
  return array.astype(array.dtype.newbyteorder('='), copy=False)


def named_arrays(tree: PyTree) -> dict[str, np.ndarray]:
  """Returns `{name: leaf}` with each leaf as a NumPy array on the host. Random keys are replaced by their data."""
  data = lambda leaf: jax.random.key_data(leaf) if is_key(leaf) else leaf
  return {name: native(data(leaf)) for name, leaf in named(tree)}


def from_named_arrays(arrays: Mapping[str, np.ndarray], like: PyTree) -> PyTree:
  """Reverses `named_arrays`: returns a tree of JAX arrays with the structure of `like`.

  Where `like` has a random key, the array contains the data of a key, and is converted to a key of the same impl.
  """

  def of_leaf(name, leaf):
    array = jnp.asarray(arrays[name])
    return jax.random.wrap_key_data(array, impl=jax.random.key_impl(leaf)) if is_key(leaf) else array

  return jax.tree.unflatten(jax.tree.structure(like), [of_leaf(name, leaf) for name, leaf in named(like)])


def leaf_types(tree: PyTree) -> dict[str, str]:
  """Returns `{name: type}`, with the dtype and shape of each leaf as text, such as 'float32[1, 4]' or 'key<fry>[]'.

  The text does not depend on the order of the bytes in memory.
  """

  def of_leaf(leaf):
    array = leaf if hasattr(leaf, 'dtype') else np.asarray(leaf)
    return f'{array.dtype.name}{list(array.shape)}'

  return {name: of_leaf(leaf) for name, leaf in named(tree)}


def first_difference(there: Mapping[str, str], here: Mapping[str, str]) -> str | None:
  """Returns text for an error message about the first leaf whose type differs, or `None` if all types are equal.

  The type of a leaf is its dtype and shape. A leaf that is in only one of the arguments differs too.

  Args:
    there: Types of the stored leaves, from `leaf_types`.
    here: Types of the expected leaves, from `leaf_types`.
  """
  for name in {**there, **here}:
    if there.get(name) != here.get(name):
      return f'{name} is stored as {there.get(name, "nothing")}, expected {here.get(name, "nothing")}'
  return None


def strong(tree: PyTree) -> PyTree:
  """Returns the tree with its leaves as strongly typed arrays.

  `jax.jit` compiles a function once for a weakly typed array, such as `jnp.asarray(0.1)`, and once more for a strongly
  typed one.
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
