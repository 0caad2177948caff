"""The lines of metrics of a run that goes on give its curves."""

import json

import numpy as np

from experiments.reporting import Recorder
from metasgd_jax.io.writers import MetricsWriter


def read_back(tmp_path, *lines):
  path = tmp_path / 'metrics.jsonl'
  path.write_text(''.join(json.dumps({'label': 'a', **line}) + '\n' for line in lines))
  writer = MetricsWriter(path, go_on=True)
  return Recorder('a', [writer], writer.cut('a', 30)).curves


def test_curves_come_back(tmp_path):
  writer = MetricsWriter(tmp_path / 'written')
  for step in (10, 20, 40):
    writer.write('a', step, {'loss': np.array([0.5, np.nan]), 'alpha_negative': 0.1})
    writer.write('a', step, {'validation': 0.5})
  curves = read_back(tmp_path, *map(json.loads, (tmp_path / 'written').read_text().splitlines()))
  assert list(curves) == ['loss']
  steps, values = curves['loss']
  assert steps.tolist() == [10, 20]
  np.testing.assert_array_equal(values, [[0.5, np.nan]] * 2)
