"""Preparing a tfds builder's archives as array_record files, without TensorFlow.

tfds reads array_record files without TensorFlow. To prepare them it calls TensorFlow in three places: to unpack
archives, so they are unpacked here beforehand, to where tfds looks for them; in the builder's module, to list
directories and open files, so that module is lent a stand-in; and to encode images that come as arrays, so they are
handed to it as Pillow's.
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
  """Downloads, or takes from `archives`, the builder's archives and prepares the data set in its data directory.

  Args:
    builder: of tfds, with `file_format='array_record'`, not yet prepared.
    archives: a directory with the zip or tar files under their own names; None downloads them.
    verify_archives: whether files from `archives` must have the registered checksums.
    report: told what goes on.

  Raises:
    DatasetError: the data directory cannot be written; an archive is missing, broken or another than the registered
      one; a download fails.
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
  report(f'preparing {builder.name} in {data_dir}, once; it takes about a minute')
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
    except Exception as e:  # The builders check little of what they read.
      if isinstance(e, OSError) and not str(e.filename).startswith(extract_dir):
        raise DatasetError(f'{builder.name} cannot be prepared in {data_dir} ({first_line(e)})') from e
      raise DatasetError(
        f'the archives do not hold the whole of {builder.name}, or not in its layout ({first_line(e)}); get them again'
      ) from e


@contextlib.contextmanager
def images_as_pillow(builder: Any) -> Iterator[None]:
  """Lets a builder whose examples have arrays as images hand them on as Pillow's, which tfds encodes itself."""
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
  """Turns what is raised at prepared files that are not what tfds wrote, of many kinds, into one error.

  Args:
    what: the data set, as people call it.
    data_dir: tfds' data directory.
    name: the data set's folder in it.

  Raises:
    DatasetError: whatever was raised; or there is something in the folder that is no file.
  """
  try:
    for path in (data_dir / name).rglob('*'):
      if not path.is_file() and not path.is_dir():  # To open a pipe would wait for ever.
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
  """Leaves out what tfds logs of decoders that are not installed, at each start."""
  before = logging.get_verbosity()
  logging.set_verbosity(logging.ERROR)
  try:
    yield
  finally:
    logging.set_verbosity(before)


def _make_writable(data_dir: pathlib.Path) -> None:
  if reason := why_not_writable(data_dir):
    raise DatasetError(
      f'data_dir {data_dir} does not have the data set and cannot be written to prepare it there ({reason}); '
      'give a data_dir that has it or that can be written'
    )


def _find(archives: pathlib.Path, name: str) -> pathlib.Path:
  if not archives.is_dir():
    raise DatasetError(f'the directory of archives {archives} does not exist')
  path = archives / name
  if not path.is_file():
    raise DatasetError(f'{archives} has no {name}; put all of the archives there, under their own names')
  return path


def _check(builder, url: str, path: pathlib.Path, verify: bool) -> Any:
  """Returns what tfds calls the file's UrlInfo: its size and checksum."""
  import tensorflow_datasets as tfds

  kind = 'zip' if path.suffix == '.zip' else 'tar'
  if not is_archive(path):
    raise DatasetError(f'{path} is not a whole {kind} file ({path.stat().st_size} bytes); get it again from {url}')
  found = tfds.core.download.checksums.compute_url_info(path)
  if verify and found != builder.url_infos[url]:
    raise DatasetError(
      f'{path} is not the registered file: its sha256 is {found.checksum}, expected '
      f'{builder.url_infos[url].checksum}; get it from {url}, or, if you trust it, turn verify_archives off '
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
    requests.head(urls[0], timeout=20)  # tfds would try for minutes before it says that there is no network.
    return [pathlib.Path(os.fspath(path)) for path in manager.download(urls)]
  except (
    requests.RequestException,
    tfds.download.DownloadError,
    download_manager.NonMatchingChecksumError,
    OSError,
  ) as e:
    raise DatasetError(
      f'{builder.data_path} does not exist, and {builder.name} could not be downloaded ({first_line(e)}); '
      f'check data_dir, or get {", ".join(urls)} elsewhere and give their directory as archives'
    ) from e


@contextlib.contextmanager
def _registered(url_infos: dict[str, Any], found: dict[str, Any]) -> Iterator[None]:
  """Lends the builder the checksums of files that the user vouches for; it is shared by all builders, so put back."""
  original = dict(url_infos)
  url_infos.update(found)
  try:
    yield
  finally:
    url_infos.update(original)


@contextlib.contextmanager
def _without_tensorflow(builder) -> Iterator[None]:
  """Lends the builder's module a `tf` that lists directories and opens files, where TensorFlow is not installed."""
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
