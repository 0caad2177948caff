"""N-way K-shot classification: Tables 2 and 3 of Li et al. 2017, your own images, and glyphs, which need no download.

python -m experiments.classification
python -m experiments.classification --dataset=omniglot --data_dir=~/tensorflow_datasets
python -m experiments.classification --table2 --data_dir=~/tensorflow_datasets
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, get_args

import jax
from absl import flags

import metasgd_jax as ms
from experiments import (
  few_shot_table,
  few_shot_training,
  options,
  processes,
  reporting,
  resuming,
  trainings,
)
from experiments.few_shot_data import AUGMENTATIONS, DATASETS
from experiments.few_shot_learners import (
  LEARNERS,
  NAMES,
  SEQUENTIAL,
  UNTRAINED,
  maml_rate,
  meta_batch,
  query_images,
)
from experiments.few_shot_training import Setup, build
from experiments.options import option
from experiments.processes import Machines
from experiments.reporting import test_keys
from experiments.resuming import Keeping
from metasgd_jax.inner.adaptation import Adjoint
from metasgd_jax.io import files, provenance
from metasgd_jax.outer.evaluation import confidence_interval

MODEL_FACTS = (
  'dataset', 'split', 'split_seed', 'way', 'shot', 'query', 'meta_batch', 'meta_iterations', 'learning_rate',
  'schedule', 'alpha', 'seed', 'eval_seed', 'eval_tasks', 'eval_query', 'inductive', 'augmentation', 'precision',
  'multi_step_loss', 'clip', 'validate_every',
)  # fmt: skip
"""What a model file says of its training, beside its accuracy."""

BATCH_NORM = {
  'none': 'no batch norm',
  'transductive': 'batch norm by the batch at hand',
  'inductive': "batch norm by the support's statistics",
}


@dataclasses.dataclass(frozen=True)
class Config:
  """Defaults that a CPU does in minutes; the paper has 15 query images, MAML batches of 32 and 60,000 iterations."""

  learner: tuple[str, ...] = option((), 'What to train; Meta-SGD if not given, and all for a table.', choices=LEARNERS)
  table2: bool = option(False, "The paper's Table 2, Omniglot; cells that are in workdir already stay.")
  table3: bool = option(False, 'Its Table 3, mini-ImageNet, likewise.')
  dataset: str | None = option(
    None, "Glyphs, drawn on the device, if not given; a table's own data set for a table.", choices=DATASETS, kind=str
  )
  data_dir: str | None = option(
    None, "tfds' data directory for omniglot and cifar_fs; of images for mini_imagenet and folder.", kind=str
  )
  archives: str | None = option(None, "Directory with a tfds data set's archives, to prepare data_dir from.", kind=str)
  verify_archives: bool = option(True, 'Whether those must have the registered checksums.')
  cache: str | None = option(None, "Directory for mini-ImageNet's decoded images; later starts take seconds.", kind=str)
  split: str = option('random', "Omniglot's: 1200/423 at random, or Vinyals' alphabets.", choices=('random', 'vinyals'))
  split_seed: int = option(0, 'Of a random split.', low=0, high=2**31 - 1)
  validation_classes: int = option(0, "Characters of Omniglot's random 1200 to validate on.", low=0, high=1000)
  class_lists: str | None = option(
    None, "Directory with train.txt, validation.txt and test.txt, a folder's class names; by seed without.", kind=str
  )
  image_size: int | None = option(
    None, 'Height and width: 28 of characters, 84 of images from a folder.', low=16, high=1024, kind=int
  )
  channels: int = option(3, 'Of images from a folder: 3, or 1 for grey.', low=1, high=3)
  augmentation: str = option('none', 'Of training images.', choices=tuple(AUGMENTATIONS))
  stream: str = option(
    'auto', 'Whether images stay on the host: where they would fill half of the device.', choices=('auto', 'yes', 'no')
  )
  way: int = option(5, 'Classes of a task.', low=2, high=1000)
  shot: int = option(1, 'Support images of a class in training.', low=1, high=1000)
  eval_shots: tuple[int, ...] = option((), 'In testing; as in training if not given.', low=1)
  query: int = option(5, 'Query images of a class in training.', low=1, high=1000)
  inner_steps: int = option(1, 'Inner steps, in training and in testing.', low=0, high=1000)
  adjoint: str = option(
    'reverse', "Of Meta-SGD and MAML: the outer gradient's way back; revolve for inner steps by the hundred.",
    choices=get_args(Adjoint),
  )  # fmt: skip
  alpha: float | None = option(
    None, "MAML's inner rate (that of its paper's data set if not given), and Meta-SGD's start (U[0.005, 0.1]).",
    low=-100.0, high=100.0, kind=float,
  )  # fmt: skip
  start: str | None = option(
    None, 'A model to start from, of the same sizes: the name of one that ships, or a file of an earlier run.', kind=str
  )
  inductive: bool = option(False, "In training: normalise query images by the support's statistics.")
  multi_step_loss: bool = option(False, "Meta-SGD: the mean of the query's losses after each inner step.")
  alpha_by_step: bool = option(False, 'Meta-SGD: every inner step has rates of its own (MAML++).')
  ensemble: int = option(1, 'Checkpoints that answer together, the best of validation.', low=1, high=100)
  validate_every: int = option(0, 'Meta-iterations between validations; 0 for none: the last is kept.', low=0)
  network: str = option('conv4', "Of learners with an embedding: Conv4, or Koch's.", choices=('conv4', 'koch'))
  floor_rate: float = option(0.1, 'Of plain SGD on the support.', low=1e-6, high=100.0)
  filters: int | None = option(None, 'Of a convolution; 64, on mini-ImageNet 32.', low=1, high=4096, kind=int)
  precision: str = option(
    'float32', 'Of activations; parameters, rates and sums stay float32.', choices=('float32', 'bfloat16')
  )
  meta_batch: int = option(4, 'Tasks in a meta-iteration.', low=1, high=10_000)
  tasks_at_once: int = option(
    0, "Tasks that a device takes at the same time, gradients summed over such groups; 0 goes by the network's size.",
    low=0, high=10_000,
  )  # fmt: skip
  meta_iterations: int = option(500, 'Meta-iterations.', low=1, high=2**31 - 1)
  learning_rate: float = option(1e-3, 'Of Adam, the outer optimiser, at the start.', low=1e-12, high=1e3)
  clip: float = option(0.0, "Of each entry of the outer gradient; 0 for none, MAML's on mini-ImageNet is 10.", low=0.0)
  schedule: str = option(
    'constant', 'Of the learning rate: as it is, or down to 0 as a cosine.', choices=('constant', 'cosine')
  )
  seeds: int = option(1, 'Training runs, one after the other.', low=1, high=1000)
  seed: int = option(0, 'Of the first run; the next has the next.', low=0, high=2**31 - 1001)
  eval_seed: int = option(0, 'Of the tasks to test on.', low=0, high=2**31 - 1)
  eval_tasks: int = option(600, 'Unseen tasks to test on.', low=2, high=100_000)
  eval_query: int = option(15, 'Query images of a class in testing.', low=1, high=1000)
  bad_steps: str = trainings.bad_steps_option()
  tensorboard: bool = option(False, "Write TensorBoard's event files too.")

  def __post_init__(self):
    options.check(self)
    if self.table2 and self.table3:
      raise ValueError('table2 and table3 are two commands; give one')
    if self.dataset is None:
      dataset = 'omniglot' if self.table2 else 'mini_imagenet' if self.table3 else 'glyphs'
      object.__setattr__(self, 'dataset', dataset)
    if self.dataset != 'glyphs' and self.data_dir is None:
      raise ValueError(
        f'dataset {self.dataset} needs data_dir: for omniglot and cifar_fs where tfds keeps or shall keep it, such as '
        '--data_dir=~/tensorflow_datasets, for others the directory of images'
      )
    if self.ensemble > 1 and not self.validate_every:
      raise ValueError(f'ensemble={self.ensemble} is of checkpoints that validate_every makes; give --validate_every=N')
    if self.channels == 2:
      raise ValueError('channels must be 1 or 3, got 2')
    for name in ('multi_step_loss', 'alpha_by_step'):
      if getattr(self, name) and self.inner_steps < 2:
        raise ValueError(f'{name} is for several inner steps, got inner_steps={self.inner_steps}; give at least 2')
    if self.ensemble > 1 and self.ensemble > self.meta_iterations // self.validate_every:
      raise ValueError(
        f'ensemble={self.ensemble} is more than the {self.meta_iterations // self.validate_every} validations of '
        f'{self.meta_iterations} meta-iterations; lower validate_every={self.validate_every}'
      )
    if self.start and set(self.learners) - {'meta_sgd', 'maml'}:
      raise ValueError(f'start is a model of meta_sgd or maml, got learner={",".join(self.learners)}; leave it out')
    if (self.table2 or self.table3) and self.dataset == 'glyphs':
      raise ValueError("a table is of real images, got dataset=glyphs; leave dataset out for the paper's own")
    if self.class_lists and self.dataset != 'folder':
      raise ValueError(f'class_lists is for dataset folder, got dataset={self.dataset}; leave it out')

  @property
  def learners(self) -> tuple[str, ...]:
    """What to train."""
    return self.learner or (LEARNERS if self.table2 or self.table3 else ('meta_sgd',))

  @property
  def sizes(self) -> tuple[int, int]:
    """Filters of a convolution, and units of the fully connected layer, 0 for none (Li et al. 2017, section 4.2)."""
    characters = self.dataset in ('glyphs', 'omniglot')
    return self.filters or (32 if self.dataset == 'mini_imagenet' else 64), 32 if characters else 0

  @property
  def test_shots(self) -> tuple[int, ...]:
    """Support images of a class in testing."""
    return self.eval_shots or (self.shot,)


def run(
  config: Config, workdir: files.PathLike, setup: Setup | None = None, keeping: Keeping | None = None
) -> list[dict]:
  """Trains, tests, prints, draws and writes; returns the rows of results.json. `setup` is `build(config)`."""
  setup = setup or build(config)
  with resuming.open_run(workdir, config, keeping) as opened:
    return opened.rows or _run(config, setup, opened)


def _run(config: Config, setup: Setup, opened: resuming.Run) -> list[dict]:
  workdir = opened.workdir
  rows, curves = [], {}
  pictures: dict[str, Callable[[Any], Any]] = {}
  for name in config.learners:
    meta, curve, skipped = few_shot_training.train(name, config, setup, opened)
    files.write_params(workdir / f'params_{name}.msgpack', meta)
    about_run = {
      'meta_iterations': 0 if name in UNTRAINED else config.meta_iterations, 'meta_batch': meta_batch(name, config),
      'query': 0 if name == 'joint' else query_images(name, config), 'eval_query': config.eval_query,
      'ensemble': config.ensemble, 'metric': 'accuracy', **skipped,
    }  # fmt: skip
    if name in SEQUENTIAL:
      about_run['accuracy_by_instance'] = few_shot_training.by_instance(name, meta, config, setup)
      pictures[f'instances_{name}'] = functools.partial(_draw_instances, name, about_run['accuracy_by_instance'])
    results: list[reporting.Result] = []
    for shot in config.test_shots:
      for result in few_shot_training.judge(name, meta, shot, config, setup):
        rows.append(result.row(workdir, {'inner_steps': result.values.shape[-1] - 1, **about_run}))
        results.append(result)
        print(_sentence(name, result, rows[-1], config))
      opened.stop.ask()
    if name in ('meta_sgd', 'maml') and config.ensemble == 1 and not config.alpha_by_step:
      _save_model(workdir / f'model_{name}.safetensors', name, meta, results, config, setup)
    files.write_json(workdir / 'results.json', {**options.recipe('classification', config), 'rows': rows})
    if curve:
      curves[NAMES[name]] = curve['accuracy']
    pictures[f'task_{name}'] = functools.partial(_draw_task, name, meta, config, setup)
    if getattr(meta, 'alpha', None) is not None:
      pictures[f'alpha_{name}'] = functools.partial(reporting.draw_alpha, meta.alpha)
  if curves:
    pictures['learning_curves'] = lambda plotting: plotting.learning_curves(
      curves, ylabel='query accuracy on training tasks'
    )
  reporting.save_pictures(workdir, pictures, opened.metrics)
  return rows


def _save_model(path, name: str, meta, results: list[reporting.Result], config: Config, setup: Setup) -> None:
  """Writes the first run as a file that `metasgd predict` and `FewShotClassifier` take."""
  filters, hidden = config.sizes
  accuracies = {}
  for result in results:
    mean, ci95 = (100 * v for v in confidence_interval(result.values[0, :, -1]))
    accuracies[f'accuracy_{result.about["test_shot"]}_shot_{result.about["batch_norm"]}'] = f'{mean:.2f}% ± {ci95:.2f}'
  elsewhere = {
    'data_dir': 'DIR',
    'archives': None,
    'cache': None,
    'start': 'FILE',
  }  # Where they lay is nobody's business.
  here: dict[str, Any] = {k: v for k, v in elsewhere.items() if getattr(config, k)}
  command = f'python -m experiments.classification {options.as_flags(dataclasses.replace(config, **here))}'
  shown = {k: v for k, v in dataclasses.asdict(config).items() if k in MODEL_FACTS}
  about = ms.ModelConfig(
    'maml' if name == 'maml' else 'meta_sgd', config.way, setup.image_shape, filters, hidden, config.inner_steps,
    alpha=maml_rate(name, config) if name == 'maml' else None,
    background='dark' if config.dataset in ('glyphs', 'omniglot') else 'any',
    training={'command': command, **shown, **accuracies, **provenance.collect()},
  )  # fmt: skip
  ms.save_model(path, ms.FewShotModel(about, reporting.one_run(meta, 0)))


def _sentence(name: str, result: reporting.Result, row: dict[str, Any], config: Config) -> str:
  mean, ci95 = (100 * v for v in result.estimate)
  steps = result.values.shape[-1] - 1
  before = f' after {steps} inner step(s), {100 * result.values[..., 0].mean():.2f}% before' if steps else ''
  over_runs = f', ±{100 * result.over_runs.ci95:.2f} over training runs' if config.seeds > 1 else ''
  paper = few_shot_table.paper_figure(name, str(config.dataset), config.way, result.about['test_shot'])
  mode = BATCH_NORM[result.about['batch_norm']]
  return (
    f'{NAMES[name]}, {config.dataset}, {config.way}-way {result.about["test_shot"]}-shot: {mean:.2f}% ± {ci95:.2f}'
    f'{before}; 95% interval over {config.eval_tasks} unseen tasks{over_runs}; {config.seeds} training run(s) of '
    f'{row["meta_iterations"]:,} meta-iterations of {row["meta_batch"]} tasks, {config.shot}-shot; {mode}'
    + (f'; the paper has {paper}' if paper and result.about['batch_norm'] == 'transductive' else '')
  )


def _draw_task(name, meta, config: Config, setup: Setup, plotting):
  """One unseen task and the first run's answers."""
  learner = setup.testers[name, False]

  @jax.jit
  def answered(meta, tasks, task_key, episode_key, adapt_key):
    support, query = tasks.episode(tasks.sample(task_key), episode_key)
    return support, query, learner.predict(learner.adapt(meta, support, adapt_key), query.x)

  keys = jax.random.split(test_keys(config.eval_seed)[1], 3)
  tasks = setup.tests[config.test_shots[0]].prepare(lambda: (keys[:1], keys[1:2]))
  found = answered(reporting.one_run(meta, 0), tasks, *keys)
  return plotting.episode_sheet(*jax.device_get(found))


def _draw_instances(name, values, plotting):
  return plotting.instance_curve({NAMES[name]: values})


def _prepare() -> Callable[[], object]:
  config, keeping = options.from_flags(Config), options.from_flags(Keeping)
  devices = options.from_flags(Machines).devices
  workdir = processes.open_workdir(flags.FLAGS.workdir)
  if config.table2 or config.table3:
    if keeping.debug_task is not None:
      raise ValueError("debug_task looks into one cell; give its flags and workdir, not a table's")
    of_cell, made = functools.partial(build, devices=devices), functools.partial(run, keeping=keeping)
    return few_shot_table.prepare(config, workdir, of_cell, made, keeping.restart)
  setup = build(config, devices=devices)
  looked_into = trainings.look(few_shot_training.plan(config, setup), config, workdir, keeping)
  return looked_into or (lambda: run(config, workdir, setup, keeping))


if __name__ == '__main__':
  resuming.define_flags(Config, Keeping, Machines, workdir='runs/classification')
  processes.main(_prepare, Config)
