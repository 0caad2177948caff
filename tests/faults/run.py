"""Whether tests notice a fault: those that run its line are run, the cheap ones first, until one fails."""

import concurrent.futures
import dataclasses
import json
import os
import pathlib
import queue
import re
import subprocess
import sys
import time
from collections.abc import Sequence

import coverage

from tests.faults.draw import Fault

TIERS = {'first': 'not slow', 'slow': 'slow'}
"""Each tier and its expression of markers."""

FEW = 80
"""Tests that are tried one by one before whole files are."""

PATIENCE = {'few': 300, 'files': 1200}
"""Seconds after which a run of tests counts as caught: the fault made something endless."""


@dataclasses.dataclass(frozen=True)
class Verdict:
  """What became of a fault."""

  fault: str
  tier: str | None
  """The first tier that caught it, if any did."""
  test: str | None
  seconds: float


def covering_tests(data: pathlib.Path) -> dict[str, dict[int, list[str]]]:
  """Reads which tests ran a line, by module and line, from a combined file of coverage."""
  read = coverage.CoverageData(str(data))
  read.read()
  found: dict[str, dict[int, list[str]]] = {}
  for path in read.measured_files():
    by_line = found.setdefault(path.split('metasgd_jax/')[-1].removesuffix('.py'), {})
    for line, contexts in read.contexts_by_lineno(path).items():  # 'import|TEST' in pytest's process, 'TEST' in others.
      parts = [part for context in contexts for part in context.split('|') if '::' in part]
      by_line[line] = list(dict.fromkeys([*by_line.get(line, []), *parts]))
  return found


def run(
  faults: Sequence[Fault],
  root: pathlib.Path,
  covering: dict[str, dict[int, list[str]]],
  work: pathlib.Path,
  results: pathlib.Path,
  cores: Sequence[int],
) -> None:
  """Puts each fault into a clone of `root` and appends what its tests said to `results`; goes on after a stop."""
  known = {verdict.fault for verdict in read(results)}
  clones = queue.SimpleQueue()
  for core in cores:
    clone = work / f'core{core}' / root.name
    if not clone.exists():
      clone.parent.mkdir(parents=True)
      subprocess.run(['git', 'clone', '-q', str(root), str(clone)], check=True)
      (clone.parent / 'shared').symlink_to(root.parent / 'shared')
    clones.put((core, clone))

  def judge(fault: Fault) -> None:
    core, clone = clones.get()
    path = clone / 'metasgd_jax' / f'{fault.module}.py'
    sound = path.read_text()
    try:
      path.write_text(fault.source)
      ran = covering.get(fault.module, {})
      tests = list(dict.fromkeys(test for line in fault.statement for test in ran.get(line, ())))
      verdict = _judged(fault, clone, core, tests)
    finally:
      path.write_text(sound)
      clones.put((core, clone))
    with results.open('a') as file:
      file.write(json.dumps(dataclasses.asdict(verdict)) + '\n')
    print(verdict, flush=True)

  with concurrent.futures.ThreadPoolExecutor(len(cores)) as pool:
    list(pool.map(judge, (fault for fault in faults if fault.name not in known)))


def read(results: pathlib.Path) -> list[Verdict]:
  """Reads what `run` has written so far."""
  return [Verdict(**json.loads(line)) for line in results.read_text().splitlines()] if results.exists() else []


def _judged(fault: Fault, clone: pathlib.Path, core: int, tests: Sequence[str]) -> Verdict:
  start = time.monotonic()
  own = f'test_{fault.module.replace("/", "_")}', f'test_{fault.module.split("/")[-1]}'
  tests = sorted(tests, key=lambda test: not test.split('::')[0].endswith(tuple(f'{name}.py' for name in own)))
  files = list(dict.fromkeys(test.split('::')[0] for test in tests))
  for tier, markers in TIERS.items():
    for chosen, patience in ((tests[:FEW], PATIENCE['few']), (files, PATIENCE['files'])):
      if failed := _first_failure(clone, core, chosen, markers, patience):
        return Verdict(fault.name, tier, failed, time.monotonic() - start)
  return Verdict(fault.name, None, None, time.monotonic() - start)


def _first_failure(clone: pathlib.Path, core: int, chosen: Sequence[str], markers: str, patience: float) -> str | None:
  """Runs tests until one fails, and returns its name, or None."""
  if not chosen:
    return None
  command = [
    'taskset', '-c', str(core), sys.executable, '-m', 'pytest', '-x', '-q', '-p', 'no:cacheprovider', '-m', markers,
    *chosen,
  ]  # fmt: skip
  environment = os.environ | {'PYTHONPATH': str(clone)}  # For scripts that tests start: the clone's package is theirs.
  try:
    done = subprocess.run(
      command, cwd=clone, env=environment, capture_output=True, text=True, timeout=patience, check=False
    )
  except subprocess.TimeoutExpired:
    return f'no end after {patience} s'
  if done.returncode in (0, 5):  # 5: none was chosen.
    return None
  named = re.search(r'^(?:FAILED|ERROR) (\S+)', done.stdout, re.MULTILINE)
  if not named:
    raise RuntimeError(f'{" ".join(command)} ended with {done.returncode}: {(done.stdout + done.stderr)[-2000:]}')
  return named[1]
