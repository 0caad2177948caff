"""Zip and tar files unpacked without trust: never outside of their folder, never links, and never without end."""

import bz2
import contextlib
import gzip
import io
import lzma
import pathlib
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from typing import IO, Any

from metasgd_jax.datasets.messages import DatasetError, first_line

MOST_BYTES = 2 << 30
"""An archive that unpacks to more is refused; the largest that is read here, CIFAR-100's, has 186 MB."""
MOST_MEMBERS = 200_000
"""The same of the number of its members; Omniglot's have 20,000."""
_MOST_AT_ONCE = 16 << 20

_BROKEN = (
  zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, lzma.LZMAError, zlib.error, struct.error, EOFError,
  ValueError, NotImplementedError, RuntimeError, OverflowError, MemoryError, IndexError, KeyError, TypeError,
)  # fmt: skip
_COMPRESSED: dict[bytes, Any] = {b'\x1f\x8b': gzip.open, b'BZh': bz2.open, b'\xfd7zXZ\0': lzma.open}


class _RefusedError(Exception):
  """What the archive does that no archive of a data set does."""


def is_archive(path: pathlib.Path) -> bool:
  """Says whether a file begins, or for zip ends, like a whole archive of the kind that its ending says."""
  if path.suffix == '.zip':
    return zipfile.is_zipfile(path)
  try:
    with _opened_tar(path):
      return True
  except (_RefusedError, OSError, *_BROKEN):
    return False


def unpack(path: pathlib.Path, to: pathlib.Path) -> None:
  """Unpacks a zip or tar file, of regular files and folders alone, to a folder that it makes.

  Raises:
    DatasetError: the archive is broken, has a member that leads outside, a link or a device, has too many members or
      unpacks to too much, or cannot be written.
  """
  try:
    if zipfile.is_zipfile(path):
      _unpack_zip(path, to)
    else:
      _unpack_tar(path, to)
  except tarfile.FilterError as e:
    raise DatasetError(f'{path} has a member that leads outside of it ({first_line(e)}); do not trust it') from e
  except _RefusedError as e:
    raise DatasetError(f'{path} {e}; do not trust it') from e
  except _BROKEN as e:
    raise DatasetError(f'{path} is broken ({first_line(e)}); get it again') from e
  except OSError as e:
    if e.errno is None:  # So bz2 says what it cannot decode.
      raise DatasetError(f'{path} is broken ({first_line(e)}); get it again') from e
    raise DatasetError(f'{path} cannot be unpacked to {to.parent} ({first_line(e)}); make room, or free the way') from e


def _unpack_zip(path: pathlib.Path, to: pathlib.Path) -> None:
  with zipfile.ZipFile(path) as archive:
    members = archive.infolist()
    _check_amount(len(members), sum(member.file_size for member in members))  # No member is read past its file_size.
    archive.extractall(to)  # Leaves out '..' and roots of names, and writes links as files.


def _unpack_tar(path: pathlib.Path, to: pathlib.Path) -> None:
  with _opened_tar(path) as archive:
    total = 0
    for count, member in enumerate(archive, 1):
      total += member.size
      _check_amount(count, total)
      if member.issym() or member.islnk():  # Some versions of the filter are led outside by links upon links.
        raise _RefusedError(f'has a member that leads outside of it (the link {member.name!r:.200})')
      archive.extract(member, to, filter='data')  # Refuses names and devices that lead outside.
    while archive.fileobj and archive.fileobj.read(1 << 20):
      pass  # The checksum of what was unpacked comes last, and tarfile does not read so far.


def _check_amount(members: int, size: int) -> None:
  if members > MOST_MEMBERS:
    raise _RefusedError(f'has more than {MOST_MEMBERS:,} members')
  if size > MOST_BYTES:
    raise _RefusedError(f'unpacks to more than {MOST_BYTES >> 20:,} MiB')


@contextlib.contextmanager
def _opened_tar(path: pathlib.Path) -> Iterator[tarfile.TarFile]:
  """A tar file that is decompressed up to the limit alone: a header may ask for gigabytes, too."""
  with path.open('rb') as file:
    start = file.read(6)
  opener = next((opener for magic, opener in _COMPRESSED.items() if start.startswith(magic)), open)
  with opener(path, 'rb') as plain, tarfile.open(fileobj=_Limited(plain), mode='r:') as archive:
    yield archive


class _Limited(io.RawIOBase):
  """A file that refuses to be read past a limit, or much of it at once, as only headers that lie are."""

  def __init__(self, file: IO[bytes]):
    super().__init__()
    self._file = file

  def read(self, size: int = -1) -> bytes:
    if not 0 <= size <= _MOST_AT_ONCE or self._file.tell() + size > 2 * MOST_BYTES:
      raise _RefusedError(f'unpacks to more than {MOST_BYTES >> 20:,} MiB')
    return self._file.read(size)

  def tell(self) -> int:
    return self._file.tell()

  def seek(self, at: int, whence: int = 0) -> int:
    if at > 2 * MOST_BYTES:
      raise _RefusedError(f'unpacks to more than {MOST_BYTES >> 20:,} MiB')
    return self._file.seek(at, whence)
