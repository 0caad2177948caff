"""Few-shot tasks on glyphs: an unlimited number of characters, drawn on the device from random strokes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from metasgd_jax.tasks.few_shot import check_episode, split_labels
from metasgd_jax.types import Batch, Episode, TaskDistribution, check_count, equal_partial

_CURVE_POINTS = 12  # Number of points on a stroke, joined by straight lines. More points look the same at 28 pixels.


@dataclasses.dataclass(frozen=True)
class GlyphConfig:
  """Parameters of random characters and of their random drawings. Lengths are in units of the image's width.

  The default values were chosen by eye: two drawings of a character look as if two people had written it.

  Attributes:
    size: Height and width of the image, in pixels.
    strokes: Number of strokes in a character. Each stroke is a cubic Bézier curve.
    margin: Least distance of a character's control points from the edge of the image.
    jitter: Standard deviation of the shift of each control point in a drawing.
    turn: Standard deviation of the rotation and of the shear of a drawing, in radians.
    stretch: Standard deviation of the logarithm of the scale of a drawing, in each direction.
    shift: Standard deviation of the position of a drawing.
    pen: Least and greatest half-width of the pen.

  Example:
    >>> tasks = ms.tasks.glyphs(ms.tasks.GlyphConfig(size=16, strokes=2), way=5, shot=1, query=1)
    >>> tasks.sample(jax.random.key(0)).shape
    (5, 2, 4, 2)
  """

  size: int = 28
  strokes: int = 3
  margin: float = 0.12
  jitter: float = 0.03
  turn: float = 0.12
  stretch: float = 0.1
  shift: float = 0.03
  pen: tuple[float, float] = (0.022, 0.038)

  def __post_init__(self):
    check_count('size', self.size)
    check_count('strokes', self.strokes)
    if not 0 < self.pen[0] <= self.pen[1]:
      raise ValueError(f'`pen` must be a range (low, high) with 0 < low <= high, got {self.pen}')


def glyphs(config: GlyphConfig = GlyphConfig(), *, way: int, shot: int, query: int) -> TaskDistribution:
  """Returns the distribution of N-way K-shot tasks on random characters.

  A task consists of the control points of N characters, `[N, strokes, 4, 2]`. Every task has new characters. An episode
  has the form of an episode of `few_shot`: the support has images x `[N·K, size, size, 1]`, float32 from 0 to 1, and
  labels y `[N·K]`, in shuffled order. Each item is a separate drawing.

  Args:
    config: Variation of characters and drawings.
    way: Number of characters in a task, N.
    shot: Number of support drawings per character, K.
    query: Number of query drawings per character.

  Raises:
    ValueError: if `way` is below 2, or if `shot` or `query` is below 1.

  Example:
    >>> tasks = ms.tasks.glyphs(way=5, shot=2, query=3)
    >>> episode = jax.jit(tasks.episode)(tasks.sample(jax.random.key(0)), jax.random.key(1))
    >>> episode.support.x.shape, episode.query.x.shape
    ((10, 28, 28, 1), (15, 28, 28, 1))
  """
  check_episode(way, shot, query)
  sample = equal_partial(_sample_characters, config=config, way=way)
  return TaskDistribution(sample, equal_partial(_episode, config=config, way=way, shot=shot, query=query))


def render(points: jax.Array, pen: jax.Array, size: int) -> jax.Array:
  """Returns the image of strokes, `[size, size]`: 1 under the pen, falling to 0 over one pixel at the pen's edge.

  Args:
    points: Control points of the Bézier curves, `[strokes, 4, 2]`, as (x, y) with (0, 0) in the upper left corner.
    pen: Half-width of the pen, `[]`.
    size: Height and width of the image, in pixels.
  """
  t = jnp.linspace(0.0, 1.0, _CURVE_POINTS)[:, None]
  bernstein = jnp.concatenate([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3], axis=1)
  curve = jnp.einsum('pc,scd->spd', bernstein, points)
  start, along = curve[:, :-1].reshape(-1, 2), jnp.diff(curve, axis=1).reshape(-1, 2)
  centres = (jnp.arange(size, dtype=points.dtype) + 0.5) / size
  # Distances from each pixel to each straight piece. The coordinates x and y are computed in separate arrays, because
  # one array [size, size, pieces, 2] would be written to memory.
  (start_x, start_y), (along_x, along_y) = start.T[:, None, None], along.T[:, None, None]
  px, py = centres[None, :, None] - start_x, centres[:, None, None] - start_y
  length2 = jnp.maximum(along_x**2 + along_y**2, 1e-12)
  part = jnp.clip((px * along_x + py * along_y) / length2, 0.0, 1.0)
  distance2 = (px - part * along_x) ** 2 + (py - part * along_y) ** 2
  distance = jnp.sqrt(jnp.min(distance2, axis=-1))
  return jnp.clip((pen - distance) * size + 0.5, 0.0, 1.0)


def _sample_characters(key, *, config, way):
  return jax.random.uniform(key, (way, config.strokes, 4, 2), jnp.float32, config.margin, 1.0 - config.margin)


def _draw(points, key, config):
  """Returns one drawing of a character, `[size, size, 1]`, in a random handwriting; consumes key."""
  jitter_key, hand_key, pen_key = jax.random.split(key, 3)
  turn, shear, stretch_x, stretch_y, shift_x, shift_y = jax.random.normal(hand_key, (6,))
  points = points + config.jitter * jax.random.normal(jitter_key, points.shape)
  cos, sin = jnp.cos(config.turn * turn), jnp.sin(config.turn * turn)
  hand = jnp.array([[cos, -sin], [sin, cos]]) @ jnp.array([[1.0, config.turn * shear], [0.0, 1.0]])
  hand = hand * jnp.exp(config.stretch * jnp.array([[stretch_x, stretch_y]]))
  centre = 0.5 + config.shift * jnp.array([shift_x, shift_y])
  points = (points - 0.5) @ hand.T + centre.reshape(1, 1, 2)
  pen = jax.random.uniform(pen_key, (), jnp.float32, *config.pen)
  return render(points, pen, config.size)[..., None]


def _episode(task, key, *, config, way, shot, query) -> Episode:
  order_key, *draw_keys = jax.random.split(key, 3)
  batches = []
  for (labels, _), draw_key in zip(split_labels(order_key, way, shot, query), draw_keys, strict=True):
    draw = jax.vmap(functools.partial(_draw, config=config))
    x = draw(task[labels], jax.random.split(draw_key, labels.shape[0]))
    batches.append(Batch(x, labels.astype(jnp.int32)))
  return Episode(*batches)
