"""Gives random values to functions, and ends with 1 if a result is wrong.

python -m tests.fuzz.random_values --inputs=10000
"""

import argparse
import collections
import sys
import time

import hypothesis
import jax

from .values import KINDS, Kind


def main() -> int:
  """Runs, and prints a line of a table for each kind of value."""
  parser = argparse.ArgumentParser(prog='python -m tests.fuzz.random_values', description=__doc__)
  parser.add_argument('--inputs', type=int, default=10_000, help='how many, over all kinds (default: 10000)')
  parser.add_argument('--seed', type=int, default=0, help='of the inputs (default: 0)')
  parser.add_argument('--kind', default='', help='only those whose name contains this')
  args = parser.parse_args()
  chosen = {name: kind for name, kind in KINDS.items() if args.kind in name}
  if not chosen:
    parser.error(f'no kind is called {args.kind}; there are {", ".join(KINDS)}')
  jax.config.update('jax_disable_most_optimizations', True)  # Compiling is most of the time.
  shares = sum(kind.share for kind in chosen.values())
  print(f'{"kind":24} {"inputs":>7} {"accepted":>9} {"refused":>8} {"seconds":>8}  oracle')
  wrong = 0
  for name, kind in chosen.items():
    begun, found = time.monotonic(), collections.Counter()
    try:
      run(kind, round(args.inputs * kind.share / shares), args.seed, found)
    except AssertionError as e:
      wrong += 1
      print(f'wrong: {name}: {e}')
    seconds = time.monotonic() - begun
    accepted, refused = found['accepted'], found['refused']
    print(f'{name:24} {accepted + refused:7,} {accepted:9,} {refused:8,} {seconds:8.1f}  {kind.oracle}', flush=True)
  return 1 if wrong else 0


def run(kind: Kind, inputs: int, seed: int, found: collections.Counter) -> None:
  """Checks random inputs, and counts those that were accepted and refused. Raises AssertionError if one is wrong."""

  @hypothesis.seed(seed)
  @hypothesis.settings(
    max_examples=inputs,
    database=None,
    deadline=None,
    suppress_health_check=list(hypothesis.HealthCheck),
  )
  @hypothesis.given(kind.draw)
  def check(example):
    found['accepted' if kind.check(example) else 'refused'] += 1

  check()


if __name__ == '__main__':
  sys.exit(main())
