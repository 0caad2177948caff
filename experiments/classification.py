"""N-way K-shot classification of characters: Table 2 of Li et al. 2017, and glyphs, which need no download.

python -m experiments.classification
python -m experiments.classification --dataset=omniglot --data_dir=~/tensorflow_datasets
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags

import metasgd_jax as ms
from experiments import options, reporting
from experiments.options import option
from experiments.reporting import NAMES, test_keys
from metasgd_jax import sharding, writers
from metasgd_jax.datasets import omniglot
from metasgd_jax.tasks.few_shot import few_shot, rotate_classes
from metasgd_jax.tasks.glyphs import glyphs

LEARNERS = ('meta_sgd', 'maml')
DATASETS = ('glyphs', 'omniglot')

PAPER_TABLE = {  # (learner, way, shot) on Omniglot → accuracy and half-width in percent; Li et al. 2017, Table 2.
  ('maml', 5, 1): (98.7, 0.4), ('maml', 5, 5): (99.9, 0.1), ('maml', 20, 1): (95.8, 0.3), ('maml', 20, 5): (98.9, 0.2),
  ('meta_sgd', 5, 1): (99.53, 0.26), ('meta_sgd', 5, 5): (99.93, 0.09),
  ('meta_sgd', 20, 1): (95.93, 0.38), ('meta_sgd', 20, 5): (98.97, 0.19),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config:
  """Defaults that a CPU does in minutes; the paper has 15 query drawings, MAML batches of 32 and 60,000 iterations."""

  learner: tuple[str, ...] = option(('meta_sgd',), 'What to train.', choices=LEARNERS)
  dataset: str = option('glyphs', 'Random characters drawn on the device, or Omniglot.', choices=DATASETS)
  data_dir: str | None = option(None, "tfds' data directory for Omniglot, prepared or to be prepared.", kind=str)
  archives: str | None = option(None, "Directory with Omniglot's zip files, to prepare data_dir from.", kind=str)
  verify_archives: bool = option(True, 'Whether those must have the registered checksums.')
  split: str = option('random', "Characters: 1200/423 at random, or Vinyals' alphabets.", choices=('random', 'vinyals'))
  way: int = option(5, 'Classes of a task.', low=2, high=1000)
  shot: int = option(1, 'Support drawings of a class, in training and in testing.', low=1, high=1000)
  query: int = option(5, 'Query drawings of a class in training.', low=1, high=1000)
  inner_steps: int = option(1, 'Inner steps, in training and in testing.', low=0, high=100)
  alpha: float | None = option(
    None, "MAML's inner rate (0.4 if not given), and Meta-SGD's start (U[0.005, 0.1] if not given).",
    low=-100.0, high=100.0, kind=float,
  )  # fmt: skip
  filters: int = option(64, 'Filters of a convolution.', low=1, high=4096)
  precision: str = option(
    'float32', 'Of activations; parameters, rates and sums stay float32.', choices=('float32', 'bfloat16')
  )
  meta_batch: int = option(4, 'Tasks in a meta-iteration.', low=1, high=10_000)
  meta_iterations: int = option(500, 'Meta-iterations.', low=1, high=2**31 - 1)
  learning_rate: float = option(1e-3, 'Of Adam, the outer optimiser, at the start.', low=1e-12, high=1e3)
  schedule: str = option(
    'constant', 'Of the learning rate: as it is, or down to 0 as a cosine.', choices=('constant', 'cosine')
  )
  seeds: int = option(1, 'Training runs, one after the other.', low=1, high=1000)
  seed: int = option(0, 'Of the first run; the next has the next.', low=0, high=2**31 - 1001)
  split_seed: int = option(0, 'Of the random split.', low=0, high=2**31 - 1)
  eval_seed: int = option(0, 'Of the tasks to test on.', low=0, high=2**31 - 1)
  eval_tasks: int = option(600, 'Unseen tasks to test on.', low=2, high=100_000)
  eval_query: int = option(15, 'Query drawings of a class in testing.', low=1, high=1000)

  tensorboard: bool = option(False, "Write TensorBoard's event files too.")

  def __post_init__(self):
    options.check(self)
    if self.dataset == 'omniglot' and self.data_dir is None:
      raise ValueError(
        'dataset omniglot needs data_dir, the directory where tfds keeps or shall keep it, '
        'such as --data_dir=~/tensorflow_datasets'
      )


@dataclasses.dataclass(frozen=True)
class Setup:
  """What a configuration stands for, built and checked.

  Attributes:
    train: tasks to train on.
    test: unseen tasks, with as many shots.
    learners: by name.
    optimizer: the outer one.
  """

  train: ms.TaskDistribution
  test: ms.TaskDistribution
  learners: dict[str, ms.Learner]
  optimizer: optax.GradientTransformation


def build(config: Config) -> Setup:
  """Builds tasks, reading the data set, learners and optimiser.

  Raises:
    ValueError: settings that do not fit the data.
    DatasetError: the data set cannot be had.
  """
  way, shot = config.way, config.shot
  if config.dataset == 'glyphs':
    train, test = (glyphs(way=way, shot=shot, query=query) for query in (config.query, config.eval_query))
  else:
    characters = omniglot.load(
      config.data_dir or '', archives=config.archives, verify_archives=config.verify_archives, report=print
    )
    splits = (
      omniglot.vinyals_split(characters)
      if config.split == 'vinyals'
      else omniglot.random_split(characters, seed=config.split_seed)
    )
    train = few_shot(rotate_classes(splits.train), way=way, shot=shot, query=config.query)
    test = few_shot(splits.test, way=way, shot=shot, query=config.eval_query)
  rate = config.learning_rate
  if config.schedule == 'cosine':
    rate = optax.cosine_decay_schedule(rate, config.meta_iterations)
  learners = {name: build_learner(name, config) for name in config.learner}
  return Setup(train, test, learners, optax.adam(rate))


def build_learner(name: str, config: Config) -> ms.Learner:
  """Returns the learner on the paper's Conv4."""
  dtype = jnp.bfloat16 if config.precision == 'bfloat16' else None
  model = ms.nn.from_linen(ms.nn.Conv4(config.way, filters=config.filters, dtype=dtype))
  loss, metrics = ms.losses.cross_entropy, {'accuracy': ms.losses.accuracy}
  steps = config.inner_steps
  if name == 'maml':
    return ms.maml(model, loss, alpha=0.4 if config.alpha is None else config.alpha, steps=steps, metrics=metrics)
  start = (0.005, 0.1) if config.alpha is None else (config.alpha, config.alpha)
  return ms.meta_sgd(model, loss, alpha_range=start, steps=steps, metrics=metrics)


def run(config: Config, workdir: writers.PathLike, setup: Setup | None = None) -> list[dict]:
  """Trains, tests, prints, draws and writes; returns the rows of results.json. `setup` is `build(config)`."""
  setup = setup or build(config)
  workdir = writers.open_workdir(workdir)
  metrics = reporting.start(workdir, config)
  rows, curves = [], {}
  pictures: dict[str, Callable[[Any], Any]] = {}
  for name, learner in setup.learners.items():
    meta, curve = _train(name, learner, config, setup, metrics)
    writers.write_params(workdir / f'params_{name}.msgpack', meta)
    result = _test(name, learner, meta, config, setup)
    about_run = {
      'inner_steps': config.inner_steps, 'meta_iterations': config.meta_iterations, 'meta_batch': config.meta_batch,
      'query': config.query, 'eval_query': config.eval_query, 'transductive': True, 'metric': 'accuracy',
    }  # fmt: skip
    rows.append(result.row(workdir, about_run))
    writers.write_json(workdir / 'results.json', {'rows': rows})
    print(_sentence(name, result, config))
    curves[NAMES[name]] = curve['accuracy']
    pictures[f'task_{name}'] = functools.partial(_draw_task, learner, meta, config, setup)
    if meta.alpha is not None:
      pictures[f'alpha_{name}'] = functools.partial(reporting.draw_alpha, meta.alpha)
  pictures['learning_curves'] = lambda plotting: plotting.learning_curves(
    curves, ylabel='query accuracy on training tasks'
  )
  reporting.save_pictures(workdir, pictures)
  return rows


def _train(name, learner, config: Config, setup: Setup, metrics: list[writers.Writer]):
  """Trains R runs one after the other; a network as large as this gains nothing from running them side by side."""
  metas, curves = [], []
  for r, key in enumerate(reporting.seed_keys(config.seed, config.seeds)):
    label = NAMES[name] + (f' run {r + 1} of {config.seeds}' if config.seeds > 1 else '')
    recorder = reporting.Recorder(label, metrics)
    print(f'{label}: compiling', flush=True)
    state = ms.init(key, setup.train, learner=learner, optimizer=setup.optimizer)
    state = ms.train(
      state, setup.train, learner=learner, optimizer=setup.optimizer, meta_iterations=config.meta_iterations,
      meta_batch=config.meta_batch, mesh=sharding.task_mesh(config.meta_batch),
      chunk=min(50, -(-config.meta_iterations // 20)), callbacks=[recorder],
    )  # fmt: skip
    metas.append(state.meta)
    curves.append(recorder.curves)
  meta = jax.tree.map(lambda *leaves: np.stack(leaves), *metas)
  return meta, {k: (steps, np.concatenate([c[k][1] for c in curves], 1)) for k, (steps, _) in curves[0].items()}


def _test(name, learner, meta, config: Config, setup: Setup) -> reporting.Result:
  print(f'{NAMES[name]}: testing on {config.eval_tasks} unseen tasks', flush=True)
  values = [
    ms.evaluate(
      learner, reporting.one_run(meta, r), setup.test, test_keys(config.eval_seed)[0], metric_fn=ms.losses.accuracy,
      num_tasks=config.eval_tasks, mesh=sharding.task_mesh(config.eval_tasks),
    )[:, 0]
    for r in range(config.seeds)
  ]  # fmt: skip
  about = {'dataset': config.dataset, 'learner': name, 'way': config.way, 'shot': config.shot}
  return reporting.Result(about, np.stack(values))


def _sentence(name: str, result: reporting.Result, config: Config) -> str:
  mean, ci95 = (100 * v for v in result.estimate)
  before = 100 * result.values[..., 0].mean()
  over_runs = f', ±{100 * result.over_runs.ci95:.2f} over training runs' if config.seeds > 1 else ''
  paper = (
    PAPER_TABLE.get((name, config.way, config.shot))
    if config.dataset == 'omniglot' and config.inner_steps == 1
    else None
  )
  return (
    f'{NAMES[name]}, {config.dataset}, {config.way}-way {config.shot}-shot: {mean:.2f}% ± {ci95:.2f} after '
    f'{config.inner_steps} inner step(s), {before:.2f}% before; '
    f'95% interval over {config.eval_tasks} unseen tasks{over_runs}; '
    f'{config.seeds} training run(s) of {config.meta_iterations:,} meta-iterations of {config.meta_batch} tasks; '
    'batch norm by the batch at hand' + (f'; the paper has {paper[0]} ± {paper[1]}' if paper else '')
  )


def _draw_task(learner, meta, config: Config, setup: Setup, plotting):
  """One unseen task and the first run's answers."""

  @jax.jit
  def answered(meta, tasks, key):
    task_key, episode_key, adapt_key = jax.random.split(key, 3)
    support, query = tasks.episode(tasks.sample(task_key), episode_key)
    return support, query, learner.predict(learner.adapt(meta, support, adapt_key), query.x)

  found = answered(reporting.one_run(meta, 0), setup.test.as_arguments(), test_keys(config.eval_seed)[1])
  return plotting.episode_sheet(*jax.device_get(found))


def _prepare() -> Callable[[], object]:
  config = options.from_flags(Config)
  workdir = writers.open_workdir(flags.FLAGS.workdir)
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
