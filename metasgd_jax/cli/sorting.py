"""Puts pictures into a folder for each class, and never overwrites a file."""

import contextlib
import errno
import filecmp
import itertools
import os
import pathlib
import secrets
import shutil
from collections.abc import Sequence

from metasgd_jax.io import files

UNSURE = 'unsure'
"""Name of the folder for pictures whose class is not sure."""


def put(paths: Sequence[pathlib.Path], answers: Sequence[str], into: pathlib.Path, *, move: bool) -> int:
  """Copies or moves each picture to the folder `into/ANSWER`. Returns the number of pictures that were put there.

  A picture keeps its name. If the name is taken by another file, the picture gets the name `NAME (2)`, `NAME (3)` and
  so on. If the name is taken by an equal file, the picture is there already: it is not copied again, and not moved.

  Args:
    paths: Paths of the pictures.
    answers: Name of the folder of each picture.
    into: Directory of the folders. It is created if it does not exist.
    move: Whether the pictures are moved.

  Raises:
    WriterError: if a file cannot be read or written. The pictures before it are in their folders then.
  """
  count = 0
  for path, answer in zip(paths, answers, strict=True):
    folder = into / answer
    with files.told(folder, 'give another folder'):
      folder.mkdir(parents=True, exist_ok=True)
      count += _put(path, folder, move)
  return count


def _put(path: pathlib.Path, folder: pathlib.Path, move: bool) -> bool:
  """Puts one picture into a folder. Returns whether it was not there before."""
  aside = folder / f'.{path.name}-{secrets.token_hex(4)}'
  for number in itertools.count(1):
    target = folder / (path.name if number == 1 else f'{path.stem} ({number}){path.suffix}')
    if os.path.lexists(target):
      if target.is_file() and filecmp.cmp(path, target, shallow=False):
        return False
      continue
    try:
      if not aside.exists():
        shutil.copy2(path, aside)
      if not _name(aside, target):
        continue
    finally:
      aside.unlink(missing_ok=True)
    if move:
      path.unlink()
    return True
  raise AssertionError('the numbers never end')


def _name(aside: pathlib.Path, target: pathlib.Path) -> bool:
  """Gives a file the name `target`. Returns False if another program has taken this name meanwhile."""
  try:
    os.link(aside, target)  # Unlike a renaming, a link never replaces a file.
  except FileExistsError:
    return False
  except OSError as e:
    if e.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS):
      raise
    with contextlib.suppress(FileExistsError):  # The file system has no links.
      os.close(os.open(target, os.O_CREAT | os.O_EXCL))
      aside.replace(target)
      return True
    return False
  return True
