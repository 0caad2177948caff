"""Regression tasks on sine curves y = A sin(ωx + b)."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metasgd_jax.types import Batch, Episode, TaskDistribution, check_count, equal_partial

Range = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class SinusoidConfig:
  """Ranges (low, high) from which curves and inputs are drawn, with uniform distributions.

  Attributes:
    amplitude: Range of the amplitude A.
    frequency: Range of the frequency ω, in radians per unit of x.
    phase: Range of the phase b, in radians.
    x: Range of the inputs x.

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
        raise ValueError(f'`{field.name}` must be a range (low, high) with low <= high, got ({low}, {high})')


META_SGD_SINUSOIDS = SinusoidConfig()
"""Ranges for the sine curves of Li et al. 2017, section 4.1.

The paper states the range of x, but not the other ranges. With these ranges, the results agree with the paper's table.
With ω = 1 they do not.
"""

MAML_SINUSOIDS = SinusoidConfig(frequency=(1.0, 1.0))
"""Ranges for the sine curves of Finn et al. 2017, section 5.1, with ω = 1.

Errors on these curves are about half of the errors on `META_SGD_SINUSOIDS`.
"""


class Sinusoid(NamedTuple):
  """A task: one sine curve, given by three scalars `[]`.

  Attributes:
    amplitude: Amplitude A.
    frequency: Frequency ω, in radians per unit of x.
    phase: Phase b, in radians.

  Example:
    >>> print(ms.tasks.Sinusoid(2.0, 1.0, 0.0)(jnp.array([0.0, jnp.pi / 2])))
    [0. 2.]
  """

  amplitude: jax.Array
  frequency: jax.Array
  phase: jax.Array

  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns A sin(ωx + b)."""
    return self.amplitude * jnp.sin(self.frequency * x + self.phase)


def sinusoid(config: SinusoidConfig = META_SGD_SINUSOIDS, *, shot: int = 5, query: int = 10) -> TaskDistribution:
  """Returns the distribution of tasks on sine curves. A task is a `Sinusoid`.

  In an episode, x and y are `[shot, 1]` in the support and `[query, 1]` in the query.

  Args:
    config: Ranges of curves and inputs.
    shot: Number of support points, K.
    query: Number of query points. The paper uses 10 in training and 100 in testing.

  Raises:
    ValueError: if `shot` or `query` is below 1.

  Example:
    >>> tasks = ms.tasks.sinusoid(shot=5, query=10)
    >>> curve = tasks.sample(jax.random.key(0))
    >>> episode = tasks.episode(curve, jax.random.key(1))
    >>> episode.support.x.shape, episode.query.y.shape
    ((5, 1), (10, 1))
  """
  check_count('shot', shot)
  check_count('query', query)
  episode = equal_partial(_episode, config=config, shot=shot, query=query)
  return TaskDistribution(equal_partial(_sample, config=config), episode)


def _sample(key, *, config) -> Sinusoid:
  low, high = np.asarray([config.amplitude, config.frequency, config.phase], np.float32).T
  drawn = jax.random.uniform(key, (3,), jnp.float32, low, high)
  return Sinusoid(drawn[0], drawn[1], drawn[2])


def _episode(task: Sinusoid, key, *, config, shot, query) -> Episode:
  x = jax.random.uniform(key, (shot + query, 1), jnp.float32, *config.x)
  y = task(x)
  return Episode(Batch(x[:shot], y[:shot]), Batch(x[shot:], y[shot:]))
