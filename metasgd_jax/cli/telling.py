"""What the commands print: lines, what a model is for, and what was probably meant by a mistyped word."""

import difflib
import itertools
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

_LONGEST = 80  # Characters of what was given, in a sentence about it.


def say(text: str = '') -> None:
  """Prints lines, with escapes for what names of files and facts of models may hold and a terminal may obey."""
  from metasgd_jax.datasets.messages import printable

  print('\n'.join(map(printable, text.split('\n'))), flush=True)


def how_many(config: Any) -> str:
  """Returns how many classes a model tells apart."""
  return f'2 to {config.way} classes' if config.way > 2 else '2 classes'


def load_model(path_or_name: str) -> Any:
  """Returns the model as `load_model` does, whose ValueError names the nearest of the models that ship."""
  from metasgd_jax.deploy import model_file

  try:
    return model_file.load_model(path_or_name)
  except ValueError as e:
    if pathlib.Path(path_or_name).exists():
      raise
    raise ValueError(f'{e}{near(path_or_name, model_file.shipped_models())}') from e


def near(word: Any, known: Sequence[str]) -> str:
  """Returns a question to put behind a sentence about an unknown word, or nothing where nothing is near."""
  found = difflib.get_close_matches(str(word)[:_LONGEST], known, 1)
  return f'; did you mean {found[0]}?' if found and found[0] != word else ''


def words(given: Sequence[str]) -> Iterator[tuple[str, str]]:
  """Yields the words given, each with its value, which may be the next one."""
  for word, after in itertools.zip_longest(given, given[1:], fillvalue=''):
    name, equals, value = word.partition('=')
    yield name, value if equals else after


def cut(text: str) -> str:
  """Returns what was given, not more than its first 80 characters."""
  return text if len(text) <= _LONGEST else f'{text[:_LONGEST]}…'


def with_cut(text: str, given: Sequence[str]) -> str:
  """Returns a text with the words given cut, and their values."""
  for long in sorted({part for pair in words(given) for part in pair if len(part) > _LONGEST}, key=len, reverse=True):
    text = text.replace(long, cut(long))
  return text
