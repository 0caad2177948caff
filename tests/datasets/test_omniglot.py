"""Omniglot through tfds: prepared, from archives, over a network; and what is said when it cannot be had.

The archives here are made up, in Omniglot's layout and with all of its characters, but two drawings of each, so that
no data set is needed; tests at the end read the real one where it lies beside the project.
"""

import contextlib
import functools
import http.server
import io
import pathlib
import shutil
import sys
import threading
import types
import zipfile
from unittest import mock

import numpy as np
import pytest
from PIL import Image
from problems import saying

from metasgd_jax.datasets import DatasetError, omniglot, preparing

DRAWINGS = 2
ALPHABETS = [f'Alphabet_{i:02d}' for i in range(50)]
NAMES = ('images_background', 'images_evaluation', 'images_background_small1', 'images_background_small2')


def png(label):
  """A drawing whose ink tells its label: a bar of the label's height, as 1-bit PNG like the real ones."""
  pixels = np.ones((105, 105), bool)
  pixels[: 5 + label % 100, 20:40] = False
  pixels[: 5 + label // 100, 60:80] = False
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, 'PNG')
  return file.getvalue()


def write_archive(path, labels, compression=zipfile.ZIP_STORED):
  with zipfile.ZipFile(path, 'w', compression) as archive:
    for label in labels:
      alphabet, number = ALPHABETS[label % 50], label // 50 + 1
      data = png(label)
      for drawing in range(1, DRAWINGS + 1):
        archive.writestr(f'{path.stem}/{alphabet}/character{number:02d}/{label + 1:04d}_{drawing:02d}.png', data)


@pytest.fixture(scope='module')
def archives(tmp_path_factory):
  """The four archives, made up; tfds knows them by other checksums."""
  directory = tmp_path_factory.mktemp('archives')
  parts = (range(964), range(964, 1623), range(5), range(5, 10))
  for name, labels in zip(NAMES, parts, strict=True):
    write_archive(directory / f'{name}.zip', labels)
  return directory


@pytest.fixture
def few(tmp_path):
  """Whole archives with few characters in them."""
  (tmp_path / 'few').mkdir()
  for i, name in enumerate(NAMES):
    write_archive(tmp_path / 'few' / f'{name}.zip', range(3 * i, 3 * i + 3))
  return tmp_path / 'few'


@pytest.fixture(scope='module')
def prepared(archives, tmp_path_factory):
  data_dir = tmp_path_factory.mktemp('prepared')
  lines = []
  with mock.patch.object(omniglot, 'DRAWINGS', DRAWINGS):
    characters = omniglot.load(data_dir, archives=archives, verify_archives=False, report=lines.append)
  assert any('preparing omniglot' in line for line in lines)
  return data_dir, characters


def expected_image(label):
  ink = np.array(Image.open(io.BytesIO(png(label)))) == 0
  return np.asarray(Image.fromarray(255 * ink.astype(np.uint8)).resize((28, 28), Image.Resampling.LANCZOS))


def test_prepares_from_archives(prepared):
  data_dir, characters = prepared
  assert characters.images.shape == (1623, DRAWINGS, 28, 28, 1)
  for label in (0, 963, 964, 1622):
    for drawing in range(DRAWINGS):
      assert np.array_equal(characters.images[label, drawing, :, :, 0], expected_image(label))
    assert characters.alphabets[label] == ALPHABETS[label % 50]
    assert characters.numbers[label] == label // 50
  assert not list(data_dir.glob('.extracted-*'))


def test_what_is_prepared_is_not_prepared_again(prepared, monkeypatch):
  monkeypatch.setattr(preparing, '_prepare', lambda *a, **k: pytest.fail('prepared again'))
  monkeypatch.setattr(omniglot, '_read', lambda builder, size, report: builder.info.splits['train'].num_examples)
  assert omniglot.load(prepared[0]) == 964 * DRAWINGS


def test_drawings_of_another_size(prepared):
  with pytest.raises(ValueError, match=saying('size', '1 to 105', 'got 106')):
    omniglot.load(prepared[0], size=106)
  whole = omniglot._shrink(np.array(Image.open(io.BytesIO(png(7))).convert('RGB')), 105)
  assert np.array_equal(whole == 255, np.array(Image.open(io.BytesIO(png(7)))) == 0)


def test_ink_is_255_whatever_the_decoder_makes_of_paper():
  one_bit = np.array([[[1], [0]]] * 2, np.uint8).repeat(3, -1)
  assert np.array_equal(omniglot._shrink(one_bit, 28), omniglot._shrink(255 * one_bit, 28))
  black = np.zeros((105, 105, 3), np.uint8)
  assert omniglot._shrink(black, 28).min() == 255


REMEDY = ('check `data_dir`', f'{NAMES[0]}.zip', 'the argument `archives`')


@contextlib.contextmanager
def serving(directory):
  quiet = type('Quiet', (http.server.SimpleHTTPRequestHandler,), {'log_message': lambda *args: None})
  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(quiet, directory=directory))
  threading.Thread(target=server.serve_forever, daemon=True).start()
  try:
    yield f'http://127.0.0.1:{server.server_port}'
  finally:
    server.shutdown()
    server.server_close()


@pytest.fixture
def from_network(monkeypatch):
  """Makes the builder's addresses point at a server; the checksums are those of the files in `registered`."""
  import tensorflow_datasets as tfds
  from tensorflow_datasets.image_classification import omniglot as module

  def redirect(base, registered):
    urls = {key: f'{base}/{name}.zip' for key, name in zip(('train', 'eval', 'small1', 'small2'), NAMES, strict=True)}
    infos = {
      url: tfds.core.download.checksums.compute_url_info(registered / f'{name}.zip')
      for url, name in zip(urls.values(), NAMES, strict=True)
    }
    monkeypatch.setattr(module, '_DL_URLS', urls)
    monkeypatch.setattr(module.Omniglot, 'url_infos', infos)

  return redirect


def test_without_array_record(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'array_record', None)  # As on Windows, where it cannot be installed.
  with pytest.raises(DatasetError, match=saying('Omniglot cannot be read', 'array_record is not installed', 'WSL')):
    omniglot.load(tmp_path)


@pytest.mark.filterwarnings('ignore::ResourceWarning')
def test_downloads_and_prepares(archives, prepared, from_network, tmp_path, monkeypatch):
  with serving(archives) as base:
    from_network(base, archives)
    monkeypatch.setattr(omniglot, '_read', lambda builder, size, report: builder.data_path)
    found = omniglot.load(tmp_path / 'new' / 'data')
  for path in prepared[0].glob('omniglot/*/*array_record*'):
    assert (pathlib.Path(found) / path.name).read_bytes() == path.read_bytes()
  assert len(list(prepared[0].glob('omniglot/*/*array_record*'))) == 4


@pytest.mark.filterwarnings('ignore::ResourceWarning')
def test_a_download_that_is_another_file(few, from_network, tmp_path):
  shutil.copytree(few, tmp_path / 'other')
  with (tmp_path / 'other' / f'{NAMES[2]}.zip').open('ab') as file:
    file.write(b'x')
  with serving(tmp_path / 'other') as base:
    from_network(base, few)
    with pytest.raises(DatasetError, match=saying('omniglot', 'does not exist', 'downloaded', *REMEDY)):
      omniglot.load(tmp_path / 'data')
  assert not (tmp_path / 'data' / 'omniglot').exists()


def test_no_network(few, from_network, tmp_path):
  with serving(few) as base:
    pass
  from_network(base, few)
  with pytest.raises(DatasetError, match=saying('omniglot', 'does not exist', 'downloaded', *REMEDY)):
    omniglot.load(tmp_path / 'data')


class TestBadArchives:
  def load(self, tmp_path, archives, **options):
    return omniglot.load(tmp_path / 'data', archives=archives, **options)

  def test_no_directory(self, tmp_path):
    with pytest.raises(DatasetError, match=saying('archives', 'nowhere', 'does not exist')):
      self.load(tmp_path, tmp_path / 'nowhere')

  def test_home_is_understood(self, tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    with pytest.raises(DatasetError, match=saying('archives', f'{tmp_path}/zips', 'does not exist')):
      self.load(tmp_path, '~/zips')

  def test_one_is_missing(self, tmp_path, archives):
    (tmp_path / 'some').mkdir()
    shutil.copy(archives / f'{NAMES[0]}.zip', tmp_path / 'some')
    with pytest.raises(DatasetError, match=saying('some has no images_', '.zip', 'put all', 'original file names')):
      self.load(tmp_path, tmp_path / 'some')

  def test_not_the_registered_file(self, tmp_path, archives):
    with pytest.raises(DatasetError, match=r'not the file that tfds expects.*sha256 is \w{64}\b.*verify_archives off'):
      self.load(tmp_path, archives)

  @pytest.mark.parametrize('kept', [0, 1000, -30])
  def test_cut_short(self, tmp_path, few, kept):
    path = few / f'{NAMES[3]}.zip'
    path.write_bytes(path.read_bytes()[:kept])
    size = path.stat().st_size
    with pytest.raises(
      DatasetError, match=saying('small2.zip', 'complete zip file', f'({size} bytes)', 'get the file again')
    ):
      self.load(tmp_path, few, verify_archives=False)

  @pytest.mark.parametrize('compression', [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
  def test_bytes_are_wrong(self, tmp_path, few, compression):
    path = few / f'{NAMES[3]}.zip'
    write_archive(path, range(9, 12), compression)
    data = bytearray(path.read_bytes())
    for at in range(100, 200):
      data[at] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(DatasetError, match=saying('small2.zip is broken (', 'get the file again')):
      self.load(tmp_path, few, verify_archives=False)
    assert not list((tmp_path / 'data').glob('.extracted-*'))

  def test_characters_are_missing(self, tmp_path, few):
    with pytest.raises(DatasetError, match=saying('archives', 'the whole of omniglot', 'get them again')):
      self.load(tmp_path, few, verify_archives=False)
    assert not list((tmp_path / 'data').glob('omniglot/[0-9]*'))

  def test_checksums_are_not_forgotten_after_trusting_other_files(self, prepared, tmp_path, archives):
    """tfds keeps them for all builders of a process."""
    with pytest.raises(DatasetError, match='not the file that tfds expects'):
      self.load(tmp_path, archives)


def test_a_data_dir_that_cannot_be_made(tmp_path):
  (tmp_path / 'file').write_text('')
  data_dir = tmp_path / 'file' / 'data'
  with pytest.raises(DatasetError, match=saying(f'data_dir {data_dir}', 'cannot be written', 'give a data_dir')):
    omniglot.load(data_dir)


def builder_of(tmp_path, **splits):
  """What stands for tfds' builder: it has these examples."""
  info = types.SimpleNamespace(features={'alphabet': types.SimpleNamespace(int2str=ALPHABETS.__getitem__)})
  return types.SimpleNamespace(data_path=tmp_path, info=info, as_data_source=lambda split: splits[split])


def example(label):
  image = np.ones((105, 105, 3), np.uint8)
  return {'image': image, 'label': label, 'alphabet': label % 50, 'alphabet_char_id': label // 50}


def test_the_whole_is_20_drawings_of_each_of_1623_characters(tmp_path, monkeypatch):
  monkeypatch.setattr(omniglot, '_shrink', lambda image, size: np.zeros((size, size)))
  train, test = ([example(label) for label in labels] * 20 for labels in (range(964), range(964, 1623)))
  characters = omniglot._read(builder_of(tmp_path, train=train, test=test), 1, print)
  assert characters.images.shape == (1623, 20, 1, 1, 1)
  assert characters.alphabets.tolist() == [ALPHABETS[label % 50] for label in range(1623)]
  assert characters.numbers.tolist() == [label // 50 for label in range(1623)]


def test_drawings_are_missing(tmp_path, monkeypatch):
  import tensorflow_datasets as tfds

  builder = builder_of(tmp_path, train=[example(0)], test=[example(0)])
  monkeypatch.setattr(tfds, 'builder', lambda *args, **options: builder)
  with pytest.raises(DatasetError, match=saying('Omniglot cannot be read', 'character 0 has 2 drawings', 'have 20')):
    omniglot.load(tmp_path)


def test_a_prepared_file_is_broken(prepared, tmp_path):
  shutil.copytree(prepared[0] / 'omniglot', tmp_path / 'omniglot')
  for path in (tmp_path / 'omniglot' / '3.0.0').glob('omniglot-train*'):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  with pytest.raises(DatasetError, match=saying('prepare', 'in another data_dir')):
    omniglot.load(tmp_path)


def indexed(**characters):
  """Characters whose pixels tell their number."""
  images = np.zeros((1623, 1, 1, 2, 1), np.uint8)
  images[:, 0, 0, :, 0] = np.stack(np.divmod(np.arange(1623), 256), 1)
  return omniglot.Characters(images, **characters)


def numbers_of(bank):
  return (bank.images[:, 0, 0, 0].astype(int) * 256 + bank.images[:, 0, 1, 0]).tolist()


class TestSplits:
  @pytest.fixture
  def characters(self):
    return indexed(alphabets=np.array(['A'] * 1623), numbers=np.zeros(1623, int))

  def numbers(self, splits):
    return [numbers_of(bank) for bank in splits]

  def test_random(self, characters):
    train, validation, test = self.numbers(omniglot.random_split(characters))
    assert (len(train), len(validation), len(test)) == (1200, 0, 423)
    assert set(train) | set(test) == set(range(1623))
    assert self.numbers(omniglot.random_split(characters, seed=1))[2] != test
    assert self.numbers(omniglot.random_split(characters))[2] == test

  def test_validation_comes_out_of_the_training_characters(self, characters):
    whole, _, test = self.numbers(omniglot.random_split(characters))
    train, validation, same = self.numbers(omniglot.random_split(characters, validation=100))
    assert same == test
    assert sorted(train + validation) == whole
    assert len(validation) == 100
    with pytest.raises(ValueError, match=saying('validation', '0 to 1199', 'got 1200')):
      omniglot.random_split(characters, validation=1200)

  def test_vinyals_goes_by_alphabets_and_cuts_gurmukhi(self):
    alphabets = np.array(['Latin'] * 1623, object)
    alphabets[1500:1545], alphabets[:9], alphabets[9:12] = 'Gurmukhi', 'Hebrew', 'ULOG'
    numbers = np.arange(1623) - 1500
    train, validation, test = self.numbers(omniglot.vinyals_split(indexed(alphabets=alphabets, numbers=numbers)))
    assert validation == [*range(9)]
    assert test == [*range(9, 12), *range(1541, 1545)]
    assert train == [*range(12, 1541), *range(1545, 1623)]

  def test_vinyals_is_the_published_one(self, shared_data):
    names = real_names(shared_data)
    alphabets, numbers = zip(*(name.rsplit('_', 1) for name in names), strict=True)
    splits = omniglot.vinyals_split(indexed(alphabets=np.array(alphabets), numbers=np.array(numbers).astype(int)))
    for stem, bank in zip(('train', 'val', 'test'), splits, strict=True):
      (path,) = (shared_data / 'splits' / 'omniglot_vinyals').glob(f'{stem}*')
      published = {tuple(line.split('/')[:2]) for line in path.read_text().split()}
      published = {f'{alphabet}_{int(character.removeprefix("character")) - 1}' for alphabet, character in published}
      assert {names[i] for i in numbers_of(bank)} == published


def real_names(shared_data):
  """Alphabet and number of each character as tfds has them."""
  return (shared_data / 'omniglot' / 'tfds' / 'omniglot' / '3.0.0' / 'label.labels.txt').read_text().split()


@pytest.fixture(scope='module')
def real(shared_data):
  return omniglot.load(shared_data / 'omniglot' / 'tfds')


@pytest.mark.slow
class TestReal:
  def test_archives_give_what_is_prepared(self, real, shared_data, tmp_path):
    again = omniglot.load(tmp_path, archives=shared_data / 'omniglot' / 'zips', verify_archives=False)
    assert np.array_equal(np.sort(again.images.reshape(1623, 20, -1), 1), np.sort(real.images.reshape(1623, 20, -1), 1))
    assert np.array_equal(again.alphabets, real.alphabets)

  def test_drawings_have_ink_on_paper(self, real):
    ink = real.images.mean((2, 3, 4)) / 255
    assert ink.min() > 0.001  # A character of three dots.
    assert ink.max() < 0.4
    assert real.images.max() == 255

  def test_characters_are_named_as_tfds_names_them(self, real, shared_data):
    names = [f'{alphabet}_{number}' for alphabet, number in zip(real.alphabets, real.numbers, strict=True)]
    assert names == real_names(shared_data)
