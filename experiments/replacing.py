"""Keeps the files of an earlier run until the run that replaces it has its first checkpoint.

Until then, the earlier run is in the folder `ASIDE` of the work directory. If the new run ends without a checkpoint,
the earlier one is put back, by the same program or, if that was killed, by the next one. A kill at any moment loses
nothing: the record of the earlier run is the last file to be put aside and the first to be put back. Files that no
record lists are neither moved, nor overwritten, nor removed.
"""

import contextlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterable, Sequence
from typing import Any, cast

from metasgd_jax.io import checkpoint, files
from metasgd_jax.io.checkpoint import CheckpointError

RECORD = 'metasgd_run.json'
"""Name of the file that marks a directory as the directory of a run, and lists the files that the run has written."""
JOBS = 'jobs'
"""Name of the folder with a directory and a log for each training that has a process of its own; see `jobs`."""
ASIDE = '.replaced_run'
"""Name of the folder in which an earlier run waits."""
_SHARED = ('profile', 'checkpoints', JOBS)
"""Folders in which users may keep files too. Traces are never removed, and otherwise only the run's own files are."""
_ADVICE = 'make sure that files can be moved within the work directory, or give another --workdir'


def set_aside(workdir: pathlib.Path) -> None:
  """Moves the files that the record of a run lists, its checkpoints and the record itself to `ASIDE`.

  It does nothing if there is no record.

  Raises:
    WriterError: if there is a file or folder with the name `ASIDE` already, or if a file cannot be moved.
  """
  aside = workdir / ASIDE
  record = read_record(workdir)
  if record is None:
    return
  refuse([aside])
  with files.told(aside, _ADVICE):
    aside.mkdir()
    for name in [*_files_of(workdir, record), RECORD]:
      _move(workdir / name, aside / name)
    remove_checkpoints(workdir, record['trainings'])  # Only empty folders are left of them.


def settle(workdir: pathlib.Path) -> None:
  """Ends the replacement of a run, if there is one.

  The earlier run is removed if the new one is finished or has a checkpoint, and put back otherwise. If a program was
  killed before all files were put aside, or while they were put back, they are put back.

  Raises:
    WriterError: if a file cannot be moved, for example because another file is in its place.
  """
  aside = workdir / ASIDE
  with files.told(aside, _ADVICE):
    if is_pending(workdir) and standing(workdir) == workdir:
      _remove_directory(aside)
    elif is_pending(workdir):
      _remove_files(workdir)
      (aside / RECORD).replace(workdir / RECORD)
    record = read_record(workdir)
    if not aside.is_dir() or record is None:
      return
    for name in reversed(_files_of(aside, record)):
      if os.path.lexists(aside / name):
        if os.path.lexists(workdir / name):
          raise files.WriterError(
            f'{aside / name} cannot be moved back, because {workdir / name} exists; move one of them away'
          )
        _move(aside / name, workdir / name)
    remove_checkpoints(aside, record['trainings'])
    for folder, *_ in os.walk(aside, topdown=False):
      with contextlib.suppress(OSError):  # It holds files of the user.
        pathlib.Path(folder).rmdir()


def is_pending(workdir: pathlib.Path) -> bool:
  """Returns whether an earlier run waits to be removed or put back."""
  return (workdir / ASIDE / RECORD).exists()


def standing(workdir: pathlib.Path) -> pathlib.Path:
  """Returns the directory of the run that `settle` would keep: `workdir`, or the folder `ASIDE` of an earlier run."""
  if not is_pending(workdir):
    return workdir
  new = read_record(workdir)
  return workdir if new and (new['finished'] or trainings(workdir)) else workdir / ASIDE


def refuse(paths: Sequence[pathlib.Path]) -> None:
  """Raises WriterError if one of the paths exists. Call it with paths that no run is known to have written."""
  if there := [path for path in paths if os.path.lexists(path)]:
    raise files.WriterError(f'{there[0]} exists, but no run has written it; move it away, or give another --workdir')


def read_record(workdir: files.PathLike) -> dict[str, Any] | None:
  """Returns the record of a run, or `None` if there is none. Raises CheckpointError if the record cannot be read."""
  path = pathlib.Path(workdir, RECORD)
  try:
    found = json.loads(path.read_bytes())
    if 'trainings' not in found:  # Earlier versions did not list the trainings.
      there = [*path.parent.glob('checkpoints/*'), *path.parent.glob(f'{ASIDE}/checkpoints/*')]
      found['trainings'] = sorted({folder.name for folder in there})
    kinds = {'finished': bool, 'config': dict, 'versions': dict, 'files': list, 'trainings': list}
    return {name: kind(found[name]) for name, kind in kinds.items()}
  except FileNotFoundError:
    return None
  except (OSError, KeyError, RecursionError, TypeError, ValueError) as e:
    raise CheckpointError(f'{path} cannot be read ({e!r:.200}); restore it, or give another --workdir') from e


def trainings(workdir: files.PathLike) -> list[str]:
  """Returns the names of the run's trainings that have checkpoints, there or in the directories of `runs_in`."""
  found = []
  for run in (pathlib.Path(workdir), *runs_in(workdir)):
    names = sorted((read_record(run) or {}).get('trainings', ()))
    found += [name for name in names if checkpoint.steps(run / 'checkpoints' / name)]
  return found


def runs_in(workdir: files.PathLike) -> list[pathlib.Path]:
  """Returns the directories of the trainings of a run that have processes of their own."""
  return sorted(path.parent for path in pathlib.Path(workdir).glob(f'{JOBS}/*/{RECORD}'))


def remove_run(workdir: pathlib.Path) -> None:
  """Removes the files of a run, its record, and the directory if nothing else is in it. No program may write there."""
  for half in files.half_written(workdir):
    half.unlink()
  _remove_files(workdir)
  (workdir / RECORD).unlink()
  with contextlib.suppress(OSError):  # It holds files of the user.
    workdir.rmdir()


def remove_checkpoints(workdir: pathlib.Path, names: Iterable[str]) -> None:
  """Removes the checkpoints of the trainings with these names, and the folders that are empty then."""
  for name in names:
    checkpoint.remove_all(workdir / 'checkpoints' / name)
  with contextlib.suppress(OSError):  # It holds files of the user, or does not exist.
    (workdir / 'checkpoints').rmdir()


def _files_of(directory: pathlib.Path, record: dict[str, Any]) -> list[str]:
  """Returns the paths, relative to the directory, of a run's checkpoints there and of its other files.

  The record of a run in `JOBS` precedes its files. They must be moved back in reverse order, so that after a kill the
  record is where files are left.
  """
  folders = [f'checkpoints/{name}' for name in sorted(record['trainings'])]
  steps = [f'{folder}/{step}' for folder in folders for step in checkpoint.steps(directory / folder)]
  found = [*steps, *sorted({*record['files']} - {RECORD, *_SHARED})]
  for run in runs_in(directory):
    inner = [RECORD, *_files_of(run, cast(Any, read_record(run)))]
    found += [str((run / name).relative_to(directory)) for name in inner]
  return found


def _remove_files(workdir: pathlib.Path) -> None:
  for run in runs_in(workdir):
    remove_run(run)
  if record := read_record(workdir):
    for name in record['files']:
      if name not in _SHARED:
        (workdir / name).unlink(missing_ok=True)
    remove_checkpoints(workdir, record['trainings'])


def _remove_directory(path: pathlib.Path) -> None:
  """Deletes a directory. It is renamed first, so that after a kill no half-deleted directory has the original name."""
  removed = path.with_name(f'{path.name}-removed')
  shutil.rmtree(removed, ignore_errors=True)
  path.rename(removed)
  shutil.rmtree(removed, ignore_errors=True)


def _move(old: pathlib.Path, new: pathlib.Path) -> None:
  """Moves a file or directory within one file system, if it exists."""
  new.parent.mkdir(parents=True, exist_ok=True)
  with contextlib.suppress(FileNotFoundError):
    old.replace(new)
