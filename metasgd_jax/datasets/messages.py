"""Messages of the data sets: errors, progress reports, and text that can be printed safely in a terminal."""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

SECONDS_BETWEEN_REPORTS = 5.0

Report = Callable[[str], None]
"""Function that is called with a line of text before anything that takes seconds."""

_T = TypeVar('_T')


class DatasetError(Exception):
  """A data set cannot be loaded as requested. The message says why, and what to do."""

  def __init__(self, message: str):
    super().__init__(printable(message))


def printable(text: str) -> str:
  """Returns a text in which control characters and halves of surrogate pairs are escaped for a terminal.

  The name of a file may contain any bytes. Python represents bytes that are not valid text by halves of surrogate
  pairs, and printing such a half raises UnicodeEncodeError.
  """
  if text.isprintable():
    return text
  return ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in text)


def printing(report: Report) -> Report:
  """Returns a function that makes each line printable and passes it to `report`."""
  return lambda line: report(printable(line))


def with_progress(items: Iterable[_T], total: int, report: Report) -> Iterator[_T]:
  """Yields the items, one for each image that is read. Reports every few seconds how many images have been read."""
  reported = time.monotonic()
  for count, item in enumerate(items, 1):
    yield item
    if time.monotonic() - reported >= SECONDS_BETWEEN_REPORTS:
      report(f'read {count:,} of {total:,} images')
      reported = time.monotonic()
