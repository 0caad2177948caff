"""Rates of several programs, measured in turn so that what else a machine does falls on all of them alike."""

import statistics
import time
from collections.abc import Callable, Mapping


def rates(
  programs: Mapping[str, Callable[[int], None]], *, seconds: float = 2.0, rounds: int = 7
) -> dict[str, list[float]]:
  """Returns each program's iterations per second in each round.

  Args:
    programs: `{name: run}`; `run(n)` does n iterations and returns when they are done. Each runs once beforehand, to
      compile and warm up, and its rate then sets its n.
    seconds: about how long a program's turn takes.
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


def table(found: Mapping[str, list[float]], ours: str) -> str:
  """Returns Markdown: each program's median rate, its range, and the median over rounds of ours divided by it."""
  lines = ['| program | iterations/s, median | least to greatest | ours / it |', '| --- | --- | --- | --- |']
  for name, values in found.items():
    ratio = statistics.median(a / b for a, b in zip(found[ours], values, strict=True))
    lines.append(
      f'| {name} | {statistics.median(values):,.0f} | {min(values):,.0f} to {max(values):,.0f} | {ratio:.1f} |'
    )
  return '\n'.join(lines)
