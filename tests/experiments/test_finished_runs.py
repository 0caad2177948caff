"""A directory's runs that are finished, or another program's; cells of a table."""

import dataclasses
import os
import re
import signal

import jax
import numpy as np
import pytest
from problems import saying, table_row

import metasgd_jax as ms
from experiments import classification, few_shot_table, few_shot_training, processes, regression, resuming
from experiments.resuming import Keeping
from metasgd_jax.io import checkpoint, files, provenance
from metasgd_jax.io.checkpoint import CheckpointError

MAML = regression.Config(learner=('maml',), meta_iterations=20, eval_tasks=3, eval_repeats=2)


class CrashError(Exception):
  """As if the program had been killed here."""


def crash():
  raise CrashError


ROWS = [{'mean': 0.5}]


def finished(workdir, config=MAML, keeping=None):
  """A run that trains nothing and has results; returns all its files."""
  with resuming.open_run(workdir, config, keeping) as opened:
    assert opened.rows is None
    files.write_json(workdir / 'results.json', {'rows': ROWS})
  return {path: path.read_bytes() for path in workdir.rglob('*') if path.is_file()}


def test_a_finished_run_of_this_configuration_stays(tmp_path, monkeypatch, capsys):
  before = finished(tmp_path)
  capsys.readouterr()
  monkeypatch.setattr(regression, '_run', lambda *_: crash())
  assert regression.run(MAML, tmp_path) == ROWS
  (said,) = capsys.readouterr().out.splitlines()
  assert re.match(saying(f'{tmp_path} holds this run', 'finished', '--restart'), said)
  assert {path: path.read_bytes() for path in tmp_path.rglob('*') if path.is_file()} == before


def test_a_finished_run_is_made_again_if_it_is_asked_for_or_not_this_one(tmp_path, monkeypatch):
  finished(tmp_path)
  finished(tmp_path, keeping=Keeping(restart=True))
  finished(tmp_path, dataclasses.replace(MAML, shot=3))
  (tmp_path / 'results.json').write_text('{"rows": [{"mean": 0.6}]}')
  finished(tmp_path, dataclasses.replace(MAML, shot=3))
  now = provenance.collect()
  monkeypatch.setattr(provenance, 'collect', lambda: now | {'versions': now['versions'] | {'jax': '99'}})
  finished(tmp_path, dataclasses.replace(MAML, shot=3))


@pytest.mark.parametrize('keep', [True, False])
def test_a_kill_just_after_the_end_loses_nothing(tmp_path, monkeypatch, keep):
  """All that comes after the mark, one moment after the other, and before the checkpoints go."""
  directory = tmp_path / 'checkpoints' / 'maml_5shot'
  state = ms.TrainState(np.int32(3), jax.random.key(0), {'w': np.zeros(2)}, ())
  keeping = Keeping(keep_checkpoints=keep)
  with pytest.raises(CrashError), resuming.open_run(tmp_path, MAML, keeping):
    with checkpoint.Checkpoints(directory, like=state, config=dataclasses.asdict(MAML)) as kept:
      kept.save(state)
    files.write_json(tmp_path / 'results.json', {'rows': ROWS})
    monkeypatch.setattr(resuming, '_remove', lambda _: crash())
    monkeypatch.setattr(processes, 'any_of', lambda _: crash())
  monkeypatch.undo()
  assert checkpoint.steps(directory) == [3]
  assert not resuming.unfinished(tmp_path)
  with resuming.open_run(tmp_path, MAML, keeping) as opened:
    assert opened.rows == ROWS


def test_sigterm_when_all_is_done_changes_nothing(tmp_path, monkeypatch, capsys):
  remove = resuming._remove
  monkeypatch.setattr(resuming, '_remove', lambda path: (os.kill(os.getpid(), signal.SIGTERM), remove(path)))
  stop = resuming.Stop.leave
  monkeypatch.setattr(resuming.Stop, 'leave', lambda self, what: stop(self, what) if self.finished else None)
  finished(tmp_path)
  assert 'stopped' not in capsys.readouterr().out
  assert (tmp_path / 'finished.json').exists()


def test_a_command_with_restart_is_told_to_go_on_without(tmp_path, capsys):
  with pytest.raises(SystemExit), resuming.open_run(tmp_path, MAML, Keeping(restart=True)):
    os.kill(os.getpid(), signal.SIGTERM)
  said = saying('stopped by SIGTERM: ', 'is saved', 'the same command without --restart goes on')
  assert re.match(said, capsys.readouterr().out)


def test_of_several_processes_none_leaves_by_itself(monkeypatch, capsys):
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  others = [False]
  monkeypatch.setattr(processes, 'any_of', lambda here: here or others.pop())
  told, other = resuming.Stop(), resuming.Stop()
  told.come()
  other.ask()
  others.append(True)
  for stop in (told, other):
    with pytest.raises(SystemExit), stop.held():
      pass
  assert capsys.readouterr().out.count('stopped by SIGTERM: all that was trained') == 2


def test_two_programs_do_not_train_in_one_directory(tmp_path):
  said = saying('another program trains in', tmp_path)
  with resuming.open_run(tmp_path, MAML), pytest.raises(files.WriterError, match=said):
    regression.run(MAML, tmp_path)
  with resuming.open_run(tmp_path, MAML):
    pass


def test_a_table_refuses_unfinished_cells_of_another_configuration_before_it_begins(tmp_path, monkeypatch):
  config = classification.Config(learner=('lstm',), table2=True, data_dir='somewhere')
  cell = few_shot_table.cells(config)[1]
  state = ms.TrainState(np.int32(3), jax.random.key(0), {'w': np.zeros(2)}, ())
  directory = tmp_path / 'cells' / 'omniglot_lstm_20way_1shot'
  there = dataclasses.asdict(dataclasses.replace(cell, meta_iterations=7))
  with checkpoint.Checkpoints(directory / 'checkpoints' / 'lstm_run0', like=state, config=there) as kept:
    kept.save(state)
  files.write_json(directory / 'config.json', dataclasses.asdict(cell))
  files.write_json(directory / 'results.json', {'rows': []})
  assert not few_shot_table._done(cell, directory)
  with pytest.raises(CheckpointError, match=saying(directory, 'meta_iterations: 7 there, 500 asked for')):
    few_shot_table.prepare(config, tmp_path, few_shot_training.build, classification.run)


def test_a_cell_that_is_older_than_an_option_stays(tmp_path):
  cell = few_shot_table.cells(classification.Config(learner=('lstm',), table2=True, data_dir='somewhere'))[0]
  older = dataclasses.asdict(cell)
  del older['bad_steps']
  files.write_json(tmp_path / 'config.json', older)
  files.write_json(tmp_path / 'results.json', {'rows': [table_row()]})
  assert few_shot_table._done(cell, tmp_path)
  assert not few_shot_table._done(dataclasses.replace(cell, bad_steps='skip'), tmp_path)
