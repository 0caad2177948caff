"""Measures the rates of several programs in turn, so that other work of the machine slows all of them equally."""

import statistics
import time
from collections.abc import Callable, Mapping


def rates(
  programs: Mapping[str, Callable[[int], object]], *, seconds: float = 2.0, rounds: int = 7
) -> dict[str, list[float]]:
  """Returns the iterations per second of each program in each round, as a dict of lists by name.

  Args:
    programs: Dict `{name: run}`. `run(n)` takes n iterations and returns when they are done. Each program runs before
      the first round, to compile and to find the n that takes `seconds`.
    seconds: Approximate duration of a turn. A turn has at least one iteration.
    rounds: Number of turns of each program.
  """
  counts = {}
  for name, run in programs.items():
    run(1)
    n = 1
    while True:
      start = time.perf_counter()
      run(n)
      taken = time.perf_counter() - start
      if taken > seconds / 10:
        break
      n *= 4
    counts[name] = max(1, round(n * seconds / taken))
  found: dict[str, list[float]] = {name: [] for name in programs}
  for _ in range(rounds):
    for name, run in programs.items():
      start = time.perf_counter()
      run(counts[name])
      found[name].append(counts[name] / (time.perf_counter() - start))
  return found


def ratio(found: Mapping[str, list[float]], a: str, b: str) -> float:
  """Returns the median over rounds of the rate of program `a` divided by the rate of program `b`."""
  return statistics.median(x / y for x, y in zip(found[a], found[b], strict=True))


def table(found: Mapping[str, list[float]], ours: str, more: Mapping[str, Mapping[str, str]] | None = None) -> str:
  """Returns a table in Markdown with a row for each program.

  The columns are the median rate, its range, the median over rounds of the rate of `ours` divided by the rate of this
  program, and the columns in `more`.

  Args:
    found: Rates from `rates`.
    ours: Name of the program whose rate is divided by the rates of the others.
    more: Further columns, `{heading: {program: cell}}`.
  """
  more = more or {}
  headings = ['program', 'iterations/s, median', 'least to greatest', 'ours / this program', *more]
  lines = ['| ' + ' | '.join(headings) + ' |', '|' + ' --- |' * len(headings)]
  show = lambda v: f'{v:,.0f}' if v >= 100 else f'{v:.3g}'
  for name, values in found.items():
    cells = [name, show(statistics.median(values)), f'{show(min(values))} to {show(max(values))}']
    cells += [f'{ratio(found, ours, name):.2f}', *(column.get(name, '') for column in more.values())]
    lines.append('| ' + ' | '.join(cells) + ' |')
  return '\n'.join(lines)
