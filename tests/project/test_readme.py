"""What the README shows can be run as it stands."""

import pathlib
import re

import jax
import pytest
from source import absent

ROOT = pathlib.Path(__file__).resolve().parents[2]
README = (ROOT / 'README.md').read_text()
COMMANDS = README + (ROOT / 'docs' / 'results.md').read_text()
BLOCKS = re.findall(r'```python\n(.*?)```', README, re.DOTALL)


def runs(block):
  """A block as a case; reinforcement learning's compiles for seconds."""
  marks = [pytest.mark.slow] if 'import rl' in block else []
  return pytest.param(block, id=block.splitlines()[-1][:40], marks=marks)


@pytest.mark.parametrize('block', [runs(block) for block in BLOCKS])
def test_python_runs(block):
  with jax.numpy_rank_promotion('allow'):  # As it is outside of this suite.
    exec(compile(block.replace('60_000', '20'), 'README.md', 'exec'), {})


def test_there_are_blocks_and_they_name_what_the_package_has():
  assert len(BLOCKS) == README.count('```python') >= 4
  assert [name for block in BLOCKS for name in absent(block)] == []


def test_modules_exist():
  modules = set(re.findall(r'-m (experiments\.\w+|benchmarks\.\w+)', COMMANDS))
  assert len(modules) > 3
  assert [module for module in modules if not (ROOT / f'{module.replace(".", "/")}.py').is_file()] == []


def test_flags_exist():
  from experiments import classification, navigation, processes, regression, resuming

  configs = classification.Config, regression.Config, navigation.Config, resuming.Keeping, processes.Machines
  known = {name for config in configs for name in config.__dataclass_fields__} | {'workdir', 'config', 'help'}
  known |= {'support', 'query', 'out', 'model', 'transductive', 'copy-to', 'move-to', 'min-probability', 'min-likeness'}
  named = set(re.findall(r'--([a-z][a-z_0-9-]*)', COMMANDS))
  assert sorted(name for name in named if name not in known and name.removeprefix('no') not in known) == []


def test_the_flags_that_all_take_are_those_of_all():
  from experiments import classification, large_learners, navigation, regression

  three = [classification.Config, navigation.Config, regression.Config]
  for words, configs in {
    r'All take `(.*?)`': [*three, large_learners.Config],
    r"the paper's three `(.*?)`": three,
    r'those with shots `(.*?)`': [classification.Config, regression.Config],
  }.items():
    flags = re.findall(r'--(\w+)', re.search(words, README, re.DOTALL)[1])
    assert flags
    for config in configs:
      assert {*flags} <= {*config.__dataclass_fields__, 'workdir'}


def test_links_lead_somewhere():
  links = re.findall(r'\]\(((?!https?:)[^)#]+)\)', README)
  assert len(links) > 10
  assert [link for link in links if not (ROOT / link).exists()] == []
