"""Compares the speed of meta-training on sine curves, in metasgd_jax and in its peers.

    python -m benchmarks.sinusoids

A meta-iteration has 4 tasks with 5 shots, 10 query points and one inner step. Before the timing, all programs compute
the loss and the meta-gradient of the same tasks, from the same weights and in float64. The results must be equal. In
the timing, all programs draw new tasks in each iteration.
"""

import functools
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812

import metasgd_jax as ms
from benchmarks import ALPHA, ours, peers, timing
from metasgd_jax.io import provenance
from metasgd_jax.losses import mean_squared_error

TASKS, SHOT, QUERY = 4, 5, 10


def main() -> None:
  """Checks that the programs agree, times them, and prints a table."""
  tasks = ms.tasks.sinusoid(shot=SHOT, query=QUERY)
  model = ms.nn.from_linen(ms.nn.MLP(stddev=0.3))
  run = ours.Run(ms.meta_sgd(model, mean_squared_error, alpha=ms.AlphaConfig(ALPHA, ALPHA)), tasks, TASKS)
  episodes = ours.draw(tasks, TASKS)
  loss, grads = run.meta_gradient(episodes)
  theta = peers.in_torchs_order(run.state.meta.theta)
  arrays = [torch.tensor(np.array(a)) for part in episodes for a in part]
  double = [a.double() for a in arrays], [t.astype(np.float64) for t in theta]
  programs: dict[str, Callable[[int], None]] = {'metasgd_jax': run}
  for name, build in peers.PEERS.items():
    make = functools.partial(build, peers.mlp(), peers.mlp_apply, F.mse_loss)
    peers.check_equal(make(double[1], ALPHA, double[0]), loss, grads.theta, grads.alpha)
    peer = make(theta, ALPHA, arrays)
    peer.draw = draw
    for threads in sorted({1, torch.get_num_threads()}):
      programs[f'{name}, {threads} thread(s)'] = functools.partial(_with_threads, peer, threads)
  print('losses and meta-gradients are equal; timing the programs in turn', flush=True)
  print(timing.table(timing.rates(programs, seconds=1.0), 'metasgd_jax'))
  about = provenance.collect()
  print(f'\ntorch {torch.__version__}, {about["versions"]}, {about["device"]}')


def draw() -> list[torch.Tensor]:
  """Returns new tasks drawn by torch, as the list [x, y, query_x, query_y] of tensors with the leading axis T."""
  low, high = torch.tensor([0.1, 0.8, 0.0]), torch.tensor([5.0, 1.2, torch.pi])
  amplitude, frequency, phase = (low + (high - low) * torch.rand(TASKS, 1, 3)).unsqueeze(2).unbind(-1)
  x = torch.rand(TASKS, SHOT + QUERY, 1) * 10 - 5
  y = amplitude * torch.sin(frequency * x + phase)
  return [x[:, :SHOT], y[:, :SHOT], x[:, SHOT:], y[:, SHOT:]]


def _with_threads(run, threads: int, iterations: int) -> None:
  before = torch.get_num_threads()
  torch.set_num_threads(threads)
  run(iterations)
  torch.set_num_threads(before)


if __name__ == '__main__':
  main()
