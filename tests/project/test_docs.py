"""What is public is described: by a docstring that names each parameter, and on a page of the site.

The pages' code runs; blocks that train, and so compile for seconds, are marked slow.
"""

import importlib
import inspect
import pathlib
import re

import jax
import pytest
from public_names import public_names
from source import absent

import metasgd_jax

ROOT = pathlib.Path(__file__).resolve().parents[2]
DOCS = ROOT / 'docs'
PACKAGE = pathlib.Path(metasgd_jax.__file__).parent
PAGES = sorted(DOCS.glob('*.md'))
DEAR = re.compile(r'rl\.train\(|ms\.(train|plan_memory|tasks\.augmented)\(|rl\.trpo_update\(')


def blocks(path):
  return re.findall(r'^```python\n(.*?)^```', path.read_text(), re.DOTALL | re.MULTILINE)


BLOCKS = [
  pytest.param(path, block, id=f'{path.stem}-{number}', marks=[pytest.mark.slow] if DEAR.search(block) else [])
  for path in PAGES
  for number, block in enumerate(blocks(path), 1)
]
MODULES = sorted(
  '.'.join(path.relative_to(PACKAGE.parent).with_suffix('').parts).removesuffix('.__init__')
  for path in PACKAGE.rglob('*.py')
  if path.name != '__main__.py'
)
PACKAGES = [f'metasgd_jax{part}' for part in ('', '.learners', '.nn', '.rl', '.tasks', '.datasets', '.plotting')]
OF_OUTPUT = [f'metasgd_jax.io.{name}' for name in ('files', 'provenance', 'writers')]
ON_PAGES = set(re.findall(r'automodule:: (\S+)', ''.join(path.read_text() for path in (DOCS / 'api').glob('*.md'))))


def public():
  """Each public class and function, with the methods of the classes, once, by where it is defined."""
  found = {}
  for module in map(importlib.import_module, [*PACKAGES, *OF_OUTPUT]):
    for thing in (getattr(module, name) for name in public_names(module)):
      if not (inspect.isclass(thing) or inspect.isfunction(thing)) or not thing.__module__.startswith('metasgd_jax'):
        continue
      own = [f for f in vars(thing).values() if inspect.isfunction(f) and not f.__name__.startswith('_')]
      for one in [thing, *(own if inspect.isclass(thing) else [])]:
        if one.__module__ == thing.__module__:  # A Linen module has Linen's methods, too.
          found[f'{one.__module__}.{one.__qualname__}'] = one
  return dict(sorted(found.items()))


@pytest.mark.parametrize(('path', 'block'), BLOCKS)
def test_python_on_the_pages_runs(path, block, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  code = compile(block, f'docs/{path.name}', 'exec')
  if 'sys.argv' in block:  # A script of its own; tests/deploy/test_export.py gives it its arguments.
    return
  with jax.numpy_rank_promotion('allow'):  # As it is outside of this suite.
    exec(code, {})


def test_the_pages_code_is_python_and_names_what_the_package_has():
  found = {page.stem: blocks(page) for page in PAGES}
  assert found['recipes']
  assert found['migrating']
  assert [(page, name) for page, codes in found.items() for code in codes for name in absent(code)] == []
  assert list(absent('ms.nn.MLP(2).no; ms.nn.Nothing(ms.train)')) == ['ms.nn.Nothing']


def undescribed(thing):
  """Its parameters that its docstring does not name; what is wrong with the docstring itself."""
  text = inspect.getdoc(thing) or ''
  if not text or 'Alias for field' in text:
    return ['no docstring']
  if inspect.isclass(thing):
    if issubclass(thing, Exception):  # It takes a message.
      return []
    text += inspect.getdoc(thing.__init__) or ''
  linens = {'self', 'parent', 'name'}  # What each Linen module has, and methods.
  gathers = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
  parameters = inspect.signature(thing).parameters.items()
  named = [name for name, parameter in parameters if name not in linens and parameter.kind not in gathers]
  return [name for name in named if not re.search(rf'\b{name}\b', text, re.IGNORECASE)]


def test_public_names_and_their_parameters_are_described():
  found = public()
  assert len(found) > 150
  assert {name: lacks for name, thing in found.items() if (lacks := undescribed(thing))} == {}


def takes_an_example(thing):
  """Whether it is a function or a class, and no error; a class's example shows its methods."""
  return '.' not in thing.__qualname__ and not (inspect.isclass(thing) and issubclass(thing, Exception))


def test_each_public_function_and_class_has_an_example():
  found = {name: thing for name, thing in public().items() if takes_an_example(thing)}
  assert len(found) > 100
  # tests/project/test_doctests.py runs them; getdoc would take a parent's.
  assert [name for name, thing in found.items() if '>>>' not in (thing.__doc__ or '')] == []


def is_on_a_page(name, thing):
  """Whether an API page has the module that defines it; of a type or a constant, which say none, one that has it."""
  home = thing.__name__ if inspect.ismodule(thing) else getattr(thing, '__module__', '')
  if inspect.ismodule(thing) and hasattr(thing, '__path__'):
    return any(module.startswith(f'{home}.') for module in ON_PAGES)
  if home.startswith('metasgd_jax'):
    return home in ON_PAGES
  return any(getattr(importlib.import_module(module), name, None) is thing for module in ON_PAGES)


def test_each_public_name_is_on_a_page_of_the_site():
  missing = []
  for name in PACKAGES:
    package = importlib.import_module(name)
    assert len(public_names(package)) > 5, name
    missing += [f'{name}.{one}' for one in public_names(package) if not is_on_a_page(one, getattr(package, one))]
  assert missing == []


def test_pages_name_modules_that_exist():
  assert ON_PAGES
  assert not ON_PAGES - set(MODULES)
