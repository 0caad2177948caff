"""Tasks over several devices, of one process or of several; on a CPU, over its cores."""

import os
import re
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from metasgd_jax.tree import is_key
from metasgd_jax.types import PyTree

_COUNT_FLAG = '--xla_force_host_platform_device_count'


def cpu_cores_as_devices() -> None:
  """Makes each core that this process may use a device of JAX's CPU back end, and gives each device two threads.

  A loop's body runs on one core where its operations are convolutions, so one device leaves the other cores idle. A
  device whose program has a loop holds one of XLA's threads, of which there are as many as cores, or as the environment
  variable NPROC says; the loop's products want another, and where each is held by a device, all wait forever. So NPROC
  is raised to two for each device. To be called before JAX is first used; a number of devices that is set already, by
  `jax_num_cpu_devices` or in XLA_FLAGS, stays.

  Raises:
    RuntimeError: JAX is in use already.
  """
  devices = getattr(jax.config, 'jax_num_cpu_devices', 0)
  by_flag = re.search(rf'{_COUNT_FLAG}=(\d+)', os.environ.get('XLA_FLAGS', ''))
  if devices < 1 and by_flag:
    devices = int(by_flag[1])
  elif devices < 1:
    devices = _cores()
    jax.config.update('jax_num_cpu_devices', devices)
  os.environ['NPROC'] = str(max(2 * devices, _threads()))


def _cores() -> int:
  return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def _threads() -> int:
  """XLA's, of a CPU."""
  given = os.environ.get('NPROC', '')
  return int(given) if given.isdecimal() and int(given) else _cores()


def task_mesh(num_tasks: int, *, devices: int | None = None) -> Mesh | None:
  """Returns a mesh with one axis, 'tasks', of as many devices of each process; `None` for a single device.

  Args:
    num_tasks: to be shared evenly.
    devices: so many of each process; as many as share num_tasks evenly where left out.

  Raises:
    ValueError: there are not so many, or they cannot share the tasks evenly.

  Warns:
    UserWarning: CPU devices have too few threads; see `cpu_cores_as_devices`.

  Example:
    >>> mesh = ms.sharding.task_mesh(4)  # For `train(..., meta_batch=4, mesh=mesh)`.
    >>> mesh is None or 4 % mesh.size == 0  # None where there is one device.
    True
  """
  processes = range(jax.process_count())
  of_each = [jax.local_devices(process) for process in processes]
  most = min(map(len, of_each))
  if devices is None:
    if num_tasks % len(processes):
      raise ValueError(
        f'{num_tasks} tasks cannot be shared evenly by {len(processes)} processes; take a multiple of {len(processes)}'
      )
    devices = max(n for n in range(1, most + 1) if num_tasks % (n * len(processes)) == 0)
  if not 1 <= devices <= most:
    whose = ' of a process' if len(processes) > 1 else ''
    raise ValueError(f'devices must be from 1 to {most}, as many as JAX has{whose}, got {devices}')
  mesh = Mesh([device for those in of_each for device in those[:devices]], ('tasks',))
  check_mesh(mesh, num_tasks)
  if devices > 1 and mesh.devices.flat[0].platform == 'cpu' and _threads() < 2 * devices:
    warnings.warn(
      f'{devices} CPU devices with {_threads()} threads of XLA may wait for each other forever; call '
      f'cpu_cores_as_devices() before JAX is first used, or set NPROC={2 * devices} in the environment',
      stacklevel=2,
    )
  return mesh if mesh.size > 1 else None


def host_device() -> jax.Device:
  """Returns a CPU of this process as a device of JAX; its first device of all where JAX was told to leave CPUs out."""
  try:
    return jax.local_devices(backend='cpu')[0]
  except RuntimeError:
    return jax.local_devices()[0]


def check_axes(mesh: Mesh | None) -> None:
  """Raises ValueError unless the mesh, if there is one, has a single axis."""
  if mesh is not None and len(mesh.axis_names) != 1:
    raise ValueError(f'mesh must have one axis, for tasks, got {mesh.axis_names}')


def check_mesh(mesh: Mesh | None, num_tasks: int) -> None:
  """Raises ValueError unless the mesh, if there is one, has a single axis and its devices share num_tasks evenly."""
  check_axes(mesh)
  if mesh is not None and num_tasks % mesh.size:
    raise ValueError(
      f'{num_tasks} tasks cannot be shared evenly by {mesh.size} devices; take a multiple of {mesh.size}'
    )


def on_all(mesh: Mesh | None, tree: PyTree) -> PyTree:
  """Returns the tree with a copy on each device of the mesh; as it is without one.

  Of several processes each gives its own copy, which must be that of the others; nothing passes between them.
  """
  if mesh is None:
    return tree
  everywhere = NamedSharding(mesh, PartitionSpec())
  return jax.tree.map(lambda leaf: placed(leaf, everywhere), tree)


def placed(leaf: Any, sharding: Sharding) -> jax.Array:
  """Returns an array as a sharding has it; in several processes each gives the whole array, or all a global one."""
  if sharding.is_fully_addressable:
    return jax.device_put(leaf, sharding)
  if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
    return jax.jit(lambda a: a, out_shardings=sharding)(leaf)
  if is_key(leaf):
    return jax.random.wrap_key_data(placed(jax.random.key_data(leaf), sharding), impl=jax.random.key_impl(leaf))
  array = np.asarray(leaf)
  return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def on_one(mesh: Mesh | None, tree: PyTree) -> PyTree:
  """Returns what `on_all` has copied, on this process's first device of the mesh alone; as it is without a mesh."""
  return tree if mesh is None else jax.tree.map(lambda leaf: leaf.addressable_data(0), tree)


def gathered(tree: PyTree) -> PyTree:
  """Returns the tree on the host; where its arrays lie in several processes all must call this, and get the whole.

  Keys stay keys of JAX, of which NumPy knows none.

  Example:
    >>> ms.sharding.gathered({'w': jnp.zeros(2)})
    {'w': array([0., 0.], dtype=float32)}
  """

  def one(leaf):
    if is_key(leaf):
      return jax.random.wrap_key_data(one(jax.random.key_data(leaf)), impl=jax.random.key_impl(leaf))
    in_parts = not (leaf.is_fully_addressable or leaf.is_fully_replicated)
    return np.asarray(multihost_utils.process_allgather(leaf, tiled=True) if in_parts else leaf)

  return jax.tree.map(one, tree)


def mean_over(tree: PyTree, axis: str) -> PyTree:
  """Returns the mean over devices, inside shard_map, in one message for all arrays of a type."""
  leaves, structure = jax.tree.flatten(tree)
  found: dict[int, jax.Array] = {}
  for dtype in dict.fromkeys(leaf.dtype for leaf in leaves):
    mine = [i for i, leaf in enumerate(leaves) if leaf.dtype == dtype]
    mean = jax.lax.pmean(jnp.concatenate([leaves[i].ravel() for i in mine]), axis)
    ends = np.cumsum([leaves[i].size for i in mine])
    found |= {i: part.reshape(leaves[i].shape) for i, part in zip(mine, jnp.split(mean, ends[:-1]), strict=True)}
  return jax.tree.unflatten(structure, [found[i] for i in range(len(leaves))])


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
    return mean_over(out, axis) if average else out

  return jax.shard_map(
    on_device,
    mesh=mesh,
    in_specs=(PartitionSpec(), PartitionSpec(axis)),
    out_specs=PartitionSpec() if average else PartitionSpec(axis),
    check_vma=False,
  )
