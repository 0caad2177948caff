"""TRPO's meta-iteration with its tasks shared by two devices."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import assert_trees_close, to_float64

import metasgd_jax as ms
from metasgd_jax import rl


def leaving():
  """Stand at 0; the reward is less the squared error of the action; who acts above 0.5 leaves, so lengths differ."""
  return rl.Environment(
    sample=lambda key: jax.random.uniform(key, minval=-1.0, maxval=1.0),
    reset=lambda task, key: jnp.zeros((), jnp.int32),
    observe=lambda task, state: jnp.stack([jnp.ones_like(task), state / 4]),
    step=lambda task, state, action, key: (state + 1, -((action[0] - task) ** 2), action[0] > 0.5),
    observation_size=2,
    action_size=1,
    horizon=4,
  )


INNER = rl.policy_gradient(leaving(), rl.gaussian(2, 1, hidden=(4,)), trajectories=3)


@pytest.mark.parametrize('curvature_tasks', [4, 2])
def test_two_devices_take_the_step_that_one_takes(curvature_tasks):
  with jax.enable_x64(True):
    meta, key = to_float64(INNER.init(jax.random.key(0))), jax.random.key(1)
    step = lambda mesh: jax.jit(
      functools.partial(
        rl.trpo_meta_step, inner=INNER, meta_batch=4, curvature_tasks=curvature_tasks, damping=0.01, mesh=mesh
      )
    )(meta, key)
    mesh = ms.sharding.task_mesh(4)
    assert mesh.size == 2
    one, several = step(None), step(mesh)
    assert one[1]['step'] > 0
    assert_trees_close(several, one, rtol=1e-9)


def test_training_on_two_devices_is_training_on_one():
  seen = []
  train = lambda mesh: rl.train(
    rl.init(jax.random.key(0), INNER), inner=INNER, meta_iterations=2, meta_batch=2, chunk=1, damping=0.01, mesh=mesh,
    callbacks=[lambda progress: seen.append(progress.info['return_after'])],
  )  # fmt: skip
  one, several = train(None), train(ms.sharding.task_mesh(2))
  assert all(len(leaf.devices()) == 1 for leaf in jax.tree.leaves(several))
  assert int(several.step) == 2
  assert_trees_close(several.meta, one.meta, rtol=1e-3, atol=1e-4)
  np.testing.assert_allclose(seen[2:], seen[:2], rtol=1e-4)


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    (dict(meta_batch=3), '3 tasks cannot be shared evenly by 2 devices'),
    (dict(meta_batch=4, curvature_tasks=3), 'curvature_tasks=3 cannot be shared evenly by 2 devices; take a multiple'),
  ],
)
def test_tasks_that_cannot_be_shared(options, message):
  with pytest.raises(ValueError, match=message):
    rl.trpo_meta_step(
      INNER.init(jax.random.key(0)), jax.random.key(1), inner=INNER, mesh=ms.sharding.task_mesh(2), **options
    )


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
