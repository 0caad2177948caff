"""`metasgd export`: writes a model as one file that runs without this package."""

import argparse
from collections.abc import Callable
from typing import Any

from metasgd_jax.cli.telling import load_model, say

PLATFORMS = 'cpu,cuda,tpu'


def add(commands: Any) -> None:
  """Adds this command to the subparsers `commands`."""
  parser = commands.add_parser(
    'export',
    help='write a model as one file that runs without this package',
    usage='%(prog)s --out=FILE [options]',
    description='Writes adapt and predict as programs of jax.export, with the parameters; docs/export.md reads them.',
  )
  parser.add_argument('--model', default='omniglot', help="a model's file or name (default: omniglot)")
  parser.add_argument('--out', metavar='FILE', required=True, help='the file to write, a zip')
  parser.add_argument('--way', metavar='N', type=int, help="classes to tell apart (default: the model's)")
  parser.add_argument('--shot', metavar='K', type=int, help='examples of each class (default: any number)')
  parser.add_argument('--transductive', action='store_true', help='normalise the pictures of a call together')
  parser.add_argument(
    '--platforms', default=PLATFORMS, help=f'some of {PLATFORMS},rocm, with commas between (default: {PLATFORMS})'
  )
  parser.set_defaults(prepare=prepare, parser=parser)


def prepare(args: argparse.Namespace) -> Callable[[], None]:
  """Reads the model, and writes and checks the file. Returns a function that prints a report about the file."""
  from metasgd_jax.datasets.messages import at_home
  from metasgd_jax.deploy import export

  model, out = load_model(args.model), at_home(args.out)
  inductive, platforms = not args.transductive, args.platforms.split(',')
  found = export.export_model(
    out, model, way=args.way, shot=args.shot, inductive=inductive, platforms=platforms, report=say
  )  # fmt: skip
  about = found.about
  how = f'gives the same numbers on {about["checked_on"]}'
  if about['checked_on'] is None:
    how = 'was not run, since this machine has none of its platforms'
  pictures, labels = about['adapt']['takes'][1:]
  lines = [
    f'{out}: {out.stat().st_size / 1e6:.2f} MB, for {", ".join(about["platforms"])}; read back, it {how}',
    f'adapt    parameters, pictures {pictures} of {about["says"]["pixels"]}, labels {labels} from 0',
    f'predict  adapted, pictures {about["predict"]["takes"][1]} → logits {about["predict"]["gives"]}',
  ]
  return lambda: say('\n'.join(lines))
