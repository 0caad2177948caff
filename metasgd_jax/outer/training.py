"""Meta-training with an optax optimiser over θ and α (Li et al. 2017, Algorithm 1)."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from metasgd_jax.inner.optimizer import apply_optimizer
from metasgd_jax.outer import fully_sharded, sharding
from metasgd_jax.outer.loop import Info, Progress, TrainState, check_key, run_loop, step_keys
from metasgd_jax.outer.objective import mean_loss_and_grad
from metasgd_jax.outer.placement import Placement
from metasgd_jax.outer.unused_keys import warn_of_one_task
from metasgd_jax.tree import strong
from metasgd_jax.types import Episode, Learner, TaskDistribution, Tasks, TaskStream, check_count


def init(key: chex.PRNGKey, tasks: Tasks, *, learner: Learner, optimizer: optax.GradientTransformation) -> TrainState:
  """Returns the train state before the first meta-iteration. R keys give the state of R runs side by side.

  Args:
    key: Random key `[]`, or R keys `[R]`. It becomes the key of the run, and the initial meta-parameters are drawn with
      a key that is derived from it.
    tasks: Tasks to train on. One episode is drawn, because its shapes are needed. A warning is given if `sample` does
      not use its key, so that all tasks are the same.
    learner: Learner whose meta-parameters are drawn.
    optimizer: Outer optimiser of the whole pytree of meta-parameters. Build it once: JAX treats an optimiser that is
      built anew as another one, and compiles the programs again. Learners and tasks that are built anew from equal
      arguments are equal.

  Raises:
    ValueError: if `key` is neither a key of `jax.random.key` nor an array `[R]` of such keys, or if it has the impl
      `rbg` or `unsafe_rbg`; if `tasks` is not a `TaskDistribution` or a `TaskStream`, or if `optimizer` is not an optax
      optimiser; if the tasks do not return an `Episode`, or if the `init` of the learner raises ValueError.

  Example:
    >>> tasks = ms.tasks.sinusoid(shot=5)
    >>> learner = ms.meta_sgd(ms.nn.from_linen(ms.nn.MLP()), ms.losses.mean_squared_error)
    >>> state = ms.init(jax.random.key(0), tasks, learner=learner, optimizer=optax.adam(1e-3))
    >>> int(state.step), list(state.meta.theta)
    (0, ['Dense_0', 'Dense_1', 'Dense_2'])
  """
  check_key(key)
  _check_parts(tasks, optimizer)
  if isinstance(tasks, TaskDistribution):
    warn_of_one_task(tasks, jnp.atleast_1d(key)[0])
  start = functools.partial(_init, learner=learner, optimizer=optimizer)
  if key.ndim:
    start = jax.vmap(start, (0, None))
  return start(key, tasks.prepare(lambda: tuple(jnp.moveaxis(jax.vmap(_init_keys)(jnp.atleast_1d(key)), 1, 0)[:2])))


def _check_parts(tasks: Any, optimizer: Any) -> None:
  """Raises ValueError unless `tasks` is a `TaskDistribution` or `TaskStream` and `optimizer` is an optax optimiser."""
  if not isinstance(tasks, TaskDistribution | TaskStream):
    raise ValueError(f'`tasks` must be a TaskDistribution or a TaskStream, got {type(tasks).__name__}')
  if not callable(getattr(optimizer, 'init', None)) or not callable(getattr(optimizer, 'update', None)):
    raise ValueError(f'`optimizer` must be an optax optimiser, such as optax.adam(1e-3), got {optimizer!r:.80}')


def _init_keys(key):
  return jax.random.split(jax.random.fold_in(key, -1 % 2**32), 3)


@functools.partial(jax.jit, static_argnames=('learner', 'optimizer'))
def _init(key, tasks, *, learner, optimizer):
  task_key, episode_key, init_key = _init_keys(key)
  episode = tasks.episode(tasks.sample(task_key), episode_key)
  if not isinstance(episode, Episode):
    raise ValueError(f'`episode` of the tasks must return ms.Episode(support, query), got {type(episode).__name__}')
  try:
    meta = learner.init(init_key, episode)
  except AttributeError as e:
    if type(episode.support) in (tuple, list):
      raise ValueError('the support must be an ms.Batch, got a plain tuple or list; give ms.Batch(x, y)') from e
    raise
  # Weakly typed leaves are made strongly typed. Otherwise the first step would change the types of the state, and the
  # loop would be compiled twice.
  meta, opt_state = strong((meta, optimizer.init(meta)))
  return TrainState(jnp.zeros((), jnp.int32), key, meta, opt_state)


def train_step(
  state: TrainState,
  tasks: Tasks,
  *,
  learner: Learner,
  optimizer: optax.GradientTransformation,
  meta_batch: int,
  placement: Placement = Placement(),
) -> tuple[TrainState, Info]:
  """Returns `(state, info)` after one meta-iteration of one run. `info` is the learner's info with `loss` added.

  The update is (θ, α) ← (θ, α) − β ∇ (1/T) Σ_i L_query(T_i)(θ_i′), as in Algorithm 1 of Li et al. 2017. Instead of a
  step of size β, any optax optimiser except a line search can be used. An optimiser that takes extra arguments receives
  the loss as `value` and the gradient of the loss as `grad`, but no `value_fn`. The loss of a few tasks is noisy, so
  `optax.contrib.reduce_on_plateau` needs an `accumulation_size` of several hundred.

  Call it inside `jax.jit`. Outside, a learner with 2 or more inner steps is compiled at each call, and JAX keeps the
  programs.

  Args:
    state: State of one run.
    tasks: Tasks to train on. T = `meta_batch` tasks are drawn with `(state.key, state.step)`. A `TaskStream`
      cannot send data inside `jax.jit`. Before you call a jitted function, compute `keys =
      outer.loop.step_keys(state.key, state.step, meta_batch)` and `prepared = tasks.prepare(lambda: keys[:2])`. This
      sends the data of the tasks and episodes that are drawn with these keys. Give `prepared` to the jitted function
      as an argument, and use it there as `tasks`.
    learner: Learner.
    optimizer: Outer optimiser.
    meta_batch: Number of tasks T.
    placement: How the tasks are placed on devices.

  Raises:
    ValueError: if `meta_batch` is not an integer of at least 1, if the devices cannot share the tasks evenly, or if the
      key of `state` is of a kind that `init` refuses.

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
  check_key(state.key)
  placement.check(meta_batch)
  keys = step_keys(state.key, state.step, meta_batch)
  tasks = jax.tree.map(jnp.asarray, tasks.prepare(lambda: (keys[0], keys[1])))

  def of_tasks(shared, keys):
    meta, tasks = shared
    sample_keys, episode_keys, adapt_keys = keys
    episodes = jax.vmap(tasks.episode)(jax.vmap(tasks.sample)(sample_keys), episode_keys)
    return mean_loss_and_grad(learner, meta, episodes, adapt_keys, tasks_at_once=placement.tasks_at_once)

  shared = placement.state_mesh
  if shared is not None:
    of_all = fully_sharded.share_gradients(of_tasks, shared, state.meta)
  else:
    of_all = sharding.share_tasks(of_tasks, placement.mesh, average=True)
  (loss, info), grads = of_all((state.meta, tasks), tuple(keys))
  meta, opt_state = apply_optimizer('optimizer', optimizer, state.meta, state.opt_state, grad=grads, value=loss)
  state = TrainState(state.step + 1, state.key, meta, opt_state)
  if shared is not None:
    state = fully_sharded.constrained(shared, state)
  return state, {**info, 'loss': loss}


@dataclasses.dataclass(frozen=True)
class _GradientIteration:
  """`train_step` as a `MetaIteration`."""

  learner: Learner
  optimizer: optax.GradientTransformation
  meta_batch: int
  placement: Placement
  in_turn = False

  def __call__(self, state: TrainState, tasks: TaskDistribution) -> tuple[TrainState, Info]:
    return train_step(
      state,
      tasks,
      learner=self.learner,
      optimizer=self.optimizer,
      meta_batch=self.meta_batch,
      placement=self.placement,
    )


def train(
  state: TrainState,
  tasks: Tasks,
  *,
  learner: Learner,
  optimizer: optax.GradientTransformation,
  meta_iterations: int,
  meta_batch: int,
  placement: Placement = Placement(),
  chunk: int = 1000,
  callbacks: Sequence[Callable[[Progress], None]] = (),
  progress: bool | None = None,
) -> TrainState:
  """Runs meta-training from `state` until `meta_iterations` are done, and returns the last state.

  The loop stays on the device for `chunk` meta-iterations, including the drawing of tasks. After each chunk the
  callbacks are called with a `Progress`. The arrays of `state` and of a `Progress` stay valid, because they are never
  donated.

  Args:
    state: State from `init`, of one run or of R runs side by side.
    tasks: Tasks to train on. While the device computes a chunk, a `TaskStream` sends it the data for the next chunk.
    learner: Learner.
    optimizer: Outer optimiser, the same one that `state` was made with.
    meta_iterations: Number of meta-iterations at which to stop, counted from the beginning of the run.
    meta_batch: Number of tasks in a meta-iteration.
    placement: How the tasks are placed on devices. Each device draws its own share of the tasks. If the devices belong
      to several processes, each process must call this function with the same arguments. The returned state, and the
      state of a `Progress`, are on the first device of this process; with `shard_meta` they stay split over all
      devices.
    chunk: Number of meta-iterations between callbacks.
    callbacks: Functions that are called in order after each chunk.
    progress: Whether to show a progress bar, which moves after each chunk. By default it is shown on a terminal and in
      a notebook, if there are no callbacks.

  Raises:
    ValueError: if `meta_iterations`, `meta_batch` or `chunk` is not an integer of at least 1, if the devices cannot
      share the tasks evenly, if `tasks` is not a `TaskDistribution` or a `TaskStream`, if `optimizer` is not an optax
      optimiser or its update fails, such as that of a line search, which needs the loss as a function, if the state was
      made with an optimiser of another kind, if runs are at different steps, if the state is already past
      `meta_iterations`, or if `shard_meta` is used with R runs.

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
  check_count('meta_batch', meta_batch)
  _check_parts(tasks, optimizer)
  expected: Any = jax.tree.structure(jax.eval_shape(optimizer.init, state.meta))
  if expected != jax.tree.structure(state.opt_state):
    raise ValueError(
      'the optimizer state of `state` is not one of `optimizer`; give the optimiser with which `state` was made, or '
      'begin its state anew with state._replace(opt_state=optimizer.init(state.meta))'
    )
  iteration = _GradientIteration(learner, optimizer, int(meta_batch), placement)
  options: Any = dict(meta_iterations=meta_iterations, chunk=chunk, callbacks=callbacks, progress=progress)
  return run_loop(state, tasks, iteration, **options)
