"""mini-ImageNet in each layout that it comes in; the images are made up, each of a colour of its own."""

import functools
import io
import json
import re

import numpy as np
import pytest
from PIL import Image
from problems import saying

from metasgd_jax.datasets import DatasetError, image_cache, mini_imagenet, published_split

LISTS = published_split('mini_imagenet')
CLASSES = [name for part in LISTS for name in part]
PER_CLASS = 3
PARTS = dict(zip(LISTS._fields, ('train', 'val', 'test'), strict=True))


def colour(name, i):
  return (2 * CLASSES.index(name), 40 * i, 7)


def expected(part):
  return [colour(name, i) for name in getattr(LISTS, part) for i in range(PER_CLASS)]


@functools.cache
def png(name, i):
  file = io.BytesIO()
  Image.new('RGB', (5, 4), colour(name, i)).save(file, 'PNG')
  return file.getvalue()


def write(path, name, i):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(png(name, i))  # Exact whatever the suffix; decoders look inside.


def files():
  """Yields (part, class, number, file name)."""
  for part, names in LISTS._asdict().items():
    for name in names:
      for i in range(PER_CLASS):
        yield part, name, i, f'{name}_{i:08d}.jpg'


def classes_at_the_top(directory):
  for _, name, i, file in files():
    write(directory / name / file, name, i)


def classes_in_split_folders(directory, parts=PARTS):
  for part, name, i, file in files():
    write(directory / parts[part] / name / file, name, i)


def base_and_novel(directory):
  classes_in_split_folders(directory, dict(train='base', validation='validation', test='novel'))


def one_more_folder_around_split_folders(directory):
  classes_in_split_folders(directory / 'mini-imagenet')


def flat_by_name(directory):
  for _, name, i, file in files():
    write(directory / file, name, i)


def flat_in_images(directory):
  for _, name, i, file in files():
    write(directory / 'images' / file.replace('_', ''), name, i)


def write_lists(directory, file_of=lambda name, i: f'{name}{i:08d}.jpg'):
  for part, stem in PARTS.items():
    rows = [f'{file_of(name, i)},{name}' for p, name, i, _ in files() if p == part]
    (directory / f'{stem}.csv').write_text('\n'.join(['filename,label', *reversed(rows)]) + '\n')


def lists_beside_images(directory):
  flat_in_images(directory)
  write_lists(directory)


def lists_among_images_of_any_name(directory):
  for _, name, i, _ in files():
    write(directory / f'image {CLASSES.index(name)} {i}.jpg', name, i)
  write_lists(directory, lambda name, i: f'image {CLASSES.index(name)} {i}.jpg')


LAYOUTS = [
  classes_at_the_top,
  classes_in_split_folders,
  base_and_novel,
  one_more_folder_around_split_folders,
  flat_by_name,
  flat_in_images,
  lists_beside_images,
  lists_among_images_of_any_name,
]


@pytest.fixture(scope='module')
def tree(tmp_path_factory):
  """A folder per class, for tests that do not change it."""
  directory = tmp_path_factory.mktemp('mini')
  classes_at_the_top(directory)
  return directory


def assert_whole(splits):
  for part, bank in splits._asdict().items():
    assert bank.images.shape == (PER_CLASS * len(bank.sizes), 4, 4, 3)
    assert bank.images.dtype == np.uint8
    assert bank.sizes.tolist() == [PER_CLASS] * len(getattr(LISTS, part))
    assert [tuple(pixel) for pixel in bank.images[:, 2, 1].tolist()] == expected(part)


@pytest.mark.parametrize('layout', LAYOUTS, ids=lambda layout: layout.__name__)
def test_layouts(layout, tmp_path):
  layout(tmp_path)
  lines = []
  assert_whole(mini_imagenet.load(tmp_path, size=4, report=lines.append))
  lines = [line for line in lines if 'uniform' not in line]
  assert len(lines) == 2
  assert re.match(saying('reading 300 images', 'mini-ImageNet', tmp_path), lines[0])
  assert re.match(saying('100 of 100 classes', 'than 600 images', '3 to 3'), lines[1])


def test_size_is_84_unless_asked_otherwise(tree):
  assert mini_imagenet.load(tree).test.images.shape == (60, 84, 84, 3)
  assert mini_imagenet.load(tree, size=(3, 6)).test.images.shape == (60, 3, 6, 3)


def test_600_images_of_each_class_need_no_word(tree, monkeypatch):
  monkeypatch.setattr(mini_imagenet, 'IMAGES_OF_A_CLASS', PER_CLASS)
  lines = []
  mini_imagenet.load(tree, size=4, report=lines.append)
  assert len([line for line in lines if 'uniform' not in line]) == 1


def test_unequal_classes_and_classes_of_others(tmp_path):
  classes_at_the_top(tmp_path)
  (tmp_path / CLASSES[1] / f'{CLASSES[1]}_00000001.jpg').unlink()
  (tmp_path / CLASSES[64] / f'{CLASSES[64]}_00000002.jpg').write_bytes(b'')
  write(tmp_path / 'n00000001' / 'a.jpg', CLASSES[0], 0)
  lines = []
  splits = mini_imagenet.load(tmp_path, size=4, report=lines.append)
  assert splits.train.sizes.tolist() == [3, 2] + [3] * 62
  assert splits.train.images[3:5, 0, 0].tolist() == [list(colour(CLASSES[1], i)) for i in (0, 2)]
  assert splits.validation.sizes.tolist() == [2] + [3] * 15
  for parts in (
    ('left out 1 class (n00000001)', 'mini-ImageNet'),
    ('100 of 100 classes', 'than 600 images', '2 to 3'),
    ('skipped', f'{CLASSES[64]}_00000002.jpg', 'empty'),
  ):
    assert [line for line in lines if re.match(saying(*parts), line)], parts


def test_another_split_is_dealt_out_as_published(tmp_path):
  classes_in_split_folders(tmp_path)
  for name in LISTS.test[:2]:
    (tmp_path / 'test' / name).rename(tmp_path / 'train' / name)
  assert_whole(mini_imagenet.load(tmp_path, size=4))


def test_a_file_listed_twice_with_one_label_counts_once(tmp_path):
  lists_beside_images(tmp_path)
  name = LISTS.train[0]
  for stem in ('train', 'test'):
    with (tmp_path / f'{stem}.csv').open('a') as file:
      file.write(f'{name}{0:08d}.jpg,{name}\n')
  assert_whole(mini_imagenet.load(tmp_path, size=4))


class TestErrors:
  def load(self, directory, **options):
    return mini_imagenet.load(directory, size=4, **options)

  def test_no_directory(self, tmp_path):
    with pytest.raises(DatasetError, match='nowhere does not exist'):
      self.load(tmp_path / 'nowhere')

  def test_nothing_of_it(self, tmp_path):
    write(tmp_path / 'cat' / 'a.jpg', CLASSES[0], 0)
    with pytest.raises(DatasetError, match=saying(tmp_path, 'no class of mini-ImageNet', 'WordNet')):
      self.load(tmp_path)

  @pytest.mark.parametrize('name', ['mini-imagenet-cache-train.pkl', 'miniImageNet_category_split_val.pickle'])
  def test_pickles_are_not_opened(self, tmp_path, name):
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'touch opened'\ntR.")
    with pytest.raises(DatasetError, match=saying(f'pickles ({name})', 'not read', 'opening a pickle')):
      self.load(tmp_path)

  def test_classes_are_missing(self, tmp_path):
    flat_by_name(tmp_path)
    for path in tmp_path.glob(f'{LISTS.validation[3]}*'):
      path.unlink()
    with pytest.raises(DatasetError, match=saying(f'lacks 1 class ({LISTS.validation[3]})', 'add')):
      self.load(tmp_path)

  def test_a_class_that_cannot_be_read(self, tmp_path):
    flat_by_name(tmp_path)
    for path in tmp_path.glob(f'{LISTS.train[0]}*'):
      path.write_bytes(b'no image')
    with pytest.raises(DatasetError, match=saying(f'1 class ({LISTS.train[0]})', 'without an image')):
      self.load(tmp_path)

  def test_a_class_in_two_folders(self, tmp_path):
    classes_at_the_top(tmp_path)
    write(tmp_path / 'processed' / LISTS.train[0] / 'a.jpg', LISTS.train[0], 0)
    with pytest.raises(DatasetError, match=rf'class {LISTS.train[0]} .* in .* and in .*/processed.*keep one'):
      self.load(tmp_path)

  @pytest.mark.parametrize('other', [LISTS.test[0], 'n00000001'])
  def test_a_file_under_two_labels(self, tmp_path, other):
    lists_beside_images(tmp_path)
    name = LISTS.train[0]
    with (tmp_path / 'test.csv').open('a') as file:
      file.write(f'{name}{0:08d}.jpg,{other}\n')
    with pytest.raises(DatasetError, match=saying(f'{name}00000000.jpg', f'as {other}', f'as {name}', 'keep one')):
      self.load(tmp_path)

  @pytest.mark.parametrize('name', ['../secret.jpg', '/etc/secret.jpg', 'a/../../b.jpg', '..\\b.jpg', 'C:\\b.jpg'])
  def test_a_list_may_not_lead_outside(self, tmp_path, name):
    (tmp_path / 'data').mkdir()
    write(tmp_path / 'secret.jpg', CLASSES[0], 0)
    lists_beside_images(tmp_path / 'data')
    with (tmp_path / 'data' / 'val.csv').open('a') as file:
      file.write(f'{name},{CLASSES[64]}\n')
    with pytest.raises(DatasetError, match=saying('line 50 of', 'val.csv', repr(name), 'outside', '/data/images')):
      self.load(tmp_path / 'data')

  @pytest.mark.parametrize(
    ('content', 'parts'),
    [
      (b'', ('columns None', 'first line must be filename,label')),
      (b'a.jpg,n01532829\n', ("columns ['a.jpg', 'n01532829']", 'first line must be filename,label')),
      (b'filename,label\na.jpg\n', ('line 2 of', 'no filename or no label')),
      (b'filename,label\n\xff\xfe,n01532829\n', ('cannot be read', 'CSV')),
      (b'filename,label\n"' + b'x' * 200_000 + b'",n01532829\n', ('cannot be read', 'CSV')),
    ],
  )
  def test_broken_lists(self, tmp_path, content, parts):
    lists_beside_images(tmp_path)
    (tmp_path / 'train.csv').write_bytes(content)
    with pytest.raises(DatasetError, match=saying('train.csv', *parts)):
      self.load(tmp_path)

  def test_lists_without_their_images(self, tmp_path):
    (tmp_path / 'images').mkdir()
    write_lists(tmp_path)
    with pytest.raises(DatasetError, match=saying('100 classes', 'without an image', 'can be read')):
      self.load(tmp_path)


class TestCache:
  def load(self, tree, cache):
    lines = []
    splits = mini_imagenet.load(tree, size=4, cache=cache, report=lines.append)
    assert_whole(splits)
    return splits, any('reading 300 images' in line for line in lines)

  def test_images_are_decoded_once(self, tree, tmp_path):
    _, decoded = self.load(tree, tmp_path / 'new' / 'cache')
    assert decoded
    splits, decoded = self.load(tree, tmp_path / 'new' / 'cache')
    assert not decoded
    assert isinstance(splits.train.images, np.memmap)
    names = sorted(path.name for path in (tmp_path / 'new' / 'cache').iterdir())
    assert names == ['mini_imagenet_4x4.json', 'mini_imagenet_4x4.npy']

  def test_other_files_are_decoded_again(self, tmp_path):
    classes_at_the_top(tmp_path / 'data')
    self.load(tmp_path / 'data', tmp_path / 'cache')
    path = tmp_path / 'data' / CLASSES[0] / f'{CLASSES[0]}_00000000.jpg'
    path.write_bytes(path.read_bytes() + b'more')
    assert self.load(tmp_path / 'data', tmp_path / 'cache')[1]
    assert not self.load(tmp_path / 'data', tmp_path / 'cache')[1]

  def test_sizes_are_kept_apart(self, tree, tmp_path):
    self.load(tree, tmp_path)
    assert mini_imagenet.load(tree, size=5, cache=tmp_path).train.images.shape[1:] == (5, 5, 3)
    assert not self.load(tree, tmp_path)[1]

  @pytest.mark.parametrize('what', ['cut', 'pickle', 'shape', 'dtype', 'sizes', 'no sizes', 'no json', 'not json'])
  def test_what_is_broken_is_made_again(self, tree, tmp_path, what):
    self.load(tree, tmp_path)
    images, description = tmp_path / 'mini_imagenet_4x4.npy', tmp_path / 'mini_imagenet_4x4.json'
    said = json.loads(description.read_text())
    if what == 'cut':
      images.write_bytes(images.read_bytes()[:-1])
    elif what == 'pickle':
      np.save(images, np.array([{}], object), allow_pickle=True)
    elif what == 'shape':
      np.save(images, np.zeros((300, 4, 5, 3), np.uint8))
    elif what == 'dtype':
      np.save(images, np.zeros((300, 4, 4, 3), np.int8))
    elif what == 'sizes':
      said['sizes'][0] += 1
      description.write_text(json.dumps(said))
    elif what == 'no sizes':
      del said['sizes']
      description.write_text(json.dumps(said))
    elif what == 'no json':
      description.unlink()
    else:
      description.write_text('[' * 10_000)
    assert self.load(tree, tmp_path)[1]
    assert not self.load(tree, tmp_path)[1]

  def test_a_place_that_cannot_be_written_is_known_before_decoding(self, tree, tmp_path, monkeypatch):
    (tmp_path / 'file').write_text('')
    monkeypatch.setattr(mini_imagenet, 'read_all', lambda *args: pytest.fail('decoded'))
    with pytest.raises(DatasetError, match=saying('file/cache', 'cannot be written', 'give another')):
      mini_imagenet.load(tree, size=4, cache=tmp_path / 'file' / 'cache')

  def test_a_full_disk_costs_the_cache_alone(self, tree, tmp_path, monkeypatch):
    def full(*args, **kwargs):
      args[0].write(b'half')
      raise OSError(28, 'No space left on device')

    monkeypatch.setattr(image_cache.np, 'save', full)
    lines = []
    assert_whole(mini_imagenet.load(tree, size=4, cache=tmp_path, report=lines.append))
    assert any('could not be kept' in line and 'No space left' in line for line in lines)
    assert list(tmp_path.iterdir()) == []
