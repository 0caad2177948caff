"""Experiments by two processes, which meet at a port of this host: as one process has it, and killed half-way too."""

import contextlib
import dataclasses
import json
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import types

import commands
import jax
import numpy as np
import pytest
import torture
from problems import saying
from safetensors.numpy import load_file

from experiments import classification, few_shot_training, navigation, processes, regression, reporting
from experiments.processes import Machines
from experiments.resuming import Keeping

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIG = regression.Config(learner=('meta_sgd',), seeds=2, meta_iterations=200, eval_tasks=6, eval_repeats=2)
FLAGS = (
  '--learner=meta_sgd',
  '--seeds=2',
  '--meta_iterations=200',
  '--eval_tasks=6',
  '--eval_repeats=2',
  '--checkpoint_every=20',
  '--keep_checkpoints',
)


def free_port():
  with socket.socket() as found:
    found.bind(('localhost', 0))
    return found.getsockname()[1]


@contextlib.contextmanager
def two(module, workdir, *flags):
  """Two processes of one device each; on leaving, those that still run are killed."""
  meeting = f'--coordinator=localhost:{free_port()}'
  running = [
    subprocess.Popen(
      [
        sys.executable,
        '-m',
        f'experiments.{module}',
        f'--workdir={workdir}',
        meeting,
        '--num_processes=2',
        f'--process_id={i}',
        *flags,
      ],
      cwd=ROOT,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in range(2)
  ]
  try:
    yield running
  finally:
    for process in running:
      process.kill()
      process.communicate()


def ended(running):
  """What each printed, stdout and stderr."""
  return [process.communicate(timeout=300) for process in running]


@pytest.fixture(scope='module', autouse=True)
def one_device_each(tmp_path_factory):
  """Of each process; all of them share their compiled programs."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('JAX_NUM_CPU_DEVICES', '1')
    patch.setenv('JAX_COMPILATION_CACHE_DIR', str(tmp_path_factory.mktemp('compiled')))
    patch.setenv('JAX_DISABLE_MOST_OPTIMIZATIONS', '1')
    patch.setenv('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
    patch.setattr(reporting, 'save_pictures', lambda *_: None)
    yield


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """A run that nothing stops, and what it printed."""
  workdir = tmp_path_factory.mktemp('processes') / 'whole'
  with two('regression', workdir, *FLAGS) as running:
    printed = ended(running)
    assert [process.returncode for process in running] == [0, 0], printed
  return workdir, printed


@pytest.fixture
def no_pictures(tmp_path, monkeypatch):
  """Processes find no matplotlib, and so draw nothing."""
  (tmp_path / 'path').mkdir()
  (tmp_path / 'path' / 'matplotlib.py').write_text('raise ImportError')
  monkeypatch.setenv('PYTHONPATH', str(tmp_path / 'path'))


def params(workdir):
  return load_file(workdir / 'params_meta_sgd_5shot.safetensors')


@pytest.mark.slow
@pytest.mark.parametrize('devices', [1, 2])
def test_two_processes_train_and_test_as_one(whole, devices, tmp_path):
  """In one process of two devices the tasks are shared in the same way; one device adds them up otherwise."""
  workdir, _ = whole
  regression.run(CONFIG, tmp_path, Keeping(), devices)
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
  jax.tree.map(close, params(workdir), params(tmp_path))
  names = sorted(path.name for path in tmp_path.glob('per_task_*.npy'))
  assert len(names) == 3
  for name in names:
    close(np.load(workdir / name), np.load(tmp_path / name))
  losses = lambda d: [json.loads(line)['loss'] for line in (d / 'metrics.jsonl').read_text().splitlines()]
  assert len(losses(workdir)) == 20
  close(losses(workdir), losses(tmp_path))


@pytest.mark.slow
def test_the_first_alone_writes_and_prints(whole):
  workdir, ((out, progress), (other_out, other_progress)) = whole
  assert 'mean squared error after 1 inner step(s)' in out
  assert 'Meta-SGD 5-shot  200/200' in progress
  assert other_out == ''
  assert 'Meta-SGD' not in other_progress
  names = {path.name for path in workdir.iterdir()}
  assert {'config.json', 'metrics.jsonl', 'results.json', 'learning_curves.png', 'checkpoints'} <= names
  assert len(list(workdir.glob('**/results.json'))) == 1
  row = json.loads((workdir / 'results.json').read_text())['rows'][0]
  assert row['device']['count'] == 2
  assert 'coordinator' not in (workdir / 'config.json').read_text()


@pytest.mark.slow
def test_a_finished_run_stays_in_all(whole):
  """Only the first sees that it is finished."""
  workdir, _ = whole
  before = {path: path.stat().st_mtime_ns for path in workdir.rglob('*')}
  with two('regression', workdir, *FLAGS) as running:
    (out, _), (_, other_error) = printed = ended(running)
    assert [process.returncode for process in running] == [0, 0], printed
  assert f'{workdir} holds a finished run of this configuration; --restart runs it again' in out
  assert 'Meta-SGD' not in other_error
  assert {path: path.stat().st_mtime_ns for path in workdir.rglob('*')} == before


@pytest.mark.slow
def test_killed_and_started_again_ends_the_same(whole, tmp_path):
  workdir = tmp_path / 'killed'
  with two('regression', workdir, *FLAGS) as running:
    end = time.monotonic() + 240
    while not (workdir / 'checkpoints' / 'meta_sgd_5shot' / '60').exists():
      assert time.monotonic() < end
      assert running[0].poll() is None, running[0].communicate()
      time.sleep(0.01)
    for process in running:
      process.kill()
    ended(running)
    assert [process.returncode for process in running] == [-signal.SIGKILL] * 2
  assert not (workdir / 'results.json').exists()
  with two('regression', workdir, *FLAGS) as running:
    (out, _), (other_out, _) = printed = ended(running)
    assert [process.returncode for process in running] == [0, 0], printed
  assert re.search(r'Meta-SGD 5-shot: goes on from meta-iteration \d+', out)
  assert other_out == ''
  expected, got = torture.contents(whole[0]), torture.contents(workdir)
  assert got.keys() == expected.keys()
  assert [name for name in got if got[name] != expected[name]] == []


@pytest.mark.slow
def test_a_signal_to_one_stops_both_after_the_same_chunk(tmp_path):
  workdir = tmp_path / 'stopped'
  with two('regression', workdir, *FLAGS, '--meta_iterations=4000') as running:
    end = time.monotonic() + 240
    while not (workdir / 'metrics.jsonl').exists() or not (workdir / 'metrics.jsonl').read_text():
      assert time.monotonic() < end
      time.sleep(0.01)
    running[1].send_signal(signal.SIGTERM)
    (out, _), _ = ended(running)
    assert [process.returncode for process in running] == [128 + signal.SIGTERM] * 2
  assert 'stopped by SIGTERM: Meta-SGD 5-shot is saved at meta-iteration ' in out


@pytest.mark.slow
def test_a_signal_to_one_while_both_test_stops_both(tmp_path):
  """Where no chunk ends at which they would ask each other."""
  workdir = tmp_path / 'stopped'
  with two('regression', workdir, *FLAGS, '--meta_iterations=20') as running:
    end = time.monotonic() + 240
    while not (workdir / 'params_meta_sgd_5shot.safetensors').exists():
      assert time.monotonic() < end
      assert running[0].poll() is None, running[0].communicate()
      time.sleep(0.01)
    running[1].send_signal(signal.SIGTERM)
    (out, error), (_, other_error) = ended(running)
    assert [process.returncode for process in running] == [128 + signal.SIGTERM] * 2, error + other_error
  assert 'stopped by SIGTERM: all that was trained is saved; the same command goes on from there' in out


@pytest.mark.slow
def test_a_mistake_of_one_ends_both_with_a_sentence(tmp_path):
  (tmp_path / 'file').write_text('')
  with two('classification', tmp_path / 'file' / 'x', '--meta_batch=2') as running:
    (_, error), (_, other_error) = ended(running)
    assert [process.returncode for process in running] == [1, 1]
  assert f'error: workdir {tmp_path / "file" / "x"} cannot be written' in error  # The first's alone is looked at.
  assert 'error: another process has failed; the output of that process says why' in other_error
  assert 'Traceback' not in error + other_error


@pytest.mark.slow
def test_classification_by_two_processes(tmp_path, no_pictures):
  config = dict(
    learner='prototypical',
    way=2,
    query=1,
    filters=2,
    meta_batch=2,
    meta_iterations=4,
    validate_every=2,
    eval_tasks=3,
    eval_query=1,
  )
  workdir = tmp_path / 'two'
  with two('classification', workdir, *(f'--{name}={value}' for name, value in config.items())) as running:
    printed = ended(running)
    assert [process.returncode for process in running] == [0, 0], printed
  classification.run(classification.Config(**config | dict(learner=('prototypical',))), tmp_path / 'one')
  rows = [json.loads((tmp_path / name / 'results.json').read_text())['rows'] for name in ('two', 'one')]
  assert len(rows[0]) == 2
  for ours, theirs in zip(*rows, strict=True):
    assert ours['mean'] == pytest.approx(theirs['mean'], abs=0.2)  # A picture of six may fall on the other side.


NAVIGATION = navigation.Config(
  learner=('meta_sgd',),
  optimizer=('trpo',),
  trajectories=2,
  meta_batch=4,
  curvature_tasks=2,
  meta_iterations=1,
  eval_tasks=4,
  eval_updates=1,
)


@pytest.mark.slow
def test_navigation_in_two_processes_as_in_one(tmp_path, monkeypatch, no_pictures):
  """TRPO's meta-iterations: a process of two devices shares the tasks in the same way."""
  monkeypatch.setattr(navigation, '_save_films', lambda *_: None)
  navigation.run(NAVIGATION, tmp_path / 'one', Keeping(), 2)
  changed = [
    f'--{field.name}={",".join(value) if isinstance(value, tuple) else value}'
    for field in dataclasses.fields(NAVIGATION)
    if (value := getattr(NAVIGATION, field.name)) != field.default
  ]
  with two('navigation', tmp_path / 'two', *changed) as running:
    printed = ended(running)
    assert [process.returncode for process in running] == [0, 0], printed
  names = sorted(path.name for path in (tmp_path / 'one').glob('per_task_*.npy'))
  assert names
  for name in names:
    found, want = (np.load(tmp_path / run / name) for run in ('two', 'one'))
    np.testing.assert_allclose(found, want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
  ('given', 'said'),
  [
    (dict(coordinator='a:1'), ('be given together', 'coordinator=a:1', '--num_processes and --process_id')),
    (dict(num_processes=2), ('be given together', 'num_processes=2', '--coordinator and --process_id')),
    (
      dict(num_processes=2, process_id=0),
      ('be given together', 'num_processes=2, process_id=0', 'give --coordinator '),
    ),
    (dict(coordinator='a:1', num_processes=2, process_id=2), ('process_id', 'less than num_processes=2', 'got 2')),
    (dict(coordinator='a', num_processes=2, process_id=0), ('coordinator', 'HOST:PORT', "'a'")),
    (dict(coordinator='a:x', num_processes=2, process_id=0), ('coordinator', 'HOST:PORT', "'a:x'")),
    (dict(coordinator=':1', num_processes=2, process_id=0), ('coordinator', 'HOST:PORT', "':1'")),
    (dict(coordinator='a:1', num_processes=2, process_id=-1), ('process_id', 'from 0 to 99999', 'got -1')),
    (dict(distributed=True, num_processes=2), ('distributed gets num_processes', 'leave out either')),
    (dict(devices=0), ('devices', 'from 1 to 100000', 'got 0')),
  ],
)
def test_mistakes_about_processes_get_a_sentence(given, said):
  with pytest.raises(ValueError, match=saying(*said)):
    Machines(**given)


@pytest.mark.parametrize(
  ('module', 'flags', 'said'),
  [
    ('regression', ['--meta_batch=3', '--devices=2'], ('3 tasks', '2 devices', 'multiple of 2')),
    ('regression', ['--devices=3'], ('devices', 'from 1 to 2', 'got 3')),
    ('regression', ['--process_id=1'], ('process_id=1', 'give --coordinator and --num_processes')),
    ('classification', ['--meta_batch=3', '--devices=2'], ('3 tasks', '2 devices', 'multiple of 2')),
    (
      'navigation',
      ['--optimizer=trpo', '--curvature_tasks=3', '--devices=2'],
      ('curvature_tasks=3', '2 devices', 'multiple of 2'),
    ),
  ],
)
def test_mistakes_in_flags_get_a_sentence(module, flags, said, tmp_path):
  done = commands.run(module, f'--workdir={tmp_path}/w', *flags)
  assert done.returncode == 1
  assert re.match(saying('error: ', *said), done.stderr)
  assert done.stderr.count('\n') == 1


@pytest.mark.slow
def test_without_a_cluster_there_is_none_to_ask(tmp_path):
  """In a process of its own: JAX must not have been used."""
  command = [sys.executable, '-m', 'experiments.regression', f'--workdir={tmp_path}/w', '--distributed']
  done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
  assert done.returncode == 1
  assert re.search(
    saying('error: JAX cannot connect the processes of a cluster (', '--coordinator=HOST:PORT'), done.stderr
  )
  assert 'before any JAX calls' not in done.stderr
  assert 'Traceback' not in done.stderr


@pytest.mark.parametrize('process_id', [0, 1])
@pytest.mark.parametrize('host', ['nosuchhost.invalid', 'x' * 70])
def test_a_host_that_is_not_known_gets_a_sentence_at_once(host, process_id):
  with pytest.raises(ValueError, match=saying(f'coordinator={host}:1234', 'unknown host', 'process 0')):
    processes.start(Machines(coordinator=f'{host}:1234', num_processes=2, process_id=process_id))


def test_what_jax_says_of_a_coordinator_is_a_sentence(monkeypatch):
  def fail(*_, **__):
    raise RuntimeError('DEADLINE_EXCEEDED:\n  nobody came')

  monkeypatch.setattr(processes, '_gather', lambda *_: None)
  monkeypatch.setattr(processes.jax, 'config', types.SimpleNamespace(update=lambda *_: None))
  monkeypatch.setattr(processes.jax.distributed, 'initialize', fail)
  said = saying(
    'cannot connect to coordinator=localhost:1234', 'DEADLINE_EXCEEDED: nobody came', 'give a host and a port'
  )
  with pytest.raises(ValueError, match=said):
    processes.start(Machines(coordinator='localhost:1234', num_processes=1, process_id=0))


def test_nobody_at_the_port(monkeypatch):
  monkeypatch.setattr(processes, 'PATIENCE', 0)
  where = f'localhost:{free_port()}'
  with pytest.raises(ValueError, match=saying('process 0 does not answer', where, 'start process 0')):
    processes.start(Machines(coordinator=where, num_processes=2, process_id=1))


def test_the_others_do_not_come(monkeypatch):
  monkeypatch.setattr(processes, 'PATIENCE', 0)
  where = f'localhost:{free_port()}'
  with pytest.raises(ValueError, match=saying(where, 'processes 1, 2 of 3', 'missing after 0 s', 'start them')):
    processes.start(Machines(coordinator=where, num_processes=3, process_id=0))


def test_the_port_is_taken():
  with socket.create_server(('', 0)) as taken:
    where = f'localhost:{taken.getsockname()[1]}'
    with pytest.raises(ValueError, match=saying('cannot listen', where, 'give another port')):
      processes.start(Machines(coordinator=where, num_processes=2, process_id=0))


def test_all_wait_until_the_last_has_come():
  port, gone = free_port(), []

  def come(name, enter, *args):
    enter(f'localhost:{port}', *args)
    gone.append(name)

  first = threading.Thread(target=come, args=(0, processes._gather, 3), daemon=True)
  second = threading.Thread(target=come, args=(1, processes._greet, 1), daemon=True)
  second.start()
  first.start()
  time.sleep(0.5)
  socket.create_connection(('localhost', port)).close()  # Nobody of ours.
  time.sleep(0.5)
  assert gone == []
  processes._greet(f'localhost:{port}', 2)
  for thread in (first, second):
    thread.join(10)
  assert sorted(gone) == [0, 1]


def test_as_many_devices_judge_as_share_the_tasks():
  sizes = [getattr(processes.mesh_to_judge(n, most), 'size', 1) for n, most in ((6, None), (5, None), (6, 1), (6, 9))]
  assert sizes == [2, 1, 1, 2]


def test_devices_of_a_classification():
  config = classification.Config(way=2, query=1, filters=2, meta_batch=2)
  trainings = [few_shot_training.plan(config, few_shot_training.build(config, devices=n)) for n in (None, 1, 2)]
  assert [len(found) for found in trainings] == [1, 1, 1]
  with pytest.raises(ValueError, match=saying('devices', 'from 1 to 2', 'got 3')):
    few_shot_training.build(config, devices=3)
