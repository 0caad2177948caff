"""Something that reads files, and one hostile input for it."""

import pathlib
import random
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

from . import guard
from .mutations import Edit
from .trees import Tree, change_tree, read as take_up, write


class Reader(NamedTuple):
  """Something that reads files.

  Attributes:
    name: of the function.
    trees: valid inputs.
    read: reads the files in a folder; may take its options from the chances.
    refuses: the errors that it documents.
    share: of the inputs, beside the other readers'.
    edits: what may be done to files, by their names' endings.
  """

  name: str
  trees: Callable[[], list[Tree]]
  read: Callable[[pathlib.Path, random.Random], Any]
  refuses: tuple[type[Exception], ...]
  share: float = 1.0
  edits: dict[str, tuple[Edit, ...]] = {}  # noqa: RUF012


def attempt(reader: Reader, rng: random.Random, *, tree: Tree | None = None) -> str | None:
  """Reads one input: a valid one changed, or the one given; returns what `guard.watched` does."""
  if tree is None:
    tree = change_tree(rng, rng.choice(trees_of(reader)), reader.edits)
  with tempfile.TemporaryDirectory(prefix='fuzz-') as directory:
    folder = pathlib.Path(directory, 'in')
    folder.mkdir()
    write(tree, folder)
    return guard.watched(lambda: reader.read(folder, rng), folder, reader.refuses)


def trees_of(reader: Reader) -> list[Tree]:
  """Returns a reader's valid inputs, made once."""
  if reader.name not in _made:
    _made[reader.name] = reader.trees()
  return _made[reader.name]


_made: dict[str, list[Tree]] = {}


def in_folder(make: Callable[[pathlib.Path], Any]) -> Tree:
  """Returns the files that `make` makes in a folder."""
  with tempfile.TemporaryDirectory(prefix='fuzz-') as directory:
    make(pathlib.Path(directory))
    return take_up(pathlib.Path(directory))
