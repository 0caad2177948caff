"""Distribution of tasks over several devices, in one process or in several. The cores of a CPU can be devices too."""

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
  """Splits JAX's CPU backend into one device for each core available to this process, with two threads per device.

  Call this function before JAX is first used. A number of devices that is already set, by `jax_num_cpu_devices` or in
  XLA_FLAGS, is not changed.

  XLA runs the convolutions in the body of a loop on one core, so a single device would leave the other cores idle.

  The number of XLA's threads is the environment variable NPROC if it is set, and the number of cores otherwise. A
  device whose program has a loop occupies one thread, and the matrix products in the loop need another thread. If
  devices occupy all threads, they wait forever. Therefore NPROC is raised to at least two threads per device.

  Raises:
    RuntimeError: if JAX is already in use.
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
  """Returns the number of threads that XLA has on a CPU."""
  given = os.environ.get('NPROC', '')
  return int(given) if given.isdecimal() and int(given) else _cores()


def task_mesh(num_tasks: int, *, devices: int | None = None) -> Mesh | None:
  """Returns a mesh with one axis, 'tasks', or `None` if there is only a single device to use.

  Every process contributes the same number of devices to the mesh.

  Args:
    num_tasks: Number of tasks that the devices must share evenly.
    devices: Number of devices of each process. The default is the largest number that can share the tasks evenly.

  Raises:
    ValueError: if a process has fewer than `devices` devices, or if the devices cannot share the tasks evenly.

  Warns:
    UserWarning: if XLA has too few threads for the CPU devices; see `cpu_cores_as_devices`.

  Example:
    >>> mesh = ms.sharding.task_mesh(4)  # For `train(..., meta_batch=4, placement=ms.Placement(mesh=mesh))`.
    >>> mesh is None or 4 % mesh.size == 0  # The mesh is `None` for a single device.
    True
  """
  processes = range(jax.process_count())
  of_each = [jax.local_devices(process) for process in processes]
  most = min(map(len, of_each))
  if devices is None:
    sharing = [n for n in range(1, most + 1) if num_tasks % (n * len(processes)) == 0]
    devices = max(sharing, default=1)  # If even one device of each process is too many, check_mesh raises.
  if not 1 <= devices <= most:
    whose = ' in each process' if len(processes) > 1 else ''
    raise ValueError(
      f'the argument `devices` must be from 1 to {most}, the number of devices that JAX has{whose}, got {devices}'
    )
  mesh = Mesh([device for those in of_each for device in those[:devices]], ('tasks',))
  check_mesh(mesh, num_tasks)
  if devices > 1 and mesh.devices.flat[0].platform == 'cpu' and _threads() < 2 * devices:
    warnings.warn(
      f'{devices} CPU devices with only {_threads()} threads of XLA can wait for each other forever; call '
      f'cpu_cores_as_devices() before JAX is first used, or set NPROC={2 * devices} in the environment',
      stacklevel=2,
    )
  return mesh if mesh.size > 1 else None


def host_device() -> jax.Device:
  """Returns the first CPU device of this process, or its first device of any kind if JAX is configured without CPUs."""
  try:
    return jax.local_devices(backend='cpu')[0]
  except RuntimeError:
    return jax.local_devices()[0]


def check_axes(mesh: Mesh | None) -> None:
  """Raises ValueError unless `mesh` is `None` or has exactly one axis."""
  if mesh is not None and len(mesh.axis_names) != 1:
    raise ValueError(f'the mesh must have exactly one axis, that of the tasks, got {mesh.axis_names}; use task_mesh')


def check_mesh(mesh: Mesh | None, num_tasks: int) -> None:
  """Raises ValueError if a mesh does not have exactly one axis, or if its devices cannot share `num_tasks` evenly."""
  check_axes(mesh)
  if mesh is not None and num_tasks % mesh.size:
    raise ValueError(
      f'{num_tasks} tasks cannot be shared evenly by {mesh.size} devices; '
      f'the number of tasks must be a multiple of {mesh.size}'
    )


def on_all(mesh: Mesh | None, tree: PyTree) -> PyTree:
  """Returns the tree with a copy of every array on each device of the mesh, or the tree itself if `mesh` is `None`.

  Each process copies its own arrays to its own devices. All processes must have the same values, because nothing is
  sent between the processes.
  """
  if mesh is None:
    return tree
  everywhere = NamedSharding(mesh, PartitionSpec())
  return jax.tree.map(lambda leaf: placed(leaf, everywhere), tree)


def placed(leaf: Any, sharding: Sharding) -> jax.Array:
  """Returns an array with the given sharding.

  If the sharding covers devices of several processes, every process must pass the whole array, or all processes must
  pass the same global array.
  """
  if isinstance(leaf, jax.Array) and leaf.sharding == sharding:
    return leaf
  if sharding.is_fully_addressable:
    return jax.device_put(leaf, sharding)
  if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
    return jax.jit(lambda a: a, out_shardings=sharding)(leaf)
  if is_key(leaf):
    return jax.random.wrap_key_data(placed(jax.random.key_data(leaf), sharding), impl=jax.random.key_impl(leaf))
  array = np.asarray(leaf)
  return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def on_one(mesh: Mesh | None, tree: PyTree) -> PyTree:
  """Undoes `on_all`: returns the copy on this process's first device, or the tree itself if `mesh` is `None`."""
  return tree if mesh is None else jax.tree.map(lambda leaf: leaf.addressable_data(0), tree)


def gathered(tree: PyTree) -> PyTree:
  """Returns the tree with its arrays as NumPy arrays on the host.

  If an array is split over several processes, every process must call this function, and every process receives the
  whole array. Random keys remain JAX arrays, because NumPy has no random keys.

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
  """Returns the mean of each array over the devices of a mesh axis. Call this function inside `jax.shard_map`.

  All arrays of the same dtype are averaged by a single collective operation.

  Args:
    tree: Pytree of arrays.
    axis: Name of the mesh axis.
  """
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
  """Returns `function(shared, tasks)` as a function whose tasks `[T, …]` are split over the devices of the mesh.

  Each device runs the function on its own tasks, and a gradient inside the function is computed from these tasks only.
  `shard_map` needs `check_vma=False` for such gradients. With `check_vma=True` and a replicated θ, `jax.grad` in the
  function would sum the inner gradients over all devices, and every task would adapt to the supports of all devices.

  Args:
    function: Pure function. With `average` its results must be means over its tasks. Without `average` its results must
      have one row per task.
    mesh: Mesh with one axis. If it is `None`, the function itself is returned.
    average: Whether the results are averaged over the devices. Otherwise they are concatenated to `[T, …]`.
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
