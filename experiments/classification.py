"""N-way K-shot classification: Tables 2 and 3 of Li et al. 2017, your own images, and glyphs, which need no download.

python -m experiments.classification
python -m experiments.classification --dataset=omniglot --data_dir=~/tensorflow_datasets
python -m experiments.classification --table2 --data_dir=~/tensorflow_datasets
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from absl import flags

import metasgd_jax as ms
from experiments import few_shot_table, few_shot_training, options, reporting
from experiments.few_shot_data import AUGMENTATIONS, DATASETS
from experiments.few_shot_learners import (
  LEARNERS,
  NAMES,
  SEQUENTIAL,
  UNTRAINED,
  maml_rate,
  meta_batch,
)
from experiments.few_shot_training import Setup, build
from experiments.options import option
from experiments.reporting import test_keys
from metasgd_jax import writers

MODEL_FACTS = (
  'dataset', 'split', 'split_seed', 'way', 'shot', 'query', 'meta_batch', 'meta_iterations', 'learning_rate',
  'schedule', 'alpha', 'seed', 'eval_seed', 'eval_tasks', 'eval_query', 'inductive', 'augmentation',
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
  dataset: str = option('glyphs', 'Random characters drawn on the device, or real images.', choices=DATASETS)
  data_dir: str | None = option(
    None, "tfds' data directory for omniglot and cifar_fs; of images for mini_imagenet and folder.", kind=str
  )
  archives: str | None = option(None, "Directory with a tfds data set's archives, to prepare data_dir from.", kind=str)
  verify_archives: bool = option(True, 'Whether those must have the registered checksums.')
  cache: str | None = option(None, "Directory for mini-ImageNet's decoded images; later starts take seconds.", kind=str)
  split: str = option('random', "Omniglot's: 1200/423 at random, or Vinyals' alphabets.", choices=('random', 'vinyals'))
  split_seed: int = option(0, 'Of a random split.', low=0, high=2**31 - 1)
  validation_classes: int = option(0, "Characters of Omniglot's random 1200 to validate on.", low=0, high=1000)
  image_size: int | None = option(None, 'Height and width of images from a folder (84).', low=16, high=1024, kind=int)
  channels: int = option(3, 'Of images from a folder: 3, or 1 for grey.', low=1, high=3)
  augmentation: str = option('none', 'Of training images.', choices=tuple(AUGMENTATIONS))
  stream: str = option(
    'auto', 'Whether images stay on the host: where they would fill half of the device.', choices=('auto', 'yes', 'no')
  )
  way: int = option(5, 'Classes of a task.', low=2, high=1000)
  shot: int = option(1, 'Support images of a class in training.', low=1, high=1000)
  eval_shots: tuple[int, ...] = option((), 'In testing; as in training if not given.', low=1)
  query: int = option(5, 'Query images of a class in training.', low=1, high=1000)
  inner_steps: int = option(1, 'Inner steps, in training and in testing.', low=0, high=100)
  alpha: float | None = option(
    None, "MAML's inner rate (its paper's if not given), and Meta-SGD's start (U[0.005, 0.1] if not given).",
    low=-100.0, high=100.0, kind=float,
  )  # fmt: skip
  inductive: bool = option(False, "In training: normalise query images by the support's statistics.")
  multi_step_loss: bool = option(False, "Meta-SGD: the mean of the query's loss after each inner step (MAML++).")
  alpha_by_step: bool = option(False, 'Meta-SGD: every inner step has rates of its own (MAML++).')
  ensemble: int = option(1, 'Checkpoints that answer together, the best of validation.', low=1, high=100)
  validate_every: int = option(0, 'Meta-iterations between validations; 0 for none: the last is kept.', low=0)
  filters: int | None = option(None, 'Of a convolution; 64, on mini-ImageNet 32.', low=1, high=4096, kind=int)
  precision: str = option(
    'float32', 'Of activations; parameters, rates and sums stay float32.', choices=('float32', 'bfloat16')
  )
  meta_batch: int = option(4, 'Tasks in a meta-iteration.', low=1, high=10_000)
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

  tensorboard: bool = option(False, "Write TensorBoard's event files too.")

  def __post_init__(self):
    options.check(self)
    if self.table2 and self.table3:
      raise ValueError('table2 and table3 are two commands; give one')
    if self.dataset != 'glyphs' and self.data_dir is None:
      raise ValueError(
        f'dataset {self.dataset} needs data_dir: for omniglot and cifar_fs where tfds keeps or shall keep it, such as '
        '--data_dir=~/tensorflow_datasets, for others the directory of images'
      )
    if self.ensemble > 1 and not self.validate_every:
      raise ValueError(f'ensemble={self.ensemble} is of checkpoints that validate_every makes; give --validate_every=N')
    if self.channels == 2:
      raise ValueError('channels must be 1 or 3, got 2')
    if self.multi_step_loss and self.inner_steps < 1:
      raise ValueError('multi_step_loss is of the inner steps, and inner_steps is 0; give at least 1')

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


def run(config: Config, workdir: writers.PathLike, setup: Setup | None = None) -> list[dict]:
  """Trains, tests, prints, draws and writes; returns the rows of results.json. `setup` is `build(config)`."""
  setup = setup or build(config)
  workdir = writers.open_workdir(workdir)
  metrics = reporting.start(workdir, config)
  rows, curves = [], {}
  pictures: dict[str, Callable[[Any], Any]] = {}
  for name in config.learners:
    meta, curve = few_shot_training.train(name, config, setup, metrics)
    writers.write_params(workdir / f'params_{name}.msgpack', meta)
    about_run = {
      'inner_steps': config.inner_steps, 'meta_iterations': 0 if name in UNTRAINED else config.meta_iterations,
      'meta_batch': meta_batch(name, config), 'query': config.query, 'eval_query': config.eval_query,
      'ensemble': config.ensemble, 'metric': 'accuracy',
    }  # fmt: skip
    if name in SEQUENTIAL:
      about_run['accuracy_by_instance'] = few_shot_training.by_instance(name, meta, config, setup)
      pictures[f'instances_{name}'] = functools.partial(_draw_instances, name, about_run['accuracy_by_instance'])
    for shot in config.test_shots:
      for result in few_shot_training.judge(name, meta, shot, config, setup):
        rows.append(result.row(workdir, about_run))
        print(_sentence(name, result, rows[-1], config))
    if name in ('meta_sgd', 'maml') and config.ensemble == 1 and not config.alpha_by_step:
      _save_model(workdir / f'model_{name}.safetensors', name, meta, rows, config, setup)
    writers.write_json(workdir / 'results.json', {'rows': rows})
    if curve:
      curves[NAMES[name]] = curve['accuracy']
    pictures[f'task_{name}'] = functools.partial(_draw_task, name, meta, config, setup)
    if getattr(meta, 'alpha', None) is not None:
      pictures[f'alpha_{name}'] = functools.partial(reporting.draw_alpha, meta.alpha)
  if curves:
    pictures['learning_curves'] = lambda plotting: plotting.learning_curves(
      curves, ylabel='query accuracy on training tasks'
    )
  reporting.save_pictures(workdir, pictures)
  return rows


def _save_model(path, name: str, meta, rows: list[dict], config: Config, setup: Setup) -> None:
  """Writes the first run as a file that `metasgd predict` and `FewShotClassifier` take."""
  filters, hidden = config.sizes
  accuracies = {
    f'accuracy_{row["test_shot"]}_shot_{row["batch_norm"]}': f'{100 * row["mean"]:.2f}% ± {100 * row["ci95"]:.2f}'
    for row in rows
    if row['learner'] == name
  }
  shown = {k: v for k, v in dataclasses.asdict(config).items() if k in MODEL_FACTS}
  about = ms.ModelConfig(
    'maml' if name == 'maml' else 'meta_sgd', config.way, setup.image_shape, filters, hidden, config.inner_steps,
    alpha=maml_rate(config) if name == 'maml' else None,
    background='dark' if config.dataset in ('glyphs', 'omniglot') else 'any',
    training={**shown, **accuracies, **writers.provenance()},
  )  # fmt: skip
  ms.save_model(path, ms.FewShotModel(about, reporting.one_run(meta, 0)))


def _sentence(name: str, result: reporting.Result, row: dict[str, Any], config: Config) -> str:
  mean, ci95 = (100 * v for v in result.estimate)
  steps = result.values.shape[-1] - 1
  before = f' after {steps} inner step(s), {100 * result.values[..., 0].mean():.2f}% before' if steps else ''
  over_runs = f', ±{100 * result.over_runs.ci95:.2f} over training runs' if config.seeds > 1 else ''
  paper = few_shot_table.paper_figure(name, config.dataset, config.way, result.about['test_shot'])
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
  def answered(meta, tasks, key):
    task_key, episode_key, adapt_key = jax.random.split(key, 3)
    support, query = tasks.episode(tasks.sample(task_key), episode_key)
    return support, query, learner.predict(learner.adapt(meta, support, adapt_key), query.x)

  tasks = setup.tests[config.test_shots[0]].as_arguments()
  found = answered(reporting.one_run(meta, 0), tasks, test_keys(config.eval_seed)[1])
  return plotting.episode_sheet(*jax.device_get(found))


def _draw_instances(name, values, plotting):
  return plotting.instance_curve({NAMES[name]: values})


def _prepare() -> Callable[[], object]:
  config = options.from_flags(Config)
  workdir = writers.open_workdir(flags.FLAGS.workdir)
  if config.table2 or config.table3:
    return few_shot_table.prepare(config, workdir, build, run)
  setup = build(config)
  return lambda: run(config, workdir, setup)


if __name__ == '__main__':
  options.define_flags(Config)
  flags.DEFINE_string(
    'workdir',
    'runs/classification',
    'Where config.json, metrics, results and pictures go; an earlier run there is replaced.',
  )
  options.main(_prepare)
