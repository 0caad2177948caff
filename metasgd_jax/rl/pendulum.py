"""Swing-up of a pendulum whose gravity, mass and length vary by task."""

import dataclasses
import math
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from metasgd_jax.rl.navigation import check_horizon
from metasgd_jax.rl.types import Environment

Range = tuple[float, float]

SECONDS = 0.05
"""A step's, as are the next two of Gymnasium's Pendulum-v1."""
MAX_TORQUE = 2.0
"""In N m."""
MAX_VELOCITY = 8.0
"""In rad/s."""


@dataclasses.dataclass(frozen=True)
class PendulumConfig:
  """The ranges that a task's constants are drawn from, uniformly; (low, high) each, and low == high holds one still.

  They are chosen here, around those of Gymnasium's Pendulum-v1, 10, 1 and 1; no paper has them.

  Attributes:
    gravity: in m/s².
    mass: in kg.
    length: in m.

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
        raise ValueError(f'{field.name} must be a finite range low <= high, got ({low}, {high})')
      if field.name != 'gravity' and low <= 0:
        raise ValueError(f'{field.name} must be above 0, got ({low}, {high})')


VARIED = PendulumConfig()
"""All three vary, by a fifth either way."""

GYMNASIUM = PendulumConfig((10.0, 10.0), (1.0, 1.0), (1.0, 1.0))
"""Pendulum-v1 itself: every task is the same."""


class Pendulum(NamedTuple):
  """A task: gravity in m/s², mass in kg and length in m of a uniform rod, scalars `[]`.

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
  """The state: the angle from upright in rad, unwrapped, and its velocity in rad/s, scalars `[]`."""

  angle: chex.Array
  velocity: chex.Array


def pendulum(config: PendulumConfig = VARIED, *, horizon: int = 200) -> Environment:
  """Builds the environment, whose equations are those of Gymnasium's Pendulum-v1.

  With θ the angle, ω the velocity, u = 2 clip(a, −1, 1) N m the torque of the action a `[1]` and Δ = 0.05 s:
  ω′ = clip(ω + (3g / 2l · sin θ + 3u / ml²) Δ, −8, 8), θ′ = θ + ω′ Δ. The reward is −(θ² + 0.1 ω² + 0.001 u²) of the
  state before the step, θ wrapped to [−π, π). A trajectory starts from θ ~ U[−π, π] and ω ~ U[−1, 1]; `reset` consumes
  its key for them. The observation `[3]` is (cos θ, sin θ, ω). Time alone ends a trajectory.

  Args:
    config: the ranges of the tasks.
    horizon: H, steps; Pendulum-v1's 200 are 10 s.

  Raises:
    ValueError: a horizon that is no integer of at least 1.

  Example:
    >>> environment = ms.rl.pendulum()
    >>> environment.observation_size, environment.action_size
    (3, 1)
  """
  check_horizon(horizon)

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
