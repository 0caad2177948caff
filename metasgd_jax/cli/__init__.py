"""The command `metasgd`: a trained model sorts pictures by a few examples, says what it is, or becomes one file.

What takes time to import is imported in the command that uses it.
"""

import argparse
import functools
import io
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from metasgd_jax.cli import export, info, predict
from metasgd_jax.cli.telling import cut, near, with_cut, words
from metasgd_jax.version import __version__


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line and returns its exit code: 0, or 1 after a mistake, told in a sentence on standard error."""
  args = parse(sys.argv[1:] if argv is None else argv)
  from metasgd_jax.datasets.messages import DatasetError
  from metasgd_jax.io.files import WriterError

  for stream in (sys.stdout, sys.stderr):  # A file's name may hold what a terminal cannot show.
    if isinstance(stream, io.TextIOWrapper):
      stream.reconfigure(errors='backslashreplace')
  try:
    finish = args.prepare(args)
  except (DatasetError, ValueError, WriterError) as e:
    return _refuse(e)
  try:
    finish()
  except WriterError as e:
    return _refuse(e)
  return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
  """Returns the arguments; exits with code 2, naming what is nearest, where there is a mistake in them."""
  parser_class: Any = functools.partial(_Parser, given=argv, allow_abbrev=False)
  parser = parser_class(
    prog='metasgd', description='Few-shot classification of pictures by a trained model, adapted in one step.'
  )
  parser.add_argument('--version', action='version', version=f'metasgd_jax {__version__}')
  commands = parser.add_subparsers(title='commands', required=True, metavar='command', parser_class=parser_class)

  for command in (predict, info, export):
    command.add(commands)

  args, unknown = parser.parse_known_args(argv)
  if unknown:
    args.parser.error(f'unrecognized arguments: {" ".join(unknown)}')
  return args


class _Parser(argparse.ArgumentParser):
  """An argparse parser whose errors name the command or flag that is nearest to one it does not know."""

  def __init__(self, *args, given: Sequence[str] = (), **kwargs):
    super().__init__(*args, **kwargs)
    self._given = given

  def error(self, message: str) -> NoReturn:
    super().error(with_cut(message, self._given) + self._advice())

  def _advice(self) -> str:
    """What was probably meant by the first word that is not known, or by the first value that is no choice."""
    flags = self._option_string_actions
    commands = [a.choices for a in self._actions if isinstance(a, argparse._SubParsersAction)]
    known = [*flags, *(name for choices in commands for name in choices)]
    for word, value in words(self._given):
      choices = list(flags[word].choices or []) if word in flags else []
      if word not in known:
        choices, value = [k for k in known if k.startswith('--') == word.startswith('--')], word
      elif value in choices:
        continue
      if meant := near(value, choices):
        return f'; for {cut(word if word == value else f"{word}={value}")}, {meant.removeprefix("; ")}'
    return ''


def _refuse(e: Exception) -> int:
  from metasgd_jax.datasets.messages import printable

  print(f'error: {printable(" ".join(str(e).split()))}', file=sys.stderr)
  return 1
