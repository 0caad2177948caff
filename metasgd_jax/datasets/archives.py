"""Unpacks zip and tar.gz files. No member is written outside of the target folder, and no link is created."""

import gzip
import pathlib
import tarfile
import zipfile

from metasgd_jax.datasets.messages import DatasetError
from metasgd_jax.io.files import first_line


def unpack(path: pathlib.Path, to: pathlib.Path) -> None:
  """Creates a folder and unpacks a zip or tar.gz file to it. The result has only regular files and folders.

  Raises:
    DatasetError: if the archive is broken, if it has a member that leads outside of the folder, a link or a device, or
      if the folder cannot be written.
  """
  try:
    if zipfile.is_zipfile(path):
      with zipfile.ZipFile(path) as archive:
        archive.extractall(to)  # It removes '..' and the root from names, and it writes links as regular files.
    else:
      _unpack_tar(path, to)
  except tarfile.FilterError as e:
    raise DatasetError(f'{path} has a member that leads outside of it ({first_line(e)}); do not trust it') from e
  except Exception as e:  # The standard library raises many kinds of errors for broken archives.
    if isinstance(e, OSError) and e.errno is not None:  # Decoders raise an OSError without a number.
      raise DatasetError(
        f'{path} cannot be unpacked to {to.parent} ({first_line(e)}); make sure that it is writable and has free space'
      ) from e
    raise DatasetError(f'{path} is broken ({first_line(e)}); get it again') from e


def _unpack_tar(path: pathlib.Path, to: pathlib.Path) -> None:
  with gzip.open(path) as plain, tarfile.open(fileobj=plain, mode='r:') as archive:
    archive.extractall(to, filter=_without_links)
    while plain.read(1 << 20):
      pass  # The checksum of the contents is at the end of the file, and tarfile does not read to the end.


def _without_links(member: tarfile.TarInfo, to: str) -> tarfile.TarInfo:
  """A filter of tarfile that refuses links, devices, and names that lead outside of the folder `to`."""
  if member.issym() or member.islnk():  # In some versions of the data filter, a chain of links can lead outside.
    raise tarfile.SpecialFileError(member)
  return tarfile.data_filter(member, to)
