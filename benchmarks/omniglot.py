"""Meta-training of Conv4-64 on Omniglot's shapes, one step, second order; ours against its peers, in one run.

    python -m benchmarks.omniglot

Speed does not depend on what is drawn, so the images are noise: no download, and no two equal values for a max-pool to
choose between. Before anything is timed, all compute the loss and the meta-gradient of the same two tasks from the same
weights, in float64, and these must be equal. Ours draws new tasks in each iteration; the peers go over the same ones.

Each program has a process of its own, and waits while another has its turn. The roof is what a product of two 2048×2048
float32 matrices reaches in the same run, in turn with the rest. Work is counted as direct convolutions, whatever a
program does in fact. Memory is a process's resident peak.
"""

import concurrent.futures
import contextlib
import multiprocessing
import pathlib
import statistics
import tempfile

import jax
import numpy as np
import torch
from absl import app, flags, logging

from benchmarks import ALPHA, conv4, ours, peers, timing, worker
from benchmarks.conv4 import OURS, PLAIN, ROOF, SIDE, work
from metasgd_jax.io import provenance
from metasgd_jax.outer import sharding

SETTINGS = ((5, 1, 16), (5, 1, 32), (20, 1, 16), (20, 1, 32))  # way, shot, tasks
SECONDS = 6.0  # Of a turn: the first second after a pause is slow.
SLOW = (PLAIN, 'torch.func')  # Timed once, not in turns.

_ROUNDS = flags.DEFINE_integer('rounds', 5, 'Turns of each program.', lower_bound=1)
_PARTS = flags.DEFINE_multi_enum(
  'parts',
  ['settings', 'malloc', 'variants', 'slow'],
  ['settings', 'malloc', 'variants', 'slow'],
  'What to measure: all settings; the first with a malloc that keeps what is freed; our variants; the slow programs.',
)


def check(way: int, shot: int, tasks: int, ours_too, theirs, path: str) -> None:
  """Writes episodes for the peers; raises AssertionError unless all have the same loss and meta-gradient on two.

  For a process of its own, which sets up JAX for itself.
  """
  sharding.cpu_cores_as_devices()
  runs = conv4.our_runs(way, shot, tasks, [OURS, *ours_too])
  episodes = ours.draw(conv4.task_distribution(way, shot), tasks)
  few = jax.tree.map(lambda a: a[:2], episodes)
  loss, grads = runs[OURS].meta_gradient(few)
  for name in ours_too:
    if 'bfloat16' not in name:
      its_loss, its_grads = runs[name].meta_gradient(few)
      np.testing.assert_allclose(its_loss, loss, rtol=1e-6)
      assert ours.error(its_grads, grads) < 1e-6, name
  theta = peers.in_torchs_order(runs[OURS].state.meta.theta)
  for peer in peers.of_conv4(way, theta, ALPHA, few, theirs, torch.float64).values():
    peers.check_equal(peer, loss, grads.theta, grads.alpha)
  worker.save(path, theta, episodes)


def measure(way: int, shot: int, tasks: int, ours_too, theirs, rounds: int, environment=None) -> None:
  """Checks that all agree, times them in turn, and prints a table.

  Args:
    way: N.
    shot: K.
    tasks: T.
    ours_too: our programs besides the first.
    theirs: the peers.
    rounds: turns of each.
    environment: variables for all of them.
  """
  with contextlib.ExitStack() as stack:
    episodes = str(pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory())) / 'episodes.npz')
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as other:
      other.submit(check, way, shot, tasks, ours_too, theirs, episodes).result()
    programs = {}
    for name in (OURS, *ours_too, *theirs, ROOF):
      programs[name] = worker.Worker(name, (way, shot, tasks), episodes, environment)
      stack.callback(programs[name].close)
    print(f'\n## {way}-way {shot}-shot, {tasks} tasks: losses and meta-gradients are equal; timing in turn', flush=True)
    if environment:
      print(' '.join(f'{k}={v}' for k, v in environment.items()))
    first = {name: f'{program(1):.1f} s' for name, program in programs.items()}
    found = timing.rates({n: p for n, p in programs.items() if n not in SLOW}, seconds=SECONDS, rounds=rounds)
    for name in set(SLOW) & set(programs):
      found[name] = [1 / programs[name](1)] * rounds
    peaks = {name: program.peak() for name, program in programs.items()}
  roof = statistics.median(found[ROOF]) * 2 * SIDE**3
  share = lambda values: f'{statistics.median(values) * work(way, shot, tasks) / roof:.0%}'
  columns = {
    'share of the roof': {n: share(v) for n, v in found.items() if n != ROOF},
    'first iteration, with compilation': first,
    'peak memory in training, MiB': {n: f'{p[0]:,.0f}' for n, p in peaks.items()},
    "from its process's start": {n: f'{p[1]:,.0f}' for n, p in peaks.items()},
  }
  print('\n' + timing.table(found, OURS, columns))
  print(f'\nroof {roof / 1e9:.0f} GFLOP/s; {work(way, shot, tasks) / 1e9:.1f} GFLOP a meta-iteration', flush=True)


def main(argv) -> None:
  """All settings, the first with another malloc, our variants, the slow ones."""
  del argv
  logging.set_verbosity(logging.WARNING)  # JAX logs each platform that it does not find.
  peer_names = [name for name in peers.ON_CONV4 if name not in SLOW]
  if 'settings' in _PARTS.value:
    for setting in SETTINGS:
      measure(*setting, (), peer_names, _ROUNDS.value)
  if 'malloc' in _PARTS.value:
    measure(*SETTINGS[0], (), peer_names, _ROUNDS.value, worker.KEEPING)
  if 'variants' in _PARTS.value:
    measure(*SETTINGS[0], conv4.VARIANTS, (), 3)
  if 'slow' in _PARTS.value:
    measure(*SETTINGS[0], (PLAIN,), ('torch.func',), 3)
  about = provenance.collect()
  print(f'\ntorch {torch.__version__}, {about["versions"]}, {about["device"]}')


if __name__ == '__main__':
  app.run(main)
