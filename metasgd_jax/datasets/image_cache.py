"""Keeps decoded images on disk, so that image files are decoded only once.

A cached bank is a .npy file with the images, `[M, H, W, D]` uint8, and a .json file with the fingerprint of the image
files and the number of images of each class. Functions of this module take the path of these files without the suffix.
"""

import hashlib
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from metasgd_jax.datasets.messages import DatasetError, Report
from metasgd_jax.io.files import WriterError, first_line, why_not_writable, write_array, write_json
from metasgd_jax.tasks.few_shot import ClassBank

DECODING = 1
"""Version number of the decoding. Images that another version has decoded are decoded again."""


def fingerprint(directory: pathlib.Path, paths: Sequence[pathlib.Path]) -> dict[str, Any]:
  """Returns a fingerprint of a set of files, which distinguishes the set from other sets.

  The fingerprint is a dict with `DECODING` (the version number of the decoding), the number of files, their total size
  in bytes, and a hash of the names and sizes of the files.
  """
  digest, total = hashlib.sha256(), 0
  for path in paths:
    try:
      size = path.stat().st_size
    except (OSError, ValueError):  # A name in a list may have a NUL character.
      size = -1
    total += max(size, 0)
    digest.update(f'{path.relative_to(directory).as_posix()}\0{size}\n'.encode('utf-8', 'surrogateescape'))
  return dict(decoding=DECODING, files=len(paths), bytes=total, sha256=digest.hexdigest())


def kept(
  cache: pathlib.Path,
  source: dict[str, Any],
  form: tuple[int, int, int],
  classes: int,
  *,
  decode: Callable[[], ClassBank],
  report: Report,
) -> ClassBank:
  """Returns the class bank of some image files, which is decoded only if it is not in the cache yet.

  A bank from the cache is a memory map. A bank that has just been decoded is in memory, and is also written to the
  cache. If only this last step fails, for example because the disk is full, the failure is reported, and the bank is
  returned.

  Args:
    cache: Path of the cached bank, without the suffix.
    source: Fingerprint of the image files; see `fingerprint`.
    form: Shape (H, W, D) that the images must have.
    classes: Number of classes C that the bank must have.
    decode: Function that decodes the images. It is called if the cache has no bank of these files.
    report: Function that is called with a line of text.

  Raises:
    DatasetError: if the bank is not cached and the directory of the cache cannot be written. The directory is checked
      before the images are decoded.
  """
  bank = _read(cache, source, form, classes, report)
  if bank is None:
    if reason := why_not_writable(cache.parent):  # The check comes first, because decoding takes minutes.
      raise DatasetError(f'the cache {cache.parent} cannot be written ({reason}); give another directory for the cache')
    bank = decode()
    _write(cache, source, bank, report)
  return bank


def _read(cache: pathlib.Path, source, form, classes: int, report: Report) -> ClassBank | None:
  images_path, described = cache.with_suffix('.npy'), cache.with_suffix('.json')
  if not (images_path.is_file() and described.is_file()):
    return None
  try:
    description = json.loads(described.read_bytes())
    sizes = np.array(description['sizes'], int)
    images = np.lib.format.open_memmap(images_path, mode='r')  # open_memmap does not read pickles.
    same = description['source'] == source and images.dtype == np.uint8
    whole = sizes.shape == (classes,) and images.shape == (sizes.sum(), *form)
  except Exception:  # NumPy raises many kinds of errors for broken files. Decoding again repairs all of them.
    same = whole = False
  if not (same and whole):
    report(f'{images_path} was decoded from other image files or is broken; the images are decoded again')
    return None
  report(f'taking decoded images from {images_path}')
  return ClassBank(images, sizes)


def _write(cache: pathlib.Path, source: dict[str, Any], bank: ClassBank, report: Report) -> None:
  """Writes a bank to the cache. A reader never finds an incomplete bank.

  If the bank cannot be written, for example because the disk is full, this is reported, and no error is raised.
  """
  images_path, described = cache.with_suffix('.npy'), cache.with_suffix('.json')
  try:
    described.unlink(missing_ok=True)  # The old description must never be found with new images.
    write_array(images_path, bank.images)
    write_json(described, dict(source=source, sizes=bank.sizes))
  except (OSError, WriterError) as e:
    report(f'decoded images could not be kept in {cache.parent} ({first_line(e.__cause__ or e)})')
  else:
    report(f'kept decoded images in {images_path}')
