"""Functions for the numbers of all experiments: they record metrics, make rows of results, and save pictures."""

import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from absl import logging

from metasgd_jax.io import files, provenance, writers
from metasgd_jax.outer import bad_numbers
from metasgd_jax.outer.evaluation import Interval, confidence_interval
from metasgd_jax.outer.training import Progress
from metasgd_jax.types import PyTree

PathOf = Callable[[str], pathlib.Path]
"""Function that returns the path of a file, given the name of the file, such as `Run.path`."""

NAMES = {'meta_sgd': 'Meta-SGD', 'maml': 'MAML'}
"""The names of the learners in tables and pictures."""

_NOT_CURVES = ('label', 'step', 'alpha_negative', 'skipped')
"""Fields of a line of metrics that are not means over a chunk of training, and so have no curve."""


WARNING = 'warning: '
"""Start of a printed line that a program relays from the trainings that have processes of their own."""


class StoppedError(SystemExit):
  """A signal has ended the program, after what was trained has been saved."""


class TrainingError(Exception):
  """Training cannot go on. The message says why, and what to do."""


def seed_keys(seed: int, seeds: int) -> jax.Array:
  """Returns the keys `[R]` of R = `seeds` training runs. Run r equals a single run with `--seed={seed + r}`."""
  return jax.vmap(jax.random.key)(seed + jnp.arange(seeds))


def test_keys(seed: int) -> tuple[jax.Array, jax.Array]:
  """Returns two keys: one for tests, one for pictures. Every learner gets the same keys, and so the same tasks."""
  keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), 2**31))
  return keys[0], keys[1]


def one_run(tree: PyTree, run: int) -> PyTree:
  """Returns the tree of the run with index `run`, given a tree whose leaves have a leading axis of R runs."""
  return jax.tree.map(lambda leaf: leaf[run], tree)


def negative_share(alpha: PyTree) -> float:
  """Returns the share of α's entries below zero."""
  leaves = jax.tree.leaves(alpha)
  return float(sum(jnp.sum(a < 0) for a in leaves) / sum(a.size for a in leaves))


class Recorder:
  """A callback of `train` that shows progress, writes a line of metrics for each chunk, and keeps the curves.

  On a terminal, progress is a bar. Otherwise the log gets a line after each tenth of the run.
  """

  def __init__(self, label: str, metrics: Sequence[writers.Writer], history: Sequence[Mapping[str, Any]] = ()):
    """Begins the record of a training run, or continues the record of a run that was stopped.

    Args:
      label: Name of the training run in the progress and in the metrics.
      metrics: Writers of the metrics.
      history: Lines of metrics that the run has written so far.
    """
    self._label, self._metrics = label, metrics
    self._tenth = 0
    self._steps: list[int] = []
    self._values: dict[str, list[np.ndarray]] = {}
    for line in history:
      if 'loss' in line:
        self._keep(line['step'], {name: value for name, value in line.items() if name not in _NOT_CURVES})
    off = True if jax.process_index() else None  # With None, tqdm hides the bar if there is no terminal.
    self._bar = tqdm.tqdm(desc=label, initial=self._steps[-1] if self._steps else 0, disable=off)

  @property
  def curves(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns the mean of each metric over each chunk: `{name: (steps [n], values [n, R])}`."""
    return {name: (np.array(self._steps), np.array(values)) for name, values in self._values.items()}

  def __call__(self, progress: Progress) -> None:
    """Records the metrics of a chunk, after `bad_numbers.find` has found no bad number in this chunk."""
    skips = bad_numbers.skipped(progress.state)
    mean = np.mean if skips is None else _finite_mean
    means = {name: mean(values, axis=0) for name, values in progress.info.items()}
    self._keep(progress.step, means)
    self._write(progress, means if skips is None else means | {'skipped': skips})
    # The loss of a policy gradient is near zero however good the policy is.
    hidden = ('instance_', 'loss') if 'return_after' in means else 'instance_'
    self._show(progress, {name: means[name] for name in sorted(means) if not name.startswith(hidden)})

  def close(self) -> None:
    """Closes the progress bar."""
    self._bar.close()

  def _keep(self, step: int, values: Mapping[str, Any]) -> None:
    self._steps.append(step)
    for name, value in values.items():
      self._values.setdefault(name, []).append(np.atleast_1d(np.asarray(value, float)))

  def _write(self, progress: Progress, values: dict[str, Any]) -> None:
    alpha = getattr(progress.state.meta, 'alpha', None)
    if alpha is not None:
      values = values | {'alpha_negative': negative_share(alpha)}
    for writer in self._metrics:
      writer.write(self._label, progress.step, {'seconds': progress.seconds, **values})
      if isinstance(writer, writers.TensorBoardWriter) and alpha is not None:
        shown = alpha if np.ndim(progress.state.step) == 0 else one_run(alpha, 0)
        writer.histograms(self._label, progress.step, {'alpha': shown})

  def _show(self, progress: Progress, means: dict[str, np.ndarray]) -> None:
    values = '  '.join(f'{name} {np.mean(value):.4g}' for name, value in means.items())
    self._bar.total = progress.total
    self._bar.set_postfix_str(values, refresh=False)
    self._bar.update(progress.step - self._bar.n)
    before, self._tenth = self._tenth, 10 * progress.step // progress.total
    if self._bar.disable and self._tenth > before:
      left = tqdm.tqdm.format_interval((progress.total - progress.step) / progress.rate) + ' left'
      time = left if progress.step < progress.total else f'took {tqdm.tqdm.format_interval(progress.seconds)}'
      done = f'{self._label}  {progress.step:,}/{progress.total:,}'
      logging.info('%s  %s  %.2f it/s  %s', done, values, progress.rate, time)


@contextlib.contextmanager
def progress(workdirs: Sequence[pathlib.Path], total: int) -> Iterator[Callable[[], None]]:
  """Gives a function that shows the progress of trainings in other processes: as a bar, or in the log by tenths.

  Args:
    workdirs: Work directory of each training.
    total: Number of meta-iterations of all trainings together.
  """
  tenth = 0
  with tqdm.tqdm(desc=f'{len(workdirs)} trainings', total=total, disable=None) as bar:

    def show():
      nonlocal tenth
      bar.n = done = min(total, sum(map(_done, workdirs)))
      bar.refresh()
      if bar.disable and 10 * done // total > tenth:
        tenth = 10 * done // total
        logging.info('%d trainings: %d of %d meta-iterations', len(workdirs), done, total)

    yield show


def _done(workdir: pathlib.Path) -> int:
  """Returns the number of meta-iterations that the metrics of a run report."""
  steps: dict[str, int] = {}
  with contextlib.suppress(OSError, ValueError), (workdir / 'metrics.jsonl').open() as file:
    for line in file:
      found = json.loads(line)
      steps[found['label']] = found['step']
  return sum(steps.values())


def _finite_mean(values: np.ndarray, axis: int) -> np.ndarray:
  """Returns the mean of the finite values, or NaN if there are none. It equals `np.mean` if all are finite."""
  finite = np.isfinite(values)
  if finite.all():
    return np.mean(values, axis=axis)
  counts = finite.sum(axis)
  sums = np.where(finite, values, 0).sum(axis)
  return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan).astype(values.dtype)


@dataclasses.dataclass(frozen=True)
class Result:
  """A number in a table: the mean of `values` after the last inner step.

  Attributes:
    about: Facts that distinguish the rows of the table, such as the learner and the shots.
    values: Metric of each task after 0 … k inner steps, `[R, tasks, k + 1]`.
  """

  about: dict[str, Any]
  values: np.ndarray

  @property
  def over_runs(self) -> Interval:
    """Returns the mean of the metric after the last inner step, and its confidence interval over training runs."""
    return confidence_interval(self.values[..., -1].mean(1))

  @property
  def estimate(self) -> Interval:
    """Returns the mean of the metric after the last inner step, and its confidence interval over tasks."""
    return confidence_interval(self.values[..., -1].mean(0))

  def row(self, path_of: PathOf, about_run: dict[str, Any]) -> dict[str, Any]:
    """Writes the values to a file, and returns the row for results.json.

    `path_of` is the function from the name of a file to its path.
    """
    name = 'per_task_' + '_'.join(str(v) for v in self.about.values()) + '.npy'
    files.write_array(path_of(name), self.values)
    seeds, tasks, _ = self.values.shape
    (mean, ci95), ci95_over_seeds = self.estimate, self.over_runs.ci95
    figures = {'tasks': tasks, 'seeds': seeds, 'mean': mean, 'ci95': ci95, 'ci95_over_seeds': ci95_over_seeds}
    by_step = {'mean_by_step': self.values.mean((0, 1)), 'per_task_file': name}
    return self.about | figures | by_step | about_run | provenance.collect()


def percent(interval: Interval) -> str:
  """Returns an accuracy and its interval as text in percent."""
  return f'{100 * interval.mean:.2f}% ± {100 * interval.ci95:.2f}'


def draw_alpha(alpha: PyTree, plotting):
  """Returns a figure of the rates α that the first of R runs learned. `save_pictures` calls this function."""
  return plotting.alpha_histograms(one_run(alpha, 0))


def save_pictures(
  path_of: PathOf, pictures: dict[str, Callable[[Any], Any]], metrics: Sequence[writers.Writer] = ()
) -> None:
  """Draws each picture to the file `path_of('NAME.png')`, and to TensorBoard if `metrics` has a `TensorBoardWriter`.

  `pictures` maps a NAME to a function that takes the module `plotting` and returns a figure. Only the first process
  draws. If matplotlib is not installed, nothing is drawn, and a sentence says what to install.
  """
  if jax.process_index():
    return
  try:
    from metasgd_jax import plotting
  except ImportError:
    print('no pictures: matplotlib is missing; pip install matplotlib')
    return
  paths = {name: path_of(f'{name}.png') for name in pictures}
  for name, draw in pictures.items():
    figure = draw(plotting)
    with files.atomic(paths[name]) as file:
      figure.savefig(file, format='png', dpi=110)
    for writer in metrics:
      if isinstance(writer, writers.TensorBoardWriter):
        writer.figure(name, figure)
  print('pictures: ' + ', '.join(map(str, paths.values())))
