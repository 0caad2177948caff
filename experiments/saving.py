"""Writes the models that the classification experiment trains, for `metasgd predict` and `FewShotClassifier`."""

import dataclasses
from collections.abc import Sequence
from typing import Any, cast

import metasgd_jax as ms
from experiments import options, running
from experiments.few_shot_data import CHARACTERS
from experiments.few_shot_learners import maml_rate
from experiments.few_shot_testing import Judged
from experiments.few_shot_training import Setup
from experiments.reporting import percent
from metasgd_jax.io import provenance
from metasgd_jax.io.files import PathLike

MODEL_FACTS = (
  *('dataset', 'split', 'split_seed', 'validation_classes', 'way', 'shot', 'query', 'meta_batch', 'meta_iterations'),
  *('learning_rate', 'schedule', 'alpha', 'seed', 'eval_seed', 'eval_tasks', 'eval_query', 'inductive', 'augmentation'),
  *('precision', 'multi_step_loss', 'clip', 'validate_every'),
)
"""Settings that a model file contains, in addition to the accuracies."""

OF_EPISODES = ('shot', 'query', 'meta_batch', 'inductive')
"""Settings that joint training, which has no episodes, does not use."""

SAVED = ('meta_sgd', 'maml', 'prototypical', 'joint')
"""Learners whose models are written to files for `metasgd predict`, `FewShotClassifier`, `--evaluate` and `--start`.

For the learner 'joint', the file contains the embedding, as a prototypical model.
"""


TERMS = {
  'mini_imagenet': 'trained on images of ImageNet, whose terms allow non-commercial research and education: '
  'https://image-net.org/download'
}
"""What a model file says about the terms of its data set, by name of the data set."""


def is_saved(name: str, config: Any) -> bool:
  """Returns whether the model of a learner is written to a file."""
  return name in SAVED and config.ensemble == 1 and not config.alpha_by_step and config.network == 'conv4'


def save_model(
  path: PathLike,
  name: str,
  meta: Any,
  temperature: float,
  likeness: tuple[float, float] | None,
  tests: Sequence[Judged],
  config: Any,
  setup: Setup,
) -> None:
  """Writes the model of the first run to a file. `likeness` is its `ModelConfig.least_likeness`."""
  places: dict[str, Any] = {'data_dir': 'DIR', 'class_lists': 'DIR', 'archives': None, 'cache': None, 'start': 'FILE'}
  # A model file may be published, so it has no private paths.
  public = dataclasses.replace(config, **{k: v for k, v in places.items() if getattr(config, k)})
  training = running.settings(config, *MODEL_FACTS) | provenance.collect()
  training['command'] = f'python -m experiments.classification {options.as_flags(public)}'
  if config.dataset in TERMS:
    training['terms'] = TERMS[config.dataset]
  if name == 'joint':  # The tests are those of gradient descent on the support, which the file cannot do.
    name, meta, temperature, tests = 'prototypical', meta.theta, 1.0, []
    training = {name: fact for name, fact in training.items() if name not in OF_EPISODES} | {'learner': 'joint'}
  for result, errors in tests:
    first, mode = dataclasses.replace(result, values=result.values[:1]), result.about['batch_norm']
    training[f'accuracy_{result.about["test_shot"]}_shot_{mode}'] = percent(first.estimate)
    if mode == 'inductive':
      found, uncalibrated = (f'{100 * error:.1f}' for error in errors.values())
      what = f'{found} percentage points, {uncalibrated} without the temperature'
      training[f'calibration_error_{result.about["test_shot"]}_shot'] = what
  alpha = maml_rate(name, config) if name == 'maml' else None
  background: Any = 'dark' if config.dataset in CHARACTERS else 'any'
  filters, hidden = config.sizes
  if name == 'prototypical':
    sizes = config.way, setup.image_shape, filters, 0, 0
  else:
    sizes = config.way, setup.image_shape, filters, hidden, config.inner_steps
  about = ms.ModelConfig(cast(Any, name), *sizes, alpha, background, temperature, likeness, training)
  ms.save_model(path, ms.FewShotModel(about, meta))
