"""The examples in docstrings give what they say.

Those that compile for more than half a second each are marked slow.
"""

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

PACKAGE = pathlib.Path(ms.__file__).parent
NAMES = {'jax': jax, 'jnp': jnp, 'ms': ms, 'np': np, 'optax': optax}  # What every example may use.
DEAR = {  # Docstrings, without the package's name.
  'deploy.classifier.FewShotClassifier', 'deploy.export.export_learner', 'deploy.export.export_model',
  'learners.ensemble.ensemble', 'learners.fine_tuning.fine_tuning', 'learners.mann.MemoryCell',
  'learners.mann.PlainCell', 'learners.mann.mann', 'learners.matching.matching', 'learners.meta_lstm.meta_lstm',
  'nn.block.ConvBlock', 'nn.networks.Conv4', 'nn.transformer.Transformer',
  'outer.evaluation.evaluate', 'outer.memory.plan_memory', 'outer.objective.mean_loss',
  'outer.objective.mean_loss_and_grad', 'outer.loop.Progress', 'outer.loop.TrainState', 'outer.training.train',
  'outer.training.train_step', 'rl.advantages.advantages',
  'rl.gymnasium_host.collect_on_host', 'rl.gymnasium_host.policy_gradient_on_host', 'rl.learner.Experience',
  'rl.learner.PolicyGradient', 'rl.learner.RolloutRequest', 'rl.learner.mean_return', 'rl.learner.policy_learner',
  'rl.learner.returns_by_step', 'rl.meta_step.trpo_meta_step', 'rl.training.train', 'rl.trpo.fisher_product',
  'rl.trpo.trpo_update', 'tasks.augmentation.augmented', 'tasks.few_shot.all_classes', 'tasks.few_shot.few_shot',
  'tasks.few_shot.few_shot_from', 'tasks.glyphs.glyphs', 'tasks.markov.MarkovConfig', 'tasks.markov.markov_chains',
  'types.TaskStream',
}  # fmt: skip


def examples():
  """Each docstring of the package with examples, by its name."""
  found = {}
  for path in sorted(PACKAGE.rglob('*.py')):
    if '>>>' not in path.read_text():
      continue
    module = importlib.import_module(
      '.'.join(path.relative_to(PACKAGE.parent).with_suffix('').parts).removesuffix('.__init__')
    )
    for test in doctest.DocTestFinder(exclude_empty=True).find(module, extraglobs=NAMES):
      if test.examples:
        found[test.name] = test
  return found


EXAMPLES = examples()


def test_every_example_is_python():
  for name, test in EXAMPLES.items():
    for example in test.examples:
      compile(example.source, name, 'single')


def test_the_dear_ones_are_there():
  assert sorted(f'metasgd_jax.{name}' for name in DEAR if f'metasgd_jax.{name}' not in EXAMPLES) == []


@pytest.mark.parametrize(
  'test',
  [
    pytest.param(test, id=name, marks=[pytest.mark.slow] if name.removeprefix('metasgd_jax.') in DEAR else [])
    for name, test in EXAMPLES.items()
  ],
)
def test_example_gives_what_it_says(test):
  told = io.StringIO()
  test.globs = dict(NAMES)  # An example stands by itself: it sees nothing else of its module.
  with jax.numpy_rank_promotion('allow'):  # As it is outside of this suite.
    failed, tried = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS, verbose=False).run(test, out=told.write)
  assert tried
  assert not failed, told.getvalue()
