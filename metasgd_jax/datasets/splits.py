"""Splits classes into training, validation and test classes: by a seed, by lists of names, or as published.

The functions `split_by_…` and `published_split` split only the names of the classes. Their result, `ClassNames`, can be
inspected and saved. Then `split_bank` splits the images by these names.
"""

import collections
import importlib.resources
import itertools
import math
import numbers
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from metasgd_jax.datasets.messages import DatasetError
from metasgd_jax.io.files import PathLike, as_path, first_line
from metasgd_jax.tasks.few_shot import ClassBank


class Splits(NamedTuple):
  """Class banks of the three parts of a split. The parts have no class in common.

  Attributes:
    train: Bank of the classes to train on.
    validation: Bank of the classes to choose hyperparameters on. It is empty (C = 0) if the split has no such classes.
    test: Bank of the classes to test on.

  Example:
    >>> from metasgd_jax.datasets import Splits
    >>> images = np.zeros((25, 10, 28, 28, 1), np.uint8)
    >>> splits = Splits(*(ms.tasks.class_bank(part) for part in (images[:20], images[:0], images[20:])))
    >>> tasks = ms.tasks.few_shot(splits.train, way=5, shot=1, query=3)
    >>> [len(part.sizes) for part in splits]
    [20, 0, 5]
  """

  train: ClassBank
  validation: ClassBank
  test: ClassBank


class ClassNames(NamedTuple):
  """Names of the classes in each part of a split. A name is in at most one part.

  Attributes:
    train: Names of the classes to train on.
    validation: Names of the classes to choose hyperparameters on.
    test: Names of the classes to test on.

  Example:
    >>> from metasgd_jax.datasets import ClassNames
    >>> ClassNames(train=('cat', 'dog'), validation=(), test=('owl',)).train
    ('cat', 'dog')
  """

  train: tuple[str, ...]
  validation: tuple[str, ...]
  test: tuple[str, ...]


def split_by_seed(
  names: Sequence[str], *, seed: int = 0, train: float = 0.64, validation: float = 0.16, test: float = 0.2
) -> ClassNames:
  """Splits classes at random. The same names and seed give the same split, whatever the order of the names.

  If `train`, `validation` and `test` are all integers, they are numbers of classes, and classes beyond their sum are
  left out. Otherwise all three are fractions of the classes, and every class is used.

  Args:
    names: Names of all classes.
    seed: Seed of the random split.
    train: Number or fraction of the classes to train on.
    validation: Number or fraction of the classes to choose hyperparameters on; 0 for none.
    test: Number or fraction of the classes to test on.

  Raises:
    ValueError: if a name occurs twice, if a number is negative, if the numbers sum to more than the number of classes,
      if a fraction is negative, if the fractions do not sum to 1, or if a fraction is so small that it gives no class.

  Example:
    >>> from metasgd_jax.datasets import split_by_seed
    >>> names = split_by_seed([f'class {i}' for i in range(25)], seed=0)
    >>> len(names.train), len(names.validation), len(names.test)
    (16, 4, 5)
  """
  _check_unique(names, 'the names of the classes')
  ends = _ends(dict(train=train, validation=validation, test=test), len(names))
  order = np.random.default_rng(seed).permutation(len(names))
  by_name = sorted(names)
  return ClassNames(*(tuple(by_name[i] for i in sorted(part)) for part in np.split(order, ends)[:3]))


def split_by_lists(names: Sequence[str], lists: ClassNames) -> ClassNames:
  """Checks that each class in `lists` is listed once and is in `names`, and returns `lists`.

  A class of `names` that is in no list is left out.

  Args:
    names: Names of all classes.
    lists: Names of the classes in each part. `read_list` reads the names of one part from a file.

  Raises:
    ValueError: if a class occurs twice in the lists, or if a class in the lists is not in `names`.

  Example:
    >>> from metasgd_jax.datasets import ClassNames, split_by_lists
    >>> split_by_lists(['cat', 'dog', 'owl'], ClassNames(train=('cat',), validation=(), test=('owl',))).test
    ('owl',)
  """
  listed = [name for part in lists for name in part]
  _check_unique(listed, 'the lists of classes')
  if missing := sorted(set(listed) - set(names)):
    raise ValueError(f'the lists have {some(missing, "class", "classes")} that are not in the data; correct the lists')
  return ClassNames(*(tuple(part) for part in lists))


def read_list(path: PathLike) -> tuple[str, ...]:
  """Reads class names from a file with one name per line. Blank lines and lines that begin with # are left out.

  Args:
    path: Path of a text file in UTF-8. `~` is the home directory.

  Raises:
    DatasetError: if the file is missing, is not a regular file, or is not UTF-8 text.

  Example:
    >>> import pathlib, tempfile
    >>> from metasgd_jax.datasets import read_list
    >>> with tempfile.TemporaryDirectory() as directory:
    ...   path = pathlib.Path(directory) / 'train.txt'
    ...   _ = path.write_text('cat')
    ...   read_list(path)
    ('cat',)
  """
  return _names(read_text(as_path(path), 'the list of classes, which is UTF-8 text with one class name per line'))


def read_text(path: pathlib.Path, what: str) -> str:
  """Returns the text of a file.

  Args:
    path: Path of a file in UTF-8.
    what: Description of the file that is expected, such as 'a CSV file in UTF-8'. Error messages contain it.

  Raises:
    DatasetError: if the file is missing, is not a regular file, or is not UTF-8 text.
  """
  try:
    if os.path.lexists(path) and not path.is_file():  # Reading a pipe would wait forever.
      raise DatasetError(f'{path} is not a regular file; replace it by {what}')
    return path.read_text(encoding='utf-8-sig')
  except (OSError, ValueError) as e:
    raise DatasetError(
      f'{path} cannot be read as {what} ({getattr(e, "strerror", None) or first_line(e)}); provide such a file'
    ) from e


def published_split(dataset: str) -> ClassNames:
  """Returns the published split of a data set: the 64 / 16 / 20 classes that papers train, validate and test on.

  Args:
    dataset: Name of the data set. `mini_imagenet` gives the split of Ravi & Larochelle 2017, with WordNet ids as names.
      `cifar_fs` gives the split of Bertinetto et al. 2019, with the names of CIFAR-100's classes.

  Raises:
    ValueError: if `dataset` is neither of these.

  Example:
    >>> from metasgd_jax.datasets import published_split
    >>> [len(part) for part in published_split('mini_imagenet')]
    [64, 16, 20]
  """
  if dataset not in ('mini_imagenet', 'cifar_fs'):
    raise ValueError(f"dataset must be 'mini_imagenet' or 'cifar_fs', got {dataset!r}")
  return ClassNames(*(class_list(f'{dataset}_{part}') for part in ClassNames._fields))


def class_list(name: str) -> tuple[str, ...]:
  """Returns the class names in the file `metasgd_jax/datasets/class_lists/NAME.txt`."""
  return _names((importlib.resources.files('metasgd_jax.datasets') / 'class_lists' / f'{name}.txt').read_text('utf-8'))


def split_bank(bank: ClassBank, names: Sequence[str], lists: ClassNames) -> Splits:
  """Splits a class bank into the banks of the three parts.

  Args:
    bank: Class bank of C classes, with all their M images in one array `[M, H, W, D]`.
    names: Names of the C classes, in the order of the bank.
    lists: Names of the classes in each part. The classes of a part are returned in the order of its list.

  Raises:
    ValueError: if there are not C names, if a name occurs twice in `names` or in the lists, or if a class in the lists
      is not in `names`.

  Example:
    >>> from metasgd_jax.datasets import split_bank, split_by_seed
    >>> bank, names = ms.tasks.class_bank(np.zeros((25, 4, 8, 8, 1), np.uint8)), [f'class {i}' for i in range(25)]
    >>> parts = split_bank(bank, names, split_by_seed(names))
    >>> [len(part.sizes) for part in parts]
    [16, 4, 5]
  """
  if len(names) != len(bank.sizes):
    raise ValueError(f'a bank of {len(bank.sizes)} classes needs one name for each class, got {len(names)} names')
  _check_unique(names, 'the names of the classes')
  index = {name: c for c, name in enumerate(names)}
  parts = split_by_lists(names, lists)
  return Splits(*(_take(bank, [index[name] for name in part]) for part in parts))


def some(names: Sequence[str], one: str, many: str) -> str:
  """Returns a phrase such as "6 classes (a, b, c, d, e, …)": the number of names, and at most the first five names."""
  rest = ', …' if len(names) > 5 else ''
  return f'{len(names)} {one if len(names) == 1 else many} ({", ".join(names[:5])}{rest})'


def _take(bank, classes) -> ClassBank:
  sizes = np.asarray(bank.sizes)
  classes = np.array(classes, int)
  starts = np.cumsum(sizes) - sizes
  rows = [np.arange(starts[c], starts[c] + sizes[c]) for c in classes]
  return ClassBank(bank.images[np.concatenate([np.array([], int), *rows])], sizes[classes])


def _ends(shares: dict[str, float], classes: int) -> list[int]:
  """Returns for each part the number of classes in this part and in all parts before it."""
  ends = list(itertools.accumulate(shares.values()))
  text = ', '.join(f'{name}={value}' for name, value in shares.items())
  if all(isinstance(value, numbers.Integral) for value in shares.values()):
    if min(shares.values()) < 0 or ends[-1] > classes:
      raise ValueError(f'the numbers of classes must be 0 or more, and must sum to {classes} or less, got {text}')
    return [int(end) for end in ends]
  if not (all(0 <= value <= 1 for value in shares.values()) and math.isclose(ends[-1], 1, abs_tol=1e-6)):
    raise ValueError(f'fractions of classes must be 0 or more and sum to 1, got {text}')
  rounded = [round(classes * end) for end in ends]
  for (name, value), count in zip(shares.items(), np.diff(rounded, prepend=0), strict=True):
    if value > 0 and count == 0:
      raise ValueError(f'{name}={value} of {classes} classes rounds to 0; give numbers of classes, not fractions')
  return rounded


def _check_unique(names: Iterable[str], what: str) -> None:
  if twice := sorted(name for name, count in collections.Counter(names).items() if count > 1):
    raise ValueError(f'{what} have {some(twice, "class", "classes")} more than once; list each class only once')


def _names(text: str) -> tuple[str, ...]:
  lines = (line.strip() for line in text.splitlines())
  return tuple(line for line in lines if line and not line.startswith('#'))
