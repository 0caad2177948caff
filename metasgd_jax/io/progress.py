"""A line that shows the progress of a run and the time that is left."""

import sys
import time
from collections.abc import Callable
from typing import IO


class ProgressLine:
  """Shows the progress of a run, its values, its rate and the time that is left.

  On a terminal, the line is updated in place. Otherwise a new line is printed after each tenth of the run. If a tenth
  takes longer than `every` seconds, lines are also printed in between.

  Example:
    >>> from metasgd_jax.io.progress import ProgressLine
    >>> line = ProgressLine('Meta-SGD', say=print)
    >>> line.show(4, 4, seconds=80.0, rate=0.05, loss=0.5)
    Meta-SGD  4/4  loss 0.5  0.05 it/s  took 1 min 20 s
  """

  def __init__(
    self,
    label: str,
    *,
    every: float = 30.0,
    out: IO[str] | None = None,
    say: Callable[[str], object] | None = None,
    clock: Callable[[], float] = time.monotonic,
  ):
    """Creates the line, and starts to measure time.

    Args:
      label: Text at the beginning of the line.
      every: Seconds between lines if the output is not a terminal.
      out: Stream to write to. The default is standard error.
      say: Function that receives the lines if the output is not a terminal, such as the `info` of a logger. By default
        the lines are printed to `out`.
      clock: Function that returns the time in seconds.
    """
    self._label, self._clock = label, clock
    self._out = out or sys.stderr
    self._in_place = self._out.isatty()
    self._say = say or (lambda line: print(line, file=self._out, flush=True))
    self._every = 0.2 if self._in_place else every
    self._last, self._tenth = clock(), 0

  def show(self, step: int, total: int, seconds: float, rate: float, **values: float) -> None:
    """Prints the line, unless it was printed a moment ago. If `step` is `total`, the line is always printed.

    Args:
      step: Number of meta-iterations done.
      total: Number of meta-iterations to do.
      seconds: Seconds that this call has spent on meta-iterations.
      rate: Meta-iterations per second.
      values: Values to show, by name.
    """
    now, tenth = self._clock(), 10 * step // max(total, 1)
    waited = now - self._last
    next_tenth = not self._in_place and tenth > self._tenth and waited >= 1
    if step < total and waited < self._every and not next_tenth:
      return
    self._last, self._tenth = now, tenth
    text = f'{self._label}  {step:,}/{total:,}'
    text += ''.join(f'  {name} {value:.4g}' for name, value in values.items())
    text += f'  {rate:,.0f} it/s' if rate >= 10 else f'  {rate:.2f} it/s'
    if step >= total:
      text += f'  took {duration(seconds)}'
    elif rate > 0:  # Before the first step the rate is 0.
      text += f'  {duration((total - step) / rate)} left'
    if self._in_place:
      print(f'\r\x1b[K{text}', end='' if step < total else '\n', file=self._out, flush=True)
    else:
      self._say(text)


def duration(seconds: float) -> str:
  """Returns a duration as readable text.

  Args:
    seconds: Duration in seconds.

  Example:
    >>> from metasgd_jax.io.progress import duration
    >>> duration(42.3), duration(200), duration(18_720)
    ('42 s', '3 min 20 s', '5 h 12 min')
  """
  seconds = round(seconds)
  if seconds < 60:
    return f'{seconds} s'
  if seconds < 3600:
    return f'{seconds // 60} min {seconds % 60:02d} s'
  return f'{seconds // 3600} h {seconds % 3600 // 60:02d} min'
