"""Memory and time of a meta-gradient through 2, 20 and 200 inner steps, each in a process of its own; a table.

    python -m benchmarks.inner_steps
    python -m benchmarks.inner_steps --query=15 --adjoint=revolve --steps=2,200

Meta-SGD on Conv4 with 64 filters, one task of 5 ways and 1 shot of 28×28, second order, one device. Intermediates and
results are what XLA sets aside. Resident memory is the peak while the program runs, from when it is compiled, less
what is resident then: the compiler's own is several times as much. With adjoint='revolve' 200 steps are to take less
than 1.5 times the memory of 2.
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

STEPS = flags.DEFINE_list('steps', ['2', '20', '200'], 'Inner steps.')
ADJOINT = flags.DEFINE_list('adjoint', ['revolve', 'hvp', 'checkpoint', 'reverse'], 'Ways back.')
QUERY = flags.DEFINE_integer('query', 5, 'Query drawings of a class.')
ALONE = flags.DEFINE_bool('alone', False, 'Measure the first of each in this process, and print it as JSON.')


def measure(steps: int, adjoint: Adjoint, query: int) -> dict[str, float]:
  """Returns MiB and seconds of a program."""
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
  """Returns what `measure` does in a fresh process."""
  command = [sys.executable, '-m', 'benchmarks.inner_steps', '--alone', f'--steps={steps}', f'--adjoint={adjoint}']
  found = subprocess.run([*command, f'--query={query}'], stdout=subprocess.PIPE, text=True, check=True).stdout
  return json.loads(found.splitlines()[-1])


def main(argv) -> None:
  """Measures each, and prints a line."""
  del argv
  if ALONE.value:
    print(json.dumps(measure(int(STEPS.value[0]), cast(Adjoint, ADJOINT.value[0]), QUERY.value)))
    return
  if not set(ADJOINT.value) <= set(get_args(Adjoint)):
    raise app.UsageError(f'adjoint must be some of {", ".join(get_args(Adjoint))}, got {",".join(ADJOINT.value)}')
  columns = (
    'adjoint',
    'steps',
    'planned, MiB',
    'beside the first',
    'resident, MiB',
    'beside the first',
    's',
    'ms a step',
  )
  print(f'| {" | ".join(columns)} | compiling, s |')
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
  print(f'\n{QUERY.value} query drawings of a class; {provenance.collect()}')


if __name__ == '__main__':
  app.run(main)
