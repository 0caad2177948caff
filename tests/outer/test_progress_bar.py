"""The progress bar of `train`: where it is shown, and what it shows."""

import io
import sys
import types

import jax
import numpy as np
import optax
import pytest

import metasgd_jax as ms
from metasgd_jax.outer import progress
from metasgd_jax.outer.loop import Progress
from metasgd_jax.outer.progress import bar


class Terminal(io.StringIO):
  def isatty(self):
    return True


def shown(wanted, stream, monkeypatch, info=None, process=0):
  """What is written for a training of 10 meta-iterations, of which 2 were done before."""
  monkeypatch.setattr(sys, 'stderr', stream)
  monkeypatch.setattr(jax, 'process_index', lambda: process)
  monkeypatch.delitem(sys.modules, 'IPython', raising=False)
  with bar(wanted, 2, 10) as show:
    for step in (6, 10):
      show(Progress(None, step, 10, info or {'loss': np.array([0.25, 0.75])}, 1.0, 4.0))
  return stream.getvalue()


def test_on_a_terminal_it_shows_the_steps_and_the_mean_of_the_chunk(monkeypatch):
  out = shown(None, Terminal(), monkeypatch)
  assert '2/10' in out
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
  monkeypatch.setattr(sys, 'stdout', stdout)
  monkeypatch.setattr(progress, '_in_notebook', lambda: True)
  assert shown(None, io.StringIO(), monkeypatch) == ''
  assert '10/10' in stdout.getvalue()


def test_a_program_without_a_console(monkeypatch):
  monkeypatch.setattr(sys, 'stderr', None)
  for wanted in (None, True):
    with bar(wanted, 0, 1) as show:
      show(Progress(None, 1, 1, {'loss': np.ones(1)}, 1.0, 1.0))


def test_ipython_without_a_kernel_is_no_notebook(monkeypatch):
  for shell, notebook in ((None, False), (types.SimpleNamespace(), False), (types.SimpleNamespace(kernel=1), True)):
    monkeypatch.setitem(sys.modules, 'IPython', types.SimpleNamespace(get_ipython=lambda shell=shell: shell))
    assert progress._in_notebook() == notebook


def test_train_shows_the_steps_of_a_resumed_run(monkeypatch):
  tasks, optimizer = ms.tasks.sinusoid(shot=2), optax.sgd(0.1)
  learner = ms.maml(ms.nn.from_linen(ms.nn.MLP((2,))), ms.losses.mean_squared_error, alpha=0.1)
  state = ms.init(jax.random.key(0), tasks, learner=learner, optimizer=optimizer)._replace(step=np.int32(3))
  written = {}
  for progress_, callbacks in ((True, ()), (None, ()), (None, [lambda _: None]), (False, ())):
    monkeypatch.setattr(sys, 'stderr', Terminal())
    options = dict(meta_iterations=5, meta_batch=1, progress=progress_, callbacks=callbacks)
    ms.train(state, tasks, learner=learner, optimizer=optimizer, **options)
    written[progress_, bool(callbacks)] = sys.stderr.getvalue()
  assert '3/5' in written[True, False]
  assert '5/5' in written[True, False]
  assert '5/5' in written[None, False]
  assert written[None, True] == written[False, False] == ''


def test_without_tqdm_there_is_none(monkeypatch):
  monkeypatch.setitem(sys.modules, 'tqdm', None)
  assert shown(True, Terminal(), monkeypatch) == ''
