"""A program's peak of memory, alone in its process: Conv4-64, 5-way 1-shot, 15 query, 16 tasks.

    python -m benchmarks.memory NAME

Prints MiB while it runs, and since its process began (importing and compiling included). Linux only.
"""

import sys

import numpy as np

from benchmarks import timing

WAY, SHOT, QUERY, TASKS = 5, 1, 15, 16


def peer(name: str):
  """Returns a peer on noise; JAX is not imported."""
  from benchmarks import peers

  rng = np.random.default_rng(0)
  part = lambda n: (
    rng.random((TASKS, WAY * n, 28, 28, 1), np.float32), np.tile(np.arange(WAY).repeat(n), (TASKS, 1))
  )  # fmt: skip
  theta = [p.detach().numpy() for p in peers.conv4(WAY).parameters()]
  return peers.of_conv4(WAY, theta, 0.1, (part(SHOT), part(QUERY)), [name])[name]


def our(name: str):
  """Returns one of our programs; torch is not imported."""
  from benchmarks import conv4
  from metasgd_jax import sharding

  sharding.cpu_cores_as_devices()
  return conv4.our_runs(WAY, SHOT, TASKS, [name])[name]


def main() -> None:
  """Warms up, and measures three meta-iterations."""
  name = sys.argv[1]
  run = our(name) if name.startswith('metasgd_jax') else peer(name)
  run(1)
  print('{:.0f} {:.0f}'.format(*timing.peak_while(lambda: run(3))))


if __name__ == '__main__':
  main()
