"""Text that the commands print: lines, the number of a model's classes, and suggestions for mistyped words."""

import difflib
import itertools
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

_LONGEST = 80  # Number of characters of a user's word that a message repeats.


def say(text: str = '') -> None:
  """Prints lines, and escapes control characters, which file names and facts of models may contain."""
  from metasgd_jax.datasets.messages import printable

  print('\n'.join(map(printable, text.split('\n'))), flush=True)


def how_many(config: Any) -> str:
  """Returns the number of classes that a model supports, as text."""
  return f'2 to {config.way} classes' if config.way > 2 else '2 classes'


def load_model(path_or_name: str) -> Any:
  """Returns the model as `model_file.load_model` does. Its ValueError also suggests the nearest shipped model."""
  from metasgd_jax.deploy import model_file

  try:
    return model_file.load_model(path_or_name)
  except ValueError as e:
    if pathlib.Path(path_or_name).exists():
      raise
    raise ValueError(f'{e}{near(path_or_name, model_file.shipped_models())}') from e


def near(word: Any, known: Sequence[str]) -> str:
  """Returns a question that suggests the known word nearest to `word`, or an empty string if none is near."""
  found = difflib.get_close_matches(str(word)[:_LONGEST], known, 1)
  return f'; did you mean {found[0]}?' if found and found[0] != word else ''


def words(given: Sequence[str]) -> Iterator[tuple[str, str]]:
  """Yields each word of the command line with its value, which may be the next word."""
  for word, after in itertools.zip_longest(given, given[1:], fillvalue=''):
    name, equals, value = word.partition('=')
    yield name, value if equals else after


def cut(text: str) -> str:
  """Returns a text from the command line, cut after 80 characters."""
  return text if len(text) <= _LONGEST else f'{text[:_LONGEST]}…'


def with_cut(text: str, given: Sequence[str]) -> str:
  """Returns `text` with the words of the command line, and their values, each cut after 80 characters."""
  for long in sorted({part for pair in words(given) for part in pair if len(part) > _LONGEST}, key=len, reverse=True):
    text = text.replace(long, cut(long))
  return text
