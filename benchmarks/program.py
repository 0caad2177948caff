"""Programs that run in processes of their own, and wait while another program has its turn."""

import math
import multiprocessing
import os
import time


class Program:
  """A program that runs in a separate process: `program(n)` takes n iterations in that process.

  If `cores` are given, the process is bound to these cores before JAX starts in it.
  """

  def __init__(self, build, *args, cores: set[int] | None = None) -> None:
    context = multiprocessing.get_context('spawn')
    self._pipe, theirs = context.Pipe()
    self._process = context.Process(target=serve, args=(theirs, cores, build, *args), daemon=True)
    self._process.start()
    theirs.close()
    self._cpu: list[tuple[int, float]] = []

  def __call__(self, iterations: int) -> None:
    self.start(iterations)
    self.wait()

  def start(self, iterations: int) -> None:
    """Starts n iterations, for which `wait` waits."""
    self._pipe.send(iterations)
    self._cpu.append((iterations, math.nan))

  def wait(self) -> None:
    """Waits until the iterations are done."""
    self._cpu[-1] = (self._cpu[-1][0], self._pipe.recv())

  def cpu(self) -> float:
    """Returns the processor seconds per iteration, summed over all threads. The first call is not counted."""
    iterations, seconds = zip(*self._cpu[1:], strict=True)
    return sum(seconds) / sum(iterations)

  def close(self) -> None:
    self._pipe.send(0)
    self._process.join()


def serve(pipe, cores, build, *args) -> None:
  """Runs a program in this process, with the number of iterations that each message of the pipe gives.

  The answer to each message is the number of processor seconds. The message 0 ends the loop.
  """
  if cores:
    os.sched_setaffinity(0, cores)
  run = build(*args)
  while iterations := pipe.recv():
    start = time.process_time()
    run(iterations)
    pipe.send(time.process_time() - start)


def all_at_once(programs: list[Program], iterations: int) -> None:
  """Takes n iterations with each of the programs at the same time."""
  for program in programs:
    program.start(iterations)
  for program in programs:
    program.wait()
