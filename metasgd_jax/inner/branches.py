"""Evaluates a jaxpr and tells which of its branches were taken.

A function that is made of comparisons, such as `jnp.where(x > 6, …, …)`, consists of pieces. A test says nothing about
a piece that none of its inputs reaches. `evaluate` therefore tells for each comparison which of its results occurred.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, cast

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, jaxprs_in_params, subjaxprs

_FLOATS = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16), jnp.dtype(jnp.float32))
_CALLS = ('jit', 'pjit', 'closed_call', 'custom_jvp_call', 'custom_vjp_call', 'checkpoint', 'remat2')
"""Primitives that do nothing but call a jaxpr."""
_PIECEWISE = ('lt', 'le', 'gt', 'ge', 'max', 'min', 'abs', 'sign', 'clamp', 'cond')
"""Primitives that have branches. Other primitives with a boolean result have branches too."""
_ORDERED = ('lt', 'le', 'gt', 'ge', 'max', 'min')
"""Primitives that compare with a bound. Two bounds on one array divide its values into pieces."""
_STEPS = ('floor', 'ceil', 'round', 'rem')
"""Primitives with more pieces than can be counted. They are listed as one branch that is never taken."""


def equations(jaxpr: Jaxpr) -> Iterator[JaxprEqn]:
  """Yields the equations of a jaxpr. Those of inner jaxprs, such as the body of a scan, are included."""
  yield from jaxpr.eqns
  for inner in subjaxprs(jaxpr):
    yield from equations(inner)


def widened(dtype: np.dtype) -> np.dtype:
  """Returns float64 for bfloat16, float16 and float32, and any other dtype unchanged."""
  return np.dtype(np.float64) if dtype in _FLOATS else dtype


def evaluate(closed: ClosedJaxpr, inputs: Sequence[chex.Array]) -> tuple[list[chex.Array], list[chex.Array]]:
  """Returns the outputs of a jaxpr, and for each of its branches whether it was taken.

  All floating-point values are computed in float64, so that rounding errors neither hide nor make a difference.

  Only branches that depend on an input are listed. A comparison of floating-point numbers by == or ≠, a test for NaN or
  infinity, and a test for a negative index are not listed, because random inputs almost never meet them. If an array is
  compared with several constant bounds, the values between two of them are a branch of their own. What cannot be
  observed is listed as not taken: a branch inside of a loop or of `cond`, rounding, and a look-up in a constant table.

  Args:
    closed: Jaxpr. Its custom derivative rules are not used: their functions are evaluated.
    inputs: One array for each input variable, with the `widened` dtype of the variable.

  Must be called inside `jax.enable_x64(True)`.

  Returns:
    The outputs, and one boolean scalar for each branch. The branches are the same for all inputs.
  """
  taken: list[chex.Array] = []
  bounds: dict[int, list] = {}
  outputs, _ = _evaluate(closed.jaxpr, closed.consts, inputs, [True] * len(inputs), taken, bounds)
  return outputs, taken + [piece for array, *ends in bounds.values() for piece in _between(array, ends)]


def _evaluate(jaxpr: Jaxpr, consts, inputs, vary: Sequence[bool], taken: list, bounds: dict) -> tuple[list, list[bool]]:
  """Returns the outputs and whether each depends on an input, and adds to `taken` and `bounds`.

  Each value of `bounds` is an array, followed by the constants that it is compared with. Its key is the array's `id`.
  """
  values = dict(zip((*jaxpr.constvars, *jaxpr.invars), map(_wide, (*consts, *inputs)), strict=True))
  varying = {variable for variable, varies in zip(jaxpr.invars, vary, strict=True) if varies}

  def read(variables):
    found = [_wide(v.val) if isinstance(v, Literal) else values[v] for v in variables]
    return found, [not isinstance(v, Literal) and v in varying for v in variables]

  for equation in jaxpr.eqns:
    operands, vary = read(equation.invars)
    if equation.primitive.name in _CALLS:
      inner = equation.params['call_jaxpr' if 'call_jaxpr' in equation.params else 'jaxpr']
      outputs, vary = _evaluate(
        getattr(inner, 'jaxpr', inner), getattr(inner, 'consts', ()), operands, vary, taken, bounds
      )
    else:
      parameters = {name: _wide_parameter(value) for name, value in equation.params.items()}
      outputs = equation.primitive.bind(*operands, **parameters)
      outputs = outputs if equation.primitive.multiple_results else [outputs]
      depends = any(vary) and not _is_not_counted(equation)
      if depends:
        taken += _branches(equation, operands, outputs, vary)
        if equation.primitive.name in _ORDERED and not all(vary) and is_float(operands[0]):
          array, bound = operands if vary[0] else operands[::-1]
          bounds.setdefault(id(array), [array]).append(bound)
      vary = [depends] * len(outputs)
    values |= dict(zip(equation.outvars, outputs, strict=True))
    varying |= {variable for variable, varies in zip(equation.outvars, vary, strict=True) if varies}
  return read(jaxpr.outvars)


def _is_not_counted(equation: JaxprEqn) -> bool:
  """Returns whether an equation is a comparison of which one result hardly ever occurs, although all is well.

  These are the tests for equality and for NaN of random numbers, and the test `index < 0` that JAX makes at each
  indexing.
  """
  name, operand = equation.primitive.name, cast(Any, equation.invars[0].aval)
  if jnp.issubdtype(operand.dtype, jnp.integer):
    return name == 'lt' and isinstance(other := equation.invars[1], Literal) and bool(np.all(other.val == 0))
  return name in ('eq', 'ne', 'is_finite') and operand.dtype != bool


def _between(array: chex.Array, bounds: list) -> list[chex.Array]:
  """Returns for each two neighbouring bounds whether an entry of the array lies between them."""
  ends = jnp.sort(jnp.stack([jnp.broadcast_to(bound, array.shape) for bound in bounds]), axis=0)
  return [jnp.any((low < array) & (array < high)) | ~jnp.any(low < high) for low, high in pairwise(ends)]


def _branches(equation: JaxprEqn, operands: list, outputs: list, vary: Sequence[bool]) -> list[chex.Array]:
  """Returns for each branch of a primitive whether an entry of its operands has taken it.

  If the entries of a constant bound differ, the branch must be taken at both the smallest and the largest of them.
  Nothing lies beyond an infinite bound, such as that of a softmax.
  """
  name = equation.primitive.name
  if name in _STEPS or (name in ('gather', 'dynamic_slice') and not vary[0]) or _truncates(equation):
    return [jnp.zeros((), bool)]
  inner = [e for jaxpr in jaxprs_in_params(equation.params) for e in equations(jaxpr)]
  hidden = [
    jnp.zeros((), bool) for e in inner if e.primitive.name in _PIECEWISE + _STEPS or _is_boolean(e) or _truncates(e)
  ]
  if name in ('max', 'min'):
    there = [operands[0] < operands[1], operands[0] > operands[1]]
  elif name in ('abs', 'sign'):
    there = [operands[0] < 0, operands[0] > 0]
  elif name == 'clamp':
    low, value, high = operands
    there = [value < low, (low <= value) & (value <= high), high < value]
  elif name == 'cond':
    there = [operands[0] == i for i in range(len(equation.params['branches']))]
  elif _is_boolean(equation):
    there = [outputs[0], ~outputs[0]]
  elif name == 'select_n' and operands[0].dtype != bool:
    there = [operands[0] == i for i in range(len(operands) - 1)]
  else:
    there = []
  if name in _ORDERED and not all(vary) and is_float(operands[0]):
    bound = operands[1 if vary[0] else 0]
    ends = (jnp.min(bound), jnp.max(bound))
    return [jnp.any(branch & (bound == end)) | jnp.isinf(end) for branch in there for end in ends]
  return hidden + [jnp.any(branch) for branch in there]


def _truncates(equation: JaxprEqn) -> bool:
  """Returns whether an equation converts floating-point numbers to integers."""
  if equation.primitive.name != 'convert_element_type':
    return False
  return is_float(cast(Any, equation.invars[0].aval)) and jnp.issubdtype(equation.params['new_dtype'], jnp.integer)


def is_float(value: Any) -> bool:
  """Returns whether an array, or its shape and dtype, is of floating point."""
  return jnp.issubdtype(value.dtype, jnp.floating)


def _is_boolean(equation: JaxprEqn) -> bool:
  return len(equation.outvars) == 1 and cast(Any, equation.outvars[0].aval).dtype == bool


def _wide(value: Any) -> Any:
  value = value if isinstance(value, jax.Array) else jnp.asarray(value)
  return value.astype(np.float64) if value.dtype in _FLOATS else value


def _wide_parameter(parameter: Any) -> Any:
  """Returns a parameter of a primitive with `widened` dtypes. It may be or contain a jaxpr, such as that of a loop."""
  if type(parameter) is tuple:
    return tuple(map(_wide_parameter, parameter))
  if isinstance(parameter, Jaxpr):
    return _wide_parameter(ClosedJaxpr(parameter, ())).jaxpr
  if isinstance(parameter, ClosedJaxpr):
    avals: list[Any] = parameter.in_avals
    inputs = [jax.ShapeDtypeStruct(aval.shape, widened(aval.dtype)) for aval in avals]
    constant = [False] * len(inputs)
    return jax.make_jaxpr(lambda *inputs: _evaluate(parameter.jaxpr, parameter.consts, inputs, constant, [], {})[0])(
      *inputs
    )
  return widened(parameter) if isinstance(parameter, np.dtype) else parameter
