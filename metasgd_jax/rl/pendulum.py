"""Swing-up of a pendulum whose gravity, mass and length vary by task."""

import dataclasses
import math
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from metasgd_jax.rl.types import Environment
from metasgd_jax.types import check_count, equal_by_arguments

Range = tuple[float, float]

SECONDS = 0.05
"""Duration of a step in seconds. This and the next two constants are those of Gymnasium's Pendulum-v1."""
MAX_TORQUE = 2.0
"""Largest torque in N m."""
MAX_VELOCITY = 8.0
"""Largest angular velocity in rad/s."""


@dataclasses.dataclass(frozen=True)
class PendulumConfig:
  """Ranges (low, high) from which the constants of a task are drawn uniformly. If low == high, a constant is fixed.

  The default ranges were chosen for this library and are in no paper. They are centred on the constants of Gymnasium's
  Pendulum-v1: gravity 10, mass 1 and length 1.

  Attributes:
    gravity: Range of the gravity in m/s².
    mass: Range of the mass in kg.
    length: Range of the length in m.

  Raises:
    ValueError: if a range is not finite or has low > high, or if `mass` or `length` has low <= 0.

  Example:
    >>> environment = ms.rl.pendulum(ms.rl.PendulumConfig())
    >>> len(environment.sample(jax.random.key(0)))
    3
  """

  gravity: Range = (8.0, 12.0)
  mass: Range = (0.8, 1.2)
  length: Range = (0.8, 1.2)

  def __post_init__(self):
    for field in dataclasses.fields(self):
      low, high = getattr(self, field.name)
      if not -math.inf < low <= high < math.inf:
        raise ValueError(f'the range of {field.name} must be finite and have low <= high, got ({low}, {high})')
      if field.name != 'gravity' and low <= 0:
        raise ValueError(f'the range of {field.name} must have only values above 0, got ({low}, {high})')


VARIED = PendulumConfig()
"""Ranges in which each constant varies by up to a fifth in both directions."""

GYMNASIUM = PendulumConfig((10.0, 10.0), (1.0, 1.0), (1.0, 1.0))
"""The constants of Pendulum-v1 itself: every task is the same."""


class Pendulum(NamedTuple):
  """A task: the gravity in m/s², and the mass in kg and length in m of a uniform rod. All are scalars `[]`.

  Example:
    >>> moon = ms.rl.Pendulum(gravity=jnp.array(1.6), mass=jnp.array(1.0), length=jnp.array(1.0))
    >>> environment = ms.rl.pendulum()
    >>> state = environment.reset(moon, jax.random.key(0))
    >>> state, reward, ended = environment.step(moon, state, jnp.array([0.5]), jax.random.key(1))
    >>> environment.observe(moon, state).shape, bool(ended)
    ((3,), False)
  """

  gravity: chex.Array
  mass: chex.Array
  length: chex.Array


class Swing(NamedTuple):
  """The state: the angle from upright in rad, not wrapped, and the angular velocity in rad/s, both scalars `[]`."""

  angle: chex.Array
  velocity: chex.Array


@equal_by_arguments
def pendulum(config: PendulumConfig = VARIED, *, horizon: int = 200) -> Environment:
  """Builds the pendulum environment. Its equations are those of Gymnasium's Pendulum-v1.

  Let θ be the angle, ω the angular velocity, u = 2 clip(a, −1, 1) N m the torque of the action a `[1]`, and Δ = 0.05 s.
  A step is ω′ = clip(ω + (3g / (2l) · sin θ + 3u / (ml²)) Δ, −8, 8) and θ′ = θ + ω′ Δ, with gravity g, mass m and
  length l. The reward is −(θ² + 0.1 ω² + 0.001 u²) of the state before the step, with θ wrapped to [−π, π). A
  trajectory starts from θ ~ U[−π, π] and ω ~ U[−1, 1], which `reset` draws; `reset` consumes its key. The observation
  `[3]` is (cos θ, sin θ, ω). Every trajectory has H steps.

  Args:
    config: Ranges of the constants of a task.
    horizon: Number of steps H. Pendulum-v1 has 200 steps, which are 10 s.

  Raises:
    ValueError: if `horizon` is not an integer of at least 1.

  Example:
    >>> environment = ms.rl.pendulum()
    >>> environment.observation_size, environment.action_size
    (3, 1)
  """
  check_count('horizon', horizon)

  def sample(key) -> Pendulum:
    low, high = (jnp.asarray([r[i] for r in dataclasses.astuple(config)]) for i in (0, 1))
    drawn = jax.random.uniform(key, (3,), low.dtype, low, high)
    return Pendulum(drawn[0], drawn[1], drawn[2])

  def reset(task: Pendulum, key) -> Swing:
    high = jnp.asarray([math.pi, 1.0], jnp.result_type(*task))
    drawn = jax.random.uniform(key, (2,), high.dtype, -high, high)
    return Swing(drawn[0], drawn[1])

  def observe(task: Pendulum, state: Swing):
    del task
    return jnp.stack([jnp.cos(state.angle), jnp.sin(state.angle), state.velocity])

  def step(task: Pendulum, state: Swing, action, key):
    del key
    angle, velocity = state
    torque = MAX_TORQUE * jnp.clip(action[0], -1, 1).astype(velocity.dtype)
    wrapped = (angle + math.pi) % (2 * math.pi) - math.pi
    reward = -(wrapped**2 + 0.1 * velocity**2 + 0.001 * torque**2)
    acceleration = 3 * task.gravity / (2 * task.length) * jnp.sin(angle) + 3 * torque / (task.mass * task.length**2)
    velocity = jnp.clip(velocity + acceleration * SECONDS, -MAX_VELOCITY, MAX_VELOCITY)
    return Swing(angle + velocity * SECONDS, velocity), reward, jnp.zeros((), bool)

  return Environment(sample, reset, observe, step, 3, 1, int(horizon))
