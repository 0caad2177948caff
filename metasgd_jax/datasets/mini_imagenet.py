"""mini-ImageNet (Vinyals et al. 2016) in Ravi & Larochelle's split, from image files in one of several layouts.

Because the images may not be redistributed, there is no standard layout of the folders. The class of an image is a
WordNet id, such as n01532829, which comes from one of three sources:

- If the directory has the files train.csv, val.csv or test.csv, the id is the label in these files.
- Otherwise, the id is the name of a folder on the path from the directory to the image. If several folders on the path
  have an id as their name, the folder that is closest to the image counts.
- If no folder on the path has an id as its name, the id is the beginning of the name of the image file.

The classes to train, validate and test on are always those of the published split, whatever the layout.
"""

import csv
import io
import os
import pathlib
import re
from collections.abc import Iterator

import numpy as np

from metasgd_jax.datasets import image_cache
from metasgd_jax.datasets.image_files import check_form, is_folder, list_directory, list_images, read_all
from metasgd_jax.datasets.image_folder import class_sizes
from metasgd_jax.datasets.messages import DatasetError, Report, printing
from metasgd_jax.datasets.splits import ClassNames, Splits, published_split, read_text, some
from metasgd_jax.io.files import PathLike, as_path, first_line
from metasgd_jax.tasks.few_shot import ClassBank

IMAGES_OF_A_CLASS = 600

_WORDNET_ID = re.compile(r'n\d{8}')
_NAME_WITH_ID = re.compile(r'(n\d{8})[_-]?\d+')
_LISTS = ('train', 'base', 'val', 'validation', 'test', 'novel')
"""Names of the CSV files, without the suffix."""


def load(
  directory: PathLike,
  *,
  size: int | tuple[int, int] = 84,
  cache: PathLike | None = None,
  report: Report = lambda line: None,
) -> Splits:
  """Returns mini-ImageNet as RGB banks of 64, 16 and 20 classes. The images of a class are sorted by file name.

  The directory has one of these layouts:

  - One folder per class, named by the WordNet id of the class.
  - Folders train, val and test (or base, val and novel) that contain one folder per class.
  - Images named `n01532829_00000005.jpg` or `n0153282900000005.jpg`, in the directory or in a sub-folder.
  - train.csv, val.csv and test.csv with the columns filename and label. The images are in the directory or in its
    sub-folder `images`.

  Classes that are not in mini-ImageNet are left out. A class with more or fewer than 600 images is used and reported.

  Args:
    directory: Directory that contains the images in one of the layouts above. In `directory` and in `cache`, `~` is
      the home directory.
    size: Height and width (H, W) of the images, or one number for both.
    cache: Directory in which decoded images are kept, about 1.3 GB at 84×84. The images are read from the cache as a
      memory map as long as the files in `directory` have the same names and sizes. By default nothing is cached.
    report: Function that is called with a line of text before images are read, and every few seconds while images are
      read.

  Raises:
    DatasetError: if the directory is missing or has the data only as pickles, if a class is missing, has no image that
      can be read or is in two folders, if a CSV file is broken or names a file outside of the directory, if a file is
      listed under two labels, or if the cache cannot be written.
    ValueError: if a size is not an integer of at least 1.
  """
  height, width = check_form(size, 3)
  directory, report = as_path(directory), printing(report)
  lists = published_split('mini_imagenet')
  classes = [name for part in lists for name in part]
  paths = _paths_by_class(directory, classes, report)
  class_of = {path: c for c, name in enumerate(classes) for path in paths[name]}

  def decode() -> ClassBank:
    report(f'reading {len(class_of):,} images of mini-ImageNet from {directory}')
    found = read_all(tuple(class_of), (height, width), 3, report)
    labels = [class_of[path] for path in found.paths]
    return ClassBank(found.images, class_sizes(directory, classes, labels, 'get the images of these classes again'))

  if cache is None:
    bank = decode()
  else:
    place = as_path(cache) / f'mini_imagenet_{height}x{width}'
    source = image_cache.fingerprint(directory, tuple(class_of))
    source['of_each_class'] = [len(paths[name]) for name in classes]  # CSV files may move images between classes.
    bank = image_cache.kept(place, source, (height, width, 3), len(classes), decode=decode, report=report)
  _report_sizes(bank.sizes, report)
  return _in_parts(bank, lists)


def _in_parts(bank: ClassBank, lists: ClassNames) -> Splits:
  """Splits a bank of all classes into the training, validation and test banks, without copying the images.

  The classes of the bank must be in the order of the three class lists, one list after the other.
  """
  sizes = np.split(bank.sizes, np.cumsum([len(part) for part in lists])[:-1])
  images = np.split(bank.images, np.cumsum([part.sum() for part in sizes])[:-1])
  return Splits(*map(ClassBank, images, sizes))


def _labelled(directory: pathlib.Path) -> Iterator[tuple[pathlib.Path, str]]:
  """Yields pairs (path of an image, WordNet id of its class). An image whose class is not known is left out."""
  lists = [path for path in list_directory(directory) if path.suffix.lower() == '.csv' and path.stem.lower() in _LISTS]
  for path in lists:
    yield from _listed(directory, path)
  if lists:
    return
  for path in list_images(directory):
    folders = path.relative_to(directory).parts[:-1]
    ids = [name for name in folders if _WORDNET_ID.fullmatch(name)]
    by_name = _NAME_WITH_ID.fullmatch(path.stem)
    if ids:
      yield path, ids[-1]
    elif by_name:
      yield path, by_name[1]


def _listed(directory: pathlib.Path, path: pathlib.Path) -> Iterator[tuple[pathlib.Path, str]]:
  """Yields a pair (path of an image, label) for each line of a CSV file."""
  folder = directory / 'images' if is_folder(directory / 'images') else directory
  rows = csv.DictReader(io.StringIO(read_text(path, 'a CSV file in UTF-8')))
  try:
    if not {'filename', 'label'} <= set(rows.fieldnames or ()):
      raise DatasetError(f'{path} has the columns {rows.fieldnames!s:.200}; its first line must be filename,label')
    for row in rows:
      name, label = row['filename'], row['label']
      if not name or not label:
        raise DatasetError(f'line {rows.line_num} of {path} has no filename or no label; correct the line')
      parts = re.split(r'[\\/]', name)
      if '..' in parts or '' in parts or '\0' in name or ':' in parts[0]:
        raise DatasetError(
          f'line {rows.line_num} of {path} names {name!r:.200}, which may be outside of {folder}; '
          'list only files in this folder'
        )
      yield folder.joinpath(*parts), label
  except csv.Error as e:
    raise DatasetError(f'{path} cannot be read as a CSV file ({first_line(e)}); correct the file') from e


def _paths_by_class(directory: pathlib.Path, classes: list[str], report: Report) -> dict[str, list[pathlib.Path]]:
  """Returns `{class: sorted paths of its image files}`. The dict has all of `classes`, and may have other classes."""
  label_of: dict[pathlib.Path, str] = {}
  for path, label in _labelled(directory):
    first = label_of.setdefault(path, label)
    if label != first:
      raise DatasetError(
        f'{path} is labelled as {first:.100} and as {label:.100} in the CSV files; '
        'keep one of the two lines, and remove the other'
      )
  paths: dict[str, list[pathlib.Path]] = {}
  for path in sorted(label_of):
    paths.setdefault(label_of[path], []).append(path)
  if missing := [name for name in classes if name not in paths]:
    raise DatasetError(_what_is_missing(directory, missing))
  if other := sorted(set(paths) - set(classes)):
    report(f'left out {some(other, "class", "classes")} that mini-ImageNet does not have')
  for name in classes:
    folders = sorted({os.fspath(path.parent) for path in paths[name]})
    if len(folders) > 1:
      raise DatasetError(
        f'the images of class {name} are in {folders[0]} and in {folders[1]}; '
        'keep one of these folders, and remove the other'
      )
  return paths


def _what_is_missing(directory, missing) -> str:
  if len(missing) < 100:
    return f'{directory} lacks {some(missing, "class", "classes")} of mini-ImageNet; add these classes'
  if names := [path.name for path in list_directory(directory) if path.suffix.lower() in ('.pkl', '.pickle')]:
    return (
      f'{directory} has mini-ImageNet only as pickles ({", ".join(names[:3])}), which are not read because opening a '
      'pickle runs any code that is in it; give the image files instead'
    )
  return (
    f'{directory} has no class of mini-ImageNet; it should have folders named by WordNet ids such as n01532829, '
    'images whose names begin with such an id, or train.csv, val.csv and test.csv'
  )


def _report_sizes(sizes: np.ndarray, report: Report) -> None:
  if other := int(np.sum(sizes != IMAGES_OF_A_CLASS)):
    what = f'{other} of {len(sizes)} classes have more or fewer than {IMAGES_OF_A_CLASS} images'
    report(f'{what}: {sizes.min()} to {sizes.max()}')
