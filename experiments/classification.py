"""N-way K-shot classification, for Tables 2 and 3 of Li et al. 2017, on your own images, or on glyphs (no download).

python -m experiments.classification
python -m experiments.classification --dataset=omniglot --data_dir=~/tensorflow_datasets
python -m experiments.classification --table2 --data_dir=~/tensorflow_datasets
"""

import dataclasses
import functools
import itertools
from operator import methodcaller
from typing import Any, get_args

from experiments import (
  evaluating,
  few_shot_table,
  few_shot_testing,
  few_shot_training,
  options,
  reporting,
  resuming,
  running,
  saving,
  trainings,
)
from experiments.command import flag_texts, refuse_beside
from experiments.few_shot_data import AUGMENTATIONS, CHARACTERS, DATASETS, WORKS_WITH
from experiments.few_shot_learners import LEARNERS, NAMES, SEQUENTIAL, UNTRAINED, meta_batch, query_images
from experiments.few_shot_training import Setup, build
from experiments.jobs import SINGLE, Jobs
from experiments.options import option
from experiments.reporting import Result
from experiments.resuming import Keeping
from metasgd_jax.inner.adaptation import Adjoint
from metasgd_jax.io.files import PathLike, write_params

OF_TRAINING = (
  *('learner', 'table2', 'table3', 'start', 'shot', 'query', 'meta_batch', 'meta_iterations', 'learning_rate', 'clip'),
  *('schedule', 'alpha', 'inner_steps', 'adjoint', 'multi_step_loss', 'alpha_by_step', 'ensemble', 'validate_every'),
  *('network', 'floor_rate', 'filters', 'precision', 'inductive', 'augmentation', 'seeds', 'seed', 'bad_steps'),
  *('validation_classes', 'tasks_at_once'),
)
"""Settings that have no effect on the test of a trained model."""

OF_MODEL = ('image_size', 'channels', 'split_seed')
"""Settings that have no effect if a trained model is tested on a folder of images."""


@dataclasses.dataclass(frozen=True)
class Config:
  """Settings of an experiment. With the defaults, a CPU trains in minutes.

  Published trainings are longer. Li et al. 2017 use 15 query images per class (`query`). MAML (Finn et al. 2017) uses
  60,000 meta-iterations, batches of 32 tasks for 5-way Omniglot (`meta_batch`), and on mini-ImageNet an outer gradient
  clipped at 10 (`clip`). `stream=auto` keeps images in host memory if they would fill more than half of the device's
  memory. Glyphs are not stored, because the device generates them when it needs them. If a folder has no class lists,
  its classes are split at random, with the seed `split_seed`. If the data set has validation classes, the temperature
  of the saved model is fitted on them (`ModelConfig.temperature`).
  """

  learner: tuple[str, ...] = option((), 'Learners to train; Meta-SGD by default, or all for a table.', choices=LEARNERS)
  table2: bool = option(False, "Make the paper's Table 2, on Omniglot; finished cells are kept.")
  table3: bool = option(False, "Make the paper's Table 3, on mini-ImageNet; finished cells are kept.")
  dataset: str | None = option(None, "Glyphs by default, or the table's data set.", choices=DATASETS, kind=str)
  data_dir: str | None = option(None, 'Directory of images, or of tfds for omniglot and cifar_fs.', kind=str)
  archives: str | None = option(None, 'Directory of downloaded archives, from which tfds prepares data_dir.', kind=str)
  verify_archives: bool = option(True, 'Whether the archives must have the registered checksums.')
  cache: str | None = option(
    None, "Directory for mini-ImageNet's decoded images; later runs start in seconds.", kind=str
  )
  split: str = option(
    'random', "Omniglot's split: random 1200/423, or Vinyals' alphabets.", choices=('random', 'vinyals')
  )
  split_seed: int = option(0, 'Seed of a random split.', low=0, high=2**31 - 1)
  validation_classes: int = option(0, "Characters for validation, out of Omniglot's 1200.", low=0, high=1000)
  class_lists: str | None = option(
    None,
    'Directory of train.txt, validation.txt and test.txt, which list classes; --evaluate reads test.txt.',
    kind=str,
  )
  image_size: int | None = option(
    None, 'Height and width of images; by default 28, or 84 for photos.', low=16, high=1024, kind=int
  )
  channels: int = option(3, 'Channels of images from a folder: 3, or 1 for grey.', low=1, high=3)
  augmentation: str = option('none', 'Augmentation of training images.', choices=tuple(AUGMENTATIONS))
  stream: str = option('auto', 'Keep images on the host; auto does so for large data.', choices=('auto', 'yes', 'no'))
  way: int = option(5, 'Classes per task.', low=2, high=1000)
  shot: int = option(1, 'Support images per class in training.', low=1, high=1000)
  eval_shots: tuple[int, ...] = option((), 'Support images per class in testing; by default as in training.', low=1)
  query: int = option(5, 'Query images per class in training.', low=1, high=1000)
  inner_steps: int = option(1, 'Inner steps, in training and in testing.', low=0, high=1000)
  adjoint: str = option('reverse', 'Outer gradient; revolve suits hundreds of inner steps.', choices=get_args(Adjoint))
  alpha: float | None = option(
    None,
    "MAML's inner rate, by default that of its paper; initial α of Meta-SGD, by default from U[0.005, 0.1].",
    **running.RATE,
  )
  start: str | None = option(
    None,
    'Model to start from: name of a shipped model, or a model file. A prototypical model gives its embedding.',
    kind=str,
  )
  evaluate: str | None = option(
    None, 'Model to test on --dataset without training: name of a shipped model, or a model file.', kind=str
  )
  inductive: bool = option(False, 'In training, normalise query images by the statistics of the support.')
  multi_step_loss: bool = option(False, 'Meta-SGD: train on the mean of the query losses after each inner step.')
  alpha_by_step: bool = option(False, 'Meta-SGD: learn separate rates for each inner step, as in MAML++.')
  ensemble: int = option(1, 'Checkpoints, the best in validation, whose predictions are averaged.', low=1, high=100)
  validate_every: int = option(0, 'Meta-iterations between validations; with 0 the last state is tested.', low=0)
  network: str = option('conv4', "Embedding of metric learners: Conv4, or Koch's.", choices=('conv4', 'koch'))
  floor_rate: float = option(0.1, 'Inner rate of the learners joint and random.', low=1e-6, high=100.0)
  filters: int | None = option(None, 'Filters; by default 64, or 32 on mini-ImageNet.', low=1, high=4096, kind=int)
  precision: str = option('float32', 'Type of activations; all else is float32.', choices=('float32', 'bfloat16'))
  meta_batch: int = option(4, 'Tasks per meta-iteration.', low=1, high=10_000)
  tasks_at_once: int = option(0, 'Tasks that a device computes together; 0 depends on the size.', low=0, high=10_000)
  meta_iterations: int = option(500, 'Meta-iterations.', low=1, high=2**31 - 1)
  learning_rate: float = option(1e-3, 'Initial learning rate of Adam, the outer optimiser.', low=1e-12, high=1e3)
  clip: float = option(0.0, 'Clip entries of the outer gradient to this size; 0 does not clip.', low=0.0)
  schedule: str = option('constant', 'Learning rate: constant, or a cosine to 0.', choices=('constant', 'cosine'))
  seeds: int = option(1, 'Number of training runs.', low=1, high=1000)
  seed: int = option(0, 'Seed of the first training run; run i uses seed + i.', low=0, high=2**31 - 1001)
  eval_seed: int = option(0, 'Seed of the tasks of the test.', low=0, high=2**31 - 1)
  eval_tasks: int = option(600, 'Tasks in the test.', low=2, high=100_000)
  eval_query: int = option(15, 'Query images per class in testing.', low=1, high=1000)
  bad_steps: str = trainings.bad_steps_option()
  tensorboard: bool = option(False, 'Also write event files for TensorBoard.')

  def __post_init__(self):
    options.check(self)
    if self.channels == 2:
      raise ValueError('channels must be 1 or 3, got 2')
    if self.evaluate is not None:
      refuse_beside('evaluate tests a model without training', self, OF_TRAINING)
    if self.table2 and self.table3:
      raise ValueError('table2 and table3 need separate commands, got both; give one of them')
    if self.dataset is None:
      dataset = 'omniglot' if self.table2 else 'mini_imagenet' if self.table3 else 'glyphs'
      object.__setattr__(self, 'dataset', dataset)
    if self.evaluate is not None and self.dataset == 'folder':
      refuse_beside('evaluate reads all classes of a folder, in the size and channels of the model', self, OF_MODEL)
    for name, datasets in WORKS_WITH.items():
      if self.dataset not in datasets and (given := flag_texts(self, (name,))):
        raise ValueError(
          f'{name} works only with dataset={" or ".join(datasets)}, got dataset={self.dataset} and {given[0]}; leave '
          f'{name} out'
        )
    if self.dataset != 'glyphs' and self.data_dir is None:
      where = 'for omniglot and cifar_fs the data directory of tfds, such as ~/tensorflow_datasets'
      raise ValueError(f'dataset={self.dataset} needs data_dir; give the directory of the images, or {where}')
    if self.ensemble > 1 and not self.validate_every:
      raise ValueError(
        f'ensemble={self.ensemble} needs validated checkpoints, got validate_every=0; give --validate_every=N'
      )
    for name in ('multi_step_loss', 'alpha_by_step'):
      if getattr(self, name) and self.inner_steps < 2:
        raise ValueError(f'{name} needs several inner steps, got inner_steps={self.inner_steps}; give at least 2')
    if self.ensemble > 1 and self.ensemble > self.meta_iterations // self.validate_every:
      raise ValueError(
        f'ensemble={self.ensemble} needs {self.ensemble} checkpoints, and each validation gives one, but there are '
        f'only {self.meta_iterations // self.validate_every} validations in {self.meta_iterations} meta-iterations '
        f'with validate_every={self.validate_every}; lower ensemble or validate_every'
      )
    if self.start and set(self.learners) - {'meta_sgd', 'maml', 'prototypical'}:
      raise ValueError(
        f'--start works only with the learner meta_sgd, maml or prototypical, got learner={",".join(self.learners)}; '
        'give one of these learners, or leave start out'
      )
    if (self.table2 or self.table3) and self.dataset == 'glyphs':
      raise ValueError(
        'table2 and table3 need real images, got dataset=glyphs; leave --dataset out, as a table has its own data set'
      )

  @property
  def learners(self) -> tuple[str, ...]:
    """Names of the learners to train."""
    return self.learner or (LEARNERS if self.table2 or self.table3 else ('meta_sgd',))

  @property
  def sizes(self) -> tuple[int, int]:
    """Number of filters, and number of units in the fully connected layer, as in Li et al. 2017, section 4.2.

    With 0 units there is no fully connected layer.
    """
    filters = self.filters or (32 if self.dataset == 'mini_imagenet' else 64)
    return filters, 32 if self.dataset in CHARACTERS else 0

  @property
  def test_shots(self) -> tuple[int, ...]:
    """Numbers of support images per class in testing, one for each test."""
    return self.eval_shots or (self.shot,)


def run(
  config: Config,
  workdir: PathLike,
  setup: Setup | None = None,
  keeping: Keeping | None = None,
  cell: bool = False,
  jobs: Jobs = SINGLE,
) -> list[dict]:
  """Trains and tests the learners, prints and draws the results, and writes files. Returns the rows of results.json.

  If `setup` is left out, `build(config)` creates the setup. `cell` is as in `resuming.open_run`. `jobs` says whether
  the trainings get processes of their own.
  """
  setup = setup or build(config)
  with resuming.open_run(workdir, config, keeping, cell) as opened:
    return opened.rows or _run(config, setup, opened, jobs)


def _run(config: Config, setup: Setup, opened: resuming.Run, jobs: Jobs) -> list[dict]:
  jobs.train(few_shot_training.plan(config, setup), opened)
  rows, curves, metas = [], {}, {}
  pictures: running.Pictures = {}
  for name in config.learners:
    metas[name], curve, skipped = few_shot_training.train(name, config, setup, opened)
    write_params(opened.path(f'params_{name}.safetensors'), metas[name])
    about_run = running.settings(config, 'meta_iterations', 'eval_query', 'ensemble') | skipped
    about_run |= {'metric': 'accuracy', 'meta_batch': meta_batch(name, config)}
    about_run['query'] = 0 if name == 'joint' else query_images(name, config)
    if name in UNTRAINED:
      about_run['meta_iterations'] = 0
    if name in SEQUENTIAL:
      by_instance = few_shot_testing.by_instance(name, metas[name], config, setup)
      about_run['accuracy_by_instance'] = by_instance
      pictures[f'instances_{name}'] = methodcaller('instance_curve', {NAMES[name]: by_instance})
    first = reporting.one_run(metas[name], 0)
    about_run['temperature'] = temperature = few_shot_testing.temperature(name, first, config, setup)
    judge = functools.partial(few_shot_testing.judge, name, metas[name])
    tests = list(itertools.chain(*(judge(shot, config, setup, temperature) for shot in config.test_shots)))
    for result, errors in tests:
      about_test = {'inner_steps': result.values.shape[-1] - 1} | errors
      rows.append(result.row(opened.path, about_test | about_run))
      print(_sentence(rows[-1], result, config))
    if saving.is_saved(name, config):
      likeness = None if name == 'joint' else few_shot_testing.least_likeness(name, first, config, setup)
      path = opened.path(f'model_{name}.safetensors')
      saving.save_model(path, name, first, temperature, likeness, tests, config, setup)
    running.write_results('classification', config, opened, rows)
    if curve:
      curves[NAMES[name]] = curve['accuracy']
    draw, negative = few_shot_testing.draw_task, config.dataset in CHARACTERS
    pictures[f'task_{name}'] = functools.partial(draw, name, metas[name], config, setup, negative)
  pictures |= running.alpha_pictures(metas)
  if curves:
    pictures['learning_curves'] = methodcaller('learning_curves', curves, ylabel='query accuracy on training tasks')
  reporting.save_pictures(opened.path, pictures, opened.metrics)
  return rows


def _sentence(row: dict[str, Any], result: Result, config: Config) -> str:
  training = (
    f'; {config.seeds} training run(s) of {row["meta_iterations"]:,} meta-iterations of {row["meta_batch"]} tasks, '
    f'{config.shot}-shot'
  )
  paper = few_shot_table.paper_figure(row['learner'], str(config.dataset), config.way, row['test_shot'])
  said = few_shot_testing.sentence(result, config, training=training)
  return f'{said}; the paper has {paper}' if paper and row['batch_norm'] == 'transductive' else said


def _prepare(config: Config, workdir, keeping: Keeping, devices: int | None, jobs: Jobs) -> running.Prepared:
  if config.evaluate is not None:
    return [], evaluating.prepare(config, workdir, keeping, devices)
  if config.table2 or config.table3:
    if keeping.plan or keeping.debug_task is not None:
      raise ValueError(
        '--plan and --debug_task are for one cell, not for a whole table; '
        'replace --table2 or --table3 by the flags of a cell'
      )
    of_cell, made = functools.partial(build, devices=devices), functools.partial(run, keeping=keeping, cell=True)
    return [], few_shot_table.prepare(config, workdir, of_cell, made, keeping, jobs)
  setup = build(config, devices=devices)
  return few_shot_training.plan(config, setup), functools.partial(run, config, workdir, setup, keeping, jobs=jobs)


if __name__ == '__main__':
  running.main('classification', Config, _prepare)
