"""Small faults in the package's source, drawn from a seed: a sign, a bound, a constant, a branch, an argument."""

import ast
import copy
import dataclasses
import pathlib
import random
from collections.abc import Iterator

MODULES = (
  'inner/adaptation', 'inner/adjoint', 'inner/loop', 'inner/alpha', 'inner/symmetry', 'outer/objective', 'outer/loop',
  'outer/training', 'outer/evaluation', 'learners/meta_sgd', 'learners/maml', 'learners/meta_lstm', 'learners/matching',
  'learners/siamese', 'learners/prototypical', 'learners/mann', 'learners/fine_tuning', 'learners/ensemble',
  'learners/inner_optimizer', 'learners/episodic', 'rl/surrogate', 'rl/advantages', 'rl/meta_step', 'rl/trpo',
  'rl/learner', 'nn/bilinear', 'nn/block', 'nn/winograd', 'io/checkpoint', 'tasks/few_shot', 'tasks/streaming',
)  # fmt: skip
"""Where a fault would change results: one file of metasgd_jax each."""

OPERATORS = {
  ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult, ast.FloorDiv: ast.Mult,
  ast.Mod: ast.Mult, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
  ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or,
  ast.Or: ast.And,
}  # fmt: skip
"""Each operator and the one that takes its place."""

FUNCTIONS = {
  'sum': 'mean', 'mean': 'sum', 'max': 'min', 'min': 'max', 'maximum': 'minimum', 'minimum': 'maximum',
  'argmax': 'argmin', 'argmin': 'argmax', 'zeros': 'ones', 'ones': 'zeros', 'zeros_like': 'ones_like',
  'ones_like': 'zeros_like', 'all': 'any', 'any': 'all', 'exp': 'expm1', 'stop_gradient': 'asarray',
}  # fmt: skip
"""Each function and the one that takes its place; a gradient that is not stopped any more is `lax.asarray`."""


@dataclasses.dataclass(frozen=True)
class Fault:
  """One fault: `source` is its file's text with the fault in it, `statement` the lines of the statement it is in."""

  module: str
  line: int
  statement: range
  before: str
  after: str
  source: str = dataclasses.field(repr=False)

  @property
  def name(self) -> str:
    """The same each time that the same fault is drawn."""
    return f'{self.module}:{self.line}: {self.before} → {self.after}'


def draw(root: pathlib.Path, module: str, count: int, seed: int) -> list[Fault]:
  """Draws `count` faults, in as many lines of a module as there are.

  Args:
    root: The folder that has `metasgd_jax`.
    module: A name of `MODULES`.
    count: How many; fewer if the module has fewer.
    seed: Equal seeds give equal faults as long as the module is unchanged.
  """
  text = (root / 'metasgd_jax' / f'{module}.py').read_text()
  found = [
    fault
    for node, statement in _run_when_called(ast.parse(text))
    for fault in _faults_of(node, statement, module, text)
  ]
  random.Random(f'{seed} {module}').shuffle(found)
  first_of_line = {fault.line: fault for fault in reversed(found)}
  return sorted(found, key=lambda fault: first_of_line[fault.line] is not fault)[:count]


def _run_when_called(
  tree: ast.AST, statement: ast.stmt | None = None, called: bool = False
) -> Iterator[tuple[ast.AST, ast.stmt]]:
  """Yields each node of functions' bodies with its statement; messages, annotations and defaults are left out."""
  for name, value in ast.iter_fields(tree):
    inside = called or (name == 'body' and isinstance(tree, (ast.FunctionDef, ast.Lambda)))
    if name in ('annotation', 'returns', 'decorator_list', 'defaults', 'kw_defaults'):
      continue
    for node in value if isinstance(value, list) else [value]:
      if not isinstance(node, ast.AST) or isinstance(node, (ast.Raise, ast.JoinedStr)):
        continue
      innermost = node if isinstance(node, ast.stmt) else statement
      if inside and innermost is not None:
        yield node, innermost
      yield from _run_when_called(node, innermost, inside)


def _faults_of(node: ast.AST, statement: ast.stmt, module: str, text: str) -> Iterator[Fault]:
  lines = range(statement.lineno, (statement.end_lineno or statement.lineno) + 1)
  for changed in _changes(node):
    start, end = _offset(text, node.lineno, node.col_offset), _offset(text, node.end_lineno, node.end_col_offset)
    after = f'({ast.unparse(changed)})'
    brief = ast.unparse(node).splitlines()[0], after.splitlines()[0]
    yield Fault(module, node.lineno, lines, *brief, text[:start] + after + text[end:])


def _changes(node: ast.AST) -> Iterator[ast.AST]:
  """Yields each faulty form of a node; most nodes have none."""
  if isinstance(node, (ast.BinOp, ast.BoolOp)) and type(node.op) in OPERATORS:
    yield _with(node, op=OPERATORS[type(node.op)]())
  elif isinstance(node, ast.Compare) and type(node.ops[0]) in OPERATORS:
    yield _with(node, ops=[OPERATORS[type(node.ops[0])](), *node.ops[1:]])
  elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.Not)):
    yield node.operand
  elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
    yield ast.Constant(not node.value)
  elif isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
    yield ast.Constant(node.value + 1 if isinstance(node.value, int) else 2 * node.value + (node.value == 0))
  elif isinstance(node, ast.IfExp):
    yield _with(node, body=node.orelse, orelse=node.body)
  elif isinstance(node, ast.Call):
    yield from _changes_of_call(node)


def _changes_of_call(node: ast.Call) -> Iterator[ast.Call]:
  name = node.func.attr if isinstance(node.func, ast.Attribute) else None
  if name in FUNCTIONS:
    yield _with(node, func=_with(node.func, attr=FUNCTIONS[name]))
  for i, keyword in enumerate(node.keywords):
    if keyword.arg is not None:
      yield _with(node, keywords=node.keywords[:i] + node.keywords[i + 1 :])


def _with(node: ast.AST, **changes) -> ast.AST:
  changed = copy.copy(node)
  for name, value in changes.items():
    setattr(changed, name, value)
  return changed


def _offset(text: str, line: int, column: int) -> int:
  """Where a place of the syntax tree is in the text; the tree counts bytes of UTF-8."""
  lines = text.splitlines(keepends=True)
  return sum(map(len, lines[: line - 1])) + len(lines[line - 1].encode()[:column].decode())
