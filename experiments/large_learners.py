"""Larger learners of which a part adapts: ResNet-12 on pictures, a transformer on Markov chains.

python -m experiments.large_learners                         low-rank changes of a narrow ResNet-12, on drawn characters
python -m experiments.large_learners --network=transformer
python -m experiments.large_learners --plan --widths=64,160,320,640 --dataset=omniglot --data_dir=~/tensorflow_datasets

What memory training takes is printed before it begins.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, get_args

import jax
import jax.numpy as jnp
import optax
from absl import flags

import metasgd_jax as ms
from experiments import classification, few_shot_data, options, processes, reporting, resuming, trainings
from experiments.few_shot_data import DATASETS
from experiments.options import option
from experiments.processes import Machines
from experiments.reporting import test_keys
from experiments.resuming import Keeping
from experiments.trainings import Training
from metasgd_jax.inner.adaptation import Adjoint
from metasgd_jax.io import files
from metasgd_jax.losses import accuracy, cross_entropy, per_token
from metasgd_jax.outer import sharding
from metasgd_jax.tasks.markov import MarkovConfig, markov_chains
from metasgd_jax.types import Tasks

NETWORKS = {'resnet12': 'ResNet-12', 'transformer': 'transformer'}
PARTS = ('all', 'head', 'norms', 'low_rank')
NAMES = {  # network → which leaves are the head's, the norms', and matrices that low-rank changes are of
  'resnet12': (
    lambda name: name.startswith('Dense'),
    lambda name: 'BatchNorm' in name,
    lambda name: name.endswith('kernel') and 'Conv_0' not in name and not name.startswith('Dense'),
  ),
  'transformer': (
    lambda name: name.startswith('tokens_out'),
    lambda name: 'norm' in name,
    lambda name: name.startswith('block') and name.endswith('kernel'),
  ),
}
FLOOR_TASKS = 500


@dataclasses.dataclass(frozen=True)
class Config:
  """Narrow networks, which a CPU trains in minutes."""

  network: str = option('resnet12', 'What is meta-trained, by Meta-SGD.', choices=tuple(NETWORKS))
  adapts: str = option(
    'low_rank', 'What of θ adapts: all, the last layer, the norms, or that layer and low-rank changes of the others.',
    choices=PARTS,
  )  # fmt: skip
  rank: int = option(4, 'Of those changes.', low=1, high=1024)
  widths: tuple[int, ...] = option((16, 32, 64, 128), "Of ResNet-12's blocks; its papers have 64,160,320,640.", low=1)
  width: int = option(64, "Of the transformer's residual stream.", low=1, high=65_536)
  depth: int = option(2, 'Of its blocks.', low=1, high=1000)
  heads: int = option(4, 'Of its attention.', low=1, high=1024)
  dataset: str = option('glyphs', "ResNet-12's pictures; glyphs are drawn on the device.", choices=DATASETS)
  data_dir: str | None = option(None, 'Directory of another data set, as in experiments.classification.', kind=str)
  way: int = option(5, 'Classes of a task of pictures.', low=2, high=1000)
  tokens: int = option(8, 'Of a chain.', low=2, high=65_536)
  length: int = option(16, "Of a chain's sequence.", low=1, high=65_536)
  shot: int = option(1, 'Support pictures of a class; of a chain, its sequences.', low=1, high=1000)
  query: int = option(5, 'Query pictures of a class; of a chain, its sequences.', low=1, high=1000)
  inner_steps: int = option(1, 'Inner steps, in training and in testing.', low=0, high=1000)
  adjoint: str = option(
    'reverse', "The outer gradient's way back; revolve for inner steps by the hundred.", choices=get_args(Adjoint)
  )
  alpha: float = option(0.05, "α's start.", low=-100.0, high=100.0)
  meta_batch: int = option(4, 'Tasks in a meta-iteration.', low=1, high=10_000)
  tasks_at_once: int = option(
    0, "Tasks that a device takes at the same time; 0 goes by the network's size.", low=0, high=10_000
  )
  meta_iterations: int = option(300, 'Meta-iterations.', low=1, high=2**31 - 1)
  learning_rate: float = option(1e-3, 'Of Adam, the outer optimiser.', low=1e-12, high=1e3)
  seed: int = option(0, 'Of training.', low=0, high=2**31 - 1)
  eval_seed: int = option(0, 'Of the tasks to test on.', low=0, high=2**31 - 1)
  eval_tasks: int = option(200, 'Unseen tasks to test on.', low=2, high=100_000)
  bad_steps: str = trainings.bad_steps_option()
  tensorboard: bool = option(False, "Write TensorBoard's event files too.")

  def __post_init__(self):
    options.check(self)

  @property
  def label(self) -> str:
    """What people read."""
    part = f'rank {self.rank}' if self.adapts == 'low_rank' else self.adapts
    return f'{NETWORKS[self.network]} ({part})'


@dataclasses.dataclass(frozen=True)
class Setup:
  """What a configuration stands for: the learner, tasks to train and to test on, its metrics by name, the training."""

  learner: ms.Learner
  train: Tasks
  test: Tasks
  metrics: dict[str, Callable[..., Any]]
  training: Training
  devices: int | None = None


def build_model(config: Config) -> ms.Model:
  """Returns the network, of which the part that is asked for adapts."""
  if config.network == 'resnet12':
    model = ms.nn.from_linen(ms.nn.ResNet12(config.way, config.widths))
  else:
    model = ms.nn.from_linen(ms.nn.Transformer(config.tokens, config.length, config.width, config.depth, config.heads))
  head, norms, matrices = NAMES[config.network]
  if config.adapts == 'all':
    return model
  if config.adapts == 'low_rank':
    return ms.low_rank(ms.adapt_only(model, head), config.rank, matrices)
  return ms.adapt_only(model, head if config.adapts == 'head' else norms)


def build_tasks(config: Config) -> tuple[Tasks, Tasks]:
  """Returns tasks to train on, and unseen ones.

  Raises:
    ValueError: settings that do not fit the data.
    DatasetError: the data set cannot be had.
  """
  if config.network == 'transformer':
    tasks = markov_chains(MarkovConfig(config.tokens, config.length), shot=config.shot, query=config.query)
    return tasks, tasks
  pictures = classification.Config(
    dataset=config.dataset, data_dir=config.data_dir, way=config.way, shot=config.shot, query=config.query,
    eval_query=config.query,
  )  # fmt: skip
  data = few_shot_data.placed(few_shot_data.load(pictures), 'auto')
  train, test = (
    few_shot_data.tasks(bank, pictures, shot=config.shot, query=config.query) for bank in (data.train, data.test)
  )
  return train, test


def build(config: Config, devices: int | None = None) -> Setup:
  """Builds and checks everything; `devices` of each process share tasks, as many as can where left out.

  Raises:
    ValueError: settings that do not fit the data or one another, or devices that cannot share the tasks evenly.
    DatasetError: the data set cannot be had.
  """
  of_all = per_token if config.network == 'transformer' else lambda metric: metric
  metrics = {'loss': of_all(cross_entropy), 'accuracy': of_all(accuracy)}
  learner = ms.meta_sgd(
    build_model(config), metrics['loss'], steps=config.inner_steps, adjoint=config.adjoint,  # type: ignore[arg-type]
    alpha_range=(config.alpha, config.alpha), metrics={'accuracy': metrics['accuracy']},
  )  # fmt: skip
  train, test = build_tasks(config)
  placement = ms.Placement(config.tasks_at_once or 'auto', sharding.task_mesh(config.meta_batch, devices=devices))
  optimizer = trainings.optimizer_of(config, optax.adam(config.learning_rate))
  start = lambda: ms.init(jax.random.key(config.seed), train, learner=learner, optimizer=optimizer)
  meta = jax.eval_shape(start).meta  # Raises what is wrong with the network.
  placement.group(meta, config.meta_batch // placement.devices)
  training = trainings.by_gradient(
    config.network, config.label, start, train, learner=learner, optimizer=optimizer,
    meta_iterations=config.meta_iterations, meta_batch=config.meta_batch, chunk=-(-config.meta_iterations // 20),
    placement=placement,
  )  # fmt: skip
  return Setup(learner, train, test, metrics, training, devices)


def run(
  config: Config, workdir: files.PathLike, setup: Setup | None = None, keeping: Keeping | None = None
) -> list[dict]:
  """Prints the plan, trains, tests, draws and writes; returns the rows of results.json. `setup` is `build(config)`."""
  setup = setup or build(config)
  with resuming.open_run(workdir, config, keeping) as opened:
    if opened.rows:
      return opened.rows
    trainings.print_memory([setup.training])
    done = trainings.train(setup.training, opened)
    workdir = opened.workdir
    files.write_params(workdir / f'params_{config.network}.msgpack', done.state.meta)
    results = {name: _test(name, done.state.meta, config, setup) for name in setup.metrics}
    rows = [result.row(workdir, {**_about(done.state.meta, config), **done.skipped}) for result in results.values()]
    files.write_json(workdir / 'results.json', {**options.recipe('large_learners', config), 'rows': rows})
    opened.stop.ask()
    for result in results.values():
      print(_sentence(result, rows[0], config))
    if config.network == 'transformer':
      print(f'  loss of whoever knows the chain: {_floor(setup.test, config):.3f}')
    curves = {config.label: done.curves['loss']}
    reporting.save_pictures(
      workdir,
      {'learning_curves': lambda plotting: plotting.learning_curves(curves, ylabel='query loss on training tasks')},
      opened.metrics,
    )
  return rows


def _about(meta: ms.MetaParams, config: Config) -> dict[str, Any]:
  entries = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
  return {
    'theta_entries': entries(meta.theta), 'alpha_entries': entries(meta.alpha), 'inner_steps': config.inner_steps,
    'meta_iterations': config.meta_iterations, 'meta_batch': config.meta_batch,
  }  # fmt: skip


def _test(name: str, meta: ms.MetaParams, config: Config, setup: Setup) -> reporting.Result:
  values = ms.evaluate(
    setup.learner, meta, setup.test, test_keys(config.eval_seed)[0], metric_fn=setup.metrics[name],
    num_tasks=config.eval_tasks, placement=ms.Placement(mesh=processes.mesh_to_judge(config.eval_tasks, setup.devices)),
  )[:, 0]  # fmt: skip
  about = {'network': config.network, 'adapts': config.adapts, 'learner': 'meta_sgd', 'metric': name}
  return reporting.Result(about, values[None])


def _sentence(result: reporting.Result, row: dict[str, Any], config: Config) -> str:
  mean, ci95 = result.estimate
  return (
    f'{config.label}, {row["theta_entries"]:,} entries of θ and {row["alpha_entries"]:,} of α: '
    f'{result.about["metric"]} {mean:.3f} ± {ci95:.3f} after {config.inner_steps} inner step(s), '
    f'{result.values[..., 0].mean():.3f} before; '
    f'{config.eval_tasks} unseen tasks, {config.meta_iterations:,} meta-iterations of {config.meta_batch}'
  )


def _floor(tasks: Any, config: Config) -> float:
  """Returns the mean loss of the chains themselves."""

  def of_task(key):
    task_key, episode_key = jax.random.split(key)
    task = tasks.sample(task_key)
    query = tasks.episode(task, episode_key).query
    return per_token(cross_entropy)(task(query.x), query.y)

  keys = jax.random.split(test_keys(config.eval_seed)[0], FLOOR_TASKS)
  return float(jnp.mean(jax.jit(jax.vmap(of_task))(keys)))


def _prepare() -> Callable[[], object]:
  config, keeping = options.from_flags(Config), options.from_flags(Keeping)
  workdir = processes.open_workdir(flags.FLAGS.workdir)
  setup = build(config, options.from_flags(Machines).devices)
  looked_into = trainings.look([setup.training], config, workdir, keeping)
  return looked_into or functools.partial(run, config, workdir, setup, keeping)


if __name__ == '__main__':
  resuming.define_flags(Config, Keeping, Machines, workdir='runs/large_learners')
  processes.main(_prepare, Config)
