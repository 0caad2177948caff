"""Few-shot classification on folders of images."""

import dataclasses
import json

import pytest
from few_shot_settings import TINY, draw_folder
from problems import OneLayer, in_place_of_conv4, saying

from experiments import (
  classification,
  few_shot_data,
  few_shot_table,
  few_shot_training,
  jobs,
  reporting,
  trainings,
)
from experiments.resuming import Keeping
from metasgd_jax.datasets import DatasetError


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
  assert [len(bank.sizes) for bank in data[:3]] == [64, 16, 20]
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


def test_a_folder_is_split_by_lists(tmp_path):
  draw_folder(tmp_path / 'images', ['a', 'b', 'c', 'd', 'e', 'f'])
  lists = tmp_path / 'lists'
  lists.mkdir()
  for part, names in dict(train='f\na\n', validation='b\n', test='# to test on\ne\nd\n').items():
    (lists / f'{part}.txt').write_text(names)
  config = classification.Config(
    dataset='folder', data_dir=str(tmp_path / 'images'), image_size=16, class_lists=str(lists), way=2, eval_query=5
  )
  data = few_shot_data.load(config)
  assert [len(bank.sizes) for bank in data[:3]] == [2, 1, 2]
  assert data.test_names == ('e', 'd')


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
