"""What experiments read of earlier runs: settings, and the metrics of a run that goes on."""

import dataclasses
import json
import pathlib
import random

import numpy as np

from experiments import command, regression, reporting
from metasgd_jax.io import files, writers

from .mutations import in_json, in_json_lines, text
from .reader import Reader, in_folder
from .trees import Tree


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


def _metrics() -> list[Tree]:
  def run(folder):
    writer = writers.MetricsWriter(folder / 'metrics.jsonl')
    for step in range(10, 60, 10):
      loss = np.array([0.5, np.nan if step == 30 else 0.25])
      writer.write('a', step, {'seconds': 1.0, 'loss': loss, 'accuracy': loss, 'alpha_negative': 0.1})
      writer.write('a', step, {'validation': 0.5})
      writer.write('b', step, {'loss': 0.5})

  return [in_folder(run)]


def _go_on(folder: pathlib.Path, rng: random.Random) -> None:
  metrics = writers.MetricsWriter(folder / 'metrics.jsonl', go_on=True)
  recorder = reporting.Recorder('a', [metrics], metrics.cut('a', 30))
  for steps, values in recorder.curves.values():
    assert steps.shape == values.shape[:1]
    assert values.dtype == float


EXPERIMENT_READERS = [
  Reader('--config', _settings, _read_settings, (ValueError,), 0.5, {'': (in_json,)}),
  Reader(
    'metrics of a run', _metrics, _go_on, (reporting.TrainingError, files.WriterError), 0.5,
    {'': (in_json_lines, text)},
  ),
]  # fmt: skip
