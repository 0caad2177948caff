"""--evaluate tests a trained model on other data, without training."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from PIL import Image
from problems import OneLayer, in_place_of_conv4, saying
from small_models import able_model, pictures, small_model

import metasgd_jax as ms
from experiments import classification, evaluating, few_shot_data, reporting
from experiments.resuming import Keeping
from metasgd_jax import plotting
from metasgd_jax.datasets import DatasetError, image_folder, splits
from metasgd_jax.datasets.image_files import read_image
from metasgd_jax.deploy import inputs
from metasgd_jax.deploy.model_file import build_learner
from metasgd_jax.io import files
from metasgd_jax.io.checkpoint import CheckpointError

NAMES = ['rows', 'columns', 'blot']


def saved(path, seed=0, training=None, **config):
  """Writes a model of grey pictures of 28×28, which no one trained, and returns its path as text."""
  facts = {'dataset': 'glyphs', 'shot': 3} if training is None else training
  ms.save_model(path, small_model('prototypical', filters=2, seed=seed, training=facts, **config))
  return str(path)


@pytest.fixture(autouse=True)
def one_layer():
  """Nothing here depends on the network, and a single layer compiles in a fraction of the time."""
  with in_place_of_conv4(OneLayer):
    yield


@pytest.fixture
def model(tmp_path):
  return saved(tmp_path / 'model.safetensors')


def folder_of(directory, size=28, mode='L', light=False, count=5):
  """A folder with some drawings of each of three classes, which are light on dark unless `light` is true."""
  for label, name in enumerate(NAMES):
    (directory / name).mkdir(parents=True)
    for i, picture in enumerate(pictures([label] * count, size)):
      Image.fromarray(255 - picture if light else picture).convert(mode).save(directory / name / f'{i}.png')
  return directory


def settings(model, folder, **options):
  how = dict(dataset='folder', data_dir=str(folder), way=3, eval_tasks=4, eval_query=2)
  return classification.Config(evaluate=str(model), **how | options)


def test_a_model_is_tested_on_all_classes_of_a_folder_as_by_evaluate(tmp_path, model, capsys):
  config = settings(model, folder_of(tmp_path / 'images'), eval_shots=(1, 2))
  rows = evaluating.prepare(config, tmp_path / 'run')()
  about = ('test_shot', 'batch_norm', 'trained_on', 'shot', 'inner_steps', 'eval_query')
  modes = ('transductive', 'inductive')
  assert [[row[name] for name in about] for row in rows] == [
    [shot, mode, 'glyphs', 3, 0, 2] for shot in (1, 2) for mode in modes
  ]
  assert json.loads((tmp_path / 'run' / 'results.json').read_text())['rows'][0]['mean'] == rows[0]['mean']
  loaded = ms.load_model(model)
  tasks = few_shot_data.tasks(image_folder.load(config.data_dir, size=28, channels=1).bank, config.way, shot=2, query=2)
  learner, key = build_learner(loaded.config, 3, inductive=True), reporting.test_keys(0)[0]
  values = ms.evaluate(learner, loaded.meta, tasks, key, metric_fn=ms.losses.accuracy, num_tasks=4)
  np.testing.assert_allclose(np.load(tmp_path / 'run' / rows[3]['per_task_file'])[0], values.mean(1), rtol=1e-6)
  out = capsys.readouterr().out
  assert f'Prototypical Nets of {model}, folder, 3-way 1-shot' in out
  assert '4 tasks of all 3 classes of the folder' in out
  assert 'unseen' not in out
  assert 'warning' not in out


def test_the_calibration_error_is_with_the_models_temperature(tmp_path, monkeypatch):
  folder = folder_of(tmp_path / 'images')
  rows = {}
  for temperature in (1.0, 1000.0):
    path = saved(tmp_path / f'{temperature}.safetensors', temperature=temperature)
    rows[temperature] = evaluating.prepare(settings(path, folder), tmp_path / str(temperature))()[1]
  assert rows[1.0]['calibration_error'] == rows[1.0]['calibration_error_uncalibrated']
  assert rows[1000.0]['calibration_error_uncalibrated'] == rows[1.0]['calibration_error']
  expected = abs(rows[1000.0]['mean'] - 1 / 3)  # Every class has nearly the same probability.
  assert rows[1000.0]['calibration_error'] == pytest.approx(expected, abs=1e-2)


def facts(**changes):
  return {'dataset': 'omniglot', 'split': 'random', 'split_seed': 7, 'shot': 1} | changes


class TestSplit:
  """A model of Omniglot is tested on the characters that its training has not seen."""

  def loaded(self, tmp_path, monkeypatch, trained, **options):
    """The configuration with which the data are loaded."""
    model, found = saved(tmp_path / 'm', training=trained), []

    def load(config):
      found.append(config)
      raise DatasetError('enough')

    monkeypatch.setattr(few_shot_data, 'load', load)
    config = classification.Config(evaluate=model, data_dir='x', **dict(dataset='omniglot') | options)
    with pytest.raises(DatasetError, match='enough'):
      evaluating.prepare(config, tmp_path / 'run')
    return found[0]

  @pytest.mark.parametrize('given', [{}, dict(split_seed=7)])
  def test_it_is_the_models(self, given, tmp_path, monkeypatch):
    config = self.loaded(tmp_path, monkeypatch, facts(), **given)
    assert (config.split, config.split_seed) == ('random', 7)

  def test_it_is_the_models_alphabets(self, tmp_path, monkeypatch):
    assert self.loaded(tmp_path, monkeypatch, facts(split='vinyals')).split == 'vinyals'

  def test_it_is_ones_own_for_a_model_of_other_data(self, tmp_path, monkeypatch):
    config = self.loaded(tmp_path, monkeypatch, facts(dataset='mini_imagenet'), split='vinyals')
    assert (config.split, config.split_seed) == ('vinyals', 0)

  @pytest.mark.parametrize(
    ('given', 'message'),
    [
      (dict(split_seed=3), ('split_seed=7', 'got --split_seed=3', 'leave --split_seed out')),
      (dict(split='vinyals'), ('split=random', 'got --split=vinyals', 'leave --split out')),
    ],
  )
  def test_another_one_is_refused(self, given, message, tmp_path):
    model = saved(tmp_path / 'm', training=facts())
    config = classification.Config(evaluate=model, data_dir='x', dataset='omniglot', **given)
    with pytest.raises(ValueError, match=saying('trained on', *message)):
      evaluating.prepare(config, tmp_path / 'run')


@pytest.mark.parametrize(('shot', 'expected'), [(3, 3), (True, 1), ('../3', 1), (None, 1)])
def test_without_eval_shots_the_shots_are_those_of_the_training(shot, expected):
  config = evaluating.as_trained(settings('m', 'f'), small_model('prototypical', training={'shot': shot}).config)
  assert config.test_shots == (expected,)


def test_a_model_of_a_folder_may_have_seen_the_classes(tmp_path, capsys):
  model = saved(tmp_path / 'm', training={'dataset': 'folder'})
  folder = folder_of(tmp_path / 'images')
  evaluating.prepare(settings(model, folder), tmp_path / 'all')()
  assert 'warning: the model was trained on a folder of images too' in capsys.readouterr().out
  (tmp_path / 'lists').mkdir()
  (tmp_path / 'lists' / 'test.txt').write_text('rows\nblot\n')
  lists = str(tmp_path / 'lists')
  evaluating.prepare(settings(model, folder, class_lists=lists, way=2), tmp_path / 'listed')()
  out = capsys.readouterr().out
  assert f'tasks of the 2 classes in {lists}/test.txt' in out
  assert 'warning' not in out
  evaluating.prepare(settings(saved(tmp_path / 'n', training={}), folder), tmp_path / 'unknown')()
  assert 'does not say which classes' in capsys.readouterr().out


def test_results_of_another_model_of_the_same_name_are_not_reported(tmp_path, model, capsys):
  config = settings(model, folder_of(tmp_path / 'images'))
  first = evaluating.prepare(config, tmp_path / 'run')()
  assert evaluating.prepare(config, tmp_path / 'run')() == files.plain(first)
  out = capsys.readouterr().out
  assert 'finished run' in out
  assert 'trains' not in out
  saved(model, seed=1)
  with pytest.raises(CheckpointError, match=saying(model, 'has changed since', '--restart or another --workdir')):
    evaluating.prepare(config, tmp_path / 'run')()
  again = evaluating.prepare(config, tmp_path / 'run', Keeping(restart=True))()
  assert again[0]['model_sha256'] != first[0]['model_sha256']
  assert evaluating.prepare(config, tmp_path / 'run')() == files.plain(again)


def wide_folder(directory, light):
  """Drawings that are wider than high, with strokes that a crop would cut off."""
  for label, name in enumerate(NAMES):
    (directory / name).mkdir(parents=True)
    for i, picture in enumerate(pictures([label] * 3, 28)):
      wide = np.concatenate([np.zeros((28, 6), np.uint8), picture, np.zeros((28, 30), np.uint8)], 1)
      Image.fromarray(255 - wide if light else wide).save(directory / name / f'{i}.png')
  return directory


@pytest.mark.parametrize('background', ['dark', 'any'])
@pytest.mark.parametrize('light', [False, True])
def test_pictures_of_a_folder_are_prepared_as_predict_prepares_them(background, light, tmp_path):
  model = small_model('prototypical', filters=2, background=background).config
  folder = wide_folder(tmp_path / 'images', light)
  bank = few_shot_data.load_for_model(settings('m', folder, eval_query=1), model).test
  fit = 'pad' if background == 'dark' else 'crop'
  read = image_folder.load(folder, size=28, channels=1, fit=fit).bank.images
  prepared, turned = inputs.prepared(read, 'auto', model)
  assert turned.all() == (light and background == 'dark')
  np.testing.assert_allclose(bank.images / 255, prepared, atol=1e-6)


def test_light_and_dark_drawings_are_answered_alike(tmp_path):
  ms.save_model(tmp_path / 'm', able_model(training={'dataset': 'glyphs', 'shot': 1}))
  means = []
  for light in (False, True):
    config = settings(tmp_path / 'm', folder_of(tmp_path / f'images {light}', light=light), eval_query=1)
    means.append(evaluating.prepare(config, tmp_path / f'run {light}')()[1]['mean'])
  assert means[0] == means[1] > 0.9


def test_pictures_of_other_data_sets_are_prepared_too(monkeypatch):
  """Light colours of 56×56 become dark and grey, each picture by its own border, as if they were read from files."""
  colours = np.stack([pictures([0, 1, 2, 3, 4], 56)] * 3, -1)
  colours[..., 2] //= 2
  colours = np.where(np.arange(5)[:, None, None, None] < 3, 255 - colours, colours)
  bank = ms.tasks.ClassBank(colours.astype(np.uint8), np.array([2, 3]))
  monkeypatch.setattr(few_shot_data, 'load', lambda config: few_shot_data.Data(bank, None, bank))
  config = classification.Config(evaluate='m', dataset='cifar_fs', data_dir='x', way=2, eval_shots=(1,), eval_query=1)
  found = few_shot_data.load_for_model(config, small_model('prototypical').config).test.images
  assert found.shape == (5, 28, 28, 1)
  for picture, colour, is_light in zip(found, bank.images, np.arange(5) < 3, strict=True):
    grey = Image.fromarray(colour).convert('L').resize((28, 28), Image.Resampling.LANCZOS)
    expected = 255 - np.asarray(grey) if is_light else np.asarray(grey)
    np.testing.assert_array_equal(picture[..., 0], expected)
  photographs = small_model('prototypical', image_shape=(28, 28, 3), background='any').config
  kept = few_shot_data.load_for_model(config, photographs).test.images
  assert kept.shape == (5, 28, 28, 3)
  assert kept[0].mean() > 128 > kept[4].mean()
  with pytest.raises(ValueError, match='channels'):
    few_shot_data.load_for_model(config, small_model('prototypical', image_shape=(28, 28, 2)).config)


@pytest.mark.parametrize('shape', [(28, 28, 1), (20, 40, 3)])
def test_glyphs_get_the_size_and_channels_of_the_model(shape, tmp_path):
  model = small_model('prototypical', image_shape=shape)
  setup = evaluating.build(classification.Config(evaluate='m', way=2, eval_query=1), model)
  tasks, glyphs = setup.tests[1], ms.tasks.glyphs(way=2, shot=1, query=1)
  one = lambda tasks: tasks.episode(tasks.sample(jax.random.key(0)), jax.random.key(1)).support.x
  found, drawn = np.asarray(one(tasks)), np.asarray(one(glyphs))
  assert found.shape == (2, *shape)
  assert np.ptp(found, axis=-1).max() == 0
  np.testing.assert_allclose(found[..., 0].mean((1, 2)), drawn[..., 0].mean((1, 2)), rtol=0.05)
  row = np.linspace(0, 1, 28)
  ramp = evaluating._resize(None, np.tile(row[:, None, None], (1, 28, 1)).astype(np.float32), shape=(28, 20, 1))
  np.testing.assert_allclose(ramp[..., 0], np.tile(row[:, None], (1, 20)), atol=1e-6)


@pytest.mark.parametrize('background', ['dark', 'any'])
def test_the_picture_shows_what_the_model_saw(background, tmp_path, monkeypatch):
  drawn, draw = [], plotting.episode_sheet

  def episode_sheet(support, query, logits, *, negative, names):
    drawn.append((support, negative, names))
    return draw(support, query, logits, negative=negative, names=names)

  monkeypatch.setattr(plotting, 'episode_sheet', episode_sheet)
  model = saved(tmp_path / 'm', background=background)
  folder = folder_of(tmp_path / 'images', light=True)
  evaluating.prepare(settings(model, folder, eval_shots=(1,)), tmp_path / 'run')()
  [(support, negative, names)] = drawn
  assert (support.x[:, 0].mean() < 0.5, negative) == (background == 'dark', background == 'dark')
  assert (tmp_path / 'run' / 'task_prototypical.png').read_bytes().startswith(b'\x89PNG')
  for x, y in zip(np.asarray(support.x), support.y.tolist(), strict=True):
    found = [read_image(path, size=28, channels=1) / 255 for path in (folder / names[y]).iterdir()]
    seen = 1 - x if background == 'dark' else x
    assert min(np.abs(seen - image).max() for image in found) < 1e-3


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    (dict(meta_iterations=7), ('evaluate tests a model without training', '--meta_iterations=7', 'leave one')),
    (dict(learner=('maml',)), ('--learner=maml', 'leave one')),
    (dict(validation_classes=7, dataset='omniglot', data_dir='x'), ('--validation_classes=7', 'leave one')),
    (dict(table2=True, dataset='omniglot', data_dir='x'), ('--table2', 'leave one')),
    (dict(dataset='folder', data_dir='x', image_size=28), ('size and channels of the model', '--image_size=28')),
    (dict(dataset='folder', data_dir='x', channels=1), ('size and channels of the model', '--channels=1')),
    (dict(dataset='folder', data_dir='x', split_seed=1), ('all classes of a folder', '--split_seed=1')),
    (dict(data_dir='x'), ('data_dir works only with', 'dataset=glyphs', 'leave data_dir out')),
  ],
)
def test_settings_without_effect_are_refused(options, message):
  with pytest.raises(ValueError, match=saying(*message)):
    classification.Config(evaluate='omniglot', **options)


def test_more_classes_than_the_model_serves_are_refused(model):
  config = classification.Config(evaluate=model, way=6)
  with pytest.raises(ValueError, match=saying('serves 2 to 5 classes', 'got way=6', 'lower --way')):
    evaluating.build(config, ms.load_model(model))


@pytest.mark.parametrize(
  ('options', 'listed', 'message'),
  [
    (dict(way=5), None, ('data_dir=', 'has only 3 classes, but --way=5')),
    (dict(eval_query=9), None, ("class 'blot'", 'only 5 images', '--eval_shots + --eval_query = 1 + 9')),
    (dict(way=3), 'rows\nblot\n', ('test.txt has only 2 classes, but --way=3',)),
    (dict(way=2), '# none yet\n', ('test.txt has only 0 classes, but --way=2',)),
    (dict(way=2), 'rows\nsquares\n', ('1 class (squares)', 'not in the data')),
  ],
)
def test_a_small_folder_is_refused_before_it_is_read(options, listed, message, tmp_path, model, monkeypatch):
  folder = folder_of(tmp_path / 'images')
  if listed:
    (tmp_path / 'test.txt').write_text(listed)
    options = options | dict(class_lists=str(tmp_path))
  monkeypatch.setattr(image_folder, 'load', lambda *_, **__: pytest.fail('the images were read'))
  config = dataclasses.replace(settings(model, folder, eval_shots=(1,)), **options)
  with pytest.raises(ValueError, match=saying(*message)):
    evaluating.build(config, ms.load_model(model))


def test_images_that_cannot_be_read_do_not_count(tmp_path, model):
  folder = folder_of(tmp_path / 'images')
  for i in range(3):
    (folder / 'columns' / f'{i}.png').write_bytes(b'broken')
  with pytest.raises(ValueError, match=saying("class 'columns'", 'only 2 images', '--eval_query')):
    evaluating.build(settings(model, folder), ms.load_model(model))


def test_a_test_part_that_is_too_small_is_refused(model, monkeypatch):
  bank = ms.tasks.class_bank(np.zeros((6, 20, 28, 28, 1), np.uint8))
  monkeypatch.setattr(few_shot_data, 'load_archived', lambda config: splits.Splits(bank, bank, bank))
  config = classification.Config(evaluate=model, dataset='omniglot', data_dir='x', eval_shots=(10,))
  with pytest.raises(ValueError, match=saying('the test part of omniglot', '--eval_shots + --eval_query = 10 + 15')):
    evaluating.build(config, ms.load_model(model))
