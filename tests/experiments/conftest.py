"""A folder in the form of mini-ImageNet."""

import pytest
from few_shot_settings import draw_folder

from metasgd_jax.datasets import published_split


@pytest.fixture(scope='module')
def mini_imagenet(tmp_path_factory):
  directory = tmp_path_factory.mktemp('mini_imagenet')
  draw_folder(directory, [name for part in published_split('mini_imagenet') for name in part])
  return directory
