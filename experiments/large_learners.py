"""Meta-SGD with larger networks: ResNet-12 on images, or a transformer on Markov chains.

python -m experiments.large_learners                         low-rank changes of a narrow ResNet-12, on glyphs
python -m experiments.large_learners --network=transformer
python -m experiments.large_learners --plan --widths=64,160,320,640 --dataset=omniglot --data_dir=~/tensorflow_datasets

The whole network adapts, or only a part of it, or low-rank changes of its matrices. The memory that training takes is
printed before training begins.
"""

import dataclasses
import functools
from operator import methodcaller
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

import metasgd_jax as ms
from experiments import classification, few_shot_data, inspecting, options, reporting, resuming, running, trainings
from experiments.few_shot_data import DATASETS
from experiments.jobs import Jobs
from experiments.options import option
from experiments.reporting import Result, test_keys
from experiments.resuming import Keeping
from experiments.trainings import Training
from metasgd_jax.inner.adaptation import Adjoint
from metasgd_jax.io.files import PathLike
from metasgd_jax.losses import accuracy, cross_entropy, per_token
from metasgd_jax.tasks.markov import MarkovConfig, markov_chains
from metasgd_jax.types import Tasks

NETWORKS = {'resnet12': 'ResNet-12', 'transformer': 'transformer'}
METRICS = {
  'resnet12': {'loss': cross_entropy, 'accuracy': accuracy},
  'transformer': {'loss': per_token(cross_entropy), 'accuracy': per_token(accuracy)},
}
PARTS = ('all', 'head', 'norms', 'low_rank')
LEAVES = {  # Functions that select leaves by name: those that adapt or, for 'low_rank', that get a low-rank change.
  ('resnet12', 'head'): lambda name: name.startswith('Dense'),
  ('resnet12', 'norms'): lambda name: 'BatchNorm' in name,
  ('resnet12', 'low_rank'): lambda name: (
    name.endswith('kernel') and 'Conv_0' not in name and not name.startswith('Dense')
  ),
  ('transformer', 'head'): lambda name: name.startswith('tokens_out'),
  ('transformer', 'norms'): lambda name: 'norm' in name,
  ('transformer', 'low_rank'): lambda name: name.startswith('block') and name.endswith('kernel'),
}
FLOOR_TASKS = 500
"""Number of Markov chains over which the loss of the true transition probabilities is averaged."""


@dataclasses.dataclass(frozen=True)
class Config:
  """Settings of an experiment. A CPU trains the narrow default networks in minutes.

  Papers with ResNet-12 use the widths 64,160,320,640.
  """

  network: str = option('resnet12', 'Network that is meta-trained by Meta-SGD.', choices=tuple(NETWORKS))
  adapts: str = option('low_rank', 'Part of θ that adapts; low_rank includes the last layer.', choices=PARTS)
  rank: int = option(4, 'Rank of the low-rank changes.', low=1, high=1024)
  widths: tuple[int, ...] = option((16, 32, 64, 128), "Widths of ResNet-12's blocks.", low=1)
  width: int = option(64, "Width of the transformer's residual stream.", low=1, high=65_536)
  depth: int = option(2, 'Blocks of the transformer.', low=1, high=1000)
  heads: int = option(4, 'Attention heads of the transformer.', low=1, high=1024)
  dataset: str = option('glyphs', 'Images for ResNet-12; glyphs are drawn on the device.', choices=DATASETS)
  data_dir: str | None = option(None, 'Directory of the data set; see experiments.classification.', kind=str)
  way: int = option(5, 'Classes per task of images.', low=2, high=1000)
  tokens: int = option(8, 'Number of different tokens in a Markov chain.', low=2, high=65_536)
  length: int = option(16, 'Number of tokens in a sequence.', low=1, high=65_536)
  shot: int = option(1, 'Support images per class, or support sequences per chain.', low=1, high=1000)
  query: int = option(5, 'Query images per class, or query sequences per chain.', low=1, high=1000)
  inner_steps: int = option(1, 'Inner steps, in training and in testing.', low=0, high=1000)
  adjoint: str = option('reverse', 'Outer gradient; revolve suits hundreds of inner steps.', choices=get_args(Adjoint))
  alpha: float = option(0.05, 'Initial α.', low=-100.0, high=100.0)
  meta_batch: int = option(4, 'Tasks per meta-iteration.', low=1, high=10_000)
  tasks_at_once: int = option(0, 'Tasks that a device computes together; 0 depends on the size.', low=0, high=10_000)
  meta_iterations: int = option(300, 'Meta-iterations.', low=1, high=2**31 - 1)
  learning_rate: float = option(1e-3, 'Learning rate of Adam, the outer optimiser.', low=1e-12, high=1e3)
  seed: int = option(0, 'Seed of training.', low=0, high=2**31 - 1)
  eval_seed: int = option(0, 'Seed of the tasks of the test.', low=0, high=2**31 - 1)
  eval_tasks: int = option(200, 'Unseen tasks in the test.', low=2, high=100_000)
  bad_steps: str = trainings.bad_steps_option()
  tensorboard: bool = option(False, 'Also write event files for TensorBoard.')

  def __post_init__(self):
    options.check(self)

  @property
  def label(self) -> str:
    """Name of the training in printed text."""
    part = f'rank {self.rank}' if self.adapts == 'low_rank' else self.adapts
    return f'{NETWORKS[self.network]} ({part})'


class Setup(NamedTuple):
  """The objects that a configuration describes.

  `devices` is the number of devices of each process, or `None` for the largest number that can share the tasks evenly.
  """

  learner: ms.Learner
  tests: Tasks
  training: Training
  devices: int | None


def build_model(config: Config) -> ms.Model:
  """Returns the network `config.network` as a model in which only the part `config.adapts` adapts."""
  if config.network == 'resnet12':
    network: Any = ms.nn.ResNet12(config.way, config.widths)
  else:
    network = ms.nn.Transformer(config.tokens, config.length, config.width, config.depth, config.heads)
  model = ms.nn.from_linen(network)
  if config.adapts == 'all':
    return model
  if config.adapts != 'low_rank':
    return ms.adapt_only(model, LEAVES[config.network, config.adapts])
  head = ms.adapt_only(model, LEAVES[config.network, 'head'])
  return ms.low_rank(head, config.rank, LEAVES[config.network, 'low_rank'])


def build_tasks(config: Config) -> tuple[Tasks, Tasks]:
  """Returns two distributions: tasks to train on, and unseen tasks to test on.

  Raises:
    ValueError: if the settings do not fit the data.
    DatasetError: if the data set cannot be loaded.
  """
  counts = running.settings(config, 'shot', 'query')
  if config.network == 'transformer':
    tasks = markov_chains(MarkovConfig(config.tokens, config.length), **counts)
    return tasks, tasks
  shared = running.settings(config, 'dataset', 'data_dir', 'way', 'shot', 'query')
  images = classification.Config(**shared, eval_query=config.query)
  data = few_shot_data.placed(few_shot_data.load(images), 'auto')
  return few_shot_data.tasks(data.train, images.way, **counts), few_shot_data.tasks(data.test, images.way, **counts)


def build(config: Config, devices: int | None = None) -> Setup:
  """Builds and checks the learner, the training and the unseen tasks.

  Args:
    config: Configuration of the experiment.
    devices: Number of devices of each process; `None` uses all that can share the tasks evenly.

  Raises:
    ValueError: if settings do not fit the data or one another, or if the devices cannot share the tasks evenly.
    DatasetError: if the data set cannot be loaded.
  """
  train, tests = build_tasks(config)
  loss, others = METRICS[config.network]['loss'], {'accuracy': METRICS[config.network]['accuracy']}
  how: dict[str, Any] = running.settings(config, 'adjoint') | {'alpha': ms.AlphaConfig(config.alpha, config.alpha)}
  learner = ms.meta_sgd(build_model(config), loss, steps=config.inner_steps, metrics=others, **how)
  optimizer = trainings.optimizer_of(config, optax.adam(config.learning_rate))
  placement = ms.Placement(config.tasks_at_once or 'auto', ms.sharding.task_mesh(config.meta_batch, devices=devices))
  chunk = running.chunk(config, config.meta_iterations)
  how = dict(learner=learner, optimizer=optimizer, placement=placement, chunk=chunk)
  key = jax.random.key(config.seed)
  training = running.by_gradient(config, config.network, config.label, key, train, **how)
  meta = jax.eval_shape(training.start).meta  # Raises an error if the network does not fit the tasks.
  placement.group(meta, config.meta_batch // placement.devices)
  return Setup(learner, tests, training, devices)


def run(config: Config, workdir: PathLike, setup: Setup | None = None, keeping: Keeping | None = None) -> list[dict]:
  """Trains and tests the learner, prints and draws the results, and writes files. Returns the rows of results.json.

  The memory that training takes is printed first. If `setup` is left out, `build(config)` creates the setup.
  """
  setup = setup or build(config)
  with resuming.open_run(workdir, config, keeping) as opened:
    return opened.rows or _run(config, setup, opened)


def _run(config: Config, setup: Setup, opened: resuming.Run) -> list[dict]:
  inspecting.print_memory([setup.training])
  trained = running.train(setup.training, opened)
  meta = trained.state.meta
  about_run = {'theta_entries': _entries(meta.theta), 'alpha_entries': _entries(meta.alpha)}
  about_run |= running.settings(config, 'inner_steps', 'meta_iterations', 'meta_batch') | trained.skipped
  results = [_test(metric, meta, config, setup) for metric in METRICS[config.network]]
  rows = [result.row(opened.path, about_run) for result in results]
  running.write_results('large_learners', config, opened, rows)
  for result in results:
    print(_sentence(result, about_run, config))
  if config.network == 'transformer':
    print(f'  loss of the true transition probabilities: {_floor(setup.tests, config):.3f}')
  curves = {config.label: trained.curves['loss']}
  draw = methodcaller('learning_curves', curves, ylabel='query loss on training tasks')
  reporting.save_pictures(opened.path, {'learning_curves': draw}, opened.metrics)
  return rows


def _entries(tree: Any) -> int:
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _test(metric: str, meta: ms.MetaParams, config: Config, setup: Setup) -> Result:
  metric_fn = METRICS[config.network][metric]
  values = running.evaluate(setup.learner, [meta], setup.tests, config, setup.devices, metric_fn=metric_fn)
  about = {'network': config.network, 'adapts': config.adapts, 'learner': 'meta_sgd', 'metric': metric}
  return Result(about, values)


def _sentence(result: Result, about_run: dict[str, Any], config: Config) -> str:
  mean, ci95 = result.estimate
  return (
    f'{config.label}, {about_run["theta_entries"]:,} entries of θ and {about_run["alpha_entries"]:,} of α: '
    f'{result.about["metric"]} {mean:.3f} ± {ci95:.3f} after {config.inner_steps} inner step(s), '
    f'{result.values[..., 0].mean():.3f} before; '
    f'{config.eval_tasks} unseen tasks, {config.meta_iterations:,} meta-iterations of {config.meta_batch}'
  )


def _floor(tasks: Any, config: Config) -> float:
  """Returns the mean loss of predictions by the true transition probabilities. No learner can expect a lower loss."""

  def of_task(key):
    task_key, episode_key = jax.random.split(key)
    task = tasks.sample(task_key)
    query = tasks.episode(task, episode_key).query
    return per_token(cross_entropy)(task(query.x), query.y)

  keys = jax.random.split(test_keys(config.eval_seed)[0], FLOOR_TASKS)
  return float(jnp.mean(jax.jit(jax.vmap(of_task))(keys)))


def _prepare(config: Config, workdir: PathLike, keeping: Keeping, devices: int | None, jobs: Jobs) -> running.Prepared:
  del jobs  # There is only one training.
  setup = build(config, devices)
  return [setup.training], functools.partial(run, config, workdir, setup, keeping)


if __name__ == '__main__':
  running.main('large_learners', Config, _prepare)
