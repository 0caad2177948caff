"""The programs of metasgd_jax that benchmarks compare with other programs."""

import jax
import numpy as np
import optax

import metasgd_jax as ms
from metasgd_jax.outer import host_memory, sharding
from metasgd_jax.outer.placement import TasksAtOnce
from metasgd_jax.types import Tasks


class Run:
  """Meta-training with `metasgd_jax.train`: `run(n)` takes n more meta-iterations from the state of the last call."""

  def __init__(
    self,
    learner: ms.Learner,
    tasks: Tasks,
    num_tasks: int,
    *,
    tasks_at_once: TasksAtOnce = 'auto',
    devices: bool = False,
    chunk: int = 1000,
  ) -> None:
    self.learner, self.tasks, self.num_tasks, self.optimizer = learner, tasks, num_tasks, optax.adam(1e-3)
    self.placement = ms.Placement(tasks_at_once, sharding.task_mesh(num_tasks) if devices else None)
    self.chunk = chunk
    self.state = ms.init(jax.random.key(0), tasks, learner=learner, optimizer=self.optimizer)

  def __call__(self, iterations: int) -> None:
    done = int(self.state.step)
    self.state = ms.train(
      self.state, self.tasks, learner=self.learner, optimizer=self.optimizer, meta_iterations=done + iterations,
      meta_batch=self.num_tasks, placement=self.placement, chunk=self.chunk, progress=False,
    )  # fmt: skip
    if done == 0:
      host_memory.release_freed()  # The compiler has freed hundreds of MiB, which malloc would keep.

  def meta_gradient(self, episodes):
    """Returns the loss and the meta-gradient for episodes `[T, …]`, computed as in training but in float64.

    In float32, two correct programs may differ by several percent, because rounding may change which value max-pooling
    selects.
    """
    count, at_once = len(episodes.query.y), self.placement.tasks_at_once
    at_once = min(at_once, count) if isinstance(at_once, int) else at_once
    keys = jax.random.split(jax.random.key(2), count)
    f = sharding.share_tasks(
      lambda meta, tasks: ms.mean_loss_and_grad(self.learner, meta, *tasks, tasks_at_once=at_once),
      self.placement.mesh,
      average=True,
    )
    with jax.enable_x64(True):
      operands = jax.tree.map(_float64, (jax.device_get(self.state.meta), episodes))
      (loss, _), grads = jax.device_get(jax.jit(f)(operands[0], (operands[1], keys)))
    return float(loss), grads


def _float64(a):
  return np.asarray(a, np.float64) if np.issubdtype(a.dtype, np.floating) else a


def error(a, b) -> float:
  """Returns ‖a − b‖ / ‖b‖, where the norms are over all leaves of a pytree together."""
  flat = lambda tree: np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
  return float(np.linalg.norm(flat(a) - flat(b)) / np.linalg.norm(flat(b)))


def draw(tasks: ms.TaskDistribution, num_tasks: int):
  """Returns `num_tasks` episodes as NumPy arrays `[T, …]`. The same episodes are drawn at each call."""
  keys = jax.random.split(jax.random.key(1), (2, num_tasks))
  return jax.device_get(jax.jit(lambda: jax.vmap(tasks.episode)(jax.vmap(tasks.sample)(keys[0]), keys[1]))())
