"""Glyphs: few-shot tasks on characters that never run out, drawn on the device from random strokes."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from metasgd_jax.tasks.few_shot import check_episode, split_labels
from metasgd_jax.types import Batch, Episode, TaskDistribution

_CURVE_POINTS = 12  # Straight pieces of a stroke, less one; at 28 pixels more cannot be told apart.


@dataclasses.dataclass(frozen=True)
class GlyphConfig:
  """How characters and drawings of them vary. Lengths are in widths of the image.

  Chosen by eye, so that two drawings of a character look like two hands writing it.

  Attributes:
    size: height and width of the image, in pixels.
    strokes: in a character; each a cubic Bézier curve.
    margin: from the edge to where control points may lie.
    jitter: standard deviation of each control point's shift in a drawing.
    turn: standard deviation of a drawing's rotation and shear, in radians.
    stretch: standard deviation of the logarithm of a drawing's scale, in each direction.
    shift: standard deviation of a drawing's place.
    pen: least and greatest half-width of the pen.

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
    for name in ('size', 'strokes'):
      if getattr(self, name) < 1:
        raise ValueError(f'{name} must be at least 1, got {getattr(self, name)}')
    if not 0 < self.pen[0] <= self.pen[1]:
      raise ValueError(f'pen must be a range 0 < low <= high, got {self.pen}')


def glyphs(config: GlyphConfig = GlyphConfig(), *, way: int, shot: int, query: int) -> TaskDistribution:
  """Builds the distribution; a task is its N characters' control points `[N, strokes, 4, 2]`.

  Every task has new characters. An episode is as in `few_shot`: x `[N·K, size, size, 1]` float32 in 0 to 1, labels
  `[N·K]`, shuffled, each drawing made once.

  Args:
    config: how characters and drawings vary.
    way: N.
    shot: K, support drawings of a character.
    query: query drawings of a character.

  Raises:
    ValueError: way below 2, shot or query below 1.

  Example:
    >>> tasks = ms.tasks.glyphs(way=5, shot=2, query=3)
    >>> episode = jax.jit(tasks.episode)(tasks.sample(jax.random.key(0)), jax.random.key(1))
    >>> episode.support.x.shape, episode.query.x.shape
    ((10, 28, 28, 1), (15, 28, 28, 1))
  """
  check_episode(way, shot, query)
  sample = functools.partial(_sample_characters, config=config, way=way)
  episode = functools.partial(_episode, config=config, way=way, shot=shot, query=query)
  return TaskDistribution(Partial(sample), Partial(episode))


def render(points: chex.Array, pen: chex.Array, size: int) -> chex.Array:
  """Returns the image `[size, size]` of strokes: 1 under the pen, falling to 0 over one pixel at its edge.

  Args:
    points: control points of the Bézier curves, `[strokes, 4, 2]` as (x, y) with (0, 0) the upper left.
    pen: the pen's half-width, `[]`.
    size: in pixels.
  """
  chex.assert_shape(points, (None, 4, 2))
  t = jnp.linspace(0.0, 1.0, _CURVE_POINTS)[:, None]
  bernstein = jnp.concatenate([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3], axis=1)
  curve = jnp.einsum('pc,scd->spd', bernstein, points)
  start, along = curve[:, :-1].reshape(-1, 2), jnp.diff(curve, axis=1).reshape(-1, 2)
  centres = (jnp.arange(size) + 0.5) / size
  # From each pixel to each straight piece; x and y apart, since [size, size, pieces, 2] would be written out whole.
  (start_x, start_y), (along_x, along_y) = start.T[:, None, None], along.T[:, None, None]
  px, py = centres[None, :, None] - start_x, centres[:, None, None] - start_y
  length2 = jnp.maximum(along_x**2 + along_y**2, 1e-12)
  part = jnp.clip((px * along_x + py * along_y) / length2, 0.0, 1.0)
  distance2 = (px - part * along_x) ** 2 + (py - part * along_y) ** 2
  distance = jnp.sqrt(jnp.min(distance2, axis=-1))
  return jnp.clip((pen - distance) * size + 0.5, 0.0, 1.0)


def _sample_characters(key, *, config, way):
  low, high = config.margin, 1.0 - config.margin
  return jax.random.uniform(key, (way, config.strokes, 4, 2), jnp.float32, low, high)


def _draw(points, key, config):
  """One drawing `[size, size, 1]` of a character, by a hand of its own; consumes key."""
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
    draw = functools.partial(_draw, config=config)
    x = jax.vmap(draw)(task[labels], jax.random.split(draw_key, labels.shape[0]))
    batches.append(Batch(x, labels.astype(jnp.int32)))
  return Episode(*batches)
