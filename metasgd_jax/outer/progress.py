"""Shows the progress of a training as a bar, on a terminal or in a notebook."""

import contextlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import jax
import numpy as np

if TYPE_CHECKING:
  from metasgd_jax.outer.loop import Progress

_RETURNS = ('return_before', 'return_after')
"""The metrics that are shown of a policy gradient, whose loss is near zero however good the policy is."""


@contextlib.contextmanager
def bar(wanted: bool | None, first: int, total: int) -> Iterator[Callable[['Progress'], None]]:
  """Gives a callback that moves the bar of a training, or does nothing if no bar is shown.

  Args:
    wanted: Whether to show a bar. With None, the bar is shown in a notebook, and on a terminal.
    first: Number of meta-iterations that are done already.
    total: Number of meta-iterations at which the training ends.
  """
  notebook = _in_notebook()
  stream = sys.stdout if notebook else sys.stderr  # A notebook shows stderr as if it were an error.
  shown = (notebook or _is_terminal(stream)) if wanted is None else wanted
  # A program without a console has no stream.
  if not shown or stream is None or jax.process_index() or importlib.util.find_spec('tqdm') is None:
    yield lambda progress: None
    return
  import tqdm

  interval = 1.0 if notebook else 0.1  # A notebook's file keeps each state of the bar.
  with tqdm.tqdm(desc='training', initial=first, total=total, file=stream, mininterval=interval) as shows:

    def show(progress: 'Progress') -> None:
      names = [name for name in _RETURNS if name in progress.info] or sorted(progress.info)
      means = [f'{name} {np.mean(progress.info[name]):.4g}' for name in names]
      shows.set_postfix_str(', '.join(means), refresh=False)
      shows.update(progress.step - shows.n)

    yield show


def _in_notebook() -> bool:
  """Returns whether this program is the kernel of a notebook. A terminal of IPython has no kernel."""
  shell = getattr(sys.modules.get('IPython'), 'get_ipython', lambda: None)()
  return hasattr(shell, 'kernel')


def _is_terminal(stream) -> bool:
  return bool(getattr(stream, 'isatty', lambda: False)())
