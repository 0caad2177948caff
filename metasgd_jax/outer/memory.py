"""What meta-training will take of memory, before it does: nothing is allocated, the step is compiled."""

import dataclasses
import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from metasgd_jax.outer import host_memory, training
from metasgd_jax.outer.loop import step_keys
from metasgd_jax.outer.placement import Placement
from metasgd_jax.types import Learner, TaskDistribution, Tasks, check_count

ROOM = 0.9
"""Of the memory that is there, how much may be planned for."""


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
  """Bytes of a meta-iteration on one device, R = 1.

  Attributes:
    parts: of what is there between steps, by name: θ and α, or the learner's meta-parameters, and the optimiser's
      state.
    arguments: of the step's arguments: those parts, and the tasks' data.
    episodes: of a device's share of the meta-batch; they are drawn inside, so are part of the intermediates.
    intermediates: what the compiler sets aside beside arguments and results.
    results: of the step's results: the parts once more, and the losses.
    at_once: tasks that are laid out at the same time.
    tasks: of a device.
    devices: how many share the meta-batch; on a CPU they share one memory.
    available: of a device, or of the host; `None` where it cannot be told.
    fits_at_once: where it does not fit, how many tasks at a time would; 0 for none.

  Example:
    >>> parts = {'θ': 4_000, 'α': 4_000, "the optimiser's state": 16_000}
    >>> step = dict(arguments=24_000, episodes=800, intermediates=50_000, results=24_000)
    >>> plan = ms.MemoryPlan(parts, **step, at_once=4, tasks=4, devices=1, available=2**20)
    >>> plan.total, plan.fits, str(plan).splitlines()[-1]
    (98000, True, 'fits: 1.0 MiB are available')
  """

  parts: dict[str, int]
  arguments: int
  episodes: int
  intermediates: int
  results: int
  at_once: int
  tasks: int
  devices: int
  available: int | None
  fits_at_once: int | None = None

  @property
  def total(self) -> int:
    """Bytes at the peak, of one device."""
    return self.arguments + self.intermediates + self.results

  @property
  def fits(self) -> bool:
    """Whether it fits in what is available; true where that cannot be told."""
    return self.available is None or self.total <= ROOM * self.available

  def __str__(self) -> str:
    """The plan as a table, and a sentence on whether it fits."""
    rows = [*self.parts.items(), ("the tasks' data", self.arguments - sum(self.parts.values()))]
    rows += [('results: the same once more', self.results), ('intermediates', self.intermediates)]
    rows += [(f'  of which episodes, {self.tasks} tasks', self.episodes), ('in all', self.total)]
    what = f'memory of a meta-iteration on one device, {self.at_once} of {self.tasks} tasks at a time'
    return '\n'.join([what, *(f'  {name:<32}{in_words(size):>12}' for name, size in rows), self._verdict()])

  def _verdict(self) -> str:
    if self.available is None:
      return 'whether it fits cannot be told: neither the device nor the system says how much there is'
    there = f'{in_words(self.available)} are available' + (' to each device' if self.devices > 1 else '')
    if self.fits:
      return f'fits: {there}'
    if self.fits_at_once:
      return f'does NOT fit: {there}; tasks_at_once={self.fits_at_once} would'
    return (
      f'does NOT fit: {there}, and one task at a time would not either; take a smaller network or support, '
      "adjoint='revolve' for many inner steps, or let a part of θ adapt (`adapt_only`, `low_rank`)"
    )


def plan_memory(
  tasks: Tasks,
  *,
  learner: Learner,
  optimizer: optax.GradientTransformation,
  meta_batch: int,
  placement: Placement = Placement(),
  available: int | None = None,
) -> MemoryPlan:
  """Returns what a meta-iteration of `train`, whose arguments these are, will take.

  The step is compiled for shapes alone; a stream sends one meta-iteration's data. Where the plan does not fit, the
  step is compiled anew for one task at a time, and for the groups that fit by a line through both, to say which mapping
  does.

  Args:
    tasks: what to train on.
    learner: what to train.
    optimizer: the outer optimiser.
    meta_batch: tasks in a meta-iteration.
    placement: How the tasks are placed on devices.
    available: bytes of a device; what JAX or the system says where left out.

  Raises:
    ValueError: as `train_step`; an available memory below 0.

  Example:
    >>> tasks = ms.tasks.sinusoid(shot=5)
    >>> learner = ms.meta_sgd(ms.nn.from_linen(ms.nn.MLP()), ms.losses.mean_squared_error)
    >>> plan = ms.plan_memory(tasks, learner=learner, optimizer=optax.adam(1e-3), meta_batch=4, available=2**30)
    >>> plan.fits, plan.parts['θ'] == plan.parts['α']
    (True, True)
    >>> print(plan)  # doctest: +ELLIPSIS
    memory of a meta-iteration on one device, 4 of 4 tasks at a time
      θ ...
  """
  if available is not None and available < 0:
    raise ValueError(f'available must be a number of bytes, at least 0, got {available}')
  check_count('meta_batch', meta_batch)
  placement.check(meta_batch)
  keys = step_keys(jax.random.key(0), jnp.int32(0), meta_batch)
  given = jax.eval_shape(lambda tasks: tasks, tasks.prepare(lambda: (keys[0], keys[1])))
  key = jax.eval_shape(lambda: jax.random.key(0))
  start = functools.partial(training.init, learner=learner, optimizer=optimizer)
  state = jax.eval_shape(start, key, given)
  devices = placement.devices
  available = _available(devices) if available is None else available
  share = meta_batch // devices
  at_once = placement.group(state.meta, share)

  def compiled(at_once: int) -> Any:
    placed = dataclasses.replace(placement, tasks_at_once=at_once)
    options = dict(learner=learner, optimizer=optimizer, meta_batch=meta_batch, placement=placed)
    step = jax.jit(functools.partial(training.train_step, **options))
    return step.lower(state, given).compile().memory_analysis()

  def planned(found: Any, at_once: int) -> MemoryPlan:
    return MemoryPlan(
      _parts(state), found.argument_size_in_bytes, share * _episode_bytes(given, key), found.temp_size_in_bytes,
      found.output_size_in_bytes - found.alias_size_in_bytes, at_once, share, devices, available,
    )  # fmt: skip

  plan = planned(compiled(at_once), at_once)
  if plan.fits:
    return plan
  candidates = [] if at_once == 1 else _groups_that_may_fit(plan, planned(compiled(1), 1))
  fitting = (group for group in candidates if group == 1 or planned(compiled(group), group).fits)
  return dataclasses.replace(plan, fits_at_once=next(fitting, 0))


def _groups_that_may_fit(plan: MemoryPlan, one: MemoryPlan) -> list[int]:
  """Returns numbers of tasks at a time, the greatest first, that fit by a line through both plans; one by itself."""
  if not one.fits:
    return []
  each = (plan.total - one.total) / (plan.at_once - 1)
  room = ROOM * (plan.available or 0) - one.total
  return [g for g in range(plan.at_once - 1, 0, -1) if plan.tasks % g == 0 and (g - 1) * each <= room]


def _parts(state: training.TrainState) -> dict[str, int]:
  if hasattr(state.meta, 'theta') and hasattr(state.meta, 'alpha'):
    parts = {'θ': size_of(state.meta.theta), 'α': size_of(state.meta.alpha)}
  else:
    parts = {'meta-parameters': size_of(state.meta)}
  return {**parts, "the optimiser's state": size_of(state.opt_state)}


def _episode_bytes(tasks: TaskDistribution, key) -> int:
  return size_of(jax.eval_shape(lambda tasks, key: tasks.episode(tasks.sample(key), key), tasks, key))


def _available(devices: int) -> int | None:
  """Bytes of the first device that are free, or of the host by the devices that share it."""
  device = jax.local_devices()[0]
  found: dict[str, int] = device.memory_stats() or {}
  if 'bytes_limit' in found:
    return found['bytes_limit'] - found.get('bytes_in_use', 0)
  host = host_memory.available() if device.platform == 'cpu' else None
  return None if host is None else host // devices


def size_of(tree: chex.ArrayTree) -> int:
  """Returns the bytes of a tree of arrays, or of their shapes."""
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def in_words(size: float) -> str:
  """Returns a number of bytes as people read it: '1.5 MiB'."""
  for unit in ('B', 'KiB', 'MiB'):
    if size < 1024:
      return f'{size:.0f} B' if unit == 'B' else f'{size:.1f} {unit}'
    size /= 1024
  return f'{size:.1f} GiB'
