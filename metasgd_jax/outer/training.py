"""Meta-training on the device: many meta-iterations in one compiled loop, several seeds side by side."""

import concurrent.futures
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from metasgd_jax.outer import fully_sharded, host_memory, sharding
from metasgd_jax.outer.objective import Mapping, check_mapping, value_and_grad
from metasgd_jax.tree import strong
from metasgd_jax.types import Episode, Learner, PyTree, TaskDistribution, TaskStream, check_count


class TrainState(NamedTuple):
  """What meta-training carries. Step i is a function of (key, i) and this, so a run resumes from it exactly.

  Attributes:
    step: meta-iterations done, int32 `[]`, or `[R]` for R runs side by side, as every other leaf then.
    key: the run's key; never consumed, only folded with the step.
    meta: the learner's meta-parameters.
    opt_state: the outer optimiser's.

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
  """What a callback sees between chunks.

  Attributes:
    state: the train state now.
    step: meta-iterations done, of `total`.
    total: meta-iterations to do.
    info: of the chunk just done: `{name: array [n]}`, or `[n, R]` for R runs.
    seconds: wall time of this call's loop so far, callbacks and compilation left out.
    rate: meta-iterations a second, over those seconds.

  Example:
    >>> tasks, optimizer = ms.tasks.sinusoid(shot=5), optax.adam(1e-3)
    >>> learner = ms.meta_sgd(ms.nn.from_linen(ms.nn.MLP((8,))), ms.losses.mean_squared_error)
    >>> state = ms.init(jax.random.key(0), tasks, learner=learner, optimizer=optimizer)
    >>> seen = []  # A callback gets each chunk's Progress.
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


def init(
  key: chex.PRNGKey, tasks: TaskDistribution | TaskStream, *, learner: Learner, optimizer: optax.GradientTransformation
) -> TrainState:
  """Returns the state before the first meta-iteration, of one run; of R runs side by side for R keys.

  Args:
    key: `[]` or `[R]`; becomes the run's key, and the start is drawn from it.
    tasks: gives one episode, for its shapes.
    learner: whose meta-parameters are drawn.
    optimizer: the outer optimiser, over the whole meta pytree.

  Raises:
    ValueError: a key of the old kind (`jax.random.PRNGKey`) or of another rank; tasks or an optimizer that are none,
      an episode that is no `Episode`; what the learner raises.

  Example:
    >>> tasks = ms.tasks.sinusoid(shot=5)
    >>> learner = ms.meta_sgd(ms.nn.from_linen(ms.nn.MLP()), ms.losses.mean_squared_error)
    >>> state = ms.init(jax.random.key(0), tasks, learner=learner, optimizer=optax.adam(1e-3))
    >>> int(state.step), list(state.meta.theta)
    (0, ['Dense_0', 'Dense_1', 'Dense_2'])
  """
  check_key(key)
  _check_parts(tasks, optimizer)
  start = functools.partial(_init, learner=learner, optimizer=optimizer)
  if key.ndim:
    start = jax.vmap(start, (0, None))
  if isinstance(tasks, TaskStream):
    task_keys, episode_keys, _ = jnp.moveaxis(jax.vmap(_init_keys)(jnp.atleast_1d(key)), 1, 0)
    tasks = tasks.send(task_keys, episode_keys)
  return start(key, tasks.as_arguments())


def _check_parts(tasks: Any, optimizer: Any) -> None:
  """Raises ValueError unless these are tasks and an optimiser."""
  if not isinstance(tasks, TaskDistribution | TaskStream):
    raise ValueError(f'tasks must be a TaskDistribution or a TaskStream, got {type(tasks).__name__}')
  if not callable(getattr(optimizer, 'init', None)) or not callable(getattr(optimizer, 'update', None)):
    raise ValueError(f'optimizer must be an optimiser of optax, such as optax.adam(1e-3), got {optimizer!r:.80}')


def check_key(key: chex.PRNGKey) -> None:
  """Raises ValueError unless key is `jax.random.key`'s, or an array [R] of such."""
  dtype, shape = getattr(key, 'dtype', type(key)), jnp.shape(key)
  if not jnp.issubdtype(dtype, jax.dtypes.prng_key) or len(shape) > 1:
    raise ValueError(f'key must be jax.random.key(seed), or an array [R] of such, got {dtype} of shape {shape}')


def _init_keys(key):
  return jax.random.split(jax.random.fold_in(key, -1 % 2**32), 3)


@functools.partial(jax.jit, static_argnames=('learner', 'optimizer'))
def _init(key, tasks, *, learner, optimizer):
  task_key, episode_key, init_key = _init_keys(key)
  episode = tasks.episode(tasks.sample(task_key), episode_key)
  if not isinstance(episode, Episode):
    raise ValueError(f'the tasks must give ms.Episode(support, query), got {type(episode).__name__}')
  try:
    meta = learner.init(init_key, episode)
  except AttributeError as e:
    if type(episode.support) in (tuple, list):
      raise ValueError('the support is no ms.Batch but a plain tuple or list; give ms.Batch(x, y)') from e
    raise
  # A dtype that were weak here would be strong after a meta-iteration: another program for the next chunk.
  meta, opt_state = strong((meta, optimizer.init(meta)))
  return TrainState(jnp.zeros((), jnp.int32), key, meta, opt_state)


def train_step(
  state: TrainState,
  tasks: TaskDistribution,
  *,
  learner: Learner,
  optimizer: optax.GradientTransformation,
  meta_batch: int,
  mapping: Mapping = 'auto',
  mesh: Mesh | None = None,
  shard_meta: bool = False,
) -> tuple[TrainState, dict[str, chex.Array]]:
  """Returns the state after one meta-iteration of one run, and its info with `loss` added.

  (θ, α) ← (θ, α) − β ∇ (1/T) Σ_i L_query(T_i)(θ_i′): Algorithm 1 of Li et al. 2017, with any optax optimiser for β
  but a line search: those that ask for them get the loss as `value` and its gradient as `grad`, not `value_fn`. The
  loss of a few tasks is noisy: `optax.contrib.reduce_on_plateau` needs an `accumulation_size` of some hundreds.

  Args:
    state: of one run.
    tasks: T = `meta_batch` of them are drawn, from `(state.key, state.step)`.
    learner: the learner.
    optimizer: the outer optimiser.
    meta_batch: tasks in a meta-iteration.
    mapping: see `Mapping`.
    mesh: of devices to share the tasks, such as `sharding.task_mesh(meta_batch)`; one device where left out.
    shard_meta: whether they share the state's large arrays too; see `fully_sharded`.

  Raises:
    ValueError: a meta_batch that is no integer of at least 1, an unknown mapping, tasks that cannot be shared evenly,
      or shard_meta without a mesh.

  Example:
    >>> tasks = ms.tasks.sinusoid(shot=5)
    >>> learner = ms.meta_sgd(ms.nn.from_linen(ms.nn.MLP()), ms.losses.mean_squared_error)
    >>> optimizer = optax.adam(1e-3)
    >>> state = ms.init(jax.random.key(0), tasks, learner=learner, optimizer=optimizer)
    >>> state, info = ms.train_step(state, tasks, learner=learner, optimizer=optimizer, meta_batch=4)
    >>> int(state.step), list(info)
    (1, ['loss'])
  """
  check_count('meta_batch', meta_batch)
  _check_sharing(mesh, meta_batch, shard_meta)
  keys = step_keys(state.key, state.step, meta_batch)

  def of_tasks(shared, keys):
    meta, tasks = shared
    sample_keys, episode_keys, adapt_keys = keys
    episodes = jax.vmap(tasks.episode)(jax.vmap(tasks.sample)(sample_keys), episode_keys)
    return value_and_grad(learner, meta, episodes, adapt_keys, mapping=mapping)

  if mesh is not None and shard_meta:
    of_all = fully_sharded.share_gradients(of_tasks, mesh, state.meta)
  else:
    of_all = sharding.share_tasks(of_tasks, mesh, average=True)
  (loss, info), grads = of_all((state.meta, tasks.as_arguments()), tuple(keys))
  update = optax.with_extra_args_support(optimizer).update
  updates, opt_state = update(grads, state.opt_state, state.meta, value=loss, grad=grads)
  meta = optax.apply_updates(state.meta, updates)
  state = TrainState(state.step + 1, state.key, meta, opt_state)
  return fully_sharded.constrained(mesh, state) if mesh is not None and shard_meta else state, {**info, 'loss': loss}


def _check_sharing(mesh: Mesh | None, meta_batch: int, shard_meta: bool) -> None:
  sharding.check_mesh(mesh, meta_batch)
  if shard_meta and mesh is None:
    raise ValueError('shard_meta is over the devices of a mesh, got none; give mesh=sharding.task_mesh(meta_batch)')


def step_keys(key: chex.PRNGKey, step: chex.Array, meta_batch: int) -> chex.PRNGKey:
  """Returns the keys of a meta-iteration, `[3, T]`: to sample each task, to draw its episode, and for the learner."""
  return jax.random.split(jax.random.fold_in(key, step), (3, meta_batch))


def train(
  state: TrainState,
  tasks: TaskDistribution | TaskStream,
  *,
  learner: Learner,
  optimizer: optax.GradientTransformation,
  meta_iterations: int,
  meta_batch: int,
  mapping: Mapping = 'auto',
  mesh: Mesh | None = None,
  shard_meta: bool = False,
  chunk: int = 1000,
  callbacks: Sequence[Callable[[Progress], None]] = (),
) -> TrainState:
  """Runs meta-training from `state` until `meta_iterations` are done; returns the last state.

  The loop stays on the device for `chunk` meta-iterations, tasks and all; between chunks each callback is called
  with a `Progress`. It compiles once: the length of a chunk is a run-time number, so the last, shorter one is the
  same program.

  Args:
    state: from `init`, of one run or of R.
    tasks: what to train on; the next chunk's of a `TaskStream` are sent while the device works on this one's.
    learner: what to train.
    optimizer: the outer optimiser that `state` was made with.
    meta_iterations: where to stop, counted from the run's beginning.
    meta_batch: tasks in a meta-iteration.
    mapping: how tasks are laid over a device; see `Mapping`.
    mesh: of devices to share the tasks, such as `sharding.task_mesh(meta_batch)`; one device where left out. They
      may be those of several processes, each of which calls this with the same arguments; each device draws its own
      share of the tasks. The state comes back, and goes to callbacks, on this process's first.
    shard_meta: whether the devices share the state's large arrays too (`fully_sharded`), of one run; the state then
      comes back as it lies, in parts.
    chunk: meta-iterations between callbacks.
    callbacks: called in order.

  Raises:
    ValueError: a count that is no integer of at least 1, an unknown mapping, tasks that cannot be shared evenly,
      tasks or an optimizer that are none, runs at different steps, a state that is already past `meta_iterations`,
      shard_meta without a mesh or for R runs.

  Example:
    >>> tasks = ms.tasks.sinusoid(shot=5)
    >>> learner = ms.meta_sgd(ms.nn.from_linen(ms.nn.MLP()), ms.losses.mean_squared_error)
    >>> optimizer = optax.adam(1e-3)
    >>> state = ms.init(jax.random.key(0), tasks, learner=learner, optimizer=optimizer)
    >>> show = lambda progress: print(progress.step, 'of', progress.total, progress.info['loss'].shape)
    >>> state = ms.train(
    ...   state, tasks, learner=learner, optimizer=optimizer, meta_iterations=5, meta_batch=4, chunk=3, callbacks=[show]
    ... )
    3 of 5 (3,)
    5 of 5 (2,)
  """
  check_mapping(mapping)
  for name, value in (('meta_iterations', meta_iterations), ('meta_batch', meta_batch), ('chunk', chunk)):
    check_count(name, value)
  _check_parts(tasks, optimizer)
  _check_sharing(mesh, meta_batch, shard_meta)
  if shard_meta and state.step.ndim:
    raise ValueError(f'shard_meta is for one run, got {len(state.step)} side by side; train them one after the other')
  if np.ptp(state.step):
    raise ValueError(f'runs side by side must have done as many meta-iterations, got {np.asarray(state.step)}')
  done = before = int(np.max(state.step))
  if done > meta_iterations:
    raise ValueError(f'the state has done {done} meta-iterations, more than meta_iterations={meta_iterations}')
  if done == meta_iterations:
    return state
  state = fully_sharded.split(mesh, state) if mesh is not None and shard_meta else sharding.on_all(mesh, state)
  key = sharding.on_one(mesh, state.key)
  seen = (lambda state: state) if shard_meta else functools.partial(sharding.on_one, mesh)
  if isinstance(tasks, TaskDistribution):
    tasks = sharding.on_all(mesh, tasks.as_arguments())
  run_chunk = functools.partial(
    _run_chunk,
    learner=learner,
    optimizer=optimizer,
    meta_batch=meta_batch,
    mapping=mapping,
    mesh=mesh,
    shard_meta=shard_meta,
    chunk=chunk,
  )
  with concurrent.futures.ThreadPoolExecutor(1) as thread:
    ahead = functools.partial(_send_ahead, thread, tasks, key, meta_batch, chunk, mesh)
    coming = ahead(done)
    start = time.perf_counter()
    # Compiled with a chunk of no steps, so that this is not timed.
    jax.block_until_ready(run_chunk(state, coming.result(), 0))
    if time.perf_counter() - start > 1:
      host_memory.give_back()  # What the compiler left; a program that was compiled before takes no second.
    seconds = 0.0
    while done < meta_iterations:
      n = min(chunk, meta_iterations - done)
      start = time.perf_counter()
      now = coming.result()
      if done + n < meta_iterations:
        coming = ahead(done + n)
      state, info = jax.block_until_ready(run_chunk(state, now, n))
      seconds += time.perf_counter() - start
      done += n
      info = {name: np.asarray(values)[:n] for name, values in info.items()}
      progress = Progress(seen(state), done, meta_iterations, info, seconds, (done - before) / seconds)
      for callback in callbacks:
        callback(progress)
  return seen(state)


def _send_ahead(thread, tasks, key, meta_batch, chunk, mesh, step):
  """Returns a future of the tasks of `chunk` meta-iterations from `step`."""

  def send():
    if isinstance(tasks, TaskDistribution):
      return tasks
    keys = _chunk_keys(jax.device_put(key, sharding.host_device()), step, meta_batch=meta_batch, chunk=chunk)
    return sharding.on_all(mesh, tasks.send(*keys).as_arguments())

  return thread.submit(send)


@functools.partial(jax.jit, static_argnames=('meta_batch', 'chunk'))
def _chunk_keys(key, step, *, meta_batch, chunk):
  """The keys of all tasks, and of all their episodes, of a chunk; of R runs together: `[R·chunk·T]` each."""
  of_steps = jax.vmap(lambda key, i: step_keys(key, i, meta_batch), (None, 0))  # [chunk, 3, T]
  keys = jax.vmap(of_steps, (0, None))(jnp.atleast_1d(key), step + jnp.arange(chunk))
  return tuple(keys[:, :, i].ravel() for i in range(2))


@functools.partial(
  jax.jit, static_argnames=('learner', 'optimizer', 'meta_batch', 'mapping', 'mesh', 'shard_meta', 'chunk')
)
def _run_chunk(state, tasks, n, *, learner, optimizer, meta_batch, mapping, mesh, shard_meta, chunk):
  options = dict(learner=learner, optimizer=optimizer, meta_batch=meta_batch, mapping=mapping, mesh=mesh)
  state, info = repeat(lambda state: train_step(state, tasks, shard_meta=shard_meta, **options), state, n, chunk)
  if mesh is None:
    return state, info
  everywhere = functools.partial(jax.lax.with_sharding_constraint, shardings=NamedSharding(mesh, PartitionSpec()))
  state = fully_sharded.constrained(mesh, state) if shard_meta else jax.tree.map(everywhere, state)
  return state, jax.tree.map(everywhere, info)


def repeat(
  step: Callable[[TrainState], tuple[TrainState, dict[str, chex.Array]]],
  state: TrainState,
  n: chex.Numeric,
  chunk: int,
  *,
  in_turn: bool = False,
) -> tuple[TrainState, dict[str, chex.Array]]:
  """Returns the state after n ≤ chunk steps, and their info, with room for `chunk` of them: the first n are filled.

  Args:
    step: `state → (state, info)` of one run.
    state: of one run, or of R side by side.
    n: may be a run-time number.
    chunk: the most steps.
    in_turn: several runs are taken one after the other instead of side by side: the memory of one, for steps that fill
      the device by themselves.
  """
  step = _over_runs(step, state, in_turn)
  rooms = jax.tree.map(lambda s: jnp.zeros((chunk, *s.shape), s.dtype), jax.eval_shape(lambda s: step(s)[1], state))

  def body(i, carry):
    state, infos = carry
    state, info = step(state)
    return state, jax.tree.map(lambda room, v: jax.lax.dynamic_update_index_in_dim(room, v, i, 0), infos, info)

  return jax.lax.fori_loop(0, n, body, (state, rooms))


def _over_runs(step, state, in_turn=False):
  """`step` for a state of one run, or of R. One run in a vmap would be three times slower on a CPU, so is unpacked."""
  if state.step.ndim == 0:
    return step
  if state.step.shape[0] > 1:
    return functools.partial(jax.lax.map, step) if in_turn else jax.vmap(step)

  def single(state):
    out = step(jax.tree.map(lambda a: a[0], state))
    return jax.tree.map(lambda a: a[None], out)

  return single
