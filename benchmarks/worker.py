"""Runs one program on Conv4 in a separate process, and takes commands from stdin. `Worker` starts such a process.

    python -m benchmarks.worker NAME IMAGES WAY SHOT TASKS [FILE]

Programs in one process would influence each other: a program can reuse memory that another program has freed, without
new pages from the operating system. PyTorch's loop was a fifth faster in this way than alone. Therefore each program
has a separate process, which waits while the other programs have their turns.
"""

import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Sequence

import numpy as np

from benchmarks import ALPHA, Setting

OF_JAX = ('metasgd_jax', 'plain JAX', 'matrix product')
"""Beginnings of the names of programs that use JAX. All other programs use PyTorch."""

KEEPING = {'MALLOC_MMAP_THRESHOLD_': str(2**32), 'MALLOC_TRIM_THRESHOLD_': str(2**34)}
"""Environment variables with which glibc never returns freed memory to the operating system."""


class Worker:
  """A program in a separate process: `worker(n)` takes n iterations in that process."""

  def __init__(self, name: str, setting: Sequence[str | int], episodes: str, environment=None) -> None:
    """Starts the process, which builds the program. Peers read the file `episodes`, which `save` writes."""
    command = [sys.executable, '-m', 'benchmarks.worker', name, *map(str, setting), episodes]
    environment = {**os.environ, **(environment or {})}
    self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    assert self._process.stdin
    assert self._process.stdout
    self._to, self._from = self._process.stdin, self._process.stdout

  def __call__(self, iterations: int) -> float:
    """Returns the seconds that the iterations took. The first call includes the time for compilation."""
    return self._ask(iterations)

  def peak(self) -> tuple[float, float]:
    """Returns two peaks of resident memory in MiB: since the second call of the worker, and since the process started.

    This works on Linux only.
    """
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
      raise RuntimeError(
        f'the worker process ended with exit code {self._process.wait()}, got no answer from the command '
        f'{self._process.args!r}; see its error above'
      )
    return json.loads(answer)


def save(path: str, theta, episodes) -> None:
  """Writes a file for peers, with the arrays of θ in the order of PyTorch and with the episodes."""
  arrays = {f'theta{i:02d}': t for i, t in enumerate(theta)}
  arrays |= {f'episode{i}': a for i, a in enumerate(a for part in episodes for a in part)}
  np.savez(path, **arrays)


def _peer(name, setting, path):
  from benchmarks import peers  # This process does not import JAX.

  with np.load(path, allow_pickle=False) as file:
    theta = [file[k] for k in sorted(file) if k.startswith('theta')]
    x, y, query_x, query_y = (file[f'episode{i}'] for i in range(4))
  return peers.of_conv4(setting.way, setting.sizes, theta, ALPHA, ((x, y), (query_x, query_y)), [name])[name]


def _of_jax(name, setting):
  from benchmarks import conv4  # This process does not import torch.
  from metasgd_jax.outer import sharding

  if name == conv4.ROOF:
    return conv4.matrix_product()
  sharding.cpu_cores_as_devices()
  return conv4.our_runs(setting, [name])[name]


def resident(*, peak: bool = True, reset: bool = False) -> float:
  """Returns the resident memory of this process in MiB: its peak, or its current value if `peak` is False.

  With `reset`, the peak is reset after it is read. This works on Linux only.
  """
  status = pathlib.Path('/proc/self/status').read_text()
  if reset:
    pathlib.Path('/proc/self/clear_refs').write_text('5')
  return int(status.split('VmHWM:' if peak else 'VmRSS:')[1].split()[0]) / 1024


def main() -> None:
  """Answers each line of stdin with a line of JSON on stdout.

  The answer to a number of iterations is their duration in seconds. The answer to "peak" is the result of
  `Worker.peak`.
  """
  name, setting = sys.argv[1], Setting(sys.argv[2], *map(int, sys.argv[3:6]))
  run = _of_jax(name, setting) if name.startswith(OF_JAX) else _peer(name, setting, sys.argv[6])
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
