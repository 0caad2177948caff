"""Few-shot regression on sine curves: Table 1 and Figure 3 of Li et al. 2017.

python -m experiments.regression             Meta-SGD and MAML, trained on 5 shots, beside the paper's figures
python -m experiments.regression --table1    all of Table 1
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from absl import flags, logging

import metasgd_jax as ms
from experiments import options, processes, reporting, resuming, trainings
from experiments.options import option
from experiments.processes import Machines
from experiments.reporting import NAMES, test_keys
from experiments.resuming import Keeping
from experiments.trainings import Training
from metasgd_jax.io import files
from metasgd_jax.outer import sharding
from metasgd_jax.tasks.sinusoid import MAML_SINUSOIDS, META_SGD_SINUSOIDS, sinusoid

LEARNERS = ('meta_sgd', 'maml')
DATASETS = {'sinusoids': META_SGD_SINUSOIDS, 'sinusoids_maml': MAML_SINUSOIDS}
TEST_SHOTS = (5, 10, 20)

PAPER_TABLE = {  # (learner, shots in training) → mean and half-width at 5, 10 and 20 shots; Li et al. 2017, Table 1.
  ('maml', 5): ((1.13, 0.18), (0.85, 0.14), (0.71, 0.12)),
  ('meta_sgd', 5): ((0.90, 0.16), (0.63, 0.12), (0.50, 0.10)),
  ('maml', 10): ((1.17, 0.16), (0.77, 0.11), (0.56, 0.08)),
  ('meta_sgd', 10): ((0.88, 0.14), (0.53, 0.09), (0.35, 0.06)),
  ('maml', 20): ((1.29, 0.20), (0.76, 0.12), (0.48, 0.08)),
  ('meta_sgd', 20): ((1.01, 0.17), (0.54, 0.08), (0.31, 0.05)),
}
SECOND_HAND = {(shot, test_shot) for shot in (10, 20) for test_shot in (5, 10)}
"""Cells of which we saw no quotation that names the paper; printed with a star."""


@dataclasses.dataclass(frozen=True)
class Config:
  """The paper's settings, section 4.1. The batch of 4 tasks and Adam at 1e-3 are what reimplementations chose."""

  learner: tuple[str, ...] = option(LEARNERS, 'What to train.', choices=LEARNERS)
  dataset: str = option('sinusoids', "The paper's curves, or MAML's own (frequency 1).", choices=tuple(DATASETS))
  shot: int = option(5, 'Support points of a curve in training.', low=1, high=1000)
  query: int = option(10, 'Query points of a curve in training.', low=1, high=1000)
  table1: bool = option(False, 'Train both learners on 5, 10 and 20 shots, whatever --learner and --shot say.')
  inner_steps: int = option(1, 'Inner steps, in training and in testing.', low=0, high=100)
  alpha: float | None = option(
    None, "MAML's inner rate (0.01 if not given), and Meta-SGD's start (U[0.005, 0.1] if not given).",
    low=-100.0, high=100.0, kind=float,
  )  # fmt: skip
  meta_batch: int = option(4, 'Curves in a meta-iteration.', low=1, high=10_000)
  meta_iterations: int = option(60_000, 'Meta-iterations.', low=1, high=2**31 - 1)
  learning_rate: float = option(1e-3, 'Of Adam, the outer optimiser.', low=1e-12, high=1e3)
  seeds: int = option(3, 'Training runs, side by side.', low=1, high=1000)
  seed: int = option(0, 'Of the first run; the next has the next.', low=0, high=2**31 - 1001)
  eval_seed: int = option(0, 'Of the curves and points to test on.', low=0, high=2**31 - 1)
  eval_tasks: int = option(100, 'Unseen curves to test on.', low=2, high=100_000)
  eval_repeats: int = option(100, 'Draws of support and query points a curve.', low=1, high=10_000)
  eval_query: int = option(100, 'Query points in testing.', low=1, high=10_000)
  bad_steps: str = trainings.bad_steps_option()
  tensorboard: bool = option(False, "Write TensorBoard's event files too.")

  def __post_init__(self):
    options.check(self)

  @property
  def runs(self) -> list[tuple[str, int]]:
    """What is trained: (learner, shots)."""
    shots = TEST_SHOTS if self.table1 else (self.shot,)
    return [(learner, shot) for shot in shots for learner in (LEARNERS if self.table1 else self.learner)]


@dataclasses.dataclass(frozen=True)
class Trained:
  """One training: its learner, the last meta-parameters of R runs, and its curves over meta-iterations."""

  name: str
  shot: int
  learner: ms.Learner
  meta: ms.MetaParams
  curves: dict[str, tuple[np.ndarray, np.ndarray]]


def build_learner(name: str, config: Config) -> ms.Learner:
  """Returns the learner on the paper's net, 1-40-40-1."""
  model = ms.nn.from_linen(ms.nn.MLP())
  loss = ms.losses.mean_squared_error
  if name == 'maml':
    return ms.maml(model, loss, alpha=0.01 if config.alpha is None else config.alpha, steps=config.inner_steps)
  start = (0.005, 0.1) if config.alpha is None else (config.alpha, config.alpha)
  return ms.meta_sgd(model, loss, alpha_range=start, steps=config.inner_steps)


def plan(config: Config, devices: int = 1) -> list[tuple[Training, ms.Learner]]:
  """Returns what `config.runs` names, before it is trained, on so many devices of each process.

  One device has a few small curves done before several have talked to each other.

  Raises:
    ValueError: the devices cannot share the curves of a meta-iteration evenly.
  """
  learners = {name: build_learner(name, config) for name in LEARNERS}
  optimizer = trainings.optimizer_of(config, optax.adam(config.learning_rate))
  mesh = sharding.task_mesh(config.meta_batch, devices=devices)
  return [
    (_training(name, shot, learners[name], optimizer, mesh, config), learners[name]) for name, shot in config.runs
  ]


def _training(name: str, shot: int, learner: ms.Learner, optimizer, mesh, config: Config) -> Training:
  tasks = sinusoid(DATASETS[config.dataset], shot=shot, query=config.query)
  keys = reporting.seed_keys(config.seed, config.seeds)
  return trainings.by_gradient(
    f'{name}_{shot}shot', f'{NAMES[name]} {shot}-shot',
    lambda: ms.init(keys, tasks, learner=learner, optimizer=optimizer), tasks, learner=learner, optimizer=optimizer,
    meta_iterations=config.meta_iterations, meta_batch=config.meta_batch, placement=ms.Placement(mesh=mesh),
    chunk=min(1000, -(-config.meta_iterations // 20)),
  )  # fmt: skip


def run(config: Config, workdir: files.PathLike, keeping: Keeping | None = None, devices: int = 1) -> list[dict]:
  """Trains, tests, prints, draws and writes; returns the rows of results.json. `devices` is as in `plan`."""
  with resuming.open_run(workdir, config, keeping) as opened:
    return opened.rows or _run(config, opened, devices)


def _run(config: Config, opened: resuming.Run, devices: int) -> list[dict]:
  workdir = opened.workdir
  tests = {shot: sinusoid(DATASETS[config.dataset], shot=shot, query=config.eval_query) for shot in TEST_SHOTS}
  about_run = {
    'inner_steps': config.inner_steps, 'meta_iterations': config.meta_iterations, 'meta_batch': config.meta_batch,
    'query': config.query, 'eval_query': config.eval_query, 'eval_repeats': config.eval_repeats, 'metric': 'MSE',
  }  # fmt: skip
  trained: list[Trained] = []
  results: list[reporting.Result] = []
  rows: list[dict] = []
  for (name, shot), (training, learner) in zip(config.runs, plan(config, devices), strict=True):
    logging.info('%s: compiling', training.label)
    done = trainings.train(training, opened)
    trained.append(Trained(name, shot, learner, done.state.meta, done.curves))
    files.write_params(workdir / f'params_{name}_{shot}shot.msgpack', trained[-1].meta)
    logging.info('%s: testing on %d unseen curves', training.label, config.eval_tasks)
    found = [_test(trained[-1], test_shot, tasks, config, devices) for test_shot, tasks in tests.items()]
    rows += [result.row(workdir, {**about_run, **done.skipped}) for result in found]
    results += found
    files.write_json(workdir / 'results.json', {**options.recipe('regression', config), 'rows': rows})
    opened.stop.ask()
  print(_table(results, config))
  reporting.save_pictures(workdir, _pictures(trained, config), opened.metrics)
  return rows


def _test(trained: Trained, shot: int, tasks: ms.TaskDistribution, config: Config, devices: int) -> reporting.Result:
  values = [
    ms.evaluate(
      trained.learner, reporting.one_run(trained.meta, r), tasks, test_keys(config.eval_seed)[0],
      metric_fn=ms.losses.mean_squared_error, num_tasks=config.eval_tasks, repeats=config.eval_repeats,
      placement=ms.Placement(mesh=processes.mesh_to_judge(config.eval_tasks, devices)),
    ).mean(1)
    for r in range(config.seeds)
  ]  # fmt: skip
  about = {'dataset': config.dataset, 'learner': trained.name, 'train_shot': trained.shot, 'test_shot': shot}
  return reporting.Result(about, np.stack(values))


def _table(results: list[reporting.Result], config: Config) -> str:
  """Mean squared errors as text, each beside the paper's where it has one."""
  lines = [
    f'mean squared error after {config.inner_steps} inner step(s): mean ± 95% interval over {config.eval_tasks} unseen '
    f'curves; {config.seeds} training run(s) of {config.meta_iterations:,} meta-iterations',
    f'{"trained on":<11}{"learner":<10}' + ''.join(f'{f"{s}-shot test":<14}{"paper":<14}' for s in TEST_SHOTS),
  ]
  by_cell = {(r.about['learner'], r.about['train_shot'], r.about['test_shot']): r for r in results}
  papers = PAPER_TABLE if config.dataset == 'sinusoids' and config.inner_steps == 1 else {}
  for name, shot in config.runs:
    line = f'{f"{shot}-shot":<11}{NAMES[name]:<10}'
    for test_shot, paper in zip(TEST_SHOTS, papers.get((name, shot), (None,) * 3), strict=True):
      star = '*' if (shot, test_shot) in SECOND_HAND else ''
      line += f'{by_cell[name, shot, test_shot].estimate!s:<14}'
      line += f'{f"{ms.Interval(*paper)}{star}" if paper else "-":<14}'
    lines.append(line)
  if papers and any(shot in (10, 20) for _, shot in config.runs):
    lines.append('* second-hand: no quotation that names the paper was at hand')
  if config.seeds > 1:
    lines.append('95% interval of the mean over training runs:')
    for name, shot in config.runs:
      spans = [f'{s}-shot ±{by_cell[name, shot, s].over_runs.ci95:.2f}' for s in TEST_SHOTS]
      lines.append(f'{f"{shot}-shot":<11}{NAMES[name]:<10}{"   ".join(spans)}')
  for shot in dict.fromkeys(shot for _, shot in config.runs):
    if {(n, shot) for n in LEARNERS} <= set(config.runs):
      lines.append(f'MAML − Meta-SGD, trained on {shot} shots, on the same curves:')
      for test_shot in TEST_SHOTS:
        maml, meta_sgd = (by_cell[n, shot, test_shot].values[..., -1] for n in ('maml', 'meta_sgd'))
        lines.append(
          f'           {test_shot}-shot test {ms.confidence_interval((maml - meta_sgd).mean(0))} over curves'
          + (
            f', ±{ms.confidence_interval((maml - meta_sgd).mean(1)).ci95:.2f} over training runs'
            if config.seeds > 1
            else ''
          )
        )
  return '\n'.join(lines)


def _pictures(trained: list[Trained], config: Config) -> dict[str, Callable[[Any], Any]]:
  pictures: dict[str, Callable[[Any], Any]] = {}
  for shot in dict.fromkeys(t.shot for t in trained):
    group = [t for t in trained if t.shot == shot]
    pictures[f'curves_{shot}shot'] = functools.partial(_draw_fits, group, shot, config)
    for t in group:
      if t.meta.alpha is not None:
        pictures[f'alpha_{t.name}_{shot}shot'] = functools.partial(reporting.draw_alpha, t.meta.alpha)
  curves = {f'{NAMES[t.name]}, {t.shot}-shot': t.curves['loss'] for t in trained}
  pictures['learning_curves'] = lambda plotting: plotting.learning_curves(
    curves, ylabel='query MSE, mean of the chunk', log=True
  )
  return pictures


def _draw_fits(group: list[Trained], shot: int, config: Config, plotting):
  """Figure 3 with three unseen curves and the first run of each learner."""
  tasks = sinusoid(DATASETS[config.dataset], shot=shot)
  x = np.linspace(-5.0, 5.0, 200, dtype=np.float32)
  truths, supports, fits = [], [], []
  for key in jax.random.split(test_keys(config.eval_seed)[1], 3):
    task_key, episode_key, adapt_key = jax.random.split(key, 3)
    task = tasks.sample(task_key)
    support = tasks.episode(task, episode_key).support
    column = []
    for t in group:
      fit = functools.partial(_fit_path, t.learner)
      predictions = np.asarray(jax.jit(fit)(reporting.one_run(t.meta, 0), support, x, adapt_key))
      column.append(plotting.Fit(NAMES[t.name], predictions[0], predictions[-1]))
    truths.append(np.asarray(task(x)))
    supports.append(support)
    fits.append(column)
  return plotting.adaptation_curves(x, truths, supports, fits)


def _fit_path(learner, meta, support, x, key):
  """Predictions after 0 … k inner steps, `[k + 1, P]`, at x `[P]`."""
  path = learner.path(meta, support, key)
  return jax.vmap(learner.predict, (0, None))(path, x[:, None])[..., 0]


def _prepare() -> Callable[[], object]:
  config, keeping = options.from_flags(Config), options.from_flags(Keeping)
  devices = options.from_flags(Machines).devices or 1
  workdir = processes.open_workdir(flags.FLAGS.workdir)
  looked_into = trainings.look([training for training, _ in plan(config, devices)], config, workdir, keeping)
  return looked_into or (lambda: run(config, workdir, keeping, devices))


if __name__ == '__main__':
  resuming.define_flags(Config, Keeping, Machines, workdir='runs/regression')
  processes.main(_prepare, Config)
