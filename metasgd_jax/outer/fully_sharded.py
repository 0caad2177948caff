"""Sharding of θ, α and the optimiser's state: between meta-iterations each of n devices stores 1/n of these arrays.

While a meta-iteration runs, every device has the whole θ and α, because a task adapts all of θ. Only the memory of the
train state between meta-iterations decreases; with Adam this state is three times the size of θ and α.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from metasgd_jax.outer import sharding
from metasgd_jax.tree import is_key
from metasgd_jax.types import PyTree

SMALL = 2**14
"""Number of entries below which each device stores the whole array: 64 KiB in float32."""


def split_dimension(leaf: Any, devices: int) -> int | None:
  """Returns the index of the dimension along which an array is split over the devices.

  This is the longest dimension that the devices can share evenly. If several are equally long, it is the first of them.

  The result is `None` if the array has fewer than `SMALL` entries or is a random key, or if no dimension can be shared.

  Args:
    leaf: Array, or its `jax.ShapeDtypeStruct`.
    devices: Number of devices.
  """
  if is_key(leaf) or leaf.size < SMALL:
    return None
  shared = [d for d, length in enumerate(leaf.shape) if length % devices == 0]
  return max(shared, key=lambda d: leaf.shape[d], default=None)


def shardings(mesh: Mesh, tree: PyTree) -> PyTree:
  """Returns a `NamedSharding` for each array of the tree. Large arrays are split, and small arrays are replicated."""
  return jax.tree.map(lambda leaf: NamedSharding(mesh, _spec(leaf, mesh)), tree)


def split(mesh: Mesh, tree: PyTree) -> PyTree:
  """Returns the tree with each array placed on the mesh according to `shardings`."""
  return jax.tree.map(sharding.placed, tree, shardings(mesh, tree))


def constrained(mesh: Mesh, tree: PyTree) -> PyTree:
  """Returns the tree with each array constrained to its sharding. Call this function inside `jax.jit`."""
  return jax.tree.map(jax.lax.with_sharding_constraint, tree, shardings(mesh, tree))


def share_gradients(
  function: Callable[[Any, Any], tuple[PyTree, PyTree]], mesh: Mesh, meta: PyTree
) -> Callable[[Any, Any], tuple[PyTree, PyTree]]:
  """Returns `function(shared, tasks)` as a function whose tasks `[T, …]` are split over the devices of the mesh.

  The given function and the returned function both return `(info, gradients of meta)`. `share_gradients` does the same
  as `sharding.share_tasks`, but each device receives only its own part of the mean gradients (a reduce-scatter).

  Args:
    function: Pure function whose results are means over its tasks.
    mesh: Mesh with one axis.
    meta: Meta-parameters, which have the shapes of the gradients.
  """
  axis = mesh.axis_names[0]

  def on_device(shared, tasks):
    info, grads = function(shared, tasks)
    grads, structure = jax.tree.flatten(grads)
    dimensions = [split_dimension(grad, mesh.size) for grad in grads]
    small = {i: grads[i] for i, d in enumerate(dimensions) if d is None}
    info, means = sharding.mean_over((info, small), axis)
    for i, d in enumerate(dimensions):
      if d is not None:
        means[i] = jax.lax.psum_scatter(grads[i], axis, scatter_dimension=d, tiled=True) / mesh.size
    return info, jax.tree.unflatten(structure, [means[i] for i in range(len(grads))])

  return jax.shard_map(
    on_device,
    mesh=mesh,
    in_specs=(PartitionSpec(), PartitionSpec(axis)),
    out_specs=(PartitionSpec(), jax.tree.map(lambda leaf: _spec(leaf, mesh), meta)),
    check_vma=False,
  )


def _spec(leaf: Any, mesh: Mesh) -> PartitionSpec:
  d = split_dimension(leaf, mesh.size)
  return PartitionSpec() if d is None else PartitionSpec(*(None,) * d, mesh.axis_names[0])
