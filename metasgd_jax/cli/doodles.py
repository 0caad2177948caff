"""Draws the pictures of `metasgd demo`: simple things, each time a little differently, as people draw them by hand."""

import numpy as np
from PIL import Image, ImageDraw

SIDE, FINER = 128, 3
"""Side of a picture in pixels, and how many times larger it is drawn before it is scaled down."""


def _arc(x, y, width, height, start=0.0, end=1.0):
  """Returns a part of an ellipse. `start` and `end` are in turns, clockwise from the right."""
  turn = 2 * np.pi * np.linspace(start, end, 60)
  return np.stack([x + width / 2 * np.cos(turn), y + height / 2 * np.sin(turn)], -1)


def _star():
  turn = 2 * np.pi * (np.arange(6) * 2 / 5 - 1 / 4)
  return [np.stack([0.5 + 0.42 * np.cos(turn), 0.52 + 0.42 * np.sin(turn)], -1)]


THINGS = {
  'cup': [
    [(0.2, 0.3), (0.25, 0.82), (0.6, 0.82), (0.65, 0.3)],
    _arc(0.425, 0.3, 0.45, 0.14),
    _arc(0.66, 0.52, 0.3, 0.34, -0.22, 0.24),
  ],
  'fish': [
    _arc(0.42, 0.5, 0.6, 0.36),
    [(0.7, 0.45), (0.92, 0.3), (0.9, 0.7), (0.7, 0.55)],
    _arc(0.26, 0.45, 0.05, 0.05),
  ],
  'house': [
    [(0.22, 0.45), (0.22, 0.85), (0.78, 0.85), (0.78, 0.45)],
    [(0.14, 0.5), (0.5, 0.15), (0.86, 0.5)],
    [(0.43, 0.85), (0.43, 0.62), (0.57, 0.62), (0.57, 0.85)],
  ],
  'star': _star(),
  'tree': [
    [(0.5, 0.08), (0.3, 0.4), (0.41, 0.38), (0.18, 0.72), (0.82, 0.72), (0.59, 0.38), (0.7, 0.4), (0.5, 0.08)],
    [(0.45, 0.72), (0.45, 0.92), (0.56, 0.92), (0.56, 0.72)],
  ],
}
"""Strokes of each thing: points (x, y) from the upper left, in units of the side."""


def doodle(name: str, rng: np.random.Generator) -> Image.Image:
  """Returns a drawing of a thing in `THINGS`, dark on light paper. Size, angle, wobble and pen differ each time."""
  angle, shear = rng.uniform(-0.2, 0.2, 2)
  turned = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) @ [[1, shear], [0, 1]]
  change = turned * rng.uniform(0.7, 1, 2)
  place = 0.5 + rng.uniform(-0.05, 0.05, 2)
  paper, ink, width = rng.integers(225, 256), rng.integers(10, 90), rng.uniform(0.025, 0.045)
  side = SIDE * FINER
  image = Image.new('L', (side, side), int(paper))
  pen = ImageDraw.Draw(image)
  for stroke in THINGS[name]:
    points = _wobbly(np.asarray(stroke, float), rng)
    line = [tuple(point) for point in ((points - 0.5) @ change.T + place) * side]
    pen.line(line, fill=int(ink), width=round(width * side), joint='curve')
  return image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def _wobbly(points: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """Returns 120 points along a line, which a few smooth waves move away from it: `[120, 2]`."""
  way = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(points, axis=0), axis=1))])
  along = np.linspace(0, way[-1], 120)
  line = np.stack([np.interp(along, way, points[:, axis]) for axis in (0, 1)], -1)
  waves = np.sin(2 * np.pi * (along[:, None, None] * np.array([0.5, 1, 2])[:, None] + rng.uniform(size=(3, 2))))
  return line + (waves * rng.normal(0, 0.014, (3, 2))).sum(1)
