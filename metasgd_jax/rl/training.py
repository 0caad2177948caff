"""Meta-training of policies with TRPO: many meta-iterations in one compiled loop, several seeds side by side."""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from metasgd_jax.outer import sharding
from metasgd_jax.outer.training import Progress, TrainState, check_key, repeat
from metasgd_jax.rl.learner import PolicyGradient
from metasgd_jax.rl.meta_step import trpo_meta_step
from metasgd_jax.types import check_count


def init(key: chex.PRNGKey, inner: PolicyGradient) -> TrainState:
  """Returns the state before the first meta-iteration, of one run; of R runs side by side for R keys.

  Args:
    key: `[]` or `[R]`; becomes the run's key, and meta is drawn from it.
    inner: from `policy_gradient`.

  Raises:
    ValueError: a key of the old kind (`jax.random.PRNGKey`) or of another rank.

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


def train(
  state: TrainState,
  *,
  inner: PolicyGradient,
  meta_iterations: int,
  meta_batch: int = 20,
  chunk: int = 10,
  callbacks: Sequence[Callable[[Progress], None]] = (),
  mesh: Mesh | None = None,
  **trpo: Any,
) -> TrainState:
  """Runs `trpo_meta_step` from `state` until `meta_iterations` are done; returns the last state.

  Meta-iteration i is a function of (state.key, i) and meta, so a run goes on from its state exactly. Callbacks are as
  those of `metasgd_jax.train`; `info` has `loss` too, the negative of `return_after`, or NaN where the gradient was not
  finite, and calls TRPO's share of a step `taken`.

  Args:
    state: from `init`, of one run or of R.
    inner: from `policy_gradient`.
    meta_iterations: where to stop, counted from the run's beginning; the paper's 100.
    meta_batch: tasks in a meta-iteration; the paper's 20.
    chunk: meta-iterations between callbacks.
    callbacks: called in order.
    mesh: shares each meta-iteration's tasks over its devices; see `sharding.task_mesh`.
    **trpo: options of `trpo_meta_step`.

  Raises:
    ValueError: a count that is no integer of at least 1, a state that is already past `meta_iterations`, a mesh that
      cannot share the tasks evenly, or values that `trpo_meta_step` does not take.
    TypeError: an option that `trpo_meta_step` does not know.

  Example:
    >>> inner = ms.rl.policy_gradient(ms.rl.navigation(horizon=5), ms.rl.gaussian(2, 2, hidden=(8,)), trajectories=3)
    >>> state = ms.rl.init(jax.random.key(0), inner)
    >>> show = lambda progress: print(progress.step, 'of', progress.total, sorted(progress.info)[-3:])
    >>> state = ms.rl.train(
    ...   state, inner=inner, meta_iterations=2, meta_batch=2, chunk=1, callbacks=[show], damping=0.01
    ... )
    1 of 2 ['return_after', 'return_before', 'taken']
    2 of 2 ['return_after', 'return_before', 'taken']
  """
  for name, value in (('meta_iterations', meta_iterations), ('meta_batch', meta_batch), ('chunk', chunk)):
    check_count(name, value)
  done = before = int(np.max(state.step))
  if done > meta_iterations:
    raise ValueError(f'the state has done {done} meta-iterations, more than meta_iterations={meta_iterations}')
  options = tuple(sorted(trpo.items()))
  run = functools.partial(
    _run_chunk, inner=inner, meta_batch=int(meta_batch), chunk=int(chunk), mesh=mesh, trpo=options
  )
  seen = functools.partial(sharding.on_one, mesh)
  state = sharding.on_all(mesh, state)
  if done < meta_iterations:
    jax.block_until_ready(run(state, 0))  # Compiled with a chunk of no steps, so that this is not timed.
  seconds = 0.0
  while done < meta_iterations:
    n = min(chunk, meta_iterations - done)
    start = time.perf_counter()
    state, info = jax.block_until_ready(run(state, n))
    seconds += time.perf_counter() - start
    done += n
    info = {name: np.asarray(values)[:n] for name, values in info.items()}
    progress = Progress(seen(state), done, meta_iterations, info, seconds, (done - before) / seconds)
    for callback in callbacks:
      callback(progress)
  return seen(state)


@functools.partial(jax.jit, static_argnames=('inner', 'meta_batch', 'chunk', 'mesh', 'trpo'))
def _run_chunk(state, n, *, inner, meta_batch, chunk, mesh, trpo):
  def one(state):
    key = jax.random.fold_in(state.key, state.step)
    meta, info = trpo_meta_step(state.meta, key, inner=inner, meta_batch=meta_batch, mesh=mesh, **dict(trpo))
    info['taken'] = info.pop('step')
    # A gradient that is not finite leaves no mark on meta; the loss tells of it.
    loss = jnp.where(jnp.isfinite(info['improvement']), -info['return_after'], jnp.nan)
    return TrainState(state.step + 1, state.key, meta, ()), {**info, 'loss': loss}

  done = repeat(one, state, n, chunk, in_turn=jax.default_backend() == 'cpu')
  return done if mesh is None else jax.lax.with_sharding_constraint(done, NamedSharding(mesh, PartitionSpec()))
