"""θ, α and the optimiser's state in parts, one a device: what is kept between meta-iterations takes 1/n of the memory.

While a meta-iteration runs, every device has the whole θ and α, since a task adapts all of θ. What falls is what stays:
with Adam three times θ and α.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from metasgd_jax.outer import sharding
from metasgd_jax.tree import is_key
from metasgd_jax.types import PyTree

SMALL = 2**14
"""Entries of an array below which each device has the whole of it; 64 KiB of float32."""


def split_dimension(leaf: Any, devices: int) -> int | None:
  """Returns the dimension that is split: the largest that the devices share evenly, of equals the first.

  `None` for an array of fewer than `SMALL` entries, for keys, and where there is no such dimension.
  """
  if is_key(leaf) or leaf.size < SMALL:
    return None
  shared = [d for d, length in enumerate(leaf.shape) if length % devices == 0]
  return max(shared, key=lambda d: leaf.shape[d], default=None)


def shardings(mesh: Mesh, tree: PyTree) -> PyTree:
  """Returns a `NamedSharding` for each array of a train state, or of any tree: in parts, or whole if it is small."""
  return jax.tree.map(lambda leaf: NamedSharding(mesh, _spec(leaf, mesh)), tree)


def split(mesh: Mesh, tree: PyTree) -> PyTree:
  """Returns the tree with each array laid over the mesh by `shardings`."""
  return jax.tree.map(sharding.placed, tree, shardings(mesh, tree))


def constrained(mesh: Mesh, tree: PyTree) -> PyTree:
  """Returns the tree, inside jit, with each array held to its sharding."""
  return jax.tree.map(jax.lax.with_sharding_constraint, tree, shardings(mesh, tree))


def share_gradients(
  function: Callable[[Any, Any], tuple[PyTree, PyTree]], mesh: Mesh, meta: PyTree
) -> Callable[[Any, Any], tuple[PyTree, PyTree]]:
  """Returns `function(shared, tasks) → (info, grads of meta)` with tasks `[T, …]` split over the devices.

  As `sharding.share_tasks` does, but each device is left with its part of the mean gradients alone (a reduce-scatter).

  Args:
    function: pure; its results are means over its tasks.
    mesh: of one axis.
    meta: of the gradients' shapes.
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
