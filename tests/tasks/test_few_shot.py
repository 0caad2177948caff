import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import episodes, random_bank, saying

from metasgd_jax.tasks import ClassBank, all_classes, class_bank, few_shot, glyphs, rotate_classes

WAY, SHOT, QUERY = 4, 2, 3


def numbered_bank(classes=7, instances=6):
  """Drawing i of class c is an image all of whose pixels are c·instances + i."""
  images = np.zeros((classes, instances, 4, 4, 1), np.uint8)
  images += np.arange(classes * instances, dtype=np.uint8).reshape(classes, instances, 1, 1, 1)
  return class_bank(images)


def drawn(batch):
  """Which drawing each item is, from `numbered_bank`'s pixels."""
  return np.rint(np.asarray(batch.x)[..., 0, 0, 0] * 255).astype(int)


@pytest.fixture(scope='module')
def many():
  return episodes(few_shot(numbered_bank(), way=WAY, shot=SHOT, query=QUERY), 400)


def test_shapes_and_range(many):
  assert many.support.x.shape == (400, WAY * SHOT, 4, 4, 1)
  assert many.query.x.shape == (400, WAY * QUERY, 4, 4, 1)
  assert many.support.x.dtype == jnp.float32
  assert many.query.y.dtype == jnp.int32
  bright = few_shot(class_bank(np.full((3, 3, 2, 2, 1), 255, np.uint8)), way=2, shot=1, query=1)
  assert float(jnp.max(episodes(bright, 1).support.x)) == 1.0


def test_no_drawing_is_used_twice(many):
  for support, query in zip(drawn(many.support), drawn(many.query), strict=True):
    assert len({*support, *query}) == WAY * (SHOT + QUERY)


def test_each_class_has_its_shots_and_one_label(many):
  for i in range(50):
    of_label = collections.defaultdict(set)
    for part, count in ((many.support, SHOT), (many.query, QUERY)):
      labels = np.asarray(part.y[i])
      assert np.array_equal(np.bincount(labels), [count] * WAY)
      for label, item in zip(labels, drawn(part)[i], strict=True):
        of_label[label].add(item // 6)
    assert all(len(classes) == 1 for classes in of_label.values())
    assert len(set.union(*of_label.values())) == WAY


def test_labels_tell_nothing_of_the_class(many):
  """Classes with fixed or sorted labels could be learned by heart, without adapting at all."""
  counts = np.zeros((7, WAY))
  for classes, labels in zip(drawn(many.query) // 6, np.asarray(many.query.y), strict=True):
    np.add.at(counts, (classes, labels), 1 / QUERY)
  assert counts.min() > 0.55 * counts.mean()


def test_order_tells_nothing_of_the_label(many):
  """With batch norm, and with learners that read in sequence, items in the labels' order would leak them."""
  for part in (many.support, many.query):
    labels = np.asarray(part.y)
    shares = np.stack([(labels == label).mean(0) for label in range(WAY)])
    assert np.abs(shares - 1 / WAY).max() < 0.1


def test_every_drawing_is_as_likely(many):
  counts = np.bincount(np.concatenate([drawn(many.support).ravel(), drawn(many.query).ravel()]), minlength=42)
  assert counts.min() > 0.6 * counts.mean()


def test_an_episode_is_a_function_of_its_keys():
  tasks = few_shot(random_bank(), way=3, shot=1, query=1)
  episode = jax.jit(lambda key: tasks.episode(tasks.sample(jax.random.key(0)), key))
  same = [episode(jax.random.key(1)) for _ in range(2)]
  other = episode(jax.random.key(2))
  assert np.array_equal(same[0].query.x, same[1].query.x)
  assert not np.array_equal(same[0].query.x, other.query.x)


def test_all_ways_and_all_drawings_can_be_asked_for():
  batch = episodes(few_shot(numbered_bank(3, 4), way=3, shot=1, query=3), 1)
  assert sorted([*drawn(batch.support)[0], *drawn(batch.query)[0]]) == list(range(12))


def test_rotations_are_classes_of_their_own():
  bank = random_bank(classes=3)
  turned, sizes = rotate_classes(bank)
  assert np.array_equal(sizes, [6] * 12)
  for r in range(4):
    for c in range(3):
      assert np.array_equal(turned[6 * (r * 3 + c) + 2, :, :, 0], np.rot90(bank.images[6 * c + 2, :, :, 0], r))


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    (dict(way=9), ('way=9', '(8)')),
    (dict(shot=4, query=3), ('shot + query', '4 + 3 = 7', '6 images of class 0', 'lower shot or query')),
    (dict(way=1), ('way', 'at least 2', 'got 1')),
    (dict(shot=0), ('shot', 'at least 1', 'got 0')),
    (dict(query=0), ('query', 'at least 1', 'got 0')),
    (dict(shot=1.5), ('shot', 'integer', 'got 1.5')),
    (dict(way=np.array(2)), ('way', 'integer', 'array(2)')),
  ],
)
def test_numbers_that_do_not_fit(options, message):
  with pytest.raises(ValueError, match=saying(*message)):
    few_shot(random_bank(), **(dict(way=5, shot=1, query=2) | options))


def test_what_is_no_bank():
  images, sizes = random_bank()
  with pytest.raises(ValueError, match=saying('[C, I, H, W, D]', '(48, 8, 8, 1)')):
    class_bank(images)
  with pytest.raises(ValueError, match=saying('uint8', 'float32')):
    few_shot(ClassBank(images.astype(np.float32), sizes), way=5, shot=1, query=2)
  with pytest.raises(ValueError, match=saying('sizes [C]', '(47, 8, 8, 1)', '(8,)', 'sum 48')):
    few_shot(ClassBank(images[1:], sizes), way=5, shot=1, query=2)
  with pytest.raises(ValueError, match=saying('ClassBank', 'ndarray', 'class_bank')):
    few_shot(images, way=5, shot=1, query=2)
  with pytest.raises(ValueError, match=saying('H, W, D', '(2, 4, 4, 1), (2, 5, 4, 1)')):
    class_bank([np.zeros((2, 4, 4, 1), np.uint8), np.zeros((2, 5, 4, 1), np.uint8)])


def test_images_that_cannot_be_turned():
  with pytest.raises(ValueError, match=saying('square', '(4, 5)')):
    rotate_classes(class_bank(np.zeros((2, 2, 4, 5, 1), np.uint8)))


class TestUnequalClasses:
  SIZES = (3, 7, 4, 12)

  def bank(self):
    """Image i of class c has the value 20·c + i throughout."""
    return class_bank(
      [
        np.full((n, 4, 4, 1), 20 * c, np.uint8) + np.arange(n, dtype=np.uint8).reshape(-1, 1, 1, 1)
        for c, n in enumerate(self.SIZES)
      ]
    )

  def test_every_image_is_as_likely_within_its_class_and_none_is_made_up(self):
    batch = episodes(few_shot(self.bank(), way=2, shot=1, query=2), 2000)
    values = np.concatenate([drawn(batch.support).ravel(), drawn(batch.query).ravel()])
    for c, n in enumerate(self.SIZES):
      counts = np.bincount(values[values // 20 == c] % 20)
      assert len(counts) == n
      assert counts.min() > 0.7 * counts.mean()
    # Classes are as likely, whatever their size.
    assert len({values[values // 20 == c].size // 200 for c in range(4)}) <= 2

  def test_no_image_is_used_twice(self):
    batch = episodes(few_shot(self.bank(), way=4, shot=1, query=2), 100)
    for support, query in zip(drawn(batch.support), drawn(batch.query), strict=True):
      assert len({*support, *query}) == 12

  def test_the_smallest_class_is_the_limit(self):
    with pytest.raises(ValueError, match=saying('2 + 2 = 4', '3 images of class 0', 'lower shot', 'omit')):
      few_shot(self.bank(), way=2, shot=2, query=2)

  def test_rotations_keep_the_sizes(self):
    turned = rotate_classes(self.bank())
    assert np.array_equal(turned.sizes, np.tile(self.SIZES, 4))
    assert turned.images.shape == (4 * sum(self.SIZES), 4, 4, 1)

  def test_all_classes_are_labelled_by_their_place(self):
    batch = episodes(all_classes(self.bank(), batch=300), 1)
    assert np.array_equal(batch.query.y[0], drawn(batch.query)[0] // 20)
    assert set(np.asarray(batch.query.y[0]).tolist()) == {0, 1, 2, 3}
    with pytest.raises(ValueError, match=saying('batch', 'at least 1', 'got 0')):
      all_classes(self.bank(), batch=0)
    all_classes(self.bank(), batch=1)


@pytest.fixture(scope='module')
def characters():
  return jax.device_get(episodes(glyphs(way=4, shot=2, query=4), 200))


class TestGlyphs:
  def test_shapes_and_range(self, characters):
    assert characters.support.x.shape == (200, 8, 28, 28, 1)
    assert characters.query.y.shape == (200, 16)
    assert characters.query.x.min() == 0
    assert characters.query.x.max() == 1

  def test_drawings_of_a_character_differ_but_less_than_characters_do(self, characters):
    x, y = characters.query.x[:10].reshape(10, 16, -1), characters.query.y[:10]
    distance = np.linalg.norm(x[:, :, None] - x[:, None], axis=-1)
    of_one, other = y[:, :, None] == y[:, None], ~np.eye(16, dtype=bool)
    assert distance[:, other].min() > 0.5
    assert distance[of_one & other].mean() < 0.9 * distance[~of_one].mean()

  def test_every_drawing_has_ink_and_paper(self, characters):
    ink = characters.query.x.mean((2, 3, 4))
    assert ink.min() > 0.01
    assert ink.max() < 0.5

  def test_labels_and_order(self, characters):
    for part in characters:
      shares = np.stack([(part.y == label).mean(0) for label in range(4)])
      assert np.abs(shares - 1 / 4).max() < 0.12

  def test_numbers_that_do_not_fit(self):
    with pytest.raises(ValueError, match=saying('way', 'at least 2', 'got 1')):
      glyphs(way=1, shot=1, query=1)
