import io
import itertools
import subprocess
import sys

import pytest

from metasgd_jax.io import progress


class Terminal(io.StringIO):
  def isatty(self):
    return True


def test_progress_on_a_terminal_stays_in_its_line():
  out, now = Terminal(), iter([0.0, 1.0, 1.1, 1.2])
  line = progress.ProgressLine('MAML', out=out, clock=lambda: next(now))
  line.show(500, 1000, 2.0, 250.0, loss=0.123456)
  line.show(600, 1000, 2.4, 250.0)  # Too soon after the other, so left out.
  line.show(1000, 1000, 4.0, 250.0)
  assert out.getvalue() == (
    '\r\x1b[KMAML  500/1,000  loss 0.1235  250 it/s  2 s left\r\x1b[KMAML  1,000/1,000  250 it/s  took 4 s\n'
  )


def lines_off_a_terminal(seconds, every):
  out, now = io.StringIO(), itertools.count(0, seconds)
  line = progress.ProgressLine('MAML', out=out, every=every, clock=lambda: next(now))
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


@pytest.mark.parametrize('out', [Terminal(), io.StringIO()])
def test_before_the_first_step_there_is_no_rate(out):
  line = progress.ProgressLine('MAML', out=out, every=0, clock=itertools.count(0, 1).__next__)
  line.show(0, 10, 0.0, 0.0)
  line.show(0, 0, 0.0, 0.0)
  assert '0/10  0.00 it/s' in out.getvalue()
  assert '0/0  0.00 it/s  took 0 s' in out.getvalue()


def test_progress_is_told_as_asked_where_the_output_is_no_terminal():
  said, terminal = [], Terminal()
  progress.ProgressLine('MAML', out=io.StringIO(), say=said.append).show(5, 5, 2.0, 2.5, accuracy=0.75)
  assert said == ['MAML  5/5  accuracy 0.75  2.50 it/s  took 2 s']
  progress.ProgressLine('MAML', out=terminal, say=said.append).show(5, 5, 2.0, 2.5)
  assert len(said) == 1
  assert terminal.getvalue().startswith('\r')


def test_a_plain_script_off_a_terminal_tells_its_progress():
  code = "from metasgd_jax.io import progress; progress.ProgressLine('MAML').show(5, 5, 2.0, 2.5)"
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
  assert (done.stdout, done.stderr) == ('', 'MAML  5/5  2.50 it/s  took 2 s\n')


@pytest.mark.parametrize(
  ('seconds', 'text'), [(0.4, '0 s'), (59.4, '59 s'), (200, '3 min 20 s'), (18_720, '5 h 12 min')]
)
def test_durations(seconds, text):
  assert progress.duration(seconds) == text
