"""What the README shows can be run as it stands."""

import pathlib
import re

import jax
import pytest
from source import absent

import metasgd_jax as ms

ROOT = pathlib.Path(__file__).resolve().parents[2]
README = (ROOT / 'README.md').read_text()
EXPERIMENTS = (ROOT / 'docs' / 'experiments.md').read_text()
COMMANDS = (
  README + EXPERIMENTS + ''.join((ROOT / 'docs' / f'{page}.md').read_text() for page in ('results', 'pictures'))
)
BLOCKS = re.findall(r'```python\n(.*?)```', README, re.DOTALL)


@pytest.mark.parametrize('block', [pytest.param(block, id=block.splitlines()[-1][:40]) for block in BLOCKS])
def test_python_runs(block):
  with jax.numpy_rank_promotion('allow'):  # As it is outside of this suite.
    exec(compile(block.replace('60_000', '20'), 'README.md', 'exec'), {})


def test_there_are_blocks_and_they_name_what_the_package_has():
  assert len(BLOCKS) == README.count('```python') >= 3
  assert [name for block in BLOCKS for name in absent(block)] == []


def test_modules_exist():
  modules = set(re.findall(r'-m (experiments\.\w+|benchmarks\.\w+)', COMMANDS))
  assert len(modules) > 3
  assert [module for module in modules if not (ROOT / f'{module.replace(".", "/")}.py').is_file()] == []


def test_flags_exist():
  from experiments import classification, navigation, processes, regression, resuming

  configs = classification.Config, regression.Config, navigation.Config, resuming.Keeping, processes.Machines
  known = {name for config in configs for name in config.__dataclass_fields__} | {
    'workdir',
    'config',
    'help',
    'helpfull',
    'overwrite',
    'network',
    'adjoint',
  }
  known |= {'support', 'query', 'out', 'model', 'transductive', 'copy-to', 'move-to', 'min-probability', 'min-likeness'}
  named = set(re.findall(r'--([a-z][a-z_0-9-]*)', COMMANDS))
  assert sorted(name for name in named if name not in known and name.removeprefix('no') not in known) == []


def test_the_table_of_flags_is_right():
  from experiments import classification, large_learners, navigation, regression

  modules = dict(
    classification=classification, navigation=navigation, regression=regression, large_learners=large_learners
  )
  rows = re.findall(r'^\| `(--.*?)` \| ([a-z_, ]+) \|$', EXPERIMENTS, re.MULTILINE)
  assert len(rows) == 4
  for flags, names in rows:
    taken = {
      name
      for name, module in modules.items()
      if set(flags.replace('--', '').split()) <= {*module.Config.__dataclass_fields__, 'workdir'}
    }
    assert taken == (set(modules) if names == 'all' else set(names.split(', ')))


def test_links_lead_somewhere():
  links = re.findall(r'\]\(((?!https?:)[^)#]+)\)', README)
  assert len(links) > 10
  assert [link for link in links if not (ROOT / link).exists()] == []


def test_citations_name_this_version():
  said = re.findall(r'^version: (.+)$', (ROOT / 'CITATION.cff').read_text(), re.MULTILINE)
  assert said == re.findall(r'version = \{(.+?)\}', README) == [ms.__version__]
