"""Pictures of meta-learning. The only place that imports matplotlib; each function returns a Figure."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from metasgd_jax.types import Batch, PyTree

_BLUE, _ORANGE, _GREY = '#2166ac', '#d6604d', '#777777'
_GREEN, _RED = '#1a7f37', '#c62828'


class Fit(NamedTuple):
  """One learner's fit of one curve.

  Attributes:
    name: of the learner.
    before: its prediction with θ, `[P]`, at the picture's P inputs.
    after: its prediction with θ′, `[P]`.
  """

  name: str
  before: np.ndarray
  after: np.ndarray


def adaptation_curves(
  x: np.ndarray, truths: Sequence[np.ndarray], supports: Sequence[Batch], fits: Sequence[Sequence[Fit]]
) -> Figure:
  """Draws Figure 3 of Li et al. 2017: a column a curve, a row a learner; truth, support, and fit before and after.

  Args:
    x: `[P]`, inputs.
    truths: for each column, `[P]`.
    supports: for each column, x and y `[K, 1]`.
    fits: for each column, a `Fit` for each row.
  """
  rows, columns = len(fits[0]), len(fits)
  figure = Figure(figsize=(3.6 * columns, 2.7 * rows), layout='constrained')
  axes = figure.subplots(rows, columns, sharex=True, sharey='col', squeeze=False)
  for column, (truth, support) in enumerate(zip(truths, supports, strict=True)):
    for row, fit in enumerate(fits[column]):
      ax = axes[row, column]
      error = float(np.mean((fit.after - truth) ** 2))
      ax.plot(x, truth, color=_GREY, linewidth=1, label='truth')
      ax.plot(x, fit.before, color=_ORANGE, linestyle=':', label='before')
      ax.plot(x, fit.after, color=_BLUE, linewidth=2, label='after')
      ax.plot(np.ravel(support.x), np.ravel(support.y), 'k^', markersize=6, label='support')
      ax.set_title(f'{fit.name}, MSE {error:.2f}', fontsize=10)
      if row == rows - 1:
        ax.set_xlabel('x')
      if column == 0:
        ax.set_ylabel('y')
  figure.legend(*axes[0, 0].get_legend_handles_labels(), loc='outside lower center', ncols=4, frameon=False)
  return figure


def alpha_histograms(alpha: PyTree) -> Figure:
  """Draws how the entries of α are distributed in each layer, and the share of them below zero.

  Args:
    alpha: of one run.
  """
  leaves = jax.tree_util.tree_leaves_with_path(alpha)
  columns = min(4, len(leaves))
  rows = -(-len(leaves) // columns)
  figure = Figure(figsize=(3.2 * columns, 2.2 * rows), layout='constrained')
  axes = figure.subplots(rows, columns, squeeze=False).ravel()
  for ax, (path, leaf) in zip(axes, leaves, strict=False):
    entries = np.ravel(np.asarray(leaf, np.float64))
    # A few entries in a thousand may lie far out; they would squeeze the others into one bar.
    low, high = np.quantile(entries, [0.002, 0.998])
    bins = np.linspace(min(low, 0.0), max(high, 0.0, low + 1e-9), 41)
    ax.hist(entries[entries < 0], bins, color=_ORANGE)
    ax.hist(entries[entries >= 0], bins, color=_BLUE)
    ax.axvline(0, color='black', linewidth=0.8)
    ax.set_title(
      f'{jax.tree_util.keystr(path, simple=True, separator="/")}: {np.mean(entries < 0):.0%} < 0', fontsize=9
    )
    ax.set_yticks([])
    ax.locator_params(axis='x', nbins=5)
    ax.tick_params(labelsize=8)
  for ax in axes[len(leaves) :]:
    ax.set_axis_off()
  total = np.concatenate([np.ravel(np.asarray(leaf)) for _, leaf in leaves])
  figure.suptitle(f'learned α: {np.mean(total < 0):.1%} of {total.size:,} entries are negative', fontsize=11)
  return figure


def learning_curves(curves: Mapping[str, tuple[np.ndarray, np.ndarray]], *, ylabel: str, log: bool = False) -> Figure:
  """Draws a quantity against meta-iterations: the mean over runs as a line, the runs' range as a band.

  Args:
    curves: `{label: (steps [n], values [n, R])}`.
    ylabel: the quantity, with its unit.
    log: whether its axis is logarithmic.
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
  ax.set_ylabel(ylabel)
  ax.grid(alpha=0.3)
  ax.legend(frameon=False)
  return figure


def episode_sheet(support: Batch, query: Batch, logits: np.ndarray) -> Figure:
  """Draws one few-shot task: a row a class, its support on the left, its query on the right, wrong answers in red.

  Args:
    support: x `[N·K, H, W, D]` in 0 to 1, y `[N·K]`.
    query: x `[N·Q, H, W, D]`, y `[N·Q]`.
    logits: `[N·Q, N]`, the answers after adaptation.
  """
  way = logits.shape[-1]
  shot, queries = len(support.y) // way, min(len(query.y) // way, 10)
  answers = np.argmax(logits, -1)
  figure = Figure(figsize=(0.8 * (shot + queries) + 0.6, 0.95 * way + 0.6), layout='constrained')
  axes = figure.subplots(way, shot + queries, squeeze=False)
  for label in range(way):
    pictures: list[tuple[Any, str, str]] = [(x, 'support', 'black') for x in support.x[support.y == label]]
    chosen = np.flatnonzero(np.asarray(query.y) == label)[:queries]
    pictures += [(query.x[i], f'{answers[i]}', _BLUE if answers[i] == label else 'red') for i in chosen]
    for ax, (image, text, colour) in zip(axes[label], pictures, strict=True):
      image = np.asarray(image)
      ax.imshow(image[..., 0] if image.shape[-1] == 1 else image, cmap='gray_r', vmin=0, vmax=1)
      ax.set_title(text, fontsize=7, color=colour, pad=2)
      ax.set_xticks([])
      ax.set_yticks([])
      for spine in ax.spines.values():
        spine.set_color(colour)
    axes[label, 0].set_ylabel(f'class {label}', fontsize=8)
  share = float(np.mean(answers == np.asarray(query.y)))
  figure.suptitle(f'{share:.0%} of {len(query.y)} query drawings right; each shows the answer given', fontsize=9)
  return figure


def prediction_sheet(
  classes: Sequence[str],
  support: Sequence[np.ndarray],
  query: np.ndarray,
  probabilities: np.ndarray,
  names: Sequence[str],
  truth: Sequence[str | None] | None = None,
) -> Figure:
  """Draws what a classifier was shown, a row a class, and below it what it answered, with the answer's probability.

  Up to 10 pictures of a class and 40 of the query are drawn; the headings say of how many.

  Args:
    classes: N names.
    support: of each class `[n, H, W, D]` in 0 to 1.
    query: `[Q, H, W, D]` in 0 to 1.
    probabilities: `[Q, N]`.
    names: of the query's pictures, Q.
    truth: their classes, None where unknown; answers are then green or red.
  """
  columns, most = 10, 40
  shown = min(len(query), most)
  row, head, left, top, foot = 0.95, 0.5, 1.5, 0.15, 0.1  # Inches.
  answer_row = row + 0.36
  height = top + head + row * len(classes) + head + answer_row * -(-shown // columns) + foot
  figure = Figure(figsize=(left + row * columns + 0.15, height))
  width = figure.get_figwidth()

  def text(x, y, words, **style):  # x and y in inches from the upper left; a name may hold dollar signs.
    figure.text(x / width, 1 - y / height, words, parse_math=False, **style)

  def picture(x, y, image, colour, thick):
    ax = figure.add_axes((x / width, 1 - (y + 0.85) / height, 0.85 / width, 0.85 / height))
    ax.imshow(_displayed(image), cmap='gray', vmin=0, vmax=1)
    ax.set_xticks([])
    ax.set_yticks([])
    for spine in ax.spines.values():
      spine.set(color=colour, linewidth=thick)

  y = top
  count = sum(map(len, support))
  text(0.15, y + 0.15, f'shown to it: {count} pictures of {len(classes)} classes', fontsize=11, va='center')
  y += head - 0.1
  for name, images in zip(classes, support, strict=True):
    text(left - 0.12, y + 0.36, _shortened(name, 16), fontsize=9, ha='right', va='center')
    text(left - 0.12, y + 0.54, f'{len(images)} shown', fontsize=7, ha='right', va='center', color=_GREY)
    for i, image in enumerate(images[:columns]):
      picture(left + row * i, y, image, _GREY, 0.8)
    y += row
  y += 0.1
  more = f'the first {shown} of {len(query)}' if shown < len(query) else f'{shown} pictures'
  text(0.15, y + 0.15, f'its answers: {more}', fontsize=11, va='center')
  if truth is not None and any(truth):
    legend = 'green: right, red: wrong, blue: not known which'
    text(left + row * columns, y + 0.15, legend, fontsize=8, ha='right', va='center', color=_GREY)
  y += head + 0.1
  for i in range(shown):
    best = int(np.argmax(probabilities[i]))
    known = truth[i] if truth is not None else None
    colour = _BLUE if known is None else _GREEN if known == classes[best] else _RED
    x, line = left + row * (i % columns), y + answer_row * (i // columns)
    words = f'{_shortened(classes[best], 8)} {probabilities[i, best]:.0%}'
    text(x + 0.425, line - 0.08, words, fontsize=7.5, ha='center', va='center', color=colour)
    picture(x, line, query[i], colour, 1.6)
    text(
      x + 0.425, line + 0.95, _shortened(names[i], 17, end=True), fontsize=5.5, ha='center', va='center', color=_GREY
    )
  return figure


def _displayed(image: np.ndarray) -> np.ndarray:
  """An image `[H, W, D]` as imshow takes it: grey, or red, green and blue."""
  return image if image.shape[-1] in (3, 4) else image.mean(-1)


def _shortened(name: str, most: int, end: bool = False) -> str:
  """A name, or the beginning or end of one that is too long."""
  if len(name) <= most:
    return name
  return '…' + name[1 - most :] if end else name[: most - 1] + '…'


class Accuracy(NamedTuple):
  """One learner's accuracy in a panel of `accuracies`, 0 to 1.

  Attributes:
    name: of the learner.
    mean: its accuracy.
    ci95: the interval's half-width.
    published: the paper's accuracy; `None` where it has none.
  """

  name: str
  mean: float
  ci95: float
  published: float | None


def accuracies(panels: Mapping[str, Sequence[Accuracy]]) -> Figure:
  """Draws a table of accuracies: a panel a setting, a line a learner, the best on top; the paper's as diamonds.

  Args:
    panels: `{setting: learners}`.
  """
  most = max(len(found) for found in panels.values())
  figure = Figure(figsize=(5.2 * len(panels), 0.3 * most + 1.4), layout='constrained')
  for ax, (setting, found) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
    found = sorted(found, key=lambda one: one.mean)
    places = np.arange(len(found))
    ax.errorbar(
      [100 * one.mean for one in found], places, xerr=[100 * one.ci95 for one in found],
      fmt='o', color=_BLUE, markersize=5, label='here, 95% interval',
    )  # fmt: skip
    published = [(100 * one.published, place) for one, place in zip(found, places, strict=True) if one.published]
    if published:
      ax.plot(*zip(*published, strict=True), 'D', mfc='none', mec=_ORANGE, label='the paper, 60,000 meta-iterations')
    ax.set_yticks(places, [one.name for one in found], fontsize=9)
    ax.set_ylim(-0.7, len(found) - 0.3)
    ax.set_title(setting, fontsize=10)
    ax.set_xlabel('accuracy, %')
    ax.grid(axis='x', alpha=0.3)
  labels = {label: handle for ax in figure.axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
  figure.legend(list(labels.values()), list(labels), loc='outside lower center', ncols=2, frameon=False)
  return figure


def instance_curve(curves: Mapping[str, np.ndarray]) -> Figure:
  """Draws the accuracy at the n-th item of a class in a sequence (Santoro et al. 2016, figure 2), 0 to 1.

  Args:
    curves: `{label: values [n]}`.
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
