"""The progress bar of `train`: where it is shown, and what it shows."""

import io
import sys

import jax
import numpy as np
import pytest

from metasgd_jax.outer.loop import Progress
from metasgd_jax.outer.progress import bar


class Terminal(io.StringIO):
  def isatty(self):
    return True


def shown(wanted, stream, monkeypatch, info=None, process=0):
  """What is written for a training of 10 meta-iterations, of which 2 were done before."""
  monkeypatch.setattr(sys, 'stderr', stream)
  monkeypatch.setattr(jax, 'process_index', lambda: process)
  with bar(wanted, 2, 10) as show:
    for step in (6, 10):
      show(Progress(None, step, 10, info or {'loss': np.array([0.25, 0.75])}, 1.0, 4.0))
  return stream.getvalue()


def test_on_a_terminal_it_shows_the_steps_and_the_mean_of_the_chunk(monkeypatch):
  out = shown(None, Terminal(), monkeypatch)
  assert 'compiling' in out
  assert '10/10' in out
  assert 'loss 0.5' in out
  assert out.endswith('\n')


def test_of_a_policy_gradient_it_shows_the_returns(monkeypatch):
  info = {name: np.array([-3.0]) for name in ('loss', 'return_after', 'return_before', 'taken')}
  out = shown(True, io.StringIO(), monkeypatch, info)
  assert 'return_before -3, return_after -3' in out
  assert 'taken' not in out


@pytest.mark.parametrize(
  ('wanted', 'stream', 'process'),
  [(None, io.StringIO(), 0), (False, Terminal(), 0), (None, Terminal(), 1), (True, Terminal(), 1)],
)
def test_where_nothing_is_shown(wanted, stream, process, monkeypatch):
  assert shown(wanted, stream, monkeypatch, process=process) == ''


def test_a_notebook_has_it_on_stdout(monkeypatch):
  stdout = io.StringIO()
  monkeypatch.setitem(sys.modules, 'ipykernel', object())
  monkeypatch.setattr(sys, 'stdout', stdout)
  assert shown(None, io.StringIO(), monkeypatch) == ''
  assert '10/10' in stdout.getvalue()


def test_without_tqdm_there_is_none(monkeypatch):
  monkeypatch.setitem(sys.modules, 'tqdm', None)
  assert shown(True, Terminal(), monkeypatch) == ''
