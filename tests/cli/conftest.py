"""A model and folders of pictures for the command."""

import pytest
from picture_folders import SHAPES, SHOWN, save
from small_models import able_model

import metasgd_jax as ms


@pytest.fixture(scope='module')
def model_file(tmp_path_factory):
  path = tmp_path_factory.mktemp('model') / 'able.safetensors'
  model = able_model()
  ms.save_model(path, model._replace(config=model.config))
  return path


@pytest.fixture
def folders(tmp_path, model_file):
  """A folder that nobody prepared: names, kinds, sizes and counts as they come, and a broken file."""
  for name, count in SHOWN.items():
    for i in range(count):
      ending, mode = (('.png', 'L'), ('.JPG', 'RGB'), ('.png', 'RGBA'))[i % 3]
      save(tmp_path / 'support' / name / f'{i}{ending}', name, seed=i, size=28 + 9 * i, mode=mode)
  (tmp_path / 'support' / 'frame' / 'broken.png').write_bytes(b'\x89PNG\r\n\x1a\nnot much')
  (tmp_path / 'support' / 'notes.txt').write_text('of the day')
  for i, name in enumerate(SHAPES):
    save(tmp_path / 'query' / name / 'one, two.png', name, seed=10 + i, size=40)
  save(tmp_path / 'query' / 'unsorted' / 'deep' / 'größe $x$.jpg', 'rows', seed=20)
  save(tmp_path / 'query' / '0.png', 'blot', seed=21)
  return tmp_path
