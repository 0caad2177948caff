"""Figures that show many images: a few-shot task, or the answers of a classifier."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from metasgd_jax.plotting.colours import BLUE, GREEN, GREY, RED
from metasgd_jax.types import Batch


def episode_sheet(
  support: Batch, query: Batch, logits: np.ndarray, *, negative: bool = False, names: Sequence[str] | None = None
) -> Figure:
  """Draws one few-shot task, with one row per class, and the answers of a learner to the query.

  The support is on the left and the query is on the right. At most 10 query images of a class are drawn. Right answers
  are blue, and wrong answers are red.

  Args:
    support: Support, with images x `[N·K, H, W, D]` from 0 to 1 and labels y `[N·K]`.
    query: Query, with images x `[N·Q, H, W, D]` from 0 to 1 and labels y `[N·Q]`.
    logits: Logits of the query after adaptation, `[N·Q, N]`.
    negative: Whether light and dark are exchanged in grey images, so that light strokes on black are drawn as ink on
      paper. For photographs it must be False.
    names: Names of the N classes, such as those of their folders. By default the classes are shown by their labels.

  Example:
    >>> from metasgd_jax import plotting
    >>> support = query = ms.Batch(np.zeros((2, 28, 28, 1)), np.array([0, 1]))
    >>> plotting.episode_sheet(support, query, np.eye(2)).get_suptitle().splitlines()
    ['100% of 2 query images right', 'answers: blue if right, red if wrong']
  """
  way = logits.shape[-1]
  shot, queries = len(support.y) // way, min(len(query.y) // way, 10)
  answers = np.argmax(logits, -1)
  short = [_shortened(name, 10) for name in names] if names else [str(label) for label in range(way)]
  figure = Figure(figsize=(0.8 * (shot + queries) + 0.6, 0.95 * way + 0.6), layout='constrained')
  axes = figure.subplots(way, shot + queries, squeeze=False)
  for label in range(way):
    pictures: list[tuple[Any, str, str]] = [(x, 'support', 'black') for x in support.x[support.y == label]]
    chosen = np.flatnonzero(np.asarray(query.y) == label)[:queries]
    pictures += [(query.x[i], short[answers[i]], BLUE if answers[i] == label else 'red') for i in chosen]
    for ax, (image, text, colour) in zip(axes[label], pictures, strict=True):
      image = np.asarray(image)
      ax.imshow(image[..., 0] if image.shape[-1] == 1 else image, cmap='gray_r' if negative else 'gray', vmin=0, vmax=1)
      ax.set_title(text, fontsize=7, color=colour, pad=2, parse_math=False)
      ax.set_xticks([])
      ax.set_yticks([])
      for spine in ax.spines.values():
        spine.set_color(colour)
    axes[label, 0].set_ylabel(short[label] if names else f'class {label}', fontsize=8, parse_math=False)
  share = float(np.mean(answers == np.asarray(query.y)))
  title = f'{share:.0%} of {len(query.y)} query images right\nanswers: blue if right, red if wrong'
  figure.suptitle(title, fontsize=9)
  return figure


def prediction_sheet(
  classes: Sequence[str],
  support: Sequence[np.ndarray],
  query: np.ndarray,
  probabilities: np.ndarray,
  names: Sequence[str],
  truth: Sequence[str | None] | None = None,
  sure: Sequence[bool] | None = None,
) -> Figure:
  """Draws the support of a classifier, one row per class, and below it the query with the classifier's answers.

  Each answer is shown with its probability. At most 10 images of a class and 40 images of the query are drawn. If
  the query has more images, those drawn are the least certain ones of each answer, in the order of the query. The
  headings give the total numbers of images.

  Args:
    classes: Names of the N classes.
    support: Support images of each class, `[n, H, W, D]` from 0 to 1.
    query: Query images, `[Q, H, W, D]` from 0 to 1.
    probabilities: Probabilities of the classes for each query image, `[Q, N]`.
    names: Names of the Q query images.
    truth: Names of the true classes of the Q query images, each `None` if the class is unknown. If the class is known,
      a right answer is green and a wrong answer is red. By default all true classes are unknown.
    sure: Whether each of the Q answers is sure. The others are shown in grey as 'unsure', with the probability of the
      best class. By default all answers are sure.

  Example:
    >>> from metasgd_jax import plotting
    >>> support = [np.zeros((1, 28, 28, 1)), np.ones((1, 28, 28, 1))]  # One picture of each class.
    >>> query, probabilities = np.zeros((3, 28, 28, 1)), np.array([[0.9, 0.1], [0.8, 0.2], [0.4, 0.6]])
    >>> names = ['1.png', '2.png', '3.png']
    >>> len(plotting.prediction_sheet(['dark', 'light'], support, query, probabilities, names).axes)
    5
  """
  columns, most = 10, 40
  best = probabilities.argmax(1)
  answers = best if sure is None else np.where(sure, best, len(classes))
  answer_names, certainty = [*classes, 'unsure'], probabilities.max(1)
  shown = _least_certain(certainty, answers, most)
  row, head, left, top, foot = 0.95, 0.5, 1.5, 0.15, 0.1  # Inches.
  answer_row = row + 0.36
  height = top + head + row * len(classes) + head + 0.1 + answer_row * -(-len(shown) // columns) + foot
  figure = Figure(figsize=(left + row * columns + 0.15, height))
  width = figure.get_figwidth()

  def text(x, y, words, **style):  # x and y are in inches from the upper left. Names may contain dollar signs.
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
    text(left - 0.12, y + 0.54, f'{len(images)} shown', fontsize=7, ha='right', va='center', color=GREY)
    for i, image in enumerate(images[:columns]):
      picture(left + row * i, y, image, GREY, 0.8)
    y += row
  y += 0.1
  more = f'{len(query)} pictures'
  if len(shown) < len(query):
    more = f'{len(shown)} of {len(query)} pictures, the least certain of each answer'
  text(0.15, y + 0.15, f'its answers: {more}', fontsize=11, va='center')
  colour_of = {}
  for i in shown:
    known = truth[i] if truth is not None else None
    right = GREEN if known == answer_names[answers[i]] else RED
    colour_of[i] = GREY if answers[i] == len(classes) else BLUE if known is None else right
  meanings = {GREEN: 'green: right', RED: 'red: wrong', GREY: 'grey: unsure', BLUE: 'blue: true class not known'}
  if (colours := set(colour_of.values())) != {BLUE}:
    legend = ', '.join(meaning for colour, meaning in meanings.items() if colour in colours)
    text(0.15, y + 0.36, legend, fontsize=9, va='center')
  y += head + 0.2
  for place, (i, colour) in enumerate(colour_of.items()):
    x, line = left + row * (place % columns), y + answer_row * (place // columns)
    words = f'{_shortened(answer_names[answers[i]], 8)} {certainty[i]:.0%}'
    text(x + 0.425, line - 0.08, words, fontsize=7.5, ha='center', va='center', color=colour)
    picture(x, line, query[i], colour, 1.6)
    name = names[i] if len(names[i]) <= 17 else '…' + names[i][-16:]
    text(x + 0.425, line + 0.95, name, fontsize=5.5, ha='center', va='center', color=GREY)
  return figure


def _displayed(image: np.ndarray) -> np.ndarray:
  """Returns an image `[H, W, D]` in a form that imshow accepts: grey `[H, W]`, or `[H, W, D]` with D 3 or 4."""
  return image if image.shape[-1] in (3, 4) else image.mean(-1)


def _least_certain(certainty: np.ndarray, answers: np.ndarray, most: int) -> list[int]:
  """Returns the indices of at most `most` images in order: the least certain images of each answer, in turns."""
  order = np.argsort(certainty, kind='stable')
  turns = itertools.zip_longest(*(order[answers[order] == answer] for answer in np.unique(answers)))
  return sorted([int(i) for turn in turns for i in turn if i is not None][:most])


def _shortened(name: str, most: int) -> str:
  """Returns a name of at most `most` characters. A longer name loses its middle."""
  return name if len(name) <= most else f'{name[: most // 2]}…{name[most // 2 + 1 - most :]}'
