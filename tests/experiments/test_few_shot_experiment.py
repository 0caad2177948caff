"""Few-shot classification from configurations: every learner, the tables, their cells on disk, folders of images."""

import contextlib
import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
from PIL import Image
from problems import OneLayer, SmallConvNet, assert_trees_close, in_place_of_conv4, saying, table_row
from small_models import small_model

import metasgd_jax as ms
from experiments import (
  calibration,
  classification,
  few_shot_data,
  few_shot_learners,
  few_shot_table,
  few_shot_testing,
  few_shot_training,
  jobs,
  reporting,
  trainings,
)
from experiments.few_shot_learners import LEARNERS, NAMES, SEQUENTIAL
from experiments.reporting import TrainingError
from experiments.resuming import Keeping
from metasgd_jax.datasets import DatasetError, published_split
from metasgd_jax.deploy.model_file import build_learner as build_model_learner

TINY = dict(filters=2, meta_iterations=1, meta_batch=1, query=1, eval_tasks=2, eval_query=1)


def draw_folder(directory, classes, images=8, size=16):
  rng = np.random.default_rng(0)
  for name in classes:
    (directory / name).mkdir(parents=True)
    for i in range(images):
      Image.fromarray(rng.integers(0, 256, (size, size, 3), np.uint8)).save(directory / name / f'{i}.png')


@pytest.fixture(scope='module')
def mini_imagenet(tmp_path_factory):
  directory = tmp_path_factory.mktemp('mini_imagenet')
  draw_folder(directory, [name for part in published_split('mini_imagenet') for name in part])
  return directory


def of_three():
  """An episode of three classes, an image of each to show and one to ask."""
  batch = lambda seed: ms.Batch(np.random.default_rng(seed).random((3, 28, 28, 1), np.float32), np.arange(3))
  return ms.Episode(batch(0), batch(1))


def assert_trained_and_tested(name):
  """Traced, not compiled: shapes fit, a key is there where one is needed, and every answer is one of N."""
  config = classification.Config(learner=(name,), way=3, shot=1, query=2, filters=4)
  bank = ms.tasks.class_bank(np.random.default_rng(0).integers(0, 256, (6, 20, 28, 28, 1), np.uint8))
  setup = few_shot_training.build(config, few_shot_data.Data(bank, None, bank))
  learner, tasks = setup.learners[name], setup.train[name]
  state = jax.eval_shape(
    lambda key: ms.init(key, tasks, learner=learner, optimizer=setup.optimizers[name]), jax.random.key(0)
  )
  step = lambda state: ms.train_step(
    state, tasks, learner=learner, optimizer=setup.optimizers[name], meta_batch=2, placement=ms.Placement(1)
  )
  after, info = jax.eval_shape(step, state)
  assert jax.tree.structure(after.meta) == jax.tree.structure(state.meta)
  assert 'accuracy' in info
  test = setup.tests[1]

  def answered(meta, key, tester):
    support, query = test.episode(test.sample(key), key)
    return tester.predict(tester.adapt(meta, support, key), query.x)

  for inductive in (False, True):
    tester = setup.testers[name, inductive]
    answers = jax.eval_shape(functools.partial(answered, tester=tester), state.meta, jax.random.key(0))
    assert answers.shape == (45, 3)


@pytest.mark.parametrize('name', LEARNERS)
def test_every_learner_can_be_trained_and_tested(name):
  # ANIL's rates are by the names of Conv4's layers.
  with contextlib.nullcontext() if name == 'anil' else in_place_of_conv4(OneLayer):
    assert_trained_and_tested(name)


@pytest.mark.slow
@pytest.mark.parametrize('name', LEARNERS)
def test_every_learner_can_be_trained_and_tested_with_conv4(name):
  assert_trained_and_tested(name)


def test_each_learner_is_another():
  """A name that built its neighbour's learner would go unseen in a table."""
  config = classification.Config(way=3, filters=2)
  build = lambda name, **options: few_shot_learners.build_learner(name, config, **options)
  key, one = jax.random.key(0), of_three()

  def adapted(name):
    """Which leaves of θ an inner step moves."""
    init = jax.jit(build(name).init)(key, one)
    meta, after = jax.device_get((init, jax.jit(build(name).adapt)(init, one.support, None)))
    return jax.tree.map(lambda a, b: bool(np.any(a != b)), after, meta.theta)

  moved = adapted('anil')
  assert all(jax.tree.leaves(moved.pop('Dense_1')))
  assert not any(jax.tree.leaves(moved))
  with in_place_of_conv4(SmallConvNet):
    assert any(jax.tree.leaves(adapted('maml')['ConvBlock_0']))
    meta = jax.jit(build('maml').init)(key, one)
    slope = lambda name: jax.grad(lambda meta: build(name).loss(meta, one, None)[0])(meta).theta['Dense_0']['kernel']
    first_order, second = jax.jit(lambda: (slope('fomaml'), slope('maml')))()
    assert np.any(np.abs(np.subtract(first_order, second)) > 1e-6)

    def steps(name, **options):
      path = jax.eval_shape(lambda meta: build(name, **options).path(meta, one.support, None), meta)
      return jax.tree.leaves(path)[0].shape[0]

    assert [steps('maml'), steps('maml_5'), steps('maml_5', test=True)] == [2, 6, 11]

  whole = dataclasses.replace(config, filters=None)
  init = lambda name: jax.eval_shape(few_shot_learners.build_learner(name, whole).init, key, one)
  rates = {name: init(name).alpha for name in ('meta_sgd', 'layer_rates')}
  assert {leaf.size for leaf in jax.tree.leaves(rates['layer_rates'])} == {1}
  assert sum(leaf.size for leaf in jax.tree.leaves(rates['meta_sgd'])) > 100_000
  fce, bare = (init(name) for name in ('matching_fce', 'matching'))
  assert bare.support_context is None
  assert fce.support_context is not None
  cells = [init(name) for name in SEQUENTIAL]
  assert ['gates' in cell for cell in cells] == [True, False]


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


@pytest.fixture(scope='module')
def folder_run(mini_imagenet, tmp_path_factory):
  """A run from start to end, of grey images from a folder, its three best checkpoints an ensemble."""
  workdir = tmp_path_factory.mktemp('folder')
  options = TINY | dict(meta_iterations=22, validate_every=2, ensemble=3)
  config = classification.Config(
    learner=('prototypical',), dataset='folder', data_dir=str(mini_imagenet), image_size=16, channels=1, **options
  )
  with in_place_of_conv4(OneLayer):
    return config, workdir, classification.run(config, workdir)


def test_any_folder_of_images(folder_run):
  config, workdir, rows = folder_run
  assert rows[0]['dataset'] == 'folder'
  means = lambda rows: [row['mean_by_step'] for row in rows]
  assert means(few_shot_table._read_rows(workdir / 'results.json')) == means(rows)  # As a table reads a cell's.
  data = few_shot_data.load(config)
  assert [len(bank.sizes) for bank in data] == [64, 16, 20]
  assert data.test.images.shape == (160, 16, 16, 1)


def test_the_best_checkpoints_answer_together(folder_run):
  _, workdir, rows = folder_run
  assert rows[0]['ensemble'] == 3
  lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  found = {line['step']: line['validation_accuracy'] for line in lines if 'validation_accuracy' in line}
  assert list(found) == list(range(2, 23, 2))


@pytest.mark.slow
def test_what_is_validated_in_a_process_of_its_own(folder_run, tmp_path, monkeypatch):
  """Each run validates its states, and the results are those of one process."""
  config = dataclasses.replace(folder_run[0], meta_iterations=4, ensemble=2, seeds=2)

  def in_this_process(todo, on):
    for one in todo:
      training = trainings.named(one.directory.name, few_shot_training.plan(config, setup))
      trainings.train_only(training, config, one.directory, Keeping(only=training.name))

  monkeypatch.setattr(jobs, 'run_all', in_this_process)
  monkeypatch.setattr(reporting, 'save_pictures', lambda *_: None)
  with in_place_of_conv4(OneLayer):
    setup = few_shot_training.build(config)
    classification.run(config, tmp_path / 'alone', setup)
    classification.run(config, tmp_path / 'apart', setup, jobs=jobs.Jobs([], [0, 1]))
  found = [json.loads((tmp_path / name / 'results.json').read_text())['rows'] for name in ('alone', 'apart')]
  assert found[0] == found[1]
  assert len({(tmp_path / name / 'metrics.jsonl').read_bytes() for name in ('alone', 'apart')}) == 1


def test_checkpoints_are_kept_by_their_accuracy():
  accuracies = iter([0.5, 0.9, 0.7, 0.8, 0.6])
  best = few_shot_training.Best(lambda step, meta: next(accuracies), every=10, keep=3)
  for step in range(5, 51, 5):
    state = ms.TrainState(np.int32(step), None, {'w': np.float32(step)}, None)
    best(ms.Progress(state, step, 50, {}, 1.0, 1.0))
  assert [(a, step, float(meta['w'])) for a, step, meta in best.found] == [(0.9, 20, 20), (0.8, 40, 40), (0.7, 30, 30)]


def test_an_accuracy_that_is_nan_is_the_worst():
  accuracies = iter([np.nan, 0.9, 0.1, np.nan])
  best = few_shot_training.Best(lambda step, meta: next(accuracies), every=1, keep=2)
  for step in range(4):
    best(ms.Progress(ms.TrainState(np.int32(step), None, {}, None), step, 4, {}, 1.0, 1.0))
  assert [(accuracy, step) for accuracy, step, _ in best.found] == [(0.9, 1), (0.1, 2)]


def test_images_stay_on_the_host_where_asked():
  bank = ms.tasks.class_bank(np.zeros((6, 20, 28, 28, 1), np.uint8))
  data = few_shot_data.Data(bank, None, bank)
  for stream, kind in (('yes', ms.TaskStream), ('no', ms.TaskDistribution), ('auto', ms.TaskDistribution)):
    config = classification.Config(
      learner=('meta_sgd', 'joint', 'mann'), dataset='omniglot', data_dir='DIR', stream=stream, way=3
    )
    setup = few_shot_training.build(config, data)
    for tasks in (*setup.train.values(), *setup.tests.values()):
      assert isinstance(tasks, kind)
  assert not few_shot_data.streamed(bank, 'auto')
  assert not few_shot_data.streamed(bank, 'no')


@pytest.mark.parametrize(
  ('values', 'message'),
  [
    (dict(table2=True, table3=True), ('table2 and table3', 'give one')),
    (dict(dataset='mini_imagenet'), ('mini_imagenet', 'data_dir')),
    (dict(ensemble=3), ('ensemble=3', '--validate_every=N')),
    (dict(channels=2), ('channels', '1 or 3', 'got 2')),
    (dict(eval_shots=(0,)), ('eval_shots', 'at least 1', '(0,)')),
    (dict(eval_shots=(1, 1)), ('eval_shots', 'each once')),
    (dict(multi_step_loss=True), ('multi_step_loss', 'inner_steps=1', 'at least 2')),
    (dict(alpha_by_step=True), ('alpha_by_step', 'inner_steps=1', 'at least 2')),
    (dict(ensemble=3, validate_every=200), ('ensemble=3', '2 validations', '500 meta-iterations', 'lower')),
    (dict(table2=True, dataset='glyphs'), ('table', 'dataset=glyphs', 'leave --dataset out')),
    (dict(class_lists='lists'), ('class_lists', 'folder', 'dataset=glyphs', 'leave class_lists out')),
    (dict(data_dir='x'), ('data_dir', 'omniglot or', 'dataset=glyphs', '--data_dir=x', 'leave data_dir out')),
    (dict(cache='x', dataset='folder', data_dir='x'), ('cache', 'mini_imagenet', 'dataset=folder', 'leave cache out')),
    (dict(split='vinyals', dataset='cifar_fs', data_dir='x'), ('split works', 'omniglot', '--split=vinyals')),
    (dict(split_seed=1), ('split_seed works', 'omniglot or folder', '--split_seed=1')),
    (dict(validation_classes=9, dataset='folder', data_dir='x'), ('omniglot', '--validation_classes=9')),
    (dict(image_size=32, dataset='cifar_fs', data_dir='x'), ('image_size', '--image_size=32', 'dataset=cifar_fs')),
    (dict(channels=1, dataset='omniglot', data_dir='x'), ('channels', 'dataset=folder', '--channels=1')),
    (dict(verify_archives=False, dataset='folder', data_dir='x'), ('verify_archives', '--noverify_archives')),
  ],
)
def test_settings_that_do_not_go_together(values, message):
  with pytest.raises(ValueError, match=saying(*message)):
    classification.Config(**values)


def test_mamls_rates_are_its_papers():
  rate = lambda name, **options: few_shot_learners.maml_rate(
    name, classification.Config(data_dir='somewhere', **options)
  )
  assert rate('maml', dataset='omniglot') == 0.4
  assert rate('maml_5', dataset='omniglot', way=20) == 0.1
  assert rate('maml_5', dataset='mini_imagenet') == 0.01
  assert rate('fomaml', dataset='cifar_fs') == 0.01
  assert rate('maml', dataset='omniglot', alpha=0.2) == 0.2


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


def test_a_sequence_has_ten_images_of_a_class():
  config = classification.Config(learner=('mann',), shot=10)
  with pytest.raises(ValueError, match=saying('mann', '10 images', 'shot=10', 'lower shot')):
    few_shot_training.build(config)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['random', 'lstm'])
def test_an_ensemble_of_what_is_not_trained_and_of_what_reads_sequences(name, tmp_path, mini_imagenet):
  config = classification.Config(
    learner=(name,), dataset='folder', data_dir=str(mini_imagenet), image_size=16, validate_every=1, ensemble=2,
    **TINY | dict(meta_iterations=2),
  )  # fmt: skip
  if name == 'lstm':
    draw_folder(tmp_path / 'images', [f'class_{i:02d}' for i in range(30)], images=11)
    config = dataclasses.replace(config, data_dir=str(tmp_path / 'images'))
  with in_place_of_conv4(SmallConvNet):
    assert classification.run(config, tmp_path / 'run')


def test_a_folder_is_split_by_lists(tmp_path):
  draw_folder(tmp_path / 'images', ['a', 'b', 'c', 'd', 'e', 'f'])
  lists = tmp_path / 'lists'
  lists.mkdir()
  for part, names in dict(train='f\na\n', validation='b\n', test='# to test on\ne\nd\n').items():
    (lists / f'{part}.txt').write_text(names)
  config = classification.Config(
    dataset='folder', data_dir=str(tmp_path / 'images'), image_size=16, class_lists=str(lists), way=2, eval_query=5
  )
  assert [len(bank.sizes) for bank in few_shot_data.load(config)] == [2, 1, 2]


def test_training_starts_from_a_model(tmp_path):
  path, options = str(tmp_path / 'm.safetensors'), TINY | dict(way=3)
  model = small_model(way=3, filters=2, hidden=32, seed=1)
  ms.save_model(path, model)
  config = classification.Config(start=path, **options)
  state = few_shot_training._first_state('meta_sgd', 0, config, few_shot_training.build(config))
  assert_trees_close(state.meta, model.meta, rtol=0, atol=0)
  for other in (dict(filters=4), dict(way=4), dict(learner=('maml',))):
    with pytest.raises(ValueError, match=saying(path, '(learner, way, filters, hidden, image_shape)', 'the values')):
      few_shot_training.build(classification.Config(start=path, **options | other))
  with pytest.raises(ValueError, match=saying('start', 'meta_sgd or maml', 'learner=lstm', 'leave start out')):
    classification.Config(start=path, learner=('lstm',))


@pytest.mark.parametrize('learner', ['meta_sgd', 'maml'])
def test_training_starts_from_an_embedding(learner, tmp_path):
  """A prototypical model of any number of ways gives the layers of the embedding; all else is as without it."""
  path = str(tmp_path / 'm.safetensors')
  model = small_model('prototypical', way=4, filters=2, seed=1)
  ms.save_model(path, model)
  options = TINY | dict(learner=(learner,), way=3)
  config = classification.Config(start=path, **options)
  begin = lambda config: few_shot_training._first_state(learner, 0, config, few_shot_training.build(config)).meta
  found, fresh = begin(config), begin(classification.Config(**options))
  blocks = {f'ConvBlock_{i}' for i in range(4)}
  assert model.meta.keys() == blocks < found.theta.keys()
  assert_trees_close({name: found.theta[name] for name in blocks}, model.meta, rtol=0, atol=0)
  rest = lambda meta: {name: layer for name, layer in meta.theta.items() if name not in blocks}
  assert_trees_close(rest(found), rest(fresh), rtol=0, atol=0)
  assert_trees_close(found.alpha, fresh.alpha, rtol=0, atol=0)
  with pytest.raises(ValueError, match=saying(path, '(filters, channels) = (2, 1)', 'this run has (4, 1)')):
    few_shot_training.build(classification.Config(start=path, **options | dict(filters=4)))


ALMOST_UNTRAINED = TINY | dict(way=3, filters=4, learning_rate=1e-12, validate_every=1)


@pytest.fixture(scope='module')
def conv4_run(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('conv4')
  return workdir, classification.run(classification.Config(**ALMOST_UNTRAINED), workdir)


@pytest.mark.slow
def test_a_run_that_starts_from_anothers_model_answers_as_it_did(conv4_run, tmp_path):
  """The seed alone would give another model."""
  workdir, rows = conv4_run
  path = str(workdir / 'model_meta_sgd.safetensors')
  again = classification.run(classification.Config(start=path, seed=1, **ALMOST_UNTRAINED), tmp_path)
  np.testing.assert_allclose(again[0]['mean_by_step'], rows[0]['mean_by_step'], atol=1e-6)
  models = [ms.load_model(directory / 'model_meta_sgd.safetensors').meta for directory in (workdir, tmp_path)]
  assert_trees_close(*models, atol=1e-6)


@pytest.mark.slow
def test_a_trained_model_can_be_used(conv4_run):
  workdir, rows = conv4_run
  path = workdir / 'model_meta_sgd.safetensors'
  model = ms.load_model(path)
  assert (model.config.way, model.config.image_shape, model.config.filters) == (3, (28, 28, 1), 4)
  assert model.config.training['accuracy_1_shot_inductive'].startswith(f'{100 * rows[1]["mean"]:.2f}% ±')
  assert 'without the temperature' in model.config.training['calibration_error_1_shot']
  assert rows[1]['temperature'] == model.config.temperature
  episode = ms.tasks.glyphs(way=3, shot=1, query=2)
  support, query = episode.episode(episode.sample(jax.random.key(0)), jax.random.key(1))
  classifier = ms.FewShotClassifier(path).fit(np.asarray(support.x), np.asarray(support.y))
  assert classifier.predict(np.asarray(query.x)).shape == (6,)


@pytest.mark.slow
def test_the_temperature_is_fitted_on_other_tasks_with_inductive_batch_norm(conv4_run):
  model = ms.load_model(conv4_run[0] / 'model_meta_sgd.safetensors')
  learner, tasks = build_model_learner(model.config, inductive=True), ms.tasks.glyphs(way=3, shot=1, query=1)
  key = reporting.test_keys(1)[0]
  logits = ms.evaluate(learner, model.meta, tasks, key, metric_fn=lambda logits, _: logits, num_tasks=2)[:, 0, -1]
  labels = ms.evaluate(learner, model.meta, tasks, key, metric_fn=lambda _, labels: labels, num_tasks=2)[:, 0, -1]
  expected = calibration.best_temperature(logits.reshape(-1, 3), labels.reshape(-1))
  assert model.config.temperature == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(('classes', 'fitted'), [pytest.param(0, False, marks=pytest.mark.slow), (2, False), (3, True)])
def test_a_temperature_needs_validation_classes_but_no_validation(classes, fitted, tmp_path, monkeypatch):
  found = []

  def fit(logits, labels):
    found.append((logits.shape, labels.shape))
    return 2.5

  monkeypatch.setattr(calibration, 'best_temperature', fit)
  bank = lambda count, seed: ms.tasks.class_bank(
    np.random.default_rng(seed).integers(0, 256, (count, 20, 28, 28, 1), np.uint8)
  )
  config = classification.Config(learner=('prototypical',), **TINY | dict(way=3, eval_shots=(1, 2)))
  data = few_shot_data.Data(bank(4, 0), bank(classes, 1) if classes else None, bank(4, 2))
  with in_place_of_conv4(OneLayer):
    setup = few_shot_training.build(config, data)
    rows = classification.run(config, tmp_path, setup)
  assert {row['temperature'] for row in rows} == {2.5 if fitted else 1.0}
  assert found == ([((12, 3), (12,))] if fitted else [])  # 2 shots, 2 tasks, 3 query images.
  for row in rows:
    assert (row['calibration_error'] == row['calibration_error_uncalibrated']) == (not fitted)


def test_predictions_that_are_not_finite_leave_the_temperature_at_1(monkeypatch, capsys):
  config = classification.Config(**TINY)
  setup = few_shot_training.build(config)
  broken = np.zeros((2, 1, 5, 6))
  broken[..., :5] = np.nan  # The last column has the labels.
  monkeypatch.setattr(few_shot_testing, 'validate', lambda *_: broken)
  assert few_shot_testing.temperature('meta_sgd', None, config, setup) == 1
  out = capsys.readouterr().out
  assert 'Meta-SGD' in out
  assert '10 of 10 predictions' in out
  assert 'temperature stays 1' in out


def test_the_least_likeness_is_a_quantile_on_the_validation_tasks():
  config = classification.Config(**TINY | dict(way=3, eval_tasks=3, validate_every=1))
  with in_place_of_conv4(OneLayer):
    setup = few_shot_training.build(config)
    meta = few_shot_training._first_state('meta_sgd', 0, config, setup).meta
    one, five = few_shot_testing.least_likeness('meta_sgd', meta, config, setup)
    assert few_shot_testing.least_likeness('meta_sgd', meta, config, setup._replace(validation=None)) is None
  keys = jax.random.split(reporting.test_keys(config.eval_seed + 1)[1], (3, 3))
  for shot, expected in ((1, one), (5, five)):
    tasks, found = ms.tasks.glyphs(way=3, shot=shot, query=1), []
    for sample_key, episode_key, _ in keys:
      support, query = jax.jit(lambda s, e, tasks=tasks: tasks.episode(tasks.sample(s), e))(sample_key, episode_key)
      flat = lambda batch: np.asarray(batch.x, np.float64).reshape(len(batch.x), -1)  # What the one layer is given.
      means = np.stack([flat(support)[np.asarray(support.y) == label].mean(0) for label in range(3)])
      units = [v / np.linalg.norm(v, axis=1, keepdims=True) for v in (flat(query), means)]
      found += (units[0] @ units[1].T).max(1).tolist()
    assert expected == pytest.approx(np.quantile(found, 0.01), rel=1e-5)


def test_the_model_of_joint_training_is_its_embedding(tmp_path):
  bank = lambda seed: ms.tasks.class_bank(np.random.default_rng(seed).integers(0, 256, (4, 20, 28, 28, 1), np.uint8))
  config = classification.Config(learner=('joint',), **TINY | dict(way=3))
  with in_place_of_conv4(OneLayer):
    classification.run(config, tmp_path, few_shot_training.build(config, few_shot_data.Data(bank(0), None, bank(1))))
    model = ms.load_model(tmp_path / 'model_joint.safetensors')
    assert model.config.learner == 'prototypical'
    assert model.config.training['learner'] == 'joint'
    assert not [name for name in model.config.training if 'accuracy' in name or name in ('shot', 'query', 'meta_batch')]
    assert [leaf.shape for leaf in jax.tree.leaves(model.meta)] == [(4,), (784, 4)]


def test_joint_training_needs_classes():
  config = classification.Config(learner=('joint',))
  with pytest.raises(ValueError, match=saying('joint', 'glyphs', '--dataset=omniglot')):
    few_shot_training.build(config)


def test_validation_needs_classes():
  config = classification.Config(validate_every=5)
  bank = ms.tasks.class_bank(np.zeros((6, 20, 28, 28, 1), np.uint8))
  with pytest.raises(ValueError, match=saying('validate_every', '--validation_classes=100')):
    few_shot_training.build(config, few_shot_data.Data(bank, None, bank))


def test_a_folder_with_too_few_images_of_a_class(tmp_path):
  draw_folder(tmp_path, [f'class_{i}' for i in range(30)], images=3)
  config = classification.Config(dataset='folder', data_dir=str(tmp_path), image_size=16, way=3, query=5)
  with pytest.raises(ValueError, match=saying("'class_", 'train part', '3 images', '--shot + --query = 1 + 5')):
    few_shot_training.build(config)


def test_a_folder_with_too_few_classes(tmp_path):
  draw_folder(tmp_path, [f'class_{i}' for i in range(10)], images=3)
  config = classification.Config(dataset='folder', data_dir=str(tmp_path), image_size=16, way=3, query=1, eval_query=1)
  with pytest.raises(ValueError, match=saying('the test part has only 2 classes', '--way=3', 'add classes')):
    few_shot_training.build(config)


def test_no_folder(tmp_path):
  config = classification.Config(dataset='folder', data_dir=str(tmp_path / 'nowhere'))
  with pytest.raises(DatasetError, match='nowhere'):
    few_shot_training.build(config)


def test_names_are_all_different():
  assert len(set(NAMES.values())) == len(LEARNERS)
