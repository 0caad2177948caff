"""Keeps the files of an earlier run until the run that replaces it has its first checkpoint.

Until then, the earlier run is in the folder `ASIDE` of the work directory. If the new run ends without a checkpoint,
the earlier one is put back, by the same program or, if that was killed, by the next one. A kill at any moment loses
nothing: the record of the earlier run is the last file to be put aside and the first to be put back.
"""

import contextlib
import json
import pathlib
import shutil
from collections.abc import Iterable

from metasgd_jax.io import checkpoint

RECORD = 'metasgd_run.json'
"""Name of the file that marks a directory as the directory of a run, and lists the files that the run has written."""
JOBS = 'jobs'
"""Name of the folder with a directory and a log for each training that has a process of its own."""
ASIDE = '.replaced_run'
"""Name of the folder in which an earlier run waits."""
_SHARED = ('profile', 'checkpoints')
"""Folders in which users may keep files too. Traces are never removed, and of checkpoints only the checkpoints are."""


def set_aside(workdir: pathlib.Path, names: Iterable[str]) -> None:
  """Moves the files with these names, the checkpoints and the record of a run to `ASIDE`.

  It does nothing if there is no record.
  """
  aside = workdir / ASIDE
  if not (workdir / RECORD).exists():
    return
  aside.mkdir()
  for path in _folders(workdir):
    _move(path, aside / path.relative_to(workdir))
  for name in sorted({*names} - {RECORD, *_SHARED}):
    _move(workdir / name, aside / name)
  _move(workdir / RECORD, aside / RECORD)


def settle(workdir: pathlib.Path, new_stays: bool) -> None:
  """Ends the replacement of a run, if there is one: puts the earlier run back, or removes it if the new one stays.

  If a program was killed before all files were put aside, or while they were put back, they are put back.
  """
  aside = workdir / ASIDE
  if not aside.is_dir():
    return
  if not (aside / RECORD).exists():
    _put_back(workdir)
  elif new_stays and (workdir / RECORD).exists():
    remove(aside)
  else:
    with contextlib.suppress(FileNotFoundError):
      remove_run(workdir)
    _put_back(workdir)


def is_pending(workdir: pathlib.Path) -> bool:
  """Returns whether an earlier run waits to be removed or put back."""
  return (workdir / ASIDE).is_dir()


def runs_in(workdir: pathlib.Path) -> list[pathlib.Path]:
  """Returns the directories of the trainings of a run that have processes of their own; see `jobs`."""
  return sorted(path.parent for path in (workdir / JOBS).glob(f'*/{RECORD}'))


def remove_run(workdir: pathlib.Path) -> None:
  """Removes a run: the files that its record lists, the record, and the directory if nothing else is in it."""
  for run in runs_in(workdir):
    remove_run(run)
  for name in json.loads((workdir / RECORD).read_bytes())['files']:
    remove_files(workdir, name)
  (workdir / RECORD).unlink()
  with contextlib.suppress(OSError):
    workdir.rmdir()


def remove_files(workdir: pathlib.Path, name: str) -> None:
  """Removes a file that a run has written. Of the folder with the checkpoints, only the checkpoints are removed."""
  if name == 'checkpoints':
    for directory in (workdir / name).glob('*'):
      checkpoint.remove_all(directory)
    with contextlib.suppress(OSError):  # It holds files that no run has written.
      (workdir / name).rmdir()
  elif name not in _SHARED:
    remove(workdir / name)


def remove(path: pathlib.Path) -> None:
  """Deletes a file or a directory.

  A directory is renamed first. If the program is killed meanwhile, no half-deleted directory has the original name.
  """
  removed = path.with_name(f'.{path.name}-removed')
  shutil.rmtree(removed, ignore_errors=True)
  if path.is_dir() and not path.is_symlink():
    path.rename(removed)
    shutil.rmtree(removed, ignore_errors=True)
  else:
    path.unlink(missing_ok=True)


def _put_back(workdir: pathlib.Path) -> None:
  aside = workdir / ASIDE
  _move(aside / RECORD, workdir / RECORD)
  for path in [*_folders(aside), *(path for path in aside.iterdir() if path.is_file())]:
    _move(path, workdir / path.relative_to(aside))
  shutil.rmtree(aside)


def _folders(directory: pathlib.Path) -> list[pathlib.Path]:
  """Returns the folders that a run has written: its checkpoints, and the directories of `jobs`."""
  found = [
    training / str(step)
    for training in sorted((directory / 'checkpoints').glob('*'))
    for step in checkpoint.steps(training)
  ]
  return found + runs_in(directory)


def _move(old: pathlib.Path, new: pathlib.Path) -> None:
  """Moves a file or directory within one file system, if it exists, and replaces a file that is there."""
  new.parent.mkdir(parents=True, exist_ok=True)
  with contextlib.suppress(FileNotFoundError):
    old.replace(new)
