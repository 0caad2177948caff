"""How a batch of tasks is placed on devices."""

import dataclasses
from typing import Literal

import jax
import numpy as np
from jax.sharding import Mesh

from metasgd_jax.outer import sharding
from metasgd_jax.types import PyTree

LARGE = 20_000
"""Number of meta-parameters from which 'auto' computes one task after another on a CPU.

An MLP with 3,500 meta-parameters was measured to be faster with all tasks at once. Conv4 with 57,000 and with 220,000
was measured to be slower.
"""

TasksAtOnce = Literal['auto', 'all'] | int
"""Number of tasks that a device computes at the same time."""


@dataclasses.dataclass(frozen=True)
class Placement:
  """How a batch of tasks is placed on devices. Every placement gives the same results, up to rounding errors.

  Attributes:
    tasks_at_once: Number of tasks that a device computes at the same time. With 'all' the tasks are vmapped together,
      which suits small networks and accelerators, and memory grows with the number of tasks. With 1 the tasks run one
      after another and need the memory of a single task only, which may fit into the cache of a CPU. With another
      number, which must divide the number of tasks on a device, groups of that size run one after another. 'auto' means
      1 on a CPU if there are at least `LARGE` meta-parameters, and 'all' otherwise.
    mesh: Devices that share the tasks, such as `sharding.task_mesh(meta_batch)`. By default one device has all tasks.
    shard_meta: Whether the devices also share the large arrays of the train state; see `fully_sharded`.

  Raises:
    ValueError: if `tasks_at_once` is not 'all', 'auto' or an integer of at least 1, if `shard_meta` is given without a
      mesh, or if the mesh has several axes.

  Example:
    >>> ms.Placement(tasks_at_once=4, mesh=ms.sharding.task_mesh(8)).tasks_at_once
    4
  """

  tasks_at_once: TasksAtOnce = 'auto'
  mesh: Mesh | None = None
  shard_meta: bool = False

  def __post_init__(self):
    value = self.tasks_at_once
    is_count = isinstance(value, int | np.integer) and not isinstance(value, bool) and value >= 1
    if not is_count and (not isinstance(value, str) or value not in ('auto', 'all')):
      raise ValueError(f"tasks_at_once must be 'auto', 'all' or an integer of at least 1, got {value!r}")
    sharding.check_axes(self.mesh)
    if self.shard_meta and self.mesh is None:
      raise ValueError(
        'shard_meta=True splits the train state over the devices of a mesh, but got mesh=None; '
        'give mesh=sharding.task_mesh(...)'
      )

  def check(self, num_tasks: int) -> None:
    """Raises ValueError if the devices of the mesh cannot share `num_tasks` evenly."""
    sharding.check_mesh(self.mesh, num_tasks)

  @property
  def state_mesh(self) -> Mesh | None:
    """Devices that share the large arrays of the train state, or `None` if each device has the whole state."""
    return self.mesh if self.shard_meta else None

  @property
  def devices(self) -> int:
    """Number of devices that share the tasks."""
    return 1 if self.mesh is None else self.mesh.size

  def at_once(self, num_tasks: int, *, large: bool) -> int:
    """Returns `tasks_at_once` as a number.

    'all' becomes `num_tasks`. 'auto' becomes 1 on a CPU if `large` is true, and `num_tasks` otherwise.

    Args:
      num_tasks: Number of tasks on one device.
      large: Whether a single task fills the cache of a CPU.
    """
    if self.tasks_at_once == 'auto':
      return 1 if large and jax.default_backend() == 'cpu' else num_tasks
    return num_tasks if self.tasks_at_once == 'all' else int(self.tasks_at_once)

  def group(self, meta: PyTree, num_tasks: int) -> int:
    """Returns the number of tasks that a device computes at the same time.

    Args:
      meta: Meta-parameters, or their shapes.
      num_tasks: Number of tasks on one device.

    Raises:
      ValueError: if `tasks_at_once` does not divide `num_tasks`.
    """
    group = self.at_once(num_tasks, large=is_large(meta))
    if group > num_tasks or num_tasks % group:
      raise ValueError(
        f'tasks_at_once={group} does not divide the {num_tasks} tasks on a device; give a divisor of {num_tasks}'
      )
    return group


def is_large(meta: PyTree) -> bool:
  """Returns whether there are at least `LARGE` meta-parameters."""
  return sum(np.size(leaf) for leaf in jax.tree.leaves(meta)) >= LARGE
