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
The names of modules and tests and the line numbers are of that time. Modules that were added later have no row.
The first tier of tests catches {first} of them, and the slow tier {slow} more. The other {equivalent} are equivalent:
they change no result; {missed} were missed. Before the tests were made cheaper, each fault was tried on those tests
that cover its line and together take at most a minute, so "missed" in the second column means that these missed it.

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
  data = options.data.resolve()
  if options.command == 'cover':
    cover(options.root, data)
  elif options.command == 'run':
    faults = [fault for module in draw.MODULES for fault in draw.draw(options.root, module, COUNT, SEED)]
    cores = [int(core) for core in options.cores.split(',')]
    run.run(faults, options.root, run.covering_tests(data / 'combined'), data / 'clones', options.results[0], cores)
  else:
    print(table(*map(run.read, options.results)))


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


def table(before: list[run.Verdict], after: list[run.Verdict]) -> str:
  """Returns RESULTS.md. A fault that no test caught is missed, unless its note says that it is equivalent."""
  old = {verdict.fault: verdict for verdict in before}
  notes = json.loads((HERE / 'notes.json').read_text())
  outcomes, lines = [], []
  for verdict in after:
    note = notes.get(verdict.fault) or verdict.test or ''
    outcomes.append(verdict.tier or ('equivalent' if note.startswith('equivalent') else 'missed'))
    cells = f'`{verdict.fault}`', 'caught' if old[verdict.fault].tier else 'missed', outcomes[-1], note
    lines.append('| ' + ' | '.join(cell.replace('|', '\\|') for cell in cells) + ' |')
  modules = {verdict.fault.split(':')[0] for verdict in after}
  counts = {name: outcomes.count(name) for name in ('first', 'slow', 'equivalent', 'missed')}
  header = HEADER.format(faults=len(after), seed=SEED, count=COUNT, modules=len(modules), **counts)
  return '\n'.join([header, *lines])


if __name__ == '__main__':
  main()
