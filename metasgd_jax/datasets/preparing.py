"""Prepares the archives of a tfds builder as array_record files, and reads these files, without TensorFlow.

tfds reads array_record files without TensorFlow. When tfds prepares such files, it uses TensorFlow for three things,
which this module does in another way:

- tfds unpacks archives with TensorFlow. This module unpacks the archives beforehand, and gives the builder the folders.
- The builder's module lists directories and opens files with TensorFlow. While the builder runs, this module replaces
  the builder's `tf` with an object that does the same without TensorFlow.
- tfds encodes arrays as images with TensorFlow. This module gives tfds Pillow images instead of arrays.
"""

import contextlib
import importlib.util
import itertools
import os
import pathlib
import sys
import tempfile
import types
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from PIL import Image

from metasgd_jax.datasets.archives import is_archive, unpack
from metasgd_jax.datasets.messages import DatasetError, Report, printing, with_progress
from metasgd_jax.io.files import PathLike, as_path, first_line, why_not_writable


@contextlib.contextmanager
def prepared(
  name: str, what: str, data_dir: PathLike, archives: PathLike | None, verify: bool, report: Report
) -> Iterator[Any]:
  """Yields the builder of a data set, after the data set has been prepared in its data directory if necessary.

  An error that is raised in the `with` block becomes a DatasetError, because tfds raises many kinds of errors for files
  that it did not write.

  Args:
    name: Name of the data set for tfds.
    what: Name of the data set in messages.
    data_dir: Data directory of tfds. In `data_dir` and in `archives`, `~` is the home directory.
    archives: Directory that contains the zip or tar files under their original file names. If it is `None`, the
      files are downloaded.
    verify: Whether files from `archives` must have the checksums that are registered in tfds.
    report: Function that is called with a line of text before anything that takes seconds.

  Raises:
    DatasetError: if array_record is not installed, if the data directory cannot be written, if an archive is missing,
      is broken or has another checksum, if a download fails, or if any error is raised in the `with` block.
  """
  _check_array_record(what)
  data_dir, report = as_path(data_dir), printing(report)
  archives = None if archives is None else as_path(archives)
  verbosity = logging.get_verbosity()
  logging.set_verbosity(logging.ERROR)  # At each start, tfds gives advice about faster decoders.
  try:
    import tensorflow_datasets as tfds  # The import takes seconds, and only loading data needs it.

    builder = tfds.builder(name, data_dir=os.fspath(data_dir), file_format='array_record')
    if not builder.data_path.exists():
      _prepare(builder, data_dir, archives, verify, report)
    report(f'reading {what} from {builder.data_path}')
    yield builder
  except DatasetError:
    raise
  except Exception as e:
    raise DatasetError(
      f'{data_dir / name} is incomplete or damaged, so that {what} cannot be read from it ({first_line(e)}); '
      'prepare the data set again in another data_dir'
    ) from e
  finally:
    logging.set_verbosity(verbosity)


def examples(builder: Any, report: Report) -> Iterator[dict[str, Any]]:
  """Yields the training examples and then the test examples. Reports every few seconds how many have been read."""
  sources = [builder.as_data_source(split=split) for split in ('train', 'test')]
  return with_progress(itertools.chain(*sources), sum(map(len, sources)), report)


def check_counts(names: Sequence[str], counts: np.ndarray, expected: int, images: str) -> None:
  """Raises ValueError unless each class has the expected number of images.

  `images` is the word for the images in the message, such as 'drawings'.
  """
  wrong = np.flatnonzero(counts != expected)
  if wrong.size:
    raise ValueError(f'{names[wrong[0]]} has {counts[wrong[0]]} {images}, but it should have {expected}')


def _check_array_record(what: str) -> None:
  if importlib.util.find_spec('array_record') is None:
    raise DatasetError(
      f'{what} cannot be read, because array_record is not installed; pip install array_record, or on Windows, for '
      'which there is no array_record, use the Linux subsystem (WSL)'
    )


def _prepare(builder, data_dir: pathlib.Path, archives: pathlib.Path | None, verify: bool, report: Report) -> None:
  if reason := why_not_writable(data_dir):
    raise DatasetError(
      f'data_dir {data_dir} does not contain the data set, and the data set cannot be prepared there because the '
      f'directory cannot be written ({reason}); give a data_dir that contains the data set or that can be written'
    )
  paths = _download(builder, data_dir / 'downloads', report) if archives is None else _find(builder, archives, verify)
  report(f'preparing {builder.name} in {data_dir}; this is done only once and takes about a minute')
  with tempfile.TemporaryDirectory(dir=data_dir, prefix='.extracted-') as extract_dir:
    folders = {url: f'{extract_dir}/{i}' for i, url in enumerate(paths)}
    for url, path in paths.items():
      unpack(path, pathlib.Path(folders[url]))
    try:
      _write_records(builder, folders, sum(path.stat().st_size for path in paths.values()))
    except Exception as e:  # Builders raise many kinds of errors for bad archives.
      if isinstance(e, OSError) and not str(e.filename).startswith(extract_dir):
        raise DatasetError(
          f'{builder.name} cannot be prepared in {data_dir} ({first_line(e)}); free disk space or give another data_dir'
        ) from e
      raise DatasetError(
        f'the archives do not contain the whole of {builder.name} in the layout that tfds expects ({first_line(e)}); '
        'get them again'
      ) from e


def _download(builder: Any, download_dir: pathlib.Path, report: Report) -> dict[str, pathlib.Path]:
  """Downloads the archives of a tfds builder. Returns `{URL: path of the archive}`."""
  import requests
  import tensorflow_datasets as tfds

  report(f'downloading {builder.name} to {download_dir}')
  urls = list(builder.url_infos)
  try:
    requests.head(urls[0], timeout=20)  # Without a network, tfds would try for minutes before it fails.
    manager = builder._make_download_manager(download_dir, tfds.download.DownloadConfig())
    return {url: pathlib.Path(path) for url, path in zip(urls, manager.download(urls), strict=True)}
  except Exception as e:  # tfds raises several kinds of errors.
    raise DatasetError(
      f'{builder.data_path} does not exist, and {builder.name} could not be downloaded ({first_line(e)}); '
      f'check `data_dir`, or download {", ".join(urls)} in another way and give the directory of these files as the '
      'argument `archives`'
    ) from e


def _find(builder: Any, archives: pathlib.Path, verify: bool) -> dict[str, pathlib.Path]:
  """Finds the archives of a tfds builder in a directory and checks them. Returns `{URL: path of the archive}`."""
  import tensorflow_datasets as tfds

  if not archives.is_dir():
    raise DatasetError(
      f'the directory archives={archives} does not exist; give the directory that contains the archives, or leave '
      'the argument `archives` out to download them'
    )
  paths = {url: archives / registered.filename for url, registered in builder.url_infos.items()}
  if missing := [path.name for path in paths.values() if not path.is_file()]:
    raise DatasetError(
      f'{archives} has no {missing[0]}; put all of the archives there, under their original file names'
    )
  for url, path in paths.items():
    if not is_archive(path):
      kind = path.suffixes[0][1:]
      raise DatasetError(
        f'{path} is not a complete {kind} file ({path.stat().st_size} bytes); get the file again from {url}'
      )
    expected = builder.url_infos[url].checksum
    if verify and (found := tfds.core.download.checksums.compute_url_info(path).checksum) != expected:
      raise DatasetError(
        f'{path} is not the file that tfds expects: its sha256 is {found}, expected {expected}; get the file from '
        f'{url}, or turn verify_archives off (--noverify_archives) if you trust this file'
      )
  return paths


class _UnpackedArchives(NamedTuple):
  """Takes the place of tfds' download manager, because the archives are already unpacked.

  Attributes:
    folders: Folder with the contents of each archive: `{URL of the archive: folder}`.
    downloaded_size: Size of all archives in bytes, which tfds records in its description of the data set.
  """

  folders: dict[str, str]
  downloaded_size: int

  def download_and_extract(self, urls: Any) -> Any:
    """Returns the folder of the unpacked archive of a URL, or a dictionary of folders for a dictionary of URLs.

    tfds calls this method as if the object were tfds' own download manager. Nothing is downloaded or unpacked.
    """
    return jax.tree.map(self.folders.__getitem__, urls)


def _write_records(builder: Any, folders: dict[str, str], archives_size: int) -> None:
  """Runs a builder, which writes array_record files from unpacked archives, without TensorFlow."""
  generate_examples = builder._generate_examples

  def with_pillow_images(*args, **kwargs):
    for key, example in generate_examples(*args, **kwargs):
      if isinstance(example['image'], np.ndarray):
        example['image'] = Image.fromarray(example['image'])
      yield key, example

  def download_manager(**_options):
    return _UnpackedArchives(folders, archives_size)

  builder._generate_examples, builder._make_download_manager = with_pillow_images, download_manager
  module: Any = sys.modules[type(builder).__module__]
  tensorflow = module.tf
  gfile = types.SimpleNamespace(listdir=os.listdir, GFile=open)
  module.tf = types.SimpleNamespace(io=types.SimpleNamespace(gfile=gfile))
  try:
    builder.download_and_prepare(file_format='array_record')
  finally:
    module.tf = tensorflow
