"""A directory's runs that are finished, or another program's; cells of a table."""

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import signal
import types

import jax
import numpy as np
import pytest
from problems import saying, table_row

import metasgd_jax as ms
from experiments import (
  classification,
  few_shot_table,
  few_shot_training,
  processes,
  regression,
  replacing,
  resuming,
  running,
)
from experiments.jobs import SINGLE
from experiments.resuming import Keeping
from metasgd_jax.io import checkpoint, files, provenance
from metasgd_jax.io.checkpoint import CheckpointError

MAML = regression.Config(learner=('maml',), meta_iterations=20, eval_tasks=3, eval_repeats=2)


class CrashError(Exception):
  """As if the program had been killed here."""


def crash():
  raise CrashError


ROWS = [{'mean': 0.5}]


def contents(workdir):
  """All files of a directory."""
  return {path: path.read_bytes() for path in workdir.rglob('*') if path.is_file()}


def finished(workdir, config=MAML, keeping=None):
  """A run that trains nothing and has results; returns all its files."""
  with resuming.open_run(workdir, config, keeping) as opened:
    assert opened.rows is None
    opened.begin()  # As `trainings.train` does.
    files.write_json(opened.path('results.json'), {'rows': ROWS})
  return contents(workdir)


def test_a_finished_run_of_this_configuration_stays(tmp_path, monkeypatch, capsys):
  before = finished(tmp_path)
  capsys.readouterr()
  monkeypatch.setattr(regression, '_run', lambda *_: crash())
  assert regression.run(MAML, tmp_path) == ROWS
  (said,) = capsys.readouterr().out.splitlines()
  assert re.match(saying(f'{tmp_path} holds a finished run', '--restart'), said)
  assert contents(tmp_path) == before


def test_a_finished_run_is_made_again_if_it_is_asked_for(tmp_path):
  finished(tmp_path)
  finished(tmp_path, keeping=Keeping(restart=True))
  finished(tmp_path, dataclasses.replace(MAML, shot=3), Keeping(restart=True))


def test_a_finished_run_of_another_configuration_is_refused(tmp_path):
  before = finished(tmp_path)
  fields = '(shot: 5 there, 3 asked for; eval_tasks: 3 there, 4 asked for)'
  advice = ('give another --workdir', '--restart')
  with pytest.raises(CheckpointError, match=saying(tmp_path, 'a finished run', fields, *advice)):
    finished(tmp_path, dataclasses.replace(MAML, shot=3, eval_tasks=4))
  assert contents(tmp_path) == before


def test_a_finished_run_of_other_versions_is_told_of_and_stays(tmp_path, monkeypatch, capsys):
  before = finished(tmp_path)
  now = provenance.collect()
  monkeypatch.setattr(provenance, 'collect', lambda: now | {'versions': now['versions'] | {'jax': '99'}})
  assert regression.run(MAML, tmp_path) == ROWS
  said = capsys.readouterr().out
  assert re.match(
    saying('holds a finished run of this configuration, with other versions', f'jax {jax.__version__} → 99', '--rest'),
    said,
  )
  assert contents(tmp_path) == before


def test_a_finished_run_that_is_older_than_an_option_stays(tmp_path):
  finished(tmp_path)
  record = json.loads((tmp_path / resuming.RECORD).read_text())
  del record['config']['bad_steps']
  (tmp_path / resuming.RECORD).write_text(json.dumps(record))
  assert regression.run(MAML, tmp_path) == ROWS
  with pytest.raises(CheckpointError, match='bad_steps: .stop. there, .skip. asked for'):
    regression.run(dataclasses.replace(MAML, bad_steps='skip'), tmp_path)


@pytest.mark.parametrize('damage', [lambda path: path.unlink(), lambda path: path.write_text('{')])
def test_a_finished_run_whose_results_are_lost_is_not_made_again_in_silence(tmp_path, damage):
  finished(tmp_path)
  damage(tmp_path / 'results.json')
  before = contents(tmp_path)
  with pytest.raises(CheckpointError, match=saying(tmp_path, 'results.json cannot be read', '--restart')):
    regression.run(MAML, tmp_path)
  assert contents(tmp_path) == before


OWN = (
  *('config.json', 'results.json', 'metrics.jsonl', 'timings.jsonl', 'per_task_x.npy', 'params_x.safetensors'),
  *('model_x.safetensors', 'alpha_x.png', 'learning_curves.png', 'events.out.tfevents.1.a', 'profile/maml/trace'),
  'checkpoints/maml_5shot/3/state',
)


def write(where, *names):
  """Leaves files with these names in a directory, or as a run writes them."""
  for name in names:
    if isinstance(where, resuming.Run):
      where.path(name.split('/')[0])
      if name.startswith('checkpoints/'):
        where.checkpoints(name.split('/')[1])
    path = getattr(where, 'workdir', where) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(name)


def save(opened, step=3):
  """Saves a checkpoint of a run."""
  state = ms.TrainState(np.int32(step), jax.random.key(0), {'w': np.zeros(2)}, ())
  with checkpoint.Checkpoints(opened.checkpoints('maml_5shot'), like=state, config=opened.config) as kept:
    kept.save(state)


@pytest.mark.parametrize('restart', [False, True])
@pytest.mark.parametrize('names', [OWN, *((name,) for name in OWN)])
def test_files_of_another_program_are_neither_removed_nor_overwritten(tmp_path, names, restart):
  write(tmp_path, *names, 'holiday.png')
  before = contents(tmp_path)
  with pytest.raises(files.WriterError, match=saying(tmp_path, names[0].split('/')[0], 'give another --workdir')):
    finished(tmp_path, keeping=Keeping(restart=restart))
  assert contents(tmp_path) == before


def test_only_files_that_the_record_lists_are_removed(tmp_path):
  write(tmp_path, 'holiday.png', 'cells/a/config.json')
  with resuming.open_run(tmp_path, MAML) as opened:
    write(opened, *OWN)
  assert opened.written >= {name.split('/')[0] for name in OWN}
  mine = ('model_mine.safetensors', 'notes.txt')
  write(tmp_path, *mine)
  others = {'holiday.png', 'cells', 'profile', *mine}  # A profile is never removed.
  for shot in (3, 2, 1):  # What is not listed is not listed later either.
    finished(tmp_path, dataclasses.replace(MAML, shot=shot), Keeping(restart=True))
    there = {path.name for path in tmp_path.iterdir()}
    assert there == others | {'config.json', 'results.json', resuming.RECORD}
  assert all((tmp_path / name).read_text() == name for name in mine)


def stopped(workdir, config=MAML, keeping=None, cell=False):
  """A run that has saved a checkpoint and is killed."""
  with pytest.raises(CrashError), resuming.open_run(workdir, config, keeping, cell) as opened:
    opened.begin()
    save(opened)
    crash()


def test_files_that_come_while_a_run_is_stopped_are_never_its_own(tmp_path):
  stopped(tmp_path)
  mine = ('params_x.safetensors', 'curves_mine.png')
  write(tmp_path, *mine)
  for keeping in (None, Keeping(restart=True)):
    said = saying(tmp_path / 'params_x.safetensors', 'no run has written', 'move it away')
    with pytest.raises(files.WriterError, match=said), resuming.open_run(tmp_path, MAML, keeping) as opened:
      opened.begin()
      assert not opened.written & set(mine)
      opened.path('params_x.safetensors')
  finished(tmp_path, keeping=Keeping(restart=True))
  assert all((tmp_path / name).read_text() == name for name in mine)


@pytest.mark.parametrize('restart', [False, True])
@pytest.mark.parametrize('text', ['', '[]', '{"finished": true}', '{"files": 3}', '[' * 100_000])
def test_a_record_that_is_damaged_is_told_of(tmp_path, text, restart):
  finished(tmp_path)
  (tmp_path / resuming.RECORD).write_text(text)
  before = contents(tmp_path)
  with pytest.raises(CheckpointError, match=saying(tmp_path / resuming.RECORD, 'cannot be read', '--workdir')) as e:
    finished(tmp_path, keeping=Keeping(restart=restart))
  assert len(str(e.value)) < 300 + len(str(tmp_path))
  assert contents(tmp_path) == before


def test_a_cell_of_a_table_is_replaced_once_and_then_goes_on(tmp_path, capsys):
  restart, other = Keeping(restart=True), dataclasses.replace(MAML, shot=3)
  finished(tmp_path, other)
  stopped(tmp_path, MAML, restart, cell=True)
  assert 'goes on' not in capsys.readouterr().out
  for keeping in (restart, None):  # The table goes on with its own command, and without --restart.
    with pytest.raises(SystemExit), resuming.open_run(tmp_path, MAML, keeping, cell=True) as opened:
      assert opened.begun
      os.kill(os.getpid(), signal.SIGTERM)
    out = capsys.readouterr().out
    assert re.search(saying('unfinished run', 'goes on', 'is saved', 'the same command goes on'), out)
    assert '--restart' not in out
  before = finished(tmp_path)
  with resuming.open_run(tmp_path, MAML, restart, cell=True) as opened:
    assert opened.rows == ROWS
  assert contents(tmp_path) == before
  (tmp_path / 'results.json').unlink()
  with resuming.open_run(tmp_path, MAML, restart, cell=True) as opened:
    assert (opened.rows, opened.begun) == (None, False)


def test_the_cells_of_a_table_know_that_they_are_cells(monkeypatch):
  made = []
  monkeypatch.setattr(
    few_shot_table, 'prepare', lambda config, workdir, build, run, keeping, jobs: made.append(run.keywords)
  )
  config = classification.Config(table2=True, data_dir='somewhere')
  classification._prepare(config, None, Keeping(restart=True), None, SINGLE)
  assert made == [dict(keeping=Keeping(restart=True), cell=True)]


def test_a_signal_before_anything_is_saved_says_so(tmp_path, capsys):
  with pytest.raises(SystemExit), resuming.open_run(tmp_path, MAML):
    os.kill(os.getpid(), signal.SIGTERM)
  assert re.match(saying('stopped by SIGTERM: nothing is saved yet; the same'), capsys.readouterr().out)
  before = finished(tmp_path)
  with pytest.raises(SystemExit), resuming.open_run(tmp_path, MAML, Keeping(restart=True)):
    os.kill(os.getpid(), signal.SIGTERM)
  said = saying('stopped by SIGTERM: nothing is saved yet', 'earlier run is unchanged', 'the same command begins')
  assert re.match(said, capsys.readouterr().out)
  assert contents(tmp_path) == before


def test_event_files_are_those_of_the_new_run(tmp_path):
  with resuming.open_run(tmp_path, MAML) as opened:
    write(opened, 'events.out.tfevents.1.a')
  finished(tmp_path, dataclasses.replace(MAML, tensorboard=True), Keeping(restart=True))
  (found,) = tmp_path.glob('events.out.tfevents.*')
  assert found.name != 'events.out.tfevents.1.a'


def test_what_a_run_that_fails_has_written_is_listed(tmp_path):
  with pytest.raises(CrashError), resuming.open_run(tmp_path, MAML) as opened:
    write(opened, 'params_x.safetensors')
    crash()
  finished(tmp_path, keeping=Keeping(restart=True))
  assert not (tmp_path / 'params_x.safetensors').exists()


def kept(workdir):
  """A finished run with a checkpoint and a note of the user beside the checkpoints."""
  with resuming.open_run(workdir, MAML, Keeping(keep_checkpoints=True)) as opened:
    opened.begin()
    save(opened)
    files.write_json(opened.path('results.json'), {'rows': ROWS})
  write(workdir, *USERS)
  return contents(workdir)


OTHER = dataclasses.replace(MAML, shot=3)
USERS = {'checkpoints/mine/best.safetensors', 'checkpoints/maml_5shot/notes.txt', 'checkpoints/mine/3/state'}


@pytest.mark.parametrize('moves', range(14))
def test_a_kill_while_an_earlier_run_is_put_aside_or_back_loses_nothing(tmp_path, monkeypatch, moves):
  """Killed at each file that is moved or written, and once more while the next program puts the files back."""
  before = kept(tmp_path)
  real, left = pathlib.Path.replace, [moves, moves // 2]

  def replace(old, new):
    if not left[0]:
      crash()
    left[0] -= 1
    return real(old, new)

  monkeypatch.setattr(pathlib.Path, 'replace', replace)
  monkeypatch.setattr(replacing, 'settle', lambda *_, **__: None)  # A kill leaves no time for it.
  with pytest.raises(CrashError), resuming.open_run(tmp_path, OTHER, Keeping(restart=True)) as opened:
    opened.begin()
    files.write_json(opened.path('params_new.safetensors'), {})
    crash()
  monkeypatch.undo()
  monkeypatch.setattr(pathlib.Path, 'replace', replace)
  left[:] = left[1:]
  with contextlib.suppress(CrashError), resuming.open_run(tmp_path, MAML) as opened:
    assert opened.rows == ROWS
  monkeypatch.undo()
  with resuming.open_run(tmp_path, MAML) as opened:
    assert opened.rows == ROWS
  assert contents(tmp_path) == before


def test_an_earlier_run_comes_back_unless_the_new_one_has_a_checkpoint(tmp_path):
  before = kept(tmp_path)
  with pytest.raises(CrashError), resuming.open_run(tmp_path, OTHER, Keeping(restart=True)) as opened:
    opened.begin()
    crash()
  assert contents(tmp_path) == before
  with pytest.raises(CrashError), resuming.open_run(tmp_path, OTHER, Keeping(restart=True)) as opened:
    opened.begin()
    save(opened, step=5)
    opened.keep()
    crash()
  assert not (tmp_path / 'results.json').exists()
  assert checkpoint.steps(tmp_path / 'checkpoints' / 'maml_5shot') == [5]
  finished(tmp_path, OTHER)
  assert all((tmp_path / name).read_text() == name for name in USERS)
  assert not list((tmp_path / 'checkpoints').rglob('5'))


def test_a_file_of_the_user_is_not_overwritten_when_an_earlier_run_comes_back(tmp_path):
  before = kept(tmp_path)
  mine = tmp_path / 'results.json'
  for aside, back in (('config.json', mine), (replacing.RECORD, mine)):
    (tmp_path / replacing.ASIDE).mkdir()
    (tmp_path / aside).rename(tmp_path / replacing.ASIDE / aside)
    (tmp_path / 'results.json').rename(tmp_path / replacing.ASIDE / 'results.json')
    mine.write_text('mine')
    with pytest.raises(files.WriterError, match=saying(back, 'exists', 'move one of them away')):
      finished(tmp_path)
    assert mine.read_text() == 'mine'
    mine.unlink()
    with resuming.open_run(tmp_path, MAML) as opened:
      assert opened.rows == ROWS
    assert contents(tmp_path) == before


def test_a_folder_of_the_user_with_the_name_of_ours_stays(tmp_path):
  kept(tmp_path)
  write(tmp_path, f'{replacing.ASIDE}/holiday.png')
  before = contents(tmp_path)
  with resuming.open_run(tmp_path, MAML) as opened:
    assert opened.rows == ROWS
  with pytest.raises(files.WriterError, match=saying(tmp_path / replacing.ASIDE, 'no run has written', 'move it away')):
    finished(tmp_path, OTHER, Keeping(restart=True))
  assert contents(tmp_path) == before


def test_checkpoints_that_cannot_be_moved_stay(tmp_path, monkeypatch):
  """As if the folder with the checkpoints were a link to another file system."""
  before, real = kept(tmp_path), pathlib.Path.replace

  def replace(old, new):
    if old.name == '3':
      raise OSError(18, 'Invalid cross-device link')
    return real(old, new)

  monkeypatch.setattr(pathlib.Path, 'replace', replace)
  with pytest.raises(files.WriterError, match=saying('cross-device', 'give another --workdir')):
    finished(tmp_path, OTHER, Keeping(restart=True))
  assert contents(tmp_path) == before


def test_a_table_sees_the_run_that_waits_in_a_cell(tmp_path, monkeypatch):
  before = kept(tmp_path)
  monkeypatch.setattr(replacing, 'settle', lambda _: None)  # As if the program were killed.
  with pytest.raises(CrashError), resuming.open_run(tmp_path, OTHER, Keeping(restart=True)) as opened:
    opened.begin()
    crash()
  monkeypatch.undo()
  with pytest.raises(CheckpointError, match=saying('a finished run', 'shot: 5 there, 3 asked for')):
    resuming.check(tmp_path, OTHER)
  resuming.check(tmp_path, MAML)
  with resuming.open_run(tmp_path, MAML) as opened:
    assert opened.rows == ROWS
  assert contents(tmp_path) == before


def test_a_record_of_an_earlier_version_without_trainings(tmp_path):
  stopped(tmp_path)
  record = json.loads((tmp_path / replacing.RECORD).read_text())
  del record['trainings']
  (tmp_path / replacing.RECORD).write_text(json.dumps(record))
  assert resuming.trainings(tmp_path) == ['maml_5shot']
  with resuming.open_run(tmp_path, MAML) as opened:
    assert opened.begun
    opened.checkpoints('maml_5shot')
    with pytest.raises(files.WriterError, match=saying('mine/7', 'no run has written')):
      write(tmp_path, 'checkpoints/mine/7/state')
      opened.checkpoints('mine')
  assert resuming.trainings(tmp_path) == []
  assert (tmp_path / 'checkpoints/mine/7/state').exists()


def test_results_without_checkpoints_are_not_replaced_in_silence(tmp_path):
  with pytest.raises(CrashError), resuming.open_run(tmp_path, MAML) as opened:
    opened.begin()
    write(opened, 'params_x.safetensors')
    crash()
  before = contents(tmp_path)
  with pytest.raises(CheckpointError, match=saying(tmp_path, 'unfinished run', 'shot: 5 there', '--restart')):
    finished(tmp_path, OTHER)
  assert contents(tmp_path) == before


def test_a_learner_that_is_not_trained_begins_too(tmp_path, monkeypatch):
  begun = []
  monkeypatch.setattr(few_shot_training, '_first_state', lambda *_: types.SimpleNamespace(meta=np.zeros(2)))
  run = types.SimpleNamespace(begin=lambda: begun.append(1))
  few_shot_training.train('random', classification.Config(learner=('random',)), None, run)
  assert begun == [1]


@pytest.mark.parametrize('keep', [True, False])
def test_a_kill_just_after_the_end_loses_nothing(tmp_path, monkeypatch, keep):
  """All that comes after the mark, one moment after the other, and before the checkpoints go."""
  keeping = Keeping(keep_checkpoints=keep)
  with pytest.raises(CrashError), resuming.open_run(tmp_path, MAML, keeping) as opened:
    save(opened)
    files.write_json(tmp_path / 'results.json', {'rows': ROWS})
    monkeypatch.setattr(replacing, 'remove_checkpoints', lambda *_: crash())
    monkeypatch.setattr(processes, 'any_of', lambda _: crash())
  monkeypatch.undo()
  assert checkpoint.steps(tmp_path / 'checkpoints' / 'maml_5shot') == [3]
  assert not resuming.unfinished(tmp_path)
  with resuming.open_run(tmp_path, MAML, keeping) as opened:
    assert opened.rows == ROWS


def test_sigterm_when_all_is_done_changes_nothing(tmp_path, monkeypatch, capsys):
  remove = replacing.remove_checkpoints
  with resuming.open_run(tmp_path, MAML):
    files.write_json(tmp_path / 'results.json', {'rows': ROWS})
    stop = lambda *given: (os.kill(os.getpid(), signal.SIGTERM), remove(*given))
    monkeypatch.setattr(replacing, 'remove_checkpoints', stop)
  assert 'stopped' not in capsys.readouterr().out
  assert json.loads((tmp_path / resuming.RECORD).read_text())['finished']


def test_a_command_with_restart_is_told_to_go_on_without(tmp_path, capsys):
  with pytest.raises(SystemExit), resuming.open_run(tmp_path, MAML, Keeping(restart=True)) as opened:
    save(opened)
    os.kill(os.getpid(), signal.SIGTERM)
    opened.ask()
  said = saying('stopped by SIGTERM: ', 'is saved', 'the same command without --restart goes on')
  assert re.match(said, capsys.readouterr().out)


def test_of_several_processes_none_leaves_by_itself(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(resuming, 'trainings', lambda _: ['maml_5shot'])
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  others = [True, False]
  monkeypatch.setattr(processes, 'any_of', lambda here: here or others.pop())
  told, other = (resuming.Run(tmp_path, {}, Keeping(), begun=True) for _ in range(2))
  told.come()
  other.ask()
  for run in (told, other):
    with pytest.raises(SystemExit):
      run.ask()
  assert capsys.readouterr().out.count('stopped by SIGTERM: all that was trained') == 2


def test_two_programs_do_not_train_in_one_directory(tmp_path):
  said = saying('another program trains in', tmp_path)
  with resuming.open_run(tmp_path, MAML), pytest.raises(files.WriterError, match=said):
    regression.run(MAML, tmp_path)
  with resuming.open_run(tmp_path, MAML, Keeping(restart=True)):
    pass


def test_a_table_refuses_unfinished_cells_of_another_configuration_before_it_begins(tmp_path, monkeypatch):
  config = classification.Config(learner=('lstm',), table2=True, data_dir='somewhere')
  cell = few_shot_table.cells(config)[1]
  state = ms.TrainState(np.int32(3), jax.random.key(0), {'w': np.zeros(2)}, ())
  directory = tmp_path / 'cells' / 'omniglot_lstm_20way_1shot'
  other = dataclasses.replace(cell, meta_iterations=7)
  with pytest.raises(CrashError), resuming.open_run(directory, other) as opened:
    with checkpoint.Checkpoints(opened.checkpoints('lstm_run0'), like=state, config=opened.config) as kept:
      kept.save(state)
    files.write_json(directory / 'config.json', dataclasses.asdict(cell))
    files.write_json(directory / 'results.json', {'rows': []})
    crash()
  assert not few_shot_table._done(cell, directory)
  with pytest.raises(CheckpointError, match=saying(directory, 'meta_iterations: 7 there, 500 asked for')):
    few_shot_table.prepare(config, tmp_path, few_shot_training.build, classification.run)


@pytest.mark.parametrize('ending', ['json', 'md', 'png'])
def test_a_table_overwrites_only_what_a_table_has_written(tmp_path, ending):
  config = classification.Config(learner=('lstm',), table2=True, data_dir='somewhere')
  mine = tmp_path / f'table_omniglot.{ending}'
  mine.write_text('[]')
  with pytest.raises(files.WriterError, match=saying(mine, 'no run has written', 'move it away')):
    few_shot_table.prepare(config, tmp_path, few_shot_training.build, classification.run)
  with pytest.raises(files.WriterError, match=saying(mine)):
    few_shot_table.write(tmp_path, 'omniglot')
  assert contents(tmp_path) == {mine: b'[]'}
  mine.unlink()
  for _ in range(2):
    few_shot_table.write(tmp_path, 'omniglot')


def test_a_table_refuses_finished_cells_of_another_configuration_before_it_begins(tmp_path):
  config = classification.Config(learner=('lstm',), table2=True, data_dir='somewhere')
  other = dataclasses.replace(few_shot_table.cells(config)[1], meta_iterations=7)
  directory = tmp_path / 'cells' / 'omniglot_lstm_20way_1shot'
  before = finished(directory, other)
  with pytest.raises(CheckpointError, match=saying(directory, 'finished', 'meta_iterations: 7 there, 500 asked for')):
    few_shot_table.prepare(config, tmp_path, few_shot_training.build, classification.run)
  assert contents(directory) == before


def test_a_cell_that_is_older_than_an_option_stays(tmp_path):
  cell = few_shot_table.cells(classification.Config(learner=('lstm',), table2=True, data_dir='somewhere'))[0]
  older = dataclasses.asdict(cell)
  del older['bad_steps']
  files.write_json(tmp_path / 'config.json', older)
  files.write_json(tmp_path / 'results.json', {'rows': [table_row()]})
  assert few_shot_table._done(cell, tmp_path)
  assert not few_shot_table._done(dataclasses.replace(cell, bad_steps='skip'), tmp_path)


@pytest.mark.parametrize(
  ('experiment', 'options', 'workdir'),
  [
    (regression, {}, 'runs/regression'),
    (regression, dict(table1=True), 'runs/regression_table1'),
    (regression, dict(learner=('maml',), dataset='sinusoids_maml'), 'runs/regression_maml_sinusoids_maml'),
    (classification, dict(table2=True, data_dir='a', learner=('maml',)), 'runs/classification_table2_omniglot'),
    (classification, dict(dataset='folder', data_dir='a', start='c/a/b.safetensors'), 'runs/classification_folder_a_b'),
    (classification, dict(evaluate='../b.safetensors'), 'runs/classification_glyphs_b'),
  ],
)
def test_the_default_directory_is_named_after_what_is_trained(experiment, options, workdir):
  config = experiment.Config(**options)
  assert running.default_workdir(experiment.__name__.removeprefix('experiments.'), config) == workdir
