"""mini-ImageNet (Vinyals et al. 2016) in Ravi & Larochelle's split, from image files in any of the usual layouts.

Nobody may hand the images out, so they come as many kinds of folder. An image's class is the WordNet id, such as
n01532829, of the folder that it is in, whatever lies above or below; or else that which its own name begins with; or,
where train.csv, val.csv and test.csv lie beside the images, the label that they give. Which class is trained on and
which is tested on is always as published.
"""

import csv
import os
import pathlib
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from metasgd_jax.datasets import image_cache
from metasgd_jax.datasets.image_files import check_form, is_folder, list_directory, list_images, read_all
from metasgd_jax.datasets.messages import DatasetError, Report, at_home, first_line, printing
from metasgd_jax.datasets.splits import ClassNames, Splits, published_split, some
from metasgd_jax.tasks.few_shot import ClassBank

IMAGES_OF_A_CLASS = 600

_WORDNET_ID = re.compile(r'n\d{8}')
_NAME_WITH_ID = re.compile(r'(n\d{8})[_-]?\d+')
_PARTS = {  # a folder's or a CSV's name → the part of the split it claims to be
  'train': 'train', 'base': 'train', 'val': 'validation', 'validation': 'validation', 'test': 'test', 'novel': 'test',
}  # fmt: skip


class _Source(NamedTuple):
  """An image file, its class, and the part of a split that the layout puts it in, if any."""

  path: pathlib.Path
  wordnet_id: str
  part: str | None


def load(
  directory: str | os.PathLike[str],
  *,
  size: int | tuple[int, int] = 84,
  cache: str | os.PathLike[str] | None = None,
  report: Report = lambda line: None,
) -> Splits:
  """Returns mini-ImageNet as RGB banks of 64, 16 and 20 classes; a class's images are sorted by file name.

  The directory holds one of: a folder per class, named by its WordNet id; folders train, val and test (or base, val
  and novel) with such folders in them; images named `n01532829_00000005.jpg` or `n0153282900000005.jpg`, there or in a
  sub-folder; train.csv, val.csv and test.csv of columns filename and label, with the images beside them or in `images`.
  Classes that are not mini-ImageNet's are left out; classes of other than 600 images are taken and reported.

  Args:
    directory: as above; `~` is the home directory, here and in cache.
    size: H = W, or (H, W).
    cache: a directory in which decoded images are kept, about 1.3 GB at 84×84; they are read from there, as a memory
      map, while the files in `directory` have the same names and sizes.
    report: called with a line before, and every few seconds while, images are read.

  Raises:
    DatasetError: the directory is missing or has only pickles, a class is missing, has no image that can be read or
      lies in two folders, a CSV is broken or names a file outside the directory, a file is listed under two labels, or
      the cache cannot be written.
    ValueError: a size below 1.
  """
  height, width = check_form(size, 3)
  directory, report = at_home(directory), printing(report)
  lists = published_split('mini_imagenet')
  classes = [name for part in lists for name in part]
  sources = _of_classes(directory, list(_sources(directory)), classes, report)
  paths = [source.path for name in classes for source in sources[name]]
  labels = [c for c, name in enumerate(classes) for _ in sources[name]]
  _report_other_parts(sources, lists, report)

  def decode():
    return _decode(directory, classes, paths, labels, (height, width), report)

  if cache is None:
    bank = decode()
  else:
    place = image_cache.Cache(at_home(cache), f'mini_imagenet_{height}x{width}')
    source = image_cache.fingerprint(directory, paths)
    source['of_each_class'] = [len(sources[name]) for name in classes]  # Of a list that moves an image between classes.
    bank = image_cache.kept(place, source, (height, width, 3), len(classes), decode=decode, report=report)
  _report_sizes(bank.sizes, report)
  return _deal(bank, lists)


def _deal(bank, lists) -> Splits:
  """Cuts a bank of all classes, in the lists' order, in three without a copy."""
  class_ends = np.cumsum([len(part) for part in lists])
  image_ends = [int(bank.sizes[:end].sum()) for end in class_ends]
  starts = zip([0, *class_ends[:-1]], class_ends, [0, *image_ends[:-1]], image_ends, strict=True)
  return Splits(*(ClassBank(bank.images[i:j], bank.sizes[c:d]) for c, d, i, j in starts))


def _decode(directory, classes, paths, labels, size, report) -> ClassBank:
  report(f'reading {len(paths):,} images of mini-ImageNet from {directory}')
  found = read_all(paths, size, 3, report)
  skipped = {path for path, _ in found.skipped}
  read = [c for path, c in zip(paths, labels, strict=True) if path not in skipped]
  sizes = np.bincount(read, minlength=len(classes)).astype(int)
  if empty := [name for name, count in zip(classes, sizes, strict=True) if count == 0]:
    raise DatasetError(
      f'{directory} has {some(empty, "class", "classes")} of mini-ImageNet without an image that can be read; '
      'get them again'
    )
  return ClassBank(found.images, sizes)


def _sources(directory: pathlib.Path) -> Iterator[_Source]:
  """Yields the images of all WordNet ids that the directory has."""
  entries = list_directory(directory)
  lists = [path for path in entries if path.suffix.lower() == '.csv' and path.stem.lower() in _PARTS]
  if lists:
    for path in lists:
      yield from _listed(directory, path)
    return
  for path in list_images(directory):
    folders = path.relative_to(directory).parts[:-1]
    part = next((_PARTS[name.lower()] for name in folders if name.lower() in _PARTS), None)
    ids = [name for name in folders if _WORDNET_ID.fullmatch(name)]
    by_name = _NAME_WITH_ID.fullmatch(path.stem)
    if ids:
      yield _Source(path, ids[-1], part)
    elif by_name:
      yield _Source(path, by_name[1], part)


def _listed(directory: pathlib.Path, path: pathlib.Path) -> Iterator[_Source]:
  """Yields the images that a CSV file names."""
  folder = directory / 'images' if is_folder(directory / 'images') else directory
  if not path.is_file():  # To open a pipe would wait for ever.
    raise DatasetError(f'{path} is not a file; take it away, or put the list there')
  try:
    with path.open(newline='', encoding='utf-8-sig') as file:
      rows = csv.DictReader(file)
      if not {'filename', 'label'} <= set(rows.fieldnames or ()):
        raise DatasetError(f'{path} has the columns {rows.fieldnames!s:.200}; its first line must be filename,label')
      for row in rows:
        name, label = row['filename'], row['label']
        if not name or not label:
          raise DatasetError(f'line {rows.line_num} of {path} has no filename or no label; correct it')
        parts = re.split(r'[\\/]', name)
        if '..' in parts or '' in parts or '\0' in name or ':' in parts[0]:
          raise DatasetError(
            f'line {rows.line_num} of {path} names {name!r:.200}, which may lie outside {folder}; '
            'give names of files in it'
          )
        yield _Source(folder.joinpath(*parts), label, _PARTS[path.stem.lower()])
  except (csv.Error, UnicodeDecodeError, OSError) as e:
    raise DatasetError(f'{path} cannot be read as a CSV file ({first_line(e)})') from e


def _of_classes(directory, found: list[_Source], classes: list[str], report: Report) -> dict[str, list[_Source]]:
  """Returns the sources of each class of mini-ImageNet, sorted by file name."""
  sources: dict[str, dict[pathlib.Path, _Source]] = {}
  label_of: dict[pathlib.Path, str] = {}
  for source in found:
    label = label_of.setdefault(source.path, source.wordnet_id)
    if label != source.wordnet_id:
      raise DatasetError(f'{source.path} is listed as {label:.100} and as {source.wordnet_id:.100}; leave one of them')
    sources.setdefault(source.wordnet_id, {})[source.path] = source
  if missing := [name for name in classes if name not in sources]:
    raise DatasetError(_what_is_missing(directory, missing))
  if other := sorted(set(sources) - set(classes)):
    report(f'left out {some(other, "class", "classes")} that mini-ImageNet does not have')
  for name in classes:
    folders = sorted({os.fspath(path.parent) for path in sources[name]})
    if len(folders) > 1:
      raise DatasetError(f'the images of class {name} lie in {folders[0]} and in {folders[1]}; leave one of them')
  return {name: [sources[name][path] for path in sorted(sources[name])] for name in classes}


def _what_is_missing(directory, missing) -> str:
  if len(missing) < 100:
    return f'{directory} lacks {some(missing, "class", "classes")} of mini-ImageNet; add them'
  names = [path.name for path in list_directory(directory) if path.suffix.lower() in ('.pkl', '.pickle')]
  if names:
    return (
      f'{directory} has mini-ImageNet only as pickles ({", ".join(names[:3])}), which are not read because opening a '
      'pickle runs whatever code is in it; give the image files'
    )
  return (
    f'{directory} has no class of mini-ImageNet; it should have folders named by WordNet ids such as n01532829, '
    'images whose names begin with them, or train.csv, val.csv and test.csv'
  )


def _report_other_parts(sources, lists: ClassNames, report: Report) -> None:
  for part, names in lists._asdict().items():
    if other := [name for name in names if sources[name][0].part not in (None, part)]:
      report(f'the published {part} has {some(other, "class", "classes")} that lie elsewhere here; it is as published')


def _report_sizes(sizes, report: Report) -> None:
  other = int(np.sum(sizes != IMAGES_OF_A_CLASS))
  if other:
    least, most = sizes.min(), sizes.max()
    report(f'{other} of {len(sizes)} classes have other than {IMAGES_OF_A_CLASS} images: {least} to {most}')
