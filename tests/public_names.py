"""The names that a module of the package offers to its users."""

import ast
import inspect
import pathlib


def public_names(module) -> list[str]:
  """Of a package, what its `__init__` imports under the same name; of a module, what it defines without underscore."""
  path = pathlib.Path(inspect.getfile(module))
  tree = ast.parse(path.read_text())
  if path.name == '__init__.py':
    aliases = [name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for name in node.names]
    return sorted(alias.name for alias in aliases if alias.asname == alias.name and alias.name != '__version__')
  defined = [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
  return [name for name in defined if not name.startswith('_')]
