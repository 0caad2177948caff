"""A line that tells how far a run is and when it ends."""

import sys
import time
from collections.abc import Callable
from typing import IO

__all__ = ['ProgressLine', 'duration']


class ProgressLine:
  """Tells how far a run is, its figures, its rate and the time left: in place on a terminal, else line by line.

  Off a terminal a line comes with each tenth of the run, and in between where that takes longer than `every`.

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
    """Starts the line.

    Args:
      label: begins it.
      every: seconds between lines where the output is not a terminal.
      out: where to; standard error where left out.
      say: gets the lines where the output is not a terminal, such as a logger's `info`; printed where left out.
      clock: gives the time in seconds.
    """
    self._label, self._clock = label, clock
    self._out = out or sys.stderr
    self._in_place = self._out.isatty()
    self._say = say or (lambda line: print(line, file=self._out, flush=True))
    self._every = 0.2 if self._in_place else every
    self._last, self._tenth = clock(), 0

  def show(self, step: int, total: int, seconds: float, rate: float, **values: float) -> None:
    """Prints, unless it did so a moment ago; always when step is total.

    Args:
      step: meta-iterations done.
      total: meta-iterations to do.
      seconds: what was spent on them in this call.
      rate: meta-iterations a second.
      values: shown by name.
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
    elif rate > 0:  # Before the first step there is none.
      text += f'  {duration((total - step) / rate)} left'
    if self._in_place:
      print(f'\r\x1b[K{text}', end='' if step < total else '\n', file=self._out, flush=True)
    else:
      self._say(text)


def duration(seconds: float) -> str:
  """Returns a time as people say it.

  Args:
    seconds: of it.

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
