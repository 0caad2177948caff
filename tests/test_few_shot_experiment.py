"""Few-shot classification from configurations: every learner, the tables, their cells on disk, folders of images."""

import dataclasses
import json
import os

import jax
import numpy as np
import pytest
from PIL import Image
from problems import assert_trees_close, episodes, table_row

import metasgd_jax as ms
from experiments import classification, few_shot_data, few_shot_learners, few_shot_table, few_shot_training
from experiments.few_shot_learners import LEARNERS, NAMES, SEQUENTIAL
from experiments.reporting import TrainingError
from metasgd_jax.datasets import DatasetError, published_split

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


@pytest.mark.parametrize('name', LEARNERS)
def test_every_learner_can_be_trained_and_tested(name):
  """Traced, not compiled: shapes fit, a key is there where one is needed, and every answer is one of N."""
  config = classification.Config(learner=(name,), way=3, shot=1, query=2, filters=4)
  bank = ms.tasks.class_bank(np.random.default_rng(0).integers(0, 256, (6, 20, 28, 28, 1), np.uint8))
  setup = few_shot_training.build(config, few_shot_data.Data(bank, None, bank))
  learner, tasks = setup.learners[name], setup.train[name]
  state = jax.eval_shape(
    lambda key: ms.init(key, tasks, learner=learner, optimizer=setup.optimizers[name]), jax.random.key(0)
  )
  step = lambda state: ms.train_step(
    state, tasks, learner=learner, optimizer=setup.optimizers[name], meta_batch=2, mapping='scan'
  )
  after, info = jax.eval_shape(step, state)
  assert jax.tree.structure(after.meta) == jax.tree.structure(state.meta)
  assert 'accuracy' in info
  one = jax.tree.map(lambda a: a[0], episodes(setup.tests[1], 1))
  for inductive in (False, True):
    tester = setup.testers[name, inductive]
    answers = jax.eval_shape(
      lambda meta, tester=tester: tester.predict(tester.adapt(meta, one.support, jax.random.key(0)), one.query.x),
      state.meta,
    )
    assert answers.shape == (45, 3)


def test_each_learner_is_another():
  """A name that built its neighbour's learner would go unseen in a table."""
  config = classification.Config(way=3)
  build = lambda name, **options: few_shot_learners.build_learner(name, config, **options)
  one = jax.tree.map(lambda a: a[0], episodes(ms.tasks.glyphs(way=3, shot=1, query=1), 1))
  meta = build('maml').init(jax.random.key(0), one)

  def adapted(name, **options):
    return build(name, **options).adapt(meta, one.support, None)

  moved = lambda tree: jax.tree.map(lambda a, b: bool(np.any(a != b)), tree, meta.theta)
  assert not any(jax.tree.leaves({k: v for k, v in moved(adapted('anil')).items() if k != 'Dense_1'}))
  assert all(jax.tree.leaves(moved(adapted('anil'))['Dense_1']))
  assert any(jax.tree.leaves(moved(adapted('maml'))['ConvBlock_0']))
  path = lambda name, **options: jax.tree.leaves(build(name, **options).path(meta, one.support, None))[0].shape[0]
  assert [path('maml'), path('maml_5'), path('maml_5', test=True)] == [2, 6, 11]
  first_order, second = (
    jax.grad(lambda m, name=name: build(name).loss(m, one, None)[0])(meta) for name in ('fomaml', 'maml')
  )
  assert np.any(np.abs(first_order.theta['Dense_1']['kernel'] - second.theta['Dense_1']['kernel']) > 1e-6)
  rates = {name: build(name).init(jax.random.key(0), one).alpha for name in ('meta_sgd', 'layer_rates')}
  assert {leaf.size for leaf in jax.tree.leaves(rates['layer_rates'])} == {1}
  assert sum(leaf.size for leaf in jax.tree.leaves(rates['meta_sgd'])) > 100_000
  fce, bare = (build(name).init(jax.random.key(0), one) for name in ('matching_fce', 'matching'))
  assert bare.support_context is None
  assert fce.support_context is not None
  cells = [build(name).init(jax.random.key(0), one) for name in SEQUENTIAL]
  assert ['gates' in cell for cell in cells] == [True, False]


@pytest.fixture(scope='module')
def table(mini_imagenet, tmp_path_factory):
  """Table 3 of made-up images, end to end, two learners."""
  workdir = tmp_path_factory.mktemp('table')
  config = classification.Config(
    learner=('prototypical', 'joint'), table3=True, dataset='mini_imagenet', data_dir=str(mini_imagenet),
    image_size=16, **TINY,
  )  # fmt: skip
  few_shot_table.prepare(config, workdir, few_shot_training.build, classification.run)()
  return config, workdir


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
    assert caplog.text.count('is there already') == 7
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


def test_any_folder_of_images(tmp_path, mini_imagenet):
  config = classification.Config(
    learner=('prototypical',), dataset='folder', data_dir=str(mini_imagenet), image_size=16, channels=1, **TINY
  )
  rows = classification.run(config, tmp_path)
  assert rows[0]['dataset'] == 'folder'
  data = few_shot_data.load(config)
  assert [len(bank.sizes) for bank in data] == [64, 16, 20]
  assert data.test.images.shape == (160, 16, 16, 1)


def test_the_best_checkpoints_answer_together(tmp_path, mini_imagenet):
  options = TINY | dict(meta_iterations=40)
  config = classification.Config(
    dataset='folder', data_dir=str(mini_imagenet), image_size=16, validate_every=2, ensemble=3, **options
  )
  rows = classification.run(config, tmp_path)
  assert rows[0]['ensemble'] == 3
  lines = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
  found = {line['step']: line['validation_accuracy'] for line in lines if 'validation_accuracy' in line}
  assert len(found) == 20
  assert list(found) == list(range(2, 41, 2))


def test_checkpoints_are_kept_by_their_accuracy():
  accuracies = iter([0.5, 0.9, 0.7, 0.8, 0.6])
  best = few_shot_training.Best(lambda meta: next(accuracies), every=10, keep=3, writer=lambda step, accuracy: None)
  for step in range(5, 51, 5):
    state = ms.TrainState(np.int32(step), None, {'w': np.float32(step)}, None)
    best(ms.Progress(state, step, 50, {}, 1.0, 1.0))
  assert [(a, step, float(meta['w'])) for a, step, meta in best.found] == [(0.9, 20, 20), (0.8, 40, 40), (0.7, 30, 30)]


def test_images_stay_on_the_host_where_asked():
  bank = ms.tasks.class_bank(np.zeros((6, 20, 28, 28, 1), np.uint8))
  data = few_shot_data.Data(bank, None, bank)
  for stream, kind in (('yes', ms.TaskStream), ('no', ms.TaskDistribution), ('auto', ms.TaskDistribution)):
    config = classification.Config(learner=('meta_sgd', 'joint', 'mann'), stream=stream, way=3)
    setup = few_shot_training.build(config, data)
    for tasks in (*setup.train.values(), *setup.tests.values()):
      assert isinstance(tasks, kind)
  assert not few_shot_data.streamed(bank, 'auto')
  assert not few_shot_data.streamed(bank, 'no')


@pytest.mark.parametrize(
  ('values', 'message'),
  [
    (dict(table2=True, table3=True), 'table2 and table3 are two commands; give one'),
    (dict(dataset='mini_imagenet'), 'dataset mini_imagenet needs data_dir'),
    (dict(ensemble=3), 'ensemble=3 is of checkpoints that validate_every makes; give --validate_every=N'),
    (dict(channels=2), 'channels must be 1 or 3, got 2'),
    (dict(eval_shots=(0,)), r'eval_shots must be whole numbers of at least 1, got \(0,\)'),
    (dict(eval_shots=(1, 1)), 'eval_shots must be some of numbers, each once'),
    (dict(multi_step_loss=True), 'multi_step_loss is for several inner steps, got inner_steps=1; give at least 2'),
    (dict(alpha_by_step=True), 'alpha_by_step is for several inner steps, got inner_steps=1; give at least 2'),
    (dict(ensemble=3, validate_every=200), 'ensemble=3 is more than the 2 validations of 500 meta-iterations'),
    (dict(table2=True, dataset='glyphs'), 'a table is of real images, got dataset=glyphs'),
    (dict(class_lists='lists'), 'class_lists is for dataset folder, got dataset=glyphs'),
  ],
)
def test_settings_that_do_not_go_together(values, message):
  with pytest.raises(ValueError, match=message):
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
  with pytest.raises(TrainingError, match='1 of 4 cells are missing: cell 1 of 4: MAML, 5-way, trained on 1 shot'):
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
  [
    '', '{"rows"', '[]', '{}', '{"rows": []}', '{"rows": [1]}', '[' * 100_000, '\xff',
    json.dumps({'rows': [table_row(learner='nobody')]}), json.dumps({'rows': [table_row(mean='1')]}),
    json.dumps({'rows': [table_row(seeds=True)]}), json.dumps({'rows': [table_row(mean=10**400)]}),
    json.dumps({'rows': [table_row(batch_norm='\ud800')]}),
  ],
)  # fmt: skip
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
  assert f'{broken}/results.json is no results of a cell and not in the table' in capsys.readouterr().out
  assert len(json.loads((tmp_path / 'table_omniglot.json').read_text())['rows']) == 1


def test_a_pipe_for_a_cell_is_not_waited_for(tmp_path, capsys):
  config = classification.Config(learner=('lstm',), table2=True, data_dir='somewhere')
  cell = few_shot_table.cells(config)[0]
  directory = tmp_path / 'cells' / 'omniglot_lstm_5way_1shot'
  directory.mkdir(parents=True)
  os.mkfifo(directory / 'config.json')
  assert not few_shot_table._done(cell, directory)
  os.mkfifo(directory / 'results.json')
  assert few_shot_table.rows_of(tmp_path, 'omniglot') == []
  assert 'is no results of a cell and not in the table (it is not a file)' in capsys.readouterr().out


def test_a_sequence_has_ten_images_of_a_class():
  config = classification.Config(learner=('mann',), shot=10)
  with pytest.raises(ValueError, match='learner mann reads 10 images of a class, got shot=10; give a lower shot'):
    few_shot_training.build(config)


@pytest.mark.parametrize('name', ['random', 'lstm'])
def test_an_ensemble_of_what_is_not_trained_and_of_what_reads_sequences(name, tmp_path, mini_imagenet):
  config = classification.Config(
    learner=(name,), dataset='folder', data_dir=str(mini_imagenet), image_size=16, validate_every=1, ensemble=2,
    **TINY | dict(meta_iterations=2),
  )  # fmt: skip
  if name == 'lstm':
    draw_folder(tmp_path / 'images', [f'class_{i:02d}' for i in range(30)], images=11)
    config = dataclasses.replace(config, data_dir=str(tmp_path / 'images'))
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
  options = TINY | dict(way=3)
  rows = classification.run(classification.Config(**options), tmp_path / 'first')
  path = str(tmp_path / 'first' / 'model_meta_sgd.safetensors')
  config = classification.Config(start=path, learning_rate=1e-12, eval_seed=0, **options)
  again = classification.run(config, tmp_path / 'second')
  np.testing.assert_allclose(again[0]['mean_by_step'], rows[0]['mean_by_step'], atol=1e-6)
  models = [ms.load_model(tmp_path / run / 'model_meta_sgd.safetensors').meta for run in ('first', 'second')]
  assert_trees_close(*models, atol=1e-6)
  for other in (dict(filters=4), dict(way=4), dict(learner=('maml',))):
    with pytest.raises(ValueError, match=r'is a model of \(learner, way, filters, hidden\) = .* make them the same'):
      few_shot_training.build(classification.Config(start=path, **options | other))
  with pytest.raises(ValueError, match='start is a model of meta_sgd or maml, got learner=lstm; leave it out'):
    classification.Config(start=path, learner=('lstm',))


def test_joint_training_needs_classes():
  config = classification.Config(learner=('joint',))
  with pytest.raises(ValueError, match='learner joint needs a data set with classes to train on; glyphs have none'):
    few_shot_training.build(config)


def test_validation_needs_classes():
  config = classification.Config(validate_every=5)
  bank = ms.tasks.class_bank(np.zeros((6, 20, 28, 28, 1), np.uint8))
  with pytest.raises(ValueError, match='validate_every needs classes to validate on; give --validation_classes=100'):
    few_shot_training.build(config, few_shot_data.Data(bank, None, bank))


def test_a_folder_with_too_few_images_of_a_class(tmp_path):
  draw_folder(tmp_path, [f'class_{i}' for i in range(30)], images=3)
  config = classification.Config(dataset='folder', data_dir=str(tmp_path), image_size=16, way=3, query=5)
  with pytest.raises(
    ValueError, match=r"class 'class_\d+' of the train part has 3 images where shot \+ query = 1 \+ 5"
  ):
    few_shot_training.build(config)


def test_a_folder_with_too_few_classes(tmp_path):
  draw_folder(tmp_path, [f'class_{i}' for i in range(10)], images=3)
  config = classification.Config(dataset='folder', data_dir=str(tmp_path), image_size=16, way=3, query=1, eval_query=1)
  with pytest.raises(ValueError, match=r'way=3 asks for more classes than there are in the test part \(2\)'):
    few_shot_training.build(config)


def test_no_folder(tmp_path):
  config = classification.Config(dataset='folder', data_dir=str(tmp_path / 'nowhere'))
  with pytest.raises(DatasetError, match='nowhere'):
    few_shot_training.build(config)


def test_names_are_all_different():
  assert len(set(NAMES.values())) == len(LEARNERS)
