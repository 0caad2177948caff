"""One program on Conv4, alone in a process that does as it is told; `Worker` is the other end.

    python -m benchmarks.worker NAME WAY SHOT TASKS [FILE]

What one program has freed, another in its process would take without asking the system for pages: PyTorch's loop was a
fifth faster beside others than alone. So each has a process, which waits while the others work.
"""

import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Sequence

import numpy as np

OF_JAX = ('metasgd_jax', 'plain JAX', 'matrix product')
"""What the names of JAX's programs begin with; the others are PyTorch's."""

KEEPING = {'MALLOC_MMAP_THRESHOLD_': str(2**32), 'MALLOC_TRIM_THRESHOLD_': str(2**34)}
"""Environment in which glibc never gives memory back, so that no page is asked for twice."""


class Worker:
  """A program in a process of its own: `worker(n)` takes n iterations."""

  def __init__(self, name: str, setting: Sequence[int], episodes: str, environment=None) -> None:
    """Starts the process, which builds the program; the file of episodes, from `save`, is for peers."""
    command = [sys.executable, '-m', 'benchmarks.worker', name, *map(str, setting), episodes]
    environment = {**os.environ, **(environment or {})}
    self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    assert self._process.stdin
    assert self._process.stdout
    self._to, self._from = self._process.stdin, self._process.stdout

  def __call__(self, iterations: int) -> float:
    """Returns the seconds that n iterations took there; with the first call, compilation too."""
    return self._ask(iterations)

  def peak(self) -> tuple[float, float]:
    """Returns MiB of resident memory, the peak since its second call began, and that since its process did (Linux)."""
    here, always = self._ask('peak')
    return here, always

  def close(self) -> None:
    """Ends the process."""
    self._to.close()
    self._process.wait()

  def _ask(self, what: int | str):
    print(json.dumps(what), file=self._to, flush=True)
    answer = self._from.readline()
    if not answer:
      raise RuntimeError(f'{self._process.args!r} ended with {self._process.wait()}')
    return json.loads(answer)


def save(path: str, theta, episodes) -> None:
  """Writes θ in torch's order, and episodes, for peers."""
  arrays = {f'theta{i:02d}': t for i, t in enumerate(theta)}
  arrays |= {f'episode{i}': a for i, a in enumerate(a for part in episodes for a in part)}
  np.savez(path, **arrays)


def _peer(name, way, path):
  from benchmarks import ALPHA, peers  # JAX is not imported here.

  with np.load(path, allow_pickle=False) as file:
    theta = [file[k] for k in sorted(file) if k.startswith('theta')]
    x, y, query_x, query_y = (file[f'episode{i}'] for i in range(4))
  return peers.of_conv4(way, theta, ALPHA, ((x, y), (query_x, query_y)), [name])[name]


def _of_jax(name, way, shot, tasks):
  from benchmarks import conv4  # Nor torch here.
  from metasgd_jax.outer import sharding

  if name == conv4.ROOF:
    return conv4.matrix_product()
  sharding.cpu_cores_as_devices()
  return conv4.our_runs(way, shot, tasks, [name])[name]


def resident(*, peak: bool = True, reset: bool = False) -> float:
  """Returns MiB of this process's resident memory (Linux): the peak, or what is there now; may begin the peak anew."""
  status = pathlib.Path('/proc/self/status').read_text()
  if reset:
    pathlib.Path('/proc/self/clear_refs').write_text('5')
  return int(status.split('VmHWM:' if peak else 'VmRSS:')[1].split()[0]) / 1024


def main() -> None:
  """Answers each line of JSON on stdin, a number of iterations or "peak", with one on stdout."""
  name, way, shot, tasks = sys.argv[1], *map(int, sys.argv[2:5])
  run = _of_jax(name, way, shot, tasks) if name.startswith(OF_JAX) else _peer(name, way, sys.argv[5])
  calls, before = 0, 0.0
  for line in sys.stdin:
    request = json.loads(line)
    if request == 'peak':
      print(json.dumps([resident(), max(before, resident())]), flush=True)
      continue
    if calls == 1:
      before = resident(reset=True)
    start = time.perf_counter()
    run(request)
    print(json.dumps(time.perf_counter() - start), flush=True)
    calls += 1


if __name__ == '__main__':
  main()
