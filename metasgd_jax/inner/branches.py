"""Evaluates a jaxpr and tells which of its branches were taken.

A function that is made of comparisons, such as `jnp.where(x > 6, …, …)`, consists of pieces. A test says nothing about
a piece that none of its inputs reaches. `evaluate` therefore tells for each comparison which of its results occurred.
"""

import dataclasses
import enum
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
_COMBINING = ('mul', 'min', 'max', 'reduce_prod', 'reduce_min', 'reduce_max')
"""Primitives that combine zeros and ones to zeros and ones, as `and` and `or` combine booleans."""
_MOVING = ('broadcast_in_dim', 'concatenate', 'convert_element_type', 'reshape', 'squeeze', 'transpose')
"""Primitives that change no value."""


class _Kind(enum.IntEnum):
  """What an array depends on.

  Attributes:
    CONSTANT: On no input.
    INDICATOR: On inputs. It consists of booleans, or of zeros and ones that were made from booleans.
    VARYING: On inputs, in any other way.
  """

  CONSTANT = 0
  INDICATOR = 1
  VARYING = 2


@dataclasses.dataclass(frozen=True)
class _Seen:
  """What is collected while a jaxpr is evaluated.

  Attributes:
    taken: For each branch whether it was taken.
    bounds: Arrays, each followed by the constants that it is compared with. The keys are the `id` of the arrays.
    outputs: Outputs of the equations. An equation that occurs again gives the same arrays, with the same `id`.
  """

  taken: list[chex.Array] = dataclasses.field(default_factory=list)
  bounds: dict[int, list] = dataclasses.field(default_factory=dict)
  outputs: dict[tuple, tuple[list, list]] = dataclasses.field(default_factory=dict)


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
  compared with several constant bounds, the values between two of them are a branch of their own. If the results of
  comparisons are multiplied as zeros and ones, products of zero and of one are branches too. What cannot be observed is
  listed as not taken: a branch inside of a loop or of `cond`, rounding, and a look-up in a constant table.

  Args:
    closed: Jaxpr. Its custom derivative rules are not used: their functions are evaluated.
    inputs: One array for each input variable, with the `widened` dtype of the variable.

  Must be called inside `jax.enable_x64(True)`.

  Returns:
    The outputs, and one boolean scalar for each branch. The branches are the same for all inputs.
  """
  seen = _Seen()
  outputs, _ = _evaluate(closed.jaxpr, closed.consts, inputs, [_Kind.VARYING] * len(inputs), seen)
  return outputs, seen.taken + [piece for array, *ends in seen.bounds.values() for piece in _between(array, ends)]


def _evaluate(jaxpr: Jaxpr, consts, inputs, kinds: Sequence[_Kind], seen: _Seen) -> tuple[list, list[_Kind]]:
  """Returns the outputs and their kinds, and adds to `seen`."""
  values = dict(zip((*jaxpr.constvars, *jaxpr.invars), map(_wide, (*consts, *inputs)), strict=True))
  kind_of = dict(zip(jaxpr.invars, kinds, strict=True))

  def read(variables):
    found = [_wide(v.val) if isinstance(v, Literal) else values[v] for v in variables]
    return found, [_Kind.CONSTANT if isinstance(v, Literal) else kind_of.get(v, _Kind.CONSTANT) for v in variables]

  for equation in jaxpr.eqns:
    operands, kinds = read(equation.invars)
    if equation.primitive.name in _CALLS:
      inner = equation.params['call_jaxpr' if 'call_jaxpr' in equation.params else 'jaxpr']
      outputs, kinds = _evaluate(getattr(inner, 'jaxpr', inner), getattr(inner, 'consts', ()), operands, kinds, seen)
    else:
      outputs = _outputs(equation, operands, seen)
      kinds = [_kind(equation, kinds, seen, operands, outputs)] * len(outputs)
    values |= dict(zip(equation.outvars, outputs, strict=True))
    kind_of |= dict(zip(equation.outvars, kinds, strict=True))
  return read(jaxpr.outvars)


def _outputs(equation: JaxprEqn, operands: list, seen: _Seen) -> list:
  """Returns the outputs of an equation. They are those of an earlier equation if it was the same."""
  sources = [
    f'{v.val}{v.aval}' if isinstance(v, Literal) and not np.ndim(v.val) else id(operand)
    for v, operand in zip(equation.invars, operands, strict=True)
  ]
  key = (equation.primitive, *sources, str(equation.params))
  if key in seen.outputs:
    return seen.outputs[key][0]
  parameters = {name: _wide_parameter(value) for name, value in equation.params.items()}
  outputs = equation.primitive.bind(*operands, **parameters)
  outputs = outputs if equation.primitive.multiple_results else [outputs]
  if not any(True for _ in jaxprs_in_params(equation.params)):  # The text of a jaxpr does not show its constants.
    seen.outputs[key] = (outputs, operands)  # While the operands are kept, no other array has their `id`.
  return outputs


def _kind(equation: JaxprEqn, kinds: Sequence[_Kind], seen: _Seen, operands: list, outputs: list) -> _Kind:
  """Returns the kind of the outputs of an equation, and adds its branches and bounds to `seen`."""
  if not any(kinds) or _is_not_counted(equation):
    return _Kind.CONSTANT
  name = equation.primitive.name
  seen.taken.extend(_branches(equation, operands, outputs, kinds))
  if name in _ORDERED and not all(kinds) and is_float(operands[0]):
    array, bound = operands if kinds[0] else operands[::-1]
    seen.bounds.setdefault(id(array), [array]).append(bound)
  if _is_boolean(equation):
    return _Kind.INDICATOR
  indicators = all(kind == _Kind.INDICATOR for kind in kinds)
  return _Kind.INDICATOR if indicators and name in _COMBINING + _MOVING else _Kind.VARYING


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


def _branches(equation: JaxprEqn, operands: list, outputs: list, kinds: Sequence[_Kind]) -> list[chex.Array]:
  """Returns for each branch of a primitive whether an entry of its operands has taken it.

  If the entries of a constant bound differ, the branch must be taken at both the smallest and the largest of them.
  Nothing lies beyond an infinite bound, such as that of a softmax.
  """
  name = equation.primitive.name
  if name in _STEPS or (name in ('gather', 'dynamic_slice') and not kinds[0]) or _truncates(equation):
    return [jnp.zeros((), bool)]
  inner = [e for jaxpr in jaxprs_in_params(equation.params) for e in equations(jaxpr)]
  hidden = [
    jnp.zeros((), bool) for e in inner if e.primitive.name in _PIECEWISE + _STEPS or _is_boolean(e) or _truncates(e)
  ]
  if name in _COMBINING and all(kind == _Kind.INDICATOR for kind in kinds):
    there = [outputs[0] == 0, outputs[0] != 0]
  elif name in ('max', 'min'):
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
  if name in _ORDERED and not all(kinds) and is_float(operands[0]):
    bound = operands[1 if kinds[0] else 0]
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
    constant = [_Kind.CONSTANT] * len(inputs)
    return jax.make_jaxpr(lambda *inputs: _evaluate(parameter.jaxpr, parameter.consts, inputs, constant, _Seen())[0])(
      *inputs
    )
  return widened(parameter) if isinstance(parameter, np.dtype) else parameter
