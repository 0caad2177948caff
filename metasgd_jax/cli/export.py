"""`metasgd export`: writes a model as one file that runs without this package."""

import argparse
from typing import Any

from metasgd_jax.cli.telling import say
from metasgd_jax.deploy.export import export_model
from metasgd_jax.deploy.model_file import load_model
from metasgd_jax.io.files import as_path, told


def run(args: argparse.Namespace) -> None:
  """Exports the model to a file, checks the file, and prints a report about it."""
  model, out = load_model(args.model), as_path(args.out)
  with told(out.parent, 'give another --out'):
    out.parent.mkdir(parents=True, exist_ok=True)
  options: dict[str, Any] = dict(way=args.way, shot=args.shot, inductive=not args.transductive)
  about = export_model(out, model, **options, platforms=args.platforms.split(','), report=say).about
  checked = about['checked_on']
  how = f'gives the same numbers on {checked}' if checked else 'was not run: this machine has none of its platforms'
  pictures, labels = about['adapt']['takes'][1:]
  say(
    f'{out}: {out.stat().st_size / 1e6:.2f} MB, for {", ".join(about["platforms"])}; read back, it {how}',
    f'adapt    parameters, pictures {pictures} of {about["says"]["pixels"]}, labels {labels} from 0',
    f'predict  adapted, pictures {about["predict"]["takes"][1]} → logits {about["predict"]["gives"]}',
  )
