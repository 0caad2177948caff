"""Meta-training of Conv4-64 on Omniglot's shapes, one step, second order; ours against its peers, in one run.

    python -m benchmarks.omniglot

Speed does not depend on what is drawn, so the images are noise: no download, and no two equal values for a max-pool to
choose between. Before anything is timed, all compute the loss and the meta-gradient of the same two tasks from the same
weights, in float64, and these must be equal. Ours draws new tasks in each iteration; the peers go over the same ones.

The roof is what a product of two 2048×2048 float32 matrices reaches in the same run, in turn with the rest. Work is
counted as direct convolutions, whatever a program does in fact. Memory is a process's own, each program in one alone.
"""

import concurrent.futures
import multiprocessing
import statistics
import subprocess
import sys
import time

import jax
import numpy as np
import torch
from absl import app, flags, logging

from benchmarks import conv4, ours, peers, timing
from benchmarks.conv4 import OURS, PLAIN, work
from metasgd_jax import sharding, writers

SIDE = 2048
SETTINGS = ((5, 1, 16), (5, 1, 32), (20, 1, 16), (20, 1, 32))  # way, shot, tasks
ROOF = 'matrix product'
SECONDS = 6.0  # Of a turn: the first second after a pause is slow.
SLOW = (PLAIN, 'torch.func')  # Timed once, not in turns.

_ROUNDS = flags.DEFINE_integer('rounds', 5, 'Turns of each program.', lower_bound=1)
_SETTINGS = flags.DEFINE_integer('settings', len(SETTINGS), 'How many of the settings.', lower_bound=1)


def matrix_product():
  """The roof's program."""
  a = jax.random.normal(jax.random.key(0), (SIDE, SIDE))
  product = jax.jit(lambda a, n: jax.lax.fori_loop(0, n, lambda i, b: a @ b * 0.02, a))
  return lambda iterations: jax.block_until_ready(product(a, iterations))


def check(way: int, shot: int, tasks: int, ours_too, theirs) -> None:
  """Raises AssertionError unless all programs have the same loss and meta-gradient; for a process of its own."""
  sharding.cpu_cores_as_devices()
  runs = conv4.our_runs(way, shot, tasks, [OURS, *ours_too])
  few = jax.tree.map(lambda a: a[:2], ours.draw(conv4.task_distribution(way, shot), tasks))
  loss, grads = runs[OURS].meta_gradient(few)
  for name in ours_too:
    if 'bfloat16' not in name:
      its_loss, its_grads = runs[name].meta_gradient(few)
      np.testing.assert_allclose(its_loss, loss, rtol=1e-6)
      assert ours.error(its_grads, grads) < 1e-6, name
  theta = peers.in_torchs_order(runs[OURS].state.meta.theta)
  for peer in peers.of_conv4(way, theta, ours.ALPHA, few, theirs, torch.float64).values():
    peers.check_equal(peer, loss, grads.theta, grads.alpha)


def measure(way: int, shot: int, tasks: int, ours_too, theirs, rounds: int) -> None:
  """Checks that all agree, times them in turn, and prints a table.

  The check is another process's: its large arrays would leave malloc in a state that no user's program starts from.

  Args:
    way: N.
    shot: K.
    tasks: T.
    ours_too: our programs besides the first.
    theirs: the peers.
    rounds: turns of each.
  """
  with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as other:
    other.submit(check, way, shot, tasks, ours_too, theirs).result()
  runs = conv4.our_runs(way, shot, tasks, [OURS, *ours_too])
  episodes = ours.draw(conv4.task_distribution(way, shot), tasks)
  theta = peers.in_torchs_order(runs[OURS].state.meta.theta)
  programs = {**runs, **peers.of_conv4(way, theta, ours.ALPHA, episodes, theirs), ROOF: matrix_product()}
  print(f'\n## {way}-way {shot}-shot, {tasks} tasks: losses and meta-gradients are equal; timing in turn\n', flush=True)
  first = {}
  for name, run in programs.items():
    start = time.perf_counter()
    run(1)
    first[name] = f'{time.perf_counter() - start:.1f} s'
  found = timing.rates({n: p for n, p in programs.items() if n not in SLOW}, seconds=SECONDS, rounds=rounds)
  for name in set(SLOW) & set(programs):
    start = time.perf_counter()
    programs[name](1)
    found[name] = [1 / (time.perf_counter() - start)] * rounds
  roof = statistics.median(found[ROOF]) * 2 * SIDE**3
  share = lambda values: f'{statistics.median(values) * work(way, shot, tasks) / roof:.0%}'
  columns = {
    'share of the roof': {n: share(v) for n, v in found.items() if n != ROOF},
    'first iteration, with compilation': first,
  }
  print(timing.table(found, OURS, columns))
  print(f'\nroof {roof / 1e9:.0f} GFLOP/s; {work(way, shot, tasks) / 1e9:.1f} GFLOP a meta-iteration', flush=True)


def print_memory(names) -> None:
  """Prints the peak of memory of programs, each alone in a process."""
  print('\n| program | peak memory while running, MiB | since the start of its process |\n| --- | --- | --- |')
  for name in names:
    command = [sys.executable, '-m', 'benchmarks.memory', name]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    print(f'| {name} | {out[-2]} | {out[-1]} |', flush=True)


def main(argv) -> None:
  """All settings, our variants, the slow ones, memory."""
  del argv
  logging.set_verbosity(logging.WARNING)  # JAX logs each platform that it does not find.
  sharding.cpu_cores_as_devices()
  peer_names = [name for name in peers.ON_CONV4 if name not in SLOW]
  for setting in SETTINGS[: _SETTINGS.value]:
    measure(*setting, (), peer_names, _ROUNDS.value)
  print_memory([OURS, *peer_names, *conv4.VARIANTS[:2]])
  measure(*SETTINGS[0], conv4.VARIANTS, (), 3)
  measure(*SETTINGS[0], (PLAIN,), ('torch.func',), 3)
  about = writers.provenance()
  print(f'\ntorch {torch.__version__}, {about["versions"]}, {about["device"]}')


if __name__ == '__main__':
  app.run(main)
