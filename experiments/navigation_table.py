"""Prints Table 4 of Li et al. 2017: the results of navigation beside the paper's."""

from collections.abc import Sequence
from typing import Any

import metasgd_jax as ms
from experiments import running
from experiments.reporting import NAMES, Result

PAPER = {  # (learner, start) → mean return after one update and half-width; Li et al. 2017, Table 4.
  ('maml', 'fixed'): (-9.12, 0.66),
  ('meta_sgd', 'fixed'): (-8.64, 0.68),
  ('maml', 'varying'): (-10.71, 0.76),
  ('meta_sgd', 'varying'): (-10.15, 0.62),
}


def label(start: str, learner: str, optimizer: str) -> str:
  """Returns the name of a training in printed text."""
  return f'{name(learner, optimizer)}, {start} start'


def name(learner: str, optimizer: str) -> str:
  """Returns the name of a learner, with its outer optimiser if that is not Adam."""
  return NAMES[learner] + (' by TRPO' if optimizer == 'trpo' else '')


def text(results: Sequence[Result], budgets: Sequence[str], seeds: int, trajectories: int) -> str:
  """Returns the mean returns after 0, 1, … updates, the paper's, and Meta-SGD minus MAML on the same tasks.

  Args:
    results: Result of each training, whose `about` has the start, the learner and the optimizer.
    budgets: Numbers of meta-iterations and tasks of each training, as text.
    seeds: Number of training runs.
    trajectories: Number of trajectories before and after each update.
  """
  _, tasks, counts = results[0].values.shape
  after = [[Result(r.about, r.values[..., : n + 1]) for n in range(counts)] for r in results]
  cells = [(r.about['start'], r.about['learner'], r.about['optimizer']) for r in results]
  lines = [
    f'mean undiscounted return ± 95% interval over {tasks} unseen tasks; {seeds} training run(s); {trajectories} '
    'trajectories before and after each update',
    _line('start', 'learner', [updates(n) for n in range(counts)]) + f'{"paper, 1 update":<18}meta-iterations × tasks',
  ]
  for (start, learner, optimizer), found, budget in zip(cells, after, budgets, strict=True):
    estimates = [result.estimate for result in found]
    paper = ms.Interval(*PAPER[learner, start])
    lines.append(_line(start, name(learner, optimizer), estimates) + f'{paper!s:<18}{budget}')
  if seeds > 1:
    lines.append('95% interval of the mean over training runs:')
    for (start, learner, optimizer), found in zip(cells, after, strict=True):
      lines.append(_line(start, name(learner, optimizer), [f'±{result.over_runs.ci95:.2f}' for result in found]))
  of_cell = dict(zip(cells, after, strict=True))
  for start, optimizer in dict.fromkeys((start, optimizer) for start, _, optimizer in cells):
    first, second = (of_cell.get((start, learner, optimizer)) for learner in ('meta_sgd', 'maml'))
    if first and second:
      lines.append(f'{name("meta_sgd", optimizer)} − {name("maml", optimizer)}, {start} start, on the same tasks:')
      for n, (ours, theirs) in enumerate(zip(first, second, strict=True)):
        lines.append(f'         {updates(n)} {running.difference(ours, theirs, "tasks")}')
  return '\n'.join(lines)


def updates(count: int) -> str:
  """Returns a number of updates as text."""
  return f'{count} update' if count == 1 else f'{count} updates'


def _line(start: str, learner: str, cells: Sequence[Any]) -> str:
  return f'{start:<9}{learner:<18}' + ''.join(f'{cell!s:<14} ' for cell in cells)
