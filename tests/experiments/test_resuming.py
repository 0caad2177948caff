"""Runs that are killed, stopped, damaged or refused; those that go on end to the bit as if nothing had been."""

import collections
import dataclasses
import functools
import json
import os
import random
import re
import signal
import types

import jax
import numpy as np
import pytest
import torture
from problems import poisoned, saying
from quick_regression import quick_regression

from experiments import (
  classification,
  few_shot_training,
  inspecting,
  navigation,
  navigation_training,
  regression,
  reporting,
  resuming,
  trainings,
)
from experiments.reporting import TrainingError
from experiments.resuming import Keeping
from metasgd_jax.io import checkpoint, provenance
from metasgd_jax.io.checkpoint import CheckpointError
from metasgd_jax.outer import bad_numbers

CONFIG = regression.Config(meta_iterations=40, seeds=2, eval_tasks=3, eval_repeats=2)
MAML = dataclasses.replace(CONFIG, learner=('maml',), meta_iterations=20)
KEEPING = Keeping(checkpoint_every=4, keep_checkpoints=True)
VALIDATION = classification.Config(
  learner=('prototypical',),
  way=3,
  query=1,
  filters=2,
  meta_batch=1,
  meta_iterations=40,
  validate_every=4,
  ensemble=2,
  eval_tasks=3,
  eval_query=1,
)


@pytest.fixture(scope='module', autouse=True)
def quick():
  """Runs share their compiled programs and draw nothing; the one with SIGKILL compiles, and draws."""
  with quick_regression():
    yield


class CrashError(Exception):
  """As if the program had been killed here."""


@pytest.fixture
def at(monkeypatch):
  """`at(label, step, what)`: does something after these metrics have been written, and before anything is saved."""
  recorded = reporting.Recorder.__call__

  def arrange(label, step, what):
    def call(recorder, progress):
      recorded(recorder, progress)
      if (recorder._label, progress.step) == (label, step):
        what()

    monkeypatch.setattr(reporting.Recorder, '__call__', call)

  yield arrange
  monkeypatch.undo()


def crash():
  raise CrashError


def never_stopped(run, config, directory):
  run(config, directory, keeping=KEEPING)
  return torture.contents(directory)


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  return never_stopped(regression.run, CONFIG, tmp_path_factory.mktemp('whole'))


@pytest.fixture(scope='module')
def whole_maml(tmp_path_factory):
  return never_stopped(regression.run, MAML, tmp_path_factory.mktemp('whole_maml'))


def assert_same(workdir, expected):
  got = torture.contents(workdir)
  assert got.keys() == expected.keys()
  assert [name for name in got if got[name] != expected[name]] == []


def crashed(at, workdir, config=MAML, label='MAML 5-shot', step=11, keeping=KEEPING):
  at(label, step, crash)
  with pytest.raises(CrashError):
    regression.run(config, workdir, keeping)
  at(label, -1, crash)


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path, monkeypatch):
  """With SIGKILL, for which no program can prepare; `make torture` does it for longer."""
  monkeypatch.setenv('JAX_DISABLE_MOST_OPTIMIZATIONS', '1')
  case = (*torture.REGRESSION, '--learner=maml', '--seeds=1', '--meta_iterations=100')
  rng, hits = random.Random(0), collections.Counter()
  in_training = lambda: hits['in training'] + hits['while a checkpoint was written']
  for attempt in range(5):  # Moments go by the clock: three kills may all come before training or after it.
    (tmp_path / str(attempt)).mkdir()
    hits += torture.torture(case, 3, tmp_path / str(attempt), rng)
    if in_training():
      break
  assert in_training() > 0, hits


@pytest.mark.slow
def test_cut_off_several_times_in_several_trainings(tmp_path, at, whole, capsys):
  for label, step in (('Meta-SGD 5-shot', 2), ('Meta-SGD 5-shot', 14), ('Meta-SGD 5-shot', 40), ('MAML 5-shot', 22)):
    crashed(at, tmp_path, CONFIG, label, step)
  capsys.readouterr()
  regression.run(CONFIG, tmp_path, KEEPING)
  out = capsys.readouterr().out
  assert re.search(saying(f'{tmp_path} holds an unfinished run', 'goes on', '--restart begins anew'), out)
  assert 'Meta-SGD 5-shot: is trained already' in out
  assert 'MAML 5-shot: goes on from meta-iteration 20' in out
  assert_same(tmp_path, whole)


def test_the_same_run_twice_leaves_the_same_files(tmp_path, whole_maml):
  regression.run(MAML, tmp_path, KEEPING)
  assert_same(tmp_path, whole_maml)


def test_a_line_of_metrics_that_was_half_written(tmp_path, at, whole_maml):
  crashed(at, tmp_path)
  with (tmp_path / 'metrics.jsonl').open('a') as file:
    file.write('{"label": "MAML 5-shot", "step": 1')
  (tmp_path / '.metasgd_jax-0123456789abcdef').write_text('{')
  regression.run(MAML, tmp_path, KEEPING)
  assert_same(tmp_path, whole_maml)


def test_a_damaged_checkpoint_is_told_of_and_the_one_before_taken(tmp_path, at, whole_maml, capsys):
  crashed(at, tmp_path)
  newest = tmp_path / 'checkpoints' / 'maml_5shot' / '8'
  for path in (newest / 'state').rglob('d/*'):
    path.write_bytes(path.read_bytes()[:10])
  regression.run(MAML, tmp_path, KEEPING)
  out = capsys.readouterr().out
  assert re.search(saying(f'checkpoint {newest} cannot be read', '4, is used', 'goes on from meta-iteration 4'), out)
  assert_same(tmp_path, whole_maml)


def test_another_configuration_is_refused_and_nothing_touched(tmp_path, at, capsys):
  crashed(at, tmp_path)
  before = {path: path.read_bytes() for path in tmp_path.rglob('*') if path.is_file()}
  other = dataclasses.replace(MAML, eval_seed=7, shot=3)
  differ = '(shot: 5 there, 3 asked for; eval_seed: 0 there, 7 asked for)'
  with pytest.raises(CheckpointError, match=saying(tmp_path, 'unfinished run', differ, '--workdir', '--restart')):
    regression.run(other, tmp_path, KEEPING)
  assert {path: path.read_bytes() for path in tmp_path.rglob('*') if path.is_file()} == before
  regression.run(other, tmp_path, Keeping(restart=True))
  assert json.loads((tmp_path / 'config.json').read_text())['shot'] == 3
  assert len((tmp_path / 'metrics.jsonl').read_text().splitlines()) == 20
  assert not (tmp_path / 'checkpoints').exists()


def test_restart_begins_the_same_configuration_anew(tmp_path, at, whole_maml, capsys):
  crashed(at, tmp_path)
  regression.run(MAML, tmp_path, dataclasses.replace(KEEPING, restart=True))
  assert 'goes on' not in capsys.readouterr().out
  assert_same(tmp_path, whole_maml)


@pytest.mark.parametrize('keep', [True, False])
def test_a_finished_run_is_replaced(tmp_path, keep, capsys):
  regression.run(dataclasses.replace(MAML, shot=3), tmp_path, Keeping(keep_checkpoints=keep))
  assert (tmp_path / 'checkpoints').exists() == keep
  assert not resuming.unfinished(tmp_path)
  before = {path: path.read_bytes() for path in tmp_path.rglob('*') if path.is_file()}
  with pytest.raises(CheckpointError, match=saying(tmp_path, 'finished run', 'shot: 3 there, 5 asked', '--restart')):
    regression.run(MAML, tmp_path)
  assert {path: path.read_bytes() for path in tmp_path.rglob('*') if path.is_file()} == before
  regression.run(MAML, tmp_path, Keeping(restart=True))
  assert 'goes on' not in capsys.readouterr().out
  assert not (tmp_path / 'checkpoints').exists()
  assert not list(tmp_path.glob('*_3shot*'))
  assert not list(tmp_path.glob('.*'))


def test_a_run_that_is_replaced_stays_until_the_new_one_trains(tmp_path, monkeypatch):
  regression.run(dataclasses.replace(MAML, shot=3), tmp_path, KEEPING)
  before = {path: path.read_bytes() for path in tmp_path.rglob('*') if path.is_file()}
  with monkeypatch.context() as patch, pytest.raises(CrashError):
    patch.setattr(trainings.ms, 'train', lambda *args, **options: crash())  # As if the memory did not suffice.
    regression.run(MAML, tmp_path, Keeping(restart=True))
  assert {path: path.read_bytes() for path in tmp_path.rglob('*') if path.is_file()} == before


def test_a_run_that_is_replaced_stays_if_the_new_one_meets_a_bad_number(tmp_path, monkeypatch):
  regression.run(dataclasses.replace(MAML, shot=3), tmp_path, KEEPING)
  before = {path: path.read_bytes() for path in tmp_path.rglob('*') if path.is_file()}
  monkeypatch.setattr(regression, 'sinusoid', lambda *args, **options: poisoned([1], task=3))
  said = saying('is not finite', 'meta-iteration 1 (from 0)', 'nothing is saved', 'the earlier run is unchanged')
  with pytest.raises(TrainingError, match=said):
    regression.run(dataclasses.replace(MAML, seeds=1), tmp_path, Keeping(restart=True))
  assert {path: path.read_bytes() for path in tmp_path.rglob('*') if path.is_file()} == before


def test_metrics_that_were_lost_are_missed(tmp_path, at):
  crashed(at, tmp_path)
  (tmp_path / 'metrics.jsonl').write_text('')
  lost = saying('metrics.jsonl', 'lost lines of MAML 5-shot', 'before meta-iteration 8', '--restart')
  with pytest.raises(CheckpointError, match=lost):
    regression.run(MAML, tmp_path, KEEPING)


def test_other_versions_are_told_of(tmp_path, at, monkeypatch, capsys):
  crashed(at, tmp_path)
  now = provenance.collect()
  monkeypatch.setattr(provenance, 'collect', lambda: now | {'versions': now['versions'] | {'jax': '99'}})
  regression.run(MAML, tmp_path, KEEPING)
  assert f'versions have changed (jax {jax.__version__} → 99)' in capsys.readouterr().out


def test_an_unfinished_run_that_is_older_than_an_option_goes_on(tmp_path, at, monkeypatch, capsys):
  plain = resuming._plain
  with monkeypatch.context() as patch:
    patch.setattr(resuming, '_plain', lambda c: {name: v for name, v in plain(c).items() if name != 'bad_steps'})
    crashed(at, tmp_path)
  inspecting.look([t for t, _ in regression.plan(MAML)], MAML, tmp_path, Keeping(debug_task=9))()
  assert 'replayed from 8' in capsys.readouterr().out
  regression.run(MAML, tmp_path, KEEPING)
  assert 'MAML 5-shot: goes on from meta-iteration 8' in capsys.readouterr().out


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_leaves(tmp_path, at, whole_maml, capsys, number):
  before = signal.getsignal(number)
  at('MAML 5-shot', 7, lambda: os.kill(os.getpid(), number))
  with pytest.raises(SystemExit) as e:
    regression.run(MAML, tmp_path, dataclasses.replace(KEEPING, checkpoint_every=100))
  assert e.value.code == {signal.SIGTERM: 143, signal.SIGINT: 130}[number]
  first, last = capsys.readouterr().out.splitlines()
  assert re.match(saying(f'{number.name}: stops when this chunk', 'saved'), first)
  assert re.match(
    saying(f'stopped by {number.name}: MAML 5-shot', 'meta-iteration 7 of 20', tmp_path, 'same command'), last
  )
  assert signal.getsignal(number) == before
  assert checkpoint.steps(tmp_path / 'checkpoints' / 'maml_5shot') == [7]
  at('MAML 5-shot', -1, crash)
  regression.run(MAML, tmp_path, KEEPING)
  name = lambda found: {k: v for k, v in found.items() if not k.startswith('checkpoints')}
  assert name(torture.contents(tmp_path)) == name(whole_maml)


def test_sigterm_while_nothing_is_trained_leaves_at_once(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(regression, '_test', lambda *_: os.kill(os.getpid(), signal.SIGTERM))
  with pytest.raises(SystemExit) as e:
    regression.run(MAML, tmp_path, KEEPING)
  assert e.value.code == 143
  assert re.search(saying('stopped by SIGTERM', 'is saved', 'the same command goes on'), capsys.readouterr().out)
  assert resuming.unfinished(tmp_path)


@pytest.mark.slow
def test_the_best_of_validation_survive(tmp_path, at, capsys):
  setup = few_shot_training.build(VALIDATION)
  run = functools.partial(classification.run, setup=setup)
  expected = never_stopped(run, VALIDATION, tmp_path / 'whole')
  directory = tmp_path / 'killed'
  for step in (14, 32, 40):
    at('Prototypical Nets', step, crash)
    with pytest.raises(CrashError):
      run(VALIDATION, directory, keeping=KEEPING)
  at('Prototypical Nets', -1, crash)
  run(VALIDATION, directory, keeping=KEEPING)
  assert 'Prototypical Nets: goes on from meta-iteration 36' in capsys.readouterr().out
  assert_same(directory, expected)
  accuracies = {
    step: json.loads((path / 'about' / 'metadata').read_text())['metric']
    for path in (directory / 'checkpoints' / 'prototypical_run0').iterdir()
    for step in [int(path.name)]
  }
  lines = [json.loads(line) for line in (directory / 'metrics.jsonl').read_text().splitlines()]
  found = {line['step']: line['validation_accuracy'] for line in lines if 'validation_accuracy' in line}
  assert list(found) == list(range(4, 41, 4))
  best = sorted(found, key=lambda step: (found[step], step))[-2:]
  assert {*best, 36, 40} == set(accuracies)
  assert all(accuracies[step] == found[step] for step in accuracies)


def test_a_bad_number_stops_the_run_with_the_last_good_state_saved(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(regression, 'sinusoid', lambda *args, **options: poisoned([13], task=3))
  config = dataclasses.replace(MAML, seeds=1, meta_iterations=40)
  sentence = saying(
    'MAML 5-shot: the loss of run 0 (from 0) is not finite',
    'meta-iteration 13 (from 0)',
    'task 3 of 4 (from 0)',
    'loss nan',
    'gradient of theta.Dense_0.bias',
    'jax.random.wrap_key_data(jax.numpy.uint32([',
    'meta-iteration 12 is saved',
    tmp_path / 'checkpoints' / 'maml_5shot',
    '--debug_task=13',
  )
  with pytest.raises(TrainingError, match=sentence):
    regression.run(config, tmp_path)
  assert checkpoint.steps(tmp_path / 'checkpoints' / 'maml_5shot') == [12]
  assert json.loads((tmp_path / 'metrics.jsonl').read_text().splitlines()[-1])['step'] == 12
  with pytest.raises(TrainingError, match=saying('not finite', 'meta-iteration 13')):
    regression.run(config, tmp_path)  # It goes on, and meets it again.

  before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*')}
  capsys.readouterr()
  inspecting.look([t for t, _ in regression.plan(config)], config, tmp_path, Keeping(debug_task=13))()
  out = capsys.readouterr().out
  assert 'MAML 5-shot: meta-iteration 13 (from 0), replayed from 12' in out
  assert '1 of 4 tasks are not finite' in out
  assert 'task 3: loss nan  not finite' in out
  assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*')} == before


def test_a_bad_step_is_skipped_and_counted(tmp_path, monkeypatch):
  monkeypatch.setattr(regression, 'sinusoid', lambda *args, **options: poisoned([13, 14], task=3, seed=1))
  monkeypatch.setattr(regression, 'TEST_SHOTS', ())
  monkeypatch.setattr(regression, '_table', lambda *_: '')
  monkeypatch.setattr(regression, '_pictures', lambda *_: {})
  monkeypatch.setattr(regression, '_test', lambda *_: None)
  tests = regression.trainings.train
  done = []
  monkeypatch.setattr(regression.trainings, 'train', lambda *args: done.append(tests(*args)) or done[-1])
  config = dataclasses.replace(MAML, bad_steps='skip')
  regression.run(config, tmp_path)
  lines = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
  assert [line['skipped'] for line in lines[12:16]] == [[0, 0], [0, 1], [0, 2], [0, 2]]
  assert [line['loss'][1] is None for line in lines] == [i in (13, 14) for i in range(20)]
  assert all(line['loss'][0] is not None for line in lines)
  assert done[0].skipped['skipped_steps'].tolist() == [0, 2]


def test_a_run_that_skips_goes_on_to_the_bit(tmp_path, monkeypatch, at):
  tasks = poisoned([2, 3], task=3, seed=1)
  monkeypatch.setattr(regression, 'sinusoid', lambda *args, **options: tasks)
  monkeypatch.setattr(regression, 'TEST_SHOTS', ())
  monkeypatch.setattr(regression, '_table', lambda *_: '')
  monkeypatch.setattr(regression, '_pictures', lambda *_: {})
  config = dataclasses.replace(MAML, bad_steps='skip', meta_iterations=8)
  expected = never_stopped(regression.run, config, tmp_path / 'whole')
  at('MAML 5-shot', 6, crash)
  with pytest.raises(CrashError):
    regression.run(config, tmp_path / 'killed', KEEPING)
  at('MAML 5-shot', -1, crash)
  regression.run(config, tmp_path / 'killed', KEEPING)
  assert_same(tmp_path / 'killed', expected)
  lines = [json.loads(line) for line in expected['metrics.jsonl'].splitlines()]
  assert [line['skipped'] for line in lines[2:]] == [[0, 1], *[[0, 2]] * 5]


@pytest.mark.slow
def test_a_navigation_goes_on_to_the_bit(tmp_path, monkeypatch, at, capsys):
  """TRPO's meta-iterations, whose state has no optimiser."""
  monkeypatch.setattr(navigation, '_save_films', lambda *_: None)
  for name in ('build_environments', 'build_inner'):
    cached = functools.cache(getattr(navigation, name))
    for module in (navigation, navigation_training):
      monkeypatch.setattr(module, name, cached)
  config = navigation.Config(
    learner=('meta_sgd',),
    optimizer=('trpo',),
    trajectories=2,
    meta_batch=2,
    curvature_tasks=2,
    meta_iterations=3,
    eval_tasks=2,
    eval_updates=1,
  )
  keeping = dataclasses.replace(KEEPING, checkpoint_every=1)
  navigation.run(config, tmp_path / 'whole', keeping)
  at('Meta-SGD by TRPO, fixed start', 3, crash)
  with pytest.raises(CrashError):
    navigation.run(config, tmp_path / 'killed', keeping)
  at('Meta-SGD by TRPO, fixed start', -1, crash)
  navigation.run(config, tmp_path / 'killed', keeping)
  assert 'Meta-SGD by TRPO, fixed start: goes on from meta-iteration 2' in capsys.readouterr().out
  assert_same(tmp_path / 'killed', torture.contents(tmp_path / 'whole'))


def test_only_the_first_process_says_where_the_state_is_saved(tmp_path, monkeypatch):
  training = dataclasses.replace(regression.plan(MAML)[0][0], inspect=None)
  run = resuming.Run(tmp_path, {}, Keeping())
  bad = bad_numbers.BadStep(13, 0, float('nan'), training, [])
  monkeypatch.setattr(bad_numbers, 'find', lambda *_: bad)
  kept = types.SimpleNamespace(save=lambda state: None, wait=lambda: None, last=12)
  with pytest.raises(TrainingError, match=saying('is saved in', tmp_path)):
    trainings._AfterChunk(training, run, kept, None, None, None)(None)
  with pytest.raises(TrainingError, match=saying('meta-iteration 13', 'the first process says what to do')) as e:
    trainings._AfterChunk(training, run, None, None, None, None)(None)
  assert str(tmp_path) not in str(e.value)


def last_line(capsys):
  return capsys.readouterr().out.splitlines()[-1]


def test_a_plan_of_memory_says_that_runs_are_side_by_side(capsys):
  inspecting.print_memory([training for training, _ in regression.plan(MAML)])
  assert re.match(saying('one run; 2 are trained side by side', '2 times as much'), last_line(capsys))
  inspecting.print_memory([regression.plan(dataclasses.replace(MAML, seeds=1))[0][0]])
  out = capsys.readouterr().out
  assert '  total ' in out
  assert '1 are trained' not in out


def test_a_chunk_with_a_skipped_step_has_the_mean_of_the_others():
  values = np.array([[1.0, np.nan], [2.0, np.inf], [np.nan, np.nan]], np.float32)
  np.testing.assert_array_equal(reporting._finite_mean(values, 0), np.array([1.5, np.nan], np.float32))
  whole = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)
  assert np.array_equal(reporting._finite_mean(whole, 0), np.mean(whole, axis=0))


def test_debugging_without_a_checkpoint_replays_from_the_beginning(tmp_path, capsys):
  config = dataclasses.replace(MAML, meta_iterations=20)
  plan = [t for t, _ in regression.plan(config)]
  inspecting.look(plan, config, tmp_path, Keeping(debug_task=5))()
  out = capsys.readouterr().out
  assert 'MAML 5-shot: meta-iteration 5 (from 0), replayed from 0' in out
  assert out.count('0 of 4 tasks are not finite') == 2
  state = plan[0].go(plan[0].start(), 5, ())
  report = bad_numbers.inspect_step(
    reporting.one_run(state, 1),
    regression.sinusoid(regression.META_SGD_SINUSOIDS, shot=5, query=10),
    learner=regression.build_learner('maml', config),
    meta_batch=4,
  )
  assert f'task 2: loss {report.losses[2]:.6g}' in out


@pytest.mark.parametrize(
  ('keeping', 'said'),
  [
    (dict(debug_task=3, plan=True), ('--plan and --debug_task', 'give one')),
    (dict(debug_task=20), ('debug_task', 'from 0 to 19', 'got 20')),
  ],
)
def test_what_cannot_be_looked_into(tmp_path, keeping, said):
  with pytest.raises(ValueError, match=saying(*said)):
    inspecting.look([t for t, _ in regression.plan(MAML)], MAML, tmp_path, Keeping(**keeping))
