"""Compares the speed of meta-training on 2D navigation, in metasgd_jax and in a peer written with PyTorch.

    python -m benchmarks.navigation

A meta-iteration has 20 tasks. In each task, 20 trajectories of 100 steps are drawn before the inner step, and 20 after
the inner step. The programs draw new tasks in each meta-iteration. The outer optimiser is Adam or TRPO. With Adam, the
rate is also measured as a share of the rate of a product of large matrices, and for trainings that are bound to cores.

Before the timing, both programs compute the following values in float64, for the same trajectories and weights:
advantages, inner gradients, the meta-gradient of the surrogate as TRPO and as Adam take it, the divergence at other
meta-parameters, the product of a vector with the Fisher matrix, and the changes of θ and α by one TRPO step. These
values must be equal. The environments of the peer must also give the same rewards for the same actions.

Each program runs in a separate process, and waits while another program has its turn. Processor seconds are summed over
all threads. If the machine has other work, processor seconds are more reliable than rates.
"""

import functools
import math
import os
import statistics
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

from benchmarks import conv4, ours, timing
from benchmarks.program import Program, all_at_once
from experiments.navigation_training import CURVED
from metasgd_jax import rl
from metasgd_jax.inner.alpha import AlphaConfig
from metasgd_jax.io import provenance
from metasgd_jax.outer import sharding
from metasgd_jax.outer.placement import Placement
from metasgd_jax.rl.meta_step import explore_tasks
from metasgd_jax.rl.navigation import navigation
from metasgd_jax.rl.surrogate import likelihood_ratio

RATE = 0.5
"""Initial rate of the inner step; MAML's released script uses the same value."""
LEARNERS = ('Meta-SGD', 'MAML')
OURS = 'metasgd_jax'
TASKS = 20
MOST_CORES = 8
"""Number of cores on which trainings are timed at the same time."""

_ROUNDS = flags.DEFINE_integer('rounds', 5, 'Number of timed turns of each program.', lower_bound=1)
_LEARNERS = flags.DEFINE_multi_enum('learners', LEARNERS, LEARNERS, 'Learners to time.')
_THREADS = flags.DEFINE_multi_integer(
  'threads', None, "Thread counts of PyTorch to time. By default 1 and PyTorch's own choice."
)
_PARTS = flags.DEFINE_multi_enum(
  'parts', ['adam', 'trpo', 'none'], ['adam', 'trpo', 'none'],
  'What is timed: trainings with Adam, trainings with TRPO, and sampling without updates.',
)  # fmt: skip
_SECONDS = flags.DEFINE_float('seconds', 4.0, 'Approximate duration of a turn, in seconds.', lower_bound=0.1)


def build_inner(learner: str, **environment) -> rl.PolicyGradient:
  """Returns the inner loop of metasgd_jax, with the settings of the paper by default."""
  alpha = RATE if learner == 'MAML' else AlphaConfig(RATE, RATE)
  return rl.policy_gradient(navigation(**environment), rl.gaussian(2, 2), alpha=alpha)


def work(tasks: int = TASKS, steps: int = 2000) -> float:
  """Returns the number of FLOPs of the policy's matrix products in a meta-iteration with Adam.

  A layer from I to J units takes 2·I·J FLOPs for each step of a trajectory, and `steps` is the number of steps before
  the inner step and the number after it. Drawing an action takes one operation of this size. The outer loss takes 3:
  the layer, and the gradients of its kernel and of its input. The inner step takes 9: the same 3, and the derivatives
  of each of them with respect to its two operands. The first layer needs no gradient of its input, and takes 2 and 4.
  """
  sizes = [(2, 100, False), (100, 100, True), (100, 2, True)]
  by_step = sum(2 * i * j * (2 + (3 + 9 if later else 2 + 4)) for i, j, later in sizes)
  return float(by_step * tasks * steps)


def train_with_adam(learner: str, devices: bool = True) -> ours.Run:
  """Returns a training with Adam by `metasgd_jax.train`, on all cores or, without `devices`, on one device."""
  if devices:
    sharding.cpu_cores_as_devices()
  inner = build_inner(learner)
  tasks = rl.task_distribution(inner.environment)
  return ours.Run(rl.policy_learner(inner), tasks, TASKS, tasks_at_once=1, devices=devices, chunk=10)


class WithTrpo:
  """A training with TRPO: `program(n)` takes n meta-iterations on all cores, in one call of a compiled loop.

  If `whole` is False, the program only draws trajectories, takes inner steps and computes advantages.
  """

  def __init__(self, learner: str, whole: bool = True, curvature_tasks: int | None = None) -> None:
    sharding.cpu_cores_as_devices()
    inner, mesh = build_inner(learner), sharding.task_mesh(math.gcd(TASKS, curvature_tasks or TASKS))
    meta_step = functools.partial(
      rl.trpo_meta_step, inner=inner, curvature_tasks=curvature_tasks, placement=Placement(mesh=mesh)
    )
    self.state = sharding.on_all(mesh, (inner.init(jax.random.key(0)), jnp.zeros(())))
    self.key = sharding.on_all(mesh, jax.random.key(1))

    def draw(meta, keys):
      """Draws the trajectories of a meta-iteration and computes their advantages, without the update.

      Returns a scalar that depends on all of them, so that the compiler cannot remove any of this work.
      """
      tasks = jax.vmap(inner.environment.sample)(keys[0])
      (before,), thetas = explore_tasks(inner, meta, tasks, keys[1], 1)
      after = jax.vmap(inner.experience)(thetas, tasks, keys[2])
      return sum(jnp.mean(e.trajectories.log_probs + e.advantages) for e in (before, after))

    def step(i, state, key):
      meta, total = state
      key = jax.random.fold_in(key, i)
      if whole:
        return meta_step(meta, key)[0], total
      keys = tuple(jax.random.split(key, (3, TASKS)))
      return meta, total + sharding.share_tasks(draw, mesh, average=True)(meta, keys)

    self.loop = jax.jit(lambda state, key, n: jax.lax.fori_loop(0, n, lambda i, s: step(i, s, key), state))

  def __call__(self, iterations: int) -> None:
    self.key, key = jax.random.split(self.key)
    self.state = jax.block_until_ready(self.loop(self.state, key, iterations))


def check(learner: str, tasks: int = 3) -> None:
  """Raises AssertionError unless the peer and metasgd_jax compute the same values.

  The tolerance of the goal is ten times larger than usual. Some trajectories then end early, and the check also covers
  such trajectories.
  """
  import torch  # The process of metasgd_jax must not import torch.

  from benchmarks import navigation_peer as peers

  with jax.enable_x64(True):
    inner = build_inner(learner, tolerance=0.1)
    meta, key = inner.init(jax.random.key(0)), jax.random.key(1)
    keys = jax.random.split(key, (3, tasks))  # `trpo_meta_step` splits the key in the same way.
    drawn = jax.vmap(inner.environment.sample)(keys[0])
    (before,), path = jax.jit(jax.vmap(inner.explore, (None, 0, 0)))(meta, drawn, keys[1])
    after = jax.jit(jax.vmap(inner.experience))(path[-1], drawn, keys[2])
    assert not after.trajectories.valid.all(), (
      'no trajectory ended early, so the check would not cover early ends; change the key'
    )
    noise = [jax.random.normal(k, leaf.shape) for k, leaf in zip(_keys(meta), jax.tree.leaves(meta), strict=True)]
    vector = jax.tree.unflatten(jax.tree.structure(meta), noise)
    moved = jax.tree.map(lambda m, v: m + 1e-3 * v, meta, vector)
    parts = jax.jit(functools.partial(_parts, inner))(before, after, meta, moved, vector)
    gradient, divergence, product = jax.device_get(parts)
    learner_keys = drawn, keys[2], keys[1]
    by_loss = jax.device_get(jax.jit(functools.partial(_gradient_for_adam, inner))(meta, *learner_keys))
    step = functools.partial(rl.trpo_meta_step, inner=inner, meta_batch=tasks)
    updated, info = jax.device_get(jax.jit(step)(meta, key))
    assert info['step'] > 0, 'the TRPO step was not taken, so it cannot be compared; change the key'
    inner_gradients = jax.tree.map(lambda t, after: (t - after) / RATE, meta.theta, path[-1])

  peer = peers.Peer([torch.tensor(a) for a in in_torchs_order(meta.theta)], RATE, meta.alpha is not None)
  old_batches, new_batches = ([_batch(peers, e, i) for i in range(tasks)] for e in (before, after))
  for batch in old_batches + new_batches:
    found = peers.advantages(batch.observations, batch.rewards, batch.valid)
    np.testing.assert_allclose(found, batch.advantages, rtol=1e-6, atol=1e-6)
  for i, batch in enumerate(old_batches):
    grads = torch.autograd.grad(peer.inner_loss(peer.theta, batch), peer.theta)
    expected = in_torchs_order(jax.tree.map(lambda g, i=i: g[i], inner_gradients))
    check_close('inner gradient', grads, expected)
  value, own, old = peer.objective(old_batches, new_batches)
  check_close('meta-gradient', torch.autograd.grad(value, peer.params, retain_graph=True), parameters(gradient))
  for old_batch, new_batch in zip(old_batches, new_batches, strict=True):
    peer.add_gradient(peer.adapt(old_batch), new_batch)
  by_adam = [-p.grad.numpy() * peers.TASKS / tasks for p in peer.params]
  check_close('gradient for Adam', by_adam, parameters(by_loss))
  flat = torch.tensor(np.concatenate([np.ravel(a) for a in parameters(vector)]))
  check_close('curvature', [peer.curvature(own)(flat)], [np.concatenate([np.ravel(a) for a in parameters(product)])])
  there = peers.Peer([torch.tensor(a) for a in in_torchs_order(moved.theta)], RATE, meta.alpha is not None)
  with torch.no_grad():
    for a, values in zip(there.alpha, in_torchs_order(moved.alpha) if moved.alpha else [], strict=False):
      a.copy_(torch.tensor(values))
  np.testing.assert_allclose(there.objective(old_batches, new_batches, old)[1].item(), divergence, rtol=1e-6)
  peer.update(old_batches, new_batches)
  start = parameters(jax.device_get(meta))
  changes = [p.detach().numpy() - m for p, m in zip(peer.params, start, strict=True)]
  check_close('TRPO step', changes, [p - m for p, m in zip(parameters(updated), start, strict=True)])
  _check_dynamics(peers)


def _parts(inner, before, after, meta, moved, vector):
  """Returns three values that `trpo_meta_step` computes: a gradient, a divergence and a Fisher product.

  They are the gradient of the surrogate, the divergence between the policies of `meta` and of `moved`, and the product
  of the Fisher matrix with `vector`.
  """
  acted = after.trajectories

  def distributions(meta):
    one = lambda experience, o: inner.policy.apply(inner.replay(meta, (experience,)), o)
    return jax.vmap(one)(before, acted.observations)

  def surrogate(meta):
    return jnp.mean(jax.vmap(functools.partial(inner.surrogate, likelihood_ratio))(distributions(meta), after))

  def kl(p, q):
    return jnp.sum(jnp.where(acted.valid, inner.policy.kl(p, q), 0)) / jnp.sum(acted.valid)

  product = rl.fisher_product(distributions, kl, meta, damping=1e-5)(vector)
  return jax.grad(surrogate)(meta), kl(distributions(meta), distributions(moved)), product


def _gradient_for_adam(inner, meta, drawn, act_keys, explore_keys):
  """Returns the gradient that `metasgd_jax.train` takes of the learner's loss, with the sign of the surrogate."""
  learner, episode = rl.policy_learner(inner), rl.task_distribution(inner.environment).episode

  def loss(meta, task, act_key, explore_key):
    return learner.loss(meta, episode(task, act_key), explore_key)[0]

  mean = lambda meta: -jnp.mean(jax.vmap(loss, (None, 0, 0, 0))(meta, drawn, act_keys, explore_keys))
  return jax.grad(mean)(meta)


def _keys(meta):
  return jax.random.split(jax.random.key(2), len(jax.tree.leaves(meta)))


def _batch(peers, experience, task: int):
  import torch

  trajectories, advantages = jax.device_get(jax.tree.map(lambda a: a[task], experience))
  t = {name: torch.tensor(np.array(getattr(trajectories, name))) for name in peers.Batch._fields[:-1]}
  return peers.Batch(**t, advantages=torch.tensor(np.array(advantages)))


def _check_dynamics(peers) -> None:
  environment = navigation()
  task = environment.sample(jax.random.key(3))
  actions = jax.random.normal(jax.random.key(4), (50, 2))
  body = lambda state, action: (lambda new, reward, end: (new, (new, reward, end)))(
    *environment.step(task, state, action, jax.random.key(0))
  )
  _, expected = jax.lax.scan(body, environment.reset(task, jax.random.key(0)), actions)
  env = peers.Navigation2D()
  env.set_task(np.asarray(task.start), np.asarray(task.goal))
  env.reset()
  for t, action in enumerate(np.asarray(actions)):
    for theirs, found in zip(env.step(action)[:3], expected, strict=True):
      np.testing.assert_allclose(theirs, found[t], atol=1e-5)


def in_torchs_order(tree) -> list[np.ndarray]:
  """Returns the arrays of θ, or of a pytree with θ's structure, in the order of PyTorch.

  The list has the weight and the bias of each layer, and log σ at the end.
  """
  layers = [tree[f'Dense_{i}'] for i in range(3)]
  return [np.array(a) for layer in layers for a in (layer['kernel'].T, layer['bias'])] + [np.array(tree['log_std'])]


def parameters(meta) -> list[np.ndarray]:
  """Returns the arrays of θ and, if α is learned, of α, both in the order of PyTorch."""
  return in_torchs_order(meta.theta) + ([] if meta.alpha is None else in_torchs_order(meta.alpha))


def check_close(what: str, found, expected, limit: float = 1e-6) -> None:
  """Raises AssertionError unless |found − expected| < limit |expected|, over all arrays together."""
  flat = lambda arrays: np.concatenate([np.ravel(np.asarray(a)) for a in arrays])
  error = np.linalg.norm(flat(found) - flat(expected)) / np.linalg.norm(flat(expected))
  assert error < limit, f'{what}: the two programs differ by a relative error of {error:.1e}, more than {limit:.0e}'


def compare_adam(learner: str, threads: list[int]) -> None:
  """Times trainings with Adam in turn: ours bound to a core, one on each core, and on all cores, and the peer's."""
  from benchmarks import navigation_peer as peers

  cores = sorted(os.sched_getaffinity(0))[:MOST_CORES]
  bound = [Program(train_with_adam, learner, False, cores={core}) for core in cores]
  others = {f'{OURS}, one on all cores': Program(train_with_adam, learner), conv4.ROOF: Program(conv4.matrix_product)}
  for count in threads:
    peer = Program(peers.build, learner == 'Meta-SGD', RATE, count, 'adam')
    others[f'torch and Gymnasium, {count} thread(s)'] = peer
  together = f'{OURS}, one on each of {len(cores)} cores'
  at_once = functools.partial(all_at_once, bound)
  programs: dict[str, Callable[[int], object]] = {OURS: bound[0], together: at_once, **others}
  found = timing.rates(programs, seconds=_SECONDS.value, rounds=_ROUNDS.value)
  found[together] = [len(cores) * rate for rate in found[together]]  # The sum of their rates.
  roof = statistics.median(found.pop(conv4.ROOF)) * 2 * conv4.SIDE**3
  share = {name: f'{statistics.median(values) * work() / roof:.0%}' for name, values in found.items()}
  print(f'\nwith Adam; roof of all cores {roof / 1e9:.0f} GFLOP/s, {work() / 1e9:.1f} GFLOP per meta-iteration:\n')
  print(timing.table(found, OURS, {'share of the roof': share}), flush=True)
  for program in [*bound, *others.values()]:
    program.close()


def compare(learner: str, whole: bool, threads: list[int]) -> None:
  """Times the programs with TRPO in turn, or if `whole` is False, only sampling and inner steps."""
  from benchmarks import navigation_peer as peers

  programs = {OURS: Program(WithTrpo, learner, whole)}
  if whole:
    programs[f'{OURS}, curvature from {CURVED} tasks'] = Program(WithTrpo, learner, whole, CURVED)
  for count in threads:
    peer = Program(peers.build, learner == 'Meta-SGD', RATE, count, 'trpo' if whole else 'none')
    programs[f'torch and Gymnasium, {count} thread(s)'] = peer
  found = timing.rates(programs, seconds=_SECONDS.value, rounds=_ROUNDS.value)
  columns = {'processor seconds per iteration': {name: f'{p.cpu():.2g}' for name, p in programs.items()}}
  print('\nwith TRPO:\n' if whole else '\nonly sampling and inner steps, without updates:\n')
  print(timing.table(found, OURS, columns), flush=True)
  for program in programs.values():
    program.close()


def main(argv) -> None:
  """Checks that the programs agree, times them, and prints tables."""
  del argv
  logging.set_verbosity(logging.WARNING)  # JAX logs each platform that it does not find.
  import torch

  threads = _THREADS.value or sorted({1, torch.get_num_threads()})
  for learner in _LEARNERS.value:
    check(learner)
    print(f'\n## {learner}: the programs agree in float64; timing them in turn', flush=True)
    if 'adam' in _PARTS.value:
      compare_adam(learner, threads)
    for part in sorted({'trpo', 'none'} & {*_PARTS.value}):
      compare(learner, part == 'trpo', threads)
  about = provenance.collect()
  print(f'\ntorch {torch.__version__}, {about["versions"]}, {about["device"]}')


if __name__ == '__main__':
  app.run(main)
