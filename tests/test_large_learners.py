"""The experiment on larger learners, at a tiny size."""

import json

import jax
import numpy as np
import pytest

from experiments import large_learners
from experiments.large_learners import Config

TINY = {
  'resnet12': dict(widths=(4, 8), way=3, rank=2, meta_iterations=30, learning_rate=0.01, eval_tasks=20, alpha=0.2),
  'transformer': dict(
    network='transformer', width=16, depth=1, heads=2, tokens=4, length=8, shot=4, query=4, meta_iterations=200,
    learning_rate=0.01, eval_tasks=50, alpha=0.5, rank=2,
  ),
}  # fmt: skip


@pytest.mark.parametrize('network', ['resnet12', 'transformer'])
def test_learns_to_adapt_with_low_rank_changes(network, tmp_path, capsys):
  config = Config(**TINY[network])
  rows = large_learners.run(config, tmp_path)
  losses = np.load(tmp_path / rows[0]['per_task_file'], allow_pickle=False)
  assert losses.shape == (1, config.eval_tasks, 2)
  before, after = losses[0].mean(0)
  assert after < before
  lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
  trained = [line for line in map(json.loads, lines) if 'loss' in str(line)]
  assert trained
  assert 0 < rows[0]['alpha_entries'] < rows[0]['theta_entries']
  out = capsys.readouterr().out
  assert out.index('memory of a meta-iteration') < out.index('unseen tasks')
  assert (tmp_path / 'learning_curves.png').is_file()
  assert ('whoever knows the chain' in out) == (network == 'transformer')


@pytest.mark.parametrize('network', ['resnet12', 'transformer'])
def test_parts_that_adapt(network):
  entries = {}
  for adapts in large_learners.PARTS:
    config = Config(**{**TINY[network], 'adapts': adapts})
    setup = large_learners.build(config)
    alpha = jax.eval_shape(setup.training.start).meta.alpha
    entries[adapts] = sum(leaf.size for leaf in jax.tree.leaves(alpha))
  assert 0 < entries['norms'] < entries['all']
  assert 0 < entries['head'] < entries['low_rank'] < entries['all']


def test_a_rank_that_is_too_high_and_a_wrong_grouping():
  with pytest.raises(ValueError, match='rank must be at most'):
    large_learners.build(Config(**{**TINY['transformer'], 'rank': 17}))
  with pytest.raises(ValueError, match='3'):
    large_learners.build(Config(**{**TINY['transformer'], 'tasks_at_once': 3}))
