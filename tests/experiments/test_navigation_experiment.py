"""The experiment on 2D navigation, at a small size."""

import errno
import functools
import json
import re
from unittest import mock

import jax
import numpy as np
import pytest
from PIL import Image
from problems import saying

import metasgd_jax as ms
from experiments import navigation, navigation_table, navigation_training, reporting, resuming
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
  assert (row['start'], row['learner'], row['optimizer'], row['seeds']) == ('fixed', 'meta_sgd', 'adam', 1)
  assert (row['meta_iterations'], row['meta_batch'], row['alpha']) == (1, 2, 0.02)
  assert json.loads((tmp_path / 'results.json').read_text())['rows'][0]['mean'] == row['mean']
  values = np.load(tmp_path / row['per_task_file'], allow_pickle=False)
  assert values.shape == (1, 2, 2)
  assert np.all(values < 0)
  assert [path.name for path in tmp_path.glob('per_task_*')] == [row['per_task_file']]
  assert not [name for name in resuming.read_record(tmp_path)['files'] if 'run0' in name]
  assert row['metric'].endswith('after 1 update')
  np.testing.assert_allclose(row['mean'], values[..., -1].mean(), rtol=1e-6)
  (line,) = map(json.loads, (tmp_path / 'metrics.jsonl').read_text().splitlines())
  assert line['step'] == 1
  assert '-8.64±0.68' in capsys.readouterr().out
  assert drawn == ['paths_fixed', 'learning_curves', 'alpha_meta_sgd_fixed']


def test_a_film_is_never_half_written(tmp_path, monkeypatch):
  def full(*_, **__):
    raise OSError(errno.ENOSPC, 'No space left on device')

  monkeypatch.setattr(plotting, 'navigation_gif', full)
  run = resuming.Run(tmp_path, {}, resuming.Keeping())
  with pytest.raises(files.WriterError, match=saying(tmp_path / 'adaptation_fixed.gif', 'No space left')):
    navigation._save_films(run, {('fixed', 'maml', 'adam'): None}, lambda start: [None])
  assert [path.name for path in tmp_path.iterdir()] == [resuming.RECORD]


def test_the_table_has_the_papers_figures_and_the_pairs():
  values = {'meta_sgd': np.full((1, 4, 3), -2.0), 'maml': np.full((1, 4, 3), -5.0)}
  results = [
    reporting.Result({'start': 'fixed', 'learner': name, 'optimizer': 'trpo'}, of_one)
    for name, of_one in values.items()
  ]
  table = navigation_table.text(results, ['100 × 20'] * 2, 1, 20)
  assert '-8.64±0.68' in table
  assert '-9.12±0.66' in table
  assert '-10.15' not in table
  assert '100 × 20' in table
  pairs = table[table.index('Meta-SGD by TRPO − MAML by TRPO, fixed start, on the same tasks:') :]
  assert '2 updates 3.00±0.00 over tasks' in pairs
  assert 'over training runs' not in table
  assert '1 update 3.00±0.00' in pairs
  assert '0 updates 1 update 2 updates paper' in ' '.join(table.splitlines()[1].split())


def test_the_table_of_several_runs_has_an_interval_for_each_number_of_updates():
  values = np.stack([np.tile([-9.0, -5.0, -2.0, -1.0], (4, 1)) + r * np.array([4.0, 3, 2, 1]) for r in range(3)])
  result = reporting.Result({'start': 'fixed', 'learner': 'maml', 'optimizer': 'adam'}, values)
  *_, before, line = navigation_table.text([result], [''], 3, 20).splitlines()
  assert before == '95% interval of the mean over training runs:'
  spans = [ms.confidence_interval(np.arange(3.0) * size).ci95 for size in (4, 3, 2, 1)]
  assert line.split()[2:] == [f'±{span:.2f}' for span in spans]


def test_columns_of_long_numbers_are_apart():
  values = np.array([[[-1.0, -1e9, np.nan], [-1.0, -2e12, -np.inf]]])
  result = reporting.Result({'start': 'fixed', 'learner': 'maml', 'optimizer': 'adam'}, values)
  with np.errstate(invalid='ignore'):
    row = navigation_table.text([result], ['7 × 2'], 1, 20).splitlines()[2]
  assert len(row.split()) == 9
  assert row.split()[5] == '-9.12±0.66'


def test_returns_that_are_not_finite_give_a_warning():
  (cell,), values = navigation.Config(learner=('maml',)).cells, np.full((2, 4, 4), -5.0)
  assert navigation_training.is_not_finite(values, cell) is None
  values[0, 1, 2:], values[1, 2, 2], values[1, 0, 3] = np.nan, np.inf, np.nan
  expected = (
    'after 2 updates the return is not finite on 2 of 4 tasks of the test; lower --later_rate or --eval_updates'
  )
  assert navigation_training.is_not_finite(values, cell).startswith(expected)
  values[0, 0, 1] = np.nan
  expected = 'after 1 update the return is not finite on 1 of 4 tasks of the test; lower --alpha or --learning_rate'
  assert navigation_training.is_not_finite(values, cell).startswith(expected)


@pytest.mark.slow
def test_a_test_that_diverges_is_told_of(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(navigation, '_save_films', lambda *_: None)
  monkeypatch.setattr(reporting, 'save_pictures', lambda *_: None)
  options = dict(later_rate=100.0, learner=('maml',), meta_iterations=3, meta_batch=2, trajectories=2, eval_tasks=2)
  navigation.run(navigation.Config(**options), tmp_path)
  (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith(reporting.WARNING)]
  assert re.match(saying('MAML, fixed start: after', 'not finite', 'of 2 tasks', 'lower --later_rate'), line)


def test_a_test_samples_a_limited_number_of_trajectories_at_once(monkeypatch):
  seen, environments = [], navigation.build_environments()
  evaluate = lambda learner, metas, tasks, cell, devices, at_once, **_: seen.append(at_once) or [None]
  monkeypatch.setattr(navigation_training.running, 'evaluate', evaluate)
  for trajectories in (2, 20, 100, 1000):
    config = navigation.Config(**TINY | dict(trajectories=trajectories), learner=('maml',))
    ((training,),) = navigation.plan(config, environments, devices=1)
    training.test(mock.Mock())
  assert seen == [32, 32, 6, 1]


def test_settings_of_each_training():
  """TRPO has the paper's budget, and a setting that is given is that of all trainings."""
  cells = navigation.Config(table4=True).cells
  assert [(c.start[0], c.optimizer[0], c.learner[0]) for c in cells] == [
    (start, optimizer, learner)
    for start in ('fixed', 'varying')
    for optimizer in ('adam', 'trpo')
    for learner in ('meta_sgd', 'maml')
  ]
  assert {(c.optimizer[0], c.meta_iterations, c.meta_batch) for c in cells} == {('adam', 1000, 80), ('trpo', 100, 20)}
  quick = navigation.Config(table4=True, budget='quick', meta_batch=7).cells
  budgets = [('adam', 300, 7), ('adam', 100, 7)]
  assert [(c.optimizer[0], c.meta_iterations, c.meta_batch) for c in quick] == budgets * 2
  assert all(cell.cells == [cell] for cell in cells + quick)
  both = navigation.Config(table4=True, clip=2.0, max_kl=0.02, curvature_tasks=2).cells
  assert {(c.optimizer[0], c.clip, c.max_kl, c.curvature_tasks) for c in both} == {
    ('adam', 2.0, 0.01, None),
    ('trpo', 1.0, 0.02, 2),
  }
  assert {c.alpha for c in navigation.Config(alpha=0.25, table4=True).cells} == {0.25}


def test_each_seed_is_a_training_of_its_own():
  """Its name and label are its own, and it starts as a single run of its seed does."""
  environments, options = navigation.build_environments(), dict(TINY, learner=('maml',))
  ((first, second),) = navigation.plan(navigation.Config(**options, seeds=2, seed=3), environments, devices=1)
  ((alone,),) = navigation.plan(navigation.Config(**options, seed=4), environments, devices=1)
  assert (first.name, second.name, alone.name) == ('maml_fixed_run0', 'maml_fixed_run1', 'maml_fixed_run0')
  assert (second.label, alone.label) == ('MAML, fixed start, run 2 of 2', 'MAML, fixed start')
  data = lambda state: jax.tree.map(lambda a: jax.random.key_data(a) if a.dtype == state.key.dtype else a, state)
  jax.tree.map(np.testing.assert_array_equal, data(second.start()), data(alone.start()))


def test_a_run_runs_away_if_its_return_falls_far_below_the_best(tmp_path, capsys):
  def warnings(*returns, tasks=50):
    steps, values = np.arange(1, len(returns) + 1), np.array(returns, float)[:, None]
    watch = functools.partial(navigation_training.runs_away, len(returns), tasks)
    return [watch({'return_after': (steps[:n], values[:n])}) for n in steps]

  found = warnings(-40, -12, -30, -500, -700)
  assert found[:3] == [None] * 3
  assert re.match(saying('runs away', '-500', 'meta-iteration 4', '-12', 'stop the program', 'rates'), found[3])
  assert re.match(saying('runs away', '-700', 'meta-iteration 5', '-12', 'rates'), found[4])
  assert 'stop the program' not in found[4]

  assert warnings(-90, -12, -90, -12, -100, -100, tasks=2) == [None] * 6  # Returns of few tasks differ by chance.
  *before, last = warnings(-40, -20, -20, -40, -90, -510, tasks=25)
  assert before == [None, None, None, None, None]
  assert re.match(saying('-300', 'meta-iteration 6', '-20'), last)


def test_adam_has_a_rate_for_theta_and_one_for_alpha():
  """They fall to zero, and the gradient is clipped."""
  config = navigation.Config(meta_iterations=4, learning_rate=0.1, alpha_learning_rate=0.01, learner=('meta_sgd',))
  optimizer, part = navigation_training._adam(config.cells[0]), {'w': np.full(1, 1e6, np.float32)}
  state, sizes, update = jax.jit(optimizer.init)(ms.MetaParams(part, part)), [], jax.jit(optimizer.update)
  for _ in range(5):
    updates, state = update(ms.MetaParams(part, part), state)
    sizes.append((-updates.theta['w'][0], -updates.alpha['w'][0]))
  np.testing.assert_allclose(sizes[0], (0.1, 0.01), rtol=1e-4)
  np.testing.assert_allclose(sizes[2], (0.05, 0.005), rtol=1e-4)
  np.testing.assert_allclose(sizes[4], (0, 0), atol=1e-9)


def test_trpo_gets_the_settings(monkeypatch):
  given = {}
  monkeypatch.setattr(navigation_training.rl, 'train', lambda state, **options: given.update(options))
  config = navigation.Config(
    **TINY, learner=('maml',), optimizer=('trpo',), max_kl=0.5, damping=0.25, curvature_tasks=1
  )
  ((training,),) = navigation.plan(config, navigation.build_environments(), devices=1)
  training.go(None, 2, [])
  assert given['inner'].steps == 1
  del given['inner']
  assert given == dict(
    meta_iterations=2,
    progress=False,
    meta_batch=2,
    curvature_tasks=1,
    trpo=rl.TrpoConfig(max_kl=0.5, damping=0.25),
    chunk=1,
    callbacks=[],
    placement=ms.Placement(),
  )


def test_updates_beyond_those_of_training_have_one_rate():
  """A loop of two updates is Meta-SGD and then MAML, if it was trained with one."""
  environment, (cell, _) = rl.navigation(horizon=5), navigation.Config(**TINY, later_rate=0.25).cells
  inner = navigation.build_inner(environment, cell, steps=2)
  once = navigation.build_inner(environment, cell)
  how = dict(trajectories=3, estimator='lvc', mean_over='trajectory')
  maml = rl.policy_gradient(environment, inner.policy, alpha=0.25, **how)

  @jax.jit
  def paths(key):
    meta, task = inner.init(key), environment.sample(key)
    alpha = jax.tree.map(lambda leaf: 0.5 * jax.random.normal(key, leaf.shape), meta.alpha)
    meta = ms.MetaParams(meta.theta, alpha)
    experiences, path = inner.explore(meta, task, key)
    first = once.replay(meta, experiences[:1])
    second = maml.replay(ms.MetaParams(first, None), experiences[1:])
    return path, (meta.theta, first, second), inner.replay(meta, experiences)

  found, expected, replayed = paths(jax.random.key(0))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), replayed, expected[-1])


@pytest.mark.parametrize('optimizer', ['adam', 'trpo'])
def test_learners_differ_by_alpha_alone(optimizer):
  environment, cells = rl.navigation(), navigation.Config(**TINY, optimizer=(optimizer,)).cells
  meta_sgd, maml = (jax.jit(navigation.build_inner(environment, cell).init)(jax.random.key(0)) for cell in cells)
  jax.tree.map(np.testing.assert_array_equal, maml.theta, meta_sgd.theta)
  assert maml.alpha is None
  rate = np.float32(navigation.RATES[optimizer, 'meta_sgd'][0])
  assert all(np.all(a == rate) for a in jax.tree.leaves(jax.device_get(meta_sgd.alpha)))


@pytest.fixture(scope='module')
def table4(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('table4')
  config = navigation.Config(**TINY | dict(eval_updates=1), table4=True, seeds=2)
  with mock.patch.object(navigation, 'FILM_STEPS', 12):
    return workdir, navigation.run(config, workdir, devices=1)  # Programs of one device compile faster.


@pytest.mark.slow
def test_all_eight_cells_are_there(table4):
  workdir, rows = table4
  assert len({(row['start'], row['learner'], row['optimizer']) for row in rows}) == 8
  assert json.loads((workdir / 'results.json').read_text())['rows'][7]['mean'] == rows[7]['mean']


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


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (dict(estimator='reinforce'), ['estimator', 'dice, lvc, score', "'reinforce'"]),
    (dict(trajectories=1), ['trajectories', '2 to 1000', '1']),
    (dict(start=('fixed', 'fixed')), ['start', 'fixed, varying, or both']),
    (dict(optimizer=('trpo',), curvature_tasks=3, meta_batch=2), ['curvature_tasks=3', 'meta_batch=2']),
    (dict(table4=True, learner=('maml',)), ['table4', '--learner=maml']),
    (dict(table4=True, curvature_tasks=30), ['curvature_tasks=30', 'meta_batch=20']),
    (dict(curvature_tasks=3), ['curvature_tasks=3', 'optimizer=trpo', 'optimizer=adam']),
    (dict(optimizer=('trpo',), budget='quick'), ['budget=quick', 'optimizer=adam', 'optimizer=trpo']),
    (
      dict(table4=True, budget='quick', damping=0.1),
      ['damping=0.1', '--table4 with --budget=quick', 'leave --budget=quick out'],
    ),
  ],
)
def test_settings_that_cannot_be(changes, message):
  with pytest.raises(ValueError, match=saying(*message)):
    navigation.Config(**changes)
