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

from metasgd_jax.io.files import WriterError

UNSURE = 'unsure'
"""Name of the folder for pictures whose class is not sure."""


def put(
  paths: Sequence[pathlib.Path], answers: Sequence[str], into: pathlib.Path, *, move: bool
) -> tuple[list[pathlib.Path], int]:
  """Puts a copy of each picture into the folder `into/ANSWER`. Returns the copies, and how many of them are new.

  A copy has the name of its picture. If the name is taken by another file, the copy gets the name `NAME (2)`,
  `NAME (3)` and so on. If the name is taken by an equal file, this file is the copy, and nothing is copied again.
  A move is finished by `remove`. If a move is interrupted before, all pictures are still in their places.

  Args:
    paths: Paths of the pictures.
    answers: Name of the folder of each picture.
    into: Directory of the folders. It is created if it does not exist.
    move: Whether the pictures will be removed. A hard link, which needs no space, is then made in place of a copy if
      the file system supports it.

  Raises:
    WriterError: if a file cannot be read or written. The pictures before it have copies in their folders then.
  """
  copies: list[pathlib.Path] = []
  new = 0
  for path, answer in zip(paths, answers, strict=True):
    folder = into / answer
    try:
      folder.mkdir(parents=True, exist_ok=True)
      copy, is_new = _put(path, folder, move)
    except OSError as e:
      raise WriterError(
        f'{path} cannot be put into {folder} ({e.strerror or e}), and {len(copies)} of {len(paths)} pictures were put '
        f'there before it; {_advice(e, path)}, and repeat the command'
      ) from e
    copies.append(copy)
    new += is_new
  return copies, new


def remove(paths: Sequence[pathlib.Path], copies: Sequence[pathlib.Path]) -> None:
  """Removes pictures of which `put` has returned the copies. Raises WriterError if a picture cannot be removed."""
  for count, (path, copy) in enumerate(zip(paths, copies, strict=True)):
    try:
      if copy != path:
        path.unlink(missing_ok=True)
    except OSError as e:
      raise WriterError(
        f'{path} cannot be removed ({e.strerror or e}) after it was copied to {copy}, and {count} of {len(paths)} '
        'pictures were moved before it; make its folder writable, and repeat the command with another --out'
      ) from e


def _put(path: pathlib.Path, folder: pathlib.Path, move: bool) -> tuple[pathlib.Path, bool]:
  """Puts a copy of one picture into a folder. Returns the copy, and whether it is new."""
  if path.parent.samefile(folder):  # Links can lead from the pictures to the folder.
    return path, False
  names = itertools.chain([path.name], (f'{path.stem} ({number}){path.suffix}' for number in itertools.count(2)))
  for target in (folder / name for name in names):
    if not os.path.lexists(target):
      _copy(path, target, move)
      return target, True
    # A link is no copy, because it may lead to the picture.
    if target.is_file() and not target.is_symlink() and filecmp.cmp(path, target, shallow=False):
      return target, False
  raise AssertionError('the numbers never end')


def _copy(path: pathlib.Path, target: pathlib.Path, may_link: bool) -> None:
  """Copies or links a file to a new name. Raises FileExistsError if another program has taken this name meanwhile."""
  if may_link and not path.is_symlink():
    with contextlib.suppress(OSError):  # It is another file system, or one without hard links.
      os.link(path, target)
      return
  aside = target.with_name(f'.{secrets.token_hex(8)}')
  try:
    shutil.copyfile(path, aside)
    with aside.open('rb+') as file:  # The copy must be on the disk before the picture is removed.
      os.fsync(file.fileno())
    with contextlib.suppress(OSError):  # Some file systems do not store modes or times.
      shutil.copystat(path, aside)
    target.open('xb').close()  # A renaming would replace a file, so the name is reserved first.
    try:
      aside.replace(target)
    except BaseException:
      target.unlink()
      raise
  finally:
    aside.unlink(missing_ok=True)


def _advice(error: OSError, path: pathlib.Path) -> str:
  if error.errno in (errno.ENOSPC, errno.EDQUOT):
    return 'free disk space'
  if not os.access(path, os.R_OK):
    return 'check that the picture exists and can be read'
  return 'make the folder writable, or give another folder'
