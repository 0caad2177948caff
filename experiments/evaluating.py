"""Tests a trained model on the test classes of any data set, or on all classes of a folder, without training."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import metasgd_jax as ms
from experiments import few_shot_data, few_shot_testing, options, reporting, resuming, running
from experiments.few_shot_training import Setup
from experiments.reporting import WARNING
from experiments.resuming import Keeping
from metasgd_jax.deploy.checks import is_int
from metasgd_jax.deploy.model_file import build_learner, model_sha256
from metasgd_jax.io.checkpoint import CheckpointError
from metasgd_jax.io.files import PathLike
from metasgd_jax.types import Tasks, equal_partial


def prepare(
  config: Any, workdir: PathLike, keeping: Keeping | None = None, devices: int | None = None
) -> Callable[[], list[dict[str, Any]]]:
  """Loads the model `config.evaluate` and its data, and returns the function that tests the model.

  Raises:
    ValueError: if the model cannot be read, or if the configuration does not fit the model or the data.
    DatasetError: if the data set cannot be loaded.
  """
  model, sha256 = ms.load_model(config.evaluate), model_sha256(config.evaluate)
  config = as_trained(config, model.config)
  return functools.partial(run, config, workdir, model, sha256, build(config, model, devices), keeping)


def as_trained(config: Any, model: ms.ModelConfig) -> Any:
  """Returns the configuration with the shots of the model's training, unless `eval_shots` is given, and with its split.

  The split is that of Omniglot's characters, if the model was trained on Omniglot. With another split, characters that
  the model was trained on would be among those that it is tested on.

  Raises:
    ValueError: if the configuration has another split than the model.
  """
  facts, changes = model.training, {}
  if not config.eval_shots:
    changes['eval_shots'] = (_trained_shot(model) or config.shot,)
  if config.dataset == facts.get('dataset') == 'omniglot':
    changes |= {name: facts[name] for name in ('split', 'split_seed') if name in facts}
    for name in changes.keys() & {'split', 'split_seed'}:
      if (given := options.flag_texts(config, (name,))) and getattr(config, name) != facts[name]:
        raise ValueError(
          f'the model {config.evaluate} was trained with {name}={facts[name]}, so that with another split it would be '
          f'tested on characters that it was trained on, got {given[0]}; leave --{name} out'
        )
  return dataclasses.replace(config, **changes)


def _trained_shot(model: ms.ModelConfig) -> int | None:
  """Returns the shots of the model's training, or `None` if its file does not say them. The file is not trusted."""
  shot: Any = model.training.get('shot')
  return shot if is_int(shot) and 1 <= shot <= 1000 else None


def build(config: Any, model: ms.FewShotModel, devices: int | None = None) -> Setup:
  """Returns the tests of a model: tasks with images as the model needs them, and learners of each kind of batch norm.

  Raises:
    ValueError: if the model serves fewer classes than `config.way`, or if settings do not fit the data.
    DatasetError: if the data set cannot be loaded.
  """
  if config.way > model.config.way:
    raise ValueError(
      f'the model {config.evaluate} serves 2 to {model.config.way} classes, got way={config.way}; give a lower --way'
    )
  data = few_shot_data.placed(few_shot_data.load_for_model(config, model.config), config.stream)
  modes = {inductive: build_learner(model.config, config.way, inductive) for inductive in (False, True)}
  setup = Setup(
    data=data,
    train={},
    learners={},
    testers={(model.config.learner, inductive): learner for inductive, learner in modes.items()},
    optimizers={},
    tests={},
    validation=None,
    start=None,
    devices=devices,
  )
  for shot in config.test_shots:
    tasks = few_shot_data.tasks(data.test, config.way, shot=shot, query=config.eval_query)
    setup.tests[shot] = resized(tasks, setup.image_shape, model.config.image_shape)
  return setup


def resized(tasks: Tasks, shape: tuple[int, ...], wanted: tuple[int, ...]) -> Tasks:
  """Returns the tasks with images of the shape `wanted`. Only glyphs have another shape, `(28, 28, 1)`."""
  return tasks if shape == wanted else ms.tasks.augmented(tasks, equal_partial(_resize, shape=wanted))


def _resize(key, image, *, shape):
  """Returns a grey image `[H, W, 1]` with another shape. `key` is not used: `augmented` gives one to each image."""
  del key
  return jnp.repeat(jnp.clip(jax.image.resize(image, (*shape[:2], 1), 'linear'), 0, 1), shape[2], axis=2)


def run(
  config: Any, workdir: PathLike, model: ms.FewShotModel, sha256: str, setup: Setup, keeping: Keeping | None = None
) -> list[dict[str, Any]]:
  """Tests the model, prints and draws the results, and writes files. Returns the rows of results.json.

  Args:
    config: Configuration, from `as_trained`.
    workdir: Directory of the run.
    model: The model.
    sha256: Checksum of the model's file, which is stored in the rows.
    setup: The tests, from `build`.
    keeping: Options for saving the run.

  Raises:
    CheckpointError: if the directory holds a finished run of a file with another checksum, or if `open_run` raises it.
  """
  with resuming.open_run(workdir, config, keeping) as opened:
    if opened.rows and opened.rows[0].get('model_sha256') != sha256:
      raise CheckpointError(
        f'the model {config.evaluate} has changed since the run in {workdir}; give --restart or another --workdir'
      )
    return opened.rows or _run(config, model, sha256, setup, opened)


def _run(config: Any, model: ms.FewShotModel, sha256: str, setup: Setup, opened: resuming.Run) -> list[dict[str, Any]]:
  opened.begin()
  name, trained = model.config.learner, model.config.training
  metas = jax.tree.map(lambda leaf: np.asarray(leaf)[None], model.meta)
  about = {name: trained.get(name) for name in ('meta_iterations', 'meta_batch', 'query')}
  about |= {'metric': 'accuracy', 'model': config.evaluate, 'model_sha256': sha256, 'eval_query': config.eval_query}
  about |= {'trained_on': trained.get('dataset'), 'trained_way': model.config.way}
  about['temperature'] = model.config.temperature
  if caution := _caution(config, trained):
    print(WARNING + caution)
  rows = []
  for shot in config.test_shots:
    for result, errors in few_shot_testing.judge(name, metas, shot, config, setup, model.config.temperature):
      result = dataclasses.replace(result, about=result.about | {'shot': _trained_shot(model.config)})
      steps = {'inner_steps': result.values.shape[-1] - 1}
      rows.append(result.row(opened.path, about | steps | errors))
      print(few_shot_testing.sentence(result, config, of=f' of {config.evaluate}', tasks=_tasks(config, setup)))
  running.write_results('classification', config, opened, rows)
  draw = functools.partial(few_shot_testing.draw_task, name, metas, config, setup, model.config.background == 'dark')
  reporting.save_pictures(opened.path, {f'task_{name}': draw}, opened.metrics)
  return rows


def _tasks(config: Any, setup: Setup) -> str:
  """Returns words for the tasks. The classes of a folder may be among those that the model was trained on."""
  if config.dataset != 'folder':
    return 'unseen tasks'
  count = 0 if setup.data.test is None else len(setup.data.test.sizes)
  if config.class_lists:
    return f'tasks of the {count} classes in {config.class_lists}/test.txt'
  return f'tasks of all {count} classes of the folder'


def _caution(config: Any, trained: Any) -> str | None:
  """Returns a warning if the model may have been trained on classes that it is tested on, or `None`."""
  if config.dataset == 'glyphs' or (config.dataset == 'folder' and config.class_lists):
    return None
  if 'dataset' not in trained or (config.dataset == trained['dataset'] == 'omniglot' and 'split' not in trained):
    return 'the model file does not say which classes the model was trained on; they may be among the classes tested'
  if config.dataset == trained['dataset'] == 'folder':
    return (
      'the model was trained on a folder of images too, and the classes of this folder may be among its training '
      'classes; --class_lists=DIR tests only the classes in DIR/test.txt'
    )
  return None
