"""Omniglot (Lake et al. 2015) from tfds' builder, as class banks: 1623 characters with 20 drawings each.

TensorFlow is not needed to prepare the data or to read it.
"""

from typing import NamedTuple

import numpy as np
from PIL import Image

from metasgd_jax.datasets.messages import Report
from metasgd_jax.datasets.preparing import check_counts, examples, prepared
from metasgd_jax.datasets.splits import Splits, class_list
from metasgd_jax.io.files import PathLike
from metasgd_jax.tasks.few_shot import class_bank

CHARACTERS, DRAWINGS, ORIGINAL, SIZE = 1623, 20, 105, 28
TRAIN_CHARACTERS = 1200
"""Number of random characters to train on in Li et al. 2017, section 4.2. The other 423 characters are for testing."""

_VINYALS_TEST_GURMUKHI = range(41, 45)  # The 42nd to 45th of the 45 characters. The others are for training.


class Characters(NamedTuple):
  """All characters of Omniglot.

  Attributes:
    images: Drawings of the characters, `[1623, 20, H, H, 1]` uint8. Ink is 255 and paper is 0.
    alphabets: Name of the alphabet of each character, `[1623]`.
    numbers: Number of each character in its alphabet, `[1623]`, counted from 0.
  """

  images: np.ndarray
  alphabets: np.ndarray
  numbers: np.ndarray


def load(
  data_dir: PathLike,
  *,
  archives: PathLike | None = None,
  verify_archives: bool = True,
  size: int = SIZE,
  report: Report = lambda line: None,
) -> Characters:
  """Returns Omniglot from a tfds data directory.

  If the data set is not in the directory yet, it is first prepared there. Drawings are scaled from 105×105 with
  Lanczos, as in MAML's code.

  Args:
    data_dir: Data directory of tfds. The data set is in its sub-directory `omniglot/3.0.0`. In `data_dir` and in
      `archives`, `~` is the home directory.
    archives: Directory that contains the four zip files of Omniglot under their original file names. By default
      the files are downloaded.
    verify_archives: Whether the archives must have the checksums that are registered in tfds.
    size: Height and width of a drawing in pixels, 1 to 105. The paper uses 28. Koch's network needs 105.
    report: Function that is called with a line of text before anything that takes seconds.

  Raises:
    ValueError: if `size` is not from 1 to 105.
    DatasetError: if a directory is missing or cannot be written, if an archive is missing, is broken or has another
      checksum, if there is no network, or if the data in the directory is not Omniglot in array_record files.
  """
  if not 1 <= size <= ORIGINAL:
    raise ValueError(f'size must be from 1 to {ORIGINAL} pixels, got {size}')
  with prepared('omniglot', 'Omniglot', data_dir, archives, verify_archives, report) as builder:
    return _read(builder, size, report)


def random_split(characters: Characters, *, seed: int = 0, validation: int = 0) -> Splits:
  """Returns a random split as in Li et al. 2017: 1200 characters to train on, and the other 423 to test on.

  Args:
    characters: All characters of Omniglot.
    seed: Seed of the random split.
    validation: Number of the 1200 characters that are used for validation instead of training. The test characters do
      not depend on this number.

  Raises:
    ValueError: if `validation` is not from 0 to 1199.
  """
  if not 0 <= validation < TRAIN_CHARACTERS:
    raise ValueError(f'`validation` must be from 0 to {TRAIN_CHARACTERS - 1} characters, got {validation}')
  order = np.random.default_rng(seed).permutation(CHARACTERS)
  parts = order[validation:TRAIN_CHARACTERS], order[:validation], order[TRAIN_CHARACTERS:]
  return _split(characters, *(np.sort(part) for part in parts))


def vinyals_split(characters: Characters) -> Splits:
  """Returns the split of Vinyals et al. 2016, which later papers use.

  The split has 1028 characters to train on, 172 for validation, and 423 to test on. All characters of an alphabet are
  in the same part, except those of Gurmukhi, which are divided between training and test.
  """
  alphabets = characters.alphabets
  cut = (alphabets == 'Gurmukhi') & np.isin(characters.numbers, _VINYALS_TEST_GURMUKHI)
  validation = np.isin(alphabets, class_list('omniglot_vinyals_validation'))
  test = np.isin(alphabets, class_list('omniglot_vinyals_test')) | cut
  return _split(characters, *(np.flatnonzero(part) for part in (~(validation | test), validation, test)))


def _split(characters, train, validation, test) -> Splits:
  return Splits(*(class_bank(characters.images[rows]) for rows in (train, validation, test)))


def _read(builder, size: int, report: Report) -> Characters:
  images = np.zeros((CHARACTERS, DRAWINGS, size, size, 1), np.uint8)
  alphabets = np.zeros(CHARACTERS, object)
  numbers = np.zeros(CHARACTERS, int)
  count = np.zeros(CHARACTERS, int)
  alphabet_name = builder.info.features['alphabet'].int2str
  for example in examples(builder, report):
    label = int(example['label'])
    if not 0 <= label < CHARACTERS or example['image'].shape[:2] != (ORIGINAL, ORIGINAL):
      raise ValueError(
        f'there is a drawing of character {label} with shape {example["image"].shape}, expected characters from 0 to '
        f'{CHARACTERS - 1} and drawings of {ORIGINAL}x{ORIGINAL} pixels'
      )
    if count[label] < DRAWINGS:
      images[label, count[label], :, :, 0] = _shrink(example['image'], size)
    count[label] += 1
    alphabets[label] = alphabet_name(int(example['alphabet']))
    numbers[label] = int(example['alphabet_char_id'])
  names = [f'character {label}' for label in range(CHARACTERS)]
  check_counts(names, count, DRAWINGS, 'drawings')
  return Characters(images, alphabets.astype(str), numbers)


def _shrink(image: np.ndarray, size: int) -> np.ndarray:
  # The value of paper is 1 with one PNG decoder and 255 with another. The value of ink is 0 with every decoder.
  ink = np.where(image[:, :, 0] > 0, 0, 255).astype(np.uint8)
  return np.asarray(Image.fromarray(ink).resize((size, size), Image.Resampling.LANCZOS))
