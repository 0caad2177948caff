"""Figures of curves, histograms and accuracies."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, ScalarFormatter

from metasgd_jax.plotting.colours import BLUE, CORAL, GREY
from metasgd_jax.types import Batch, PyTree


class Fit(NamedTuple):
  """The fit of one learner to one curve.

  Attributes:
    name: Name of the learner.
    before: Prediction before adaptation, with θ, at the P inputs of the figure, `[P]`.
    after: Prediction after adaptation, with θ′, at the same inputs, `[P]`.

  Example:
    >>> from metasgd_jax import plotting
    >>> plotting.Fit('Meta-SGD', before=np.zeros(50), after=np.ones(50)).name
    'Meta-SGD'
  """

  name: str
  before: np.ndarray
  after: np.ndarray


def adaptation_curves(
  x: np.ndarray, truths: Sequence[np.ndarray], supports: Sequence[Batch], fits: Sequence[Sequence[Fit]]
) -> Figure:
  """Draws a figure like Figure 3 of Li et al. 2017, with one column per curve and one row per learner.

  Each panel shows the true curve, the support, and the fit before and after adaptation.

  Args:
    x: Inputs of all curves, `[P]`.
    truths: True values of the curve of each column, `[P]`.
    supports: Support of each column, with x and y `[K, 1]`.
    fits: Fits of each column, one `Fit` for each row.

  Example:
    >>> from metasgd_jax import plotting
    >>> x = np.linspace(-5, 5, 50)
    >>> fit = plotting.Fit('Meta-SGD', before=np.zeros(50), after=np.sin(x))
    >>> support = ms.Batch(np.zeros((5, 1)), np.zeros((5, 1)))
    >>> plotting.adaptation_curves(x, [np.sin(x)], [support], [[fit]]).axes[0].get_title()
    'Meta-SGD, MSE 0.00'
  """
  rows, columns = len(fits[0]), len(fits)
  figure = Figure(figsize=(3.6 * columns, 2.7 * rows), layout='constrained')
  axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
  for column, (truth, support) in enumerate(zip(truths, supports, strict=True)):
    for row, fit in enumerate(fits[column]):
      ax = axes[row, column]
      error = float(np.mean((fit.after - truth) ** 2))
      ax.plot(x, truth, color=GREY, linewidth=1, label='truth')
      ax.plot(x, fit.before, color=CORAL, linestyle=':', label='before')
      ax.plot(x, fit.after, color=BLUE, linewidth=2, label='after')
      ax.plot(np.ravel(support.x), np.ravel(support.y), 'k^', markersize=6, label='support')
      ax.set_title(f'{fit.name}, MSE {error:.2f}', fontsize=10)
      if row == rows - 1:
        ax.set_xlabel('x')
      if column == 0:
        ax.set_ylabel('y')
  figure.legend(*axes[0, 0].get_legend_handles_labels(), loc='outside lower center', ncols=4, frameon=False)
  return figure


def alpha_histograms(alpha: PyTree) -> Figure:
  """Draws a histogram of the entries of each leaf of α, with the share of negative entries.

  Args:
    alpha: Rates α of one run.

  Example:
    >>> from metasgd_jax import plotting
    >>> figure = plotting.alpha_histograms({'kernel': np.array([[0.1, -0.1], [0.2, 0.3]])})
    >>> figure.get_suptitle()
    'learned α: 25.0% of 4 entries are negative'
  """
  leaves = jax.tree_util.tree_leaves_with_path(alpha)
  columns = min(4, len(leaves))
  rows = -(-len(leaves) // columns)
  figure = Figure(figsize=(3.2 * columns, 2.2 * rows), layout='constrained')
  axes = figure.subplots(rows, columns, squeeze=False).ravel()
  for ax, (path, leaf) in zip(axes, leaves, strict=False):
    entries = np.ravel(np.asarray(leaf, np.float64))
    # A few entries in a thousand may be far from zero. In a range that includes them, all others would share one bar.
    low, high = np.quantile(entries, [0.002, 0.998] if entries.size > 1000 else [0, 1])
    bins = np.linspace(min(low, 0.0), max(high, 0.0, low + 1e-9), 41)
    ax.hist(entries[entries < 0], bins, color=CORAL)
    ax.hist(entries[entries >= 0], bins, color=BLUE)
    ax.axvline(0, color='black', linewidth=0.8)
    ax.set_title(
      f'{jax.tree_util.keystr(path, simple=True, separator="/")}: {np.mean(entries < 0):.0%} < 0', fontsize=9
    )
    ax.set_yticks([])
    ax.set_xlabel('rate', fontsize=8)
    ax.set_ylabel('number of entries', fontsize=8)
    ax.locator_params(axis='x', nbins=5)
    ax.tick_params(labelsize=8)
  for ax in axes[len(leaves) :]:
    ax.set_axis_off()
  total = np.concatenate([np.ravel(np.asarray(leaf)) for _, leaf in leaves])
  figure.suptitle(f'learned α: {np.mean(total < 0):.1%} of {total.size:,} entries are negative', fontsize=11)
  return figure


def learning_curves(curves: Mapping[str, tuple[np.ndarray, np.ndarray]], *, ylabel: str, log: bool = False) -> Figure:
  """Draws a quantity against meta-iterations. A line shows the mean over the runs, and a band shows their range.

  Args:
    curves: Curves by their labels, `{label: (steps [n], values [n, R])}`.
    ylabel: Label of the y-axis: the quantity with its unit.
    log: Whether the y-axis is logarithmic.

  Example:
    >>> from metasgd_jax import plotting
    >>> curve = np.array([1, 2, 3]), np.array([[3.0], [2.0], [1.5]])  # Steps [n], values [n, R].
    >>> plotting.learning_curves({'Meta-SGD': curve}, ylabel='error').axes[0].get_ylabel()
    'error'
  """
  figure = Figure(figsize=(7, 4), layout='constrained')
  ax = figure.subplots()
  for i, (label, (steps, values)) in enumerate(curves.items()):
    colour = f'C{i}'
    ax.plot(steps, values.mean(1), color=colour, label=label)
    ax.fill_between(steps, values.min(1), values.max(1), color=colour, alpha=0.25, linewidth=0)
  if log:
    ax.set_yscale('log')
    ax.yaxis.set_major_formatter(ScalarFormatter())
    ax.yaxis.set_minor_formatter(ScalarFormatter())
  ax.set_xlabel('meta-iterations')
  ax.xaxis.set_major_locator(MaxNLocator(integer=True))
  ax.set_ylabel(ylabel)
  ax.grid(alpha=0.3)
  ax.legend(frameon=False)
  return figure


class Accuracy(NamedTuple):
  """The accuracy of one learner in a panel of `accuracies`. All values are from 0 to 1.

  Attributes:
    name: Name of the learner.
    mean: Mean accuracy of the learner.
    ci95: Half-width of the 95% confidence interval.
    published: Accuracy that the paper reports, or `None` if the paper reports none.

  Example:
    >>> from metasgd_jax import plotting
    >>> plotting.Accuracy('Meta-SGD', mean=0.95, ci95=0.01, published=0.995).published
    0.995
  """

  name: str
  mean: float
  ci95: float
  published: float | None


def accuracies(panels: Mapping[str, Sequence[Accuracy]]) -> Figure:
  """Draws accuracies with their confidence intervals, with one panel per setting and one row per learner.

  The best learner is at the top of each panel. Diamonds show the accuracies that the paper reports.

  Args:
    panels: Accuracies of the learners in each setting, `{setting: learners}`.

  Example:
    >>> from metasgd_jax import plotting
    >>> found = [plotting.Accuracy('Meta-SGD', 0.95, 0.01, 0.995), plotting.Accuracy('Siamese', 0.8, 0.02, None)]
    >>> len(plotting.accuracies({'5-way 1-shot': found}).axes)
    1
  """
  most = max(len(found) for found in panels.values())
  figure = Figure(figsize=(5.2 * len(panels), 0.3 * most + 1.4), layout='constrained')
  for ax, (setting, found) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
    found = sorted(found, key=lambda one: one.mean)
    places = np.arange(len(found))
    means, spans = [100 * one.mean for one in found], [100 * one.ci95 for one in found]
    ax.errorbar(means, places, xerr=spans, fmt='o', color=BLUE, markersize=5, label='here, 95% interval')
    published = [(100 * one.published, place) for one, place in zip(found, places, strict=True) if one.published]
    if published:
      ax.plot(*zip(*published, strict=True), 'D', mfc='none', mec=CORAL, label='the paper, 60,000 meta-iterations')
    ax.set_yticks(places, [one.name for one in found], fontsize=9)
    ax.set_ylim(-0.7, len(found) - 0.3)
    ax.set_title(setting, fontsize=10)
    ax.set_xlabel('accuracy, %')
    ax.grid(axis='x', alpha=0.3)
  labels = {label: handle for ax in figure.axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
  figure.legend(list(labels.values()), list(labels), loc='outside lower center', ncols=2, frameon=False)
  return figure


def instance_curve(curves: Mapping[str, np.ndarray]) -> Figure:
  """Draws the accuracy at the first, second, … item of a class in a sequence (Santoro et al. 2016, Figure 2).

  Args:
    curves: Accuracies from 0 to 1, by the label of the curve, `{label: values [n]}`. The first of the n values is the
      accuracy at the first item of a class.

  Example:
    >>> from metasgd_jax import plotting
    >>> plotting.instance_curve({'MANN': np.array([0.3, 0.8, 0.9])}).axes[0].get_ylabel()
    'accuracy, %'
  """
  figure = Figure(figsize=(6, 3.6), layout='constrained')
  ax = figure.subplots()
  for label, values in curves.items():
    ax.plot(np.arange(1, len(values) + 1), 100 * np.asarray(values), 'o-', label=label)
  ax.set_xlabel('n-th item of its class in the sequence')
  ax.set_ylabel('accuracy, %')
  ax.set_ylim(0, 102)
  ax.grid(alpha=0.3)
  ax.legend(frameon=False)
  return figure
