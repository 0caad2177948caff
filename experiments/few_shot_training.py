"""Few-shot classification from a configuration: what it stands for is built, trained, validated and tested here."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging

import metasgd_jax as ms
from experiments import few_shot_data, few_shot_learners, processes, reporting, trainings
from experiments.few_shot_learners import NAMES, SEQUENTIAL, UNTRAINED, build_learner, build_optimizer
from experiments.reporting import test_keys
from experiments.resuming import Run
from experiments.trainings import Training
from metasgd_jax.io import writers
from metasgd_jax.outer import sharding
from metasgd_jax.outer.placement import TasksAtOnce
from metasgd_jax.types import Tasks

Config = Any
"""`classification.Config`."""


@dataclasses.dataclass(frozen=True)
class Setup:
  """What a configuration stands for, built and checked.

  Attributes:
    data: banks of classes.
    train: tasks to train on, by learner.
    learners: as trained, by name.
    validators: as validated, by name, with the batch norm of training.
    testers: as tested, by name and whether batch norm is inductive; of an ensemble where that is asked for.
    optimizers: the outer ones, by learner.
    tests: unseen tasks, by shots.
    validation: tasks of other classes; `None` without.
    start: what training starts from; `None` for what the learner draws.
    devices: of each process, to share tasks; `None` for as many as can.
  """

  data: few_shot_data.Data
  train: dict[str, Tasks]
  learners: dict[str, ms.Learner]
  validators: dict[str, ms.Learner]
  testers: dict[tuple[str, bool], ms.Learner]
  optimizers: dict[str, optax.GradientTransformation]
  tests: dict[int, Tasks]
  validation: Tasks | None
  start: ms.MetaParams | None
  devices: int | None = None

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """Returns `(H, W, D)`; glyphs are 28×28 and grey."""
    height, width, channels = (28, 28, 1) if self.data.test is None else self.data.test.images.shape[1:]
    return height, width, channels


def build(config: Config, data: few_shot_data.Data | None = None, devices: int | None = None) -> Setup:
  """Builds tasks, learners and optimisers; reads the data set unless it is given.

  Raises:
    ValueError: settings that do not fit the data, or devices that cannot share a meta-iteration's tasks evenly.
    DatasetError: the data set cannot be had.
  """
  data = few_shot_data.placed(data or few_shot_data.load(config), config.stream)
  test = lambda bank, shot: few_shot_data.tasks(bank, config, shot=shot, query=config.eval_query)
  if config.validate_every and data.train is not None and data.validation is None:
    raise ValueError('validate_every needs classes to validate on; give --validation_classes=100, or --split=vinyals')
  for name in set(config.learners) - set(UNTRAINED):
    batch = few_shot_learners.meta_batch(name, config)
    placement = ms.Placement(_tasks_at_once(name, config), sharding.task_mesh(batch, devices=devices))
    placement.group((), batch // placement.devices)
  classes = 2 if data.train is None else len(data.train.sizes)
  together = ms.learners.ensemble if config.ensemble > 1 else lambda learner: learner
  return Setup(
    data,
    {name: few_shot_learners.build_training_tasks(name, config, data) for name in config.learners},
    {name: build_learner(name, config, classes=classes) for name in config.learners},
    {name: build_learner(name, config, test=True) for name in config.learners},
    {
      (name, inductive): together(build_learner(name, config, test=True, inductive=inductive))
      for name in config.learners
      for inductive in (False, True)
    },
    {name: trainings.optimizer_of(config, build_optimizer(name, config)) for name in config.learners},
    {shot: test(data.test, shot) for shot in config.test_shots},
    test(data.validation, config.shot) if config.validate_every else None,
    _start(config),
    devices,
  )


def _start(config: Config) -> ms.MetaParams | None:
  if config.start is None:
    return None
  model = ms.load_model(config.start)
  theirs = (model.config.learner, model.config.way, model.config.filters, model.config.hidden)
  ours = (config.learners[0], config.way, *config.sizes)
  if len(config.learners) > 1 or theirs != ours or config.alpha_by_step:
    raise ValueError(
      f'{config.start} is a model of (learner, way, filters, hidden) = {theirs}, asked for {ours}; make them the same'
    )
  return model.meta


class Best:
  """A callback of `train` that keeps the checkpoints of the best validation accuracy.

  `found` is a list of (accuracy, step, meta), the best first.
  """

  def __init__(self, judge: Callable[[Any], float], every: int, keep: int, writer: Callable[[int, float], None]):
    """`judge` gives a meta's accuracy; it is asked each `every` meta-iterations, and `writer` is told."""
    self._judge, self._every, self.keep, self._writer, self._next = judge, every, keep, writer, every
    self.found: list[tuple[float, int, Any]] = []

  def resume(self, step: int, found: list[tuple[float, int, Any]]) -> None:
    """Goes on after a step, with the best so far."""
    self.found, self._next = found, (step // self._every + 1) * self._every

  def __call__(self, progress: ms.Progress) -> float | None:
    """Takes a chunk; returns its accuracy where it is asked for."""
    if progress.step < min(self._next, progress.total):
      return None
    self._next = progress.step + self._every
    meta = jax.device_get(progress.state.meta)
    accuracy = self._judge(meta)
    self._writer(progress.step, accuracy)
    self.found = sorted([*self.found, (accuracy, progress.step, meta)], key=lambda f: f[:2], reverse=True)[: self.keep]
    return accuracy


def plan(config: Config, setup: Setup) -> list[Training]:
  """Returns every training of the configuration, R of each learner that is trained, before it is trained."""
  return [_training(name, r, config, setup) for name in config.learners for r in _runs(name, config)]


def _runs(name: str, config: Config) -> range:
  return range(0 if name in UNTRAINED else config.seeds)


def _training(name: str, r: int, config: Config, setup: Setup) -> Training:
  learner, tasks, optimizer, batch = (
    setup.learners[name], setup.train[name], setup.optimizers[name], few_shot_learners.meta_batch(name, config)
  )  # fmt: skip
  label = NAMES[name] + (f' run {r + 1} of {config.seeds}' if config.seeds > 1 else '')
  return trainings.by_gradient(
    f'{name}_run{r}', label, functools.partial(_first_state, name, r, config, setup), tasks, learner=learner,
    optimizer=optimizer, meta_iterations=config.meta_iterations, meta_batch=batch,
    placement=ms.Placement(_tasks_at_once(name, config), sharding.task_mesh(batch, devices=setup.devices)),
    chunk=_chunk(config),
  )  # fmt: skip


def _tasks_at_once(name: str, config: Config) -> TasksAtOnce:
  if name in SEQUENTIAL:
    return 'all'
  return 'auto' if name == 'joint' else config.tasks_at_once or 'auto'


def _first_state(name: str, r: int, config: Config, setup: Setup) -> ms.TrainState:
  key = reporting.seed_keys(config.seed, config.seeds)[r]
  state = ms.init(key, setup.train[name], learner=setup.learners[name], optimizer=setup.optimizers[name])
  return state if setup.start is None else state._replace(meta=jax.tree.map(jnp.asarray, setup.start))


def train(name: str, config: Config, setup: Setup, run: Run):
  """Returns the meta of R runs, R in front, their curves, `None` without training, and what a row says of skips.

  They are trained one after the other; a network as large as this gains nothing from running them side by side.
  """
  if name in UNTRAINED:
    run.begin()
    metas = [_as_members([_first_state(name, r, config, setup).meta], config) for r in range(config.seeds)]
    return _stacked(metas), None, {}
  metas, curves, skipped = [], [], []
  for r in _runs(name, config):
    training = _training(name, r, config, setup)
    best = None
    if setup.validation:
      best = Best(
        functools.partial(_validate, name, config, setup), config.validate_every, config.ensemble,
        functools.partial(_report_validation, training.label, run.metrics),
      )  # fmt: skip
    logging.info('%s: compiling', training.label)
    found = trainings.train(training, run, best)
    members = [found.state.meta] if best is None else [meta for _, _, meta in best.found]
    metas.append(_as_members(members, config))
    curves.append(found.curves)
    skipped.append(found.skipped)
  together = {k: (steps, np.concatenate([c[k][1] for c in curves], 1)) for k, (steps, _) in curves[0].items()}
  return _stacked(metas), together, {k: np.stack([s[k] for s in skipped]) for k in skipped[0]}


def _stacked(metas: list[Any]) -> Any:
  return jax.tree.map(lambda *leaves: np.stack(leaves), *metas)


def _as_members(members: list[Any], config: Config) -> Any:
  """The best of them, or with an ensemble all of them, `[E]` in front."""
  return members[0] if config.ensemble == 1 else jax.tree.map(lambda *leaves: np.stack(leaves), *members)


def _chunk(config: Config) -> int:
  """Meta-iterations between callbacks: 50 at the most, 20 times a run at the least, and with each validation."""
  most = min(50, -(-config.meta_iterations // 20))
  if not config.validate_every:
    return most
  return max(n for n in range(1, most + 1) if config.validate_every % n == 0)


def _validate(name: str, config: Config, setup: Setup, meta) -> float:
  learner, tasks = setup.validators[name], setup.validation
  assert tasks is not None
  key, count = test_keys(config.eval_seed + 1)[0], min(config.eval_tasks, 200)
  placement = ms.Placement(mesh=processes.mesh_to_judge(count, setup.devices))
  values = ms.evaluate(learner, meta, tasks, key, metric_fn=ms.losses.accuracy, num_tasks=count, placement=placement)
  return float(values[:, 0, -1].mean())


def _report_validation(label: str, metrics: list[writers.Writer], step: int, accuracy: float) -> None:
  logging.info('%s: %.2f%% on classes to validate on, at %d', label, 100 * accuracy, step)
  for writer in metrics:
    writer.write(label, step, {'validation_accuracy': accuracy})


def judge(name: str, meta, shot: int, config: Config, setup: Setup) -> list[reporting.Result]:
  """Returns a result for each way of batch norm: the query together, and each item by the support's statistics."""
  results = []
  for inductive in (None,) if name in SEQUENTIAL else (False, True):
    mode = {None: 'none', False: 'transductive', True: 'inductive'}[inductive]
    logging.info('%s: testing on %d unseen tasks, %d shot, batch norm %s', NAMES[name], config.eval_tasks, shot, mode)
    values = [
      ms.evaluate(
        setup.testers[name, bool(inductive)], reporting.one_run(meta, r), setup.tests[shot],
        test_keys(config.eval_seed)[0], metric_fn=ms.losses.accuracy, num_tasks=config.eval_tasks,
        placement=ms.Placement(mesh=processes.mesh_to_judge(config.eval_tasks, setup.devices)),
      )[:, 0]
      for r in range(config.seeds)
    ]  # fmt: skip
    about = {
      'dataset': config.dataset, 'learner': name, 'way': config.way, 'shot': config.shot, 'test_shot': shot,
      'batch_norm': mode,
    }  # fmt: skip
    results.append(reporting.Result(about, np.stack(values)))
  return results


def by_instance(name: str, meta, config: Config, setup: Setup) -> np.ndarray:
  """Returns the accuracy at the n-th item of a class in sequences of unseen classes: `[n]`.

  Of the first run, and of an ensemble the best.
  """
  sequences = few_shot_data.tasks(setup.data.test, config, shot=1, query=few_shot_learners.DRAWINGS - 1)
  one = reporting.one_run(meta, 0)
  one = one if config.ensemble == 1 else reporting.one_run(one, 0)
  values = _accuracy_by_instance(
    setup.learners[name], one, sequences, test_keys(config.eval_seed)[0], config.eval_tasks
  ).mean(0)
  shown = ', '.join(f'{100 * v:.1f}' for v in values)
  print(f'{NAMES[name]}: accuracy at the 1st, 2nd, … item of a class, in percent: {shown}')
  return values


def _accuracy_by_instance(learner: ms.Learner, meta: Any, sequences: Tasks, key, num_tasks: int):
  """Returns the accuracy at the first item of its class, the second, …, of sequences of unseen tasks: `[tasks, n]`."""

  def of_task(meta, tasks, sample_key, episode_key, order_key):
    info = learner.loss(meta, tasks.episode(tasks.sample(sample_key), episode_key), order_key)[1]
    names = sorted((name for name in info if name.startswith('instance_')), key=lambda name: int(name.split('_')[1]))
    return jnp.stack([info[name] for name in names])

  keys = jax.random.split(key, (num_tasks, 3))
  of_tasks = jax.jit(lambda meta, tasks, keys: jax.lax.map(lambda three: of_task(meta, tasks, *three), keys))
  return np.asarray(of_tasks(meta, sequences.prepare(lambda: (keys[:, 0], keys[:, 1])), tuple(keys.T)))
