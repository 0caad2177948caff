"""2D navigation: a point moves in the plane to a goal that it cannot observe."""

import math
from typing import Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp

from metasgd_jax.rl.types import Environment
from metasgd_jax.types import check_choice, check_count, equal_by_arguments

Start = Literal['fixed', 'varying']
"""Where the trajectories of a task begin: at (0, 0), or at a point that varies by task. The goal varies in any case."""

HALF_WIDTH = 0.5
"""Half the width of the unit square [−0.5, 0.5]². Starts and goals are uniform in it (Li et al. 2017, section 4.3)."""


class Navigation(NamedTuple):
  """A task: the start and the goal of its trajectories.

  Attributes:
    start: Position where trajectories begin, `[2]`.
    goal: Position that trajectories should reach, `[2]`.

  Example:
    >>> task = ms.rl.Navigation(start=jnp.zeros(2), goal=jnp.array([0.3, -0.4]))
    >>> print(jnp.linalg.norm(task.goal - task.start))
    0.5
  """

  start: chex.Array
  goal: chex.Array


@equal_by_arguments
def navigation(
  start: Start = 'fixed', *, horizon: int = 100, max_step: float = 0.1, tolerance: float = 0.01
) -> Environment:
  """Builds the 2D navigation environment of Li et al. 2017, section 4.3, and Finn et al. 2017, section 5.3.

  The state and the observation are the position p `[2]`. An action a `[2]` is a velocity:
  p′ = p + max_step · clip(a, −1, 1). The reward is −‖p′ − goal‖, the negative distance to the goal after the step. The
  task ends a trajectory when p′ is nearer to the goal than `tolerance` in both coordinates. Goals are drawn uniformly
  from the unit square [−0.5, 0.5]², but positions have no bounds. For a given task, dynamics and starts are
  deterministic: only `sample` uses its key.

  Three details are those of MAML's released code: the clipping and scaling of actions, the rule that ends a
  trajectory, and the default values of `horizon`, `max_step` and `tolerance`.

  Args:
    start: Whether the start is (0, 0) in every task or varies by task; see `Start`.
    horizon: Largest number of steps H of a trajectory.
    max_step: Largest move along one coordinate in one step, in the units of positions.
    tolerance: Distance to the goal, along each coordinate, below which a trajectory ends, in the units of positions.

  Raises:
    ValueError: if `start` is unknown, if `horizon` is not an integer of at least 1, or if `max_step` or `tolerance` is
      not positive and finite.

  Example:
    >>> environment = ms.rl.navigation('fixed', horizon=20)
    >>> task = environment.sample(jax.random.key(0))
    >>> state = environment.reset(task, jax.random.key(1))
    >>> state, reward, ended = environment.step(task, state, jnp.array([1.0, 0.0]), jax.random.key(2))
    >>> print(state, bool(reward < 0))
    [0.1 0. ] True
  """
  check_choice('start', start, Start)
  check_count('horizon', horizon)
  for name, value in (('max_step', max_step), ('tolerance', tolerance)):
    if not 0 < value < math.inf:
      raise ValueError(f'`{name}` must be above 0 and finite, got {value}')

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
