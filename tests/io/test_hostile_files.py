"""Files made to harm: images, headers and names that lead outside, swell, loop or wait."""

import dataclasses
import functools
import io
import json
import os
import re
import struct
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
from fuzz.guard import refused, watched
from PIL import Image
from problems import saying
from small_models import small_model

import metasgd_jax as ms
from metasgd_jax import cli
from metasgd_jax.datasets import (
  DatasetError,
  cifar_fs,
  image_cache,
  image_files,
  image_folder,
  mini_imagenet,
  omniglot,
  read_list,
)
from metasgd_jax.deploy import model_file
from metasgd_jax.io import checkpoint, files, writers
from metasgd_jax.tasks.few_shot import ClassBank

untrained = functools.cache(small_model)


def says(said, *parts):
  return re.match(saying(*parts), said)


class TestImages:
  def read(self, path, fit='crop'):
    return refused(lambda: image_files.read_image(path, 8, 3, fit), path.parent, DatasetError)

  def test_a_thin_image_is_no_bomb_when_it_is_padded(self, tmp_path):
    Image.new('L', (2, 60_000)).save(tmp_path / 'a.png')
    assert says(self.read(tmp_path / 'a.png', 'pad'), 'too thin', '2x60000')
    assert image_files.read_image(tmp_path / 'a.png', 8, 3).shape == (8, 8, 3)

  def test_a_tile_larger_than_its_image_is_not_decoded(self, tmp_path):
    """Of 260 KB, which swell to 256 MiB; tiles somewhat larger than an image are as they should be."""
    said = self.read(tiff(tmp_path / 'a.tif', tile=1 << 14))
    assert says(said, 'tiles have 268,435,456 pixels', 'only 256')
    assert image_files.read_image(tiff(tmp_path / 'b.tif', tile=256), 8, 3).max() == 0

  def test_a_header_without_end(self, tmp_path, monkeypatch):
    """A comment of a gigabyte, which Pillow reads byte by byte."""
    monkeypatch.setattr(image_files, 'SECONDS_OF_A_FILE', 0.3)
    with (tmp_path / 'a.ppm').open('wb') as file:
      file.write(b'P6 #')
      file.truncate(1 << 30)
    begun = time.monotonic()
    assert says(self.read(tmp_path / 'a.ppm'), 'more than 0.3 s', 'decode')
    assert time.monotonic() - begun < 15

  @pytest.mark.parametrize('kind', ['pipe', 'device', 'loop', 'folder'])
  def test_what_is_no_file(self, tmp_path, kind):
    path = tmp_path / 'a.png'
    make(path, kind)
    assert says(self.read(path), 'a.png', 'cannot be read')

  def test_names_that_no_terminal_should_get(self, tmp_path):
    data = tmp_path / 'data'
    for name in ('a\udcff.png', 'b\x1b[31m.png', 'c\nd.png'):
      (data / f'cat{name}').mkdir(parents=True)
      (data / f'cat{name}' / name).write_bytes(b'no image')
      Image.linear_gradient('L').save(data / f'cat{name}' / 'good.png')
      (data / name).write_bytes(b'')
    lines = []
    folder = image_folder.load(data, size=4, report=lines.append)
    assert len(folder.skipped) == 3
    assert len(lines) == 5
    assert all(line.isprintable() for line in lines)
    assert any(r'a\udcff.png' in line for line in lines)

  def test_a_chain_of_folders_deeper_than_a_path_may_be_long(self, tmp_path):
    code = 'import os\nfor _ in range(25): os.mkdir("a" * 200); os.chdir("a" * 200)'
    (tmp_path / 'data').mkdir()
    subprocess.run([sys.executable, '-c', code], cwd=tmp_path / 'data', check=True)
    said = refused(lambda: image_folder.load(tmp_path / 'data', size=4), tmp_path, DatasetError)
    assert says(said, 'without an image', 'can be read')  # What cannot be reached is not looked at.


def tiff(path, tile):
  """Writes an image of 16x16 black pixels in one tile, packed by deflate, by hand."""
  black, packer = bytes(tile), zlib.compressobj(9)
  data = b''.join([packer.compress(black) for _ in range(tile)]) + packer.flush()
  begin = 10 + 12 * 10 + 4
  tags = {256: 16, 257: 16, 258: 8, 259: 8, 262: 1, 277: 1, 322: tile, 323: tile, 324: begin, 325: len(data)}
  header = b'II*\0' + struct.pack('<IH', 8, len(tags))
  path.write_bytes(header + b''.join(struct.pack('<HHII', t, 4, 1, v) for t, v in tags.items()) + bytes(4) + data)
  return path


def make(path, kind):
  """Puts something there that is no file."""
  if kind == 'pipe':
    os.mkfifo(path)
  elif kind == 'device':
    path.symlink_to('/dev/zero')
  elif kind == 'loop':
    path.symlink_to(path.name)
  else:
    path.mkdir()


@pytest.mark.parametrize('kind', ['pipe', 'device', 'loop', 'folder'])
class TestNoFiles:
  """To open a pipe waits for a writer that never comes, and to read a device may never end."""

  def test_model(self, tmp_path, kind):
    make(tmp_path / 'm', kind)
    assert 'there is no model file' in refused(lambda: ms.load_model(tmp_path / 'm'), tmp_path, ValueError)

  def test_params(self, tmp_path, kind):
    make(tmp_path / 'p', kind)
    read = lambda: files.read_params(tmp_path / 'p', {'a': np.zeros(2)})
    assert 'there is no such file' in refused(read, tmp_path, ValueError)

  def test_list(self, tmp_path, kind):
    make(tmp_path / 'a.txt', kind)
    assert 'the list of classes' in refused(lambda: read_list(tmp_path / 'a.txt'), tmp_path, DatasetError)

  def test_csv(self, tmp_path, kind):
    make(tmp_path / 'train.csv', kind)
    assert 'train.csv is not a regular file' in refused(lambda: mini_imagenet.load(tmp_path), tmp_path, DatasetError)

  @pytest.mark.parametrize('ending', ['npy', 'json'])
  def test_cache(self, tmp_path, kind, ending):
    kept(tmp_path)
    (tmp_path / f'a.{ending}').unlink()
    make(tmp_path / f'a.{ending}', kind)
    assert watched(lambda: kept(tmp_path), tmp_path, ()) is None


BANK = ClassBank(np.zeros((4, 8, 8, 3), np.uint8), np.array([1, 3]))


def kept(folder, decode=lambda: BANK):
  lines = []
  bank = image_cache.kept(folder / 'a', {}, (8, 8, 3), 2, decode=decode, report=lines.append)
  return bank, lines


class TestCache:
  @pytest.mark.parametrize(
    'shape', ['(1099511627776, 8, 8, 3)', f'({10**30}, 8, 8, 3)', '(-4, 8, 8, 3)', '(' * 3000, '"""', '4, 8, 8, 3)']
  )
  def test_headers_that_lie_are_not_believed(self, tmp_path, shape):
    kept(tmp_path)
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    data = b'\x93NUMPY\1\0' + struct.pack('<H', len(header)) + header + bytes(768)
    (tmp_path / 'a.npy').write_bytes(data)
    assert watched(lambda: kept(tmp_path), tmp_path, ()) is None
    assert 'taking decoded images' in kept(tmp_path)[1][0]

  @pytest.mark.parametrize('zipped', [b'PK\3\4 and no more', None])
  def test_a_zip_file_is_no_array(self, tmp_path, zipped):
    kept(tmp_path)
    np.savez(file := io.BytesIO(), a=BANK.images)
    (tmp_path / 'a.npy').write_bytes(zipped or file.getvalue())
    assert says(kept(tmp_path)[1][0], 'from other image files', 'broken')

  def test_sizes_whose_sum_overflows(self, tmp_path):
    kept(tmp_path)
    said = json.loads((tmp_path / 'a.json').read_text())
    (tmp_path / 'a.json').write_text(json.dumps({**said, 'sizes': [2**63 - 1, 2**63 - 1 + 6]}))
    assert 'is broken' in kept(tmp_path)[1][0]
    (tmp_path / 'a.json').write_text(json.dumps({**said, 'sizes': [2**62] * 3 + [2**62 + 4]}))
    assert 'is broken' in kept(tmp_path)[1][0]

  def test_a_link_at_the_temporary_name_is_not_written_through(self, tmp_path):
    (tmp_path / 'cache').mkdir()
    (tmp_path / 'mine').write_text('mine')
    (tmp_path / 'cache' / f'.a.npy-{os.getpid()}').symlink_to(tmp_path / 'mine')
    kept(tmp_path / 'cache')
    assert (tmp_path / 'mine').read_text() == 'mine'
    assert 'taking decoded images' in kept(tmp_path / 'cache')[1][0]


class TestModels:
  def write(self, tmp_path, tensors=None, metadata=None, **changes):
    """Writes a file by hand whose header says what it is told to."""
    ms.save_model(tmp_path / 'm', untrained())
    data = (tmp_path / 'm').read_bytes()
    size = struct.unpack('<Q', data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    config = json.loads(header['__metadata__']['config']) | changes
    header['__metadata__']['config'] = json.dumps(config)
    header['__metadata__'].update(metadata or {})
    header.update(tensors or {})
    changed = json.dumps(header).encode()
    (tmp_path / 'm').write_bytes(struct.pack('<Q', len(changed)) + changed + data[8 + size :])
    return refused(lambda: ms.load_model(tmp_path / 'm'), tmp_path, ValueError)

  def test_a_rate_beyond_all_floats(self, tmp_path):
    assert says(self.write(tmp_path, learner='maml', alpha=10**400), 'alpha', "MAML's rate")

  def test_facts_in_facts_in_facts(self, tmp_path):
    deep = {'a': 1}
    for _ in range(400):
      deep = {'a': deep}
    assert says(self.write(tmp_path, training=deep), 'training', 'nested', '10 levels')

  def test_enormous_tensors_are_not_made_room_for(self, tmp_path):
    lie = {'dtype': 'F32', 'shape': [2**20, 2**20], 'data_offsets': [0, 2**42]}
    assert 'or is incomplete' in self.write(tmp_path, {'theta/Dense_0/kernel': lie})
    said = self.write(tmp_path, filters=10_000, hidden=100_000, way=10_000)
    assert says(said, 'its config asks for')

  def test_a_header_of_nothing_but_its_length(self, tmp_path):
    (tmp_path / 'm').write_bytes(struct.pack('<Q', 2**63) + b'{}')
    assert 'or is incomplete' in refused(lambda: ms.load_model(tmp_path / 'm'), tmp_path, ValueError)

  @pytest.mark.parametrize('text', ['x' * 100_000, 'a\nb\x1b[31m'])
  def test_what_it_says_is_repeated_briefly_and_on_one_line(self, tmp_path, text):
    assert 'not a positive integer' in self.write(tmp_path, metadata={'format_version': text})
    assert 'learner must be one of' in self.write(tmp_path, learner=text)
    empty = {'dtype': 'F32', 'shape': [0], 'data_offsets': [0, 0]}
    assert 'has, but should not have,' in self.write(tmp_path, {text: empty})

  def test_facts_do_not_rule_the_terminal(self, tmp_path, capsys):
    config = dataclasses.replace(untrained().config, training={'data\x1b]0;x\7': 'a\x1b[2J'})
    ms.save_model(tmp_path / 'm', untrained()._replace(config=config))
    assert cli.main(['info', f'--model={tmp_path / "m"}']) == 0
    assert '\x1b' not in capsys.readouterr().out


class TestParams:
  LIKE = {'a': np.zeros((2, 3), np.float32), 'b': None}  # noqa: RUF012

  def refuse(self, tmp_path, params):
    files.write_params(tmp_path / 'p', params)
    return refused(lambda: files.read_params(tmp_path / 'p', self.LIKE), tmp_path, ValueError)

  def test_another_structure_with_as_many_leaves(self, tmp_path):
    whole = np.zeros((2, 3), np.float32)
    for params in ({'a': {'c': whole}, 'b': None}, {'a': None, 'b': whole}, {'a': [whole], 'b': None}):
      assert says(self.refuse(tmp_path, params), 'not hold', 'expected parameters')

  def test_another_dtype(self, tmp_path):
    said = self.refuse(tmp_path, {'a': np.zeros((2, 3), np.int64), 'b': None})
    assert says(said, 'not hold', 'expected parameters', 'a is stored as int64[2, 3], expected float32[2, 3]')

  def test_no_file(self, tmp_path):
    read = lambda: files.read_params(tmp_path / 'p', self.LIKE)
    assert 'there is no such file' in refused(read, tmp_path, ValueError)


class TestPlaces:
  """Home directories of nobody, names with a NUL, and links that loop."""

  @pytest.mark.parametrize('path', ['~nobody-of-that-name/x', 'a\0b'])
  def test_each_reader(self, tmp_path, path):
    model = untrained()
    for read in (
      lambda: image_folder.load(path, size=4),
      lambda: image_folder.read_images(path, size=4),
      lambda: mini_imagenet.load(path),
      lambda: omniglot.load(path),
      lambda: omniglot.load(tmp_path, archives=path),
      lambda: cifar_fs.load(path),
      lambda: read_list(path),
      lambda: image_files.read_image(path, 4, 3),
    ):
      refused(read, tmp_path, ValueError if path.startswith('~') else DatasetError)
    refused(lambda: files.open_workdir(path), tmp_path, files.WriterError)
    if path.startswith('~'):
      refused(lambda: ms.save_model(path, model), tmp_path, ValueError)
      refused(lambda: checkpoint.Checkpoints(path, like=None, config={}), tmp_path, ValueError)
    else:
      refused(lambda: ms.save_model(tmp_path / path, model), tmp_path, files.WriterError)

  @pytest.mark.parametrize('path', [None, 3, b'a', ['a']], ids=repr)
  def test_what_is_no_path(self, tmp_path, path):
    model, like = untrained(), {'a': np.zeros(2)}
    for use in (
      lambda: ms.load_model(path),
      lambda: model_file.model_size(path),
      lambda: ms.FewShotClassifier(path).fit(np.zeros((2, 28, 28)), [0, 1]),
      lambda: ms.save_model(path, model),
      lambda: ms.export_model(path, model),
      lambda: ms.load_exported(path),
      lambda: files.write_json(path, 1),
      lambda: files.write_array(path, like['a']),
      lambda: files.write_params(path, like),
      lambda: files.read_params(path, like),
      lambda: writers.MetricsWriter(path),
      lambda: writers.TensorBoardWriter(path),
      lambda: checkpoint.Checkpoints(path, like=None, config={}),
      lambda: checkpoint.newest(path, like=None, config={}),
      lambda: checkpoint.steps(path),
      lambda: image_folder.load(path, size=4),
      lambda: image_folder.read_images(path, size=4),
      lambda: image_files.read_image(path, 4, 3),
      lambda: mini_imagenet.load(path),
      lambda: omniglot.load(path),
      lambda: omniglot.load(tmp_path, archives=[path]),
      lambda: cifar_fs.load(path),
      lambda: read_list(path),
    ):
      with pytest.raises(ValueError, match='a path must be a string or a pathlib.Path, got'):
        use()
    with pytest.raises(files.WriterError, match='a path must be'):
      files.open_workdir(path)
    assert not list(tmp_path.iterdir())

  @pytest.mark.parametrize('out', ['loop', '~nobody-of-that-name/x'])
  def test_out(self, tmp_path, capsys, out):
    for folder in ('support/a', 'support/b', 'query'):
      (tmp_path / folder).mkdir(parents=True)
      Image.new('L', (8, 8)).save(tmp_path / folder / 'a.png')
    (tmp_path / 'loop').symlink_to('loop')
    out = out if out.startswith('~') else tmp_path / out / 'x'
    arguments = [f'--{name}={tmp_path / name}' for name in ('support', 'query')]
    assert cli.main(['predict', *arguments, f'--out={out}']) == 1
    assert capsys.readouterr().err.startswith('error: ')
