"""Everything that the package reads from disk, each with valid files to begin from and the errors that it documents."""

import functools
import io
import pathlib
import random
import tarfile
import zipfile
from typing import Any
from unittest import mock

import jax
import ml_dtypes
import numpy as np
from PIL import Image

import metasgd_jax as ms
from metasgd_jax import cli
from metasgd_jax.cli import info
from metasgd_jax.datasets import DatasetError, archives, image_cache, image_files, image_folder, mini_imagenet, splits
from metasgd_jax.deploy import model_file
from metasgd_jax.io import files
from metasgd_jax.tasks.few_shot import ClassBank

from .dataset_readers import DATASET_READERS
from .mutations import in_json, in_numpy, in_png, in_safetensors, text
from .reader import Reader, in_folder
from .trees import Tree

IMAGE_ENDINGS = ('png', 'jpg', 'bmp', 'gif', 'webp', 'tif', 'ppm', 'pgm')


def _models() -> list[Tree]:
  def saved(learner, **options):
    config = ms.ModelConfig(
      learner, way=3, image_shape=(16, 16, 1), filters=2, training={'data': {'of': [1, 2.5, None]}}, **options
    )
    x = np.zeros((3, 16, 16, 1), np.float32)
    batch = ms.Batch(x, np.arange(3, dtype=np.int32))
    init = jax.jit(model_file.build_learner(config, native=True).init)
    meta = jax.device_get(init(jax.random.key(0), ms.Episode(batch, batch)))
    return in_folder(lambda folder: ms.save_model(folder / 'a.safetensors', ms.FewShotModel(config, meta)))

  return [saved('meta_sgd', hidden=4), saved('maml', hidden=0, alpha=0.4, inner_steps=2)]


def _read_model(folder, rng) -> None:
  path = folder / 'a.safetensors'
  info.about(ms.load_model(path), model_file.model_size(path))


def _exported() -> list[Tree]:
  learner = ms.Learner(None, lambda theta, support, key: theta, None, lambda theta, x: x @ theta['w'], None)
  batch = ms.Batch(np.ones((4, 2), np.float32), np.ones((4, 1), np.float32))
  theta, episode = {'w': np.ones((2, 1), np.float32)}, ms.Episode(batch, batch)
  return [in_folder(lambda folder: ms.export_learner(folder / 'a.zip', learner, theta, episode, says={'a': [1]}))]


_PARAMS = {
  'a': np.arange(6, dtype=np.float32).reshape(2, 3),
  'b': {'c': np.float32(2), 'd': np.ones(3, ml_dtypes.bfloat16)},
  'e': (np.arange(4), np.zeros((0, 2), np.float32)),
}


def _params() -> list[Tree]:
  return [in_folder(lambda folder: files.write_params(folder / 'a.safetensors', _PARAMS))]


def _read_params(folder, rng) -> None:
  got = files.read_params(folder / 'a.safetensors', _PARAMS)
  form = lambda tree: jax.tree.map(lambda a: (np.shape(a), np.asarray(a).dtype), tree)
  assert form(got) == form(_PARAMS), 'other parameters than those asked for'


def picture(ending: str, i: int = 0) -> bytes:
  """A small picture as a file."""
  shade = np.add.outer(np.arange(9), np.arange(12))[:, :, None] * np.array([9, 5 + i, 2])
  image, file = Image.fromarray(shade.astype(np.uint8)), io.BytesIO()
  if ending == 'gif':
    image.quantize(8).save(file, 'GIF', save_all=True, append_images=[image], comment=b'a comment', transparency=1)
  elif ending == 'png':
    exif = Image.Exif()
    exif[0x0112] = 6
    image.convert('RGBA').save(file, 'PNG', exif=exif)
  elif ending == 'tif':
    image.save(file, 'TIFF', compression='tiff_lzw' if i else None)
  elif ending == 'pgm':
    Image.fromarray(shade[:, :, 0].astype(np.uint16) * 200).save(file, 'PPM')
  else:
    image.save(file, {'jpg': 'JPEG', 'ppm': 'PPM'}.get(ending, ending.upper()))
  return file.getvalue()


def _pictures() -> list[Tree]:
  return [{f'a.{ending}': picture(ending, i)} for ending in IMAGE_ENDINGS for i in range(2 if ending == 'tif' else 1)]


def _read_picture(folder, rng) -> None:
  for path in sorted(folder.iterdir()):
    size, channels, fit = rng.choice((8, (5, 30))), rng.choice((1, 3)), rng.choice(('crop', 'pad'))
    image = image_files.read_image(path, size, channels, fit)
    assert image.dtype == np.uint8
    assert image.shape == (*((8, 8) if size == 8 else size), channels)


def _folders() -> list[Tree]:
  names = ('cat/a.png', 'cat/b.jpg', 'dog/deep/er/a.gif', 'dog/b.bmp', 'notes.txt')
  return [{name: picture(name[-3:]) if name[-3:] != 'txt' else b'notes' for name in names}]


def _encodable(line: str) -> None:
  line.encode()
  assert '\n' not in line


def _read_folder(folder, rng) -> None:
  load = rng.choice((image_folder.load, image_folder.read_images))
  load(folder, size=8, channels=rng.choice((1, 3)), fit=rng.choice(('crop', 'pad')), report=_encodable)


_FEW = splits.ClassNames(('n01532829', 'n01558993'), ('n01855672',), ('n01930112',))


def _mini() -> list[Tree]:
  names = [name for part in _FEW for name in part]
  by_folder: Tree = {f'{name}/{i}.png': picture('png', i) for name in names for i in range(2)}
  flat: Tree = {f'images/{name}{i:08d}.jpg': picture('jpg', i) for name in names for i in range(2)}
  lists: Tree = {}
  for stem, part in zip(('train', 'val', 'test'), _FEW, strict=True):
    rows = ''.join(f'{name}{i:08d}.jpg,{name}\n' for name in part for i in range(2))
    lists[f'{stem}.csv'] = f'filename,label\n{rows}'.encode()
  return [by_folder, flat, {**flat, **lists}, {**flat, **lists}]


def _in_csv(rng: random.Random, data: bytes) -> bytes:
  rows = data.splitlines()
  at = rng.randrange(len(rows))
  odd = rng.choice(
    (b'../x.jpg,n01532829', b'/etc/passwd,n01532829', b'..\\x.jpg,n01532829', b'C:x.jpg,n01532829',
     b'~/x.jpg,n01532829', b'a.jpg', b'a.jpg,n01532829,1,2', b'"a', b'filename,label', b'filename,filename,label', b',',
     b'./a.jpg,n01532829', b'a' * 5000 + b'.jpg,n01532829', b'\0.jpg,n01532829', b'.,n01532829',
     b'caf\xe9.jpg,n01532829', b'')
  )  # fmt: skip
  changed = rng.choice((b'\n', b'\r\n', b'\r')).join([*rows[:at], odd, *rows[at + rng.randrange(2) :]])
  what = rng.random()
  if what < 0.15:
    return changed.decode('latin-1').encode(rng.choice(('utf-16', 'utf-16-le', 'utf-8-sig', 'utf-32', 'cp500')))
  return changed


def _read_mini(folder, rng) -> None:
  cache = folder / 'cache' if rng.random() < 0.3 else None
  with mock.patch.object(mini_imagenet, 'published_split', return_value=_FEW):
    mini_imagenet.load(folder, size=4, cache=cache, report=_encodable)


_SOURCE: dict[str, Any] = dict(decoding=1, files=4, bytes=100, sha256='0')
_BANK = ClassBank(np.arange(4 * 8 * 8 * 3, dtype=np.uint8).reshape(4, 8, 8, 3), np.array([1, 3]))


def _cache(folder: pathlib.Path) -> ClassBank:
  place = folder / 'a'
  return image_cache.kept(place, _SOURCE, (8, 8, 3), 2, decode=lambda: _BANK, report=_encodable)


def _kept() -> list[Tree]:
  return [in_folder(_cache)]


def _read_cache(folder, rng) -> None:
  bank = _cache(folder)
  assert bank.images.shape == (4, 8, 8, 3)
  assert bank.images.dtype == np.uint8
  assert sum(map(int, bank.sizes)) == 4
  np.array(bank.images)


def _class_lists() -> list[Tree]:
  return [{'a.txt': '# classes\ncat\n  dog \n\nchat à moustache\n'.encode('utf-8-sig')}, {'a.txt': b'a\nb\n'}]


def _zips() -> list[Tree]:
  trees: list[Tree] = []
  for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
    file = io.BytesIO()
    with zipfile.ZipFile(file, 'w', method) as archive:
      archive.writestr('images/a/1.png', b'one' * 50)
      archive.writestr('images/b/2.png', b'two' * 50)
      if method == zipfile.ZIP_DEFLATED:
        _add_hostile(archive)
    trees.append({'a.zip': file.getvalue()})
  return trees


def _add_hostile(archive: zipfile.ZipFile) -> None:
  for name in ('../escaped', '/tmp/escaped', 'a/../../escaped', 'C:\\escaped', '..\\escaped', 'a//b', './c'):
    archive.writestr(name, b'x')
  link = zipfile.ZipInfo('link')
  link.external_attr = 0o120777 << 16
  archive.writestr(link, '/tmp')


def _tars() -> list[Tree]:
  trees: list[Tree] = []
  for mode in ('gz', 'gz'):
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
      file = io.BytesIO()
      with tarfile.open(fileobj=file, mode=f'w:{mode}', format=form) as archive:
        for name in ('a/1.bin', 'a/2.bin', 'b/' + 'c' * 90 + '.bin' if form == tarfile.USTAR_FORMAT else 'd' * 150):
          info = tarfile.TarInfo(name)
          info.size = 600
          archive.addfile(info, io.BytesIO(bytes(600)))
      trees.append({'a.tar.gz': file.getvalue()})
  return trees


def _in_tar(rng: random.Random, data: bytes) -> bytes:
  """The members' names, kinds and links, with the checksums made to fit."""
  file = io.BytesIO()
  with tarfile.open(fileobj=io.BytesIO(data)) as old, tarfile.open(fileobj=file, mode='w:gz', compresslevel=1) as new:
    members = old.getmembers()
    at = rng.randrange(len(members))
    for i, info in enumerate(members):
      if i == at:
        info.name = rng.choice(
          ('../escaped', '/tmp/escaped', 'a/../../escaped', 'a/1.bin', 'a', '', '.', 'e' * 300, 'a\0b', '\udcff')
        )
        info.type = rng.choice((b'0', b'0', b'1', b'2', b'3', b'4', b'5', b'6', b'7', b'S', b'L', b'x', b'g', b'Z'))
        info.linkname = rng.choice(('', '..', '/etc', 'a/1.bin', '../../escaped', '.'))
        info.mode = rng.choice((0o644, 0o7777, 0, -1))
        info.size = rng.choice((600, 0, 10**6, 2**33, 2**40))
        info.mtime = rng.choice((0, -1, 1e300, 2**40))
        info.pax_headers = rng.choice(
          ({}, {'path': '../escaped'}, {'size': '9' * 30}, {'linkpath': '/etc'}, {'GNU.sparse.size': '-1'})
        )
      new.addfile(info, io.BytesIO(bytes(info.size if info.size <= 10**6 else 600)) if info.size < 10**7 else None)
      if info.size > 10**7:
        break
  return file.getvalue()


def _unpack(name: str, folder: pathlib.Path, rng: random.Random) -> None:
  path = folder / name
  if not path.is_file() or not archives.is_archive(path):
    raise DatasetError(f'{path} is not a whole archive')
  archives.unpack(path, folder / 'out')


def _load_list(folder, rng) -> None:
  splits.read_list(folder / 'a.txt')


def _command(folder, rng) -> None:
  out, err = io.StringIO(), io.StringIO()
  with mock.patch('sys.stdout', out), mock.patch('sys.stderr', err):
    if cli.main(['info', f'--model={folder / "a.safetensors"}']):
      raise ValueError(err.getvalue().strip())
  out.getvalue().encode()


READERS = [
  Reader('load_model', _models, _read_model, (ValueError,), 1.0, {'': (in_safetensors,)}),
  Reader('metasgd info', _models, _command, (ValueError,), 0.2, {'': (in_safetensors,)}),
  Reader('load_exported', _exported, lambda folder, rng: ms.load_exported(folder / 'a.zip'), (ValueError,), 0.5),
  Reader('read_params', _params, _read_params, (ValueError,)),
  Reader('read_image', _pictures, _read_picture, (DatasetError,), 3.0, {'.png': (in_png,)}),
  Reader('image_folder', _folders, _read_folder, (DatasetError,), 1.0, {'.png': (in_png,)}),
  Reader('mini_imagenet.load', _mini, _read_mini, (DatasetError,), 1.0, {'.csv': (_in_csv, _in_csv, text)}),
  Reader('image_cache.kept', _kept, _read_cache, (DatasetError,), 1.0, {'.npy': (in_numpy,), '.json': (in_json,)}),
  Reader('read_list', _class_lists, _load_list, (DatasetError,), 0.5, {'': (text,)}),
  Reader('unpack a zip file', _zips, functools.partial(_unpack, 'a.zip'), (DatasetError,)),
  Reader('unpack a tar file', _tars, functools.partial(_unpack, 'a.tar.gz'), (DatasetError,), 1.0, {'': (_in_tar,)}),
  *DATASET_READERS,
]
