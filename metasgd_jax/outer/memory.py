"""Prediction of the memory that meta-training will need. The step is compiled, but nothing is allocated."""

import dataclasses
import functools
import math
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from metasgd_jax.outer import fully_sharded, host_memory, training
from metasgd_jax.outer.loop import step_keys
from metasgd_jax.outer.placement import Placement
from metasgd_jax.types import Learner, Tasks, check_count

ROOM = 0.9
"""Largest fraction of the available memory that a plan may use."""


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
  """Memory of a meta-iteration of one run (R = 1) on one device. All sizes are in bytes.

  Attributes:
    parts: Sizes of the arrays that stay in memory between meta-iterations, by name: θ and α (or the learner's
      meta-parameters), and the optimiser's state. With `shard_meta` they are the sizes of one device's share.
    arguments: Size of the arguments of the step: the arrays in `parts` and the data of the tasks.
    episodes: Size of the episodes of the tasks of one device. The episodes are drawn inside the step, so they are part
      of the intermediates.
    intermediates: Size of the memory that the compiler reserves in addition to arguments and results.
    results: Size of the results of the step: new values of the arrays in `parts`, and the losses.
    at_once: Number of tasks that a device computes at the same time.
    tasks: Number of tasks on one device.
    devices: Number of devices that share the meta-batch. CPU devices share the memory of the host.
    available: Memory that is available to one device, or `None` if it is unknown. For a CPU device it is an equal share
      of the host's memory.
    fits_at_once: `None` if the plan fits. Otherwise it is a smaller value of `tasks_at_once` that would fit, or 0 if
      not even one task at a time would fit.

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
    """Peak memory of one device, in bytes."""
    return self.arguments + self.intermediates + self.results

  @property
  def fits(self) -> bool:
    """Whether `total` is at most `ROOM` times the available memory. It is True if the available memory is unknown."""
    return self.available is None or self.total <= ROOM * self.available

  def __str__(self) -> str:
    """Returns the plan as a table, followed by a sentence that says whether the plan fits."""
    rows = [*self.parts.items(), ("the tasks' data", self.arguments - sum(self.parts.values()))]
    rows += [('results (the updated state)', self.results), ('intermediates', self.intermediates)]
    rows += [(f'  of which episodes, {self.tasks} tasks', self.episodes), ('total', self.total)]
    what = f'memory of a meta-iteration on one device, {self.at_once} of {self.tasks} tasks at a time'
    return '\n'.join([what, *(f'  {name:<32}{in_words(size):>12}' for name, size in rows), self._verdict()])

  def _verdict(self) -> str:
    if self.available is None:
      return 'it is unknown whether the plan fits: neither the device nor the system reports its available memory'
    there = f'{in_words(self.available)} are available' + (' to each device' if self.devices > 1 else '')
    if self.fits:
      return f'fits: {there}'
    if self.fits_at_once:
      return f'does NOT fit: {there}; tasks_at_once={self.fits_at_once} would fit'
    return (
      f'does NOT fit: {there}, and one task at a time would not fit either; use a smaller network or support, '
      "adjoint='revolve' for many inner steps, or let only a part of θ adapt (`adapt_only`, `low_rank`)"
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
  """Returns the memory that a meta-iteration of `train` will need, for one run.

  The meta-iteration is compiled from the shapes of its arguments, and nothing is allocated on the device, with one
  exception: a `TaskStream` sends the data of one meta-iteration to the device. If the plan does not fit, it also says
  how many tasks at a time would fit. For this purpose the meta-iteration is compiled again for one task at a time.
  Linear interpolation between the two plans then predicts which larger numbers of tasks fit. The meta-iteration is
  compiled for these numbers too, the largest first, until one fits.

  Args:
    tasks: Tasks to train on.
    learner: Learner to train.
    optimizer: Outer optimiser.
    meta_batch: Number of tasks in a meta-iteration.
    placement: How the tasks are placed on devices.
    available: Memory that is available to one device, in bytes. By default JAX or the operating system reports it.

  Raises:
    ValueError: if `available` is below 0, or if `train_step` raises ValueError for these arguments.

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
    raise ValueError(f'the argument `available` must be a number of bytes of at least 0, got {available}')
  check_count('meta_batch', meta_batch)
  placement.check(meta_batch)
  keys = step_keys(jax.random.key(0), jnp.int32(0), meta_batch)
  given = jax.eval_shape(lambda tasks: tasks, tasks.prepare(lambda: (keys[0], keys[1])))
  key = jax.eval_shape(lambda: jax.random.key(0))
  episode = jax.eval_shape(lambda tasks, key: tasks.episode(tasks.sample(key), key), given, key)
  start = functools.partial(training.init, learner=learner, optimizer=optimizer)
  state = jax.eval_shape(start, key, given)
  if (shared := placement.state_mesh) is not None:
    shardings = fully_sharded.shardings(shared, state)
    state = jax.tree.map(lambda leaf, sharding: leaf.update(sharding=sharding), state, shardings)
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
    results = found.output_size_in_bytes - found.alias_size_in_bytes
    sizes = found.argument_size_in_bytes, share * size_of(episode), found.temp_size_in_bytes, results
    return MemoryPlan(_parts(state), *sizes, at_once, share, devices, available)

  plan = planned(compiled(at_once), at_once)
  if plan.fits:
    return plan
  candidates = [] if at_once == 1 else _groups_that_may_fit(plan, planned(compiled(1), 1))
  fitting = (group for group in candidates if group == 1 or planned(compiled(group), group).fits)
  return dataclasses.replace(plan, fits_at_once=next(fitting, 0))


def _groups_that_may_fit(plan: MemoryPlan, one: MemoryPlan) -> list[int]:
  """Returns the values of `tasks_at_once` whose memory should fit, the largest value first.

  The memory for each value is predicted by linear interpolation between the two plans.

  Args:
    plan: Plan that does not fit.
    one: Plan for one task at a time. If this plan does not fit, the result is empty.
  """
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


def _available(devices: int) -> int | None:
  """Returns the free memory of one device in bytes, or None if it is unknown.

  For a CPU device, the result is the free memory of the host divided by the number `devices`.
  """
  device = jax.local_devices()[0]
  found: dict[str, int] = device.memory_stats() or {}
  if 'bytes_limit' in found:
    return found['bytes_limit'] - found.get('bytes_in_use', 0)
  host = host_memory.available() if device.platform == 'cpu' else None
  return None if host is None else host // devices


def size_of(tree: chex.ArrayTree) -> int:
  """Returns how many bytes a tree of arrays takes on one device. Of a sharded array, only one device's share counts.

  The leaves may also be of the type `jax.ShapeDtypeStruct`.
  """

  def of_leaf(leaf):
    sharding = getattr(leaf, 'sharding', None)
    return math.prod(sharding.shard_shape(leaf.shape) if sharding else leaf.shape) * leaf.dtype.itemsize

  return sum(map(of_leaf, jax.tree.leaves(tree)))


def in_words(size: float) -> str:
  """Returns a number of bytes in a readable unit, such as '1.5 MiB'."""
  for unit in ('B', 'KiB', 'MiB'):
    if size < 1024:
      return f'{size:.0f} B' if unit == 'B' else f'{size:.1f} {unit}'
    size /= 1024
  return f'{size:.1f} GiB'
