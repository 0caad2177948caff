"""CIFAR-FS (Bertinetto et al. 2019): CIFAR-100 from tfds' builder, with its 100 classes split into 64 / 16 / 20.

TensorFlow is not needed to prepare the data or to read it.
"""

import numpy as np

from metasgd_jax.datasets.messages import Report
from metasgd_jax.datasets.preparing import check_counts, examples, prepared
from metasgd_jax.datasets.splits import Splits, published_split, split_bank
from metasgd_jax.io.files import PathLike
from metasgd_jax.tasks.few_shot import ClassBank

CLASSES, IMAGES_OF_A_CLASS, SIZE = 100, 600, 32


def load(
  data_dir: PathLike,
  *,
  archives: PathLike | None = None,
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
    verify_archives: Whether the archive must have the checksum that is registered in tfds.
    report: Function that is called with a line of text before anything that takes seconds, and every few seconds while
      images are read.

  Raises:
    DatasetError: if a directory is missing or cannot be written, if the archive is missing, is broken or has
      another checksum, if there is no network, or if the data in the directory is not CIFAR-100 in array_record files.
  """
  with prepared('cifar100', 'CIFAR-100', data_dir, archives, verify_archives, report) as builder:
    return _read(builder, report)


def _read(builder, report: Report) -> Splits:
  found = list(examples(builder, report))
  images = np.stack([np.asarray(example['image'], np.uint8) for example in found])
  labels = np.array([int(example['label']) for example in found])
  ids = np.array([example['id'] for example in found])
  if images.shape[1:] != (SIZE, SIZE, 3):
    raise ValueError(f'the images have shape {images.shape[1:]}, expected ({SIZE}, {SIZE}, 3)')
  names = builder.info.features['label'].names
  lists = published_split('cifar_fs')
  if wrong := sorted(set(names) ^ {name for part in lists for name in part}):
    state = 'unknown' if wrong[0] in names else 'missing'
    raise ValueError(f'the classes of this data set are not those of CIFAR-100: {wrong[0]} is {state}')
  sizes = np.bincount(labels, minlength=CLASSES)
  check_counts(names, sizes, IMAGES_OF_A_CLASS, 'images')
  order = np.lexsort((ids, labels))  # tfds shuffles the images. The ids restore the order of the archive.
  return split_bank(ClassBank(images[order], sizes), names, lists)
