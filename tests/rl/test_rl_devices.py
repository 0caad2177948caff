"""TRPO's meta-iteration with its tasks shared by two devices."""

import functools
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from aiming import light
from problems import assert_trees_close, saying

import metasgd_jax as ms
from metasgd_jax import rl

INNER = light()


def test_training_on_two_devices_is_training_on_one():
  """By the curvature of a part of the tasks; twice, so that the second step starts from what the first one left."""
  inner = light(steps=0, alpha=0.1)  # A step is cheap to compile where there is no inner one; tasks are shared alike.
  mesh, seen = ms.sharding.task_mesh(4), []
  assert mesh.size == 2
  with jax.enable_x64(True):
    start = jax.jit(lambda: rl.init(jax.random.key(0), inner))()
    one, several = (
      rl.train(
        start, inner=inner, meta_iterations=2, meta_batch=4, chunk=1, curvature_tasks=2,
        trpo=rl.TrpoConfig(damping=0.01),
        placement=ms.Placement(mesh=devices),
        callbacks=[lambda progress: seen.append(progress.info)],
      )
      for devices in (None, mesh)
    )  # fmt: skip
    assert one.meta.theta['log_std'].dtype == np.float64
    assert all(len(leaf.devices()) == 1 for leaf in jax.tree.leaves(several))
    assert int(several.step) == 2
    assert all(info['taken'] > 0 for info in seen)
    assert_trees_close(several.meta, one.meta, rtol=1e-9)
    assert_trees_close(seen[2:], seen[:2], rtol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize('curvature_tasks', [4, 2])
def test_two_devices_take_the_step_that_one_takes(curvature_tasks):
  with jax.enable_x64(True):
    meta, key = jax.jit(INNER.init)(jax.random.key(0)), jax.random.key(1)
    options = dict(inner=INNER, meta_batch=4, curvature_tasks=curvature_tasks, trpo=rl.TrpoConfig(damping=0.01))
    one, several = (
      jax.jit(functools.partial(rl.trpo_meta_step, placement=ms.Placement(mesh=mesh), **options))(meta, key)
      for mesh in (None, ms.sharding.task_mesh(4))
    )
    assert one[1]['step'] > 0
    assert_trees_close(several, one, rtol=1e-9)


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    (dict(meta_batch=3), ['3 tasks', 'evenly', '2 devices']),
    (dict(meta_batch=4, curvature_tasks=3), ['curvature_tasks=3', '2 devices', 'multiple of 2']),
  ],
)
def test_tasks_that_cannot_be_shared(options, message):
  with pytest.raises(ValueError, match=saying(*message)):
    rl.trpo_meta_step(
      None, jax.random.key(1), inner=INNER, placement=ms.Placement(mesh=ms.sharding.task_mesh(2)), **options
    )


def test_a_training_shares_its_tasks():
  """Its numbers do not tell whether it did; that it asks for an even share does."""
  start = jax.jit(lambda: rl.init(jax.random.key(0), INNER))()
  with pytest.raises(ValueError, match=saying('3 tasks', 'evenly', '2 devices')):
    rl.train(start, inner=INNER, meta_iterations=1, meta_batch=3, placement=ms.Placement(mesh=ms.sharding.task_mesh(2)))


@pytest.mark.slow
def test_devices_do_not_wait_for_each_others_threads():
  """With as many of XLA's threads as devices, this program of two devices on two cores never ended."""
  code = """if True:
    import jax, metasgd_jax as ms
    from metasgd_jax import rl
    jax.config.update('jax_num_cpu_devices', 2)
    ms.sharding.cpu_cores_as_devices()
    inner = rl.policy_gradient(rl.navigation(), rl.gaussian(2, 2))
    def act(meta, keys):
      return jax.vmap(inner.experience, (None, 0, 0))(meta.theta, jax.vmap(inner.environment.sample)(keys), keys)
    act = jax.jit(ms.sharding.share_tasks(act, ms.sharding.task_mesh(4), average=False))
    keys = jax.random.split(jax.random.key(1), 4)
    print(act(inner.init(jax.random.key(0)), keys).trajectories.rewards.shape)
  """
  done = subprocess.run(
    [sys.executable, '-c', code],
    capture_output=True,
    text=True,
    check=False,
    timeout=240,
    env=os.environ | {'NPROC': '2'},
  )
  assert done.stdout.strip() == '(4, 20, 100)', done.stderr
