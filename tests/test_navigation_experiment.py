"""The experiment on 2D navigation, at a small size."""

import json

import numpy as np
import pytest
from PIL import Image

from experiments import navigation
from metasgd_jax import rl

TINY = dict(meta_iterations=2, meta_batch=2, trajectories=3, eval_tasks=4, eval_updates=2)


@pytest.fixture(scope='module')
def table4(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('table4')
  return workdir, navigation.run(navigation.Config(**TINY, table4=True, seeds=2), workdir)


def test_all_four_cells_are_there(table4):
  workdir, rows = table4
  assert [(row['start'], row['learner']) for row in rows] == [
    ('fixed', 'meta_sgd'), ('fixed', 'maml'), ('varying', 'meta_sgd'), ('varying', 'maml'),
  ]  # fmt: skip
  assert json.loads((workdir / 'results.json').read_text())['rows'][3]['mean'] == rows[3]['mean']


def test_a_row_is_of_every_task_run_and_update(table4):
  workdir, rows = table4
  values = np.load(workdir / rows[0]['per_task_file'], allow_pickle=False)
  assert values.shape == (2, 4, 3)
  assert np.all(values < 0)
  np.testing.assert_allclose(rows[0]['mean'], values[..., -1].mean(), rtol=1e-6)
  assert rows[0]['seeds'] == 2


def test_the_table_has_the_papers_figures_and_the_pairs(table4, tmp_path, capsys):
  navigation.run(navigation.Config(**TINY), tmp_path)
  out = capsys.readouterr().out
  assert '-8.64±0.68' in out
  assert '-9.12±0.66' in out
  assert '-10.15' not in out
  assert 'Meta-SGD − MAML, fixed start, on the same tasks:' in out
  assert '2 updates' in out


def test_pictures(table4):
  workdir, _ = table4
  for name in ('paths_fixed', 'paths_varying', 'learning_curves', 'alpha_meta_sgd_fixed'):
    with Image.open(workdir / f'{name}.png') as picture:
      assert min(picture.size) > 200
  with Image.open(workdir / 'adaptation_fixed.gif') as film:
    assert film.n_frames > 20


def test_learners_differ_by_alpha_alone():
  environment = rl.navigation()
  config = navigation.Config(**TINY)
  maml, meta_sgd = (navigation.build_inner(name, environment, config) for name in ('maml', 'meta_sgd'))
  import jax

  key = jax.random.key(0)
  jax.tree.map(np.testing.assert_array_equal, maml.init(key).theta, meta_sgd.init(key).theta)
  assert maml.init(key).alpha is None
  assert all(np.all(a == navigation.MAML_RATE) for a in jax.tree.leaves(meta_sgd.init(key).alpha))


def test_adam_is_the_other_outer_optimiser(tmp_path):
  rows = navigation.run(navigation.Config(**TINY, learner=('meta_sgd',), optimizer='adam'), tmp_path)
  assert rows[0]['optimizer'] == 'adam'


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (dict(estimator='reinforce'), "estimator must be one of dice, lvc, score, got 'reinforce'"),
    (dict(trajectories=1), 'trajectories must be from 2 to 1000, got 1'),
    (dict(start=('fixed', 'fixed')), 'start must be some of fixed, varying, each once'),
  ],
)
def test_settings_that_cannot_be(changes, message):
  with pytest.raises(ValueError, match=message):
    navigation.Config(**changes)
