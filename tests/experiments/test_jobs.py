"""Trainings in processes of their own: what they run, how they stop, and that one process would give the same."""

import dataclasses
import functools
import itertools
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torture
from problems import saying
from quick_regression import quick_regression

from experiments import (
  classification,
  few_shot_table,
  few_shot_training,
  jobs,
  regression,
  replacing,
  resuming,
  running,
  trainings,
)
from experiments.jobs import Job, Jobs
from experiments.reporting import TrainingError
from experiments.resuming import Keeping
from metasgd_jax.io import checkpoint, files
from metasgd_jax.io.checkpoint import CheckpointError

PROGRAM = """
import json, os, pathlib, signal, sys, time
flags = dict(word.removeprefix('--').split('=') for word in sys.argv[1:])
directory = pathlib.Path(flags['workdir'])
directory.mkdir()
stop, seen = [], directory.parent / 'seen'
def come(*_):
  stop.append(1)
  with seen.open('a') as file:
    file.write(directory.name + '\\n')
signal.signal(signal.SIGTERM, come)
begin = time.time()
with (directory / 'metrics.jsonl').open('w') as file:
  file.write(json.dumps({'label': 'a', 'step': int(flags['steps'])}) + '\\n')
while (not stop or flags['steps'] == '4') and time.time() < begin + float(flags['seconds']):
  time.sleep(0.01)
if flags['steps'] == '2':
  os.kill(os.getpid(), signal.SIGKILL)
(directory / 'facts').write_text(json.dumps([sorted(os.sched_getaffinity(0)), begin, time.time(), bool(stop)]))
print('warning: it is slow', flush=True)
if flags['steps'] == '3':
  sys.exit('error: it fails')
"""


@pytest.fixture
def job(tmp_path, monkeypatch):
  """`job(name, steps, seconds)`: a command that waits.

  With two steps it is killed, with three it fails, and with four it does not stop at SIGTERM.
  """
  (tmp_path / 'a_program.py').write_text(PROGRAM)
  monkeypatch.setenv('PYTHONPATH', str(tmp_path))
  monkeypatch.setattr(jobs, 'SECONDS', 0.02)

  def make(name, steps=5, seconds=0.3):
    return Job(name, tmp_path / 'jobs' / name, ['a_program', f'--steps={steps}', f'--seconds={seconds}'], 5)

  return make


def facts(job):
  return json.loads((job.directory / 'facts').read_text())


def test_each_process_has_a_core_and_no_core_two_processes_at_once(job):
  on = sorted(os.sched_getaffinity(0))[:2]
  todo = [job(f'job{i}') for i in range(4)]
  jobs.run_all(todo, on)
  found = [facts(one) for one in todo]
  assert {core for (core,), *_ in found} == set(on)
  for core in on:
    spans = sorted((begin, end) for (of,), begin, end, _ in found if of == core)
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))


def test_a_job_that_fails_is_named_and_the_others_are_finished(job):
  todo = [job('one', steps=3), job('two'), job('three')]
  with pytest.raises(TrainingError, match=saying('1 of 3 trainings failed', 'one: it fails', todo[0].log)):
    jobs.run_all(todo, [0])
  assert facts(todo[2])


def test_of_a_job_that_was_killed_the_signal_is_named(job):
  message = saying('one was ended by SIGKILL (often too little memory); lower --jobs, and give the same command')
  with pytest.raises(TrainingError, match=message):
    jobs.run_all([job('one', steps=2)], [0])


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_all_and_begins_no_other(job, number, capsys):
  todo = [job('one', seconds=30), job('two', seconds=30), job('three')]
  before = signal.getsignal(number)
  threading.Timer(0.5, os.kill, (os.getpid(), number)).start()
  assert jobs.run_all(todo, [0, 0]) == number
  assert [facts(one)[-1] for one in todo[:2]] == [True, True]
  assert not todo[2].directory.exists()
  assert re.search(saying(number.name, 'stops when', 'saved'), capsys.readouterr().out)
  assert signal.getsignal(number) == before


def begun(todo):
  while not all((one.directory / 'metrics.jsonl').exists() for one in todo):
    time.sleep(0.01)


@pytest.mark.parametrize('visited', [0, 1])
def test_a_signal_at_any_moment_reaches_each_job_once(job, monkeypatch, visited):
  """Here the signal comes while the jobs are visited."""
  todo, visits, relay = [job('one', seconds=30), job('two', seconds=30)], [], jobs._relay

  def signal_comes(output):
    relay(output)
    if len(visits) == 2 + visited:
      begun(todo)
      os.kill(os.getpid(), signal.SIGTERM)
    visits.append(output)

  monkeypatch.setattr(jobs, '_relay', signal_comes)
  assert jobs.run_all(todo, [0, 0]) == signal.SIGTERM
  assert sorted((todo[0].directory.parent / 'seen').read_text().split()) == ['one', 'two']


def test_a_second_signal_ends_the_jobs(job):
  todo = [job('one', steps=4, seconds=60), job('two', steps=4, seconds=60)]

  def two_signals():
    begun(todo)
    os.kill(os.getpid(), signal.SIGINT)
    while not (seen := todo[0].directory.parent / 'seen').exists() or len(seen.read_text().split()) < 2:
      time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGINT)

  threading.Thread(target=two_signals).start()
  with pytest.raises(KeyboardInterrupt):
    jobs.run_all(todo, [0, 0])
  assert not any((one.directory / 'facts').exists() for one in todo)
  assert len((todo[0].directory.parent / 'seen').read_text().split()) == 2


def test_warnings_of_a_job_are_shown(job, capsys):
  jobs.run_all([job('one'), job('two')], [0, 0])
  found = capsys.readouterr()
  assert (found.out + found.err).count('warning: it is slow') == 2


def test_an_error_ends_the_jobs(job, monkeypatch):
  todo = [job('one', seconds=30)]
  monkeypatch.setattr(jobs, '_relay', lambda output: 1 / 0)
  with pytest.raises(ZeroDivisionError):
    jobs.run_all(todo, [0])
  started = todo[0].directory / 'facts'
  assert not todo[0].directory.exists() or started.exists()


def test_a_job_stops_when_its_parent_is_killed():
  """The parent's end of the pipe is closed then."""
  code = 'import time; from experiments import jobs; jobs.stop_with_parent(); time.sleep(60)'
  how = dict(cwd=pathlib.Path(regression.__file__).parents[1], env=os.environ | {jobs._IS_JOB: '1'})
  with subprocess.Popen([sys.executable, '-c', code], stdin=subprocess.PIPE, **how) as process:
    process.stdin.close()
    assert process.wait(50) == -signal.SIGTERM


def test_a_job_has_the_flags_that_say_what_is_trained_and_how_often_it_is_saved():
  keeping = Keeping(checkpoint_every=7, keep_checkpoints=True, restart=True, jobs=3)
  command = running.job_command('regression', regression.Config(shot=3), keeping)
  assert command == ['experiments.regression', '--shot=3', '--checkpoint_every=7']


def test_one_core_or_one_training_needs_no_processes(tmp_path, monkeypatch):
  monkeypatch.setattr(jobs, 'run_all', lambda *_: pytest.fail('a process began'))
  config = dataclasses.replace(CONFIG, learner=('maml',))
  with resuming.open_run(tmp_path, CONFIG) as opened:
    Jobs([], [0]).train(plan(CONFIG), opened)
    Jobs([], [0, 1]).train(plan(config), opened)
    Jobs([], [0], least=1).train(plan(config), opened)
    opened.begun = False


def test_a_single_training_may_get_a_process(tmp_path, monkeypatch):
  seen = []
  monkeypatch.setattr(jobs, 'run_all', lambda todo, on: seen.extend(todo))
  config = dataclasses.replace(CONFIG, learner=('maml',))
  with resuming.open_run(tmp_path, config) as opened:
    Jobs([], [0, 1], least=1).train(plan(config), opened)
    opened.begun = False
  assert [one.directory.name for one in seen] == ['maml_5shot']


@pytest.mark.parametrize(
  ('keeping', 'devices', 'expected'),
  [({'jobs': 1}, None, 1), ({}, 2, 1), ({'profile': True}, None, 1), ({'jobs': 3}, None, 3)],
)
def test_number_of_processes(keeping, devices, expected):
  assert len(jobs.cores(Keeping(**keeping), devices)) == expected


def test_by_default_there_is_a_process_on_each_core():
  assert jobs.cores(Keeping(), None) == sorted(os.sched_getaffinity(0))


CONFIG = regression.Config(meta_iterations=20, seeds=2, eval_tasks=3, eval_repeats=2)
KEEPING = Keeping(checkpoint_every=4, keep_checkpoints=True)


def plan(config):
  return [training for training, _ in regression.plan(config)]


@pytest.fixture(scope='module', autouse=True)
def quick():
  """Runs share their compiled programs and draw nothing."""
  with quick_regression():
    yield


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('whole')
  regression.run(CONFIG, workdir, KEEPING)
  return torture.contents(workdir)


def in_this_process(todo, on, config=CONFIG):
  """As the processes of `run_all` train."""
  for one in todo:
    name = one.directory.name
    keeping = dataclasses.replace(KEEPING, only=name)
    trainings.train_only(trainings.named(name, plan(config)), config, one.directory, keeping)


class CrashError(Exception):
  """As if the program had been killed here."""


@pytest.mark.slow
def test_what_is_trained_apart_is_what_one_process_trains(tmp_path, monkeypatch, whole):
  monkeypatch.setattr(jobs, 'run_all', in_this_process)
  regression.run(CONFIG, tmp_path, KEEPING, jobs=Jobs([], [0, 1]))
  assert torture.contents(tmp_path) == whole
  assert not (tmp_path / 'jobs').exists()


@pytest.mark.slow
def test_a_run_that_is_stopped_while_others_train_goes_on(tmp_path, monkeypatch, whole):
  """Stopped after one of two trainings; what it replaces is kept as long as nothing is saved."""

  def stop(todo, on):
    in_this_process(todo[:number], on)
    raise CrashError

  monkeypatch.setattr(jobs, 'run_all', stop)
  regression.run(dataclasses.replace(CONFIG, shot=3), tmp_path, KEEPING)
  before = torture.contents(tmp_path)
  restart, apart = dataclasses.replace(KEEPING, restart=True), Jobs([], [0, 1])
  for number in (0, 1):
    with pytest.raises(CrashError):
      regression.run(CONFIG, tmp_path, restart, jobs=apart)
    assert (torture.contents(tmp_path) == before) == (number == 0)
  regression.run(CONFIG, tmp_path, KEEPING, jobs=apart)  # One training is left, so it needs no process.
  assert torture.contents(tmp_path) == whole


def test_a_kill_while_results_are_moved_loses_nothing(tmp_path, monkeypatch, whole):
  """Some checkpoints are moved then, or all."""
  monkeypatch.setattr(jobs, 'run_all', in_this_process)
  rename, remove = pathlib.Path.rename, replacing.remove_run

  def second_fails(path, target):
    rename(path, target)
    monkeypatch.setattr(pathlib.Path, 'rename', crash)

  def crash(*_):
    monkeypatch.setattr(pathlib.Path, 'rename', rename)
    monkeypatch.setattr(replacing, 'remove_run', remove)
    raise CrashError

  for name, patched in ((pathlib.Path, 'rename'), second_fails), ((replacing, 'remove_run'), crash):
    monkeypatch.setattr(*name, patched)
    with pytest.raises(CrashError):
      regression.run(CONFIG, tmp_path, KEEPING, jobs=Jobs([], [0, 1]))
  regression.run(CONFIG, tmp_path, KEEPING, jobs=Jobs([], [0, 1]))
  assert torture.contents(tmp_path) == whole
  assert not (tmp_path / 'jobs').exists()


def test_a_training_that_one_process_began_is_not_begun_anew(tmp_path, monkeypatch):
  seen = []
  monkeypatch.setattr(jobs, 'run_all', lambda todo, on: seen.extend(one.directory.name for one in todo))
  config = dataclasses.replace(CONFIG, table1=True)
  with resuming.open_run(tmp_path, config, KEEPING) as opened:
    first, *others = plan(config)
    checkpoints = opened.checkpoints(first.name)
    (checkpoints / '4').mkdir(parents=True)
    monkeypatch.setattr(checkpoint, 'steps', lambda path: [4] if path == checkpoints else [])
    Jobs([], [0, 1]).train([first, *others], opened)
    assert seen == [training.name for training in others]
    monkeypatch.undo()
    opened.begun = False


def test_a_finished_run_leaves_hidden_files_of_the_user(tmp_path, monkeypatch):
  """Half-written files are removed: those of an earlier program, and those of processes that were killed."""
  (mine := tmp_path / '.results.json-20261127').write_text('mine')
  (tmp_path / '.metasgd_jax-0123456789abcdef').write_text('{')

  def with_halves(todo, on):
    in_this_process(todo, on)
    (todo[0].directory / '.metasgd_jax-0123456789abcdef').write_text('{')

  monkeypatch.setattr(jobs, 'run_all', with_halves)
  regression.run(CONFIG, tmp_path, KEEPING, jobs=Jobs([], [0, 1]))
  assert [path.name for path in tmp_path.glob('.*')] == [mine.name]
  assert not (tmp_path / 'jobs').exists()


@pytest.mark.parametrize('name', ['jobs/notes', 'jobs/maml_5shot.log'])
def test_files_of_the_user_where_jobs_write_are_refused(tmp_path, monkeypatch, name):
  monkeypatch.setattr(jobs, 'run_all', lambda *_: pytest.fail('a process began'))
  (tmp_path / 'jobs').mkdir()
  (tmp_path / name).write_text('mine')
  with pytest.raises(files.WriterError, match=saying(tmp_path / 'jobs', 'no run has written it')):
    regression.run(CONFIG, tmp_path, KEEPING, jobs=Jobs([], [0, 1]))
  assert (tmp_path / name).read_text() == 'mine'


def test_logs_are_the_runs_own_until_they_are_removed(tmp_path, monkeypatch):
  """A log that comes into the folder later is the user's."""

  def with_logs(todo, on):
    for one in todo:
      one.log.parent.mkdir(exist_ok=True)
      one.log.write_text('lines')
      assert f'jobs/{one.log.name}' in replacing.read_record(tmp_path)['files']
    in_this_process(todo, on)

  monkeypatch.setattr(jobs, 'run_all', with_logs)
  regression.run(CONFIG, tmp_path, KEEPING, jobs=Jobs([], [0, 1]))
  assert not (tmp_path / 'jobs').exists()
  assert not [name for name in replacing.read_record(tmp_path)['files'] if name.startswith('jobs')]
  (tmp_path / 'jobs').mkdir()
  (log := tmp_path / 'jobs' / 'maml_5shot.log').write_text('mine')
  with pytest.raises(files.WriterError, match=saying(tmp_path / 'jobs', 'no run has written it')):
    regression.run(CONFIG, tmp_path, dataclasses.replace(KEEPING, restart=True), jobs=Jobs([], [0, 1]))
  assert log.read_text() == 'mine'
  assert replacing.read_record(tmp_path)['finished']


def test_logs_of_a_run_that_is_to_be_replaced_come_back(tmp_path, monkeypatch):
  def begins(todo, on):
    in_this_process(todo[:1], on)
    todo[0].log.write_text('lines')
    raise CrashError

  def crash(todo, on):
    assert not todo[0].log.exists()
    raise CrashError

  apart = Jobs([], [0, 1])
  monkeypatch.setattr(jobs, 'run_all', begins)
  with pytest.raises(CrashError):
    regression.run(CONFIG, tmp_path, KEEPING, jobs=apart)
  before = torture.contents(tmp_path)
  monkeypatch.setattr(jobs, 'run_all', crash)
  for _ in range(2):
    with pytest.raises(CrashError):
      regression.run(CONFIG, tmp_path, dataclasses.replace(KEEPING, restart=True), jobs=apart)
    assert torture.contents(tmp_path) == before


def test_a_training_is_tested_once_where_it_is_trained(tmp_path):
  tested = []

  def test(state):
    tested.append(int(state.step[0]))
    return np.full((3, 2), 7.0)

  training = dataclasses.replace(plan(CONFIG)[0], test=test)
  apart = tmp_path / 'jobs' / training.name
  trainings.train_only(training, CONFIG, apart, dataclasses.replace(KEEPING, only=training.name))
  with resuming.open_run(tmp_path, CONFIG, KEEPING) as opened:
    trained = [trainings.train(training, opened) for _ in range(2)]
  assert tested == [20]
  assert np.array_equal(running.joined(trained).values, np.full((2, 3, 2), 7.0))
  assert not (tmp_path / 'jobs').exists()


def test_event_files_are_kept(tmp_path, monkeypatch):
  config = dataclasses.replace(CONFIG, tensorboard=True)
  monkeypatch.setattr(jobs, 'run_all', functools.partial(in_this_process, config=config))
  regression.run(config, tmp_path, KEEPING, jobs=Jobs([], [0, 1]))
  events = b''.join(path.read_bytes() for path in tmp_path.glob('events.out.tfevents.*'))
  assert {b'MAML_5-shot' in events, b'Meta-SGD_5-shot' in events, b'alpha' in events} == {True}
  assert not (tmp_path / 'jobs').exists()


def test_only_must_be_a_training():
  with pytest.raises(ValueError, match=saying('--only', 'maml_5shot', "got 'other'")):
    trainings.named('other', plan(CONFIG))


def test_only_leaves_a_finished_run_as_it_is(tmp_path, whole):
  regression.run(CONFIG, tmp_path, KEEPING)
  keeping = dataclasses.replace(KEEPING, only='maml_5shot')
  trainings.train_only(plan(CONFIG)[0], CONFIG, tmp_path, keeping)
  assert torture.contents(tmp_path) == whole


def test_each_cell_of_a_table_that_is_left_is_a_process(tmp_path, monkeypatch):
  config = classification.Config(learner=('lstm',), table2=True, data_dir='somewhere', meta_iterations=7)
  cells, seen = few_shot_table.cells(config), []
  monkeypatch.setattr(few_shot_table, 'run_all', lambda todo, on: seen.extend(todo))
  monkeypatch.setattr(few_shot_table, '_done', lambda cell, _: cell == cells[0])
  few_shot_table._train_apart(cells, [cells[1]], tmp_path, Keeping(restart=True, jobs=2), Jobs([], [0, 1]))
  assert seen == []  # One cell is left.
  monkeypatch.setattr(few_shot_table, '_done', lambda *_: False)
  few_shot_table._train_apart(cells, [cells[1]], tmp_path, Keeping(restart=True, jobs=2), Jobs([], [0, 1]))
  assert [one.total for one in seen] == [7, 7]
  assert ['--restart' in one.arguments for one in seen] == [False, True]
  for cell, one in zip(cells, seen, strict=True):
    assert one.directory.name == f'omniglot_lstm_{cell.way}way_1shot'
    assert {f'--way={cell.way}', '--learner=lstm', '--meta_iterations=7', '--data_dir=somewhere'} >= {
      text for text in one.arguments if text.startswith(('--way', '--learner', '--meta', '--data_dir'))
    }
    assert not [text for text in one.arguments if text.startswith(('--table', '--jobs'))]


def test_a_refused_cell_is_told_of_before_any_begins(tmp_path, monkeypatch):
  config = classification.Config(learner=('lstm',), table2=True, data_dir='somewhere')
  monkeypatch.setattr(few_shot_table.resuming, 'check', lambda *_: (_ for _ in ()).throw(CheckpointError('no')))
  with pytest.raises(CheckpointError):
    few_shot_table.prepare(config, tmp_path, few_shot_training.build, classification.run, Keeping(), Jobs([], [0, 1]))


COMMAND = [
  *(sys.executable, '-m', 'experiments.regression', '--seeds=1', '--eval_tasks=3', '--eval_repeats=2'),
  *('--meta_iterations=20000', '--checkpoint_every=1000', '--jobs=2'),
]


@pytest.mark.slow
def test_a_command_that_is_stopped_and_given_again_ends_as_if_never_stopped(tmp_path):
  root, results = pathlib.Path(regression.__file__).parents[1], []
  for name in ('whole', 'stopped'):
    command = [*COMMAND, f'--workdir={tmp_path / name}']
    process = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if name == 'stopped':
      directories = [tmp_path / name / 'jobs' / f'{learner}_5shot' for learner in ('maml', 'meta_sgd')]
      while not all(checkpoint.steps(resuming.checkpoints_of(d, d.name)) for d in directories):
        assert process.poll() is None
        time.sleep(0.05)
      process.send_signal(signal.SIGTERM)
      assert 'the same command goes on' in process.communicate()[0]
      assert process.returncode == 143
      process = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    out = process.communicate()[0]
    assert process.returncode == 0, out
    results.append({p.name: p.read_bytes() for p in (tmp_path / name).glob('*.safetensors')})
  assert results[0].keys() == {'params_maml_5shot.safetensors', 'params_meta_sgd_5shot.safetensors'}
  assert results[0] == results[1]
