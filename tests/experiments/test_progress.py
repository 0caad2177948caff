"""The progress of a training: a bar on a terminal, otherwise lines of the log."""

import io
import sys
import types

import jax
import numpy as np
import pytest

from experiments import running
from experiments.reporting import Recorder


class Terminal(io.StringIO):
  def isatty(self):
    return True


def record(steps, total=100, history=()):
  """Records chunks of a training that takes 0.5 seconds for a meta-iteration."""
  recorder = Recorder('MAML', [], history)
  state = types.SimpleNamespace(meta=None, opt_state=(), step=np.int32(0))
  for step in steps:
    info = {'loss': np.array([0.123456, 0.123456]), 'instance_1': np.array([1.0])}
    recorder(types.SimpleNamespace(state=state, step=step, total=total, info=info, seconds=step / 2, rate=2.0))
  recorder.close()
  return recorder


def logged(caplog, steps, **options):
  caplog.clear()
  with caplog.at_level('INFO', 'absl'):
    record(steps, **options)
  return [line.getMessage() for line in caplog.records]


def test_the_log_has_a_line_after_each_tenth(caplog, capsys):
  found = logged(caplog, range(1, 101))
  assert [line.split()[1] for line in found] == [f'{10 * n}/100' for n in range(1, 11)]
  assert found[3] == 'MAML  40/100  loss 0.1235  2.00 it/s  00:30 left'
  assert found[-1] == 'MAML  100/100  loss 0.1235  2.00 it/s  took 00:50'
  assert capsys.readouterr() == ('', '')


def test_the_loss_of_a_policy_gradient_is_not_shown(caplog):
  with caplog.at_level('INFO', 'absl'):
    recorder = Recorder('MAML', [])
    info = {'loss': np.array([1e-5]), 'return_after': np.array([-12.0])}
    state = types.SimpleNamespace(meta=None, opt_state=(), step=np.int32(0))
    recorder(types.SimpleNamespace(state=state, step=5, total=5, info=info, seconds=2.0, rate=2.0))
    recorder.close()
  assert caplog.records[-1].getMessage().startswith('MAML  5/5  return_after -12  2.00 it/s')
  assert recorder.curves['loss'][1] == 1e-5


def test_the_last_line_comes_even_if_the_run_is_one_chunk(caplog):
  (line,) = logged(caplog, [3], total=3)
  assert line.startswith('MAML  3/3  loss ')


@pytest.mark.parametrize(('process', 'shown'), [(0, True), (1, False)])
def test_a_terminal_of_the_first_process_has_a_bar(caplog, monkeypatch, process, shown):
  monkeypatch.setattr(sys, 'stderr', Terminal())
  monkeypatch.setattr(jax, 'process_index', lambda: process)
  lines = logged(caplog, range(1, 101))
  out = sys.stderr.getvalue()
  if shown:
    assert '100/100' in out
    assert 'loss 0.1235' in out
    assert out.endswith('\n')
    assert lines == []
  else:
    assert out == ''


def test_a_resumed_training_shows_the_steps_that_were_done(monkeypatch):
  monkeypatch.setattr(sys, 'stderr', Terminal())
  recorder = record([60, 80], history=[{'label': 'MAML', 'step': 40, 'loss': 0.5, 'instance_1': 1.0}])
  assert recorder.curves['loss'][0].tolist() == [40, 60, 80]
  assert recorder._bar.n == 80
  assert recorder._bar.initial == 40


def test_the_log_says_every_some_seconds_how_many_tasks_are_tested(caplog, monkeypatch):
  now = iter([0.0, 5.0, 12.0, 12.0, 13.0, 25.0, 25.0])
  monkeypatch.setattr(running, 'time', types.SimpleNamespace(monotonic=lambda: next(now)))
  progress = running._Progress(600)
  with caplog.at_level('INFO', 'absl'):
    for done in (100, 200, 300, 500, 600):  # 500 is logged 13 s after 200, and the end is not logged.
      progress(done)
  assert [line.getMessage() for line in caplog.records] == ['tested on 200 of 600 tasks', 'tested on 500 of 600 tasks']
