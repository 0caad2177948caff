"""--evaluate tests a trained model on other data, without training."""

import json

import jax
import numpy as np
import pytest
from PIL import Image
from problems import saying
from small_models import pictures, small_model

import metasgd_jax as ms
from experiments import classification, evaluating, few_shot_data, reporting
from metasgd_jax.deploy.model_file import build_learner


@pytest.fixture
def model(tmp_path):
  """The path of a model of grey pictures of 28×28, which no one trained."""
  path = tmp_path / 'model.safetensors'
  ms.save_model(path, small_model('prototypical', filters=2, training={'dataset': 'glyphs', 'shot': 1}))
  return path


def folder_of(directory, size, mode):
  for label, name in enumerate(['rows', 'columns', 'blot']):
    (directory / name).mkdir(parents=True)
    for i, picture in enumerate(pictures([label] * 4, size)):
      Image.fromarray(picture).convert(mode).save(directory / name / f'{i}.png')
  return directory


def test_a_model_is_tested_on_all_classes_of_a_folder_as_by_evaluate(tmp_path, model, capsys):
  folder = folder_of(tmp_path / 'images', 28, 'L')
  how = dict(dataset='folder', data_dir=str(folder), image_size=28, channels=1, way=3, eval_shots=(1, 2))
  config = classification.Config(evaluate=str(model), eval_tasks=4, eval_query=2, **how)
  loaded = ms.load_model(model)
  rows = evaluating.run(config, tmp_path / 'run', loaded, evaluating.build(config, loaded))
  found = [(row['test_shot'], row['batch_norm'], row['trained_on'], row['trained_shot']) for row in rows]
  modes = ('transductive', 'inductive')
  assert found == [(shot, mode, 'glyphs', 1) for shot in (1, 2) for mode in modes]
  assert json.loads((tmp_path / 'run' / 'results.json').read_text())['rows'][0]['mean'] == rows[0]['mean']
  tasks = few_shot_data.tasks(few_shot_data.load_images(config).bank, config, shot=2, query=2)
  learner, key = build_learner(loaded.config, 3, inductive=True), reporting.test_keys(0)[0]
  values = ms.evaluate(learner, loaded.meta, tasks, key, metric_fn=ms.losses.accuracy, num_tasks=4)
  np.testing.assert_allclose(np.load(tmp_path / 'run' / rows[3]['per_task_file'])[0], values.mean(1), rtol=1e-6)
  assert 'Prototypical Nets of' in capsys.readouterr().out


def test_colours_of_another_size_become_grey_pictures_of_the_models_size(tmp_path, model):
  folder = folder_of(tmp_path / 'images', 56, 'RGB')
  how = dict(dataset='folder', data_dir=str(folder), image_size=56, way=2, eval_query=1)
  setup = evaluating.build(classification.Config(evaluate=str(model), **how), ms.load_model(model))
  episode = setup.tests[1].episode(setup.tests[1].sample(jax.random.key(0)), jax.random.key(1))
  assert episode.support.x.shape == (2, 28, 28, 1)
  colours = jax.random.uniform(jax.random.key(0), (4, 6, 3))
  red = np.zeros((2, 2, 3), np.float32) + np.array([1, 0, 0], np.float32)
  grey = evaluating._resize(None, red, shape=(2, 2, 1))
  np.testing.assert_allclose(grey, 0.299, rtol=1e-6)
  np.testing.assert_allclose(evaluating._resize(None, grey, shape=(4, 4, 3)), 0.299, rtol=1e-6)
  once = evaluating._resize(None, colours, shape=(2, 3, 3))
  np.testing.assert_allclose(np.mean(once), np.mean(colours), atol=0.05)


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    (dict(meta_iterations=7), ('evaluate tests a model without training', '--meta_iterations=7', 'leave one')),
    (dict(learner=('maml',)), ('--learner=maml', 'leave one')),
    (dict(table2=True, dataset='omniglot', data_dir='x'), ('--table2', 'leave one')),
  ],
)
def test_settings_of_a_training_are_refused(settings, message):
  with pytest.raises(ValueError, match=saying(*message)):
    classification.Config(evaluate='omniglot', **settings)


def test_more_classes_than_the_model_serves_are_refused(model):
  config = classification.Config(evaluate=str(model), way=6)
  with pytest.raises(ValueError, match=saying('serves 2 to 5 classes', 'got way=6', 'lower --way')):
    evaluating.build(config, ms.load_model(model))
