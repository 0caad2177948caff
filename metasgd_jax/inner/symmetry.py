"""Tests whether the Hessian that JAX computes for a loss is symmetric, if the loss contains custom derivative rules.

A custom derivative rule may differ from the true derivative of its function. Gradient reversal, clipping inside a
network, straight-through estimators and surrogate gradients of spikes are examples. With such a rule the derivative of
the gradient is not symmetric.
"""

from collections.abc import Callable, Iterator

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, jaxpr_as_fun, subjaxprs

from metasgd_jax.types import PyTree

SCALES = (1.0, 30.0, 1e4)
"""Scales of the random inputs and cotangents with which a rule is tested. Some rules, such as clipping, are wrong only
for large values.
"""


def has_symmetric_hessian(loss: Callable[[PyTree], chex.Array], theta: PyTree) -> bool:
  """Returns whether every custom derivative rule in a loss is known to give the true derivative of its function.

  Each rule of `jax.custom_jvp` and `jax.custom_vjp` is compared with automatic differentiation of its function: the
  first and second derivatives are compared at random inputs. The rules of `jax.nn.relu` and of optax's losses pass. If
  a rule cannot be compared, the result is False.

  Outside of jit, each call compiles the comparison again. No result is cached, because `loss` may read other values
  that change between two calls. A cached True could then be wrong, and would give wrong gradients.

  Args:
    loss: Function `θ → scalar`.
    theta: Parameters, arrays or tracers. Only their shapes and dtypes are used.
  """
  jaxpr = jax.make_jaxpr(loss)(theta).jaxpr
  custom = (equation for equation in _equations(jaxpr) if equation.primitive.name.startswith('custom_'))
  return all(_is_derivative(jaxpr, equation) for equation in custom)


def _equations(jaxpr: Jaxpr) -> Iterator[JaxprEqn]:
  """Yields the equations of a jaxpr. Those of inner jaxprs, such as the body of a scan, are included."""
  yield from jaxpr.eqns
  for inner in subjaxprs(jaxpr):
    yield from _equations(inner)


def _is_derivative(jaxpr: Jaxpr, equation: JaxprEqn) -> bool:
  """Returns whether the custom rule of an equation is known to give the true first and second derivatives."""
  variables = list(dict.fromkeys(v for v in equation.invars if not isinstance(v, Literal)))
  alone = jaxpr.replace(constvars=(), invars=variables, outvars=equation.outvars, eqns=[equation])
  rule = jaxpr_as_fun(ClosedJaxpr(alone, ()))

  def function(*values):
    given = dict(zip(variables, values, strict=True))
    inputs = [v.val if isinstance(v, Literal) else given[v] for v in equation.invars]
    return jaxpr_as_fun(equation.params['call_jaxpr'])(*inputs)

  shapes = [variable.aval for variable in variables]
  try:
    traced, shape = jax.make_jaxpr(lambda: [_derivatives(f, shapes) for f in (rule, function)], return_shape=True)()
    names = {equation.primitive.name for equation in _equations(traced.jaxpr)}
    if traced.effects or 'while' in names or any('callback' in name for name in names):
      return False  # The loop might never end at random inputs, and a callback might be harmful.
    with jax.ensure_compile_time_eval(), jax.debug_nans(False), jax.debug_infs(False):
      leaves = [np.asarray(leaf) for leaf in jax.jit(jaxpr_as_fun(traced))()]  # Fails if a leaf depends on a tracer.
  except Exception:  # JAX raises errors of many types for a function that it cannot differentiate twice.
    return False
  found = jax.tree.unflatten(jax.tree.structure(shape), leaves)
  # If the function is constant at all test inputs, such as a spike, the comparison says nothing about its rule.
  if not any(np.any(leaf) for cotangents, _ in found[1] for leaf in cotangents):
    return False
  return all(map(_agree, *map(jax.tree.leaves, found)))


def _derivatives(function: Callable[..., list], shapes: list) -> list:
  """Returns the cotangents of a function's inputs, and the directional derivatives of the cotangents.

  The inputs are random. They are drawn once for each scale in `SCALES`.
  """
  smooth = [i for i, shape in enumerate(shapes) if jnp.issubdtype(shape.dtype, jnp.floating)]

  def of_smooth(*values):
    inputs = [jnp.zeros(shape.shape, shape.dtype) for shape in shapes]
    for i, value in zip(smooth, values, strict=True):
      inputs[i] = value
    return [out for out in function(*inputs) if jnp.issubdtype(out.dtype, jnp.floating)]

  def at(seed: int, scale: float):
    keys = iter(jax.random.split(jax.random.key(seed), 1000))

    def normal(shape):
      return scale * jax.random.normal(next(keys), shape.shape, shape.dtype)

    inputs, tangents = ([normal(shapes[i]) for i in smooth] for _ in range(2))
    outputs = jax.eval_shape(of_smooth, *inputs)
    cotangents = [normal(output) for output in outputs]
    return jax.jvp(lambda *values: jax.vjp(of_smooth, *values)[1](cotangents), inputs, tangents)

  return [at(seed, scale) for seed, scale in enumerate(SCALES)]


def _agree(by_rule: np.ndarray, by_function: np.ndarray) -> bool:
  """Returns whether the derivative from the custom rule equals the automatic derivative, up to rounding errors.

  Only the entries whose automatic derivative is finite are compared. If there are none, the result is False, unless the
  arrays are empty.
  """
  there = np.isfinite(by_function)
  tolerance = 10 * float(jnp.finfo(by_function.dtype).eps) ** 0.5
  ours, theirs = (np.asarray(a, np.float64)[there] for a in (by_rule, by_function))
  size = np.max(np.abs(theirs), initial=0.0)
  return bool(there.any() or not there.size) and np.allclose(ours, theirs, rtol=tolerance, atol=tolerance * size)
