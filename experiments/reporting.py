"""What both experiments do with a run: record it, keep its figures as rows, and draw it."""

import dataclasses
import pathlib
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from metasgd_jax.io import files, progress, provenance, writers
from metasgd_jax.outer import bad_numbers
from metasgd_jax.outer.evaluation import Interval, confidence_interval
from metasgd_jax.outer.training import Progress
from metasgd_jax.types import PyTree

NAMES = {'meta_sgd': 'Meta-SGD', 'maml': 'MAML'}
"""Learners by the names that people know."""


_OWN_FILES = (
  'results.json', 'finished.json', 'per_task_*.npy', 'params_*.msgpack', 'model_*.safetensors', 'curves_*.png',
  'alpha_*.png', 'task_*.png', 'instances_*.png', 'learning_curves.png', 'paths_*.png', 'adaptation_*.gif',
  'events.out.tfevents.*',
)  # fmt: skip


_EXTRA = ('alpha_negative', 'skipped')  # Of a line of metrics, beside the means of what training reports.


def seed_keys(seed: int, seeds: int) -> jax.Array:
  """Returns the keys `[R]` of R = `seeds` runs: run r trains as `--seed={seed + r} --seeds=1` does."""
  return jax.vmap(jax.random.key)(seed + jnp.arange(seeds))


def test_keys(seed: int) -> tuple[jax.Array, jax.Array]:
  """Returns the keys of tests and of pictures: the same for every learner, so that all are judged on the same tasks."""
  keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), 2**31))
  return keys[0], keys[1]


def one_run(tree: PyTree, run: int) -> PyTree:
  """Returns run `run` of a tree whose leaves have R runs in front."""
  return jax.tree.map(lambda leaf: leaf[run], tree)


def negative_share(alpha: PyTree) -> float:
  """Returns the share of α's entries below zero."""
  leaves = jax.tree.leaves(alpha)
  return float(sum(jnp.sum(a < 0) for a in leaves) / sum(a.size for a in leaves))


def clear_leftovers(workdir: pathlib.Path) -> None:
  """Removes the halves of files that a killed run was writing; see `files.atomic`."""
  for pattern in (*_OWN_FILES, 'config.json', 'metrics.jsonl', 'timings.jsonl'):
    for path in workdir.glob(f'.{pattern}-????????'):
      path.unlink()


def start(workdir: pathlib.Path, config: Any) -> list[writers.Writer]:
  """Clears what an earlier run left, if one did, writes config.json, returns the writers of metrics.

  A directory without config.json is nobody's run; nothing in it is removed. Of a run's directory, only files go whose
  names experiments give, and the traces in profile/.

  Args:
    workdir: of this run.
    config: a dataclass; its `tensorboard` says whether event files are wanted beside metrics.jsonl.
  """
  if (workdir / 'config.json').exists():
    shutil.rmtree(workdir / 'profile', ignore_errors=True)
    for pattern in _OWN_FILES:
      for path in workdir.glob(pattern):
        path.unlink()
  files.write_json(workdir / 'config.json', dataclasses.asdict(config))
  found: list[writers.Writer] = [writers.MetricsWriter(workdir / 'metrics.jsonl')]
  return [*found, writers.TensorBoardWriter(workdir)] if config.tensorboard else found


def go_on(workdir: pathlib.Path, config: Any) -> list[writers.Writer]:
  """Returns the writers of metrics of a run that goes on where it stopped; nothing is cleared."""
  found: list[writers.Writer] = [writers.MetricsWriter(workdir / 'metrics.jsonl', go_on=True)]
  return [*found, writers.TensorBoardWriter(workdir)] if config.tensorboard else found


class TrainingError(Exception):
  """Training cannot go on; the message says why and what to do."""


class Recorder:
  """A callback of `train`: a progress line, a line of metrics a chunk, and the curves to draw afterwards.

  `curves` is `{name: (steps [n], values [n, R])}`, of each info entry; a value is its chunk's mean.
  """

  def __init__(self, label: str, metrics: Sequence[writers.Writer], history: Sequence[Mapping[str, Any]] = ()):
    """Begins a run, or goes on with one.

    Args:
      label: names the run in the progress line and in the metrics.
      metrics: the writers.
      history: its lines of metrics so far, for whole curves.

    Raises:
      TrainingError: the lines are none that were written.
    """
    self._label, self._metrics = label, metrics
    if jax.process_index():  # Silent if not first: its standard output goes nowhere.
      self._line = progress.ProgressLine(label, out=sys.stdout)
    else:
      self._line = progress.ProgressLine(label, say=lambda line: logging.info('%s', line))
    self._steps: list[int] = []
    self._values: dict[str, list[np.ndarray]] = {}
    for line in history:
      if 'loss' in line:
        try:
          if type(line['step']) is not int:
            raise TypeError('no step')
          self._keep(line['step'], {k: v for k, v in line.items() if k not in ('label', 'step', *_EXTRA)})
        except (TypeError, ValueError, OverflowError) as e:  # Of what numpy takes for no number.
          raise self._spoilt(line['step']) from e

  def _keep(self, step: int, values: Mapping[str, Any]) -> None:
    arrays = {name: np.atleast_1d(np.asarray(value, float)) for name, value in values.items()}
    shapes = {name: array.shape for name, array in arrays.items()}
    if any(len(shape) > 1 for shape in shapes.values()):
      raise self._spoilt(step)
    if self._steps and shapes != {name: kept[-1].shape for name, kept in self._values.items()}:
      raise self._spoilt(self._steps[-1])  # Or that of step; what is trained now tells.
    self._steps.append(step)
    for name, array in arrays.items():
      self._values.setdefault(name, []).append(array)

  def _spoilt(self, step: Any) -> TrainingError:
    return TrainingError(
      f'{self._label}: the lines of metrics.jsonl about meta-iteration {step!r:.40} are not what was written; give '
      '--restart to begin anew'
    )

  def __call__(self, progress: Progress) -> None:
    """Takes a chunk, which `bad_numbers.find` has looked through."""
    skips = bad_numbers.skipped(progress.state)
    mean = np.mean if skips is None else _finite_mean
    means = {name: mean(values, axis=0) for name, values in progress.info.items()}
    self._keep(progress.step, means)
    extra: dict[str, Any] = {} if skips is None else {'skipped': skips}
    if getattr(progress.state.meta, 'alpha', None) is not None:
      extra['alpha_negative'] = negative_share(progress.state.meta.alpha)
    for writer in self._metrics:
      writer.write(self._label, progress.step, {'seconds': progress.seconds, **means, **extra})
      if isinstance(writer, writers.TensorBoardWriter) and 'alpha_negative' in extra:
        alpha = progress.state.meta.alpha
        shown = alpha if np.ndim(progress.state.step) == 0 else one_run(alpha, 0)
        writer.histograms(self._label, progress.step, {'alpha': shown})
    self._line.show(
      progress.step,
      progress.total,
      progress.seconds,
      progress.rate,
      **{n: float(np.mean(v)) for n, v in sorted(means.items()) if not n.startswith('instance_')},
    )

  @property
  def curves(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """What was recorded so far."""
    return {name: (np.array(self._steps), np.array(values)) for name, values in self._values.items()}


def _finite_mean(values: np.ndarray, axis: int) -> np.ndarray:
  """The mean of what is finite, as `np.mean` where all is; NaN where nothing is."""
  finite = np.isfinite(values)
  if finite.all():
    return np.mean(values, axis=axis)
  counts = finite.sum(axis)
  sums = np.where(finite, values, 0).sum(axis)
  return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan).astype(values.dtype)


@dataclasses.dataclass(frozen=True)
class Result:
  """One figure of a table, and where it comes from.

  Attributes:
    about: learner, shots and so on: the columns that tell rows apart.
    values: `[R, tasks, k + 1]`, each task's metric after 0 … k inner steps.
  """

  about: dict[str, Any]
  values: np.ndarray

  @property
  def over_runs(self) -> Interval:
    """After the last step: the mean over runs of the mean over tasks, and its interval over runs."""
    return confidence_interval(self.values[..., -1].mean(1))

  @property
  def estimate(self) -> Interval:
    """After the last step: the mean over tasks of the mean over runs, and its interval over tasks."""
    return confidence_interval(self.values[..., -1].mean(0))

  def row(self, directory: pathlib.Path, about_run: dict[str, Any]) -> dict[str, Any]:
    """Writes the values to a file of their own; returns the row for results.json."""
    name = 'per_task_' + '_'.join(str(v) for v in self.about.values()) + '.npy'
    files.write_array(directory / name, self.values)
    return {
      **self.about,
      'tasks': self.values.shape[1],
      'seeds': self.values.shape[0],
      'mean': self.estimate.mean,
      'ci95': self.estimate.ci95,
      'ci95_over_seeds': self.over_runs.ci95,
      'mean_by_step': self.values.mean((0, 1)),
      'per_task_file': name,
      **about_run,
      **provenance.collect(),
    }


def draw_alpha(alpha: PyTree, plotting):
  """Draws the α of the first of R runs; for `save_pictures`."""
  return plotting.alpha_histograms(one_run(alpha, 0))


def save_pictures(
  workdir: pathlib.Path, pictures: dict[str, Callable[[Any], Any]], metrics: Sequence[writers.Writer] = ()
) -> None:
  """Draws each figure, `plotting → Figure`, to workdir/NAME.png; without matplotlib it says what to install.

  Of several processes the first draws. TensorBoard, where it is among `metrics`, gets them too.
  """
  if jax.process_index():
    return
  try:
    from metasgd_jax import plotting
  except ImportError:
    print("no pictures: matplotlib is missing; pip install 'metasgd_jax[plots]' (or -e '.[plots]' from a clone)")
    return
  for name, draw in pictures.items():
    figure = draw(plotting)
    with files.atomic(workdir / f'{name}.png') as file:
      figure.savefig(file, format='png', dpi=110)
    for writer in metrics:
      if isinstance(writer, writers.TensorBoardWriter):
        writer.figure(name, figure)
  print('pictures: ' + ', '.join(str(workdir / f'{name}.png') for name in pictures))
