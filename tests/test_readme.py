"""What the README shows can be run as it stands."""

import pathlib
import re

import jax
import pytest

README = (pathlib.Path(__file__).resolve().parents[1] / 'README.md').read_text()
BLOCKS = re.findall(r'```python\n(.*?)```', README, re.DOTALL)


@pytest.mark.parametrize('block', BLOCKS, ids=lambda block: block.splitlines()[-1][:40])
def test_python_runs(block):
  with jax.numpy_rank_promotion('allow'):  # As it is outside of this suite.
    exec(compile(block.replace('60_000', '20'), 'README.md', 'exec'), {})


def test_there_are_blocks():
  assert len(BLOCKS) == README.count('```python') >= 4


@pytest.mark.parametrize('module', re.findall(r'-m (experiments\.\w+|benchmarks\.\w+)', README))
def test_modules_exist(module):
  assert (pathlib.Path(__file__).parents[1] / f'{module.replace(".", "/")}.py').is_file()


def test_flags_exist():
  from experiments import classification, navigation, regression, resuming

  configs = classification.Config, regression.Config, navigation.Config, resuming.Keeping
  known = {name for config in configs for name in config.__dataclass_fields__} | {'workdir', 'help'}
  known |= {'support', 'query', 'out', 'model', 'transductive'}
  for name in set(re.findall(r'--([a-z_0-9]+)', README)):
    assert name in known or name.removeprefix('no') in known, name
