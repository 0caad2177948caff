"""The arguments of the command `metasgd`."""

import argparse
import functools
from collections.abc import Sequence
from typing import Any, Literal

from metasgd_jax.version import __version__

INVERT: dict[str, bool | Literal['auto']] = {'auto': 'auto', 'yes': True, 'no': False}
"""Values of `FewShotClassifier.invert` by the words of the command line."""


def parse(argv: Sequence[str]) -> argparse.Namespace:
  """Returns the parsed arguments. If they are wrong, exits with code 2 after the usage and the reason."""
  make: Any = functools.partial(argparse.ArgumentParser, allow_abbrev=False)
  parser = make('metasgd', description='Few-shot classification of pictures by a trained model.')
  parser.add_argument('--version', action='version', version=f'metasgd_jax {__version__}')
  commands = parser.add_subparsers(title='commands', dest='command', required=True, parser_class=make)
  added = {'predict': _predict(commands), 'info': _info(commands), 'export': _export(commands)}
  args, unknown = parser.parse_known_args(argv)
  if unknown:  # The error of the command shows its flags.
    added[args.command].error(f'unrecognized arguments: {" ".join(unknown)}')
  return args


def _predict(commands: Any) -> argparse.ArgumentParser:
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
  parser.add_argument('--invert', choices=INVERT, default='auto', help=invert)
  return parser


def _info(commands: Any) -> argparse.ArgumentParser:
  parser = commands.add_parser('info', help='describe a model, or list the models that ship with metasgd')
  parser.add_argument('--model', help="a model's file or name (default: list the models that ship)")
  return parser


def _export(commands: Any) -> argparse.ArgumentParser:
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
