"""Prints a table of memory and time of a meta-gradient through 2, 20 and 200 inner steps.

    python -m benchmarks.inner_steps
    python -m benchmarks.inner_steps --query=15 --adjoint=revolve --steps=2,200

The learner is Meta-SGD on Conv4 with 64 filters and second derivatives. It computes one 5-way 1-shot task of 28×28
images on one device. Each measurement runs in a separate process. Planned memory is the size of the intermediates and
results that XLA plans for the compiled program. Resident memory is the peak while the program runs, minus the resident
memory just after compilation, because the compiler itself needs several times as much. The goal for adjoint='revolve'
is that 200 steps take less than 1.5 times the memory of 2 steps.
"""

import json
import statistics
import subprocess
import sys
import time
from typing import Any, cast, get_args

import jax
import numpy as np
from absl import app, flags

import metasgd_jax as ms
from benchmarks.worker import resident
from metasgd_jax.inner.adaptation import Adjoint
from metasgd_jax.io import provenance
from metasgd_jax.outer import host_memory

STEPS = flags.DEFINE_list('steps', ['2', '20', '200'], 'Numbers of inner steps to measure.')
ADJOINT = flags.DEFINE_list(
  'adjoint',
  ['revolve', 'hvp', 'checkpoint', 'reverse'],
  'Adjoint methods to measure; see metasgd_jax.inner.adaptation.Adjoint.',
)
QUERY = flags.DEFINE_integer('query', 5, 'Number of query images per class.')
ALONE = flags.DEFINE_bool(
  'alone', False, 'Measure only the first of --steps and of --adjoint, in this process, and print JSON.'
)


def measure(steps: int, adjoint: Adjoint, query: int) -> dict[str, float]:
  """Returns the measurements of one program, by name: memory in MiB, and times in seconds."""
  images = np.random.default_rng(0).integers(0, 256, (40, 20, 28, 28, 1), np.uint8)
  tasks = ms.tasks.few_shot(ms.tasks.class_bank(images), way=5, shot=1, query=query)
  model = ms.nn.from_linen(ms.nn.Conv4(5, filters=64))
  learner = ms.meta_sgd(model, ms.losses.cross_entropy, steps=steps, adjoint=adjoint, alpha=ms.AlphaConfig(0.01, 0.01))
  key = jax.random.key(0)
  episode = tasks.episode(tasks.sample(key), key)
  meta = jax.jit(learner.init)(key, episode)
  gradient = jax.jit(jax.value_and_grad(learner.loss, has_aux=True))
  start = time.perf_counter()
  compiled = gradient.lower(meta, episode, key).compile()
  compiling = time.perf_counter() - start
  memory: Any = compiled.memory_analysis()
  host_memory.release_freed()
  before = resident(peak=False)
  resident(reset=True)
  seconds = []
  for _ in range(2 if steps > 50 else 4):
    start = time.perf_counter()
    jax.block_until_ready(compiled(meta, episode, key))
    seconds.append(time.perf_counter() - start)
  return {
    'planned': (memory.temp_size_in_bytes + memory.output_size_in_bytes) / 2**20, 'resident': resident() - before,
    'before': before, 'seconds': statistics.median(seconds[1:]), 'compiling': compiling,
  }  # fmt: skip


def alone(steps: str, adjoint: str, query: int) -> dict[str, float]:
  """Returns the result of `measure`, called in a new process."""
  command = [sys.executable, '-m', 'benchmarks.inner_steps', '--alone', f'--steps={steps}', f'--adjoint={adjoint}']
  found = subprocess.run([*command, f'--query={query}'], stdout=subprocess.PIPE, text=True, check=True).stdout
  return json.loads(found.splitlines()[-1])


def main(argv) -> None:
  """Measures each pair of an adjoint and a number of steps, and prints it as a row of the table."""
  del argv
  if ALONE.value:
    print(json.dumps(measure(int(STEPS.value[0]), cast(Adjoint, ADJOINT.value[0]), QUERY.value)))
    return
  if not set(ADJOINT.value) <= set(get_args(Adjoint)):
    raise app.UsageError(
      f'--adjoint must be a comma-separated list of {", ".join(get_args(Adjoint))}, got {",".join(ADJOINT.value)}'
    )
  columns = (
    'adjoint',
    'steps',
    'planned, MiB',
    'ratio to the first row',
    'resident, MiB',
    'ratio to the first row',
    's',
    'ms per step',
  )
  print(f'| {" | ".join(columns)} | compilation, s |')
  print('|' + ' --- |' * 9)
  for adjoint in ADJOINT.value:
    first: dict[str, float] | None = None
    for steps in STEPS.value:
      found = alone(steps, adjoint, QUERY.value)
      first = first or found
      beside = lambda name, found=found, first=first: f'{found[name]:.1f} | {found[name] / first[name]:.2f}'
      print(
        f'| {adjoint} | {steps} | {beside("planned")} | {beside("resident")} | {found["seconds"]:.2f} | '
        f'{1000 * found["seconds"] / int(steps):.0f} | {found["compiling"]:.0f} |',
        flush=True,
      )
  print(f'\n{QUERY.value} query images per class; {provenance.collect()}')


if __name__ == '__main__':
  app.run(main)
