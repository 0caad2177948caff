"""The arguments of the command `metasgd`."""

import argparse
import functools
from collections.abc import Sequence
from typing import Any, Literal

from metasgd_jax.version import __version__

INVERT: dict[str, bool | Literal['auto']] = {'auto': 'auto', 'yes': True, 'no': False}
"""Value of `FewShotClassifier.invert` for each value of --invert."""


def parse(argv: Sequence[str]) -> argparse.Namespace:
  """Returns the parsed arguments. If they are wrong, prints the usage and the reason, and exits with code 2."""
  make: Any = functools.partial(argparse.ArgumentParser, allow_abbrev=False)
  parser = make('metasgd', description='Few-shot classification of pictures by a trained model.')
  parser.add_argument('--version', action='version', version=f'metasgd_jax {__version__}')
  commands = parser.add_subparsers(title='commands', dest='command', required=True, parser_class=make)
  added = {'demo': _demo(commands), 'predict': _predict(commands), 'info': _info(commands), 'export': _export(commands)}
  args, unknown = parser.parse_known_args(argv)
  if unknown:  # The error of the command shows its flags.
    added[args.command].error(f'unrecognized arguments: {" ".join(unknown)}')
  for name in ('model', 'support', 'query', 'out', 'copy_to', 'move_to'):
    if getattr(args, name, None) == '':  # An unset shell variable gives an empty path.
      is_file = name == 'model' or args.command == 'export'
      advice = 'give the path of a file' if is_file else 'give a folder, such as .'
      added[args.command].error(f'--{name.replace("_", "-")} is empty; {advice}')
  return args


def _demo(commands: Any) -> argparse.ArgumentParser:
  description = 'Draws example pictures, and sorts them with `metasgd predict`. It takes about ten seconds.'
  parser = commands.add_parser('demo', help='draw example pictures, and sort them', description=description)
  out = 'new or empty folder for the pictures and the results (default: metasgd_demo)'
  parser.add_argument('--out', metavar='DIR', default='metasgd_demo', help=out)
  return parser


def _predict(commands: Any) -> argparse.ArgumentParser:
  description = (
    'Adapts a model to the classes of --support, and assigns each picture of --query to one of these classes.'
  )
  parser = commands.add_parser(
    'predict', help='classify pictures, given a few examples of each class', description=description
  )
  model = 'file or name of a model (default: by the pictures)'
  parser.add_argument('--model', default='auto', help=model)
  parser.add_argument('--support', metavar='DIR', required=True, help='examples: a sub-folder for each class')
  parser.add_argument('--query', metavar='DIR', required=True, help='folder of the pictures to classify')
  parser.add_argument(
    '--out', metavar='DIR', required=True, help='folder to write predictions.csv and predictions.png to'
  )
  parser.add_argument('--overwrite', action='store_true', help='replace the results of an earlier call in --out')
  sorting = parser.add_mutually_exclusive_group()
  sorting.add_argument('--copy-to', metavar='DIR', help='copy each picture to the folder of its class in DIR')
  sorting.add_argument('--move-to', metavar='DIR', help='move each picture to the folder of its class in DIR')
  unsure = "answer 'unsure' below this probability (default: 0)"
  parser.add_argument('--min-probability', metavar='P', type=float, default=0.0, help=unsure)
  unlike = "answer 'unsure' below this likeness (0 to 1, or auto)"
  parser.add_argument('--min-likeness', metavar='L', type=_likeness, help=unlike)
  mode = parser.add_mutually_exclusive_group()
  mode.add_argument(
    '--inductive', action='store_true', default=True, help='batch norm by the statistics of the examples (default)'
  )
  transductive = (
    'batch norm uses the statistics of all pictures of --query: better for dozens of pictures of all classes'
  )
  mode.add_argument('--transductive', dest='inductive', action='store_false', help=transductive)
  invert = 'exchange light and dark (auto: if the model needs it)'
  parser.add_argument('--invert', choices=INVERT, default='auto', help=invert)
  return parser


def _likeness(text: str) -> float | Literal['auto']:
  """Returns the value of --min-likeness."""
  if text == 'auto':
    return 'auto'
  try:
    value = float(text)
  except ValueError:
    value = -1.0
  if not 0 <= value <= 1:
    raise argparse.ArgumentTypeError(f'must be auto or a number from 0 to 1, got {text!r}')
  return value


def _info(commands: Any) -> argparse.ArgumentParser:
  parser = commands.add_parser('info', help='describe a model, or list the models that ship with metasgd')
  parser.add_argument(
    '--model', help='path of a model file, or name of a shipped model (default: list the shipped models)'
  )
  return parser


def _export(commands: Any) -> argparse.ArgumentParser:
  description = (
    'Writes adapt and predict as programs of jax.export, with the parameters; docs/export.md shows how to run them.'
  )
  parser = commands.add_parser('export', help='write a model as one file that needs only JAX', description=description)
  parser.add_argument('--model', default='omniglot', help='file or name of a model (default: omniglot)')
  parser.add_argument('--out', metavar='FILE', required=True, help='zip file to write')
  parser.add_argument('--way', metavar='N', type=int, help="number of classes (default: the model's)")
  parser.add_argument('--shot', metavar='K', type=int, help='examples of each class (default: any number)')
  parser.add_argument(
    '--transductive', action='store_true', help='batch norm uses the statistics of all query pictures'
  )
  platforms = 'platforms to export for, some of cpu,cuda,tpu,rocm, separated by commas (default: cpu,cuda,tpu)'
  parser.add_argument('--platforms', default='cpu,cuda,tpu', help=platforms)
  return parser
