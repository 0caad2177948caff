"""Tasks over several devices; on a CPU, over its cores."""

import os
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from metasgd_jax.types import PyTree


def cpu_cores_as_devices() -> None:
  """Makes each core that this process may use a device of JAX's CPU back end.

  A loop's body runs on one core where its operations are convolutions, so one device leaves the other cores idle. To be
  called before JAX is first used, and without effect where `jax_num_cpu_devices` is set already.

  Raises:
    RuntimeError: JAX is in use already.
  """
  if getattr(jax.config, 'jax_num_cpu_devices', 0) < 1:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    jax.config.update('jax_num_cpu_devices', cores)


def task_mesh(num_tasks: int) -> Mesh | None:
  """Returns a mesh with one axis, 'tasks', over as many of JAX's devices as share num_tasks evenly; None for one."""
  devices = jax.devices()
  count = max(n for n in range(1, len(devices) + 1) if num_tasks % n == 0)
  return Mesh(devices[:count], ('tasks',)) if count > 1 else None


def host_device() -> jax.Device:
  """Returns a CPU as a device of JAX; the first device of all where JAX was told to leave CPUs out."""
  try:
    return jax.devices('cpu')[0]
  except RuntimeError:
    return jax.devices()[0]


def check_mesh(mesh: Mesh | None, num_tasks: int) -> None:
  """Raises ValueError unless the mesh, if any, has one axis whose devices share num_tasks evenly."""
  if mesh is None:
    return
  if len(mesh.axis_names) != 1:
    raise ValueError(f'mesh must have one axis, for tasks, got {mesh.axis_names}')
  if num_tasks % mesh.size:
    raise ValueError(
      f'{num_tasks} tasks cannot be shared evenly by {mesh.size} devices; take a multiple of {mesh.size}'
    )


def on_all(mesh: Mesh | None, tree: PyTree) -> PyTree:
  """Returns the tree with a copy on each device of the mesh; as it is without one."""
  return tree if mesh is None else jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def share_tasks(
  function: Callable[[Any, Any], PyTree], mesh: Mesh | None, *, average: bool
) -> Callable[[Any, Any], PyTree]:
  """Returns `function(shared, tasks)` as a function whose tasks `[T, …]` are split over the mesh's devices.

  Each device runs the function on its own share, and there alone: gradients taken inside are those of the device's
  tasks. (With `check_vma=True` and θ the same everywhere, `jax.grad` inside would add up the inner gradients of all
  devices: every task would adapt to every device's support.)

  Args:
    function: pure; its results are means over its tasks (`average`), or have a row for each.
    mesh: of one axis; `None` returns the function itself.
    average: whether results are averaged over the devices; otherwise they are put together, `[T, …]`.
  """
  if mesh is None:
    return function
  axis = mesh.axis_names[0]

  def on_device(shared, tasks):
    out = function(shared, tasks)
    return jax.lax.pmean(out, axis) if average else out

  return jax.shard_map(
    on_device,
    mesh=mesh,
    in_specs=(PartitionSpec(), PartitionSpec(axis)),
    out_specs=PartitionSpec() if average else PartitionSpec(axis),
    check_vma=False,
  )
