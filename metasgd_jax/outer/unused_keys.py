"""Finds task distributions that do not use their random key, so that all their tasks are the same."""

import warnings
from typing import Any

import chex
import jax

from metasgd_jax.types import TaskDistribution


def warn_of_one_task(tasks: TaskDistribution, key: chex.PRNGKey) -> None:
  """Warns if `tasks.sample` does not use its key.

  The usual cause is a `sample` that draws with NumPy: JAX traces the function once, and its numbers become constants. A
  `sample` that returns no arrays is meant to have a single task, and is not reported.
  """
  jaxpr = jax.make_jaxpr(tasks.sample)(key).jaxpr
  if jaxpr.outvars and not uses_input(jaxpr):
    warnings.warn(
      '`sample` of the tasks does not use its key, so all tasks are the same; draw the task with jax.random and the '
      'key, because random numbers of NumPy become constants',
      stacklevel=3,
    )


def uses_input(jaxpr: Any) -> bool:
  """Returns whether a result of a jaxpr may depend on its inputs.

  The answer can be wrong in one direction only: an input that is passed to an inner function, such as a jitted one,
  counts as used by all results of that function.
  """
  depending = set(map(id, jaxpr.invars))
  for equation in jaxpr.eqns:
    if any(id(variable) in depending for variable in equation.invars):
      depending |= set(map(id, equation.outvars))
  return any(id(variable) in depending for variable in jaxpr.outvars)
