"""Reads hostile files that atheris makes, led by what code they reach: `python -m tests.fuzz.coverage READER`.

Needs the extra `fuzz`. An input is two bytes, which valid files to begin from and which of them is replaced, and what
it is replaced by. One that does what no reader may is left as crash-…; to read it again, give it as the last argument.
"""

import argparse
import os
import pathlib
import random
import sys
import tempfile

import atheris

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')

with atheris.instrument_imports(include=['metasgd_jax', 'PIL', 'tarfile', 'zipfile']):
  from .mutations import ANY
  from .reader import attempt, trees_of
  from .readers import READERS


def main() -> None:
  """Fuzzes one reader until the time is up or something is wrong."""
  parser = argparse.ArgumentParser(prog='python -m tests.fuzz.coverage', description=__doc__.partition(':')[0])
  parser.add_argument('reader', help=f'the beginning of a name: {", ".join(reader.name for reader in READERS)}')
  parser.add_argument('--seconds', type=int, default=60, help='of fuzzing (default: 60)')
  parser.add_argument('input', nargs='*', help='inputs to read instead')
  args = parser.parse_args()
  reader = next((r for r in READERS if r.name.startswith(args.reader)), None)
  if reader is None:
    parser.error(f'no reader is called {args.reader}')
  trees = trees_of(reader)

  def one(data: bytes) -> None:
    if len(data) >= 2:
      tree = trees[data[0] % len(trees)]
      name = sorted(tree)[data[1] % len(tree)]
      attempt(reader, random.Random(len(data)), tree={**tree, name: data[2:]})

  def mutate(data: bytes, most: int, seed: int) -> bytes:
    rng = random.Random(seed)
    if rng.random() < 0.5 or len(data) < 3:
      return atheris.Mutate(data, most)
    edits = (*ANY, *(edit for these in reader.edits.values() for edit in these))
    try:
      return (data[:2] + rng.choice(edits)(rng, data[2:]))[:most]
    except Exception:  # It is no longer of the edit's format.
      return atheris.Mutate(data, most)

  with tempfile.TemporaryDirectory(prefix='fuzz-corpus-') as corpus:
    for i, tree in enumerate(trees):
      for j, (_, content) in enumerate(sorted(tree.items())):
        pathlib.Path(corpus, f'{i}-{j}').write_bytes(bytes((i, j)) + content)
    flags = args.input or [f'-max_total_time={args.seconds}', '-max_len=100000', '-print_final_stats=1', corpus]
    atheris.Setup([sys.argv[0], *flags], one, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == '__main__':
  main()
