"""Meta-training of policies with TRPO (Li et al. 2017, Algorithm 2)."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp

from metasgd_jax.outer.loop import Info, Progress, TrainState, check_key, run_loop
from metasgd_jax.outer.placement import Placement
from metasgd_jax.rl.learner import PolicyGradient, task_distribution
from metasgd_jax.rl.meta_step import trpo_meta_step
from metasgd_jax.rl.trpo import TrpoConfig
from metasgd_jax.types import TaskDistribution, check_count


def init(key: chex.PRNGKey, inner: PolicyGradient) -> TrainState:
  """Returns the state before the first meta-iteration, for one run or for R runs side by side.

  Args:
    key: Random key of one run, `[]`, or of R runs, `[R]`. It becomes the key of the run, and meta is drawn from it.
    inner: Inner loop from `policy_gradient`.

  Raises:
    ValueError: if the key is of the old kind (`jax.random.PRNGKey`) or has another rank.

  Example:
    >>> inner = ms.rl.policy_gradient(ms.rl.navigation(horizon=5), ms.rl.gaussian(2, 2, hidden=(8,)), trajectories=3)
    >>> state = ms.rl.init(jax.random.key(0), inner)
    >>> int(state.step), list(state.meta.theta)
    (0, ['Dense_0', 'Dense_1', 'log_std'])
    >>> runs = ms.rl.init(jax.random.split(jax.random.key(0), 3), inner)  # Three runs side by side.
    >>> runs.meta.theta['log_std'].shape
    (3, 2)
  """
  check_key(key)

  def one(key):
    meta = inner.init(jax.random.fold_in(key, -1 % 2**32))
    return TrainState(jnp.zeros((), jnp.int32), key, meta, ())

  return (jax.vmap(one) if jnp.ndim(key) else one)(key)


@dataclasses.dataclass(frozen=True)
class _TrpoIteration:
  """A `MetaIteration` that calls `trpo_meta_step`. The fields are the options of `trpo_meta_step`."""

  inner: PolicyGradient
  meta_batch: int
  curvature_tasks: int | None
  trpo: TrpoConfig
  placement: Placement

  @property
  def in_turn(self) -> bool:
    return jax.default_backend() == 'cpu'

  def __call__(self, state: TrainState, tasks: TaskDistribution) -> tuple[TrainState, Info]:
    del tasks  # The environment of `inner` samples the tasks.
    key = jax.random.fold_in(state.key, state.step)
    meta, info = trpo_meta_step(state.meta, key, **vars(self))
    info['taken'] = info.pop('step')
    # If the gradient is not finite, meta stays unchanged. The loss is then NaN, so that the failure is visible.
    loss = jnp.where(jnp.isfinite(info['improvement']), -info['return_after'], jnp.nan)
    return TrainState(state.step + 1, state.key, meta, ()), {**info, 'loss': loss}


def train(
  state: TrainState,
  *,
  inner: PolicyGradient,
  meta_iterations: int,
  meta_batch: int = 20,
  curvature_tasks: int | None = None,
  trpo: TrpoConfig = TrpoConfig(),
  placement: Placement = Placement(),
  chunk: int = 10,
  callbacks: Sequence[Callable[[Progress], None]] = (),
  progress: bool | None = None,
) -> TrainState:
  """Runs `trpo_meta_step` from `state` until `meta_iterations` are done, and returns the last state.

  Meta-iteration i is a function of `(state.key, i)` and meta, so a resumed run continues exactly as if it had not been
  interrupted. Callbacks are those of `metasgd_jax.train`. Their `info` is that of `trpo_meta_step`, with two changes.
  The value `step` is called `taken`: the size of the step that was taken, as a fraction of TRPO's full step; see
  `TrpoInfo`. The value `loss` is added: it is the negative of `return_after`, or NaN if the gradient was not finite.

  Args:
    state: State from `init`, of one run or of R runs side by side.
    inner: Inner loop from `policy_gradient`.
    meta_iterations: Number of meta-iterations at which to stop, counted from the beginning of the run. The paper uses
      100.
    meta_batch: Number of tasks in a meta-iteration. The paper uses 20.
    curvature_tasks: Number of tasks from which the Fisher matrix is computed, as in `trpo_meta_step`.
    trpo: Settings of the outer update.
    placement: How the tasks are placed on devices.
    chunk: Number of meta-iterations between callbacks.
    callbacks: Functions that are called in order after each chunk.
    progress: As in `metasgd_jax.train`.

  Raises:
    ValueError: if a count is not an integer of at least 1, if the runs are at different steps, if the state is already
      past `meta_iterations`, or if the devices cannot share the tasks evenly.

  Example:
    >>> inner = ms.rl.policy_gradient(ms.rl.navigation(horizon=5), ms.rl.gaussian(2, 2, hidden=(8,)), trajectories=3)
    >>> state = ms.rl.init(jax.random.key(0), inner)
    >>> show = lambda progress: print(progress.step, 'of', progress.total, sorted(progress.info)[-3:])
    >>> options = dict(meta_batch=2, trpo=ms.rl.TrpoConfig(damping=0.01))
    >>> state = ms.rl.train(state, inner=inner, meta_iterations=2, chunk=1, callbacks=[show], **options)
    1 of 2 ['return_after', 'return_before', 'taken']
    2 of 2 ['return_after', 'return_before', 'taken']
  """
  check_count('meta_batch', meta_batch)
  if curvature_tasks is not None:
    check_count('curvature_tasks', curvature_tasks)
  iteration = _TrpoIteration(inner, int(meta_batch), curvature_tasks, trpo, placement)
  tasks = task_distribution(inner.environment)
  options: Any = dict(meta_iterations=meta_iterations, chunk=chunk, callbacks=callbacks, progress=progress)
  return run_loop(state, tasks, iteration, **options)
