"""An experiment's command line: help, settings from a file, mistakes, and what is watched of a run."""

import contextlib
import gzip
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
from absl import flags
from problems import saying

from experiments import (
  classification,
  command,
  large_learners,
  navigation,
  options,
  processes,
  regression,
  resuming,
  trainings,
)

ROOT = pathlib.Path(__file__).resolve().parents[2]
EXPERIMENTS = {
  module.__name__.split('.')[1]: module for module in (classification, regression, navigation, large_learners)
}
TINY = ['--meta_iterations=20', '--seeds=2', '--learner=meta_sgd', '--eval_tasks=3', '--eval_repeats=2']


def names(module):
  configs = [module.Config, resuming.Keeping] + ([processes.Machines] if module is not large_learners else [])
  return {name for config in configs for name in config.__dataclass_fields__} | {'workdir', 'config'}


@pytest.mark.parametrize('name', EXPERIMENTS)
def test_help_fits_a_screen_and_names_every_flag(name):
  done = commands.run(name, '--help')
  assert done.returncode == 0, done.stderr
  lines = done.stdout.splitlines()
  assert len(lines) <= 41
  assert max(map(len, lines)) <= 100
  for flag in names(EXPERIMENTS[name]):
    assert f' --{flag}' in done.stdout or f' --no{flag}' in done.stdout, flag
  assert '--helpfull describes all flags' in done.stdout


def test_the_whole_help_says_all_of_each_flag():
  out = commands.run('classification', '--helpfull').stdout
  for name, field in classification.Config.__dataclass_fields__.items():
    assert f'--{name}:' in out or f'--[no]{name}:' in out
    assert ''.join(field.metadata['about'].split()) in ''.join(out.split())


def test_flags_that_are_used_most_are_flags():
  known = set().union(*map(names, EXPERIMENTS.values()))
  given = command.MOST_USED
  assert len(given) == len(set(given))
  assert set(given) <= known


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
  return tmp_path_factory.mktemp('compiled')


def run(cache, *flags):
  """A run of regression by a process of its own, which has a log, and settings of JAX for quick compiling."""
  quick = {'JAX_DISABLE_MOST_OPTIMIZATIONS': '1', 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'}
  argv = [sys.executable, '-m', 'experiments.regression', f'--compilation_cache={cache}', *flags]
  return subprocess.run(argv, capture_output=True, text=True, cwd=ROOT, check=False, env=os.environ | quick)


@pytest.fixture(scope='module')
def first(tmp_path_factory, cache):
  """A tiny run, and what it said."""
  workdir = tmp_path_factory.mktemp('command') / 'first'
  done = run(cache, *TINY, f'--workdir={workdir}', '--profile', '--tensorboard')
  assert done.returncode == 0, done.stderr
  return workdir, done


def same(a, b):
  rows = [json.loads((d / 'results.json').read_text())['rows'] for d in (a, b)]
  return rows[0] == rows[1] and (a / 'metrics.jsonl').read_bytes() == (b / 'metrics.jsonl').read_bytes()


@pytest.mark.slow
def test_a_run_from_the_results_of_another_is_the_same(first, cache, tmp_path):
  done = run(cache, f'--config={first[0] / "results.json"}', f'--workdir={tmp_path}')
  assert done.returncode == 0, done.stderr
  assert same(first[0], tmp_path)


@pytest.mark.slow
def test_flags_override_what_the_file_says(first, cache, tmp_path):
  flags = [f'--config={first[0] / "config.json"}', '--seed=7', '--notensorboard', f'--workdir={tmp_path}']
  done = run(cache, *flags)
  assert done.returncode == 0, done.stderr
  old, new = (json.loads((d / 'config.json').read_text()) for d in (first[0], tmp_path))
  assert new == old | {'seed': 7, 'tensorboard': False}
  assert not same(first[0], tmp_path)


@pytest.mark.slow
def test_progress_of_a_run_that_nobody_watches_is_in_the_log(first):
  err = first[1].stderr
  assert 'Meta-SGD 5-shot  20/20  loss ' in err
  assert 'it/s  took ' in err
  assert '\r' not in err
  assert 'mean squared error after 1 inner step(s)' in first[1].stdout


@pytest.mark.slow
def test_a_trace_is_written_and_the_log_says_how_to_open_it(first):
  (trace,) = (first[0] / 'profile' / 'meta_sgd_5shot').rglob('perfetto_trace.json.gz')
  assert f'a trace of 3 meta-iterations is in {trace}; open it at https://ui.perfetto.dev' in first[1].stderr
  assert json.loads(gzip.decompress(trace.read_bytes()))['traceEvents']


@pytest.mark.parametrize('encoding', ['ascii', 'cp1252'])
def test_output_that_the_terminal_cannot_encode_is_escaped(monkeypatch, encoding):
  streams = {name: io.TextIOWrapper(io.BytesIO(), encoding) for name in ('stdout', 'stderr')}
  for name, stream in streams.items():
    monkeypatch.setattr(sys, name, stream)
  monkeypatch.setattr(
    options.app, 'run', lambda *_, **__: [print('\u2212', file=s, flush=True) for s in streams.values()]
  )
  options.main(None, regression.Config)
  assert [stream.buffer.getvalue() for stream in streams.values()] == [b'\\u2212\n'] * 2


def of_file(tmp_path, value, name='regression'):
  path = tmp_path / 'x.json'
  path.write_text(value if isinstance(value, str) else json.dumps(value))
  return command.from_file(str(path), EXPERIMENTS[name].Config, name)


@pytest.mark.parametrize('name', EXPERIMENTS)
def test_settings_become_flags_that_give_them(tmp_path, name):
  config = EXPERIMENTS[name].Config(meta_iterations=7, learning_rate=2e-3)
  recipe = json.loads(json.dumps(options.recipe(name, config).copy(), default=list))
  assert of_file(tmp_path, {**recipe, 'rows': []}, name) == options.flag_texts(config)
  assert of_file(tmp_path, recipe['config'], name) == options.flag_texts(config)
  assert of_file(tmp_path, {'seed': 5}, name) == ['--seed=5']


@pytest.mark.parametrize(
  ('value', 'said'),
  [
    ({'meta_iteration': 5}, ("unknown setting 'meta_iteration'", 'did you mean meta_iterations?')),
    ({'config': {'shots': 5}}, ("unknown setting 'shots'", 'did you mean shot?')),
    ({'way': 5}, ("unknown setting 'way'", 'no results.json or config.json of experiments.regression')),
    ({'dataset': 'x' * 5000}, ('dataset', f"got '{'x' * 79}…")),
    ({'meta_iterations': '5'}, ('meta_iterations', 'type int', "got '5'")),
    ({'meta_iterations': 0}, ('meta_iterations', 'from 1 to', 'got 0')),
    ({'dataset': 'sinusoid'}, ('dataset', 'sinusoids, sinusoids_maml', "got 'sinusoid'")),
    ({'learner': 'maml'}, ('learner', 'a tuple', "got 'maml'")),
    ({'learner': [['maml']]}, ('x.json is no', 'learner')),
    ({'command': 'python -m experiments.regression', 'config': {}}, ('holds no settings', 'results.json')),
    ([], ('holds no settings', 'results.json')),
    ('{', ('is no results.json',)),
    ('[' * 100_000, ('is no results.json',)),
  ],
)
def test_a_file_that_is_no_configuration_of_the_experiment(tmp_path, value, said):
  with pytest.raises(ValueError, match=saying(*said)) as e:
    of_file(tmp_path, value)
  assert str(e.value).startswith(f'--config={tmp_path}/x.json')
  assert len(str(e.value)) < 300 + len(str(tmp_path))


def test_no_such_file(tmp_path):
  with pytest.raises(ValueError, match=saying('none.json', 'No such file', 'is no results.json')):
    command.from_file(str(tmp_path / 'none.json'), regression.Config, 'regression')


@pytest.mark.parametrize(
  ('flags', 'said'),
  [
    (['--meta_iteration=5'], ("Unknown command line flag 'meta_iteration'.", 'Did you mean: meta_iterations ?')),
    (['--notensorbord'], ("Unknown command line flag 'notensorbord'.", 'Did you mean: tensorboard ?')),
    (['--dataset=sinusoid'], ('one of sinusoids, sinusoids_maml', 'did you mean sinusoids?')),
    (['--learner=meta_sgd,mamml'], ('meta_sgd, maml', 'did you mean maml?')),
    (['--learner', 'meta_sdg'], ('meta_sgd, maml', 'did you mean meta_sgd?')),
    (['--config=none.json'], ('--config=none.json is no', 'No such file')),
    (['--config=tests'], ('--config=tests is no', 'Is a directory')),
    (['--config='], ('--config= is no', 'Is a directory')),
    (['--flagfile=/none'], ('Unable to open flagfile',)),
    ([f'--seeds={"x" * 5000}'], (f'flag --seeds={"x" * 80}…: ',)),
    ([f'--{"x" * 5000}'], ('maximum recursion depth',)),
  ],
)
def test_a_mistyped_flag_is_answered_with_the_nearest(flags, said):
  done = commands.run('regression', *flags)
  assert done.returncode == 2
  assert re.match(saying('error: ', *said), done.stderr)
  assert len(done.stderr) < 500
  assert done.stderr.count('\n') == 1


def test_keys_that_jax_makes_another_way_are_refused_at_the_start(tmp_path):
  with jax.default_prng_impl('rbg'):
    done = commands.run('regression', f'--workdir={tmp_path}/w')
  assert done.returncode == 1
  assert re.match(saying('error: JAX_DEFAULT_PRNG_IMPL=rbg', 'unset it'), done.stderr)
  assert done.stderr.count('\n') == 1
  assert not (tmp_path / 'w').exists()


@pytest.fixture
def parse(monkeypatch, capsys):
  """What `command.parse` prints for flags that it never gets to set."""
  values = flags.FlagValues()
  flags.DEFINE_string('workdir', 'runs', 'Where.', flag_values=values)
  flags.DEFINE_bool('restart', False, 'Anew.', flag_values=values)
  monkeypatch.setattr(command.flags, 'FLAGS', values)
  monkeypatch.setattr(command, 'help_text', lambda: 'HELP')

  def found(*given):
    with contextlib.suppress(SystemExit, KeyError):
      command.parse(regression.Config, ['regression', *given])
    return capsys.readouterr().out

  return found


@pytest.mark.parametrize('given', ['-h', '--help', '--restart -h', '--workdir x -h', '--workdir=x -h'])
def test_help_is_given_where_it_is_asked_for(parse, given):
  assert parse(*given.split()) == 'HELP\n'


@pytest.mark.parametrize('given', ['--workdir=-h', '--help=false'])
def test_a_value_or_an_argument_is_no_question(parse, given):
  assert 'HELP' not in parse(*given.split())


@pytest.mark.parametrize(('first', 'said'), [(True, 'MAML: the profiler wrote no trace to '), (False, '')])
def test_a_profiler_that_writes_nothing_is_told_by_the_first_process(first, said, tmp_path, monkeypatch):
  heard = []
  monkeypatch.setattr(trainings.jax.profiler, 'trace', lambda *args, **kwargs: contextlib.nullcontext())
  monkeypatch.setattr(trainings.processes, 'first', lambda: first)
  monkeypatch.setattr(trainings.logging, 'warning', lambda form, *values: heard.append(form % values))
  state = types.SimpleNamespace(step=np.int32(0))
  training = trainings.Training('maml', 'MAML', 5, 1, start=lambda: state, go=lambda state, step, callbacks: np.ones(1))
  assert trainings.profile(training, state, tmp_path) == tmp_path / 'maml'
  assert ''.join(heard).startswith(said)
  assert len(heard) == first


@pytest.mark.parametrize('flags_given', [['--plan'], ['--only=other'], ['--debug_task=99'], ['--devices=3']])
def test_a_command_that_trains_nothing_leaves_no_new_folder(tmp_path, flags_given):
  (tmp_path / 'mine').mkdir()
  for folder in ('mine', 'new/run'):
    commands.run('regression', *TINY, f'--workdir={tmp_path / folder}', *flags_given)
  assert [path.name for path in tmp_path.iterdir()] == ['mine']
