import errno
import io
import itertools
import json
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from metasgd_jax import writers


class Terminal(io.StringIO):
  def isatty(self):
    return True


def test_a_file_takes_its_name_when_it_is_whole(tmp_path):
  path = tmp_path / 'results.json'
  writers.write_json(path, {'a': 1})
  with pytest.raises(RuntimeError, match='half'), writers.atomic(path) as file:
    file.write(b'{"a": ')
    raise RuntimeError('half-way')
  assert json.loads(path.read_text()) == {'a': 1}
  assert [p.name for p in tmp_path.iterdir()] == ['results.json']


@pytest.mark.parametrize('module', ['fsync', 'replace', 'write'])
def test_a_full_disk_is_told_in_a_sentence_and_leaves_the_old_file(tmp_path, monkeypatch, module):
  path = tmp_path / 'a'
  path.write_text('old')

  def full(*args, **options):
    raise OSError(errno.ENOSPC, 'No space left on device')

  class Full(io.BytesIO):
    name, write, fileno = str(tmp_path / 'never'), full, full

  if module == 'fsync':
    monkeypatch.setattr('os.fsync', full)
  elif module == 'replace':
    monkeypatch.setattr('pathlib.Path.replace', full)
  else:
    (tmp_path / 'never').write_text('')
    monkeypatch.setattr('tempfile.NamedTemporaryFile', lambda **options: Full())
  for write in (
    lambda: writers.write_json(path, {}),
    lambda: writers.write_array(path, np.zeros(3)),
    lambda: writers.write_params(path, {'a': np.zeros(3)}),
  ):
    (tmp_path / 'never').write_text('')
    with pytest.raises(writers.WriterError) as e:
      write()
    assert str(e.value) == f'{path} cannot be written (No space left on device); make room, or give another --workdir'
    (tmp_path / 'never').unlink(missing_ok=True)
  assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [('a', 'old')]


def test_a_full_disk_under_the_metrics_is_told_in_a_sentence(tmp_path, monkeypatch):
  path = tmp_path / 'metrics.jsonl'
  writer = writers.MetricsWriter(path)

  def full(*args, **options):
    raise OSError(errno.ENOSPC, 'No space left on device')

  sentence = r'metrics.jsonl cannot be written \(No space left on device\); make room, or give another --workdir'
  monkeypatch.setattr('os.fsync', full)
  with pytest.raises(writers.WriterError, match=sentence):
    writer.sync()
  monkeypatch.setattr('pathlib.Path.open', full)
  for fails in (lambda: writer.write('a', 1, {'loss': 0.5}), lambda: writers.MetricsWriter(path)):
    with pytest.raises(writers.WriterError, match=sentence):
      fails()


@pytest.mark.parametrize('name', ['metrics.jsonl', 'timings.jsonl'])
def test_metrics_are_not_written_through_a_link(tmp_path, name):
  (tmp_path / 'mine').write_text('mine')
  (tmp_path / name).symlink_to('mine')
  path = tmp_path / 'metrics.jsonl'
  writer = writers.MetricsWriter(path, go_on=True)
  tries = [lambda: writer.write('a', 1, {'loss': 0.5, 'seconds': 1.0}), lambda: writer.cut('a', 0)]
  if name == 'metrics.jsonl':
    tries += [writer.sync, lambda: writers.MetricsWriter(path)]
  for fails in tries:
    with pytest.raises(writers.WriterError, match='is not a file but a link; remove the link, or give another --work'):
      fails()
  assert (tmp_path / 'mine').read_text() == 'mine'


def test_json_of_arrays_and_infinities(tmp_path):
  value = {
    'mean': np.float32(0.5),
    'ci': float('inf'),
    'steps': jnp.arange(2),
    'path': pathlib.Path('x'),
    'n': np.int64(3),
  }
  writers.write_json(tmp_path / 'a.json', value)
  assert json.loads((tmp_path / 'a.json').read_text()) == {
    'mean': 0.5,
    'ci': None,
    'steps': [0, 1],
    'path': 'x',
    'n': 3,
  }


def test_params_come_back(tmp_path):
  params = {'a': np.arange(6.0).reshape(2, 3), 'b': {'c': np.float32(2)}}
  writers.write_params(tmp_path / 'p', params)
  like = {'a': np.zeros((2, 3)), 'b': {'c': np.float32(0)}}
  back = writers.read_params(tmp_path / 'p', like)
  assert np.array_equal(back['a'], params['a'])
  assert back['b']['c'] == 2


@pytest.mark.parametrize(
  ('data', 'like', 'message'),
  [
    (None, {'a': np.zeros((3, 2))}, r"has shape \(2, 3\) for \['a'\], expected \(3, 2\)"),
    (None, {'z': np.zeros((2, 3))}, 'does not hold the parameters asked for'),
    (b'\x81', {'a': np.zeros((2, 3))}, 'does not hold the parameters asked for'),
    (b'', {'a': np.zeros((2, 3))}, 'does not hold the parameters asked for'),
  ],
)
def test_params_that_are_not_those(tmp_path, data, like, message):
  writers.write_params(tmp_path / 'p', {'a': np.zeros((2, 3))})
  if data is not None:
    (tmp_path / 'p').write_bytes(data)
  with pytest.raises(ValueError, match=message):
    writers.read_params(tmp_path / 'p', like)


def test_a_workdir_is_made(tmp_path):
  assert writers.open_workdir(tmp_path / 'a' / 'b').is_dir()


def test_a_workdir_that_is_a_file(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(writers.WriterError, match=r'workdir .*file cannot be written \(.*\); give another --workdir'):
    writers.open_workdir(tmp_path / 'file')


def test_progress_on_a_terminal_stays_in_its_line():
  out, now = Terminal(), iter([0.0, 1.0, 1.1, 1.2])
  line = writers.ProgressLine('MAML', out=out, clock=lambda: next(now))
  line.show(500, 1000, 2.0, 250.0, loss=0.123456)
  line.show(600, 1000, 2.4, 250.0)  # Too soon after the other, so left out.
  line.show(1000, 1000, 4.0, 250.0)
  assert out.getvalue() == (
    '\r\x1b[KMAML  500/1,000  loss 0.1235  250 it/s  2 s left\r\x1b[KMAML  1,000/1,000  250 it/s  took 4 s\n'
  )


def lines_off_a_terminal(seconds, every):
  out, now = io.StringIO(), itertools.count(0, seconds)
  line = writers.ProgressLine('MAML', out=out, every=every, clock=lambda: next(now))
  for step in range(1, 101):
    line.show(step, 100, step * seconds, 1 / seconds)
  return out.getvalue().splitlines()


def test_progress_in_a_file_is_a_line_with_each_tenth():
  found = lines_off_a_terminal(seconds=0.5, every=30)
  assert [line.split()[1] for line in found] == [f'{10 * n}/100' for n in range(1, 11)]
  assert found[3] == 'MAML  40/100  2.00 it/s  30 s left'
  assert found[-1] == 'MAML  100/100  2.00 it/s  took 50 s'


def test_progress_of_a_slow_run_is_told_in_between_and_of_a_fast_one_only_now_and_then():
  found = lines_off_a_terminal(seconds=10, every=30)
  assert [line.split()[1] for line in found[:5]] == ['3/100', '6/100', '9/100', '10/100', '13/100']
  assert [line.split()[1] for line in lines_off_a_terminal(seconds=0.0625, every=30)] == [
    '16/100', '32/100', '48/100', '64/100', '80/100', '96/100', '100/100'
  ]  # fmt: skip


def test_progress_is_told_as_asked_where_the_output_is_no_terminal():
  said, terminal = [], Terminal()
  writers.ProgressLine('MAML', out=io.StringIO(), say=said.append).show(5, 5, 2.0, 2.5, accuracy=0.75)
  assert said == ['MAML  5/5  accuracy 0.75  2.50 it/s  took 2 s']
  writers.ProgressLine('MAML', out=terminal, say=said.append).show(5, 5, 2.0, 2.5)
  assert len(said) == 1
  assert terminal.getvalue().startswith('\r')


def test_a_plain_script_off_a_terminal_tells_its_progress():
  code = "from metasgd_jax import writers; writers.ProgressLine('MAML').show(5, 5, 2.0, 2.5)"
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
  assert (done.stdout, done.stderr) == ('', 'MAML  5/5  2.50 it/s  took 2 s\n')


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


@pytest.mark.parametrize(
  ('seconds', 'text'), [(0.4, '0 s'), (59.4, '59 s'), (200, '3 min 20 s'), (18_720, '5 h 12 min')]
)
def test_durations(seconds, text):
  assert writers.duration(seconds) == text


def test_metrics_are_a_line_each(tmp_path):
  writer = writers.MetricsWriter(tmp_path / 'm.jsonl')
  writer.write('MAML', 10, {'loss': np.array([0.5, np.nan])})
  writer.write('MAML', 20, {'loss': np.float32(0.25)})
  lines = [json.loads(line) for line in (tmp_path / 'm.jsonl').read_text().splitlines()]
  assert lines == [{'label': 'MAML', 'step': 10, 'loss': [0.5, None]}, {'label': 'MAML', 'step': 20, 'loss': 0.25}]


def test_provenance_names_versions_and_device():
  about = writers.provenance()
  assert {'python', 'jax', 'optax', 'flax', 'metasgd_jax'} <= set(about['versions'])
  assert about['device']['kind']
  assert about['jax_settings']['jax_enable_x64'] is False


def test_clock_times_have_a_file_of_their_own(tmp_path):
  writer = writers.MetricsWriter(tmp_path / 'm.jsonl')
  writer.write('MAML', 10, {'loss': 0.5, 'seconds': 1.25})
  assert json.loads((tmp_path / 'm.jsonl').read_text()) == {'label': 'MAML', 'step': 10, 'loss': 0.5}
  assert json.loads((tmp_path / 'timings.jsonl').read_text()) == {'label': 'MAML', 'step': 10, 'seconds': 1.25}
  writers.MetricsWriter(tmp_path / 'm.jsonl')
  assert not (tmp_path / 'timings.jsonl').exists()


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
  for file in (path, tmp_path / 'timings.jsonl'):
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(line['label'], line['step']) for line in lines] == [('A', 10), ('A', 20), ('B', 10), ('B', 20)]
  assert writers.MetricsWriter(tmp_path / 'none.jsonl', go_on=True).cut('A', 5) == []
