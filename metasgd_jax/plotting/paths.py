"""Draws or animates paths of a point in the plane before and after adaptation, as in Figure 4 of Li et al. 2017."""

import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

from metasgd_jax.plotting.colours import BLUE, CORAL, GREY

REST = 9
"""Duration of the last frame of each update, in frames."""


class Walks(NamedTuple):
  """The paths of one learner's policy in one task.

  Attributes:
    name: Name of the learner.
    start: Position of the start, `[2]`.
    goal: Position of the goal, `[2]`.
    paths: Positions after 0, 1, …, k updates, `[k + 1, B, P, 2]`, for B paths of P positions. The last position of a
      shorter path is repeated.
    returns: Mean undiscounted returns after 0, 1, …, k updates, `[k + 1]`.

  Example:
    >>> from metasgd_jax import plotting
    >>> paths = np.zeros((2, 3, 6, 2))  # Before and after one update: 3 trajectories of 5 steps each.
    >>> plotting.Walks('Meta-SGD', start=np.zeros(2), goal=np.array([0.3, 0.4]), paths=paths, returns=np.zeros(2)).name
    'Meta-SGD'
  """

  name: str
  start: np.ndarray
  goal: np.ndarray
  paths: np.ndarray
  returns: np.ndarray


_STYLE: dict[str, dict[str, Any]] = {
  'start': dict(marker='o', color='black', markersize=6),
  'goal': dict(marker='*', color=GREY, markersize=13),
}


def navigation_paths(walks: Sequence[Sequence[Walks]]) -> Figure:
  """Draws paths before and after one update, with one row per learner and one column per task.

  Args:
    walks: Paths of each task, one `Walks` for each learner.

  Example:
    >>> from metasgd_jax import plotting
    >>> paths = np.zeros((2, 3, 6, 2))  # Before and after one update: 3 trajectories of 5 steps each.
    >>> walk = plotting.Walks('Meta-SGD', np.zeros(2), np.array([0.3, 0.4]), paths, returns=np.array([-40.0, -15.0]))
    >>> plotting.navigation_paths([[walk]]).axes[0].get_title()
    'Meta-SGD: -40.0 → -15.0'
  """
  rows, columns = len(walks[0]), len(walks)
  figure = Figure(figsize=(2.9 * columns, 3.1 * rows + 0.3), layout='constrained')
  axes = figure.subplots(rows, columns, squeeze=False)
  for column, learners in enumerate(walks):
    for row, walk in enumerate(learners):
      ax = axes[row, column]
      for path in walk.paths[0]:
        ax.plot(*path.T, color=CORAL, linewidth=0.6, alpha=0.5)
      for path in walk.paths[1]:
        ax.plot(*path.T, color=BLUE, linewidth=0.8, alpha=0.8)
      _mark(ax, walk)
      ax.set_title(f'{walk.name}: {walk.returns[0]:.1f} → {walk.returns[1]:.1f}', fontsize=9)
  handles = [
    Line2D([], [], color=CORAL, label='before'),
    Line2D([], [], color=BLUE, label='after one update'),
    *(Line2D([], [], linestyle='', label=name, **style) for name, style in _STYLE.items()),
  ]
  figure.legend(handles=handles, loc='outside lower center', ncols=4, frameon=False)
  return figure


def navigation_gif(
  walks: Sequence[Walks], *, steps: int | None = None, milliseconds: int = 60, dpi: float = 80
) -> bytes:
  """Returns the bytes of an animated GIF of one task, with one panel per learner.

  Points move along the paths of the policy before adaptation, then along the paths after each update. The paths of the
  previous policy stay in the background. At the end of each update the animation waits.

  Args:
    walks: Paths of each learner, all in the same task.
    steps: Number of steps of each path that are shown. By default all steps are shown.
    milliseconds: Duration of one frame, in milliseconds.
    dpi: Number of pixels per inch. A panel is 3.2 inches wide.

  Example:
    >>> from metasgd_jax import plotting
    >>> paths = np.zeros((2, 3, 6, 2))  # Before and after one update: 3 trajectories of 5 steps each.
    >>> walk = plotting.Walks('Meta-SGD', np.zeros(2), np.array([0.3, 0.4]), paths, returns=np.array([-40.0, -15.0]))
    >>> plotting.navigation_gif([walk], steps=2, dpi=30)[:6]
    b'GIF89a'
  """
  figure = Figure(figsize=(3.2 * len(walks), 3.6), dpi=dpi, layout='constrained')
  canvas = FigureCanvasAgg(figure)
  panels = []
  for ax, walk in zip(figure.subplots(1, len(walks), squeeze=False)[0], walks, strict=True):
    _mark(ax, walk)
    (earlier,) = ax.plot([], [], linewidth=0.5, alpha=0.25, color=CORAL)
    (lines,), (dots,) = ax.plot([], [], linewidth=0.7, alpha=0.6), ax.plot([], [], 'o', markersize=3)
    title = ax.set_title(_caption(walk, 0), fontsize=9)
    panels.append((ax, walk, earlier, lines, dots, title))
  canvas.draw()  # This computes the layout, for which the title counts only while it is not animated.
  for _, _, *artists in panels:
    for artist in artists:
      artist.set_animated(True)
  canvas.draw()
  background = canvas.copy_from_bbox(figure.bbox)  # Drawing the axes again would take most of the time of a frame.
  updates, _, positions, _ = walks[0].paths.shape
  shown = positions if steps is None else min(steps + 1, positions)
  frames, durations = [], []
  for update in range(updates):
    for moment in range(1, shown):
      canvas.restore_region(background)
      for ax, walk, earlier, lines, dots, title in panels:
        path = walk.paths[update, :, : moment + 1]
        lines.set_data(*_one_line(path))
        if update:
          earlier.set_data(*_one_line(walk.paths[update - 1, :, :shown]))
        dots.set_data(*path[:, -1].T)
        title.set_text(_caption(walk, update))
        for artist in (lines, dots):
          artist.set_color(BLUE if update else CORAL)
        for artist in (earlier, lines, dots, title):
          ax.draw_artist(artist)
      image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert('RGB')
      frames.append(image.quantize(64, dither=Image.Dither.NONE))
      durations.append(milliseconds * (1 if moment < shown - 1 else REST))
  file = io.BytesIO()
  frames[0].save(file, 'GIF', save_all=True, append_images=frames[1:], duration=durations, loop=0)
  return file.getvalue()


def _one_line(paths: np.ndarray) -> np.ndarray:
  """Returns paths `[n, P, 2]` as one line of matplotlib, `[2, n · (P + 1)]`, in which NaN separates the paths."""
  apart = np.full((len(paths), 1, 2), np.nan)
  return np.concatenate([paths, apart], 1).reshape(-1, 2).T


def _caption(walk: Walks, update: int) -> str:
  when = 'before' if update == 0 else f'after {update} update' + ('s' if update > 1 else '')
  return f'{walk.name}, {when}: {walk.returns[update]:.1f}'


def _mark(ax, walk: Walks) -> None:
  """Draws the start, the goal, and the square from which goals are sampled, and sets the limits of the axes."""
  ax.plot(*walk.goal, linestyle='', zorder=3, **_STYLE['goal'])
  ax.plot(*walk.start, linestyle='', zorder=3, **_STYLE['start'])
  ax.plot([-0.5, 0.5, 0.5, -0.5, -0.5], [-0.5, -0.5, 0.5, 0.5, -0.5], color=GREY, linewidth=0.5, linestyle=':')
  ax.set(xlim=(-0.8, 0.8), ylim=(-0.8, 0.8), aspect='equal', xticks=[-0.5, 0, 0.5], yticks=[-0.5, 0, 0.5])
  ax.tick_params(labelsize=7)
