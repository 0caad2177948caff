"""`metasgd demo`: draws example pictures, and sorts them with `metasgd predict`."""

import argparse
import csv
import pathlib
import shlex

import numpy as np

from metasgd_jax.cli import arguments, predict
from metasgd_jax.cli.doodles import THINGS, doodle
from metasgd_jax.cli.telling import say
from metasgd_jax.io import files

EXAMPLES, PICTURES = 1, 5
"""Number of examples, and of pictures to sort, of each thing."""


def run(args: argparse.Namespace) -> None:
  """Draws the pictures, prints the command that sorts them, runs this command, and compares it with the truth."""
  out = files.as_path(args.out)
  with files.told(out, 'give another --out'):
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
      raise files.WriterError(f'--out={args.out} exists and is not an empty folder; give another --out')
    truth = _draw(out)
  say(
    f'{out / "examples"} has {EXAMPLES} drawing of each of {len(THINGS)} things, in a folder for each thing',
    f'{out / "pictures"} has {len(truth)} more drawings of these things, which are to be sorted',
  )
  folders = {'support': 'examples', 'query': 'pictures', 'out': 'results', 'copy-to': 'sorted'}
  command = ['predict', *(f'--{flag}={out / folder}' for flag, folder in folders.items())]
  say(f'$ metasgd {shlex.join(command)}')
  predict.run(arguments.parse(command))
  with (out / 'results' / 'predictions.csv').open(newline='', encoding='utf-8') as file:
    right = sum(truth[row['file']] == row['prediction'] for row in csv.DictReader(file))
  picture = out / 'results' / 'predictions.png'
  shows = f'; {picture} shows them' if picture.exists() else ''
  say('', f'{right} of {len(truth)} drawings are in the right folder{shows}')


def _draw(out: pathlib.Path) -> dict[str, str]:
  """Writes the drawings, and returns which thing each drawing in `pictures` shows: `{file name: name}`."""
  rng = np.random.default_rng(0)
  for name in THINGS:
    (out / 'examples' / name).mkdir(parents=True)
    for i in range(EXAMPLES):
      doodle(name, rng).save(out / 'examples' / name / f'{i + 1}.png')
  (out / 'pictures').mkdir()
  order = rng.permutation([name for name in THINGS for _ in range(PICTURES)])
  truth = {f'{i + 1:02}.png': str(name) for i, name in enumerate(order)}
  for file, name in truth.items():
    doodle(name, rng).save(out / 'pictures' / file)
  return truth
