import errno
import json

import numpy as np
import pytest
from problems import saying

from metasgd_jax.io import files, writers


def test_a_full_disk_under_the_metrics_is_told_in_a_sentence(tmp_path, monkeypatch):
  path = tmp_path / 'metrics.jsonl'
  writer = writers.MetricsWriter(path)

  def full(*args, **options):
    raise OSError(errno.ENOSPC, 'No space left on device')

  sentence = saying('metrics.jsonl cannot be written', 'No space left on device', 'free disk space', 'another')
  monkeypatch.setattr('os.fsync', full)
  with pytest.raises(files.WriterError, match=sentence):
    writer.sync()
  monkeypatch.setattr('pathlib.Path.open', full)
  for fails in (lambda: writer.write('a', 1, {'loss': 0.5}), lambda: writers.MetricsWriter(path)):
    with pytest.raises(files.WriterError, match=sentence):
      fails()


def test_tensorboard_has_scalars_histograms_and_figures(tmp_path):
  from matplotlib.figure import Figure
  from tensorboardX.proto.event_pb2 import Event

  writer = writers.TensorBoardWriter(tmp_path)
  writer.write('A', 10, {'loss': np.array([1.0, 3.0])})
  writer.histograms('A', 10, {'alpha': {'w': np.array([0.1, np.nan, -0.2]), 'none': np.array([np.inf])}})
  writer.figure('curves', Figure(figsize=(1, 1)))
  writer.close()
  data, found = next(tmp_path.glob('events.*')).read_bytes(), {}
  while data:
    size = int.from_bytes(data[:8], 'little')
    for value in Event.FromString(data[12 : 12 + size]).summary.value:
      found[value.tag] = value
    data = data[16 + size :]
  assert found['A/loss'].simple_value == 2
  assert (found['A/alpha.w'].histo.num, found['A/alpha.w'].histo.min) == (2, -0.2)
  assert found['curves'].image.encoded_image_string.startswith(b'\x89PNG')
  assert 'A/alpha.none' not in found


def test_metrics_are_a_line_each(tmp_path):
  writer = writers.MetricsWriter(tmp_path / 'm.jsonl')
  writer.write('MAML', 10, {'loss': np.array([0.5, np.nan])})
  writer.write('MAML', 20, {'loss': np.float32(0.25)})
  lines = [json.loads(line) for line in (tmp_path / 'm.jsonl').read_text().splitlines()]
  assert lines == [{'label': 'MAML', 'step': 10, 'loss': [0.5, None]}, {'label': 'MAML', 'step': 20, 'loss': 0.25}]


def test_clock_times_have_a_file_of_their_own(tmp_path):
  writer = writers.MetricsWriter(tmp_path / 'm.jsonl')
  writer.write('MAML', 10, {'loss': 0.5, 'seconds': 1.25})
  assert json.loads((tmp_path / 'm.jsonl').read_text()) == {'label': 'MAML', 'step': 10, 'loss': 0.5}
  assert json.loads((tmp_path / 'm_timings.jsonl').read_text()) == {'label': 'MAML', 'step': 10, 'seconds': 1.25}
  writers.MetricsWriter(tmp_path / 'metrics.jsonl').write('MAML', 10, {'seconds': 1.25})
  assert (tmp_path / 'timings.jsonl').exists()
  writers.MetricsWriter(tmp_path / 'm.jsonl')
  assert {path.name for path in tmp_path.iterdir()} == {'m.jsonl', 'metrics.jsonl', 'timings.jsonl'}


@pytest.mark.parametrize('name', ['label', 'step'])
def test_a_value_takes_no_name_that_lines_have(tmp_path, name):
  writer = writers.MetricsWriter(tmp_path / 'm.jsonl')
  with pytest.raises(ValueError, match=saying('value cannot be called', f"'{name}'")):
    writer.write('MAML', 10, {'loss': 0.5, name: 99})
  assert (tmp_path / 'm.jsonl').read_text() == ''


def test_metrics_are_cut_to_a_step(tmp_path):
  path = tmp_path / 'm.jsonl'
  writer = writers.MetricsWriter(path)
  for label, step in (('A', 10), ('A', 20), ('B', 10), ('B', 20), ('B', 30)):
    writer.write(label, step, {'loss': np.float32(0.1), 'seconds': 1.0})
  before = path.read_bytes()
  with path.open('a') as file:
    file.write('{"label": "B", "st')
  writer = writers.MetricsWriter(path, go_on=True)
  assert [line['step'] for line in writer.cut('A', 20)] == [10, 20]
  assert path.read_bytes() == before
  found = writer.cut('B', 20)
  assert [line['step'] for line in found] == [10, 20]
  assert np.float32(found[0]['loss']) == np.float32(0.1)
  for file in (path, tmp_path / 'm_timings.jsonl'):
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(line['label'], line['step']) for line in lines] == [('A', 10), ('A', 20), ('B', 10), ('B', 20)]
  assert writers.MetricsWriter(tmp_path / 'none.jsonl', go_on=True).cut('A', 5) == []


def test_a_whole_line_without_its_newline_is_removed(tmp_path):
  path = tmp_path / 'm.jsonl'
  writer = writers.MetricsWriter(path)
  for step in (10, 20):
    writer.write('A', step, {'loss': 0.5})
  path.write_bytes(path.read_bytes().removesuffix(b'\n'))
  writer = writers.MetricsWriter(path, go_on=True)
  assert [line['step'] for line in writer.cut('A', 20)] == [10]
  writer.write('A', 20, {'loss': 0.5})
  assert [json.loads(line)['step'] for line in path.read_text().splitlines()] == [10, 20]
