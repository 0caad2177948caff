"""The examples in docstrings give what they say."""

import doctest
import importlib
import io
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metasgd_jax as ms

ROOT = pathlib.Path(__file__).resolve().parents[1]
NAMES = {'jax': jax, 'jnp': jnp, 'ms': ms, 'np': np, 'optax': optax}  # What every example may use.


def examples():
  """Each docstring of the package with examples, by its name."""
  found = {}
  for path in sorted((ROOT / 'metasgd_jax').rglob('*.py')):
    if '>>>' not in path.read_text():
      continue
    module = importlib.import_module('.'.join(path.relative_to(ROOT).with_suffix('').parts).removesuffix('.__init__'))
    for test in doctest.DocTestFinder(exclude_empty=True).find(module, extraglobs=NAMES):
      if test.examples:
        found[test.name] = test
  return found


EXAMPLES = examples()
MOST_USED = (
  'adaptation.adapt', 'adaptation.adapt_path', 'adaptation.init_alpha', 'learners.meta_sgd.meta_sgd',
  'learners.maml.maml', 'training.init', 'training.train', 'training.train_step', 'evaluation.evaluate',
  'evaluation.estimate', 'partial.partly', 'partial.low_rank', 'memory_plan.plan_memory', 'tasks.sinusoid.sinusoid',
  'tasks.few_shot.few_shot', 'tasks.few_shot.class_bank', 'nn.networks.MLP', 'nn.networks.Conv4',
  'nn.networks.from_linen', 'losses.mean_squared_error', 'losses.cross_entropy', 'losses.accuracy',
  'sharding.task_mesh', 'classifier.FewShotClassifier', 'types.Model', 'types.TaskDistribution',
)  # fmt: skip


@pytest.mark.parametrize('test', [pytest.param(test, id=name) for name, test in EXAMPLES.items()])
def test_example_gives_what_it_says(test):
  told = io.StringIO()
  test.globs = dict(NAMES)  # An example stands by itself: it sees nothing else of its module.
  with jax.numpy_rank_promotion('allow'):  # As it is outside of this suite.
    failed, tried = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS, verbose=False).run(test, out=told.write)
  assert tried
  assert not failed, told.getvalue()


@pytest.mark.parametrize('name', MOST_USED)
def test_what_is_most_used_has_an_example(name):
  assert f'metasgd_jax.{name}' in EXAMPLES
