"""CIFAR-FS through tfds, from an archive made up in CIFAR-100's layout with fewer images."""

import functools
import http.server
import io
import tarfile
import threading

import numpy as np
import pytest
from problems import saying

from metasgd_jax.datasets import DatasetError, cifar_fs, published_split

LISTS = published_split('cifar_fs')
NAMES = sorted(name for part in LISTS for name in part)
TRAIN, TEST = 3, 2  # images of a class in the archive's two files
ARCHIVE = 'cifar-100-binary.tar.gz'


@pytest.fixture(autouse=True)
def fewer_images(monkeypatch):
  monkeypatch.setattr(cifar_fs, 'IMAGES_OF_A_CLASS', TRAIN + TEST)


def image(label, i):
  """An image that tells its class and number: `[32, 32, 3]`."""
  pixels = np.zeros((32, 32, 3), np.uint8)
  pixels[:, :, 0] = label
  pixels[: 1 + i, 16:, 1] = 255
  pixels[0, 0] = (1, 2, 3)
  return pixels


def records(numbers):
  """The bytes of a file: for each image a coarse and a fine label and its red, green and blue planes."""
  order = [(label, i) for i in numbers for label in range(100)]
  return b''.join(bytes([label % 20, label]) + image(label, i).transpose(2, 0, 1).tobytes() for label, i in order)


def contents(**changed):
  named = {
    'coarse_label_names.txt': '\n'.join(f'coarse {i}' for i in range(20)).encode() + b'\n',
    'fine_label_names.txt': '\n'.join(NAMES).encode() + b'\n',
    'train.bin': records(range(TRAIN)),
    'test.bin': records(range(TRAIN, TRAIN + TEST)),
  }
  return {f'cifar-100-binary/{name}': data for name, data in named.items()} | changed


def write_archive(directory, members):
  directory.mkdir(exist_ok=True)
  with tarfile.open(directory / ARCHIVE, 'w:gz', compresslevel=1) as archive:
    for name, data in members.items():
      info = tarfile.TarInfo(name)
      if isinstance(data, str):
        info.type, info.linkname = tarfile.SYMTYPE, data
        archive.addfile(info)
      else:
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))
  return directory


@pytest.fixture(scope='module')
def archives(tmp_path_factory):
  return write_archive(tmp_path_factory.mktemp('archives'), contents())


def assert_whole(splits):
  for part, bank in splits._asdict().items():
    names = getattr(LISTS, part)
    assert bank.sizes.tolist() == [TRAIN + TEST] * len(names)
    # Ids are test_… and train_…, so that the archive's test images come first.
    order = [*range(TRAIN, TRAIN + TEST), *range(TRAIN)]
    expected = np.stack([image(NAMES.index(name), i) for name in names for i in order])
    assert np.array_equal(bank.images, expected)


def test_prepares_from_an_archive_once(archives, tmp_path):
  lines = []
  data_dir = tmp_path / 'data'
  assert_whole(cifar_fs.load(data_dir, archives=archives, verify_archives=False, report=lines.append))
  assert any('preparing cifar100' in line for line in lines)
  assert not list(data_dir.glob('.extracted-*'))
  lines.clear()
  assert_whole(cifar_fs.load(data_dir, report=lines.append))
  assert lines == [f'reading CIFAR-100 from {data_dir}/cifar100/3.0.2']


@pytest.mark.filterwarnings('ignore::ResourceWarning')
def test_downloads(archives, tmp_path, monkeypatch):
  import tensorflow_datasets as tfds
  from tensorflow_datasets.image_classification import cifar as module

  quiet = type('Quiet', (http.server.SimpleHTTPRequestHandler,), {'log_message': lambda *args: None})
  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(quiet, directory=archives))
  threading.Thread(target=server.serve_forever, daemon=True).start()
  url = f'http://127.0.0.1:{server.server_port}/{ARCHIVE}'
  original = module.Cifar100._cifar_info.fget
  monkeypatch.setattr(module.Cifar100, '_cifar_info', property(lambda self: original(self)._replace(url=url)))
  infos = {url: tfds.core.download.checksums.compute_url_info(archives / ARCHIVE)}
  monkeypatch.setattr(module.Cifar100, 'url_infos', infos)
  try:
    assert_whole(cifar_fs.load(tmp_path))
  finally:
    server.shutdown()
    server.server_close()


class TestBadArchives:
  def load(self, tmp_path, archives, **options):
    return cifar_fs.load(tmp_path / 'data', archives=archives, **{'verify_archives': False, **options})

  def test_missing(self, tmp_path):
    with pytest.raises(DatasetError, match=saying(f'no {ARCHIVE}', 'put all', 'original file names')):
      self.load(tmp_path, tmp_path)

  def test_not_the_registered_file(self, tmp_path, archives):
    with pytest.raises(DatasetError, match=r'not the file that tfds expects.*sha256 is \w{64}\b'):
      self.load(tmp_path, archives, verify_archives=True)

  @pytest.mark.parametrize('kept', [0, 5])
  def test_not_a_tar_file(self, tmp_path, archives, kept):
    (tmp_path / ARCHIVE).write_bytes((archives / ARCHIVE).read_bytes()[:kept])
    with pytest.raises(DatasetError, match=saying('complete tar file', f'({kept} bytes)', 'file again from http')):
      self.load(tmp_path, tmp_path)

  def test_cut_short(self, tmp_path, archives):
    (tmp_path / ARCHIVE).write_bytes((archives / ARCHIVE).read_bytes()[:-1000])
    with pytest.raises(DatasetError, match=saying('tar.gz is broken (', 'get the file again')):
      self.load(tmp_path, tmp_path)

  def test_bytes_are_wrong(self, tmp_path, archives):
    data = bytearray((archives / ARCHIVE).read_bytes())
    data[-8:-4] = b'\0\0\0\0'  # The sum that gzip keeps of what is in it.
    (tmp_path / ARCHIVE).write_bytes(data)
    with pytest.raises(DatasetError, match=saying('tar.gz is broken (', 'get the file again')):
      self.load(tmp_path, tmp_path)

  @pytest.mark.parametrize(
    ('name', 'data'),
    [('../outside', b'x'), ('cifar-100-binary/../../outside', b'x'), ('link', '../../..'), ('link', '/etc')],
  )
  def test_a_member_that_leads_outside(self, tmp_path, name, data):
    write_archive(tmp_path / 'archives', contents(**{name: data}))
    with pytest.raises(
      DatasetError, match=saying(ARCHIVE, 'outside of the target folder', 'do not trust this archive')
    ):
      self.load(tmp_path, tmp_path / 'archives')
    assert list(tmp_path.rglob('outside')) == []
    assert list((tmp_path / 'data').glob('cifar100/*')) == []

  def test_a_file_is_missing(self, tmp_path):
    members = contents()
    del members['cifar-100-binary/test.bin']
    write_archive(tmp_path / 'archives', members)
    with pytest.raises(DatasetError, match=saying('archives', 'the whole of cifar100', 'get them again')):
      self.load(tmp_path, tmp_path / 'archives')

  def test_images_end_midway(self, tmp_path):
    write_archive(tmp_path / 'archives', contents(**{'cifar-100-binary/test.bin': records([3])[:-1]}))
    with pytest.raises(DatasetError, match=saying('archives', 'the whole of cifar100', 'get them again')):
      self.load(tmp_path, tmp_path / 'archives')

  def test_images_are_missing(self, tmp_path):
    write_archive(tmp_path / 'archives', contents(**{'cifar-100-binary/test.bin': records([3])}))
    with pytest.raises(DatasetError, match=saying('CIFAR-100 cannot be read', 'apple has 4', 'should have 5')):
      self.load(tmp_path, tmp_path / 'archives')

  def test_classes_of_another_data_set(self, tmp_path):
    names = '\n'.join(['unicorn', *NAMES[1:]]).encode()
    write_archive(tmp_path / 'archives', contents(**{'cifar-100-binary/fine_label_names.txt': names}))
    with pytest.raises(DatasetError, match=saying('are not those of CIFAR-100', 'apple')):
      self.load(tmp_path, tmp_path / 'archives')
