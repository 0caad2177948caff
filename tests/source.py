"""What tests of code outside of the package share: of pages, notebooks, and the README."""

import ast
import inspect

import metasgd_jax


def absent(code):
  """Names that a piece of code asks of the package, as `ms.…`, and that it does not have."""
  for node in ast.walk(ast.parse(code)):
    names = ast.unparse(node).split('.') if isinstance(node, ast.Attribute) else []
    if names[:1] == ['ms'] and all(map(str.isidentifier, names)):
      thing = metasgd_jax
      for name in names[1:]:
        if inspect.ismodule(thing) and not hasattr(thing, name):
          yield '.'.join(names)
        thing = getattr(thing, name, None)
