"""Makes Tables 2 and 3 of Li et al. 2017 from many trainings, and keeps the results of each on disk.

Here a cell is one training: one learner, with one number of ways and one number of shots.
"""

import contextlib
import dataclasses
import functools
import json
import pathlib
import signal
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from absl import logging

from experiments import few_shot_data, options, processes, reporting, resuming
from experiments.few_shot_learners import LEARNERS, NAMES
from experiments.jobs import SINGLE, Job, Jobs, run_all
from experiments.resuming import Keeping
from metasgd_jax.io import files
from metasgd_jax.io.checkpoint import CheckpointError

WAYS, SHOTS = (5, 20), (1, 5)
SETTINGS = tuple((way, shot) for way in WAYS for shot in SHOTS)

PAPER = {
  ('omniglot', 'siamese'): ('97.3', '98.4', '88.2', '97.0'),
  ('omniglot', 'matching'): ('98.1', '98.9', '93.8', '98.5'),
  ('omniglot', 'maml'): ('98.7 ± 0.4', '99.9 ± 0.1', None, None),
  ('omniglot', 'maml_5'): (None, None, '95.8 ± 0.3', '98.9 ± 0.2'),
  ('omniglot', 'meta_sgd'): ('99.53 ± 0.26', '99.93 ± 0.09', '95.93 ± 0.38', '98.97 ± 0.19'),
  ('mini_imagenet', 'matching'): ('43.56 ± 0.84', '55.31 ± 0.73', '17.31 ± 0.22', '22.69 ± 0.2'),
  ('mini_imagenet', 'meta_lstm'): ('43.44 ± 0.77', '60.6 ± 0.71', '16.7 ± 0.23', '26.06 ± 0.25'),
  ('mini_imagenet', 'maml'): (None, None, '16.49 ± 0.58', '19.29 ± 0.29'),
  ('mini_imagenet', 'maml_5'): ('48.7 ± 1.84', '63.11 ± 0.92', None, None),
  ('mini_imagenet', 'meta_sgd'): ('50.47 ± 1.87', '64.03 ± 0.94', '17.56 ± 0.64', '28.92 ± 0.35'),
}
"""Accuracy in percent and half-width of its interval in the four settings, from Li et al. 2017, Tables 2 and 3.

The MAML that the paper cites or ran took 1 inner step in training for 5-way Omniglot and 20-way mini-ImageNet, and 5
inner steps for 20-way Omniglot and 5-way mini-ImageNet (Finn et al. 2017, A.1; Li et al. 2017, Table 3).
"""


def paper_figure(learner: str, dataset: str, way: int, shot: int) -> str | None:
  """Returns the paper's accuracy in percent as text, or `None` if the paper reports none."""
  figures = PAPER.get((dataset, learner), ())
  return dict(zip(SETTINGS, figures, strict=False)).get((way, shot))


def cells(config: Any) -> list[Any]:
  """Returns the configurations of all trainings of a table.

  The 5-shot accuracies of Table 2 come from 1-shot training, as in the paper. The 5-shot accuracies of Table 3 come
  from 5-shot training.
  """
  shots = [(1, SHOTS)] if config.table2 else [(shot, (shot,)) for shot in SHOTS]
  return [
    dataclasses.replace(config, learner=(name,), way=way, shot=shot, eval_shots=eval_shots, table2=False, table3=False)
    for way in WAYS
    for name in config.learners
    for shot, eval_shots in shots
  ]


def prepare(
  config: Any,
  workdir: pathlib.Path,
  build: Callable,
  run: Callable,
  keeping: Keeping | None = None,
  jobs: Jobs = SINGLE,
) -> Callable[[], object]:
  """Checks that the table can be made, and returns the function that makes it.

  Args:
    config: Configuration of the experiment, in which `table2` or `table3` is True.
    workdir: Directory of the table. Each cell has its own directory in it.
    build: Function `(configuration of a cell, data) → Setup`.
    run: Function `(configuration of a cell, directory, Setup) → rows`.
    keeping: Options of the runs. With `keeping.restart`, a cell is trained from the start if `resuming.check` refuses
      the run in its directory. Otherwise the error of `resuming.check` is raised before any cell is trained.
    jobs: Whether the cells get processes of their own.
  """
  todo, keeping = cells(config), keeping or Keeping()
  _refuse_others(workdir, config.dataset)
  refused = [cell for cell in todo if not _is_accepted(cell, workdir, keeping.restart)]
  data = few_shot_data.placed(few_shot_data.load(todo[0]), todo[0].stream)  # All cells share the data.
  for cell in todo:
    build(cell, data)  # Raises ValueError if the settings of the cell do not fit the data.
  apart = functools.partial(_train_apart, todo, refused, workdir, keeping, jobs)
  return functools.partial(_make, todo, workdir, lambda cell, directory: run(cell, directory, build(cell, data)), apart)


def _is_accepted(cell: Any, workdir: pathlib.Path, restart: bool) -> bool:
  """Returns whether `resuming.check` accepts the run in a cell's directory. Without `restart`, its error is raised."""
  try:
    resuming.check(_directory(workdir, cell), cell)
  except CheckpointError:
    if not restart:
      raise
    return False
  return True


def _train_apart(todo: list[Any], refused: list[Any], workdir: pathlib.Path, keeping: Keeping, jobs: Jobs) -> None:
  """Trains and tests the cells that are not done, each in a process of its own, if `jobs` has several cores."""
  left = [cell for cell in todo if not _done(cell, _directory(workdir, cell))]
  if not jobs.are_useful(len(left)):
    return
  kept = options.flag_texts(dataclasses.replace(keeping, restart=False, jobs=0))

  def job(cell):
    restart = ['--restart'] if cell in refused else []
    arguments = ['experiments.classification', *options.flag_texts(cell), *kept, *restart]
    return Job(_about(cell), _directory(workdir, cell), arguments, cell.meta_iterations * cell.seeds)

  if number := run_all([job(cell) for cell in left], jobs.cores):
    print(f'stopped by {signal.Signals(number).name}: all that was trained is saved; the same command goes on')
    raise reporting.StoppedError(128 + number)


def _about(cell: Any) -> str:
  return f'{NAMES[cell.learner[0]]}, {cell.way}-way, trained on {cell.shot} shot'


def _make(todo: list[Any], workdir: pathlib.Path, run: Callable, apart: Callable[[], None]) -> None:
  dataset, failed = todo[0].dataset, []
  try:
    apart()
  except reporting.TrainingError as e:  # The cells that failed are tried once more below.
    print(f'error: {e}', flush=True)
  for i, cell in enumerate(todo):
    directory = _directory(workdir, cell)
    about = f'cell {i + 1} of {len(todo)}: {_about(cell)}'
    done = processes.from_first(np.bool_(_done(cell, directory)))
    logging.info('%s%s', about, ': is finished already' if done else '')
    try:
      if not done:
        run(cell, directory)
    except reporting.TrainingError as e:  # The other cells can still be trained.
      print(f'error: {e}', flush=True)
      failed.append(about)
    rows = write(workdir, dataset)
  print(markdown(rows), end='')
  if rows:
    reporting.save_pictures(workdir.joinpath, {f'table_{dataset}': functools.partial(draw, rows)})
  if failed:
    raise reporting.TrainingError(
      f'{len(failed)} of {len(todo)} trainings failed, so the table lacks their cells: {"; ".join(failed)}; the errors '
      'printed above say why'
    )


def _refuse_others(workdir: pathlib.Path, dataset: str) -> None:
  """Raises WriterError if writing the table would overwrite files, unless they are from an earlier table.

  If the existing JSON file has rows, all the files are taken to be from an earlier table.
  """
  paths = [workdir / f'table_{dataset}.{ending}' for ending in ('json', 'md', 'png')]
  with contextlib.suppress(OSError, TypeError, ValueError):
    if 'rows' in json.loads(paths[0].read_bytes()):
      return
  resuming.refuse(paths)


def _directory(workdir: pathlib.Path, cell: Any) -> pathlib.Path:
  return workdir / 'cells' / f'{cell.dataset}_{cell.learner[0]}_{cell.way}way_{cell.shot}shot'


def _done(cell: Any, directory: pathlib.Path) -> bool:
  """Returns whether the directory has the results of a finished training with the configuration of this cell."""
  if resuming.unfinished(directory):
    return False
  try:
    found = json.loads((directory / 'config.json').read_bytes())
    _read_rows(directory / 'results.json')
  except (OSError, ValueError):
    return False
  return not resuming.differences(found, cell)


def rows_of(workdir: pathlib.Path, dataset: str) -> list[dict[str, Any]]:
  """Returns the results of all cells of a data set in the work directory, in the order of the table.

  The cells may come from different commands, with different numbers of meta-iterations and tasks. The table states
  these numbers. A file that cannot be read is reported and left out.
  """
  rows = []
  for path in sorted((workdir / 'cells').glob(f'{dataset}_*/results.json')):
    try:
      rows += _read_rows(path)
    except (OSError, ValueError) as e:
      print(f'{path} cannot be read, so the table lacks its cell ({e}); --restart trains the cell again')
  return sorted(rows, key=_place)


def _place(row: dict[str, Any]) -> tuple[Any, ...]:
  return LEARNERS.index(row['learner']), row['way'], row['test_shot'], row['batch_norm'] == 'inductive'


def _read_rows(path: pathlib.Path) -> list[dict[str, Any]]:
  """Returns the rows of a cell's results.json. Raises OSError or ValueError if the file has none."""
  found = json.loads(path.read_bytes())
  if not isinstance(found, dict) or not found.get('rows'):
    raise ValueError('the file has no rows')
  return found['rows']


def write(workdir: pathlib.Path, dataset: str) -> list[dict[str, Any]]:
  """Writes the table of a data set, with the cells that have results, as Markdown and JSON, and returns its rows."""
  _refuse_others(workdir, dataset)
  rows = rows_of(workdir, dataset)
  files.write_json(workdir / f'table_{dataset}.json', {'rows': rows})
  with files.atomic(workdir / f'table_{dataset}.md') as file:
    file.write(markdown(rows).encode())
  return rows


def markdown(rows: list[dict[str, Any]]) -> str:
  """Returns the table: a line for each learner and kind of batch norm, with the paper's accuracies in brackets."""
  if not rows:
    return ''
  settings = sorted({(row['way'], row['test_shot']) for row in rows})
  columns = [f'{way}-way {shot}-shot' for way, shot in settings]
  table = [['learner', 'batch norm', *columns, 'inner steps', 'meta-iterations × tasks', 'seeds']]
  table.append(['---'] * len(table[0]))
  for learner, mode in dict.fromkeys((row['learner'], row['batch_norm']) for row in rows):
    line = [row for row in rows if (row['learner'], row['batch_norm']) == (learner, mode)]
    figures = {(row['way'], row['test_shot']): _figure(row) for row in line}
    steps = _distinct(len(row['mean_by_step']) - 1 for row in line)
    budgets = _distinct(f'{row["meta_iterations"]:,} × {row["meta_batch"]}' for row in line)
    cells = [figures.get(setting, '') for setting in settings]
    table.append([NAMES[learner], mode, *cells, steps, budgets, _distinct(row['seeds'] for row in line)])
  return '\n'.join('| ' + ' | '.join(cells) + ' |' for cells in table) + f'\n\n{_caption(rows)}\n'


def _caption(rows: list[dict[str, Any]]) -> str:
  shown = {name: _distinct(row[name] for row in rows) for name in ('tasks', 'dataset', 'query', 'eval_query')}
  trained = 'on 1 shot' if {row['shot'] for row in rows} == {1} else 'on as many shots as in testing'
  return (
    f'Accuracy in percent on {shown["tasks"]} unseen tasks of {shown["dataset"]}, ± 95% interval over tasks. The '
    f'learners were trained {trained}, with {shown["query"]} query images per class, and tested with '
    f"{shown['eval_query']}. In brackets are the paper's accuracies, after 60,000 meta-iterations and with "
    'transductive batch norm, which uses the statistics of the batch. Inductive batch norm uses the statistics of '
    'the support, so that each query image is classified separately.'
  )


def draw(rows: list[dict[str, Any]], plotting) -> Any:
  """Returns a figure of the accuracies beside those of the paper. Rows with inductive batch norm are left out."""
  panels: dict[str, list[Any]] = {}
  for row in sorted(rows, key=lambda row: (row['way'], row['test_shot'])):
    if row['batch_norm'] != 'inductive':
      paper = _paper_figure(row)
      published = float(paper.split()[0]) / 100 if paper else None
      accuracy = plotting.Accuracy(NAMES[row['learner']], row['mean'], row['ci95'], published)
      panels.setdefault(f'{row["way"]}-way {row["test_shot"]}-shot', []).append(accuracy)
  return plotting.accuracies(panels)


def _figure(row: dict[str, Any]) -> str:
  paper = _paper_figure(row)
  return f'{100 * row["mean"]:.2f} ± {100 * row["ci95"]:.2f}' + (f' ({paper})' if paper else '')


def _paper_figure(row: dict[str, Any]) -> str | None:
  if row['batch_norm'] != 'transductive':
    return None
  return paper_figure(row['learner'], row['dataset'], row['way'], row['test_shot'])


def _distinct(items: Iterable[Any]) -> str:
  return ', '.join(dict.fromkeys(str(item) for item in items))
