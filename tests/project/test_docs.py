"""What is public is described: by a docstring that names each parameter, and on a page of the site.

The pages' code runs; blocks that train, and so compile for seconds, are marked slow.
"""

import importlib
import inspect
import pathlib
import re
import sys

import fake_gymnax
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
REFERENCE = ''.join(path.read_text() for path in sorted((DOCS / 'reference').glob('*.md')))
LISTED = re.findall(r'auto(?:function|class|exception|data):: (\S+)', REFERENCE)
MODULES_LISTED = re.findall(r'automodule:: (\S+)', REFERENCE)


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
  monkeypatch.setitem(sys.modules, 'gymnax', fake_gymnax)
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


def found_at(name):
  """What a dotted name on a reference page stands for."""
  module, attribute = name.rsplit('.', 1)
  if module in MODULES:
    return getattr(importlib.import_module(module), attribute)
  return getattr(found_at(module), attribute)  # A module that has a shorter name, such as metasgd_jax.files.


def test_each_public_name_is_on_a_reference_page():
  listed = {id(found_at(name)) for name in LISTED}
  for module in map(importlib.import_module, MODULES_LISTED):
    listed |= {id(getattr(module, name)) for name in public_names(module)}
  missing = []
  for package in map(importlib.import_module, PACKAGES):
    assert len(public_names(package)) > 5, package
    things = {f'{package.__name__}.{name}': getattr(package, name) for name in public_names(package)}
    for name, thing in things.items():
      if inspect.ismodule(thing):
        pages = [*LISTED, *MODULES_LISTED]
        on_page = any(f'{one}.'.startswith((f'{name}.', f'{thing.__name__}.')) for one in pages)
      else:
        on_page = id(thing) in listed
      if not on_page:
        missing.append(name)
  assert missing == []


def test_each_name_is_on_the_reference_pages_once():
  assert len(LISTED) > 150
  things = [id(found_at(name)) for name in LISTED]
  assert [name for name, thing in zip(LISTED, things, strict=True) if things.count(thing) > 1] == []
