"""The experiments, at a small size: what they leave in the work directory, and what they say to a mistake."""

import contextlib
import io
import json
import os
import pathlib
import re
import subprocess
import sys
import types

import commands
import jax
import numpy as np
import pytest
from problems import SmallConvNet, in_place_of_conv4, saying

from experiments import classification, options, regression, reporting
from metasgd_jax.tasks.sinusoid import sinusoid

ROOT = pathlib.Path(__file__).resolve().parents[2]
SMALL = dict(meta_iterations=40, eval_tasks=6, eval_repeats=3)


@pytest.fixture(scope='module')
def command_run(tmp_path_factory):
  """By a process of its own, as users run it; in settings of JAX for quick compiling."""
  workdir = tmp_path_factory.mktemp('command')
  quick = {'JAX_DISABLE_MOST_OPTIMIZATIONS': '1', 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.1'}
  flags = ['--meta_iterations=3', '--seeds=2', '--learner=meta_sgd', '--eval_tasks=3', '--eval_repeats=2']
  flags += [f'--workdir={workdir}', f'--compilation_cache={workdir / "compiled"}']
  command = [sys.executable, '-m', 'experiments.regression', *flags]
  done = subprocess.run(command, env=os.environ | quick, capture_output=True, text=True, cwd=ROOT, check=False)
  assert done.returncode == 0, done.stderr
  return workdir, done


@pytest.fixture(scope='module')
def regression_run(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('regression')
  config = regression.Config(seeds=2, tensorboard=True, **SMALL)
  return workdir, regression.run(config, workdir)


@pytest.fixture(scope='module')
def classification_run(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('classification')
  sizes = dict(way=3, query=2, filters=4, meta_iterations=3, eval_tasks=20, eval_query=5, seeds=2)
  config = classification.Config(learner=('meta_sgd', 'lstm', 'random'), **sizes)
  out = io.StringIO()
  with in_place_of_conv4(SmallConvNet), contextlib.redirect_stdout(out):
    rows = classification.run(config, workdir)
  (workdir / 'stdout').write_text(out.getvalue())
  return workdir, rows


RUNS = pytest.mark.parametrize(
  'kind',
  [
    'command_run',
    pytest.param('regression_run', marks=pytest.mark.slow),
    pytest.param('classification_run', marks=pytest.mark.slow),
  ],
)


@RUNS
def test_results_say_what_was_run(kind, request):
  workdir, rows = request.getfixturevalue(kind)
  read = json.loads((workdir / 'results.json').read_text())['rows']
  assert len(read) == (3 if kind == 'command_run' else len(rows))
  experiment = 'classification' if kind == 'classification_run' else 'regression'
  config = json.loads((workdir / 'config.json').read_text())
  whole = json.loads((workdir / 'results.json').read_text())
  assert whole['config'] == config
  assert whole['command'].startswith(f'python -m experiments.{experiment} --')
  for row in read:
    shots = ('way', 'shot') if experiment == 'classification' else ('train_shot', 'test_shot')
    for name in ('learner', 'dataset', *shots):
      assert name in row
    steps = {'lstm': 0, 'random': 20}.get(row['learner'], 1)
    assert row['inner_steps'] == steps
    assert row['meta_iterations'] == (0 if row['learner'] == 'random' else config['meta_iterations'])
    assert (row['tasks'], row['seeds']) == (config['eval_tasks'], 2)
    assert row['device']['platform'] == jax.default_backend()
    assert row['versions']['jax'] == jax.__version__
    values = np.load(workdir / row['per_task_file'])
    assert values.shape == (2, row['tasks'], steps + 1)
    np.testing.assert_allclose(row['mean'], values[..., -1].mean(), rtol=1e-6)
    assert 0 < row['ci95'] < 10 * row['mean'] + 1
    np.testing.assert_allclose(row['mean_by_step'], values.mean((0, 1)), rtol=1e-5)


@RUNS
def test_metrics_have_a_line_a_chunk(kind, request):
  workdir, _ = request.getfixturevalue(kind)
  lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  assert {'label', 'step', 'loss'} <= set(lines[0])
  timings = [json.loads(line) for line in (workdir / 'timings.jsonl').read_text().splitlines()]
  assert [(t['label'], t['step']) for t in timings] == [(line['label'], line['step']) for line in lines]
  assert all(t['seconds'] > 0 and 'seconds' not in line for t, line in zip(timings, lines, strict=True))
  meta_sgd = [line for line in lines if line['label'].startswith('Meta-SGD')]
  assert 0 <= meta_sgd[-1]['alpha_negative'] <= 1
  assert meta_sgd[-1]['step'] == json.loads((workdir / 'config.json').read_text())['meta_iterations']


@RUNS
def test_pictures_are_drawn(kind, request):
  workdir, _ = request.getfixturevalue(kind)
  names = (
    {'alpha_meta_sgd', 'task_random', 'instances_lstm'}
    if kind == 'classification_run'
    else {'curves_5shot', 'alpha_meta_sgd_5shot'}
  )
  for name in names | {'learning_curves'}:
    assert (workdir / f'{name}.png').read_bytes().startswith(b'\x89PNG')


def test_pictures_show_draws_of_the_task_distribution():
  """With a key used twice, the points' places would be functions of the curve."""
  x = np.linspace(-5, 5, 200, dtype=np.float32)
  config, keys = regression.Config(), jax.random.split(jax.random.key(0), (120, 3))
  tasks = sinusoid(regression.DATASETS[config.dataset], shot=5)
  truths, supports, _ = jax.jit(jax.vmap(lambda keys: regression._fits(tasks, {}, config, x, keys)))(keys)
  tops = np.abs(truths).max(1)
  assert abs(np.corrcoef(tops, supports.x[:, 0, 0])[0, 1]) < 0.35
  assert abs(np.corrcoef(tops, np.abs(supports.y).max((1, 2)))[0, 1]) > 0.5  # The points lie on the curve.


def test_the_curves_of_the_picture_are_the_quartiles_of_the_error():
  """A learner that predicts 0 has a curve's mean square as its error, whichever the second learner is."""
  shown = []
  fit = lambda name, before, after: (name, before, after)
  plotting = types.SimpleNamespace(Fit=fit, adaptation_curves=lambda x, truths, *rest: shown.append((truths, rest)))
  config = regression.Config()
  zero = jax.tree.map(np.zeros_like, _regression_meta(config))
  regression._draw_fits({'meta_sgd': zero, 'maml': zero}, 5, config, plotting)
  [(truths, (supports, fits))] = shown
  keys = jax.random.split(reporting.test_keys(config.eval_seed)[1], (regression.DRAWN, 3))
  tasks = sinusoid(regression.DATASETS[config.dataset], shot=5)
  x = np.linspace(-5, 5, 200, dtype=np.float32)
  all_truths = jax.jit(jax.vmap(lambda key: tasks.sample(key)(x)))(keys[:, 0])
  squares = np.sort(np.mean(np.square(all_truths), 1))
  np.testing.assert_allclose(np.mean(np.square(truths), 1), squares[[25, 50, 75]], rtol=1e-5)
  assert [[name for name, *_ in column] for column in fits] == [['Meta-SGD', 'MAML']] * 3
  assert [support.x.shape for support in supports] == [(5, 1)] * 3


def _regression_meta(config):
  """Meta-parameters with a leading axis of one run."""
  learner, tasks = regression.build_learner('meta_sgd', config), sinusoid(shot=5)
  episode = tasks.episode(tasks.sample(jax.random.key(0)), jax.random.key(1))
  return jax.tree.map(lambda leaf: np.asarray(leaf)[None], learner.init(jax.random.key(2), episode))


@pytest.mark.slow
def test_tensorboard_has_the_curves_the_rates_and_the_pictures(regression_run):
  (path,) = regression_run[0].glob('events.out.tfevents.*')
  data = path.read_bytes()
  for tag in ('Meta-SGD_5-shot/loss', 'MAML_5-shot/loss', 'Meta-SGD_5-shot/alpha.Dense_0.kernel', 'learning_curves'):
    assert tag.encode() in data
  assert b'MAML_5-shot/alpha.' not in data


@pytest.mark.slow
def test_learners_are_tested_on_the_same_tasks(regression_run):
  """Tasks differ in difficulty far more than learners do, so on the same tasks their values go together."""
  workdir, rows = regression_run
  ours, mamls = (np.load(workdir / row['per_task_file'])[0, :, 0] for row in (rows[0], rows[3]))
  assert (rows[0]['learner'], rows[3]['learner']) == ('meta_sgd', 'maml')
  assert np.corrcoef(ours, mamls)[0, 1] > 0.95


@pytest.mark.slow
def test_a_seed_alone_gives_what_it_gives_beside_others(tmp_path, regression_run):
  regression.run(regression.Config(seeds=1, seed=1, learner=('maml',), **SMALL), tmp_path)
  alone, beside = (
    json.loads((d / 'metrics.jsonl').read_text().splitlines()[-1]) for d in (tmp_path, regression_run[0])
  )
  assert alone['label'] == beside['label'] == 'MAML 5-shot'
  np.testing.assert_allclose(alone['loss'][0], beside['loss'][1], rtol=1e-4)


def assert_has_the_papers_cells(table):
  for mean, ci95 in [cell for row in regression.PAPER_TABLE.values() for cell in row]:
    assert f'{mean:.2f}±{ci95:.2f}' in table


def test_the_table_has_our_cells_and_the_papers():
  config = regression.Config(table1=True, seeds=2)
  cells = [(*run, shot) for run in config.runs for shot in regression.TEST_SHOTS]
  of_cell = lambda i: np.full((2, 4, 2), 10.0 + i) + np.array([-0.5, 0.5])[:, None, None]  # [run, task, step].
  results = [
    reporting.Result({'learner': learner, 'train_shot': shot, 'test_shot': test_shot}, of_cell(i))
    for i, (learner, shot, test_shot) in enumerate(cells)
  ]
  table = regression._table(results, config)
  assert_has_the_papers_cells(table)
  assert [f'{10 + i:.2f}±0.00' in table for i in range(18)] == [True] * 18
  assert table.count('Meta-SGD  10.00±0.00') == 1
  assert table.count('test 3.00±0.00 over curves, ±0.00 over training runs') == 9  # MAML's cells come 3 later.


@pytest.mark.slow
def test_all_of_the_table_is_trained(tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(reporting, 'save_pictures', lambda *_: None)
  regression.run(regression.Config(table1=True, seeds=1, **SMALL | dict(meta_iterations=2)), tmp_path)
  assert len(json.loads((tmp_path / 'results.json').read_text())['rows']) == 18
  assert_has_the_papers_cells(capsys.readouterr().out)


@pytest.mark.slow
def test_a_sentence_gives_the_figure(classification_run):
  workdir, rows = classification_run
  out = (workdir / 'stdout').read_text()
  assert f'Meta-SGD, glyphs, 3-way 1-shot: {100 * rows[0]["mean"]:.2f}% ±' in out
  assert 'over 20 unseen tasks' in out
  assert 'LSTM: accuracy at the 1st, 2nd, … item of a class, in percent: ' in out


@pytest.mark.slow
def test_batch_norm_is_reported_in_both_ways(classification_run):
  _, rows = classification_run
  modes = [(row['learner'], row['batch_norm']) for row in rows]
  both = ('transductive', 'inductive')
  assert modes == [*(('meta_sgd', mode) for mode in both), ('lstm', 'none'), *(('random', mode) for mode in both)]
  assert not np.array_equal(rows[0]['mean_by_step'], rows[1]['mean_by_step'])
  assert len(rows[2]['accuracy_by_instance']) == 10


@pytest.mark.parametrize(
  ('config', 'values', 'said'),
  [
    (regression.Config, dict(meta_iterations=0), ('meta_iterations', 'from 1 to', 'got 0')),
    (regression.Config, dict(learner=('sgd',)), ('learner', 'meta_sgd, maml, or both', "'sgd'")),
    (regression.Config, dict(learner=()), ('learner', 'a tuple: meta_sgd, maml, or both', 'got ()')),
    (regression.Config, dict(learner=('maml', 'maml')), ('learner', 'or both', "('maml', 'maml')")),
    (regression.Config, dict(learner='maml'), ('learner', 'a tuple', "'maml'")),
    (regression.Config, dict(shot=5.5), ('shot', 'type int', 'got 5.5')),
    (regression.Config, dict(shot=True), ('shot', 'type int', 'got True')),
    (regression.Config, dict(alpha=float('nan')), ('alpha', 'from -100.0 to 100.0', 'got nan')),
    (classification.Config, dict(seeds='3'), ('seeds', 'type int', "'3'")),
    (regression.Config, dict(learning_rate=float('nan')), ('learning_rate', 'from ', 'got nan')),
    (classification.Config, dict(way=1), ('way', 'from 2 to 1000', 'got 1')),
    (classification.Config, dict(dataset='mnist'), ('dataset', 'one of glyphs, omniglot, ', "'mnist'")),
    (classification.Config, dict(dataset='omniglot'), ('dataset=omniglot', 'needs data_dir')),
  ],
)
def test_bounds_hold_in_colab_too(config, values, said):
  with pytest.raises(ValueError, match=saying(*said)):
    config(**values)


@pytest.mark.parametrize(
  ('module', 'flags', 'said'),
  [
    ('regression', ['--learner=sgd'], ('--learner=sgd: give meta_sgd, maml, or both separated by a comma',)),
    ('regression', ['--meta_iterations=0'], ('--meta_iterations=0', 'from 1 to ')),
    ('regression', ['--workdir={file}/x'], ('workdir {file}/x', 'cannot be written', 'Not a directory')),
    ('regression', ['--alpha=nan'], ('alpha', 'from -100.0 to 100.0', 'got nan')),
    (
      'regression', ['--inner_steps=5', '--alpha=100', '--learner=maml', '--meta_batch=1', '--seeds=1'],
      ('MAML 5-shot: the loss of run 0', 'not finite', 'lower --alpha'),
    ),
    ('regression', ['meta_sgd'], ("unknown argument 'meta_sgd'", '--name=value')),
    ('classification', ['--dataset=mnist'], ('--dataset=mnist', 'one of glyphs, omniglot, ')),
    ('classification', ['--eval_shots=1,x'], ('--eval_shots', 'whole numbers of at least 1')),
    ('classification', ['--table2'], ('dataset=omniglot', 'needs data_dir')),
    ('classification', ['--dataset=omniglot'], ('dataset=omniglot', 'needs data_dir')),
    (
      'classification', ['--dataset=omniglot', '--data_dir={file}/x'],
      ('data_dir {file}/x', 'the data set'),
    ),
  ],
)  # fmt: skip
def test_a_mistake_gets_one_sentence(module, flags, said, tmp_path):
  file = tmp_path / 'file'
  file.write_text('')
  flags = [flag.format(file=file) for flag in flags]
  done = commands.run(module, f'--workdir={tmp_path}/w', *flags)
  assert done.returncode in (1, 2)
  assert re.search(saying('error: ', *(part.format(file=file) for part in said)), done.stderr)
  assert 'Traceback' not in done.stderr


def test_a_configuration_as_flags_gives_itself():
  config = classification.Config(
    learner=('maml', 'lstm'), eval_shots=(1, 5), verify_archives=False, table2=True, data_dir='DIR', learning_rate=2e-3
  )
  found = options.as_flags(config)
  assert found == (
    '--learner=maml,lstm --table2 --dataset=omniglot --data_dir=DIR --noverify_archives --eval_shots=1,5 '
    '--learning_rate=0.002'
  )
  assert options.as_flags(regression.Config()) == ''


def test_a_run_from_the_command_line(command_run):
  workdir, done = command_run
  assert 'mean squared error after 1 inner step(s)' in done.stdout
  assert 'Meta-SGD 5-shot  3/3' in done.stderr
  assert list((workdir / 'compiled').iterdir())  # For the next run.


def test_an_error_of_ours_keeps_its_traceback(monkeypatch):
  def run():
    raise ValueError('a defect')

  monkeypatch.setattr(options.app, 'run', lambda start, flags_parser: start(['name']))
  monkeypatch.setattr(options, '_start_jax', lambda cache: None)
  with pytest.raises(ValueError, match='a defect'):
    options.main(lambda: run, regression.Config)
  with pytest.raises(SystemExit, match='error: a mistake'):
    options.main(lambda: (_ for _ in ()).throw(ValueError('a mistake')), regression.Config)


def test_a_stopped_program_ends_at_once_with_the_code_of_the_signal(monkeypatch):
  """Python itself would wait for the thread that compiles, and might crash."""
  codes = []

  def run():
    raise reporting.StoppedError(143)

  monkeypatch.setattr(options.app, 'run', lambda start, flags_parser: start(['name']))
  monkeypatch.setattr(options, '_start_jax', lambda cache: None)
  monkeypatch.setattr(options.os, '_exit', codes.append)
  options.main(lambda: run, regression.Config)
  assert codes == [143]
  monkeypatch.setattr(options.jax, 'process_count', lambda: 2)
  with pytest.raises(SystemExit):
    options.main(lambda: run, regression.Config)
