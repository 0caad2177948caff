"""The command `metasgd`: it classifies images with a trained model, describes a model, or exports it to one file."""

import sys
from collections.abc import Sequence

from metasgd_jax.cli.arguments import parse as parse
from metasgd_jax.cli.telling import escape_unprintable


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line and returns its exit code: 0, or 1 after an error, which standard error reports."""
  escape_unprintable()
  args = parse(sys.argv[1:] if argv is None else argv)
  from metasgd_jax.cli import demo, export, info, predict  # Their imports are slow, and --help does not need them.
  from metasgd_jax.datasets.messages import DatasetError, printable
  from metasgd_jax.io.files import WriterError

  run = {'demo': demo.run, 'predict': predict.run, 'info': info.run, 'export': export.run}[args.command]
  try:
    run(args)
  except (DatasetError, ValueError, WriterError) as e:
    print(f'error: {printable(" ".join(str(e).split()))}', file=sys.stderr)
    return 1
  return 0
