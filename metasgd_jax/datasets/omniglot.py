"""Omniglot (Lake et al. 2015) through tfds' own builder: 1623 characters, 20 drawings each, as class banks.

TensorFlow is not needed, neither to read nor to prepare the data.
"""

import os
from typing import NamedTuple

import numpy as np
from PIL import Image

from metasgd_jax.datasets.messages import DatasetError, Report, at_home, printing
from metasgd_jax.datasets.preparing import prepare, reading, without_advice
from metasgd_jax.datasets.splits import Splits
from metasgd_jax.tasks.few_shot import class_bank

CHARACTERS, DRAWINGS, ORIGINAL, SIZE = 1623, 20, 105, 28
TRAIN_CHARACTERS = 1200
"""Li et al. 2017, section 4.2: a random 1200 characters to train on, the other 423 to test."""

_VINYALS_VALIDATION = ('Armenian', 'Bengali', 'Early_Aramaic', 'Hebrew', 'Mkhedruli_(Georgian)')
_VINYALS_TEST = (
  'Kannada', 'Keble', 'Malayalam', 'Manipuri', 'Mongolian', 'Old_Church_Slavonic_(Cyrillic)', 'Oriya', 'Sylheti',
  'Syriac_(Serto)', 'Tengwar', 'Tibetan', 'ULOG',
)  # fmt: skip
_VINYALS_TEST_GURMUKHI = range(41, 45)  # The split cuts the alphabet Gurmukhi: its characters 42 to 45 are tested on.


class Characters(NamedTuple):
  """All of Omniglot.

  Attributes:
    images: `[1623, 20, H, H, 1]` uint8; ink is 255, paper 0.
    alphabets: `[1623]`, the alphabet of each character.
    numbers: `[1623]`, its number in the alphabet, from 0.
  """

  images: np.ndarray
  alphabets: np.ndarray
  numbers: np.ndarray


def load(
  data_dir: str | os.PathLike[str],
  *,
  archives: str | os.PathLike[str] | None = None,
  verify_archives: bool = True,
  size: int = SIZE,
  report: Report = lambda line: None,
) -> Characters:
  """Returns Omniglot from a tfds data directory, preparing it there first where it is not yet.

  Drawings are scaled from 105×105 with Lanczos, as MAML's code does.

  Args:
    data_dir: tfds' data directory: what contains `omniglot/3.0.0`. `~` is the home directory, here and in archives.
    archives: a directory with Omniglot's four zip files under their own names; without it they are downloaded.
    verify_archives: whether the archives must be the registered ones, by checksum.
    size: height and width of a drawing, 1 to 105; the paper's 28. Koch's network wants 105.
    report: called with a line before anything that takes seconds.

  Raises:
    ValueError: another size.
    DatasetError: the directory is missing or cannot be written, an archive is missing, broken or another than the
      registered one, there is no network, or the data found is not Omniglot in array_record files.
  """
  if not 1 <= size <= ORIGINAL:
    raise ValueError(f'size must be from 1 to {ORIGINAL} pixels, got {size}')
  data_dir, report = at_home(data_dir), printing(report)
  archives = None if archives is None else at_home(archives)
  with reading('Omniglot', data_dir, 'omniglot'):
    builder = _builder(data_dir)
  if not builder.data_path.exists():
    prepare(builder, archives=archives, verify_archives=verify_archives, report=report)
  with reading('Omniglot', data_dir, 'omniglot'):
    return _read(builder, size, report)


def random_split(characters: Characters, *, seed: int = 0, validation: int = 0) -> Splits:
  """Returns the paper's kind of split: 1200 characters at random to train on, the other 423 to test.

  Args:
    characters: all of them.
    seed: which of the random splits.
    validation: how many of the 1200 to keep back for validation; the test characters stay the same.

  Raises:
    ValueError: a validation that is not from 0 to 1199.
  """
  if not 0 <= validation < TRAIN_CHARACTERS:
    raise ValueError(f'validation must be from 0 to {TRAIN_CHARACTERS - 1} characters, got {validation}')
  order = np.random.default_rng(seed).permutation(CHARACTERS)
  parts = order[validation:TRAIN_CHARACTERS], order[:validation], order[TRAIN_CHARACTERS:]
  return _split(characters, *(np.sort(part) for part in parts))


def vinyals_split(characters: Characters) -> Splits:
  """Returns the split by alphabets that later papers use (Vinyals et al. 2016): 1028 / 172 / 423 characters."""
  alphabets = characters.alphabets
  cut = (alphabets == 'Gurmukhi') & np.isin(characters.numbers, _VINYALS_TEST_GURMUKHI)
  validation = np.isin(alphabets, _VINYALS_VALIDATION)
  test = np.isin(alphabets, _VINYALS_TEST) | cut
  return _split(characters, *(np.flatnonzero(m) for m in (~(validation | test), validation, test)))


def _split(characters, train, validation, test) -> Splits:
  return Splits(*(class_bank(characters.images[rows]) for rows in (train, validation, test)))


def _builder(data_dir):
  import tensorflow_datasets as tfds  # Takes seconds, and is needed by those who load data alone.

  return tfds.builder('omniglot', data_dir=os.fspath(data_dir), file_format='array_record')


def _read(builder, size: int, report: Report) -> Characters:
  report(f'reading Omniglot from {builder.data_path}')
  images = np.zeros((CHARACTERS, DRAWINGS, size, size, 1), np.uint8)
  alphabets = np.zeros(CHARACTERS, object)
  numbers = np.zeros(CHARACTERS, int)
  count = np.zeros(CHARACTERS, int)
  alphabet_name = builder.info.features['alphabet'].int2str
  with without_advice():
    for split in ('train', 'test'):
      for example in builder.as_data_source(split=split):
        label = int(example['label'])
        if not 0 <= label < CHARACTERS or example['image'].shape[:2] != (ORIGINAL, ORIGINAL):
          raise ValueError(f'a drawing of character {label} and of shape {example["image"].shape}')
        if count[label] < DRAWINGS:
          images[label, count[label], :, :, 0] = _shrink(example['image'], size)
        count[label] += 1
        alphabets[label] = alphabet_name(int(example['alphabet']))
        numbers[label] = int(example['alphabet_char_id'])
  if not np.all(count == DRAWINGS):
    bad = int(np.flatnonzero(count != DRAWINGS)[0])
    raise DatasetError(
      f'{builder.data_path} is not the whole of Omniglot: character {bad} has {count[bad]} drawings where there '
      f'should be {DRAWINGS}; prepare it again in another data_dir'
    )
  return Characters(images, alphabets.astype(str), numbers)


def _shrink(image: np.ndarray, size: int) -> np.ndarray:
  # Paper is 1 with one PNG decoder and 255 with another; ink is 0 with all.
  ink = np.where(image[:, :, 0] > 0, 0, 255).astype(np.uint8)
  return np.asarray(Image.fromarray(ink).resize((size, size), Image.Resampling.LANCZOS))
