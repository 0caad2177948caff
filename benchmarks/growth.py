"""Measures how time and memory of a meta-gradient grow with tasks, ways, shots, inner steps and filters.

    python -m benchmarks.growth

The program prints a table and draws a picture. The basic setting is 5-way 1-shot with 5 query images per class, 4
tasks, Conv4 with 32 filters, and 1 inner step, on one device. One quantity of this setting is varied at a time. Memory
is the size of the intermediates that XLA plans for the compiled program. The exponent p is that of a power law xᵖ,
which is fitted to the second half of the points. Linear growth has p = 1, and a constant has p = 0.
"""

import dataclasses
import statistics
import time
from typing import Any

import jax
import matplotlib.pyplot as plt
import numpy as np

import metasgd_jax as ms
from benchmarks import ours
from metasgd_jax.inner.adaptation import Adjoint
from metasgd_jax.io import provenance
from metasgd_jax.outer.placement import TasksAtOnce

PICTURE = 'benchmarks/growth.png'


@dataclasses.dataclass(frozen=True)
class Point:
  """Settings of a meta-gradient to measure."""

  tasks: int = 4
  way: int = 5
  shot: int = 1
  steps: int = 1
  filters: int = 32
  tasks_at_once: TasksAtOnce = 1
  adjoint: Adjoint = 'reverse'


LINES: tuple[
  tuple[str, tuple[int, ...], dict[str, Any]], ...
] = (  # the field of Point that is varied, its values, and other fields
  ('tasks', (1, 2, 4, 8, 16, 32, 64, 128), {}),
  ('tasks', (1, 4, 16, 64, 128), {'tasks_at_once': 'all'}),
  ('way', (2, 5, 10, 20), {}),
  ('shot', (1, 2, 5, 10), {}),
  ('steps', (1, 2, 4, 8, 16, 32), {}),
  ('steps', (2, 8, 32), {'adjoint': 'checkpoint'}),
  ('steps', (2, 8, 32), {'adjoint': 'hvp'}),
  ('filters', (8, 16, 32, 64, 128), {}),
)


def measure(point: Point) -> tuple[float, float]:
  """Returns (milliseconds per meta-gradient, the median of several calls; MiB of intermediates)."""
  images = np.random.default_rng(0).integers(0, 256, (40, 20, 28, 28, 1), np.uint8)
  tasks = ms.tasks.few_shot(ms.tasks.class_bank(images), way=point.way, shot=point.shot, query=5)
  model = ms.nn.from_linen(ms.nn.Conv4(point.way, filters=point.filters))
  learner = ms.meta_sgd(
    model, ms.losses.cross_entropy, steps=point.steps, adjoint=point.adjoint, alpha=ms.AlphaConfig(0.01, 0.01)
  )
  episodes = ours.draw(tasks, point.tasks)
  keys = jax.random.split(jax.random.key(0), point.tasks)
  meta = jax.jit(learner.init)(jax.random.key(0), jax.tree.map(lambda a: a[0], episodes))
  gradient = jax.jit(lambda m, e, k: ms.mean_loss_and_grad(learner, m, e, k, tasks_at_once=point.tasks_at_once))
  compiled = gradient.lower(meta, episodes, keys).compile()
  times: list[float] = []
  begun = time.perf_counter()
  while len(times) < 4 or (time.perf_counter() - begun < 1 and len(times) < 50):
    start = time.perf_counter()
    jax.block_until_ready(compiled(meta, episodes, keys))
    times.append(time.perf_counter() - start)
  memory: Any = compiled.memory_analysis()
  return 1000 * statistics.median(times[1:]), memory.temp_size_in_bytes / 2**20


def exponent(x, y) -> float:
  """Returns p for the power law y ∝ xᵖ that is fitted to the second half of the points."""
  half = len(x) // 2
  return float(np.polyfit(np.log(x[half:]), np.log(y[half:]), 1)[0])


def draw(results) -> None:
  """Writes the picture. Each varied quantity has a column, with time in the upper row and memory in the lower row."""
  varied = list(dict.fromkeys(name for name, *_ in results))
  figure, axes = plt.subplots(2, len(varied), figsize=(3 * len(varied), 5.5), sharex='col', layout='constrained')
  for name, label, x, milliseconds, mebibytes in results:
    column = axes[:, varied.index(name)]
    for axis, values in zip(column, (milliseconds, mebibytes), strict=True):
      axis.loglog(x, values, 'o-', base=2, label=label or None)
    column[1].set_xlabel({'steps': 'inner steps', 'way': 'ways', 'shot': 'shots'}.get(name, name))
    column[1].set_xticks(x, [str(v) for v in x])
  axes[0, 0].set_ylabel('ms for a meta-gradient')
  axes[1, 0].set_ylabel('MiB of intermediates')
  for axis in axes.flat:
    axis.yaxis.set_major_formatter('{x:g}')
    axis.grid(alpha=0.3)
    if axis.get_legend_handles_labels()[0]:
      axis.legend(fontsize='small')
  figure.savefig(PICTURE, dpi=110)


def main() -> None:
  """Measures all settings, prints the table and draws the picture."""
  results = []
  print('| varied | other settings | values | ms | MiB | exponent of time | exponent of memory |\n|' + ' --- |' * 7)
  for name, values, chosen in LINES:
    points: list[dict[str, Any]] = [{name: v, **chosen} for v in values]
    found = [measure(Point(**p)) for p in points]
    milliseconds, mebibytes = zip(*found, strict=True)
    label = ', '.join(f'{k}={v!r}' for k, v in chosen.items())
    default = {'tasks': 'tasks_at_once=1', 'steps': "adjoint='reverse'"}.get(name, '')
    results.append((name, label or default, values, milliseconds, mebibytes))
    listed = lambda numbers, form: ' '.join(format(n, form) for n in numbers)
    print(
      f'| {name} | {label or default} | {listed(values, "d")} | {listed(milliseconds, ".0f")} | '
      f'{listed(mebibytes, ".1f")} | {exponent(values, milliseconds):.2f} | {exponent(values, mebibytes):.2f} |',
      flush=True,
    )
  draw(results)
  print(f'\n{PICTURE}; {provenance.collect()["device"]}')


if __name__ == '__main__':
  main()
