"""Drawings and photographs are told apart."""

import jax
import numpy as np
import pytest
from problems import saying
from small_models import pictures, small_model

import metasgd_jax as ms
from metasgd_jax.deploy import kinds, model_file


def photographs(count, channels=3, seed=0):
  """Smooth colours over each picture, as a scene has them: some waves of all directions."""
  rng = np.random.default_rng(seed)
  y, x = np.indices((28, 28)) / 28
  waves = rng.normal(size=(count, 5, channels))[..., None, None] * np.cos(
    2 * np.pi * (rng.uniform(-1, 1, (count, 5, 1, 1, 1)) * y + rng.uniform(-1, 1, (count, 5, 1, 1, 1)) * x)
    + rng.uniform(0, 6, (count, 5, channels, 1, 1))
  )
  scene = np.moveaxis(waves.sum(1), 1, -1)
  return np.clip(128 + 64 * scene, 0, 255).astype(np.uint8)


def drawings(count):
  tasks = ms.tasks.glyphs(way=5, shot=1, query=count // 5)
  return np.asarray(jax.jit(lambda k: tasks.episode(tasks.sample(k), k).query.x)(jax.random.key(0)))


def test_drawings_on_dark_and_on_light_paper():
  assert kinds.kind_of(drawings(20)) == kinds.kind_of(1 - drawings(20)) == 'drawings'


@pytest.mark.parametrize('channels', [1, 3])
def test_photographs_of_bytes_and_of_floats(channels):
  images = photographs(20, channels)
  assert kinds.kind_of(images) == kinds.kind_of(images / np.float32(255)) == 'photographs'
  np.testing.assert_allclose(kinds.share_of_paper(images), kinds.share_of_paper(images / 255), atol=0.01)


def test_the_share_of_paper_of_pictures_made_by_hand():
  """A quarter of the first is ink; the second is half lighter than its border by less than an eighth."""
  images = np.full((2, 16, 16, 1), 200, np.uint8)
  images[0, 4:12, 4:12] = 30
  images[1, 1:9] = 220
  np.testing.assert_allclose(kinds.share_of_paper(images), [0.75, 1])
  np.testing.assert_allclose(kinds.share_of_paper(pictures([1], 28)[..., None] // 255), [1])


@pytest.fixture
def shipped(tmp_path, monkeypatch):
  """Two models that ship in place of the real ones."""
  for name, shape in (('small', (16, 16, 1)), ('large', (32, 20, 3))):
    ms.save_model(tmp_path / f'{name}.safetensors', small_model(image_shape=shape))
  monkeypatch.setattr(model_file, '_SHIPPED', tmp_path)


@pytest.mark.parametrize(
  ('shape', 'name'),
  [((4, 16, 16), 'small'), ((4, 16, 16, 1), 'small'), ((4, 256), 'small'), ((4, 32, 20, 3), 'large')],
)
def test_a_classifier_takes_the_shipped_model_of_this_size(shape, name, shipped):
  images = np.random.default_rng(0).uniform(size=shape)
  classifier = ms.FewShotClassifier().fit(images, [0, 0, 1, 1])
  assert classifier.model_ == name
  explicit = ms.FewShotClassifier(name).fit(images, [0, 0, 1, 1])
  np.testing.assert_array_equal(classifier.decision_function(images), explicit.decision_function(images))


def test_images_that_no_shipped_model_takes(shipped):
  said = ('[n, 32, 20, 3], or flat [n, 1920] for large', '[n, 16, 16, 1], or flat [n, 256] for small', '(2, 28, 28)')
  with pytest.raises(ValueError, match=saying(*said, 'give another `model`')):
    ms.FewShotClassifier().fit(np.zeros((2, 28, 28)), [0, 1])
  with pytest.raises(ValueError, match='different shapes'):
    ms.FewShotClassifier().fit([np.zeros((28, 28)), np.zeros((27, 28))], [0, 1])


@pytest.mark.parametrize(
  ('training', 'kind'),
  [
    ({'dataset': 'omniglot'}, 'drawings'),
    ({'dataset': 'mini_imagenet'}, 'photographs'),
    ({'dataset': 'folder'}, None),
    ({'dataset': ['omniglot']}, None),
    ({}, None),
  ],
)
def test_a_model_is_of_the_kind_of_its_data(training, kind):
  assert kinds.kind_of_model(small_model(training=training).config) == kind
