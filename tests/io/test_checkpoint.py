"""Checkpoints: what is read is what was written, or it is not used."""

import functools
import json
import os
import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import saying, sinusoid_learner

import metasgd_jax as ms
from metasgd_jax.io import checkpoint
from metasgd_jax.io.checkpoint import CheckpointError, Checkpoints
from metasgd_jax.outer import loop
from metasgd_jax.tree import is_key, named_arrays

TASKS, LEARNER = ms.tasks.sinusoid(), sinusoid_learner(hidden=(4,))
SGD = optax.sgd(optax.constant_schedule(1e-2))  # Has one array, a count; each takes milliseconds to read.
CONFIG = {'learning_rate': 1e-2, 'learner': ('meta_sgd', 'maml'), 'alpha': None}


@functools.cache
def started(optimizer):
  return ms.init(jax.random.key(7), TASKS, learner=LEARNER, optimizer=optimizer)


def a_state(step=0, optimizer=SGD, **changes):
  state = started(optimizer)
  meta = jax.tree.map(lambda a: np.asarray(a) + np.float32(step), state.meta)
  return state._replace(step=jnp.int32(step), meta=meta, **changes)


def opened(directory, like=None, config=CONFIG, **options):
  return Checkpoints(directory, like=a_state() if like is None else like, config=config, **options)


def assert_equal(a, b):
  a, b = named_arrays(a), named_arrays(b)
  assert a.keys() == b.keys()
  for name in a:
    assert (a[name].dtype, a[name].shape, a[name].tobytes()) == (b[name].dtype, b[name].shape, b[name].tobytes()), name


def write(directory, steps, **options):
  with opened(directory, **options) as kept:
    for step in steps:
      kept.save(a_state(step))


@pytest.mark.parametrize('impl', ['threefry2x32', 'rbg'])
def test_a_state_comes_back_to_the_bit(tmp_path, impl):
  """With arrays that orbax alone does not take as they are: keys, no entries, no leaf; and bfloat16, NaN and −0."""
  extra = {
    'none': None, 'empty': jnp.zeros((0, 3)), 'half': jnp.array([0.1, -0.0, jnp.nan], jnp.bfloat16),
    'flags': jnp.array([True, False]), 'key': jax.random.key(3), 'nothing': (), 'scalar': jnp.float32(1 / 3),
  }  # fmt: skip
  state = a_state(5, key=jax.random.key(2, impl=impl), opt_state=extra)
  with opened(tmp_path / 'c', like=state) as kept:
    assert kept.latest is None
    kept.save(state)
  like = jax.tree.map(lambda leaf: leaf if is_key(leaf) else jnp.zeros_like(leaf), state)
  with opened(tmp_path / 'c', like=like) as kept:
    assert kept.latest.step == 5
    assert jax.tree.structure(kept.latest.state) == jax.tree.structure(state)
    assert_equal(kept.latest.state, state)
    assert jax.random.key_impl(kept.latest.state.key) == jax.random.key_impl(state.key)


def test_runs_side_by_side(tmp_path):
  state = ms.init(jax.vmap(jax.random.key)(jnp.arange(3)), TASKS, learner=LEARNER, optimizer=SGD)
  with opened(tmp_path, like=state) as kept:
    kept.save(state)
  with opened(tmp_path, like=state) as kept:
    assert_equal(kept.latest.state, state)


def test_a_restored_state_is_trained_by_the_same_program(tmp_path):
  """A weak type or another device would compile anew, and could round otherwise."""
  adam = optax.adam(1e-2)
  go = lambda state, end: ms.train(
    state, TASKS, learner=LEARNER, optimizer=adam, meta_iterations=end, meta_batch=2, chunk=5
  )
  state = go(a_state(optimizer=adam), 5)
  with opened(tmp_path, like=state) as kept:
    kept.save(state)
  restored = checkpoint.newest(tmp_path, like=a_state(optimizer=adam), config=CONFIG).state
  expected = go(state, 10)
  before = loop._run_chunk._cache_size()
  assert_equal(go(restored, 10), expected)
  assert loop._run_chunk._cache_size() == before


def test_the_latest_and_the_best_are_kept(tmp_path):
  """Orbax's best_fn alone would delete the newest where it is not among the best; a resume would go back."""
  accuracies = {10: 0.5, 20: 0.9, 30: None, 40: 0.7, 50: 0.9, 60: 0.1, 70: None, 80: 0.2}
  with opened(tmp_path, keep_best=2) as kept:
    for step, accuracy in accuracies.items():
      kept.save(a_state(step), accuracy)
  assert checkpoint.steps(tmp_path) == [20, 50, 70, 80]
  with opened(tmp_path, keep_best=2) as kept:
    assert (kept.latest.step, kept.latest.metric) == (80, 0.2)
    assert [(c.metric, c.step) for c in kept.best] == [(0.9, 50), (0.9, 20)]
    assert_equal(kept.best[1].state, a_state(20))


def test_a_metric_that_is_nan_is_the_worst(tmp_path):
  with opened(tmp_path, keep_best=1) as kept:
    for step, accuracy in enumerate([np.nan, 0.9, 0.1, 0.2, 0.3], 1):
      kept.save(a_state(step), accuracy)
  assert checkpoint.steps(tmp_path) == [2, 4, 5]
  with opened(tmp_path, keep_best=1) as kept:
    kept.save(a_state(6), np.nan)
    assert [c.step for c in kept.best] == [2]
  ranks = [(0.5, 3), (np.nan, 9), (0.5, 2), (-np.inf, 1), (np.nan, 7)]
  assert [step for _, step in sorted(ranks, key=lambda one: checkpoint.rank(*one))] == [7, 9, 1, 2, 3]


@pytest.mark.parametrize(
  ('wrong', 'said'),
  [
    ({'config': None}, ('config must be a mapping', 'got None')),
    ({'config': [1]}, ('config must be a mapping', 'got [1]')),
    ({'config': {'a': {1}}}, ('config', 'JSON cannot store', 'set')),
    ({'keep_best': -1}, ('keep_best', 'at least 0', 'got -1')),
    ({'directory': os.fsdecode(b'a\xff')}, (r'a\udcff', 'is not UTF-8')),
  ],
)
def test_arguments_that_are_refused_before_anything_is_written(tmp_path, wrong, said):
  options = {'directory': 'c', **wrong}
  with pytest.raises(ValueError, match=saying(*said)):
    opened(tmp_path / options.pop('directory'), **options)
  assert not list(tmp_path.iterdir())


def test_the_directory_may_be_in_the_home_directory(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  write('~/c', [1])
  assert checkpoint.steps(tmp_path / 'c') == checkpoint.steps('~/c') == [1]


def test_an_array_in_another_byte_order_comes_back(tmp_path):
  state = a_state(1, opt_state=np.arange(3, dtype='>f4'))
  with opened(tmp_path, like=state) as kept:
    kept.save(state)
  assert checkpoint.newest(tmp_path, like=state, config=CONFIG).state.opt_state.tolist() == [0, 1, 2]


def test_without_a_metric_the_last_two_are_kept(tmp_path):
  write(tmp_path, range(0, 50, 10))
  assert checkpoint.steps(tmp_path) == [30, 40]
  assert {p.name for p in tmp_path.iterdir()} == {'30', '40'}


def test_what_a_kill_kept_from_being_removed_is_removed(tmp_path):
  """Killed when the last was written and an older one not yet removed, with nothing to be saved any more."""
  for keep_best, left in ((0, [30, 40]), (1, [10, 30, 40])):
    directory = tmp_path / str(keep_best)
    directory.mkdir()
    for step, accuracy in ((10, 0.9), (20, 0.1), (30, None), (40, None)):
      alone = tmp_path / f'{keep_best}_{step}'
      with opened(alone, keep_best=keep_best) as kept:
        kept.save(a_state(step), accuracy)
      (alone / str(step)).rename(directory / str(step))
    with opened(directory, keep_best=keep_best) as kept:
      assert kept.latest.step == 40
    assert checkpoint.steps(directory) == left


@pytest.mark.parametrize('metric', [1, 0.5, np.float32(0.5), np.int64(1), np.array(0.5), jnp.float32(0.5)], ids=str)
def test_a_metric_is_any_real_scalar(tmp_path, metric):
  with opened(tmp_path, keep_best=1) as kept:
    kept.save(a_state(10), metric)
  assert checkpoint.newest(tmp_path, like=a_state(), config=CONFIG).metric == float(metric)


def test_a_metric_with_axes_is_refused(tmp_path):
  with opened(tmp_path) as kept, pytest.raises(ValueError, match=saying('metric must be one number', '(1,)')):
    kept.save(a_state(10), np.array([0.5]))
  assert not list(tmp_path.iterdir())


def test_folders_of_the_user_are_never_removed(tmp_path):
  """Orbax takes each folder whose name is a number for a checkpoint, and removes the older ones."""
  write(tmp_path, [4])
  for name in ('1', '9'):
    (tmp_path / name).mkdir()
    (tmp_path / name / 'cat.png').write_text('')
    with pytest.raises(CheckpointError, match=saying(tmp_path / name, 'is no checkpoint', 'move it away')):
      opened(tmp_path)
    assert checkpoint.steps(tmp_path) == [4]
    (tmp_path / name / 'cat.png').rename(tmp_path / f'cat{name}.png')
    (tmp_path / name).rmdir()
  for name in ('removed', 'mine'):
    (tmp_path / name).mkdir()
  write(tmp_path, [5, 6, 7])
  checkpoint.remove_all(tmp_path)
  assert {path.name for path in tmp_path.iterdir()} == {'cat1.png', 'cat9.png', 'removed', 'mine'}


def test_a_full_disk_is_found_before_anything_is_written(tmp_path, monkeypatch, capfd):
  with opened(tmp_path) as kept:
    kept.save(a_state(1))
    kept.wait()
    monkeypatch.setattr(shutil, 'disk_usage', lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(CheckpointError, match=saying('cannot be written', 'bytes are needed', 'free disk space')):
      kept.save(a_state(2))
  assert checkpoint.steps(tmp_path) == [1]
  assert capfd.readouterr() == ('', '')


def test_saving_a_step_again_changes_nothing(tmp_path):
  with opened(tmp_path) as kept:
    kept.save(a_state(10), 0.5)
    kept.save(a_state(10))
    assert kept.last == 10
  with opened(tmp_path) as kept:
    kept.save(a_state(10))
  assert json.loads((tmp_path / '10' / 'about' / 'metadata').read_text())['metric'] == 0.5


def test_a_checkpoint_says_what_it_is(tmp_path):
  write(tmp_path, [10])
  about = json.loads((tmp_path / '10' / 'about' / 'metadata').read_text())
  assert about['config'] == {'learning_rate': 0.01, 'learner': ['meta_sgd', 'maml'], 'alpha': None}
  assert about['versions']['jax'] == jax.__version__
  assert about['leaves']['meta.theta.Dense_0.kernel'] == 'float32[1, 4]'


@pytest.fixture(scope='module')
def written(tmp_path_factory):
  directory = tmp_path_factory.mktemp('written') / 'c'
  write(directory, [10, 20])
  return directory


@pytest.fixture
def two(written, tmp_path):
  """A directory with the checkpoints of two steps, 10 and 20."""
  return shutil.copytree(written, tmp_path / 'two')


def damages():
  halve = lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  empty = lambda path: path.write_bytes(b'')
  remove = lambda path: path.unlink()

  def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(bytes(data))

  return dict(halve=halve, empty=empty, remove=remove, flip=flip)


@pytest.mark.parametrize(
  'damage', ['halve', 'flip', *(pytest.param(name, marks=pytest.mark.slow) for name in ('empty', 'remove'))]
)
def test_whatever_file_is_damaged_what_is_read_is_right(written, tmp_path, damage):
  """Either the file does not matter, or the checkpoint before it is taken and the user told."""
  files = sorted(p.relative_to(written) for p in (written / '20').rglob('*') if p.is_file() and p.stat().st_size)
  assert len(files) > 5
  fell_back = set()
  for i, file in enumerate(files):
    directory, told = shutil.copytree(written, tmp_path / str(i)), []
    damages()[damage](directory / file)
    with opened(directory, report=told.append) as kept:
      assert_equal(kept.latest.state, a_state(kept.latest.step))
      if kept.latest.step == 10:
        fell_back.add(file.parts[1])
        assert re.search(saying(f'checkpoint {directory / "20"} cannot be read (', 'checkpoint before it, 10'), told[0])
        assert checkpoint.steps(directory) == [10]
        kept.save(a_state(20))
    assert checkpoint.steps(directory) == [10, 20]
    assert checkpoint.newest(directory, like=a_state(), config=CONFIG).step == 20
  assert fell_back >= {'about', 'state'}


@pytest.mark.parametrize('damage', ['halve', 'flip'])
def test_large_arrays_have_files_of_their_own_whose_damage_is_noticed_quietly(tmp_path, damage, capfd):
  """Orbax does not notice a changed bit in them, and prints tracebacks if it reads several of which one is cut."""
  large = {str(i): jax.random.normal(jax.random.key(i), (300, 300)) for i in range(9)}
  like = a_state(opt_state=large)
  with opened(tmp_path, like=like) as kept:
    kept.save(a_state(10, opt_state=large))
    kept.save(a_state(20, opt_state=large))
  files = [path for path in (tmp_path / '20').rglob('d/*') if path.stat().st_size > 1 << 14]
  assert files
  for path in files:
    data, said = path.read_bytes(), []
    damages()[damage](path)
    found = checkpoint.newest(tmp_path, like=like, config=CONFIG, report=said.append)
    assert_equal(found.state, a_state(10, opt_state=large))
    assert len(said) == 1
    path.write_bytes(data)
  assert capfd.readouterr().err == ''


def test_all_damaged(two):
  for step in ('10', '20'):
    (two / step / 'about' / 'metadata').write_text('{')
  said = []
  with pytest.raises(CheckpointError, match=saying('none of the checkpoints', two, 'can be read', 'another directory')):
    opened(two, report=said.append)
  assert len(said) == 2
  assert checkpoint.steps(two) == [10, 20]


def test_a_damaged_one_of_the_best_is_told_of(tmp_path):
  with opened(tmp_path, keep_best=2) as kept:
    for step, accuracy in ((10, 0.9), (20, 0.8), (30, 0.1), (40, 0.2)):
      kept.save(a_state(step), accuracy)
  (tmp_path / '10' / 'state' / 'manifest.ocdbt').write_bytes(b'x')
  said = []
  with opened(tmp_path, keep_best=2, report=said.append) as kept:
    assert [c.step for c in kept.best] == [20, 40]
  assert 'left out when the best checkpoints are chosen' in said[0]


def test_one_that_was_being_written_is_not_there(two):
  (two / '20').rename(two / '20.orbax-checkpoint-tmp')
  said = []
  with opened(two, report=said.append) as kept:
    assert kept.latest.step == 10
    kept.save(a_state(20))
  assert not said
  assert {p.name for p in two.iterdir()} == {'10', '20'}


def test_another_configuration_is_refused_with_the_fields_that_differ(tmp_path):
  write(tmp_path, [10])
  other = {'learning_rate': 1e-3, 'learner': ('meta_sgd', 'maml'), 'shot': 5}
  differ = (
    'learning_rate: 0.01 there, 0.001 asked',
    'alpha: None there, nothing asked',
    'shot: nothing there, 5 asked',
  )
  with pytest.raises(
    CheckpointError, match=saying(tmp_path, 'configuration', *differ, 'another directory', 'continue that run')
  ):
    opened(tmp_path, config=other)
  assert checkpoint.steps(tmp_path) == [10]


@pytest.mark.parametrize(
  ('other', 'said'),
  [
    (lambda s: s._replace(opt_state=()), ('opt_state', 'is stored as int32[], expected nothing')),
    (
      lambda s: s._replace(meta=jax.tree.map(lambda a: np.asarray(a)[None], s.meta)),
      ('stored as float32[4], expected float32[1, 4]',),
    ),
    (lambda s: s._replace(step=jnp.float32(0)), ('step is stored as int32[], expected float32[]',)),
    (lambda s: s._replace(key=jax.random.key(0, impl='rbg')), ('key is stored as key<fry>[], expected key<rbg>[]',)),
  ],
)
def test_other_arrays_are_refused(two, other, said):
  with pytest.raises(CheckpointError, match=saying('does not fit the state that is trained: ', *said)):
    opened(two, like=other(a_state()))


def test_up_to_a_step(two):
  before = sorted(two.rglob('*'))
  found = checkpoint.newest(two, like=a_state(), config=CONFIG, until=15)
  assert found.step == 10
  assert checkpoint.newest(two, like=a_state(), config=CONFIG, until=5) is None
  assert checkpoint.newest(two / 'nowhere', like=a_state(), config=CONFIG) is None
  assert sorted(two.rglob('*')) == before


def test_a_directory_that_cannot_be_written(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(
    CheckpointError, match=saying('cannot be written', tmp_path, 'free disk space, or give another directory')
  ):
    opened(tmp_path / 'file' / 'c')


def test_a_disk_that_fails_is_told_of(tmp_path, monkeypatch):
  kept = opened(tmp_path / 'c')

  def full(*args, **options):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(kept._manager, 'save', full)
  with pytest.raises(CheckpointError, match='No space left on device'):
    kept.save(a_state(10))
  kept.close()


def test_a_folder_that_is_only_like_a_step_is_left_alone(two):
  (two / '0099').mkdir()
  with opened(two) as kept:
    assert kept.latest.step == 20
    kept.save(a_state(30))
  assert checkpoint.steps(two) == [20, 30]
  assert (two / '0099').is_dir()


def test_paths_may_be_relative(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  write('here', [10])
  assert checkpoint.newest(pathlib.Path('here'), like=a_state(), config=CONFIG).step == 10
