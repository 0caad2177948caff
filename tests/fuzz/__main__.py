"""Reads many hostile files: `python -m tests.fuzz --inputs=10000`; ends with 1 if a reader did what no reader may."""

import argparse
import collections
import os
import pathlib
import random
import re
import sys
import time
import traceback

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')

from . import guard
from .reader import Reader, attempt, trees_of
from .readers import READERS


def main() -> int:
  """Runs, shows how far it is, and prints a table by reader."""
  parser = argparse.ArgumentParser(prog='python -m tests.fuzz', description=__doc__)
  parser.add_argument('--inputs', type=int, default=10_000, help='how many, over all readers (default: 10000)')
  parser.add_argument('--seed', type=int, default=0, help='of the inputs (default: 0)')
  parser.add_argument('--reader', help='only those whose name contains this')
  parser.add_argument('--stop', action='store_true', help='stop at the first that should not be, with its traceback')
  parser.add_argument('--at', type=int, help='run the input of this number alone')
  args = parser.parse_args()
  chosen = [reader for reader in READERS if not args.reader or args.reader in reader.name]
  if not chosen:
    parser.error(f'no reader is called {args.reader}; there are {", ".join(r.name for r in READERS)}')
  shares = sum(reader.share for reader in chosen)
  wrong = 0
  print(f'{"reader":24} {"inputs":>7} {"accepted":>9} {"refused":>8} {"wrong":>6} {"seconds":>8} {"slowest":>8}')
  total = collections.Counter()
  begun = time.monotonic()
  for reader in chosen:
    count = -int(-args.inputs * reader.share // shares)
    found = _run(reader, range(count) if args.at is None else [args.at], args)
    total.update(found)
    wrong += found['wrong']
    _line(reader.name, found)
  total['slowest'] = 0
  total['seconds'] = time.monotonic() - begun
  _line('all', total)
  return 1 if wrong else 0


def _line(name: str, found: collections.Counter) -> None:
  print(
    f'{name:24} {found["inputs"]:7,} {found["accepted"]:9,} {found["refused"]:8,} {found["wrong"]:6,} '
    f'{found["seconds"]:8.1f} {found["slowest"]:8.2f}',
    flush=True,
  )


def _run(reader: Reader, numbers, args) -> collections.Counter:
  trees_of(reader)
  found, told = collections.Counter(), set()
  begun = shown = time.monotonic()
  for i in numbers:
    start = time.monotonic()
    try:
      refusal = attempt(reader, random.Random(f'{args.seed} {reader.name} {i}'))
      found['accepted' if refusal is None else 'refused'] += 1
    except (guard.ViolationError, RecursionError) as e:
      found['wrong'] += 1
      place = traceback.extract_tb((e.__cause__ or e).__traceback__)[-1]
      if (key := (re.sub(r'/tmp\S*', '', str(e))[:40], place.filename, place.lineno)) not in told:
        told.add(key)
        print(f'wrong: {reader.name}, input {i}: {e} ({pathlib.Path(place.filename).name}:{place.lineno})', flush=True)
      if args.stop:
        raise
    now = time.monotonic()
    found['inputs'] += 1
    found['slowest'] = max(found['slowest'], now - start)
    if now - shown > 10:
      shown = now
      print(f'  {reader.name}: {found["inputs"]:,} of {len(numbers):,}', file=sys.stderr, flush=True)
  found['seconds'] = time.monotonic() - begun
  return found


if __name__ == '__main__':
  sys.exit(main())
