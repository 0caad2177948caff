"""What pyproject.toml declares is what the package is made of; `make package` runs this beside an installed wheel."""

import ast
import importlib.metadata
import pathlib
import sys
import tomllib

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import metasgd_jax

ROOT = pathlib.Path(__file__).resolve().parents[2]
PACKAGE = pathlib.Path(metasgd_jax.__file__).parent
PYPROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text())
PATTERNS = PYPROJECT['tool']['setuptools']['package-data']['metasgd_jax']
REQUIREMENTS = [
  Requirement(line)
  for lines in (PYPROJECT['project']['dependencies'], *PYPROJECT['project']['optional-dependencies'].values())
  for line in lines
]
PYTHON = sorted(PACKAGE.rglob('*.py'))


def test_every_file_that_is_not_python_is_declared_and_every_declaration_has_a_file():
  declared = {pattern: set(PACKAGE.glob(pattern)) for pattern in PATTERNS}
  assert [pattern for pattern, found in declared.items() if not found] == []
  files = {path for path in PACKAGE.rglob('*') if path.is_file() and '__pycache__' not in path.parts}
  assert files - set(PYTHON) - set.union(*declared.values()) == set()


def test_every_folder_with_python_in_it_is_a_package():
  folders = {path.parent for path in PYTHON}
  assert len(folders) > 5
  assert [folder for folder in folders if not (folder / '__init__.py').is_file()] == []


def test_every_library_that_the_package_imports_is_declared():
  owners = importlib.metadata.packages_distributions()
  declared = {canonicalize_name(requirement.name) for requirement in REQUIREMENTS}
  imported = set()
  for path in PYTHON:
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Import):
        imported |= {alias.name.partition('.')[0] for alias in node.names}
      elif isinstance(node, ast.ImportFrom):
        imported.add(node.module.partition('.')[0])
  libraries = imported - sys.stdlib_module_names - {'metasgd_jax'}
  assert {'jax', 'optax', 'flax'} <= libraries
  undeclared = {name for name in libraries if not {canonicalize_name(owner) for owner in owners[name]} & declared}
  assert undeclared == set()


def test_the_lowest_versions_tested_are_the_lowest_allowed():
  pins = dict(line.split('==') for line in (ROOT / 'constraints-lowest.txt').read_text().splitlines() if '==' in line)
  pins = {canonicalize_name(name): Version(pin).release for name, pin in pins.items()}
  tested = {*PYPROJECT['project']['dependencies']}
  for extra in ('test', 'compose', 'gym', 'notebooks', 'plots', 'tensorboard'):
    tested |= {*PYPROJECT['project']['optional-dependencies'][extra]}
  for requirement in map(Requirement, tested):
    if requirement.name != 'metasgd_jax':
      (bound,) = requirement.specifier
      release = Version(bound.version).release
      assert bound.operator == '>='
      assert pins[canonicalize_name(requirement.name)][: len(release)] == release, requirement


def test_the_command_and_the_version_are_the_installed_ones():
  (command,) = importlib.metadata.entry_points(group='console_scripts', name='metasgd')
  assert callable(command.load())
  assert importlib.metadata.version('metasgd_jax') == metasgd_jax.__version__
