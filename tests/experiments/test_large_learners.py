"""The experiment on larger learners, at a tiny size."""

import json

import jax
import numpy as np
import pytest
from problems import saying

from experiments import inspecting, large_learners
from experiments.large_learners import Config

CHAINS = dict(network='transformer', width=16, depth=1, heads=2, tokens=4, length=8, shot=4, query=4)
TINY = {
  'resnet12': dict(widths=(4,), way=3, rank=2, meta_iterations=30, learning_rate=0.01, eval_tasks=20, alpha=0.2),
  'transformer': CHAINS | dict(rank=2, meta_iterations=200, learning_rate=0.01, eval_tasks=50, alpha=0.5),
}
LEAST = CHAINS | dict(adapts='head', width=4, heads=1, tokens=3, length=4, shot=1, query=1)
LEAST |= dict(meta_iterations=2, meta_batch=1, eval_tasks=3)


def check_run(config, folder, capsys):
  """Runs the experiment, looks at what it prints and writes, and returns the losses on unseen tasks."""
  rows = large_learners.run(config, folder)
  losses = np.load(folder / rows[0]['per_task_file'], allow_pickle=False)
  assert losses.shape == (1, config.eval_tasks, 2)
  lines = (folder / 'metrics.jsonl').read_text().splitlines()
  assert any('loss' in str(json.loads(line)) for line in lines)
  assert 0 < rows[0]['alpha_entries'] < rows[0]['theta_entries']
  out = capsys.readouterr().out
  assert out.index('memory of a meta-iteration') < out.index('unseen tasks')
  assert (folder / 'learning_curves.png').is_file()
  assert ('true transition probabilities' in out) == (config.network == 'transformer')
  return losses[0]


@pytest.mark.slow
def test_the_least_run(tmp_path, capsys, monkeypatch):
  """The plan is a program of its own, which the runs of full length compile."""
  monkeypatch.setattr(large_learners, 'FLOOR_TASKS', 2)
  monkeypatch.setattr(inspecting, 'print_memory', lambda of: print('memory of a meta-iteration of', of[0].label))
  assert np.all(np.isfinite(check_run(Config(**LEAST), tmp_path, capsys)))


@pytest.mark.slow
@pytest.mark.parametrize('network', ['resnet12', 'transformer'])
def test_learns_to_adapt_with_low_rank_changes(network, tmp_path, capsys):
  before, after = check_run(Config(**TINY[network]), tmp_path, capsys).mean(0)
  assert after < before


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
  with pytest.raises(ValueError, match=saying('rank', 'at most', 'got 17')):
    large_learners.build(Config(**{**TINY['transformer'], 'rank': 17}))
  with pytest.raises(ValueError, match=saying('tasks_at_once=3', '2 tasks')):
    large_learners.build(Config(**{**TINY['transformer'], 'tasks_at_once': 3}))
