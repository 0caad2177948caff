"""Draws docstrings and error messages at random, so that someone who has not seen the code can judge their English.

python -m tests.draw_prose --seed=0 --docstrings=100 --messages=40
"""

import argparse
import ast
import pathlib
import random
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).resolve().parents[1]
Drawn = tuple[str, str]  # (where it stands, its text)


def docstrings(path: pathlib.Path) -> Iterator[Drawn]:
  """Yields each docstring of a file, without its example."""
  for node in ast.walk(ast.parse(path.read_text())):
    if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
      continue
    if text := ast.get_docstring(node):
      name = getattr(node, 'name', 'module')
      yield f'{path.relative_to(ROOT)} {name}', text.partition('\nExample')[0].strip()


def messages(path: pathlib.Path) -> Iterator[Drawn]:
  """Yields the message of each error that a file raises, as the expression that builds it."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
      yield f'{path.relative_to(ROOT)}:{node.lineno}', ast.unparse(node.exc.args[0])


def main() -> None:
  """Prints what was drawn."""
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--docstrings', type=int, default=100)
  parser.add_argument('--messages', type=int, default=40)
  options = parser.parse_args()
  draw = random.Random(options.seed)
  paths = sorted(path for part in ('metasgd_jax', 'experiments') for path in (ROOT / part).rglob('*.py'))
  for find, count in ((docstrings, options.docstrings), (messages, options.messages)):
    for where, text in draw.sample([found for path in paths for found in find(path)], count):
      print(f'--- {where}\n{text}\n')


if __name__ == '__main__':
  main()
