"""Prepares the archives of a tfds builder as array_record files, without TensorFlow.

tfds reads array_record files without TensorFlow. To prepare them, tfds calls TensorFlow in three places, which this
module replaces:

- tfds unpacks archives. This module unpacks the archives beforehand, to the folder where tfds looks for the contents.
- The builder's module lists directories and opens files. This module replaces the builder's `tf` for that time.
- tfds encodes images that are arrays. This module passes Pillow images to tfds instead.
"""

import contextlib
import importlib.util
import os
import pathlib
import sys
import tempfile
import types
from collections.abc import Iterator
from typing import Any

from absl import logging
from PIL import Image

from metasgd_jax.datasets.archives import is_archive, unpack
from metasgd_jax.datasets.messages import DatasetError, Report, first_line
from metasgd_jax.io.files import why_not_writable


def prepare(builder: Any, *, archives: str | os.PathLike[str] | None, verify_archives: bool, report: Report) -> None:
  """Prepares a data set in the builder's data directory, from archives that are given or downloaded.

  Args:
    builder: Builder of tfds with `file_format='array_record'`. Its data set must not be prepared yet.
    archives: Directory that contains the zip or tar files under their own names. If it is `None`, the files are
      downloaded.
    verify_archives: Whether files from `archives` must have the registered checksums.
    report: Function that is called with a line of text before anything that takes seconds.

  Raises:
    DatasetError: if the data directory cannot be written, if an archive is missing, broken or not the registered one,
      or if a download fails.
  """
  import tensorflow_datasets as tfds

  data_dir = pathlib.Path(os.fspath(builder.data_path)).parents[1]
  download_dir = data_dir / 'downloads'
  urls = list(builder.url_infos)
  found = {}
  if archives is None:
    _make_writable(data_dir)
    paths = _download(builder, download_dir, urls, report)
  else:
    paths = [_find(pathlib.Path(archives), builder.url_infos[url].filename) for url in urls]
    found = {url: _check(builder, url, path, verify_archives) for url, path in zip(urls, paths, strict=True)}
    _make_writable(data_dir)
  report(f'preparing {builder.name} in {data_dir}; this is done only once and takes about a minute')
  with tempfile.TemporaryDirectory(dir=data_dir, prefix='.extracted-') as extract_dir:
    for path in paths:
      method = tfds.download.Resource(path=path).extract_method.name
      unpack(path, pathlib.Path(extract_dir) / f'{method}.{path.name}')
    config = tfds.download.DownloadConfig(
      extract_dir=extract_dir, manual_dir=None if archives is None else pathlib.Path(archives)
    )
    try:
      with _without_tensorflow(builder), _registered(builder.url_infos, found):
        builder.download_and_prepare(
          download_dir=os.fspath(download_dir), download_config=config, file_format='array_record'
        )
    except Exception as e:  # Builders raise many kinds of errors for bad archives.
      if isinstance(e, OSError) and not str(e.filename).startswith(extract_dir):
        raise DatasetError(
          f'{builder.name} cannot be prepared in {data_dir} ({first_line(e)}); free disk space or give another data_dir'
        ) from e
      raise DatasetError(
        f'the archives do not contain the whole of {builder.name} in its layout ({first_line(e)}); get them again'
      ) from e


@contextlib.contextmanager
def images_as_pillow(builder: Any) -> Iterator[None]:
  """Makes a builder yield Pillow images instead of arrays. tfds encodes Pillow images without TensorFlow."""
  generate = builder._generate_examples

  def examples(*args):
    for key, example in generate(*args):
      yield key, {**example, 'image': Image.fromarray(example['image'])}

  builder._generate_examples = examples
  try:
    yield
  finally:
    del builder._generate_examples


@contextlib.contextmanager
def reading(what: str, data_dir: pathlib.Path, name: str) -> Iterator[None]:
  """Turns any error that is raised while prepared files are read into a DatasetError.

  tfds raises many kinds of errors for files that it did not write.

  Args:
    what: Name of the data set in messages.
    data_dir: Data directory of tfds.
    name: Name of the data set's folder in `data_dir`.

  Raises:
    DatasetError: if any error is raised, or if the folder contains something that is neither a file nor a folder.
  """
  try:
    for path in (data_dir / name).rglob('*'):
      if not path.is_file() and not path.is_dir():  # Opening a pipe would wait forever.
        raise DatasetError(f'{path} is not a file; prepare {what} again in another data_dir')
    yield
  except DatasetError:
    raise
  except Exception as e:
    raise DatasetError(
      f'{data_dir / name} cannot be read as array_record files of {what} ({first_line(e)}); '
      'prepare it again in another data_dir'
    ) from e


@contextlib.contextmanager
def without_advice() -> Iterator[None]:
  """Hides the messages about missing decoders that tfds logs at each start."""
  before = logging.get_verbosity()
  logging.set_verbosity(logging.ERROR)
  try:
    yield
  finally:
    logging.set_verbosity(before)


def _make_writable(data_dir: pathlib.Path) -> None:
  if reason := why_not_writable(data_dir):
    raise DatasetError(
      f'data_dir {data_dir} does not contain the data set and cannot be written to prepare the data set ({reason}); '
      'give a data_dir that contains the data set or that can be written'
    )


def _find(archives: pathlib.Path, name: str) -> pathlib.Path:
  if not archives.is_dir():
    raise DatasetError(f'the directory of archives {archives} does not exist')
  path = archives / name
  if not path.is_file():
    raise DatasetError(f'{archives} has no {name}; put all of the archives there, under their own names')
  return path


def _check(builder, url: str, path: pathlib.Path, verify: bool) -> Any:
  """Returns the size and the checksum of an archive, which tfds calls UrlInfo, after a check of the archive."""
  import tensorflow_datasets as tfds

  kind = 'zip' if path.suffix == '.zip' else 'tar'
  if not is_archive(path):
    raise DatasetError(f'{path} is not a whole {kind} file ({path.stat().st_size} bytes); get it again from {url}')
  found = tfds.core.download.checksums.compute_url_info(path)
  if verify and found != builder.url_infos[url]:
    raise DatasetError(
      f'{path} is not the registered file: its sha256 is {found.checksum}, expected '
      f'{builder.url_infos[url].checksum}; get it from {url}, or if you trust the file, turn verify_archives off '
      '(--noverify_archives)'
    )
  return found


def _download(builder, download_dir: pathlib.Path, urls: list[str], report: Report) -> list[pathlib.Path]:
  import requests
  import tensorflow_datasets as tfds
  from tensorflow_datasets.core.download import download_manager

  report(f'downloading {builder.name} to {download_dir}')
  manager = tfds.download.DownloadManager(
    download_dir=download_dir, url_infos=dict(builder.url_infos), dataset_name=builder.name
  )
  try:
    requests.head(urls[0], timeout=20)  # Without a network, tfds would try for minutes before it fails.
    return [pathlib.Path(os.fspath(path)) for path in manager.download(urls)]
  except (
    requests.RequestException,
    tfds.download.DownloadError,
    download_manager.NonMatchingChecksumError,
    OSError,
  ) as e:
    raise DatasetError(
      f'{builder.data_path} does not exist, and {builder.name} could not be downloaded ({first_line(e)}); '
      f'check data_dir, or get {", ".join(urls)} in another way and give their directory as archives'
    ) from e


@contextlib.contextmanager
def _registered(url_infos: dict[str, Any], found: dict[str, Any]) -> Iterator[None]:
  """Gives the builder the checksums of files that the user trusts.

  All builders share one table of checksums, so the original table is restored at the end.
  """
  original = dict(url_infos)
  url_infos.update(found)
  try:
    yield
  finally:
    url_infos.update(original)


@contextlib.contextmanager
def _without_tensorflow(builder) -> Iterator[None]:
  """Replaces `tf` in the builder's module for a while, if TensorFlow is not installed.

  The replacement can list directories and open files.
  """
  module: Any = sys.modules[type(builder).__module__]
  if importlib.util.find_spec('tensorflow') is not None:
    yield
    return
  original = module.tf
  gfile = types.SimpleNamespace(listdir=os.listdir, GFile=open)
  module.tf = types.SimpleNamespace(io=types.SimpleNamespace(gfile=gfile))
  try:
    yield
  finally:
    module.tf = original
