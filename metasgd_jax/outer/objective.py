"""The outer objective: the mean query loss over a batch of tasks, and its gradient."""

import chex
import jax
import jax.numpy as jnp

from metasgd_jax.outer.placement import Placement, TasksAtOnce
from metasgd_jax.tree import named
from metasgd_jax.types import Episode, Learner, PyTree


def mean_loss(
  learner: Learner, meta: PyTree, episodes: Episode, keys: chex.PRNGKey
) -> tuple[chex.Array, dict[str, chex.Array]]:
  """Returns `(loss, info)`: (1/T) Σ_i L_query(T_i)(θ_i′), and the task means of all entries of the learner's info.

  This is the objective of Algorithm 1 (Li et al. 2017). The paper writes a sum over the tasks. Here it is a mean, so
  that the size of the gradient does not grow with T.

  Args:
    learner: Learner.
    meta: Meta-parameters of the learner.
    episodes: Episodes of T tasks, a pytree with leaves `[T, …]`.
    keys: Random keys `[T]`, one per task, consumed.

  Example:
    >>> tasks = ms.tasks.sinusoid(shot=5)
    >>> learner = ms.meta_sgd(ms.nn.from_linen(ms.nn.MLP()), ms.losses.mean_squared_error)
    >>> keys = jax.random.split(jax.random.key(0), 4)
    >>> episodes = jax.vmap(tasks.episode)(jax.vmap(tasks.sample)(keys), keys)  # Leaves [T, …].
    >>> meta = learner.init(jax.random.key(1), jax.tree.map(lambda a: a[0], episodes))
    >>> loss, info = ms.mean_loss(learner, meta, episodes, keys)
    >>> loss.shape, info
    ((), {})
  """
  losses, info = jax.vmap(learner.loss, (None, 0, 0))(meta, episodes, keys)
  return jnp.mean(losses), jax.tree.map(jnp.mean, info)


def mean_loss_and_grad(
  learner: Learner,
  meta: PyTree,
  episodes: Episode,
  keys: chex.PRNGKey,
  *,
  tasks_at_once: TasksAtOnce = 'auto',
) -> tuple[tuple[chex.Array, dict[str, chex.Array]], PyTree]:
  """Returns `((loss, info), d loss / d meta)` for the loss and info of `mean_loss`.

  Args:
    learner: Learner.
    meta: Meta-parameters of the learner.
    episodes: Episodes of T tasks, a pytree with leaves `[T, …]`.
    keys: Random keys `[T]`, one per task, consumed.
    tasks_at_once: Number of tasks that are computed at the same time; see `Placement`.

  Raises:
    ValueError: if a meta-parameter is not floating-point, if `tasks_at_once` is not a value that `Placement` allows, or
      if it does not divide T.

  Example:
    >>> tasks = ms.tasks.sinusoid(shot=5)
    >>> learner = ms.meta_sgd(ms.nn.from_linen(ms.nn.MLP()), ms.losses.mean_squared_error)
    >>> keys = jax.random.split(jax.random.key(0), 4)
    >>> episodes = jax.vmap(tasks.episode)(jax.vmap(tasks.sample)(keys), keys)  # Leaves [T, …].
    >>> meta = learner.init(jax.random.key(1), jax.tree.map(lambda a: a[0], episodes))
    >>> (loss, info), gradient = ms.mean_loss_and_grad(learner, meta, episodes, keys)
    >>> jax.tree.structure(gradient) == jax.tree.structure(meta)
    True
  """
  for name, leaf in named(meta):
    if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
      raise ValueError(
        f'{name} must be floating-point to be learned, got {leaf!r:.80}; give a floating-point number, such as 1.0'
      )
  placement = Placement(tasks_at_once)
  num_tasks = jax.tree.leaves(episodes)[0].shape[0]
  group = placement.group(meta, num_tasks)
  if group == num_tasks > 1:
    return jax.value_and_grad(lambda m: mean_loss(learner, m, episodes, keys), has_aux=True)(meta)

  def of_group(tasks):
    if group > 1:
      return jax.value_and_grad(lambda m: mean_loss(learner, m, *tasks), has_aux=True)(meta)
    return jax.value_and_grad(learner.loss, has_aux=True)(meta, *tasks)

  def body(total, tasks):
    out, grads = of_group(tasks)
    return jax.tree.map(jnp.add, total, grads), out

  groups = (episodes, keys)
  if group > 1:
    groups = jax.tree.map(lambda a: a.reshape(-1, group, *a.shape[1:]), groups)
  total, outs = jax.lax.scan(body, jax.tree.map(jnp.zeros_like, meta), groups)
  return jax.tree.map(jnp.mean, outs), jax.tree.map(lambda g: g / (num_tasks // group), total)
