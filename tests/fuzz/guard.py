"""A watch over a reader: time, memory, what it writes where, and whether its errors are the documented ones."""

import contextlib
import os
import pathlib
import resource
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

SECONDS = 20.0
"""After so long an input counts as one that hangs."""
BYTES = 1 << 30
"""More memory than this for an input counts as a bomb that went off."""
LONGEST_MESSAGE = 2000

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = {  # audit event → which of its arguments are paths, and where a descriptor they are relative to stands
  'os.mkdir': ((0,), 2),
  'os.rename': ((0, 1), 2),
  'os.remove': ((0,), 1),
  'os.rmdir': ((0,), 1),
  'os.symlink': ((1,), 2),
  'os.link': ((0, 1), 2),
  'os.truncate': ((0,), None),
  'os.chmod': ((0,), 2),
}
_NEVER = (
  'pickle.find_class',
  'subprocess.Popen',
  'os.system',
  'os.exec',
  'os.posix_spawn',
  'os.fork',
  'socket.connect',
)


class ViolationError(AssertionError):
  """A reader did what no reader may."""


class _Hang(BaseException):
  pass


_watched: list[pathlib.Path] = []
_seen: list[str] = []


def _hook(event: str, args: tuple[Any, ...]) -> None:
  if not _watched:
    return
  if event in _NEVER:
    _seen.append(f'{event}{args[:2]}')
  elif event == 'open':
    path, _, flags = args
    if isinstance(flags, int) and flags & _WRITES and not isinstance(path, int):
      _note(event, path, -1)
  elif event in _CHANGES:
    places, descriptor = _CHANGES[event]
    for place in places:
      if not isinstance(args[place], int):
        _note(event, args[place], -1 if descriptor is None else args[descriptor])


def _note(event: str, path: Any, descriptor: Any) -> None:
  base = f'/proc/self/fd/{descriptor}' if isinstance(descriptor, int) and descriptor >= 0 else pathlib.Path.cwd()
  full = pathlib.Path(base, os.fsdecode(path))
  # The last part is not followed: to remove or replace a link changes the place that it is in.
  place = pathlib.Path(os.path.realpath(full.parent), full.name)
  if event == 'open':
    place = pathlib.Path(os.path.realpath(place))
  if not any(place.is_relative_to(root) for root in _watched) and place != pathlib.Path(os.devnull):
    _seen.append(f'{event} of {place}')


sys.addaudithook(_hook)


@contextlib.contextmanager
def _limited(seconds: float) -> Iterator[None]:
  def ring(*_):
    raise _Hang

  before = signal.signal(signal.SIGALRM, ring)
  signal.setitimer(signal.ITIMER_REAL, seconds)
  try:
    yield
  finally:
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def watched(
  read: Callable[[], Any], folder: pathlib.Path, refuses: tuple[type[Exception], ...], seconds: float = SECONDS
) -> str | None:
  """Returns `None` if `read` accepted what it read, or the sentence with which it refused it.

  Args:
    read: the reader, bound to its input.
    folder: the only place where it may write.
    refuses: its documented errors.
    seconds: before it counts as hanging.

  Raises:
    ViolationError: it raised another error, hung, wrote elsewhere, took too much memory, ran a program or opened a
      pickle.
  """
  _seen.clear()
  memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  refusal = None
  _watched.append(folder.resolve())
  try:
    with _limited(seconds), warnings.catch_warnings(), mock.patch('tempfile.tempdir', str(folder)):
      warnings.simplefilter('ignore')
      read()
  except refuses as e:
    refusal = _sentence(e)
  except _Hang:
    raise ViolationError(f'no answer in {seconds:g} s') from None
  except BaseException as e:
    if isinstance(e, KeyboardInterrupt):
      raise
    raise ViolationError(f'{type(e).__name__} instead of a documented error: {str(e)[:300]}') from e
  finally:
    _watched.clear()
  grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) * 1024
  if _seen:
    raise ViolationError(f'it did {_seen[0]}')
  if grown > BYTES:
    raise ViolationError(f'it took {grown / 1e9:.1f} GB')
  return refusal


def refused(read: Callable[[], Any], folder: pathlib.Path, error: type[Exception]) -> str:
  """Returns the sentence with which something is refused, with nothing written outside of `folder`."""
  sentence = watched(read, folder, (error,))
  assert sentence is not None, 'it was accepted'
  return sentence


def _sentence(e: Exception) -> str:
  text = str(e)
  if type(e) is UnicodeEncodeError or type(e) is UnicodeDecodeError:
    raise ViolationError(f'{type(e).__name__} with no sentence of its own: {text}') from e
  if not text or '\n' in text or len(text) > LONGEST_MESSAGE:
    raise ViolationError(f'a message that is not one sentence ({len(text)} characters): {text[:300]!r}') from e
  return text
