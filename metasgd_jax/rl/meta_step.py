"""A meta-iteration of Meta-SGD or MAML for a policy, with TRPO: Algorithm 2 of Li et al. 2017."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from metasgd_jax.outer.loop import check_key
from metasgd_jax.outer.placement import Placement
from metasgd_jax.outer.sharding import mean_over, share_tasks
from metasgd_jax.rl.learner import Experience, PolicyGradient, act_again, mean_return
from metasgd_jax.rl.surrogate import likelihood_ratio
from metasgd_jax.rl.trpo import TrpoConfig, fisher_product, trpo_update
from metasgd_jax.types import MetaParams, PyTree, check_count


def trpo_meta_step(
  meta: MetaParams,
  key: chex.PRNGKey,
  *,
  inner: PolicyGradient,
  meta_batch: int = 20,
  curvature_tasks: int | None = None,
  trpo: TrpoConfig = TrpoConfig(),
  placement: Placement = Placement(),
) -> tuple[MetaParams, dict[str, chex.Array]]:
  """Returns the new meta and a dict of scalars after one meta-iteration with TRPO (Li et al. 2017, Algorithm 2).

  The meta-iteration samples tasks. In each task, the policy adapts on trajectories of θ and then draws trajectories of
  θ′. Then one `trpo_update` changes θ and α together, or only θ if α is fixed. The surrogate is TRPO's surrogate on the
  trajectories after adapting, averaged over tasks. The surrogate depends on meta through the inner steps. The
  divergence is KL(old ‖ new), where old and new are the policies that adapt from the old and from the new meta. It is
  averaged over the valid steps of all tasks, as in MAML's released code.

  Many meta-iterations can be compiled together:
  `jax.jit(lambda meta, keys: jax.lax.scan(functools.partial(trpo_meta_step, inner=inner), meta, keys))`.

  Args:
    meta: Meta-parameters from `inner.init`.
    key: Random key, consumed. It is split into keys `[3, meta_batch]`: for each task one to sample the task, one to
      adapt in the task, and one to act in the task after adapting.
    inner: Inner loop from `policy_gradient`.
    meta_batch: Number of tasks T. The paper uses 20.
    curvature_tasks: Number of tasks from which the Fisher matrix F is computed. By default all tasks are used. The
      products with F are nearly all of the work, and TRPO computes them from a part of the data (Schulman et al. 2015,
      appendix C). The bound on the divergence is checked on all tasks.
    trpo: Settings of the outer update.
    placement: How the tasks are placed on devices. A meta-iteration with a mesh must be jitted. The trajectories of all
      tasks are stepped together, and `tasks_at_once` is the number of tasks whose inner steps are computed at the same
      time. With 'auto' it is 1 on a CPU, whose cache has space for one task, and the number of all tasks otherwise.

  Returns:
    The new meta, and a dict of scalars. `return_before` and `return_after` are the mean undiscounted returns before and
    after adapting, in the environment's units, for the meta that was passed in. `improvement`, `kl` and `step` describe
    the TRPO step; see `TrpoInfo`.

  Raises:
    ValueError: if `meta_batch`, `tasks_at_once` or `curvature_tasks` is not an integer of at least 1, if
      `curvature_tasks` is greater than `meta_batch`, if the devices of the mesh cannot share `meta_batch` or
      `curvature_tasks` tasks evenly, or if the key is of a kind that `init` refuses.

  Example:
    >>> inner = ms.rl.policy_gradient(ms.rl.navigation(horizon=5), ms.rl.gaussian(2, 2, hidden=(8,)), trajectories=3)
    >>> options = dict(inner=inner, meta_batch=2, trpo=ms.rl.TrpoConfig(damping=0.01))
    >>> step = jax.jit(lambda meta, key: ms.rl.trpo_meta_step(meta, key, **options))
    >>> meta, info = step(inner.init(jax.random.key(0)), jax.random.key(1))
    >>> sorted(info)
    ['improvement', 'kl', 'return_after', 'return_before', 'step']
    >>> bool(info['kl'] <= 0.01)
    True
  """
  check_key(key)
  curved = meta_batch if curvature_tasks is None else curvature_tasks
  for name, count in (('meta_batch', meta_batch), ('curvature_tasks', curved)):
    check_count(name, count)
  if curved > meta_batch:
    raise ValueError(f'curvature_tasks must be at most meta_batch={meta_batch}, got {curved}; lower curvature_tasks')
  placement.check(meta_batch)
  check_curvature(placement.mesh, curved)
  step = functools.partial(
    _step_on_device,
    inner=inner,
    trpo=trpo,
    curved=None if curved == meta_batch else curved // placement.devices,
    tasks_at_once=placement.at_once(meta_batch, large=True),
    axis=placement.mesh.axis_names[0] if placement.mesh else None,
  )
  keys = tuple(jax.random.split(key, (3, meta_batch)))
  return share_tasks(step, placement.mesh, average=True)(meta, keys)


def _step_on_device(meta, keys, *, inner, trpo, curved, tasks_at_once, axis):
  """Returns the new meta and the info of a meta-iteration, computed for the tasks of one device.

  `curved` is the number of these tasks from which the Fisher matrix is computed. With `None` all of them are used.
  """
  tasks = jax.vmap(inner.environment.sample)(keys[0])
  experiences, thetas = explore_tasks(inner, meta, tasks, keys[1], tasks_at_once)
  after = jax.vmap(inner.experience)(thetas, tasks, keys[2])
  acted, collected = after.trajectories, (experiences, after)
  part = _spread(len(keys[0]), len(keys[0]) if curved is None else curved)

  # Mean number of valid steps per device, for all tasks and for the curvature tasks. Each device divides its sum of
  # divergences by this number, so that the mean over devices is the mean over the valid steps of all devices. All
  # later reductions include the counts. The reductions are thus chained by a data dependency, because concurrent
  # collectives can deadlock on CPU devices.
  counts = [jnp.sum(valid, dtype=acted.rewards.dtype) for valid in (acted.valid, acted.valid[part])]
  if axis:
    counts = mean_over(counts, axis)

  def mean(tree):
    return mean_over((tree, counts), axis)[0] if axis else tree

  distributions = functools.partial(_distributions, inner, tasks_at_once)
  fisher = None
  if curved is not None:
    kl = functools.partial(_mean_kl, inner, acted.valid[part], counts[1])
    some = jax.tree.map(lambda leaf: leaf[part], collected)
    fisher = fisher_product(functools.partial(distributions, some), kl, meta, damping=trpo.damping)
  meta, update = trpo_update(
    meta,
    distributions=functools.partial(distributions, collected),
    surrogate=functools.partial(_mean_surrogate, inner, after),
    kl=functools.partial(_mean_kl, inner, acted.valid, counts[0]),
    gradient=functools.partial(_gradient, inner, tasks_at_once, collected),
    fisher=fisher,
    mean=mean,
    config=trpo,
  )
  before = experiences[0].trajectories if experiences else acted
  returns = {'return_before': mean_return(before), 'return_after': mean_return(acted)}
  return meta, {**returns, **update._asdict()}


def _adapted_distributions(inner, meta, collected):
  """Returns the action distributions of the policy adapted to one task, which JAX can differentiate by meta."""
  experiences, after = collected
  return act_again(inner.policy, inner.replay(meta, experiences), after)


def _distributions(inner, tasks_at_once, collected, meta):
  return _map_tasks(functools.partial(_adapted_distributions, inner, meta), collected, tasks_at_once)


def _mean_surrogate(inner, after, distributions):
  return jnp.mean(jax.vmap(functools.partial(inner.surrogate, likelihood_ratio))(distributions, after))


def _gradient(inner, tasks_at_once, collected, meta):
  """Returns ((surrogate, distributions), gradient), where the surrogate and the gradient are means over tasks.

  Each task is differentiated separately, so that its intermediates are not kept while the next task is computed.
  """

  def surrogate(meta, collected):
    distributions = _adapted_distributions(inner, meta, collected)
    return inner.surrogate(likelihood_ratio, distributions, collected[1]), distributions

  gradient = functools.partial(jax.value_and_grad(surrogate, has_aux=True), meta)
  (values, distributions), gradients = _map_tasks(gradient, collected, tasks_at_once)
  value, gradient = jax.tree.map(lambda leaf: jnp.mean(leaf, 0), (values, gradients))
  return (value, distributions), gradient


def _mean_kl(inner, valid, count, old, new):
  return jnp.sum(jnp.where(valid, inner.policy.kl(old, new), 0)) / count


def check_curvature(mesh: Mesh | None, curvature_tasks: int) -> None:
  """Raises ValueError if there is a mesh whose devices cannot share `curvature_tasks` evenly."""
  if mesh and curvature_tasks % mesh.size:
    raise ValueError(
      f'curvature_tasks={curvature_tasks} cannot be shared evenly by {mesh.size} devices; '
      f'take a multiple of {mesh.size}'
    )


def explore_tasks(
  inner: PolicyGradient, meta: MetaParams, tasks: PyTree, keys: chex.PRNGKey, tasks_at_once: int
) -> tuple[tuple[Experience, ...], PyTree]:
  """Returns the experiences and the last θ of `inner.explore` for T tasks and keys `[T]`. Every leaf is `[T, …]`.

  The trajectories of all tasks are sampled at the same time. The inner steps are computed for only `tasks_at_once`
  tasks at the same time, because this is faster on a CPU.
  """
  thetas, experiences = jax.tree.map(lambda t: jnp.broadcast_to(t, (len(keys), *t.shape)), meta.theta), []
  split = jax.vmap(functools.partial(jax.random.split, num=inner.steps), out_axes=1)(keys)
  for i in range(inner.steps):
    experiences.append(jax.vmap(inner.experience)(thetas, tasks, split[i]))
    step = functools.partial(_inner_step, inner, meta, i)
    thetas = _map_tasks(step, (thetas, experiences[-1]), tasks_at_once)
  return tuple(experiences), thetas


def _inner_step(inner, meta, i, task):
  theta, experience = task
  return inner.step(meta, theta, experience, i)


def _map_tasks(function, tasks, tasks_at_once: int):
  """Returns the results of a function for all tasks, computed for `tasks_at_once` tasks at the same time."""
  return jax.lax.map(function, tasks, batch_size=tasks_at_once if tasks_at_once > 1 else None)


def _spread(total: int, count: int) -> np.ndarray:
  """Returns `count` evenly spaced indices below `total`.

  Each device has `total` tasks, and computes the Fisher matrix from those with these indices, its curvature tasks.
  Because of the even spacing, the curvature tasks of all devices together are the same for any number of devices.
  """
  return np.arange(count) * total // count
