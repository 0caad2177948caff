"""Builds, trains and validates the learners of a configuration for few-shot classification."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging

import metasgd_jax as ms
from experiments import (
  few_shot_data,
  few_shot_learners,
  processes,
  reporting,
  resuming,
  running,
  trainings,
)
from experiments.few_shot_learners import NAMES, SEQUENTIAL, UNTRAINED, build_learner, build_optimizer
from experiments.trainings import Best
from metasgd_jax import tree
from metasgd_jax.types import Tasks


class Setup(NamedTuple):
  """The objects that a configuration describes.

  Attributes:
    data: Class banks.
    train: Training tasks, by name of the learner.
    learners: Learners for training, by name.
    testers: Learners for testing, by (name, whether batch norm is inductive). If `ensemble` is more than 1, they are
      ensembles.
    optimizers: Outer optimisers, by name of the learner.
    tests: Unseen tasks, by number of shots.
    validation: Tasks of the validation classes, or `None` if there is no validation.
    start: Model that training starts from, or `None` if the learner initialises its meta-parameters.
    devices: Number of devices of each process that share the tasks, or `None` for as many as possible.
  """

  data: few_shot_data.Data
  train: dict[str, Tasks]
  learners: dict[str, ms.Learner]
  testers: dict[tuple[str, bool], ms.Learner]
  optimizers: dict[str, optax.GradientTransformation]
  tests: dict[int, Tasks]
  validation: Tasks | None
  start: ms.FewShotModel | None
  devices: int | None

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """Returns `(H, W, D)`."""
    return few_shot_data.image_shape(self.data)


def build(config: Any, data: few_shot_data.Data | None = None, devices: int | None = None) -> Setup:
  """Builds tasks, learners and optimisers. If `data` is `None`, the data set is loaded.

  Raises:
    ValueError: if the configuration does not fit the data, or if the devices cannot share the tasks of a meta-iteration
      evenly.
    DatasetError: if the data set cannot be loaded.
  """
  data = few_shot_data.placed(data or few_shot_data.load(config), config.stream)
  if config.validate_every and data.train is not None and data.validation is None:
    advice = 'give --validation_classes=100 or --split=vinyals'
    raise ValueError(f'validate_every={config.validate_every} needs validation classes, got none; {advice}')
  names, classes = config.learners, 2 if data.train is None else len(data.train.sizes)
  unseen, way = functools.partial(few_shot_data.tasks, query=config.eval_query), validation_way(config, data)
  setup = Setup(
    data=data,
    train={name: few_shot_learners.build_training_tasks(name, config, data) for name in names},
    learners={name: build_learner(name, config, classes=classes) for name in names},
    testers={
      (name, inductive): build_tester(name, config, inductive=inductive)
      for name in names
      for inductive in (False, True)
    },
    optimizers={name: trainings.optimizer_of(config, build_optimizer(name, config)) for name in names},
    tests={shot: unseen(data.test, config.way, shot=shot) for shot in config.test_shots},
    validation=unseen(data.validation, way, shot=config.shot) if config.validate_every else None,
    start=None if config.start is None else _load_start(config, data),
    devices=devices,
  )
  plan(config, setup)  # Raises ValueError if the devices cannot share the tasks.
  return setup


def build_tester(name: str, config: Any, *, inductive: bool, way: int | None = None) -> ms.Learner:
  """Returns the learner for testing, which is an ensemble if `config.ensemble` is more than 1."""
  learner = build_learner(name, config, test=True, inductive=inductive, way=way)
  return ms.learners.ensemble(learner) if config.ensemble > 1 else learner


def validation_way(config: Any, data: few_shot_data.Data) -> int:
  """Returns the number of ways in validation, which is lower than in training if there are fewer validation classes.

  Learners that read sequences have a fixed number of ways.
  """
  if data.validation is None or set(config.learners) & set(SEQUENTIAL):
    return config.way
  return few_shot_data.validation_way(config.way, len(data.validation.sizes))


def _load_start(config: Any, data: few_shot_data.Data) -> ms.FewShotModel:
  """Returns the model `config.start`. Raises ValueError if a learner of the configuration cannot start from it."""
  model, shape = ms.load_model(config.start), few_shot_data.image_shape(data)
  about = model.config
  theirs: tuple[Any, ...]
  ours: tuple[Any, ...]
  if about.learner == 'prototypical':  # An embedding serves any number of ways, and images of any size.
    names, theirs, ours = '(filters, channels)', (about.filters, about.image_shape[2]), (config.sizes[0], shape[2])
  else:
    names = '(learner, way, filters, hidden, image_shape)'
    theirs = about.learner, about.way, about.filters, about.hidden, about.image_shape
    ours = ','.join(config.learners), config.way, *config.sizes, shape
    if config.alpha_by_step:
      raise ValueError(f'start={config.start} has no rates by step, got alpha_by_step=True; leave out alpha_by_step')
  if theirs != ours:
    raise ValueError(
      f'start={config.start} does not fit this run: the model has {names} = {theirs}, and this run has {ours}; set '
      'these to the values of the model'
    )
  return model


def plan(config: Any, setup: Setup) -> list[trainings.Training]:
  """Returns the trainings of the configuration: R runs of each learner, except of the learners in `UNTRAINED`."""
  names = [name for name in config.learners if name not in UNTRAINED]
  return [_training(name, r, config, setup) for name in names for r in range(config.seeds)]


def _training(name: str, r: int, config: Any, setup: Setup) -> trainings.Training:
  batch = few_shot_learners.meta_batch(name, config)
  at_once: Any = config.tasks_at_once or 'auto'
  if name in (*SEQUENTIAL, 'joint'):
    at_once = 'all' if name in SEQUENTIAL else 'auto'
  placement = ms.Placement(at_once, ms.sharding.task_mesh(batch, devices=setup.devices))
  placement.group((), batch // placement.devices)  # Raises ValueError if the tasks cannot be split into groups.
  most = running.chunk(config, 50)
  label = NAMES[name] + (f' run {r + 1} of {config.seeds}' if config.seeds > 1 else '')
  training = trainings.by_gradient(
    f'{name}_run{r}',
    label,
    functools.partial(_first_state, name, r, config, setup),
    setup.train[name],
    learner=setup.learners[name],
    optimizer=setup.optimizers[name],
    meta_iterations=config.meta_iterations,
    meta_batch=batch,
    chunk=max(n for n in range(1, most + 1) if config.validate_every % n == 0),
    placement=placement,
  )
  if setup.validation is None:
    return training
  return dataclasses.replace(training, best=functools.partial(_best, name, label, config, setup))


def _first_state(name: str, r: int, config: Any, setup: Setup) -> ms.TrainState:
  key = reporting.seed_keys(config.seed, config.seeds)[r]
  state = ms.init(key, setup.train[name], learner=setup.learners[name], optimizer=setup.optimizers[name])
  return state if setup.start is None else state._replace(meta=_started(state.meta, setup.start))


def _started(meta: Any, model: ms.FewShotModel) -> Any:
  """Returns the meta-parameters of a model.

  If the model is a prototypical one and `meta` is not, it returns `meta` with the model's embedding in θ. The layers
  after the embedding and α stay as they are.
  """
  structures: list[Any] = [jax.tree.structure(one) for one in (meta, model.meta)]
  if structures[0] == structures[1]:
    return jax.tree.map(jnp.asarray, model.meta)
  theta = tree.named_arrays(meta.theta) | tree.named_arrays(model.meta)
  return meta._replace(theta=tree.from_named_arrays(theta, meta.theta))


def train(name: str, config: Any, setup: Setup, run: resuming.Run) -> tuple[Any, Any, dict[str, Any]]:
  """Trains R runs of a learner, one after the other. Networks of this size do not train faster side by side.

  Returns:
    The meta-parameters with a leading axis `[R]`, the curves of the runs, and a dict with the numbers of skipped steps.
    The dict becomes a part of the row in results.json. If the learner needs no training, the curves are `None`.
  """
  if name in UNTRAINED:
    run.begin()
    metas = [_members([_first_state(name, r, config, setup).meta], config) for r in range(config.seeds)]
    return _stacked(metas), None, {}
  found = [trainings.train(_training(name, r, config, setup), run) for r in range(config.seeds)]
  metas = [_members(one.best or [one.state.meta], config) for one in found]
  together = running.joined(found)
  return _stacked(metas), together.curves, together.skipped


def _members(metas: Sequence[Any], config: Any) -> Any:
  """Returns the first of `metas`, which is the best, or for an ensemble all of them, stacked along an axis `[E]`."""
  return metas[0] if config.ensemble == 1 else _stacked(metas)


def _stacked(trees: Sequence[Any]) -> Any:
  return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def _best(name: str, label: str, config: Any, setup: Setup, run: resuming.Run) -> Best:
  """Returns the callback that validates a training and reports the accuracy."""
  tasks: Any = setup.validation
  way = validation_way(config, setup.data)
  validator = build_learner(name, config, test=True, way=way)  # Equal learners share their programs.
  of_ways = '' if way == config.way else f' in {way} ways'

  def judge(step: int, meta: Any) -> float:
    values = validate(validator, meta, tasks, ms.losses.accuracy, config, setup)
    accuracy = float(values[:, -1].mean())
    logging.info('%s: validation accuracy%s %.2f%% at meta-iteration %d', label, of_ways, 100 * accuracy, step)
    for writer in run.metrics:
      writer.write(label, step, {'validation_accuracy': accuracy})
    return accuracy

  return Best(judge, config.validate_every, config.ensemble)


def validate(learner: ms.Learner, meta: Any, tasks: Tasks, metric_fn: Any, config: Any, setup: Setup) -> np.ndarray:
  """Returns the metric of one run on the same tasks of validation classes in every call, `[T, k + 1, …]`."""
  key, count = reporting.test_keys(config.eval_seed + 1)[0], min(config.eval_tasks, 200)
  placement = ms.Placement(mesh=processes.mesh_to_judge(count, setup.devices))
  return ms.evaluate(learner, meta, tasks, key, metric_fn=metric_fn, num_tasks=count, placement=placement)[:, 0]
