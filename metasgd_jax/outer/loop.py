"""The training loop. One compiled program computes a chunk of meta-iterations of one run or of several runs.

Callbacks are called between chunks.
"""

import concurrent.futures
import functools
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from metasgd_jax.outer import fully_sharded, host_memory, sharding
from metasgd_jax.outer.placement import Placement
from metasgd_jax.outer.progress import bar as progress_bar
from metasgd_jax.types import PyTree, TaskDistribution, Tasks, check_count

LONG_COMPILATION = 1.0
"""Seconds of compilation after which `run_loop` releases the memory that the compiler has freed."""

Info = dict[str, chex.Array]


class TrainState(NamedTuple):
  """The state of meta-training. Meta-iteration i depends only on `(key, i)` and the state, so runs resume exactly.

  Attributes:
    step: Number of meta-iterations done, int32 `[]`, or `[R]` for R runs side by side. With R runs every other leaf has
      the leading axis `[R]` too.
    key: Random key of the run. It is never consumed, only folded with the step.
    meta: Meta-parameters of the learner.
    opt_state: State of the outer optimiser.

  Example:
    >>> learner = ms.maml(ms.nn.from_linen(ms.nn.MLP()), ms.losses.mean_squared_error)
    >>> keys = jax.random.split(jax.random.key(0), 3)  # Three runs side by side.
    >>> ms.init(keys, ms.tasks.sinusoid(), learner=learner, optimizer=optax.sgd(0.1)).step
    Array([0, 0, 0], dtype=int32)
  """

  step: chex.Array
  key: chex.PRNGKey
  meta: PyTree
  opt_state: optax.OptState


class Progress(NamedTuple):
  """The argument of a callback, which is called after each chunk of meta-iterations.

  Attributes:
    state: The train state.
    step: Number of meta-iterations done.
    total: Number of meta-iterations at which training stops.
    info: Info of the n meta-iterations of the chunk: `{name: array [n]}`, or `[n, R]` for R runs.
    seconds: Wall-clock seconds that meta-iterations took since the call of `train` began. Callbacks and compilation are
      not counted.
    rate: Mean number of meta-iterations per second during these `seconds`.

  Example:
    >>> tasks, optimizer = ms.tasks.sinusoid(shot=5), optax.adam(1e-3)
    >>> learner = ms.meta_sgd(ms.nn.from_linen(ms.nn.MLP((8,))), ms.losses.mean_squared_error)
    >>> state = ms.init(jax.random.key(0), tasks, learner=learner, optimizer=optimizer)
    >>> seen = []  # A callback receives the Progress of each chunk.
    >>> options = dict(meta_iterations=4, meta_batch=2, chunk=2, callbacks=[seen.append])
    >>> state = ms.train(state, tasks, learner=learner, optimizer=optimizer, **options)
    >>> [(progress.step, progress.info['loss'].shape) for progress in seen]
    [(2, (2,)), (4, (2,))]
  """

  state: TrainState
  step: int
  total: int
  info: dict[str, np.ndarray]
  seconds: float
  rate: float


class MetaIteration(Protocol):
  """A function that does one meta-iteration of one run.

  It is hashable. Two such functions with equal attributes are equal, and share one compiled program.
  """

  @property
  def meta_batch(self) -> int:
    """Number of tasks in the meta-batch."""

  @property
  def placement(self) -> Placement:
    """How the tasks are placed on devices."""

  @property
  def in_turn(self) -> bool:
    """Whether several runs are computed one after another, because a single run already keeps the device busy."""

  def __call__(self, state: TrainState, tasks: TaskDistribution) -> tuple[TrainState, Info]:
    """Returns the next state, and the info, a dict of scalars to report."""


def run_loop(
  state: TrainState,
  tasks: Tasks,
  iteration: MetaIteration,
  *,
  meta_iterations: int,
  chunk: int,
  callbacks: Sequence[Callable[[Progress], None]],
  progress: bool | None = False,
) -> TrainState:
  """Runs meta-iterations from `state` until `meta_iterations` are done, and returns the last state.

  The loop stays on the device for `chunk` meta-iterations. It is compiled once: the length of a chunk is an argument of
  the compiled program, and so the last, shorter chunk runs the same program. The program's state is donated. The arrays
  of the caller and of the callbacks are never donated and stay valid, because the loop works on a copy of the state.

  Args:
    state: State of one run or of R runs side by side.
    tasks: Tasks to train on.
    iteration: Function that does one meta-iteration; see `MetaIteration`.
    meta_iterations: Number of meta-iterations at which to stop, counted from the beginning of the run.
    chunk: Number of meta-iterations between callbacks.
    callbacks: Functions that are called in order after each chunk.
    progress: As in `metasgd_jax.train`.

  Raises:
    ValueError: if `meta_iterations` or `chunk` is not an integer of at least 1, if `callbacks` is a function, if the
      runs are at different steps, if the state is already past `meta_iterations`, if the devices cannot share the tasks
      evenly, or if `shard_meta` is used with R runs.
  """
  for name, value in (('meta_iterations', meta_iterations), ('chunk', chunk)):
    check_count(name, value)
  if callable(callbacks):
    raise ValueError(f'`callbacks` must be a sequence of functions, got {callbacks!r:.80}; give [function]')
  check_key(state.key)
  placement, chunk, meta_iterations = iteration.placement, int(chunk), int(meta_iterations)
  placement.check(iteration.meta_batch)
  done = _steps_done(state, meta_iterations, placement)
  shared = placement.state_mesh
  state = sharding.on_all(placement.mesh, state) if shared is None else fully_sharded.split(shared, state)
  if done == meta_iterations:
    return _returned(state, placement)
  before, seconds, mesh, warned = done, 0.0, placement.mesh, False
  key = sharding.on_one(mesh, state.key)
  state = _copied(state)
  tasks = sharding.on_all(mesh, tasks)
  # Callbacks that print would break the line of a bar that nobody asked for.
  bar = progress_bar(False if callbacks and progress is None else progress, done, meta_iterations)
  with concurrent.futures.ThreadPoolExecutor(1) as thread, bar as show:
    prepare = functools.partial(_prepare, tasks, key, meta_iterations, iteration.meta_batch, chunk, mesh)
    coming = thread.submit(prepare, done)
    start = time.perf_counter()
    _run_chunk.lower(state, coming.result(), 0, iteration=iteration, chunk=chunk).compile()
    if time.perf_counter() - start > LONG_COMPILATION:
      host_memory.release_freed()  # Otherwise the loop's memory would come on top of what the compiler has freed.
    while done < meta_iterations:
      n = min(chunk, meta_iterations - done)
      start = time.perf_counter()
      ready = coming.result()
      if done + n < meta_iterations:
        coming = thread.submit(prepare, done + n)
      state, info = jax.block_until_ready(_run_chunk(state, ready, n, iteration=iteration, chunk=chunk))
      seconds += time.perf_counter() - start
      done += n
      values = {name: np.asarray(value)[:n] for name, value in info.items()}
      shown = _copied(_returned(state, placement))  # Every process must run this computation, even without callbacks.
      now = Progress(shown, done, meta_iterations, values, seconds, (done - before) / seconds)
      for callback in (show, *callbacks):
        callback(now)
      del shown, now  # The next chunk needs the memory.
      warned = warned or _warn_of_bad_loss(values, done - n)
  return _returned(state, placement)


def _warn_of_bad_loss(values: dict[str, np.ndarray], first: int) -> bool:
  """Warns if a loss of a chunk, which began with meta-iteration `first`, is not finite. Returns whether it warned."""
  bad = np.argwhere(~np.isfinite(values.get('loss', 0.0)))
  if bad.size:
    warnings.warn(
      f'the loss is not finite at meta-iteration {first + bad[0][0]} (from 0); common causes are labels out of range, '
      'a large alpha, and a learning rate that is too high',
      RuntimeWarning,
      stacklevel=4,
    )
  return bool(bad.size)


@jax.jit
def _copied(state: TrainState) -> TrainState:
  return jax.tree.map(jnp.copy, state)


def _steps_done(state: TrainState, meta_iterations: int, placement: Placement) -> int:
  """Returns the number of meta-iterations done. Raises ValueError if the state cannot be trained further."""
  if placement.shard_meta and state.step.ndim:
    raise ValueError(
      f'shard_meta=True supports only one run, got {len(state.step)} runs side by side; train the runs separately'
    )
  if np.ptp(state.step):
    raise ValueError(
      'runs side by side must all have done the same number of meta-iterations, '
      f'got {np.asarray(state.step)}; train the runs separately'
    )
  done = int(np.max(state.step))
  if done > meta_iterations:
    raise ValueError(
      f'the state has done {done} meta-iterations, more than meta_iterations={meta_iterations}; '
      'give a larger meta_iterations'
    )
  return done


def _returned(state: TrainState, placement: Placement) -> TrainState:
  return state if placement.shard_meta else sharding.on_one(placement.mesh, state)


def _prepare(tasks: Tasks, key, total: int, meta_batch: int, chunk: int, mesh, step: int) -> TaskDistribution:
  """Returns the tasks of the `chunk` meta-iterations that begin at `step`. Their data are on the devices.

  If only n < chunk meta-iterations are left of `total`, the tasks are those of these n, and no other data are read.
  """

  def keys():
    steps = np.minimum(step + np.arange(chunk), total - 1)
    return _chunk_keys(jax.device_put(key, sharding.host_device()), steps, meta_batch=meta_batch)

  return sharding.on_all(mesh, tasks.prepare(keys))


def check_key(key: chex.PRNGKey) -> None:
  """Raises ValueError unless `key` is a random key of `jax.random.key`, or an array `[R]` of such keys.

  Keys of the impl `rbg` or `unsafe_rbg` raise ValueError too. Under `jax.vmap` such keys give other random numbers than
  without `jax.vmap`, so the tasks would depend on how the computation is batched, and not on the key alone.
  """
  dtype, shape = getattr(key, 'dtype', type(key)), jnp.shape(key)
  if not jnp.issubdtype(dtype, jax.dtypes.prng_key) or len(shape) > 1:
    raise ValueError(f'`key` must be jax.random.key(seed) or an array [R] of such keys, got {dtype} of shape {shape}')
  if 'rbg' in (impl := str(jax.random.key_impl(key))):
    raise ValueError(
      f'`key` must be of the impl threefry2x32, got {impl}, whose numbers change under jax.vmap; '
      "give jax.random.key(seed, impl='threefry2x32')"
    )


def step_keys(key: chex.PRNGKey, step: chex.Array, meta_batch: int) -> chex.PRNGKey:
  """Returns the keys of a meta-iteration, `[3, T]`.

  Each task has three keys: one to sample the task, one to draw its episode, and one for the learner.
  """
  return jax.random.split(jax.random.fold_in(key, step), (3, meta_batch))


@functools.partial(jax.jit, static_argnames='meta_batch')
def _chunk_keys(key, steps, *, meta_batch):
  """Returns the keys with which the tasks of a chunk are sampled, and the keys with which their episodes are drawn.

  Both arrays of keys are `[R·chunk·T]`, for R runs.
  """
  of_steps = jax.vmap(lambda key, i: step_keys(key, i, meta_batch), (None, 0))  # [chunk, 3, T]
  keys = jax.vmap(of_steps, (0, None))(jnp.atleast_1d(key), steps)
  return tuple(keys[:, :, i].ravel() for i in range(2))


@functools.partial(jax.jit, static_argnames=('iteration', 'chunk'), donate_argnums=0)
def _run_chunk(state, tasks, n, *, iteration: Any, chunk: int):
  """Returns the state after n ≤ chunk meta-iterations, and their info with `chunk` rows, n of which are filled."""
  step = _over_runs(lambda state: iteration(state, tasks), state, iteration.in_turn)
  rows = jax.tree.map(lambda s: jnp.zeros((chunk, *s.shape), s.dtype), jax.eval_shape(lambda s: step(s)[1], state))

  def body(i, carry):
    state, infos = carry
    state, info = step(state)
    return state, jax.tree.map(lambda rows, v: jax.lax.dynamic_update_index_in_dim(rows, v, i, 0), infos, info)

  state, info = jax.lax.fori_loop(0, n, body, (state, rows))
  placement = iteration.placement
  if placement.mesh is None:
    return state, info
  everywhere = NamedSharding(placement.mesh, PartitionSpec())
  on_all = functools.partial(jax.lax.with_sharding_constraint, shardings=everywhere)
  shared = placement.state_mesh
  state = jax.tree.map(on_all, state) if shared is None else fully_sharded.constrained(shared, state)
  return state, jax.tree.map(on_all, info)


def _over_runs(step, state, in_turn: bool):
  """Returns `step` as a function of the whole state, which may be of one run or of R runs side by side.

  For R = 1 no vmap is used, because a vmap over a single run would be three times slower on a CPU.
  """
  if state.step.ndim == 0:
    return step
  if state.step.shape[0] > 1:
    return functools.partial(jax.lax.map, step) if in_turn else jax.vmap(step)

  def single(state):
    out = step(jax.tree.map(lambda a: a[0], state))
    return jax.tree.map(lambda a: a[None], out)

  return single
