"""The outer objective: the mean query loss over a batch of tasks, and its gradient."""

from typing import Literal

import chex
import jax
import jax.numpy as jnp
import numpy as np

from metasgd_jax.types import Episode, Learner, PyTree

Mapping = Literal['auto', 'vmap', 'scan'] | int
"""How a batch of tasks is laid over one device; every way gives the same numbers, to rounding.

`vmap`: all at once. What a small network wants, and most likely an accelerator; memory grows with the tasks.
`scan`: one after the other, gradients summed; the memory of a single task, which then stays in a CPU's cache.
an integer g: groups of g at once, one group after the other; the memory of g tasks.
`auto`: `scan` on a CPU for meta-parameters of `LARGE` entries or more, `vmap` otherwise.
"""

LARGE = 20_000
"""Entries of meta-parameters from which 'auto' takes one task after the other on a CPU.

Measured were an MLP of 3,500, which is faster all at once, and Conv4 of 57,000 and of 220,000, which is not.
"""


def check_mapping(mapping: Mapping) -> None:
  """Raises ValueError unless `mapping` is a `Mapping`."""
  if isinstance(mapping, int | np.integer) and not isinstance(mapping, bool) and mapping >= 1:
    return
  if mapping not in ('auto', 'vmap', 'scan') or isinstance(mapping, bool):
    raise ValueError(f"mapping must be 'auto', 'vmap', 'scan' or a number of tasks of at least 1, got {mapping!r}")


def tasks_at_once(mapping: Mapping, meta: PyTree, num_tasks: int) -> int:
  """Returns how many of a device's `num_tasks` are laid out at the same time: 1 to num_tasks.

  Raises:
    ValueError: an unknown mapping, or groups that num_tasks is no multiple of.
  """
  check_mapping(mapping)
  if mapping == 'auto':
    entries = sum(leaf.size for leaf in jax.tree.leaves(meta))
    mapping = 'scan' if jax.default_backend() == 'cpu' and entries >= LARGE else 'vmap'
  group = num_tasks if mapping == 'vmap' else 1 if mapping == 'scan' else mapping
  if group > num_tasks or num_tasks % group:
    raise ValueError(f'{num_tasks} tasks on a device cannot be split into groups of mapping={group}; take a divisor')
  return group


def mean_loss(
  learner: Learner, meta: PyTree, episodes: Episode, keys: chex.PRNGKey
) -> tuple[chex.Array, dict[str, chex.Array]]:
  """Returns (1/T) Σ_i L_query(T_i)(θ_i′) and the mean of every info entry.

  Algorithm 1's objective (Li et al. 2017), as a mean where the paper writes a sum, so that the learning rate does
  not depend on T.

  Args:
    learner: the learner.
    meta: its meta-parameters.
    episodes: leaves `[T, …]`.
    keys: `[T]`, one a task; consumed.

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


def value_and_grad(
  learner: Learner,
  meta: PyTree,
  episodes: Episode,
  keys: chex.PRNGKey,
  *,
  mapping: Mapping = 'auto',
) -> tuple[tuple[chex.Array, dict[str, chex.Array]], PyTree]:
  """Returns `((loss, info), d loss / d meta)` of `mean_loss`.

  Args:
    learner: the learner.
    meta: its meta-parameters.
    episodes: leaves `[T, …]`.
    keys: `[T]`, one a task; consumed.
    mapping: how tasks are laid over the device; see `Mapping`.

  Raises:
    ValueError: an unknown mapping, or groups that T is no multiple of.

  Example:
    >>> tasks = ms.tasks.sinusoid(shot=5)
    >>> learner = ms.meta_sgd(ms.nn.from_linen(ms.nn.MLP()), ms.losses.mean_squared_error)
    >>> keys = jax.random.split(jax.random.key(0), 4)
    >>> episodes = jax.vmap(tasks.episode)(jax.vmap(tasks.sample)(keys), keys)  # Leaves [T, …].
    >>> meta = learner.init(jax.random.key(1), jax.tree.map(lambda a: a[0], episodes))
    >>> (loss, info), gradient = ms.value_and_grad(learner, meta, episodes, keys)
    >>> jax.tree.structure(gradient) == jax.tree.structure(meta)
    True
  """
  check_mapping(mapping)
  num_tasks = jax.tree.leaves(episodes)[0].shape[0]
  group = tasks_at_once(mapping, meta, num_tasks)
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
