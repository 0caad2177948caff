"""What 2 and 8 devices compute, beside 1, as JSON of relative errors; for a process of its own, with 8 virtual devices.

python tests/many_devices.py
"""

import json
import os

os.environ['NPROC'] = '16'

import jax
import numpy as np
import optax
from problems import conv_learner, random_bank, relative_error, sinusoid_learner

import metasgd_jax as ms
from metasgd_jax.outer import fully_sharded

TASKS, STEPS = 8, 5
ADAM = optax.adam(1e-2)


def cast(tree, dtype):
  return jax.tree.map(lambda a: a.astype(dtype) if jax.numpy.issubdtype(a.dtype, jax.numpy.floating) else a, tree)


def problem(kind, dtype):
  """A learner, tasks, and the state before the first meta-iteration, all of a type."""
  if kind == 'conv':
    learner, tasks = conv_learner(way=3), ms.tasks.few_shot(random_bank(size=8), way=3, shot=1, query=2)
  else:
    learner, tasks = sinusoid_learner(hidden=(128, 128) if kind == 'wide' else (8,)), ms.tasks.sinusoid()
  episode = tasks.episode
  tasks = ms.TaskDistribution(tasks.sample, lambda task, key: cast(episode(task, key), dtype))
  state = ms.init(jax.random.key(0), tasks, learner=learner, optimizer=ADAM)
  meta = cast(state.meta, dtype)
  return learner, tasks, state._replace(meta=meta, opt_state=ADAM.init(meta))


def trained(kind, dtype, mesh, **options):
  """The state and the losses after some meta-iterations; Adam's means have the gradients in them."""
  learner, tasks, state = problem(kind, dtype)
  losses = []
  state = ms.train(
    state, tasks, learner=learner, optimizer=ADAM, meta_iterations=STEPS, meta_batch=TASKS, chunk=3,
    placement=ms.Placement(mesh=mesh, **options), callbacks=[lambda progress: losses.append(progress.info['loss'])],
  )  # fmt: skip
  return {'state': (state.meta, state.opt_state), 'losses': losses}


def computed(kind, dtype, mesh):
  """The meta-gradient and the values of unseen tasks too."""
  learner, tasks, state = problem(kind, dtype)
  keys = jax.random.split(jax.random.key(1), (3, TASKS))
  episodes = jax.jit(lambda: jax.vmap(tasks.episode)(jax.vmap(tasks.sample)(keys[0]), keys[1]))()
  shared = ms.sharding.share_tasks(lambda meta, tasks: ms.mean_loss_and_grad(learner, meta, *tasks), mesh, average=True)
  gradient = jax.jit(shared)(state.meta, (episodes, keys[2]))
  values = ms.evaluate(
    learner, state.meta, tasks, jax.random.key(2), metric_fn=ms.losses.mean_squared_error, num_tasks=TASKS, repeats=2,
    placement=ms.Placement(mesh=mesh),
  )  # fmt: skip
  return {**trained(kind, dtype, mesh), 'gradient': gradient, 'values': values}


def errors(several, one):
  return {name: relative_error(*jax.device_get((several[name], one[name]))) for name in one}


def bytes_of_first(tree):
  """Bytes of the arrays' parts on the first device."""
  return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


def main():
  jax.config.update('jax_num_cpu_devices', 8)
  jax.config.update('jax_enable_x64', True)
  jax.config.update('jax_disable_most_optimizations', True)
  mesh = {n: ms.sharding.task_mesh(TASKS, devices=n) for n in (2, 8)}
  found = {}
  for kind, dtype, counts, what in (
    ('sinusoid', np.float64, (2, 8), computed), ('sinusoid', np.float32, (8,), trained),
    ('conv', np.float64, (8,), trained),
  ):  # fmt: skip
    one = what(kind, dtype, None)
    for n in counts:
      found[f'{kind} {np.dtype(dtype).name} {n}'] = errors(what(kind, dtype, mesh[n]), one)
  one = trained('wide', np.float64, None)
  whole = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(one['state'])}
  for n in mesh:
    several = trained('wide', np.float64, mesh[n], shard_meta=True)
    parts = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(several['state'])}
    found[f'wide float64 {n}'] = errors(several, one) | {
      'shares': {
        name: [whole[name].size // part.addressable_shards[i].data.size for i in range(n)]
        for name, part in parts.items()
        if part.size >= fully_sharded.SMALL
      },
      'small': [len({s.data.shape for s in p.addressable_shards} | {p.shape}) for p in parts.values() if p.size < 128],
      'memory': bytes_of_first(several['state']) / bytes_of_first(one['state']),
    }
  print(json.dumps(found))


if __name__ == '__main__':
  main()
