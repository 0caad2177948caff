"""Tables 2 and 3 of Li et al. 2017: all learners in four settings, one training after the other, cells kept on disk."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from absl import logging

from experiments import few_shot_data, processes, reporting, resuming
from experiments.few_shot_learners import LEARNERS, NAMES
from metasgd_jax.io import files

WAYS, SHOTS = (5, 20), (1, 5)
SETTINGS = tuple((way, shot) for way in WAYS for shot in SHOTS)

# Data set → learner → accuracy and half-width in percent in the four settings; Li et al. 2017, Tables 2 and 3.
PAPER: dict[str, dict[str, tuple]] = {
  'omniglot': {
    'siamese': ((97.3, None), (98.4, None), (88.2, None), (97.0, None)),
    'matching': ((98.1, None), (98.9, None), (93.8, None), (98.5, None)),
    'maml': ((98.7, 0.4), (99.9, 0.1), (95.8, 0.3), (98.9, 0.2)),
    'meta_sgd': ((99.53, 0.26), (99.93, 0.09), (95.93, 0.38), (98.97, 0.19)),
  },
  'mini_imagenet': {
    'matching': ((43.56, 0.84), (55.31, 0.73), (17.31, 0.22), (22.69, 0.20)),
    'meta_lstm': ((43.44, 0.77), (60.60, 0.71), (16.70, 0.23), (26.06, 0.25)),
    'maml': ((48.70, 1.84), (63.11, 0.92), (16.49, 0.58), (19.29, 0.29)),
    'meta_sgd': ((50.47, 1.87), (64.03, 0.94), (17.56, 0.64), (28.92, 0.35)),
  },
}  # fmt: skip
MAML_STEPS = {('omniglot', 5): 1, ('omniglot', 20): 5, ('mini_imagenet', 5): 5, ('mini_imagenet', 20): 1}
"""(data set, way) → inner steps in training of the MAML that the paper cites or ran: Finn et al. 2017, A.1; Table 3."""

OF_A_ROW: dict[str, Any] = {
  'learner': str, 'way': int, 'shot': int, 'test_shot': int, 'batch_norm': str, 'mean': int | float,
  'ci95': int | float, 'mean_by_step': list, 'meta_iterations': int, 'meta_batch': int, 'seeds': int, 'tasks': int,
  'dataset': str, 'query': int, 'eval_query': int,
}  # fmt: skip
"""What the table takes from a row of results.json."""
_LARGEST = 1e18
"""No figure of a row is larger; a JSON number may be larger than any float."""


def paper_figure(learner: str, dataset: str, way: int, shot: int) -> str | None:
  """Returns the paper's figure as text, in percent; `None` where it has none."""
  if learner in ('maml', 'maml_5'):
    if MAML_STEPS.get((dataset, way)) != (5 if learner == 'maml_5' else 1):
      return None
    learner = 'maml'
  if (way, shot) not in SETTINGS or learner not in PAPER.get(dataset, {}):
    return None
  mean, ci95 = PAPER[dataset][learner][SETTINGS.index((way, shot))]
  return f'{mean}' if ci95 is None else f'{mean} ± {ci95}'


def cells(config: Any) -> list[Any]:
  """Returns the configurations of all trainings of a table.

  Table 2's 5-shot figures come from 1-shot training, as in the paper; Table 3's from 5-shot training.
  """
  shots = [(1, SHOTS)] if config.table2 else [(shot, (shot,)) for shot in SHOTS]
  return [
    dataclasses.replace(config, learner=(name,), way=way, shot=shot, eval_shots=eval_shots, table2=False, table3=False)
    for way in WAYS
    for name in config.learners
    for shot, eval_shots in shots
  ]


def prepare(
  config: Any, workdir: pathlib.Path, build: Callable, run: Callable, restart: bool = False
) -> Callable[[], object]:
  """Checks that the table can be made, and returns what makes it.

  Args:
    config: of the experiment, with table2 or table3.
    workdir: where the cells go.
    build: `(cell's config, data) → Setup`.
    run: `(cell's config, directory, Setup) → rows`.
    restart: whether unfinished cells are begun anew; else those of another configuration are refused.
  """
  todo = cells(config)
  for cell in () if restart else todo:
    resuming.check(_directory(workdir, cell), cell)
  data = few_shot_data.placed(few_shot_data.load(todo[0]), todo[0].stream)  # Once for all cells.
  for cell in todo:
    build(cell, data)  # Raises what is wrong with it.
  return lambda: _make(todo, workdir, lambda cell, directory: run(cell, directory, build(cell, data)))


def _make(todo: list[Any], workdir: pathlib.Path, run: Callable) -> None:
  dataset, failed = todo[0].dataset, []
  for i, cell in enumerate(todo):
    directory = _directory(workdir, cell)
    about = f'cell {i + 1} of {len(todo)}: {NAMES[cell.learner[0]]}, {cell.way}-way, trained on {cell.shot} shot'
    if processes.from_first(np.bool_(_done(cell, directory))):
      logging.info('%s: is there already', about)
    else:
      logging.info('%s', about)
      try:
        run(cell, directory)
      except reporting.TrainingError as e:  # The other cells need not wait for it.
        print(f'error: {e}', flush=True)
        failed.append(about)
    write(workdir, dataset)
  print((workdir / f'table_{dataset}.md').read_text(), end='')
  if rows_of(workdir, dataset):
    reporting.save_pictures(workdir, {f'table_{dataset}': lambda plotting: draw(rows_of(workdir, dataset), plotting)})
  if failed:
    raise reporting.TrainingError(f'{len(failed)} of {len(todo)} cells are missing: {"; ".join(failed)}')


def _directory(workdir: pathlib.Path, cell: Any) -> pathlib.Path:
  return workdir / 'cells' / f'{cell.dataset}_{cell.learner[0]}_{cell.way}way_{cell.shot}shot'


def _done(cell: Any, directory: pathlib.Path) -> bool:
  """Whether a cell was made with this configuration, to the end."""
  if resuming.unfinished(directory):
    return False
  try:
    found = _read_json(directory / 'config.json')
    _read_rows(directory / 'results.json')
  except (OSError, ValueError, RecursionError):
    return False
  if not isinstance(found, dict):
    return False
  defaults = {field.name: field.default for field in dataclasses.fields(cell)}  # Of options newer than the cell.
  return json.loads(json.dumps({**defaults, **found})) == json.loads(json.dumps(dataclasses.asdict(cell)))


def rows_of(workdir: pathlib.Path, dataset: str) -> list[dict[str, Any]]:
  """Returns the results of a data set's cells in a work directory, whichever command made them, in the table's order.

  So cells may have budgets of their own, which the table states. A file that is no cell's is told of, and left out.
  """
  rows = []
  for path in sorted((workdir / 'cells').glob(f'{dataset}_*/results.json')):
    try:
      rows += _read_rows(path)
    except (OSError, ValueError, RecursionError) as e:
      print(f'{path} is no results of a cell and not in the table ({e}); the same command makes them again')
  return sorted(
    rows,
    key=lambda row: (LEARNERS.index(row['learner']), row['way'], row['test_shot'], row['batch_norm'] == 'inductive'),
  )


def _read_rows(path: pathlib.Path) -> list[dict[str, Any]]:
  """Returns the rows of a cell's results.json. Raises OSError, RecursionError or ValueError where there are none."""
  found = _read_json(path)
  rows = found.get('rows') if isinstance(found, dict) else None
  if not isinstance(rows, list) or not rows:
    raise ValueError('it has no rows')
  for row in rows:
    for name, kind in OF_A_ROW.items():
      value = row.get(name) if isinstance(row, dict) else None
      if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f'a row has {name}={value!r:.80}')
      fits = value.isprintable() if isinstance(value, str) else isinstance(value, list) or abs(value) <= _LARGEST
      if not fits:
        raise ValueError(f'a row has {name}={value!r:.80}')
    if row['learner'] not in LEARNERS:
      raise ValueError(f'a row has learner={row["learner"]!r:.80}')
  return rows


def _read_json(path: pathlib.Path) -> Any:
  """Returns what a file holds. Raises OSError, RecursionError or ValueError where there is none."""
  if not path.is_file():  # To read a pipe would wait for ever.
    raise ValueError('it is not a file')
  return json.loads(path.read_bytes())


def write(workdir: pathlib.Path, dataset: str) -> None:
  """Writes the table of a data set's cells so far, as Markdown and as JSON."""
  rows = rows_of(workdir, dataset)
  files.write_json(workdir / f'table_{dataset}.json', {'rows': rows})
  with files.atomic(workdir / f'table_{dataset}.md') as file:
    file.write(markdown(rows).encode())


def markdown(rows: list[dict[str, Any]]) -> str:
  """Returns the table: a line for each learner and way of batch norm, the paper's figures in brackets."""
  if not rows:
    return ''
  settings = [s for s in SETTINGS if any((row['way'], row['test_shot']) == s for row in rows)]
  columns = [f'{way}-way {shot}-shot' for way, shot in settings]
  lines = [
    '| learner | batch norm | ' + ' | '.join(columns) + ' | inner steps | meta-iterations × tasks | seeds |',
    '| --- | --- |' + ' --- |' * (len(columns) + 3),
  ]
  for learner, mode in _unique((row['learner'], row['batch_norm']) for row in rows):
    mine = {
      (r['way'], r['test_shot']): r for r in rows if (r['learner'], r['batch_norm']) == (learner, mode)
    }  # fmt: skip
    figures = [_figure(mine[s]) if s in mine else '' for s in settings]
    steps = _unique(len(row['mean_by_step']) - 1 for row in mine.values())
    budgets = _unique(f'{row["meta_iterations"]:,} × {row["meta_batch"]}' for row in mine.values())
    seeds = _unique(row['seeds'] for row in mine.values())
    cells = [NAMES[learner], mode, *figures, _joined(steps), ', '.join(budgets), _joined(seeds)]
    lines.append('| ' + ' | '.join(cells) + ' |')
  every = lambda name: _joined(_unique(row[name] for row in rows))
  trained = 'trained on 1 shot' if {row['shot'] for row in rows} == {1} else 'trained on as many shots'
  lines += [
    '',
    f'Accuracy in percent on {every("tasks")} unseen tasks of {every("dataset")}, ± 95% interval over tasks; query '
    f'images of a class in training: {every("query")}, in testing: {every("eval_query")}; {trained}. In brackets the '
    "paper's figures, after 60,000 meta-iterations, batch norm by the batch at hand (transductive). "
    "Inductive: by the support's statistics, each query image by itself.",
  ]
  return '\n'.join(lines) + '\n'


def draw(rows: list[dict[str, Any]], plotting):
  """Draws the table's figures, transductive, beside the paper's."""
  rows = [row for row in rows if row['batch_norm'] != 'inductive']
  panels = {}
  for way, shot in SETTINGS:
    found = [row for row in rows if (row['way'], row['test_shot']) == (way, shot)]
    if found:
      panels[f'{way}-way {shot}-shot'] = [
        plotting.Accuracy(NAMES[row['learner']], row['mean'], row['ci95'], _paper_mean(row)) for row in found
      ]
  return plotting.accuracies(panels)


def _figure(row) -> str:
  ours = f'{100 * row["mean"]:.2f} ± {100 * row["ci95"]:.2f}'
  paper = paper_figure(row['learner'], row['dataset'], row['way'], row['test_shot'])
  return f'{ours} ({paper})' if paper and row['batch_norm'] == 'transductive' else ours


def _paper_mean(row) -> float | None:
  paper = paper_figure(row['learner'], row['dataset'], row['way'], row['test_shot'])
  return float(paper.split()[0]) / 100 if paper else None


def _unique(items: Iterable[Any]) -> list[Any]:
  return list(dict.fromkeys(items))


def _joined(items: Iterable[Any]) -> str:
  return ', '.join(str(item) for item in items)
