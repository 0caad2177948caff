"""Sine curves: y = A sin(ωx + b), the regression tasks."""

import dataclasses
import math
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from metasgd_jax.types import Batch, Episode, TaskDistribution

Range = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class SinusoidConfig:
  """The ranges that curves and inputs are drawn from, all uniformly; (low, high) each.

  Attributes:
    amplitude: of A.
    frequency: of ω, in radians per unit of x.
    phase: of b, in radians.
    x: of the inputs.

  Example:
    >>> ms.tasks.SinusoidConfig(amplitude=(1.0, 1.0)).frequency
    (0.8, 1.2)
  """

  amplitude: Range = (0.1, 5.0)
  frequency: Range = (0.8, 1.2)
  phase: Range = (0.0, math.pi)
  x: Range = (-5.0, 5.0)

  def __post_init__(self):
    for field in dataclasses.fields(self):
      low, high = getattr(self, field.name)
      if not low <= high:
        raise ValueError(f'{field.name} must be a range low <= high, got ({low}, {high})')


META_SGD_SINUSOIDS = SinusoidConfig()
"""Li et al. 2017, section 4.1. x's range is the paper's; the others are what its table fits (ω = 1 does not)."""

MAML_SINUSOIDS = SinusoidConfig(frequency=(1.0, 1.0))
"""Finn et al. 2017, section 5.1: ω = 1. Errors are about half of `META_SGD_SINUSOIDS`'s."""


class Sinusoid(NamedTuple):
  """A task: one curve, as three scalars `[]`.

  Attributes:
    amplitude: A.
    frequency: ω, in radians per unit of x.
    phase: b, in radians.

  Example:
    >>> print(ms.tasks.Sinusoid(2.0, 1.0, 0.0)(jnp.array([0.0, jnp.pi / 2])))
    [0. 2.]
  """

  amplitude: chex.Array
  frequency: chex.Array
  phase: chex.Array

  def __call__(self, x: chex.Array) -> chex.Array:
    """Returns A sin(ωx + b)."""
    return self.amplitude * jnp.sin(self.frequency * x + self.phase)


def sinusoid(config: SinusoidConfig = META_SGD_SINUSOIDS, *, shot: int = 5, query: int = 10) -> TaskDistribution:
  """Builds the distribution; a task is a `Sinusoid`, its episode has x and y `[shot, 1]` and `[query, 1]`.

  Args:
    config: the ranges.
    shot: support points, K.
    query: query points; the paper takes 10 in training and 100 in testing.

  Raises:
    ValueError: shot or query below 1.

  Example:
    >>> tasks = ms.tasks.sinusoid(shot=5, query=10)
    >>> curve = tasks.sample(jax.random.key(0))
    >>> episode = tasks.episode(curve, jax.random.key(1))
    >>> episode.support.x.shape, episode.query.y.shape
    ((5, 1), (10, 1))
  """
  for name, value in (('shot', shot), ('query', query)):
    if value < 1:
      raise ValueError(f'{name} must be at least 1, got {value}')
  curve = [config.amplitude, config.frequency, config.phase]
  low = jnp.asarray([r[0] for r in curve], jnp.float32)
  high = jnp.asarray([r[1] for r in curve], jnp.float32)

  def sample(key) -> Sinusoid:
    drawn = jax.random.uniform(key, (3,), jnp.float32, low, high)
    return Sinusoid(drawn[0], drawn[1], drawn[2])

  def episode(task: Sinusoid, key) -> Episode:
    x = jax.random.uniform(key, (shot + query, 1), jnp.float32, *config.x)
    y = task(x)
    return Episode(Batch(x[:shot], y[:shot]), Batch(x[shot:], y[shot:]))

  return TaskDistribution(sample, episode)
