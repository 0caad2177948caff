"""Tests the learners of a configuration for few-shot classification on unseen tasks, and fits their temperatures."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

import metasgd_jax as ms
from experiments import calibration, few_shot_data, reporting, running
from experiments.few_shot_learners import DRAWINGS, NAMES, SEQUENTIAL, classifier_or_embedding
from experiments.few_shot_training import Setup, build_tester, validate, validation_way
from experiments.reporting import WARNING, Result, percent
from metasgd_jax.datasets.messages import printable
from metasgd_jax.deploy import likeness
from metasgd_jax.types import equal_partial

BATCH_NORM = {
  'none': 'no batch norm',
  'transductive': 'batch norm by the statistics of the batch',
  'inductive': 'batch norm by the statistics of the support',
}


class Judged(NamedTuple):
  """The result of a test.

  Attributes:
    result: Accuracies.
    errors: Calibration errors of the first run, from `calibration.calibration_errors`.
  """

  result: Result
  errors: dict[str, float]


def judge(name: str, meta: Any, shot: int, config: Any, setup: Setup, temperature: float) -> list[Judged]:
  """Tests on unseen tasks. Returns the test with transductive batch norm and then the one with inductive batch norm.

  Sequential learners have no batch norm, so for them the list has only one test. `temperature` is that of the first
  run, whose calibration errors are measured.
  """
  found = []
  modes = {'none': False} if name in SEQUENTIAL else {'transductive': False, 'inductive': True}
  metric = equal_partial(calibration.accuracy_and_gaps, temperature=temperature)
  for mode, inductive in modes.items():
    logging.info('%s: %d shot, batch norm %s', NAMES[name], shot, mode)
    tester, tasks, metas = setup.testers[name, inductive], setup.tests[shot], running.each_run(meta)
    values = running.evaluate(tester, metas, tasks, config, setup.devices, metric_fn=metric)
    about = {'dataset': config.dataset, 'learner': name, 'way': config.way, 'shot': config.shot, 'test_shot': shot}
    result = Result({**about, 'batch_norm': mode}, values[..., 0])
    found.append(Judged(result, calibration.calibration_errors(values[0, :, -1, 1:])))
  return found


def temperature(name: str, meta: Any, config: Any, setup: Setup) -> float:
  """Returns the temperature that suits one run best on validation classes, with inductive batch norm.

  The tasks have the ways of the validation and the shots of the test. For glyphs they are generated, as for
  `--validate_every`. The temperature is 1 if the data set has no validation classes, if a validation class has too few
  images for these tasks, or if the predictions are not finite, of which a warning is printed.
  """
  bank, way = setup.data.validation, validation_way(config, setup.data)
  sizes = dict(way=way, query=config.eval_query)
  if setup.data.train is not None and not few_shot_data.serves(bank, shot=max(config.test_shots), **sizes):
    return 1.0
  tester = calibration.last_step(build_tester(name, config, inductive=name not in SEQUENTIAL, way=way))
  values = []
  for shot in config.test_shots:
    tasks = few_shot_data.tasks(bank, way, shot=shot, query=config.eval_query)
    values.append(validate(tester, meta, tasks, calibration.with_labels, config, setup))
  try:
    return calibration.best_temperature(*calibration.split(np.concatenate(values)))
  except ValueError as e:
    print(f'{WARNING}{NAMES[name]}: {e}; its temperature stays 1')
    return 1.0


def least_likeness(name: str, meta: Any, config: Any, setup: Setup) -> tuple[float, float] | None:
  """Returns `ModelConfig.least_likeness` of one run, measured on validation classes with one and five shots.

  It is `None` if states are not validated, if the validation classes have too few images, or if a likeness is not
  finite.
  """
  bank, way = setup.data.validation, validation_way(config, setup.data)
  sizes = dict(way=way, query=config.eval_query)
  if setup.validation is None or not (bank is None or few_shot_data.serves(bank, shot=5, **sizes)):
    return None
  tester = build_tester(name, config, inductive=True, way=way)
  tester = _with_likeness(tester, classifier_or_embedding(name, config), way)
  least = []
  for shot in (1, 5):
    tasks = few_shot_data.tasks(bank, way, shot=shot, query=config.eval_query)
    found = validate(tester, meta, tasks, _outputs, config, setup)
    least.append(float(np.quantile(found, 0.01)))
  one, five = least
  return (one, five) if np.isfinite(one + five) else None


def _with_likeness(learner: ms.Learner, model: ms.Model, way: int) -> ms.Learner:
  """Returns a learner whose outputs are the likeness of each query image to the classes of the support, `[Q]`."""
  adapt = equal_partial(_adapt, adapt=learner.adapt, model=model, way=way)
  return calibration.last_step(learner._replace(adapt=adapt, predict=equal_partial(_likeness, model=model)))


def _adapt(meta, support, key, *, adapt, model, way):
  adapted = adapt(meta, support, key)
  return adapted, likeness.class_means(model, adapted, support, way)


def _likeness(adapted_and_means, x, *, model):
  adapted, means = adapted_and_means
  return likeness.likeness(model, adapted, means, x)


def _outputs(outputs, targets):
  del targets
  return outputs


def sentence(result: Result, config: Any, *, of: str = '', tasks: str = 'unseen tasks', training: str = '') -> str:
  """Returns the sentence that is printed about a test.

  Args:
    result: Accuracies.
    config: Configuration of the test.
    of: Words after the name of the learner.
    tasks: Words for the tasks.
    training: Words about the training, which begin with a semicolon.
  """
  about, steps = result.about, result.values.shape[-1] - 1
  before = f' after {steps} inner step(s), {100 * result.values[..., 0].mean():.2f}% before' if steps else ''
  over_runs = f', ±{100 * result.over_runs.ci95:.2f} over training runs' if len(result.values) > 1 else ''
  return (
    f'{NAMES[about["learner"]]}{of}, {config.dataset}, {config.way}-way {about["test_shot"]}-shot: '
    f'{percent(result.estimate)}{before}; 95% interval over {config.eval_tasks} {tasks}{over_runs}{training}; '
    f'{BATCH_NORM[about["batch_norm"]]}'
  )


def by_instance(name: str, meta: Any, config: Any, setup: Setup) -> np.ndarray:
  """Returns the accuracies on the 1st, 2nd, …, n-th item of a class in a sequence, as means over sequences: `[n]`.

  The classes are unseen. Only the first training run is tested. If it trained an ensemble, only the best member is
  tested.
  """
  sequences = few_shot_data.tasks(setup.data.test, config.way, shot=1, query=DRAWINGS - 1)
  best = reporting.one_run(meta, 0)
  if config.ensemble > 1:
    best = reporting.one_run(best, 0)
  keys = jax.random.split(reporting.test_keys(config.eval_seed)[0], (config.eval_tasks, 3))
  ready = sequences.prepare(lambda: (keys[:, 0], keys[:, 1]))
  values = np.asarray(_by_instance(best, ready, tuple(keys.T), learner=setup.learners[name])).mean(0)
  shown = ', '.join(f'{100 * v:.1f}' for v in values)
  print(f'{NAMES[name]}: accuracy at the 1st, 2nd, … item of a class, in percent: {shown}')
  return values


@functools.partial(jax.jit, static_argnames='learner')
def _by_instance(meta, sequences, keys, *, learner):
  """Returns the accuracy at the 1st, 2nd, …, n-th item of a class in each of T sequences: `[T, n]`."""

  def of_sequence(keys):
    sample_key, episode_key, order_key = keys
    episode = sequences.episode(sequences.sample(sample_key), episode_key)
    info = learner.loss(meta, episode, order_key)[1]
    return jnp.stack([info[f'instance_{n}'] for n in range(1, DRAWINGS + 1)])

  return jax.lax.map(of_sequence, keys)


def draw_task(name: str, meta: Any, config: Any, setup: Setup, negative: bool, plotting):
  """Returns a figure of one task of the test, with the predictions of the model from the first run.

  `negative` is as in `plotting.episode_sheet`.
  """
  keys = jax.random.split(reporting.test_keys(config.eval_seed)[1], 3)
  tasks = setup.tests[config.test_shots[0]].prepare(lambda: (keys[:1], keys[1:2]))
  found = _answered(setup.testers[name, False], reporting.one_run(meta, 0), tasks, *keys)
  return plotting.episode_sheet(*jax.device_get(found), negative=negative, names=_names(config, setup, keys[0]))


def _names(config: Any, setup: Setup, task_key: Any) -> list[str] | None:
  """Returns the names of the classes of a task, if the test classes have names."""
  if setup.data.test is None or not setup.data.test_names:
    return None
  indices = ms.tasks.image_indices(setup.data.test, way=config.way, shot=1, query=1)
  return [printable(setup.data.test_names[i]) for i in indices.sample(task_key)]


@functools.partial(jax.jit, static_argnums=0)
def _answered(learner, meta, tasks, task_key, episode_key, adapt_key):
  support, query = tasks.episode(tasks.sample(task_key), episode_key)
  return support, query, learner.predict(learner.adapt(meta, support, adapt_key), query.x)
