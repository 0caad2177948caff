"""The arguments of the command `metasgd`, and the errors that suggest the nearest known word for a mistyped one."""

import argparse
import difflib
import functools
import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NoReturn

from metasgd_jax.cli.telling import cut
from metasgd_jax.version import __version__


def parse(argv: Sequence[str]) -> argparse.Namespace:
  """Returns the parsed arguments. If they are wrong, exits with code 2 and suggests the nearest known word."""
  parser = _Parser(argv, prog='metasgd', description='Few-shot classification of pictures by a trained model.')
  parser.add_argument('--version', action='version', version=f'metasgd_jax {__version__}')
  make: Any = functools.partial(_Parser, argv)
  commands = parser.add_subparsers(title='commands', dest='command', required=True, parser_class=make)
  parser.commands = {'predict': _predict(commands), 'info': _info(commands), 'export': _export(commands)}
  args, unknown = parser.parse_known_args(argv)
  if unknown:
    parser.commands[args.command].error(f'unrecognized arguments: {" ".join(unknown)}')
  return args


class _Parser(argparse.ArgumentParser):
  """An argparse parser whose errors suggest the command or flag that is nearest to an unknown one."""

  def __init__(self, argv: Sequence[str], **options: Any):
    super().__init__(allow_abbrev=False, **options)
    self.argv = argv
    self.commands: dict[str, _Parser] = {}

  def error(self, message: str) -> NoReturn:
    message = re.sub(r"([^\s']{80})[^\s']+", r'\1…', message)
    known = [*self._option_string_actions, *self.commands]
    for word in (argument.partition('=')[0] for argument in self.argv):
      alike = [name for name in known if name.startswith('--') == word.startswith('--')]
      if word not in known and (advice := _advice(word, alike)):
        super().error(message + advice)
    super().error(message)


def _advice(word: str, known: Iterable[str], flag: str = '') -> str:
  """Returns a question that suggests the known word nearest to `word`, or an empty string if none is near."""
  found = difflib.get_close_matches(cut(word), known, 1)
  return f'; for {flag}{cut(word)}, did you mean {found[0]}?' if found else ''


def _predict(commands: Any) -> _Parser:
  description = 'Adapts to the classes of --support in one step, and sorts the pictures of --query among them.'
  parser = commands.add_parser('predict', help='sort a folder of pictures by a few examples', description=description)
  parser.add_argument('--model', default='omniglot', help="a model's file or name (default: omniglot)")
  parser.add_argument('--support', metavar='DIR', required=True, help='examples: a sub-folder for each class')
  parser.add_argument('--query', metavar='DIR', required=True, help='the pictures to sort')
  parser.add_argument('--out', metavar='DIR', required=True, help='gets predictions.csv and predictions.png')
  mode = parser.add_mutually_exclusive_group()
  mode.add_argument('--inductive', action='store_true', default=True, help='normalise by the examples (default)')
  transductive = 'normalise all of --query together: better if it has dozens of pictures, and all classes among them'
  mode.add_argument('--transductive', dest='inductive', action='store_false', help=transductive)
  invert = 'turn light into dark; auto: of each picture with a light background, where the model wants dark ones'
  parser.add_argument('--invert', metavar='{auto,yes,no}', type=_auto_or_bool, default='auto', help=invert)
  return parser


def _auto_or_bool(text: str) -> bool | Literal['auto']:
  choices: dict[str, bool | Literal['auto']] = {'auto': 'auto', 'yes': True, 'no': False}
  if text not in choices:
    advice = _advice(text, choices, '--invert=')
    raise argparse.ArgumentTypeError(f'invalid choice: {text!r} (choose from {", ".join(choices)}){advice}')
  return choices[text]


def _info(commands: Any) -> _Parser:
  parser = commands.add_parser('info', help='describe a model, or list the models that ship with metasgd')
  parser.add_argument('--model', help="a model's file or name (default: list the models that ship)")
  return parser


def _export(commands: Any) -> _Parser:
  description = 'Writes adapt and predict as programs of jax.export, with the parameters; docs/export.md reads them.'
  parser = commands.add_parser('export', help='write a model as one file that needs only JAX', description=description)
  parser.add_argument('--model', default='omniglot', help="a model's file or name (default: omniglot)")
  parser.add_argument('--out', metavar='FILE', required=True, help='the file to write, a zip')
  parser.add_argument('--way', metavar='N', type=int, help="number of classes (default: the model's)")
  parser.add_argument('--shot', metavar='K', type=int, help='examples of each class (default: any number)')
  parser.add_argument('--transductive', action='store_true', help='normalise the pictures of a call together')
  platforms = 'some of cpu,cuda,tpu,rocm, with commas between (default: cpu,cuda,tpu)'
  parser.add_argument('--platforms', default='cpu,cuda,tpu', help=platforms)
  return parser
