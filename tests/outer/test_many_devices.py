"""One program on 1, 2 and 8 virtual devices: the same numbers, and θ and α in parts where they are large."""

import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest
from problems import saying, sinusoid_learner

import metasgd_jax as ms
from metasgd_jax.outer import fully_sharded

HERE = pathlib.Path(__file__).resolve().parents[1]
TASKS, ADAM = ms.tasks.sinusoid(), optax.adam(1e-2)


@pytest.fixture(scope='module')
def found():
  """A process of half a minute; tests that ask for it are all `optimized`, so that it runs once."""
  done = subprocess.run(
    [sys.executable, HERE / 'many_devices.py'], capture_output=True, text=True, check=False, cwd=HERE.parent
  )
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize(
  ('case', 'most'),
  [
    ('sinusoid float64 2', 1e-13), ('sinusoid float64 8', 1e-13), ('sinusoid float32 8', 1e-5),
    ('conv float64 8', 1e-12), ('wide float64 2', 1e-13), ('wide float64 8', 1e-13),
  ],
)  # fmt: skip
def test_many_devices_compute_what_one_does(found, case, most, optimized):
  """The meta-gradient, five meta-iterations with Adam, and the values of unseen tasks; wide is with `shard_meta`."""
  names = {'gradient', 'values', 'state', 'losses'} if case.startswith('sinusoid float64') else {'state', 'losses'}
  errors = {name: found[case][name] for name in names}
  assert all(error < most for error in errors.values()), errors


@pytest.mark.slow
@pytest.mark.parametrize('devices', [2, 8])
def test_each_device_keeps_its_part_of_what_is_large(found, devices, optimized):
  case = found[f'wide float64 {devices}']
  assert len(case['shares']) == 6  # The large kernel, in θ, α, and Adam's two means of both.
  for name, shares in case['shares'].items():
    assert shares == [devices] * devices, name
  assert set(case['small']) == {1}  # Whole on each.
  assert 1 / devices < case['memory'] < 1 / devices + 0.03


def test_the_largest_dimension_that_fits_is_split():
  split = lambda *shape: fully_sharded.split_dimension(np.zeros(shape, np.float32), 8)
  assert split(64, 512) == 1
  assert split(512, 64) == 0
  assert split(256, 256) == 0
  assert split(80, 1001) == 0
  assert split(3, 3, 5, 1001) is None
  assert split(8, 8) is None
  assert fully_sharded.split_dimension(jax.random.split(jax.random.key(0), 2**15), 8) is None


def test_a_state_in_parts_goes_on_and_comes_back(both_compilers):
  learner = sinusoid_learner(hidden=(128, 128))
  state = ms.init(jax.random.key(0), TASKS, learner=learner, optimizer=ADAM)
  train = lambda state, step, **options: ms.train(
    state, TASKS, learner=learner, optimizer=ADAM, meta_iterations=step, meta_batch=2, **options
  )
  mesh = ms.sharding.task_mesh(2)
  split = ms.Placement(mesh=mesh, shard_meta=True)
  halves = train(train(state, 2, placement=split), 4, placement=split)
  for whole, part in zip(*map(jax.tree.leaves, (train(state, 4).meta, halves.meta)), strict=True):
    np.testing.assert_allclose(whole, part, rtol=1e-3, atol=1e-4)
  large = [leaf for leaf in jax.tree.leaves((halves.meta, halves.opt_state)) if leaf.size == 128 * 128]
  assert [leaf.addressable_shards[0].data.size for leaf in large] == [128 * 64] * 6  # In θ, α and Adam's two means.
  small = [leaf for leaf in jax.tree.leaves((halves.meta, halves.opt_state)) if leaf.size <= 128]
  assert all(shard.data.shape == leaf.shape for leaf in small for shard in leaf.addressable_shards)
  again = train(halves, 5, placement=ms.Placement(mesh=mesh))  # Without, all is put together again.
  assert len(jax.tree.leaves(again.meta)[0].devices()) == 1


def test_shard_meta_needs_a_mesh_and_one_run():
  learner = sinusoid_learner(hidden=(8,))
  state = ms.init(jax.random.split(jax.random.key(0), 3), TASKS, learner=learner, optimizer=ADAM)
  train = lambda mesh: ms.train(
    state,
    TASKS,
    learner=learner,
    optimizer=ADAM,
    meta_iterations=1,
    meta_batch=2,
    placement=ms.Placement(mesh=mesh, shard_meta=True),
  )
  with pytest.raises(ValueError, match=saying('shard_meta', 'got mesh=None', 'give mesh=')):
    train(None)
  with pytest.raises(ValueError, match=saying('shard_meta', 'one run', 'got 3')):
    train(ms.sharding.task_mesh(2))
