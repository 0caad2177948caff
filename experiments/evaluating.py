"""Tests a trained model on the unseen classes of any data set, without training."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import metasgd_jax as ms
from experiments import few_shot_data, few_shot_training, reporting, resuming, running
from experiments.calibration import calibration_error
from experiments.few_shot_learners import NAMES
from experiments.few_shot_training import BATCH_NORM, Setup
from experiments.reporting import percent
from experiments.resuming import Keeping
from metasgd_jax.deploy.model_file import build_learner
from metasgd_jax.io.files import PathLike
from metasgd_jax.types import Tasks, equal_partial

GREY = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in the brightness of a colour (ITU-R BT.601), as in Pillow."""


def build(config: Any, model: ms.FewShotModel, devices: int | None = None) -> Setup:
  """Returns the tests of a model: unseen tasks, and the learner with each kind of batch norm.

  If the images of the data set have another size or number of channels than those of the model, they are resized on the
  device, and colours become grey or grey becomes colours.

  Raises:
    ValueError: if the model serves fewer classes than `config.way`.
    DatasetError: if the data set cannot be loaded.
  """
  if config.way > model.config.way:
    raise ValueError(
      f'the model {config.evaluate} serves 2 to {model.config.way} classes, got way={config.way}; give a lower --way'
    )
  data = few_shot_data.placed(few_shot_data.Data(None, None, few_shot_data.load_unseen(config)), config.stream)
  setup = Setup(
    data=data,
    train={},
    learners={},
    testers={
      (model.config.learner, inductive): build_learner(model.config, config.way, inductive)
      for inductive in (False, True)
    },
    optimizers={},
    tests={},
    validation=None,
    start=None,
    devices=devices,
  )
  for shot in config.test_shots:
    tasks = few_shot_data.tasks(data.test, config, shot=shot, query=config.eval_query)
    setup.tests[shot] = resized(tasks, setup.image_shape, model.config.image_shape)
  return setup


def resized(tasks: Tasks, shape: tuple[int, ...], wanted: tuple[int, ...]) -> Tasks:
  """Returns the tasks with images of the shape `wanted` instead of `shape`."""
  return tasks if shape == wanted else ms.tasks.augmented(tasks, equal_partial(_resize, shape=wanted))


def _resize(key, image, *, shape):
  """Returns an image `[H, W, D]` with another shape. `key` is not used: `augmented` gives one to each image."""
  del key
  channels = shape[2]
  if image.shape[2] == 3 and channels == 1:
    image = image @ jnp.asarray(GREY)[:, None]
  elif image.shape[2] == 1 and channels == 3:
    image = jnp.repeat(image, 3, axis=2)
  return jnp.clip(jax.image.resize(image, shape, 'linear'), 0, 1)


def run(
  config: Any, workdir: PathLike, model: ms.FewShotModel, setup: Setup, keeping: Keeping | None = None
) -> list[dict[str, Any]]:
  """Tests the model, prints and draws the results, and writes files. Returns the rows of results.json."""
  with resuming.open_run(workdir, config, keeping) as opened:
    return opened.rows or _run(config, model, setup, opened)


def _run(config: Any, model: ms.FewShotModel, setup: Setup, opened: resuming.Run) -> list[dict[str, Any]]:
  opened.begin()
  name, trained = model.config.learner, model.config.training
  metas = jax.tree.map(lambda leaf: np.asarray(leaf)[None], model.meta)
  about = {name: trained.get(name) for name in ('meta_iterations', 'meta_batch', 'query')}
  about |= {'metric': 'accuracy', 'model': config.evaluate, 'trained_on': trained.get('dataset')}
  about |= {'trained_shot': trained.get('shot'), 'trained_way': model.config.way}
  rows = []
  for shot in config.test_shots:
    for result, logits, labels in few_shot_training.judge(name, metas, shot, config, setup):
      error = calibration_error(logits / model.config.temperature, labels)
      rows.append(result.row(opened.path, {**about, 'calibration_error': error}))
      where = f'{config.dataset}, {config.way}-way {shot}-shot'
      interval = f'95% interval over {config.eval_tasks} unseen tasks'
      mode = BATCH_NORM[result.about['batch_norm']]
      print(f'{NAMES[name]} of {config.evaluate}, {where}: {percent(result.estimate)}; {interval}; {mode}')
  running.write_results('classification', config, opened, rows)
  pictures: running.Pictures = {
    f'task_{name}': functools.partial(few_shot_training.draw_task, name, metas, config, setup)
  }
  reporting.save_pictures(opened.path, pictures, opened.metrics)
  return rows
