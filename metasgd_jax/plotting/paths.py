"""Draws or animates paths of a point in the plane before and after adaptation, as in Figure 4 of Li et al. 2017."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.animation import FuncAnimation
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from metasgd_jax.plotting.colours import BLUE, GREY, ORANGE


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
        ax.plot(*path.T, color=ORANGE, linewidth=0.6, alpha=0.5)
      for path in walk.paths[1]:
        ax.plot(*path.T, color=BLUE, linewidth=0.8, alpha=0.8)
      _mark(ax, walk)
      ax.set_title(f'{walk.name}: {walk.returns[0]:.1f} → {walk.returns[1]:.1f}', fontsize=9)
  handles = [
    Line2D([], [], color=ORANGE, label='before'),
    Line2D([], [], color=BLUE, label='after one update'),
    *(Line2D([], [], linestyle='', label=name, **style) for name, style in _STYLE.items()),
  ]
  figure.legend(handles=handles, loc='outside lower center', ncols=4, frameon=False)
  return figure


def navigation_animation(walks: Sequence[Walks], *, steps: int | None = None, milliseconds: int = 60) -> FuncAnimation:
  """Animates one task: points move along the paths of the unadapted policy, then along the paths after each update.

  There is one panel per learner.

  Args:
    walks: Paths of each learner, all in the same task.
    steps: Number of steps of each path that are shown. By default all steps are shown.
    milliseconds: Duration of one frame, in milliseconds.

  Example:
    >>> import pathlib, tempfile
    >>> from metasgd_jax import plotting
    >>> paths = np.zeros((2, 3, 6, 2))  # Before and after one update: 3 trajectories of 5 steps each.
    >>> walk = plotting.Walks('Meta-SGD', np.zeros(2), np.array([0.3, 0.4]), paths, returns=np.array([-40.0, -15.0]))
    >>> with tempfile.TemporaryDirectory() as directory:
    ...   plotting.navigation_animation([walk], steps=2).save(f'{directory}/walk.gif', writer='pillow', dpi=30)
    ...   pathlib.Path(f'{directory}/walk.gif').is_file()
    True
  """
  figure = Figure(figsize=(3.2 * len(walks), 3.6), layout='constrained')
  axes = figure.subplots(1, len(walks), squeeze=False)[0]
  most = walks[0].paths.shape[2]
  shown = most if steps is None else min(steps + 1, most)
  rest = 8  # Number of frames that show the last position before the next update.
  lines, dots = [], []
  for ax, walk in zip(axes, walks, strict=True):
    lines.append([ax.plot([], [], color=BLUE, linewidth=0.7, alpha=0.6)[0] for _ in walk.paths[0]])
    dots.append(ax.plot([], [], 'o', color=BLUE, markersize=3)[0])
    _mark(ax, walk)

  def draw(frame: int):
    update, moment = divmod(frame, shown + rest)
    moment = min(moment, shown - 1)
    for ax, walk, those, points in zip(axes, walks, lines, dots, strict=True):
      colour = ORANGE if update == 0 else BLUE
      for line, path in zip(those, walk.paths[update], strict=True):
        line.set_data(*path[: moment + 1].T)
        line.set_color(colour)
      points.set_data(*walk.paths[update, :, moment].T)
      points.set_color(colour)
      when = 'before' if update == 0 else f'after {update} update' + ('s' if update > 1 else '')
      ax.set_title(f'{walk.name}, {when}: {walk.returns[update]:.1f}', fontsize=9)
    return []

  draw(0)
  figure.draw_without_rendering()
  figure.set_layout_engine('none')  # A new layout would take a quarter of the time of a frame.
  frames = len(walks[0].paths) * (shown + rest)
  return FuncAnimation(figure, draw, frames=frames, interval=milliseconds, blit=False)


def _mark(ax, walk: Walks) -> None:
  """Draws the start, the goal, and the square from which goals are sampled, and sets the limits of the axes."""
  ax.plot(*walk.goal, linestyle='', zorder=3, **_STYLE['goal'])
  ax.plot(*walk.start, linestyle='', zorder=3, **_STYLE['start'])
  ax.plot([-0.5, 0.5, 0.5, -0.5, -0.5], [-0.5, -0.5, 0.5, 0.5, -0.5], color=GREY, linewidth=0.5, linestyle=':')
  ax.set(xlim=(-0.8, 0.8), ylim=(-0.8, 0.8), aspect='equal', xticks=[-0.5, 0, 0.5], yticks=[-0.5, 0, 0.5])
  ax.tick_params(labelsize=7)
