"""The command `metasgd`: it classifies images with a trained model, describes a model, or exports it to one file.

Modules that are slow to import are imported by the command that uses them.
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
  """Runs the command line and returns its exit code: 0, or 1 after an error, which standard error reports."""
  args = parse(sys.argv[1:] if argv is None else argv)
  from metasgd_jax.datasets.messages import DatasetError
  from metasgd_jax.io.files import WriterError

  for stream in (sys.stdout, sys.stderr):  # A file name may have characters that a terminal cannot show.
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
  """Returns the parsed arguments. If they are wrong, exits with code 2 and suggests the nearest known word."""
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
  """An argparse parser whose errors suggest the command, flag or choice that is nearest to an unknown one."""

  def __init__(self, *args, given: Sequence[str] = (), **kwargs):
    super().__init__(*args, **kwargs)
    self._given = given

  def error(self, message: str) -> NoReturn:
    super().error(with_cut(message, self._given) + self._advice())

  def _advice(self) -> str:
    """Returns a suggestion for the first unknown word, or for the first value that is not among its flag's choices."""
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
