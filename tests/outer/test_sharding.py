"""Tasks over two devices: as one device has it, whatever JAX does with what is the same everywhere."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec
from problems import assert_trees_close, conv_learner, random_bank, saying, sinusoid_learner

import metasgd_jax as ms
from metasgd_jax.io.checkpoint import Checkpoints

TASKS = ms.tasks.sinusoid()
ADAM = optax.adam(1e-2)


def train(state, mesh, **options):
  return ms.train(state, TASKS, optimizer=ADAM, placement=ms.Placement(mesh=mesh), **options)


@pytest.mark.parametrize(
  ('kind', 'at_once'),
  [
    ('sinusoid', 'all'),
    ('sinusoid', 1),
    *[pytest.param('conv', at_once, marks=pytest.mark.slow) for at_once in (1, 'all')],
  ],
)
def test_training_over_devices_equals_one_device(kind, at_once):
  assert_devices_train_as_one(kind, at_once)


@pytest.mark.slow
def test_optimized_training_over_devices_equals_one_device(optimized):
  assert_devices_train_as_one('sinusoid', 'all')


def assert_devices_train_as_one(kind, at_once):
  if kind == 'sinusoid':
    learner, tasks = sinusoid_learner(hidden=(8,)), TASKS
  else:
    learner, tasks = conv_learner(way=3), ms.tasks.few_shot(random_bank(), way=3, shot=1, query=2)
  state = ms.init(jax.random.key(0), tasks, learner=learner, optimizer=ADAM)
  seen = []
  train = lambda mesh: ms.train(
    state, tasks, learner=learner, optimizer=ADAM, meta_iterations=4, meta_batch=4, chunk=3,
    placement=ms.Placement(at_once, mesh),
    callbacks=[lambda p: seen.append(p.info['loss'])],
  )  # fmt: skip
  mesh = ms.sharding.task_mesh(4)
  assert mesh.size == 2
  alone, shared = train(None), train(mesh)
  assert_trees_close(alone.meta, shared.meta, rtol=1e-3, atol=1e-4)
  np.testing.assert_allclose(np.concatenate(seen[:2]), np.concatenate(seen[2:]), rtol=1e-4)
  assert len(jax.tree.leaves(shared.meta)[0].devices()) == 1


def test_each_device_adapts_to_its_own_tasks():
  """The trap: inside shard_map, with θ the same everywhere, jax.grad sums the inner gradients over the devices."""
  mesh = ms.sharding.task_mesh(4)
  inner = lambda theta, x: jax.grad(lambda t: jnp.sum(t * x))(theta)
  tasks = jnp.arange(1.0, 5.0)

  def of_tasks(theta, tasks):
    return jax.lax.map(lambda x: inner(theta, x), tasks)

  got = jax.jit(ms.sharding.share_tasks(of_tasks, mesh, average=False))(jnp.float32(1.0), tasks)
  assert np.array_equal(got, tasks)
  trapped = jax.shard_map(
    of_tasks, mesh=mesh, in_specs=(PartitionSpec(), PartitionSpec('tasks')), out_specs=PartitionSpec('tasks')
  )
  summed = tasks.reshape(2, 2).sum(0)  # Each device's first task with the other's first, and so on.
  assert np.array_equal(jax.jit(trapped)(jnp.float32(1.0), tasks), jnp.tile(summed, 2))


def test_a_users_own_gradient_over_devices():
  learner, mesh = sinusoid_learner(hidden=(8,)), ms.sharding.task_mesh(4)
  f = lambda meta, tasks: ms.mean_loss_and_grad(learner, meta, *tasks)

  @jax.jit
  def both(key):
    keys = jax.random.split(key, (3, 4))
    batch = jax.vmap(TASKS.episode)(jax.vmap(TASKS.sample)(keys[0]), keys[1])
    meta = learner.init(key, jax.tree.map(lambda a: a[0], batch))
    tasks = batch, keys[2]
    return ms.sharding.share_tasks(f, mesh, average=True)(meta, tasks), f(meta, tasks)

  assert_trees_close(*jax.device_get(both(jax.random.key(0))), rtol=1e-4, atol=1e-6)


def test_runs_side_by_side_over_devices():
  learner = sinusoid_learner(hidden=(8,))
  state = ms.init(jax.random.split(jax.random.key(0), 3), TASKS, learner=learner, optimizer=ADAM)
  results = [
    ms.train(
      state, TASKS, learner=learner, optimizer=ADAM, meta_iterations=5, meta_batch=4, placement=ms.Placement(mesh=mesh)
    )
    for mesh in (None, ms.sharding.task_mesh(4))
  ]
  assert_trees_close(*(r.meta for r in results), rtol=1e-3, atol=1e-5)


def test_a_mesh_has_as_many_devices_as_share_the_tasks():
  assert ms.sharding.task_mesh(5) is None
  mesh, learner = ms.sharding.task_mesh(2), sinusoid_learner(hidden=(8,))
  state = ms.init(jax.random.key(0), TASKS, learner=learner, optimizer=ADAM)
  with pytest.raises(ValueError, match=saying('3 tasks', '2 devices', 'a multiple of 2')):
    ms.train(
      state, TASKS, learner=learner, optimizer=ADAM, meta_iterations=1, meta_batch=3, placement=ms.Placement(mesh=mesh)
    )
  with pytest.raises(ValueError, match=saying('devices', 'from 1 to 2', 'got 3')):
    ms.sharding.task_mesh(3, devices=3)
  with pytest.raises(ValueError, match=saying('3 tasks', '2 devices', 'a multiple of 2')):
    ms.sharding.task_mesh(3, devices=2)
  assert ms.sharding.task_mesh(4, devices=1) is None
  both = jax.make_mesh((1, 2), ('a', 'b'))
  with pytest.raises(ValueError, match=saying('mesh', 'one axis', "got ('a', 'b')")):
    ms.sharding.check_mesh(both, 2)


@pytest.mark.parametrize(
  ('before', 'expected'),
  [
    ('pass', len(os.sched_getaffinity(0))),
    pytest.param("jax.config.update('jax_num_cpu_devices', 3)", 3, marks=pytest.mark.slow),
    pytest.param(
      "import os; os.environ['XLA_FLAGS'] = '--xla_force_host_platform_device_count=5'", 5, marks=pytest.mark.slow
    ),
  ],
)
def test_cores_become_devices_unless_their_number_is_set(before, expected):
  code = f"import jax, metasgd_jax as ms; {before}; ms.sharding.cpu_cores_as_devices(); print(jax.device_count('cpu'))"
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
  assert int(done.stdout) == expected


@pytest.mark.parametrize(('given', 'expected'), [('', 4), ('0', 4), ('2', 4), ('many', 4), ('9', 9)])
def test_each_device_has_two_threads(given, expected, monkeypatch):
  monkeypatch.setenv('NPROC', given)
  monkeypatch.setattr(ms.sharding, '_cores', lambda: 1)
  ms.sharding.cpu_cores_as_devices()
  assert os.environ['NPROC'] == str(expected)


def test_devices_with_too_few_threads_are_warned_of(monkeypatch):
  monkeypatch.setenv('NPROC', '3')
  with pytest.warns(UserWarning, match=saying('2 CPU devices', '3 threads', 'cpu_cores_as_devices()', 'NPROC=4')):
    ms.sharding.task_mesh(2)


def test_a_train_state_is_gathered_and_can_be_saved(tmp_path):
  """With its key, of which NumPy knows none."""
  state = ms.init(jax.random.key(0), TASKS, learner=sinusoid_learner(hidden=(8,)), optimizer=ADAM)
  found = ms.sharding.gathered(ms.sharding.on_all(ms.sharding.task_mesh(2, devices=2), state))
  assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(found._replace(key=None)))
  assert found.key == state.key
  with Checkpoints(tmp_path, like=state, config={}) as kept:
    kept.save(found)
  with Checkpoints(tmp_path, like=state, config={}) as kept:
    assert_trees_close(jax.random.key_data(kept.latest.state.key), jax.random.key_data(state.key), rtol=0, atol=0)
    assert_trees_close(kept.latest.state.meta, state.meta, rtol=0, atol=0)
