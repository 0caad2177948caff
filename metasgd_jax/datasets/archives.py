"""Unpacks zip and tar.gz files that are not trusted.

No member (file or folder) of an archive is written outside of the target folder, no link is created, and the size of
the contents is limited.
"""

import gzip
import pathlib
import tarfile
import zipfile

from metasgd_jax.datasets.messages import DatasetError
from metasgd_jax.io.files import first_line

MOST_BYTES = 2 << 30
"""Largest number of bytes that an archive may unpack to. The largest archive in use, CIFAR-100's, unpacks to 186 MB."""
MOST_MEMBERS = 200_000
"""Largest number of members that an archive may have. The largest archive of Omniglot has about 20,000."""
_MOST_AT_ONCE = 16 << 20


class _RefusedError(Exception):
  """An archive has contents that the archive of a data set never has, such as a link.

  The message is a sentence without its subject, such as 'has more than 10 members'. `unpack` adds the subject, which is
  the path of the archive.
  """


def is_archive(path: pathlib.Path) -> bool:
  """Returns whether a file looks like an archive of the kind that its suffix says.

  The check of a zip file reads the end of the file, so that an incomplete file is detected. The check of a tar.gz file
  reads only the beginning.
  """
  if path.suffix == '.zip':
    return zipfile.is_zipfile(path)
  try:
    with _LimitedGzip(path) as plain, tarfile.open(fileobj=plain, mode='r:'):
      return True
  except Exception:  # The standard library raises many kinds of errors for broken archives.
    return False


def unpack(path: pathlib.Path, to: pathlib.Path) -> None:
  """Creates a folder and unpacks a zip or tar.gz file to it. The result has only regular files and folders.

  A tar.gz file with a link, or with a member that leads outside of the folder, is refused. A zip file is not refused
  for this: a link becomes a regular file, and a member that leads outside of the folder is written inside of it.

  Raises:
    DatasetError: if the archive is broken, if a member of a tar.gz file is a link, is a device or leads outside of the
      folder, if the archive has too many members or unpacks to too many bytes, or if the folder cannot be written.
  """
  try:
    if zipfile.is_zipfile(path):
      _unpack_zip(path, to)
    else:
      _unpack_tar(path, to)
  except tarfile.FilterError as e:
    raise DatasetError(
      f'{path} has a member that is a device or whose path leads outside of the target folder ({first_line(e)}); '
      'do not trust this archive'
    ) from e
  except _RefusedError as e:
    raise DatasetError(f'{path} {e}; do not trust this archive') from e
  except Exception as e:  # The standard library raises many kinds of errors for broken archives.
    if isinstance(e, OSError) and e.errno is not None:  # Decoders raise an OSError without a number.
      raise DatasetError(
        f'{path} cannot be unpacked to {to.parent} ({first_line(e)}); make sure that this directory '
        'can be written and that its disk has free space'
      ) from e
    raise DatasetError(f'{path} is broken ({first_line(e)}); get the file again') from e


def _unpack_zip(path: pathlib.Path, to: pathlib.Path) -> None:
  with zipfile.ZipFile(path) as archive:
    members = archive.infolist()
    _check_amount(len(members), sum(member.file_size for member in members))  # zipfile reads no member past its size.
    archive.extractall(to)  # extractall removes '..' and the root from names, and writes links as regular files.


def _unpack_tar(path: pathlib.Path, to: pathlib.Path) -> None:
  with _LimitedGzip(path) as plain, tarfile.open(fileobj=plain, mode='r:') as archive:
    total = 0
    for count, member in enumerate(archive, 1):
      total += member.size
      _check_amount(count, total)
      if member.issym() or member.islnk():  # In some versions of the filter, a chain of links can leave the folder.
        raise _RefusedError(f'has the link {member.name!r:.200}, which may lead outside of the target folder')
      archive.extract(member, to, filter='data')  # The filter refuses devices, and names outside of the folder.
    while plain.read(1 << 20):
      pass  # The checksum of the contents is at the end of the file, and tarfile does not read to the end.


def _check_amount(members: int, size: int) -> None:
  if members > MOST_MEMBERS:
    raise _RefusedError(f'has more than {MOST_MEMBERS:,} members')
  if size > MOST_BYTES:
    raise _RefusedError(f'unpacks to more than {MOST_BYTES >> 20:,} MiB')


class _LimitedGzip(gzip.GzipFile):
  """A gzip file that limits how many unpacked bytes can be read.

  A read past `MOST_BYTES` raises _RefusedError. A single read of more than `_MOST_AT_ONCE` bytes also raises it. This
  limits the header of a member, which tarfile reads in a single read: an untrusted file may claim a header of any
  length.
  """

  def read(self, size: int | None = -1) -> bytes:
    if size is None or not 0 <= size <= _MOST_AT_ONCE:
      raise _RefusedError(f'has a member with a header of more than {_MOST_AT_ONCE >> 20} MiB')
    _check_amount(0, self.tell() + size)
    return super().read(size)

  def seek(self, at: int, whence: int = 0) -> int:
    _check_amount(0, at)
    return super().seek(at, whence)
