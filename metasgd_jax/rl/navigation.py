"""2D navigation: a point in a square walks to a goal that it cannot see."""

import math
from typing import Literal, NamedTuple, get_args

import chex
import jax
import jax.numpy as jnp

from metasgd_jax.rl.types import Environment
from metasgd_jax.types import check_count

Start = Literal['fixed', 'varying']
"""Where a task's trajectories begin: at (0, 0), or at a point of the task's own. The goal is always of its own."""

HALF_WIDTH = 0.5
"""Starts and goals are uniform in [−0.5, 0.5]², the unit square (Li et al. 2017, section 4.3)."""


class Navigation(NamedTuple):
  """A task: where trajectories begin and where they should go, positions `[2]` each.

  Attributes:
    start: where trajectories begin.
    goal: where they should go.

  Example:
    >>> task = ms.rl.Navigation(start=jnp.zeros(2), goal=jnp.array([0.3, -0.4]))
    >>> print(jnp.linalg.norm(task.goal - task.start))
    0.5
  """

  start: chex.Array
  goal: chex.Array


def navigation(
  start: Start = 'fixed', *, horizon: int = 100, max_step: float = 0.1, tolerance: float = 0.01
) -> Environment:
  """Builds the environment of Li et al. 2017, section 4.3, and Finn et al. 2017, section 5.3.

  State and observation are the position p `[2]`, an action a `[2]` is a velocity: p′ = p + max_step · clip(a, −1, 1).
  The reward is −‖p′ − goal‖, the distance to the goal after the step. The task ends a trajectory whose p′ is nearer to
  the goal than `tolerance` in both coordinates. Positions have no bounds. Dynamics and starts are deterministic: no
  key is used but by `sample`.

  That actions in [−1, 1] are scaled, the end, and the constants are MAML's released code's.

  Args:
    start: the task set.
    horizon: H, steps.
    max_step: the largest move along a coordinate in one step, in the square's units.
    tolerance: in the same units.

  Raises:
    ValueError: an unknown start, a horizon that is no integer of at least 1, or a length that is not above 0.

  Example:
    >>> environment = ms.rl.navigation('fixed', horizon=20)
    >>> task = environment.sample(jax.random.key(0))
    >>> state = environment.reset(task, jax.random.key(1))
    >>> state, reward, ended = environment.step(task, state, jnp.array([1.0, 0.0]), jax.random.key(2))
    >>> print(state, bool(reward < 0))
    [0.1 0. ] True
  """
  if start not in get_args(Start):
    raise ValueError(f'start must be one of {get_args(Start)}, got {start!r}')
  check_horizon(horizon)
  for name, value in (('max_step', max_step), ('tolerance', tolerance)):
    if not 0 < value < math.inf:
      raise ValueError(f'{name} must be above 0 and finite, got {value}')

  def sample(key) -> Navigation:
    points = jax.random.uniform(key, (2, 2), minval=-HALF_WIDTH, maxval=HALF_WIDTH)
    return Navigation(jnp.zeros_like(points[0]) if start == 'fixed' else points[0], points[1])

  def reset(task: Navigation, key):
    del key
    return jnp.asarray(task.start)

  def observe(task: Navigation, position):
    del task
    return position

  def step(task: Navigation, position, action, key):
    del key
    position = position + max_step * jnp.clip(action, -1, 1).astype(position.dtype)
    gap = position - task.goal
    return position, -jnp.sqrt(jnp.sum(gap * gap)), jnp.all(jnp.abs(gap) < tolerance)

  return Environment(sample, reset, observe, step, 2, 2, int(horizon))


def check_horizon(horizon: int) -> None:
  """Raises ValueError unless horizon is an integer of at least 1."""
  check_count('horizon', horizon)
