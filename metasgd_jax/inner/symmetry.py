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
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, jaxpr_as_fun, jaxprs_in_params

from metasgd_jax.inner.branches import equations, evaluate, is_float, widened
from metasgd_jax.types import PyTree

SCALES = ((1e-6, 1), (1e-3, 1), (0.03, 1), (1, 1), (30, 30), (1e4, 1e4), (1e8, 1e8), (1, 1e-4), (1, 1e8))
"""Scales of the random inputs and cotangents with which a rule is tested. Some rules, such as clipping, are false only
for large or only for small values. In one more draw, each number has its own magnitude, and for `jax.custom_vjp`, many
inputs are exactly zero in another, as after relu.
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

  The test does not find a rule that is false only where a value is NaN or infinite, or only in a small region that no
  comparison in the rule marks. Such a rule must not be used with the adjoints `hvp` and `revolve`.

  Outside of jit, each call compiles the comparison again. No result is cached, because `loss` may read other values
  that change between two calls. A cached True could then be wrong, and would give wrong gradients.

  Args:
    loss: Function `θ → scalar`.
    theta: Parameters, arrays or tracers. Only their shapes and dtypes are used.
  """
  jaxpr = jax.make_jaxpr(loss)(theta).jaxpr
  custom = (e for e in equations(jaxpr) if e.primitive.name.startswith('custom_') or e.primitive.name == 'linear_call')
  known: set[str] = set()
  return all(_is_derivative(jaxpr, equation, known) for equation in custom)


def _is_derivative(jaxpr: Jaxpr, equation: JaxprEqn, known: set[str]) -> bool:
  """Returns whether the custom rule of an equation is known to give the true first and second derivatives.

  Rules that were compared before, such as `jax.nn.relu` at the same shape, are in `known` and are not compared again.
  """
  variables = list(dict.fromkeys(v for v in equation.invars if not isinstance(v, Literal)))
  alone = jaxpr.replace(constvars=(), invars=variables, outvars=equation.outvars, eqns=[equation])
  rule = jaxpr_as_fun(ClosedJaxpr(alone, ()))

  def function(*values):
    given = dict(zip(variables, values, strict=True))
    inputs = [v.val if isinstance(v, Literal) else given[v] for v in equation.invars]
    return jaxpr_as_fun(equation.params['call_jaxpr'])(*inputs)

  if 'call_jaxpr' not in equation.params or equation.params.get('symbolic_zeros'):
    return False  # With symbolic zeros, the rule may depend on which inputs are differentiated.
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
    text = f'{by_rule}{by_function}'
    if text in known:
      return True
    with contextlib.ExitStack() as entered:
      for context in (
        jax.ensure_compile_time_eval(),
        jax.enable_x64(True),
        jax.numpy_dtype_promotion('standard'),
        jax.debug_nans(False),
        jax.debug_infs(False),
      ):
        entered.enter_context(context)
      by_vjp = equation.primitive.name == 'custom_vjp_call'
      found = _compare(by_rule, by_function, len(inputs), len(_floats(outputs)), by_vjp)
      agree, *somewhere = [np.asarray(flags) for flags in found]  # Fails if a value depends on a tracer.
  except Exception:  # JAX raises errors of many types for a function that it cannot differentiate twice.
    return False
  same = bool(agree.all() and all(flags.any() for flags in somewhere))
  if same and not any(map(_has_arrays, (by_rule, by_function))):  # The text does not show the values of arrays.
    known.add(text)
  return same


def _has_arrays(closed: ClosedJaxpr) -> bool:
  """Returns whether a jaxpr, or one inside of it, contains constant arrays."""
  found = list(equations(closed.jaxpr))
  jaxprs = [closed.jaxpr, *(jaxpr for equation in found for jaxpr in jaxprs_in_params(equation.params))]
  literals = [v for equation in found for v in equation.invars if isinstance(v, Literal)]
  return any(jaxpr.constvars for jaxpr in jaxprs) or any(np.ndim(literal.val) for literal in literals)


def _shapes(variables: Sequence[Any]) -> list[jax.ShapeDtypeStruct]:
  return [jax.ShapeDtypeStruct(variable.aval.shape, variable.aval.dtype) for variable in variables]


def _derivatives(function: Callable[..., list], inputs: list, outputs: list) -> ClosedJaxpr:
  """Returns the jaxpr of `inputs, tangents, cotangents of the outputs → cotangents of the inputs, …`.

  The cotangents of the inputs are followed by their derivatives and by the tangents of the outputs. The tangents come
  from the forward pass, which the backward pass need not match. Only inputs and outputs of floating point have tangents
  and cotangents.
  """

  def derivatives(inputs, tangents, cotangents):
    def of_floats(floats):
      rest = iter(floats)
      return _floats(function(*(next(rest) if is_float(value) else value for value in inputs)))

    def both(floats):
      outputs, backward = jax.vjp(of_floats, floats)
      return backward(cotangents), outputs

    (first, _), (second, pushed) = jax.jvp(both, (_floats(inputs),), (tangents,))
    return first, second, pushed

  return jax.make_jaxpr(derivatives)(inputs, _floats(inputs), _floats(outputs))


def _floats(values: list) -> list:
  return [value for value in values if is_float(value)]


def _compare(by_rule: ClosedJaxpr, by_function: ClosedJaxpr, inputs: int, cotangents: int, zeroed: bool) -> list:
  """Returns for each draw of random inputs whether the derivatives agree, followed by what must be seen in some draw.

  The rule must agree with the function, and its forward pass with its backward pass. If `zeroed`, many inputs are zero
  in some draws. Only the two passes are compared in these draws, because a rule such as that of relu may choose any of
  several derivatives there.

  In some other draw, the function must have a derivative that is not zero, each derivative must have a finite entry,
  and each branch must be taken. Each is a boolean array with one entry for each draw.
  """
  avals = _shapes(by_rule.jaxpr.invars)
  tangents = slice(inputs, len(avals) - cotangents)
  n = len(avals[tangents])
  number = _DRAWS_OF_FEW if min(aval.size for aval in avals) < _FEW else 1
  scales = np.array(number * ([*SCALES, (0, 0)] + zeroed * [(1, 1)]))
  zeros = np.array(number * ((len(SCALES) + 1) * [False] + zeroed * [True]))

  def at(draw):
    index, scale, zero = draw
    values = [_random(aval, index, i, scale[int(i >= len(avals) - cotangents)]) for i, aval in enumerate(avals)]
    values[:inputs] = [jnp.where(zero & (v < 1), 0, v) if is_float(v) else v for v in values[:inputs]]
    (ours, branches), (theirs, others) = (evaluate(jaxpr, values) for jaxpr in (by_rule, by_function))
    given = values[tangents] + values[len(avals) - cotangents :]
    duals, ours, theirs = ours[:n] + ours[2 * n :], ours[: 2 * n], theirs[: 2 * n]
    finite = [jnp.isfinite(leaf) for leaf in theirs]
    sizes = [jnp.max(jnp.abs(leaf), where=there, initial=0.0) for leaf, there in zip(theirs, finite, strict=True)]
    largest = jnp.max(jnp.stack(sizes[:n]))
    # A derivative may be a difference of large numbers, and a second derivative one of first derivatives.
    x, g = jnp.where(scale == 0, 1e8, scale)
    noise = [_NOISE * g] * n + [_NOISE * x**2 * largest] * n
    agree = jnp.stack([_agree(*leaves) for leaves in zip(ours, theirs, finite, sizes, noise, strict=True)]).all()
    agree = (zero | agree) & _passes_agree(duals, given, n, _NOISE * x * g * sum(aval.size for aval in avals))
    seen = [largest > noise[0], *(jnp.any(there) | (there.size == 0) for there in finite), *branches, *others]
    return [agree, *(flag & ~zero for flag in seen)]

  return jax.jit(lambda draws: jax.lax.map(at, draws))((np.arange(len(scales)), scales, zeros))


def _passes_agree(duals: list, given: list, n: int, noise: chex.Array) -> chex.Array:
  """Returns whether ⟨cotangents of the inputs, tangents⟩ = ⟨tangents of the outputs, cotangents⟩, if it is finite."""
  products = [dual * value for dual, value in zip(duals, given, strict=True)]
  backward, forward = (sum(map(jnp.sum, part)) for part in (products[:n], products[n:]))
  size = sum(jnp.sum(jnp.abs(product)) for product in products)
  return ~jnp.isfinite(size) | (jnp.abs(backward - forward) <= _TOLERANCE * size + noise)


def _random(aval, index: chex.Array, position: int, scale: chex.Array) -> chex.Array:
  """Returns random numbers with the shape of `aval` and its `widened` dtype, for the draw `index`.

  A scale of zero means that each number has its own magnitude. Integers are from one of four ranges, by the draw.
  """
  place = (977 * index + 331 * position + jnp.arange(aval.size)) % _NUMBERS.size
  if is_float(aval):
    table, factor = jnp.asarray(np.stack([_NUMBERS, _MIXED]))[(scale == 0).astype(int)], jnp.where(scale == 0, 1, scale)
    return (factor * table[place]).reshape(aval.shape).astype(widened(aval.dtype))
  integers = jnp.asarray(_INTEGERS)[index % len(_INTEGERS), place].reshape(aval.shape)
  if aval.dtype == bool:
    return integers % 2 > 0
  return (jnp.abs(integers) if jnp.issubdtype(aval.dtype, jnp.unsignedinteger) else integers).astype(aval.dtype)


def _agree(ours, theirs, finite, size, noise) -> chex.Array:
  """Returns whether two derivatives are equal, where that of the function is finite. Its largest entry is `size`."""
  return jnp.all(~finite | (jnp.abs(ours - theirs) <= _TOLERANCE * (size + jnp.abs(theirs)) + noise))
