"""Some hostile files for each reader and some random values for functions, the same ones each time.

`make fuzz` takes ten thousand others of both.
"""

import collections
import random

import pytest
from fuzz.random_values import run
from fuzz.reader import attempt, trees_of
from fuzz.readers import READERS
from fuzz.values import KINDS
from hypothesis import HealthCheck, Phase, given, settings, strategies as st

EXAMPLES = {'omniglot.load, archives': 4, 'cifar_fs.load, archives': 4}


@pytest.mark.parametrize('reader', READERS, ids=lambda reader: reader.name)
def test_valid_files_are_accepted(reader):
  for tree in trees_of(reader):
    assert attempt(reader, random.Random(0), tree=tree) is None


@pytest.mark.parametrize('reader', READERS, ids=lambda reader: reader.name)
def test_changed_files_are_accepted_or_refused_in_a_sentence(reader):
  @settings(
    max_examples=EXAMPLES.get(reader.name, 25),
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
  )
  @given(st.randoms(use_true_random=False))
  def read(rng):
    attempt(reader, rng)

  trees_of(reader)
  read()


@pytest.mark.parametrize(
  'name', [pytest.param(name, marks=[pytest.mark.slow] if name == 'derivatives' else []) for name in KINDS]
)
def test_values_give_what_an_oracle_says_or_are_refused(name):
  counts = collections.Counter()
  run(KINDS[name], 3 if name == 'derivatives' else 10, 0, counts)
  assert counts['accepted'] > 0
