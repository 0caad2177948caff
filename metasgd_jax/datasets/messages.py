"""What data sets say: an error of one sentence, reports of what goes on, and names shown as a terminal can."""

import os
import pathlib
from collections.abc import Callable

Report = Callable[[str], None]
"""Called with a line of text before something that takes seconds."""


class DatasetError(Exception):
  """A data set cannot be had as asked; the message says why and what to do."""

  def __init__(self, message: str):
    super().__init__(printable(message))


def first_line(e: BaseException) -> str:
  """Returns the first line of an error's text, cut where it is very long, or its type's name."""
  line = (str(e).strip().splitlines() or [type(e).__name__])[0]
  return line if len(line) <= 500 else f'{line[:500]}…'


def printable(text: str) -> str:
  """Returns a text with escapes for what no terminal should get: control characters and halves of surrogate pairs.

  Files' names may hold any bytes, which Python turns into such halves; to print one raises UnicodeEncodeError.
  """
  if text.isprintable():
    return text
  return ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in text)


def printing(report: Report) -> Report:
  """Returns a report that gets printable lines."""
  return lambda line: report(printable(line))


def at_home(path: str | os.PathLike[str]) -> pathlib.Path:
  """Returns a path with `~` as the home directory.

  Raises:
    DatasetError: there is no home directory of that name.
  """
  try:
    return pathlib.Path(path).expanduser()
  except RuntimeError as e:
    raise DatasetError(f'{path} begins with ~ and there is no such home directory; give the whole path') from e
