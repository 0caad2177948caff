"""The tables of few-shot classification, and their cells on disk."""

import dataclasses
import json

import pytest
from few_shot_settings import TINY
from problems import SmallConvNet, in_place_of_conv4, saying, table_row

from experiments import (
  classification,
  few_shot_data,
  few_shot_table,
  few_shot_training,
)
from experiments.few_shot_learners import LEARNERS
from experiments.reporting import TrainingError


def write_cell(directory, cell):
  """Leaves what a run leaves: the configuration, and a row for each way of batch norm."""
  steps, batch = (20, 2) if cell.learner == ('joint',) else (0, 1)
  rows = [
    table_row(
      learner=cell.learner[0], way=cell.way, shot=cell.shot, test_shot=shot, batch_norm=mode, dataset=cell.dataset,
      meta_batch=batch, mean_by_step=[0.5] * (steps + 1),
    )
    for shot in cell.test_shots
    for mode in ('transductive', 'inductive')
  ]  # fmt: skip
  directory.mkdir(parents=True)
  (directory / 'config.json').write_text(json.dumps(dataclasses.asdict(cell)))
  (directory / 'results.json').write_text(json.dumps({'rows': rows}))


def table_config(mini_imagenet):
  """Table 3 of made-up images, two learners."""
  return classification.Config(
    learner=('prototypical', 'joint'), table3=True, dataset='mini_imagenet', data_dir=str(mini_imagenet),
    image_size=16, **TINY,
  )  # fmt: skip


@pytest.fixture(scope='module')
def table(mini_imagenet, tmp_path_factory):
  """The table of cells by hand."""
  workdir = tmp_path_factory.mktemp('table')
  config = table_config(mini_imagenet)
  run = lambda cell, directory, setup: write_cell(directory, cell)
  few_shot_table.prepare(config, workdir, few_shot_training.build, run)()
  return config, workdir


@pytest.mark.slow
def test_a_table_of_two_cells_that_are_run(mini_imagenet, tmp_path, monkeypatch):
  monkeypatch.setattr(few_shot_table, 'WAYS', (5,))
  monkeypatch.setattr(few_shot_table, 'SHOTS', (1,))
  with in_place_of_conv4(SmallConvNet):
    few_shot_table.prepare(table_config(mini_imagenet), tmp_path, few_shot_training.build, classification.run)()
  rows = json.loads((tmp_path / 'table_mini_imagenet.json').read_text())['rows']
  assert [(row['learner'], row['batch_norm']) for row in rows] == [
    (learner, mode) for learner in ('prototypical', 'joint') for mode in ('transductive', 'inductive')
  ]
  lines = (tmp_path / 'table_mini_imagenet.md').read_text().splitlines()
  assert [line.split(' | ', 3)[3] for line in lines[2:6]] == ['0 | 1 × 1 | 1 |'] * 2 + ['20 | 1 × 2 | 1 |'] * 2
  assert 'on 2 unseen tasks of mini_imagenet' in lines[-1]
  assert (tmp_path / 'table_mini_imagenet.png').read_bytes().startswith(b'\x89PNG')


class TestTable:
  def test_all_cells_are_there(self, table):
    _, workdir = table
    rows = json.loads((workdir / 'table_mini_imagenet.json').read_text())['rows']
    found = {(row['learner'], row['way'], row['shot'], row['test_shot'], row['batch_norm']) for row in rows}
    assert found == {
      (learner, way, shot, shot, mode)
      for learner in ('prototypical', 'joint')
      for way in (5, 20)
      for shot in (1, 5)
      for mode in ('transductive', 'inductive')
    }
    assert (workdir / 'table_mini_imagenet.png').read_bytes().startswith(b'\x89PNG')

  def test_a_row_says_what_was_run(self, table):
    _, workdir = table
    lines = (workdir / 'table_mini_imagenet.md').read_text().splitlines()
    assert lines[0] == (
      '| learner | batch norm | 5-way 1-shot | 5-way 5-shot | 20-way 1-shot | 20-way 5-shot | inner steps | '
      'meta-iterations × tasks | seeds |'
    )
    assert [line.split(' | ')[:2] for line in lines[2:6]] == [
      ['| Prototypical Nets', 'transductive'], ['| Prototypical Nets', 'inductive'],
      ['| SGD, joint start', 'transductive'], ['| SGD, joint start', 'inductive'],
    ]  # fmt: skip
    assert lines[2].endswith('| 0 | 1 × 1 | 1 |')
    assert lines[4].endswith('| 20 | 1 × 2 | 1 |')
    assert 'on 2 unseen tasks of mini_imagenet' in lines[-1]

  def test_cells_that_are_there_stay_and_others_are_made_anew(self, table, caplog, monkeypatch):
    config, workdir = table
    made = []

    def run(cell, directory, setup):
      made.append(directory.name)

    directory = workdir / 'cells' / 'mini_imagenet_joint_20way_5shot'
    (directory / 'results.json').rename(directory / 'kept.json')  # As after a run that was cut off.
    with caplog.at_level('INFO', 'absl'):
      few_shot_table.prepare(config, workdir, few_shot_training.build, run)()
    assert made == ['mini_imagenet_joint_20way_5shot']
    assert caplog.text.count('is finished already') == 7
    (directory / 'kept.json').rename(directory / 'results.json')
    made.clear()
    other = dataclasses.replace(config, meta_iterations=2, learner=('joint',))
    few_shot_table.prepare(other, workdir, few_shot_training.build, run)()
    assert len(made) == 4

  def test_table2_trains_on_one_shot_and_tests_on_five_too(self):
    config = classification.Config(table2=True, dataset='omniglot', data_dir='anywhere')
    cells = few_shot_table.cells(config)
    assert len(cells) == 2 * len(LEARNERS)
    assert {(cell.way, cell.shot, cell.test_shots) for cell in cells} == {(5, 1, (1, 5)), (20, 1, (1, 5))}

  def test_the_papers_figures(self):
    figure = few_shot_table.paper_figure
    assert figure('meta_sgd', 'omniglot', 5, 1) == '99.53 ± 0.26'
    assert figure('siamese', 'omniglot', 20, 5) == '97.0'
    assert figure('maml', 'mini_imagenet', 5, 1) is None  # The paper's is of five steps.
    assert figure('maml', 'omniglot', 5, 1) == '98.7 ± 0.4'
    assert figure('maml_5', 'omniglot', 20, 1) == '95.8 ± 0.3'
    assert figure('maml_5', 'mini_imagenet', 5, 1) == '48.7 ± 1.84'
    assert figure('maml', 'mini_imagenet', 20, 5) == '19.29 ± 0.29'
    assert figure('meta_sgd', 'glyphs', 5, 1) is None
    assert figure('meta_sgd', 'omniglot', 3, 1) is None


def test_a_cell_that_diverges_does_not_keep_the_others_waiting(tmp_path, monkeypatch, capsys):
  config = classification.Config(learner=('maml', 'lstm'), table2=True, data_dir='somewhere')
  made = []

  def run(cell, directory, setup):
    if cell.learner == ('maml',) and cell.way == 5:
      raise TrainingError('the loss is no longer finite')
    made.append((cell.learner[0], cell.way))

  monkeypatch.setattr(few_shot_data, 'load', lambda config: few_shot_data.Data(None, None, None))
  make = few_shot_table.prepare(config, tmp_path, lambda cell, data: None, run)
  with pytest.raises(TrainingError, match=saying('1 of 4 trainings', 'cell 1 of 4', 'MAML', '5-way', '1 shot')):
    make()
  assert made == [('lstm', 5), ('maml', 20), ('lstm', 20)]
  assert 'error: the loss is no longer finite' in capsys.readouterr().out


def test_a_table_is_of_one_data_set(tmp_path):
  for dataset in ('omniglot', 'mini_imagenet'):
    directory = tmp_path / 'cells' / f'{dataset}_lstm_5way_1shot'
    directory.mkdir(parents=True)
    (directory / 'results.json').write_text(json.dumps({'rows': [table_row(dataset=dataset)]}))
  assert [row['dataset'] for row in few_shot_table.rows_of(tmp_path, 'omniglot')] == ['omniglot']


@pytest.mark.parametrize(
  'text',
  ['', '{"rows"', '[]', '{}', '{"rows": []}', '\xff'],
)
def test_a_table_is_made_without_a_cell_whose_results_are_broken(text, tmp_path, capsys):
  config = classification.Config(learner=('lstm',), table2=True, data_dir='somewhere')
  cell = few_shot_table.cells(config)[0]
  whole, broken = (tmp_path / 'cells' / f'omniglot_lstm_{way}way_1shot' for way in (5, 20))
  for directory in (whole, broken):
    directory.mkdir(parents=True)
    (directory / 'config.json').write_text(json.dumps(dataclasses.asdict(cell)))
    (directory / 'results.json').write_text(json.dumps({'rows': [table_row()]}))
  assert few_shot_table._done(cell, broken)
  (broken / 'results.json').write_bytes(text.encode('latin-1'))
  assert not few_shot_table._done(cell, broken)
  few_shot_table.write(tmp_path, 'omniglot')
  out = capsys.readouterr().out
  assert f'{broken}/results.json' in out
  assert 'the table lacks its cell' in out
  assert len(json.loads((tmp_path / 'table_omniglot.json').read_text())['rows']) == 1
