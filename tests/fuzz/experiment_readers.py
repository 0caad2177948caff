"""What experiments read of earlier runs: settings, and the cells of a table."""

import contextlib
import dataclasses
import io
import json
import pathlib
import random

from experiments import classification, command, few_shot_table, regression
from metasgd_jax.io import files

from .mutations import in_json
from .reader import Reader
from .trees import Tree

_CELL = few_shot_table.cells(classification.Config(learner=('maml',), table2=True, data_dir='somewhere'))[0]
_ROW = {
  'learner': 'maml', 'way': 5, 'shot': 1, 'test_shot': 1, 'batch_norm': 'transductive', 'mean': 0.9, 'ci95': 0.01,
  'mean_by_step': [0.2, 0.9], 'meta_iterations': 60_000, 'meta_batch': 16, 'seeds': 1, 'tasks': 600,
  'dataset': 'omniglot', 'query': 15, 'eval_query': 1,
}  # fmt: skip


def _settings() -> list[Tree]:
  of_regression = regression.Config(meta_iterations=5, learner=('maml',))
  results = {'command': 'python -m experiments.regression', 'config': dataclasses.asdict(of_regression), 'rows': []}
  return [
    {'a.json': json.dumps(dataclasses.asdict(of_regression)).encode()},
    {'a.json': json.dumps(results).encode()},
  ]


def _read_settings(folder: pathlib.Path, rng: random.Random) -> None:
  for flag in command.from_file(str(folder / 'a.json'), regression.Config, 'regression'):
    assert flag.startswith('--')


def _cells() -> list[Tree]:
  rows = [_ROW, {**_ROW, 'batch_norm': 'inductive', 'mean': 0.8}]
  cell = 'cells/omniglot_maml_5way_1shot'
  return [
    {
      f'{cell}/config.json': json.dumps(dataclasses.asdict(_CELL)).encode(),
      f'{cell}/results.json': json.dumps({'rows': rows}).encode(),
    }
  ]


def _read_cells(folder: pathlib.Path, rng: random.Random) -> None:
  with contextlib.redirect_stdout(io.StringIO()) as said:
    few_shot_table._done(_CELL, folder / 'cells' / 'omniglot_maml_5way_1shot')
    few_shot_table.write(folder, 'omniglot')
  said.getvalue().encode()
  json.loads((folder / 'table_omniglot.json').read_bytes())


EXPERIMENT_READERS = [
  Reader('--config', _settings, _read_settings, (ValueError,), 0.5, {'': (in_json,)}),
  Reader('cells of a table', _cells, _read_cells, (files.WriterError,), 0.5, {'': (in_json,)}),
]
