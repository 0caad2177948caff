"""The experiment on 2D navigation, at a small size."""

import errno
import json
import pathlib
import types
from unittest import mock

import jax
import numpy as np
import pytest
from PIL import Image
from problems import saying

import metasgd_jax as ms
from experiments import navigation, reporting, resuming
from metasgd_jax import plotting, rl
from metasgd_jax.io import files

TINY = dict(meta_iterations=2, meta_batch=2, trajectories=3, eval_tasks=4, eval_updates=2)


def test_a_thin_run(tmp_path, monkeypatch, capsys):
  """Trained and tested, but nothing is walked to be drawn."""
  drawn = []
  monkeypatch.setattr(navigation, '_save_films', lambda *_: None)
  monkeypatch.setattr(reporting, 'save_pictures', lambda path_of, pictures, metrics: drawn.extend(pictures))
  small = dict(meta_iterations=1, meta_batch=2, trajectories=2, eval_tasks=2, eval_updates=1, learner=('meta_sgd',))
  (row,) = navigation.run(navigation.Config(**small), tmp_path)
  assert (row['start'], row['learner'], row['optimizer'], row['seeds']) == ('fixed', 'meta_sgd', 'trpo', 1)
  assert json.loads((tmp_path / 'results.json').read_text())['rows'][0]['mean'] == row['mean']
  values = np.load(tmp_path / row['per_task_file'], allow_pickle=False)
  assert values.shape == (1, 2, 2)
  assert np.all(values < 0)
  np.testing.assert_allclose(row['mean'], values[..., -1].mean(), rtol=1e-6)
  (line,) = map(json.loads, (tmp_path / 'metrics.jsonl').read_text().splitlines())
  assert line['step'] == 1
  assert '-8.64±0.68' in capsys.readouterr().out
  assert drawn == ['paths_fixed', 'learning_curves', 'alpha_meta_sgd_fixed']


def test_a_film_is_never_half_written(tmp_path, monkeypatch):
  def save(path, **_):
    pathlib.Path(path).write_bytes(b'half')
    raise OSError(errno.ENOSPC, 'No space left on device')

  monkeypatch.setattr(plotting, 'navigation_animation', lambda *_, **__: types.SimpleNamespace(save=save))
  run = resuming.Run(tmp_path, {}, resuming.Keeping())
  with pytest.raises(files.WriterError, match=saying(tmp_path / 'adaptation_fixed.gif', 'No space left')):
    navigation._save_films(run, {('fixed', 'maml'): None}, lambda start: [None])
  assert [path.name for path in tmp_path.iterdir()] == [resuming.RECORD]


def test_the_table_has_the_papers_figures_and_the_pairs():
  config = navigation.Config(**TINY)
  values = {'meta_sgd': np.full((1, 4, 3), -2.0), 'maml': np.full((1, 4, 3), -5.0)}
  results = [reporting.Result({'start': 'fixed', 'learner': name}, of_one) for name, of_one in values.items()]
  table = navigation._table(results, config)
  assert '-8.64±0.68' in table
  assert '-9.12±0.66' in table
  assert '-10.15' not in table
  pairs = table[table.index('Meta-SGD − MAML, fixed start, on the same tasks:') :]
  assert '2 updates 3.00±0.00 over tasks' in pairs
  assert 'over training runs' not in table
  several = [r.__class__(r.about, np.concatenate([r.values, r.values])) for r in results]
  assert 'over training runs' in navigation._table(several, navigation.Config(**TINY, seeds=2))


def test_trpo_gets_the_settings(monkeypatch):
  given = {}
  monkeypatch.setattr(navigation.rl, 'train', lambda state, **options: given.update(options))
  config = navigation.Config(**TINY, learner=('maml',), max_kl=0.5, damping=0.25, curvature_tasks=1)
  (training,) = navigation.plan(config, navigation.build_environments(), devices=1)
  training.go(None, 2, [])
  assert given['inner'].steps == 1
  del given['inner']
  assert given == dict(
    meta_iterations=2,
    meta_batch=2,
    curvature_tasks=1,
    trpo=rl.TrpoConfig(max_kl=0.5, damping=0.25),
    chunk=1,
    callbacks=[],
    placement=ms.Placement(),
  )


def test_learners_differ_by_alpha_alone():
  environment = rl.navigation()
  config = navigation.Config(**TINY)
  maml, meta_sgd = (
    jax.jit(navigation.build_inner(name, environment, config).init)(jax.random.key(0)) for name in ('maml', 'meta_sgd')
  )
  jax.tree.map(np.testing.assert_array_equal, maml.theta, meta_sgd.theta)
  assert maml.alpha is None
  assert all(np.all(a == navigation.MAML_RATE) for a in jax.tree.leaves(jax.device_get(meta_sgd.alpha)))


@pytest.fixture(scope='module')
def table4(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('table4')
  config = navigation.Config(**TINY | dict(eval_updates=1), table4=True, seeds=2)
  with mock.patch.object(navigation, 'FILM_STEPS', 12):
    return workdir, navigation.run(config, workdir, devices=1)  # Programs of one device compile faster.


@pytest.mark.slow
def test_all_four_cells_are_there(table4):
  workdir, rows = table4
  cells = [(start, learner) for start in ('fixed', 'varying') for learner in ('meta_sgd', 'maml')]
  assert [(row['start'], row['learner']) for row in rows] == cells
  assert json.loads((workdir / 'results.json').read_text())['rows'][3]['mean'] == rows[3]['mean']


@pytest.mark.slow
def test_a_row_is_of_every_task_run_and_update(table4):
  workdir, rows = table4
  values = np.load(workdir / rows[0]['per_task_file'], allow_pickle=False)
  assert values.shape == (2, 4, 2)
  assert np.all(values < 0)
  np.testing.assert_allclose(rows[0]['mean'], values[..., -1].mean(), rtol=1e-6)
  assert rows[0]['seeds'] == 2


@pytest.mark.slow
def test_pictures(table4):
  workdir, _ = table4
  for name in ('paths_fixed', 'paths_varying', 'learning_curves', 'alpha_meta_sgd_fixed'):
    with Image.open(workdir / f'{name}.png') as picture:
      assert min(picture.size) > 200
  with Image.open(workdir / 'adaptation_fixed.gif') as film:
    assert film.n_frames > 20


@pytest.mark.slow
def test_adam_is_the_other_outer_optimiser(tmp_path, monkeypatch, capsys):
  """Of both learners, whose pairs are printed."""
  monkeypatch.setattr(navigation, '_save_films', lambda *_: None)
  rows = navigation.run(navigation.Config(**TINY, optimizer='adam'), tmp_path, devices=1)
  assert [row['optimizer'] for row in rows] == ['adam', 'adam']
  out = capsys.readouterr().out
  assert '-9.12±0.66' in out
  assert '-10.15' not in out
  assert 'Meta-SGD − MAML, fixed start, on the same tasks:' in out
  assert '2 updates' in out


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (dict(estimator='reinforce'), ['estimator', 'dice, lvc, score', "'reinforce'"]),
    (dict(trajectories=1), ['trajectories', '2 to 1000', '1']),
    (dict(start=('fixed', 'fixed')), ['start', 'fixed, varying', 'once']),
    (dict(curvature_tasks=3, meta_batch=2), ['curvature_tasks=3', 'meta_batch=2']),
  ],
)
def test_settings_that_cannot_be(changes, message):
  with pytest.raises(ValueError, match=saying(*message)):
    navigation.Config(**changes)
