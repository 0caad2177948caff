"""Measures weak scaling: the number of tasks per device stays the same, and the number of devices is 1, 2, 4 and 8.

    python -m benchmarks.scaling
    python -m benchmarks.scaling --problem=conv4 --filters=64 --seconds=10 --rounds=7

The program prints one table for sinusoids and one for Conv4. The learner is Meta-SGD with one inner step and second
derivatives. If JAX finds no accelerator, the devices are virtual devices of the CPU. More virtual devices than cores
cannot be faster, so the table has the efficiency that the cores allow next to the measured efficiency. Each number of
devices runs in a separate process. The processes take turns, and the efficiency is a median over rounds.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping

import jax
import numpy as np
import optax
from absl import app, flags

import metasgd_jax as ms
from benchmarks import timing
from metasgd_jax.io import provenance
from metasgd_jax.outer import sharding

PROBLEMS = ('sinusoids', 'conv4')


class Worker:
  """A process with a given number of devices: `worker(n)` takes n meta-iterations in this process."""

  def __init__(self, problem: str, devices: int, tasks: int, filters: int) -> None:
    """Starts the process."""
    command = [
      sys.executable, '-m', 'benchmarks.scaling', f'--alone={devices}', f'--problem={problem}', f'--tasks={tasks}',
      f'--filters={filters}',
    ]  # fmt: skip
    # On a GPU, several processes share the memory, so none may reserve most of it in advance.
    environment = os.environ | {'JAX_NUM_CPU_DEVICES': str(devices), 'XLA_PYTHON_CLIENT_PREALLOCATE': 'false'}
    self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    assert self._process.stdin
    assert self._process.stdout
    self._to, self._from = self._process.stdin, self._process.stdout

  def __call__(self, iterations: int) -> dict[str, float]:
    """Returns a dict: the number of `devices` used, the meta-iterations done so far (`step`), and the last `loss`."""
    print(iterations, file=self._to, flush=True)
    answer = self._from.readline()
    if not answer:
      raise RuntimeError(
        f'the worker process ended with exit code {self._process.wait()}, got no answer from the command '
        f'{self._process.args!r}; see its error above'
      )
    return json.loads(answer)

  def close(self) -> None:
    """Ends the process."""
    self._to.close()
    self._from.close()
    self._process.wait()


def build(problem: str, filters: int) -> tuple[ms.Learner, ms.TaskDistribution]:
  """Returns a Meta-SGD learner and its tasks.

  The tasks are 5-shot sinusoids, or 5-way 1-shot classification of 28×28 images of noise, with one query image per
  class.
  """
  if problem == 'sinusoids':
    return ms.meta_sgd(ms.nn.from_linen(ms.nn.MLP()), ms.losses.mean_squared_error), ms.tasks.sinusoid(shot=5)
  images = np.random.default_rng(0).integers(0, 256, (40, 20, 28, 28, 1), np.uint8)
  model = ms.nn.from_linen(ms.nn.Conv4(5, filters=filters))
  return (
    ms.meta_sgd(model, ms.losses.cross_entropy),
    ms.tasks.few_shot(ms.tasks.class_bank(images), way=5, shot=1, query=1),
  )


def take_turns(problem: str, devices: int, tasks_a_device: int, filters: int) -> None:
  """Reads numbers of meta-iterations from the lines of stdin, trains for each, and then prints a line of JSON."""
  learner, tasks = build(problem, filters)
  optimizer, meta_batch = optax.adam(1e-3), devices * tasks_a_device
  mesh = sharding.task_mesh(meta_batch, devices=devices)
  state = ms.init(jax.random.key(0), tasks, learner=learner, optimizer=optimizer)
  losses = [float('nan')]
  for line in sys.stdin:
    state = ms.train(
      state, tasks, learner=learner, optimizer=optimizer, meta_iterations=int(state.step) + int(line),
      meta_batch=meta_batch, placement=ms.Placement(mesh=mesh), progress=False,
      callbacks=[lambda progress: losses.append(float(progress.info['loss'][-1]))],
    )  # fmt: skip
    used = 1 if mesh is None else mesh.size
    print(json.dumps({'devices': used, 'step': int(state.step), 'loss': losses[-1]}), flush=True)


def table(found: Mapping[str, list[float]], tasks_a_device: int, cores: int | None) -> str:
  """Returns a table in Markdown, with a row for each number of devices.

  Efficiency is the rate of meta-iterations divided by the rate in the first row. It is 1 for perfect scaling, because
  each device has the same number of tasks in all rows.

  Args:
    found: Rates from `timing.rates`, by the number of devices.
    tasks_a_device: Number of tasks per device.
    cores: Number of cores that the virtual devices share, or `None` for real devices.
  """
  lines = ['| devices | tasks | meta-iterations/s | tasks/s | efficiency | what the cores allow |', '|' + ' --- |' * 6]
  first = next(iter(found))
  could = lambda n: 1.0 if cores is None else min(1.0, cores / n)
  for devices, rates in found.items():
    n, rate = int(devices), statistics.median(rates)
    allowed = could(n) / could(int(first))
    lines.append(
      f'| {n} | {n * tasks_a_device} | {rate:,.1f} | {rate * n * tasks_a_device:,.0f} | '
      f'{timing.ratio(found, devices, first):.2f} | {allowed:.2f} |'
    )
  return '\n'.join(lines)


def measure(problem: str, counts: list[int], tasks: int, filters: int, seconds: float, rounds: int):
  """Returns rates from `timing.rates`, by the number of devices as a string."""
  workers = {str(n): Worker(problem, n, tasks, filters) for n in counts}
  try:
    return timing.rates(workers, seconds=seconds, rounds=rounds)
  finally:
    for worker in workers.values():
      worker.close()


def main(argv) -> None:
  """Prints a table for each problem. With --alone, takes the turns of one worker process instead."""
  del argv
  given = flags.FLAGS
  if not set(given.problem) <= set(PROBLEMS):
    raise app.UsageError(
      f'--problem must be a comma-separated list of {", ".join(PROBLEMS)}, got {",".join(given.problem)}'
    )
  if not given.devices or not all(n.isdecimal() and int(n) for n in given.devices):
    raise app.UsageError(
      f'--devices must be a comma-separated list of integers of at least 1, got {",".join(given.devices) or "none"}'
    )
  if given.alone:
    take_turns(given.problem[0], given.alone, given.tasks, given.filters)
    return
  os.environ['XLA_PYTHON_CLIENT_PREALLOCATE'] = 'false'
  virtual, begun = jax.default_backend() == 'cpu', time.perf_counter()
  counts = [int(n) for n in given.devices if virtual or int(n) <= jax.local_device_count()]
  if not counts:
    raise app.UsageError(
      f'--devices must be at most {jax.local_device_count()}, the number of devices, got {",".join(given.devices)}'
    )
  cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
  for problem in given.problem:
    tasks = given.tasks or {'sinusoids': 64, 'conv4': 2}[problem]
    found = measure(problem, counts, tasks, given.filters, given.seconds, given.rounds)
    print(f'{problem}, {tasks} tasks per device:\n\n{table(found, tasks, cores if virtual else None)}\n', flush=True)
  what = f'virtual devices of {cores} cores: more than {cores} devices cannot be faster' if virtual else 'devices'
  print(f'{what}; {time.perf_counter() - begun:.0f} s; {provenance.collect()["device"]}')


if __name__ == '__main__':
  flags.DEFINE_list('devices', ['1', '2', '4', '8'], 'Numbers of devices. Efficiency is relative to the first.')
  flags.DEFINE_list('problem', list(PROBLEMS), 'Problems to measure: sinusoids, conv4.')
  flags.DEFINE_integer('tasks', 0, 'Number of tasks per device. 0 means 64 for sinusoids and 2 for conv4.', 0)
  flags.DEFINE_integer('filters', 16, 'Number of filters of Conv4.', 1)
  flags.DEFINE_float('seconds', 1.0, 'Approximate duration of a turn, in seconds.', 0.01)
  flags.DEFINE_integer('rounds', 5, 'Number of timed turns of each number of devices.', 1)
  flags.DEFINE_integer('alone', 0, 'For internal use: number of devices of a worker process.', 0)
  app.run(main)
