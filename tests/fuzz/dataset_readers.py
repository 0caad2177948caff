"""What is read through another library: data sets that tfds prepares."""

import contextlib
import io
import pathlib
import random
import tarfile
import zipfile
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
from PIL import Image

from metasgd_jax.datasets import DatasetError, cifar_fs, omniglot, published_split

from .reader import Reader
from .trees import Tree

_ALPHABETS, _CHARACTERS, _DRAWINGS = 2, 4, 3
_OMNIGLOT = ('images_background', 'images_evaluation', 'images_background_small1', 'images_background_small2')
_NAMES = sorted(name for part in published_split('cifar_fs') for name in part)


def _drawing(label: int) -> bytes:
  pixels = np.ones((105, 105), bool)
  pixels[10 : 30 + label, 20:40] = False
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, 'PNG')
  return file.getvalue()


def _omniglot_archives() -> Tree:
  tree: Tree = {}
  for name, labels in zip(_OMNIGLOT, ((0, 1), (2, 3), (0,), (1,)), strict=True):
    file = io.BytesIO()
    with zipfile.ZipFile(file, 'w') as archive:
      for label in labels:
        for i in range(_DRAWINGS):
          place = f'{name}/Alphabet_{label % 2}/character{label // 2 + 1:02d}/{label + 1:04d}_{i + 1:02d}.png'
          archive.writestr(place, _drawing(label))
    tree[f'archives/{name}.zip'] = file.getvalue()
  return tree


def _cifar_archives() -> Tree:
  images = b''.join(bytes([label % 20, label]) + bytes([label]) * 3072 for label in range(100))
  members = {
    'coarse_label_names.txt': '\n'.join(f'coarse {i}' for i in range(20)).encode() + b'\n',
    'fine_label_names.txt': '\n'.join(_NAMES).encode() + b'\n',
    'train.bin': images,
    'test.bin': images,
  }
  file = io.BytesIO()
  with tarfile.open(fileobj=file, mode='w:gz') as archive:
    for name, data in members.items():
      info = tarfile.TarInfo(f'cifar-100-binary/{name}')
      info.size = len(data)
      archive.addfile(info, io.BytesIO(data))
  return {'archives/cifar-100-binary.tar.gz': file.getvalue()}


@contextlib.contextmanager
def _small() -> Iterator[None]:
  """Takes data sets of a few images for whole."""
  from tensorflow_datasets.image_classification import omniglot as builder

  with (
    mock.patch.multiple(builder, _NUM_ALPHABETS=_ALPHABETS, _NUM_CLASSES=_CHARACTERS),
    mock.patch.multiple(omniglot, CHARACTERS=_CHARACTERS, DRAWINGS=_DRAWINGS),
    mock.patch.object(cifar_fs, 'IMAGES_OF_A_CLASS', 2),
  ):
    yield


def _load(module: Any, folder: pathlib.Path, rng: random.Random) -> None:
  with _small(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    module.load(folder / 'data', archives=folder / 'archives', verify_archives=False)


DATASET_READERS = [
  Reader(
    'omniglot.load, archives',
    lambda: [_omniglot_archives()],
    lambda folder, rng: _load(omniglot, folder, rng),
    (DatasetError,),
    0.1,
  ),
  Reader(
    'cifar_fs.load, archives',
    lambda: [_cifar_archives()],
    lambda folder, rng: _load(cifar_fs, folder, rng),
    (DatasetError,),
    0.1,
  ),
]
