"""Tests whether the Hessian that JAX computes for a loss is symmetric, if the loss contains custom derivative rules.

A custom derivative rule may differ from the true derivative of its function. Gradient reversal, clipping inside a
network, straight-through estimators and surrogate gradients of spikes are examples. With such a rule the derivative of
the gradient is not symmetric.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, jaxpr_as_fun

from metasgd_jax.inner.branches import equations, evaluate, widened
from metasgd_jax.types import PyTree

SCALES = ((1e-6, 1), (1e-3, 1), (0.03, 1), (1, 1), (30, 30), (1e4, 1e4), (1e8, 1e8), (1, 1e-4), (1, 1e8))
"""Scales of the random inputs and cotangents with which a rule is tested. Some rules, such as clipping, are false only
for large or only for small values. In one more draw, each number has its own magnitude.
"""
_TOLERANCE = 1e-5
"""Largest relative difference of two equal derivatives. They are computed in float64, but some functions, such as
approximations of erf, are only accurate to float32.
"""
_NOISE = 1e-15
"""Rounding error of a derivative in float64, relative to the numbers that it is computed from."""
_FEW, _DRAWS_OF_FEW = 256, 6
"""If an array has fewer entries than `_FEW`, more random numbers are drawn, so that each branch is taken."""

_NUMBERS = np.random.default_rng(0).normal(size=4093)
_MIXED = np.sign(_NUMBERS) * 10 ** np.random.default_rng(1).uniform(-6, 8, _NUMBERS.shape)
_INTEGERS = np.stack(
  [np.random.default_rng(i).integers(*ends, 4093) for i, ends in enumerate([(0, 2), (0, 10), (-3, 4), (-999, 1000)])]
)
"""Random numbers that fill the inputs, again and again if they are large. Drawing each entry anew would be slow."""


def has_symmetric_hessian(loss: Callable[[PyTree], chex.Array], theta: PyTree) -> bool:
  """Returns whether every custom derivative rule in a loss is known to give the true derivative of its function.

  Each rule of `jax.custom_jvp` and `jax.custom_vjp` is compared with automatic differentiation of its function: the
  first and second derivatives are compared at random inputs. The rules of `jax.nn.relu` and of optax's losses pass. If
  a rule cannot be compared, the result is False. It is also False if a comparison in the rule or in its function, such
  as x > 6, has the same result at all random inputs.

  Outside of jit, each call compiles the comparison again. No result is cached, because `loss` may read other values
  that change between two calls. A cached True could then be wrong, and would give wrong gradients.

  Args:
    loss: Function `θ → scalar`.
    theta: Parameters, arrays or tracers. Only their shapes and dtypes are used.
  """
  jaxpr = jax.make_jaxpr(loss)(theta).jaxpr
  custom = (equation for equation in equations(jaxpr) if equation.primitive.name.startswith('custom_'))
  return all(_is_derivative(jaxpr, equation) for equation in custom)


def _is_derivative(jaxpr: Jaxpr, equation: JaxprEqn) -> bool:
  """Returns whether the custom rule of an equation is known to give the true first and second derivatives."""
  variables = list(dict.fromkeys(v for v in equation.invars if not isinstance(v, Literal)))
  alone = jaxpr.replace(constvars=(), invars=variables, outvars=equation.outvars, eqns=[equation])
  rule = jaxpr_as_fun(ClosedJaxpr(alone, ()))

  def function(*values):
    given = dict(zip(variables, values, strict=True))
    inputs = [v.val if isinstance(v, Literal) else given[v] for v in equation.invars]
    return jaxpr_as_fun(equation.params['call_jaxpr'])(*inputs)

  inputs, outputs = (_shapes(variables), _shapes(equation.outvars))
  if any(jnp.issubdtype(shape.dtype, jnp.complexfloating) for shape in inputs + outputs):
    return False
  try:
    by_rule, by_function = (_derivatives(f, inputs, outputs) for f in (rule, function))
    for each in (by_rule, by_function):
      names = {e.primitive.name for e in equations(each.jaxpr)}
      # A while loop might never end at random inputs, a callback might be harmful, and forward mode refuses custom_lin.
      if each.effects or {'while', 'custom_lin'} & names or any('callback' in name for name in names):
        return False
    with contextlib.ExitStack() as entered:
      for context in (
        jax.ensure_compile_time_eval(),
        jax.enable_x64(True),
        jax.numpy_dtype_promotion('standard'),
        jax.debug_nans(False),
        jax.debug_infs(False),
      ):
        entered.enter_context(context)
      found = _compare(by_rule, by_function, len(_floats(outputs)))
      agree, *somewhere = [np.asarray(flags) for flags in found]  # Fails if a value depends on a tracer.
  except Exception:  # JAX raises errors of many types for a function that it cannot differentiate twice.
    return False
  return bool(agree.all() and all(flags.any() for flags in somewhere))


def _shapes(variables: Sequence[Any]) -> list[jax.ShapeDtypeStruct]:
  return [jax.ShapeDtypeStruct(variable.aval.shape, variable.aval.dtype) for variable in variables]


def _derivatives(function: Callable[..., list], inputs: list, outputs: list) -> ClosedJaxpr:
  """Returns the jaxpr of `inputs, tangents, cotangents of the outputs → cotangents of the inputs, their derivatives`.

  Only inputs and outputs of floating point have tangents and cotangents.
  """

  def derivatives(inputs, tangents, cotangents):
    def of_floats(floats):
      rest = iter(floats)
      return _floats(function(*(next(rest) if _is_float(value) else value for value in inputs)))

    return jax.jvp(lambda floats: jax.vjp(of_floats, floats)[1](cotangents), (_floats(inputs),), (tangents,))

  return jax.make_jaxpr(derivatives)(inputs, _floats(inputs), _floats(outputs))


def _floats(values: list) -> list:
  return [value for value in values if _is_float(value)]


def _is_float(value) -> bool:
  return jnp.issubdtype(value.dtype, jnp.floating)


def _compare(by_rule: ClosedJaxpr, by_function: ClosedJaxpr, cotangents: int) -> list[chex.Array]:
  """Returns for each draw of random inputs whether the derivatives agree, followed by what must be seen in some draw.

  In some draw, the function must have a derivative that is not zero, each derivative must have a finite entry, and each
  branch must be taken. Each is a boolean array with one entry for each draw.
  """
  avals = _shapes(by_rule.jaxpr.invars)
  number = _DRAWS_OF_FEW if min(aval.size for aval in avals) < _FEW else 1
  scales = np.array(number * [*SCALES, (0, 0)])

  def at(draw):
    index, scale = draw
    inputs = [_random(aval, index, i, scale[int(i >= len(avals) - cotangents)]) for i, aval in enumerate(avals)]
    (ours, branches), (theirs, others) = (evaluate(jaxpr, inputs) for jaxpr in (by_rule, by_function))
    finite, first = [jnp.isfinite(leaf) for leaf in theirs], len(theirs) // 2
    sizes = [jnp.max(jnp.abs(leaf), where=there, initial=0.0) for leaf, there in zip(theirs, finite, strict=True)]
    largest = jnp.max(jnp.stack(sizes[:first]))
    # A derivative may be a difference of large numbers, and a second derivative one of first derivatives.
    x, g = jnp.where(scale == 0, 1e8, scale)
    noise = [_NOISE * g] * first + [_NOISE * x**2 * largest] * first
    agree = jnp.stack([_agree(*leaves) for leaves in zip(ours, theirs, finite, sizes, noise, strict=True)]).all()
    return [agree, largest > noise[0], *(jnp.any(there) | (there.size == 0) for there in finite), *branches, *others]

  return jax.jit(lambda draws: jax.lax.map(at, draws))((np.arange(len(scales)), scales))


def _random(aval, index: chex.Array, position: int, scale: chex.Array) -> chex.Array:
  """Returns random numbers with the shape of `aval` and its `widened` dtype, for the draw `index`.

  A scale of zero means that each number has its own magnitude. Integers are from one of four ranges, by the draw.
  """
  place = (977 * index + 331 * position + jnp.arange(aval.size)) % _NUMBERS.size
  if jnp.issubdtype(aval.dtype, jnp.floating):
    table, factor = jnp.asarray(np.stack([_NUMBERS, _MIXED]))[(scale == 0).astype(int)], jnp.where(scale == 0, 1, scale)
    return (factor * table[place]).reshape(aval.shape).astype(widened(aval.dtype))
  integers = jnp.asarray(_INTEGERS)[index % len(_INTEGERS), place].reshape(aval.shape)
  if aval.dtype == bool:
    return integers % 2 > 0
  return (jnp.abs(integers) if jnp.issubdtype(aval.dtype, jnp.unsignedinteger) else integers).astype(aval.dtype)


def _agree(ours, theirs, finite, size, noise) -> chex.Array:
  """Returns whether two derivatives are equal, where that of the function is finite. Its largest entry is `size`."""
  return jnp.all(~finite | (jnp.abs(ours - theirs) <= _TOLERANCE * (size + jnp.abs(theirs)) + noise))
