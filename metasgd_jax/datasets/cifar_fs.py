"""CIFAR-FS (Bertinetto et al. 2019): CIFAR-100 from tfds' builder, with its 100 classes split 64 / 16 / 20.

TensorFlow is not needed to prepare the data or to read it.
"""

import os
import time

import numpy as np

from metasgd_jax.datasets.messages import DatasetError, Report, at_home, printing
from metasgd_jax.datasets.preparing import images_as_pillow, prepare, reading, without_advice
from metasgd_jax.datasets.splits import Splits, published_split, split_bank
from metasgd_jax.tasks.few_shot import ClassBank

CLASSES, IMAGES_OF_A_CLASS, SIZE = 100, 600, 32
SECONDS_BETWEEN_REPORTS = 5.0


def load(
  data_dir: str | os.PathLike[str],
  *,
  archives: str | os.PathLike[str] | None = None,
  verify_archives: bool = True,
  report: Report = lambda line: None,
) -> Splits:
  """Returns CIFAR-FS, with images `[M, 32, 32, 3]`, from a tfds data directory.

  If the data set is not in the directory yet, it is first prepared there. Each class has 600 images: the 500 training
  images and the 100 test images of CIFAR-100.

  Args:
    data_dir: Data directory of tfds. The data set is in its sub-directory `cifar100/3.0.2`. In `data_dir` and in
      `archives`, `~` is the home directory.
    archives: Directory that contains `cifar-100-binary.tar.gz`. By default the archive is downloaded.
    verify_archives: Whether the archive must have the registered checksum.
    report: Function that is called with a line of text before anything that takes seconds, and every few seconds while
      images are read.

  Raises:
    DatasetError: if a directory is missing or cannot be written, if the archive is missing, broken or not the
      registered one, if there is no network, or if the data in the directory is not CIFAR-100 in array_record files.
  """
  data_dir, report = at_home(data_dir), printing(report)
  archives = None if archives is None else at_home(archives)
  with reading('CIFAR-100', data_dir, 'cifar100'):
    builder = _builder(data_dir)
  if not builder.data_path.exists():
    with images_as_pillow(builder):
      prepare(builder, archives=archives, verify_archives=verify_archives, report=report)
  with reading('CIFAR-100', data_dir, 'cifar100'):
    return _read(builder, report)


def _builder(data_dir):
  import tensorflow_datasets as tfds  # The import takes seconds, and only loading data needs it.

  return tfds.builder('cifar100', data_dir=os.fspath(data_dir), file_format='array_record')


def _read(builder, report: Report) -> Splits:
  report(f'reading CIFAR-100 from {builder.data_path}')
  images, labels, ids = _read_splits(builder, report)
  if images.shape[1:] != (SIZE, SIZE, 3):
    raise ValueError(f'the images have shape {images.shape[1:]}')
  names = builder.info.features['label'].names
  lists = published_split('cifar_fs')
  wrong = sorted(set(names) ^ {name for part in lists for name in part})
  if wrong:
    raise DatasetError(
      f'{builder.data_path} has other classes than CIFAR-100: {wrong[0]} is missing or unknown; '
      'prepare it again in another data_dir'
    )
  sizes = np.bincount(labels, minlength=CLASSES)
  if not np.all(sizes == IMAGES_OF_A_CLASS):
    bad = int(np.flatnonzero(sizes != IMAGES_OF_A_CLASS)[0])
    raise DatasetError(
      f'{builder.data_path} is not the whole of CIFAR-100: {names[bad]} has {sizes[bad]} images where there should be '
      f'{IMAGES_OF_A_CLASS}; prepare it again in another data_dir'
    )
  order = np.lexsort((ids, labels))  # tfds shuffles. The ids restore the order of the archive within a class.
  return split_bank(ClassBank(images[order], sizes), names, lists)


def _read_splits(builder, report: Report) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns the images `[M, 32, 32, 3]`, labels `[M]` and ids `[M]` of all splits of the builder."""
  images, labels, ids = [], [], []
  reported = time.monotonic()
  with without_advice():
    for split in ('train', 'test'):
      for example in builder.as_data_source(split=split):
        images.append(np.asarray(example['image'], np.uint8))
        labels.append(int(example['label']))
        ids.append(example['id'])
        if time.monotonic() - reported >= SECONDS_BETWEEN_REPORTS:
          report(f'read {len(images):,} of {CLASSES * IMAGES_OF_A_CLASS:,} images')
          reported = time.monotonic()
  return np.stack(images), np.array(labels), np.array(ids)
