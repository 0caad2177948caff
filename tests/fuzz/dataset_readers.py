"""What is read through other libraries: archives that tfds prepares, and checkpoints that orbax wrote."""

import contextlib
import functools
import io
import pathlib
import random
import tarfile
import zipfile
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
import numpy as np
import optax
from PIL import Image

import metasgd_jax as ms
from metasgd_jax.datasets import DatasetError, cifar_fs, omniglot, published_split
from metasgd_jax.io import checkpoint
from metasgd_jax.outer import training

from .mutations import in_json, in_signed_json
from .reader import Reader, in_folder
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


_LEARNER = ms.learners.maml(ms.nn.from_linen(ms.nn.MLP([2], 1)), ms.losses.mean_squared_error, alpha=0.1)
_OPTIMIZER = optax.adam(1e-3)
_CONFIG = {'seed': 0, 'of': [1, 'a']}


@functools.cache
def _state(step: int = 0) -> training.TrainState:
  state = training.init(jax.random.key(0), ms.tasks.sinusoid(shot=2), learner=_LEARNER, optimizer=_OPTIMIZER)
  return jax.block_until_ready(state._replace(step=state.step + step))


def _checkpoints(folder: pathlib.Path) -> None:
  with checkpoint.Checkpoints(folder, like=_state(), config=_CONFIG, keep_best=1, report=str) as kept:
    for step in (1, 2, 3):
      kept.save(_state(step), metric=float(step))


def _read_checkpoint(folder: pathlib.Path, rng: random.Random) -> None:
  how: Any = dict(like=_state(), config=_CONFIG, report=lambda line: line.encode())
  what = rng.randrange(3)
  if what == 0:
    checkpoint.read_config(folder)
  elif what == 1:
    found = checkpoint.newest(folder, **how)
    assert found is None or int(found.state.step) == found.step in (1, 2, 3)
  else:
    with checkpoint.Checkpoints(folder, keep_best=1, **how) as kept:
      kept.save(_state(9), metric=9.0)
    assert kept.last == 9


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
  Reader(
    'checkpoint',
    lambda: [in_folder(_checkpoints)],
    _read_checkpoint,
    (checkpoint.CheckpointError,),
    0.1,
    {
      'about/metadata': (in_json, in_signed_json, in_signed_json),
      'state/_METADATA': (in_json,),
      '_CHECKPOINT_METADATA': (in_json,),
      'metrics/metrics': (in_json,),
    },
  ),
]
