"""Kills an experiment with SIGKILL at random moments until it has ended, over and over: it must end as if never killed.

python tests/torture.py --kills=60
"""

import argparse
import collections
import os
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
import time

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[1]
CLOCKS = ('timings.jsonl',)
"""Files that are different each time."""

REGRESSION = (
  'regression', '--meta_iterations=400', '--seeds=2', '--eval_tasks=4', '--eval_repeats=2', '--checkpoint_every=1',
)  # fmt: skip
VALIDATION = (
  'classification', '--learner=prototypical', '--meta_iterations=60', '--validate_every=3', '--ensemble=3',
  '--seeds=2', '--filters=2', '--way=3', '--query=1', '--eval_tasks=4', '--eval_query=1', '--meta_batch=2',
  '--checkpoint_every=1',
)  # fmt: skip


def start(case, workdir: pathlib.Path) -> subprocess.Popen:
  experiment, *flags = case
  cache = workdir.parent / 'compiled'
  command = [
    sys.executable, '-m', f'experiments.{experiment}', *flags, f'--workdir={workdir}', '--keep_checkpoints',
    f'--compilation_cache={cache}',
  ]  # fmt: skip
  quick = {'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'}
  return subprocess.Popen(
    command, cwd=ROOT, env=os.environ | quick, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
  )


def whole(case, workdir: pathlib.Path) -> float:
  """A run that nothing stops; returns the seconds in which metrics came."""
  process, size, times = start(case, workdir), 0, []
  while process.poll() is None:
    if trained(workdir) != size:
      size = trained(workdir)
      times.append(time.monotonic())
    time.sleep(0.01)
  check(process)
  return times[-1] - times[0]


def trained(workdir: pathlib.Path) -> int:
  """Bytes of metrics."""
  try:
    return (workdir / 'metrics.jsonl').stat().st_size
  except OSError:
    return 0


def until_killed(case, workdir: pathlib.Path, seconds: float, rng: random.Random) -> str | None:
  """Starts the run, or goes on with it, and kills it; returns where that hit it, or `None` if it ended before."""
  process, launched = start(case, workdir), time.monotonic()
  early = rng.random() < 0.2  # Else when something is done already, so that the run gets on.
  before, delay = trained(workdir), rng.uniform(0, 3 if early else seconds / 3)
  while process.poll() is None and not early and trained(workdir) == before and time.monotonic() - launched < 600:
    time.sleep(0.005)
  done = time.monotonic() + delay
  while process.poll() is None and time.monotonic() < done:
    time.sleep(0.001)
  if process.poll() is not None:
    check(process)
    return None
  process.kill()
  out = process.communicate()[0]
  assert 'cannot be read' not in out, out
  if list(workdir.glob('checkpoints/*/*tmp*')):
    return 'while a checkpoint was written'
  if (workdir / 'results.json').exists():
    return 'when the first training was done'
  return 'in training' if trained(workdir) != before else 'before training went on'


def check(process: subprocess.Popen) -> None:
  out = process.communicate()[0]
  assert process.returncode == 0, f'the run ended with {process.returncode}:\n{out}'
  assert 'cannot be read' not in out, out


def contents(workdir: pathlib.Path) -> dict[str, bytes]:
  """All that a run left: files byte for byte, and the arrays of its checkpoints, whose files are orbax's business."""
  import orbax.checkpoint as ocp

  found = {
    path.relative_to(workdir).as_posix(): path.read_bytes()
    for path in workdir.rglob('*')
    if path.is_file() and path.name not in CLOCKS and path.relative_to(workdir).parts[0] != 'checkpoints'
  }
  with ocp.StandardCheckpointer() as reader:
    for path in sorted(workdir.glob('checkpoints/*/*/state')):
      for name, array in reader.restore(path).items():
        key = f'{path.relative_to(workdir).as_posix()} {name}'
        found[key] = f'{array.dtype}{array.shape}'.encode() + np.asarray(array).tobytes()
  return found


def torture(case, kills: int, directory: pathlib.Path, rng: random.Random, report=print) -> collections.Counter:
  """Kills runs until `kills` are done and each run has ended; returns where kills hit.

  Raises:
    AssertionError: a run ended otherwise than the one that nothing stopped.
  """
  reference = directory / 'never_killed'
  seconds = whole(case, reference)
  expected = contents(reference)
  hits: collections.Counter = collections.Counter()
  runs = 0
  while hits.total() < kills:
    workdir, mine = directory / f'killed_{runs}', 0
    while (where := until_killed(case, workdir, seconds, rng)) is not None:
      hits[where] += 1
      mine += 1
    got = contents(workdir)
    different = {
      'are there': sorted(got.keys() - expected),
      'are not': sorted(expected.keys() - got),
      'differ': sorted(name for name in got.keys() & expected if got[name] != expected[name]),
    }
    assert not any(different.values()), f'after {mine} kills in {workdir}: {different}'
    runs += 1
    report(f'{case[0]}: run {runs} was killed {mine} times and ended the same to the bit; {hits.total()} kills so far')
    shutil.rmtree(workdir)
  report(f'{case[0]}: {hits.total()} kills in {runs} runs, {len(expected)} files and arrays compared; {dict(hits)}')
  return hits


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--kills', type=int, default=60, help='how many at least; two thirds of them without validation')
  parser.add_argument('--seed', type=int, default=0, help='of the moments')
  args = parser.parse_args()
  rng = random.Random(args.seed)
  for case, kills in ((REGRESSION, args.kills - args.kills // 3), (VALIDATION, args.kills // 3)):
    with tempfile.TemporaryDirectory() as directory:
      torture(case, kills, pathlib.Path(directory), rng, lambda text: print(text, flush=True))


if __name__ == '__main__':
  main()
