"""Compares the speed of meta-training Conv4 on images, in metasgd_jax and in its peers.

    python -m benchmarks.classification

The images have the shape of Omniglot's, with Conv4-64, or of mini-ImageNet's, with Conv4-32.

The peers are programs written with PyTorch libraries. All programs take one inner step with second derivatives.

Speed does not depend on the content of the images, so the images are noise. Nothing is downloaded, and max-pooling
never has to choose between equal values. Before the timing, all programs compute the loss and the meta-gradient of the
same two tasks, from the same weights and in float64. The results must be equal. In the timing, metasgd_jax draws new
tasks in each iteration, while the peers use the same tasks again.

Each program runs in a separate process, and waits while another program has its turn. The roof is the rate, in FLOP/s,
of a product of two 2048×2048 float32 matrices. It is measured in the same run, in turn with the programs. The FLOPs of
a program are those of direct convolutions, even if the program uses a faster algorithm. Memory is the peak of a
process's resident memory.
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

from benchmarks import ALPHA, Setting, conv4, ours, peers, timing, worker
from benchmarks.conv4 import OURS, PLAIN, ROOF, SIDE, work
from metasgd_jax.io import provenance
from metasgd_jax.outer import sharding

SETTINGS = tuple(Setting('omniglot', *numbers) for numbers in ((5, 1, 16), (5, 1, 32), (20, 1, 16), (20, 1, 32)))
PHOTOS = (Setting('mini_imagenet', 5, 1, 4), Setting('mini_imagenet', 5, 5, 2), Setting('mini_imagenet', 20, 1, 4))
SECONDS = 6.0  # Duration of a turn. It is long because the first second after a pause is slow.
SLOW = (PLAIN, 'torch.func')  # These programs are timed once, not in turns.

_ROUNDS = flags.DEFINE_integer('rounds', 5, 'Number of timed turns of each program.', lower_bound=1)
_PARTS = flags.DEFINE_multi_enum(
  'parts',
  ['settings', 'photos', 'malloc', 'variants', 'slow'],
  ['settings', 'photos', 'malloc', 'variants', 'slow'],
  "Parts to measure. settings: all settings on Omniglot's shape. photos: those on mini-ImageNet's shape. "
  'malloc: the first setting, with a malloc that keeps freed memory. '
  'variants: options of metasgd_jax. slow: programs that are timed only once.',
)


def check(setting: Setting, ours_too, theirs, path: str) -> None:
  """Writes episodes for the peers to the file `path`, and checks that all programs agree.

  Call this function in a separate process, because it sets up the devices of JAX.

  Raises:
    AssertionError: if the programs do not have the same loss and meta-gradient on two tasks.
  """
  sharding.cpu_cores_as_devices()
  runs = conv4.our_runs(setting, [OURS, *ours_too])
  episodes = ours.draw(conv4.task_distribution(setting), setting.tasks)
  few = jax.tree.map(lambda a: a[:2], episodes)
  loss, grads = runs[OURS].meta_gradient(few)
  for name in ours_too:
    if 'bfloat16' not in name:
      its_loss, its_grads = runs[name].meta_gradient(few)
      np.testing.assert_allclose(its_loss, loss, rtol=1e-6)
      assert ours.error(its_grads, grads) < 1e-6, name
  theta = peers.in_torchs_order(runs[OURS].state.meta.theta)
  for peer in peers.of_conv4(setting.way, setting.sizes, theta, ALPHA, few, theirs, torch.float64).values():
    peers.check_equal(peer, loss, grads.theta, grads.alpha)
  worker.save(path, theta, episodes)


def measure(setting: Setting, ours_too, theirs, rounds: int, environment=None) -> None:
  """Checks that all programs agree, times them in turn, and prints a table.

  Args:
    setting: What is trained.
    ours_too: Names of the programs of metasgd_jax and of plain JAX, besides `OURS`.
    theirs: Names of the peers.
    rounds: Number of timed turns of each program.
    environment: Environment variables to set for all programs.
  """
  with contextlib.ExitStack() as stack:
    episodes = str(pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory())) / 'episodes.npz')
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as other:
      other.submit(check, setting, ours_too, theirs, episodes).result()
    programs = {}
    for name in (OURS, *ours_too, *theirs, ROOF):
      programs[name] = worker.Worker(name, setting, episodes, environment)
      stack.callback(programs[name].close)
    what = f'{setting.images}, {setting.way}-way {setting.shot}-shot, {setting.tasks} tasks'
    print(f'\n## {what}: losses and meta-gradients are equal; timing the programs in turn', flush=True)
    if environment:
      print(' '.join(f'{k}={v}' for k, v in environment.items()))
    first = {name: f'{program(1):.1f} s' for name, program in programs.items()}
    found = timing.rates({n: p for n, p in programs.items() if n not in SLOW}, seconds=SECONDS, rounds=rounds)
    for name in set(SLOW) & set(programs):
      found[name] = [1 / programs[name](1)] * rounds
    peaks = {name: program.peak() for name, program in programs.items()}
  roof = statistics.median(found[ROOF]) * 2 * SIDE**3
  share = lambda values: f'{statistics.median(values) * work(setting) / roof:.0%}'
  columns = {
    'share of the roof': {n: share(v) for n, v in found.items() if n != ROOF},
    'first iteration, with compilation': first,
    'peak memory in training, MiB': {n: f'{p[0]:,.0f}' for n, p in peaks.items()},
    "peak memory since the process's start, MiB": {n: f'{p[1]:,.0f}' for n, p in peaks.items()},
  }
  print('\n' + timing.table(found, OURS, columns))
  print(f'\nroof {roof / 1e9:.0f} GFLOP/s; {work(setting) / 1e9:.1f} GFLOP per meta-iteration', flush=True)


def main(argv) -> None:
  """Measures the parts that --parts names."""
  del argv
  logging.set_verbosity(logging.WARNING)  # JAX logs each platform that it does not find.
  peer_names = [name for name in peers.ON_CONV4 if name not in SLOW]
  if 'settings' in _PARTS.value:
    for setting in SETTINGS:
      measure(setting, (), peer_names, _ROUNDS.value)
  if 'photos' in _PARTS.value:
    for setting in PHOTOS:
      measure(setting, (), peer_names, _ROUNDS.value)
  if 'malloc' in _PARTS.value:
    measure(SETTINGS[0], (), peer_names, _ROUNDS.value, worker.KEEPING)
  if 'variants' in _PARTS.value:
    measure(SETTINGS[0], conv4.VARIANTS, (), 3)
  if 'slow' in _PARTS.value:
    measure(SETTINGS[0], (PLAIN,), ('torch.func',), 3)
  about = provenance.collect()
  print(f'\ntorch {torch.__version__}, {about["versions"]}, {about["device"]}')


if __name__ == '__main__':
  app.run(main)
