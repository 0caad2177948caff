"""The memory plan, against sizes by hand, against the program that training runs, and where it does not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import SmallConvNet, random_bank, saying, sinusoid_learner

import metasgd_jax as ms
from metasgd_jax.outer import host_memory, memory

MIB = 2**20


def plan(meta_batch=8, hidden=(32, 32), tasks=None, learner=None, **options):
  tasks = tasks or ms.tasks.sinusoid(shot=200)
  learner = learner or sinusoid_learner(hidden=hidden)
  return ms.plan_memory(tasks, learner=learner, optimizer=optax.adam(1e-3), meta_batch=meta_batch, **options)


def test_parts_by_hand():
  """θ of 1-32-32-1, as many α, Adam's two averages of both and its count; 200 support and 10 query points, x and y."""
  entries = 2 * 32 + 33 * 32 + 33
  found = plan(available=100 * MIB)
  assert found.parts == {'θ': 4 * entries, 'α': 4 * entries, "the optimiser's state": 16 * entries + 4}
  assert found.episodes == 8 * 4 * 2 * (200 + 10)
  assert found.arguments >= sum(found.parts.values())
  assert found.total == found.arguments + found.intermediates + found.results
  assert found.fits


def test_a_part_that_does_not_adapt_has_no_rates():
  model = ms.adapt_only(ms.nn.from_linen(ms.nn.MLP((32, 32))), lambda name: name.startswith('Dense_2'))
  assert plan(learner=ms.meta_sgd(model, ms.losses.mean_squared_error)).parts['α'] == 4 * 33


def test_nothing_is_allocated():
  """A network of 16 GiB of parameters is laid out by its shapes alone."""
  learner = sinusoid_learner(hidden=(65_536, 65_536))
  found = plan(learner=learner, meta_batch=1, placement=ms.Placement(1), available=MIB)
  assert found.parts['θ'] > 16 * 1024 * MIB
  assert not found.fits
  assert found.fits_at_once == 0
  assert "adjoint='revolve'" in str(found)


def test_says_which_mapping_would_fit_and_it_does():
  together = plan(placement=ms.Placement('all'), available=100 * MIB)
  one = plan(placement=ms.Placement(1), available=100 * MIB)
  assert one.at_once == 1
  assert together.at_once == 8
  assert one.intermediates < together.intermediates
  middle = int((one.total + 0.6 * (together.total - one.total)) / memory.ROOM)
  found = plan(placement=ms.Placement('all'), available=middle)
  assert not found.fits
  assert 1 < found.fits_at_once < 8
  assert f'tasks_at_once={found.fits_at_once} would' in str(found)
  assert plan(placement=ms.Placement(found.fits_at_once), available=middle).fits
  least = plan(placement=ms.Placement('all'), available=int(one.total / memory.ROOM) + 1)
  assert least.fits_at_once == 1
  assert 'tasks_at_once=1' in str(least)


def test_of_data_that_tasks_bring_and_of_devices():
  tasks = ms.tasks.few_shot(random_bank(classes=8, instances=6, size=16), way=3, shot=1, query=1)
  model = ms.nn.from_linen(SmallConvNet(3))
  learner = ms.meta_sgd(model, ms.losses.cross_entropy)
  found = plan(4, tasks=tasks, learner=learner, placement=ms.Placement(mesh=ms.sharding.task_mesh(4)), available=MIB)
  assert (found.devices, found.tasks) == (2, 2)
  assert found.arguments - sum(found.parts.values()) >= 8 * 6 * 16 * 16
  assert 'to each device' in str(found)


def test_a_state_in_parts_counts_as_one_devices_share():
  mesh, options = ms.sharding.task_mesh(8), dict(hidden=(128, 128), available=100 * MIB)
  whole, shared = (plan(placement=ms.Placement(1, mesh, shard_meta), **options) for shard_meta in (False, True))
  large = 4 * 128 * 128  # Bytes of the one kernel that is split, which θ, α and Adam's two averages of both have.
  for name, kernels in (('θ', 1), ('α', 1), ("the optimiser's state", 4)):
    assert shared.parts[name] == whole.parts[name] - kernels * large // 2
  assert shared.arguments == whole.arguments - 6 * large // 2
  assert shared.results == whole.results - 6 * large // 2
  assert shared.total < whole.total


def test_arguments_are_what_training_is_given():
  """The plan's arguments are the bytes of what training is given."""
  tasks, learner, optimizer = ms.tasks.sinusoid(), sinusoid_learner(hidden=(32, 32)), optax.adam(1e-3)
  state = jax.eval_shape(lambda: ms.init(jax.random.key(0), tasks, learner=learner, optimizer=optimizer))
  found = ms.plan_memory(tasks, learner=learner, optimizer=optimizer, meta_batch=2, available=MIB)
  given = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((state.meta, state.opt_state)))
  assert sum(found.parts.values()) == given
  assert given <= found.arguments <= given + 64  # The step's number and the key.


def test_the_table_reads_as_people_do():
  text = str(plan(available=100 * MIB))
  assert text.splitlines()[0] == 'memory of a meta-iteration on one device, 8 of 8 tasks at a time'
  assert text.splitlines()[-1] == 'fits: 100.0 MiB are available'
  words = [memory.in_words(size) for size in (0, 1023, 1024, 3 * MIB // 2, 5 * 2**40)]
  assert words == ['0 B', '1023 B', '1.0 KiB', '1.5 MiB', '5120.0 GiB']


def test_memory_that_cannot_be_told(monkeypatch):
  monkeypatch.setattr(host_memory, 'available', lambda: None)
  found = plan()
  assert found.available is None
  assert found.fits
  assert 'it is unknown whether the plan fits' in str(found)


def test_the_hosts_memory_is_shared_by_devices(monkeypatch):
  monkeypatch.setattr(host_memory, 'available', lambda: 10 * MIB)
  assert plan(placement=ms.Placement(mesh=ms.sharding.task_mesh(8))).available == 5 * MIB


def test_bad_memory():
  with pytest.raises(ValueError, match=saying('available', 'bytes', 'at least 0', '-1')):
    plan(available=-1)


def test_size_of_shapes_and_arrays():
  tree = {'a': jnp.asarray(np.ones((2, 3), np.float32)), 'b': np.ones(4, np.int8)}
  assert memory.size_of(tree) == memory.size_of(jax.eval_shape(lambda: tree)) == 28
