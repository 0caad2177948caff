"""A check of the tests: faults are put into metasgd_jax, one at a time, and the tests that run them must fail.

python -m tests.faults cover --data=DIR                 which test runs which line; takes as long as the whole suite
python -m tests.faults run --data=DIR --results=FILE    goes on where it stopped
python -m tests.faults table --results=BEFORE --results=AFTER > tests/faults/RESULTS.md
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys

from tests.faults import draw, run

HERE = pathlib.Path(__file__).resolve().parent
SEED = 20
COUNT = 4
HEADER = """# Faults in the package, and the tests that catch them

{faults} faults were drawn with seed {seed}, {count} in each of {modules} modules, before the package was regrouped.
The first tier of tests catches {first} of them, and the slow tier {slow} more. The other {equivalent} are equivalent:
they change no result. Before the tests were made cheaper, each fault was tried on those tests that cover its line and
together take at most a minute, so "missed" in the second column means that these tests missed it.

| fault | before | after | caught by, or why not |
| --- | --- | --- | --- |"""


def main() -> None:
  """Reads the command line and does what it says."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('command', choices=('cover', 'run', 'table'))
  parser.add_argument('--root', type=pathlib.Path, default=HERE.parents[1], help='The checkout that is tested.')
  parser.add_argument('--data', type=pathlib.Path, default=pathlib.Path('coverage'), help='Folder for coverage.')
  parser.add_argument('--results', type=pathlib.Path, action='append', help='File of verdicts, as JSON lines.')
  parser.add_argument('--cores', default='0,1', help='Processor cores; each takes a fault at a time.')
  options = parser.parse_args()
  faults = [fault for module in draw.MODULES for fault in draw.draw(options.root, module, COUNT, SEED)]
  data = options.data.resolve()
  if options.command == 'cover':
    cover(options.root, data)
  elif options.command == 'run':
    cores = [int(core) for core in options.cores.split(',')]
    run.run(faults, options.root, run.covering_tests(data / 'combined'), data / 'clones', options.results[0], cores)
  else:
    print(table(faults, *map(run.read, options.results)))


def cover(root: pathlib.Path, data: pathlib.Path) -> None:
  """Runs all tests of both tiers under coverage, and combines what each process wrote."""
  data.mkdir(parents=True, exist_ok=True)
  config = f'--rcfile={HERE / "coverage.ini"}'
  environment = os.environ | {'PYTHONPATH': str(HERE.parents[1]), 'COVERAGE_FILE': str(data / 'process')}
  tests = ['-m', 'pytest', '-q', '-p', 'tests.faults.contexts', '-n', '2', '--dist', 'loadfile']
  subprocess.run([sys.executable, '-m', 'coverage', 'run', config, *tests], cwd=root, env=environment, check=True)
  written = [str(path) for path in sorted(data.glob('process.*'))]
  combine = ['combine', config, '--keep', f'--data-file={data / "combined"}', *written]
  subprocess.run([sys.executable, '-m', 'coverage', *combine], cwd=root, check=True)


def table(faults: list[draw.Fault], before: list[run.Verdict], after: list[run.Verdict]) -> str:
  """Returns the table of RESULTS.md."""
  old, new = ({verdict.fault: verdict for verdict in verdicts} for verdicts in (before, after))
  notes = json.loads((HERE / 'notes.json').read_text())
  tiers = [new[fault.name].tier for fault in faults]
  lines = [
    HEADER.format(
      faults=len(faults),
      seed=SEED,
      count=COUNT,
      modules=len(draw.MODULES),
      first=tiers.count('first'),
      slow=tiers.count('slow'),
      equivalent=tiers.count(None),
    )
  ]
  for fault in faults:
    earlier, verdict = old[fault.name], new[fault.name]
    note = notes.get(fault.name) or verdict.test or ''
    cells = f'`{fault.name}`', 'caught' if earlier.tier else 'missed', verdict.tier or 'equivalent', note
    lines.append('| ' + ' | '.join(cell.replace('|', '\\|') for cell in cells) + ' |')
  return '\n'.join(lines)


if __name__ == '__main__':
  main()
