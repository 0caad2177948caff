"""Decoded images kept on disk, so that files are decoded once: a .npy file and a .json that says what is in it."""

import hashlib
import json
import os
import pathlib
import tempfile
from collections.abc import Callable, Sequence
from typing import IO, Any, NamedTuple

import numpy as np

from metasgd_jax.datasets.messages import DatasetError, Report, first_line
from metasgd_jax.tasks.few_shot import ClassBank

DECODING = 1
"""Counts the ways of decoding that there have been; what another one decoded is decoded again."""


class Cache(NamedTuple):
  """Where a bank is kept: `directory/name.npy` and `directory/name.json`."""

  directory: pathlib.Path
  name: str

  @property
  def images(self) -> pathlib.Path:
    """The images, `[M, H, W, D]` uint8."""
    return self.directory / f'{self.name}.npy'

  @property
  def description(self) -> pathlib.Path:
    """The fingerprint of the files they come from, and the sizes of the classes."""
    return self.directory / f'{self.name}.json'


def fingerprint(directory: pathlib.Path, paths: Sequence[pathlib.Path]) -> dict[str, Any]:
  """Returns what tells one set of files from another: their number, their bytes and a hash of names and sizes."""
  digest, total = hashlib.sha256(), 0
  for path in paths:
    try:
      size = path.stat().st_size
    except OSError:
      size = -1
    total += max(size, 0)
    digest.update(f'{path.relative_to(directory).as_posix()}\0{size}\n'.encode('utf-8', 'surrogateescape'))
  return dict(decoding=DECODING, files=len(paths), bytes=total, sha256=digest.hexdigest())


def kept(
  cache: Cache,
  source: dict[str, Any],
  form: tuple[int, int, int],
  classes: int,
  *,
  decode: Callable[[], ClassBank],
  report: Report,
) -> ClassBank:
  """Returns the bank as a memory map of what is kept, or else decodes it and keeps it.

  Args:
    cache: where it is kept.
    source: `fingerprint` of the files.
    form: (H, W, D) that it must have.
    classes: C that it must have.
    decode: called where nothing of these files is kept.
    report: called with a line.

  Raises:
    DatasetError: nothing is kept and the cache's directory cannot be written.
  """
  bank = _read(cache, source, form, classes, report)
  if bank is None:
    _check_writable(cache)
    bank = decode()
    _write(cache, source, bank, report)
  return bank


def _read(cache: Cache, source, form, classes: int, report: Report) -> ClassBank | None:
  if not cache.description.exists() and not cache.images.exists():
    return None
  try:
    good = cache.description.is_file() and cache.images.is_file()  # To open a pipe would wait for ever.
    description = json.loads(cache.description.read_bytes()) if good else {}
    sizes = np.array(description['sizes'])
    images = np.lib.format.open_memmap(cache.images, mode='r')  # Which takes neither pickles nor zip files.
    good = (
      description['source'] == source
      and images.dtype == np.uint8
      and images.shape[1:] == form
      and sizes.shape == (classes,)
      and np.issubdtype(sizes.dtype, np.integer)
      and 0 < sizes.min() <= sizes.max() <= len(images)
      and sum(sizes.tolist()) == len(images)  # NumPy's sum may overflow.
    )
  except Exception:  # NumPy raises a dozen kinds at broken headers, and whatever it is, decoding anew mends it.
    good = False
  if not good:
    report(f'{cache.images} is not of these files or is broken; they are decoded again')
    return None
  report(f'taking decoded images from {cache.images}')
  return ClassBank(images, sizes)


def _check_writable(cache: Cache) -> None:
  """Makes the directory, so that one that cannot be written is known before minutes are spent on decoding."""
  try:
    cache.directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=cache.directory):
      pass
  except (OSError, ValueError) as e:  # ValueError for a name with a NUL.
    reason = getattr(e, 'strerror', None) or e
    raise DatasetError(f'the cache {cache.directory} cannot be written ({reason}); give another directory') from e


def _write(cache: Cache, source: dict[str, Any], bank: ClassBank, report: Report) -> None:
  """Keeps a bank: a reader sees all of it or nothing. A full disk is reported, not raised."""
  description = json.dumps(dict(source=source, sizes=np.asarray(bank.sizes).tolist()))
  try:
    cache.description.unlink(missing_ok=True)  # What is said of the old images must not stand beside the new ones.
    _replace(cache.images, lambda file: np.save(file, bank.images, allow_pickle=False))
    _replace(cache.description, lambda file: file.write(description.encode()))
  except OSError as e:
    report(f'decoded images could not be kept in {cache.directory} ({first_line(e)})')
  else:
    report(f'kept decoded images in {cache.images}')


def _replace(path: pathlib.Path, write_to: Callable[[IO[bytes]], object]) -> None:
  temporary = path.with_name(f'.{path.name}-{os.getpid()}')
  try:
    temporary.unlink(missing_ok=True)
    with temporary.open('xb') as file:  # Which follows no link that someone left there.
      write_to(file)
    temporary.replace(path)
  finally:
    temporary.unlink(missing_ok=True)
