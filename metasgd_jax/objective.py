"""The outer objective: the mean query loss over a batch of tasks, and its gradient."""

from typing import Literal, get_args

import chex
import jax
import jax.numpy as jnp

from metasgd_jax.types import Episode, Learner, PyTree

Mapping = Literal['vmap', 'scan']
"""How a batch of tasks is laid over the machine.

`vmap`: all at once; what an accelerator, or a small network, wants.
`scan`: one task at a time, gradients summed; memory of a single task, and on a CPU faster for convolutions (1.4 times,
measured), whose intermediates then stay in cache.
"""


def check_mapping(mapping: str) -> None:
  """Raises ValueError unless `mapping` is a `Mapping`."""
  if mapping not in get_args(Mapping):
    raise ValueError(f'mapping must be one of {get_args(Mapping)}, got {mapping!r}')


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
  """
  losses, info = jax.vmap(learner.loss, (None, 0, 0))(meta, episodes, keys)
  return jnp.mean(losses), jax.tree.map(jnp.mean, info)


def value_and_grad(
  learner: Learner,
  meta: PyTree,
  episodes: Episode,
  keys: chex.PRNGKey,
  *,
  mapping: Mapping = 'vmap',
) -> tuple[tuple[chex.Array, dict[str, chex.Array]], PyTree]:
  """Returns `((loss, info), d loss / d meta)` of `mean_loss`; every mapping gives the same numbers to rounding.

  Raises:
    ValueError: an unknown mapping.
  """
  check_mapping(mapping)
  if mapping == 'vmap':
    return jax.value_and_grad(lambda m: mean_loss(learner, m, episodes, keys), has_aux=True)(meta)

  def body(total, task):
    out, grads = jax.value_and_grad(learner.loss, has_aux=True)(meta, *task)
    return jax.tree.map(jnp.add, total, grads), out

  zeros = jax.tree.map(jnp.zeros_like, meta)
  total, outs = jax.lax.scan(body, zeros, (episodes, keys))
  num_tasks = jax.tree.leaves(episodes)[0].shape[0]
  return jax.tree.map(jnp.mean, outs), jax.tree.map(lambda g: g / num_tasks, total)
