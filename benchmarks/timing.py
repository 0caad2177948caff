"""Rates of several programs, measured in turn so that what else a machine does falls on all of them alike."""

import statistics
import time
from collections.abc import Callable, Mapping


def rates(
  programs: Mapping[str, Callable[[int], object]], *, seconds: float = 2.0, rounds: int = 7
) -> dict[str, list[float]]:
  """Returns each program's iterations per second in each round.

  Args:
    programs: `{name: run}`; `run(n)` does n iterations and returns when they are done. Each runs once beforehand, to
      compile and warm up, and its rate then sets its n.
    seconds: about how long a program's turn takes; one iteration at the least.
    rounds: turns of each.
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
  """Returns the median over rounds of a's rate divided by b's."""
  return statistics.median(x / y for x, y in zip(found[a], found[b], strict=True))


def table(found: Mapping[str, list[float]], ours: str, more: Mapping[str, Mapping[str, str]] | None = None) -> str:
  """Returns Markdown: each program's median rate, its range, the median over rounds of ours divided by it, and more.

  Args:
    found: from `rates`.
    ours: the program to divide by the others.
    more: `{heading: {program: cell}}`.
  """
  more = more or {}
  headings = ['program', 'iterations/s, median', 'least to greatest', 'ours / it', *more]
  lines = ['| ' + ' | '.join(headings) + ' |', '|' + ' --- |' * len(headings)]
  show = lambda v: f'{v:,.0f}' if v >= 100 else f'{v:.3g}'
  for name, values in found.items():
    cells = [name, show(statistics.median(values)), f'{show(min(values))} to {show(max(values))}']
    cells += [f'{ratio(found, ours, name):.2f}', *(column.get(name, '') for column in more.values())]
    lines.append('| ' + ' | '.join(cells) + ' |')
  return '\n'.join(lines)
