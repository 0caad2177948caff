"""Few-shot regression on sine curves: Table 1 and Figure 3 of Li et al. 2017.

python -m experiments.regression             Meta-SGD and MAML, trained on 5 shots, beside the paper's numbers
python -m experiments.regression --table1    all of Table 1
"""

import dataclasses
import functools
from operator import methodcaller

import jax
import numpy as np
import optax

import metasgd_jax as ms
from experiments import options, reporting, resuming, running, trainings
from experiments.command import refuse_beside
from experiments.jobs import SINGLE, Jobs
from experiments.options import option
from experiments.reporting import NAMES, Result, test_keys
from metasgd_jax.io.files import PathLike
from metasgd_jax.losses import mean_squared_error
from metasgd_jax.tasks.sinusoid import MAML_SINUSOIDS, META_SGD_SINUSOIDS, sinusoid

LEARNERS = ('meta_sgd', 'maml')
DATASETS = {'sinusoids': META_SGD_SINUSOIDS, 'sinusoids_maml': MAML_SINUSOIDS}
TEST_SHOTS = (5, 10, 20)
DRAWN = 101
"""Number of curves among which those of the figure are chosen."""

PAPER_TABLE = {  # (learner, shots in training) → mean and half-width at 5, 10 and 20 shots; Li et al. 2017, Table 1.
  ('maml', 5): ((1.13, 0.18), (0.85, 0.14), (0.71, 0.12)),
  ('meta_sgd', 5): ((0.90, 0.16), (0.63, 0.12), (0.50, 0.10)),
  ('maml', 10): ((1.17, 0.16), (0.77, 0.11), (0.56, 0.08)),
  ('meta_sgd', 10): ((0.88, 0.14), (0.53, 0.09), (0.35, 0.06)),
  ('maml', 20): ((1.29, 0.20), (0.76, 0.12), (0.48, 0.08)),
  ('meta_sgd', 20): ((1.01, 0.17), (0.54, 0.08), (0.31, 0.05)),
}
SECOND_HAND = {(shot, test_shot) for shot in (10, 20) for test_shot in (5, 10)}
"""Cells (shots in training, shots in testing) for which we found no quotation that names the paper as its source.

They are printed with a star.
"""


@dataclasses.dataclass(frozen=True)
class Config:
  """Settings of the paper, section 4.1.

  The paper gives neither the batch of 4 tasks nor Adam's rate of 1e-3. Both are values that reimplementations use.
  """

  learner: tuple[str, ...] = option(LEARNERS, 'Learners to train.', choices=LEARNERS)
  dataset: str = option('sinusoids', "The paper's curves, or MAML's (frequency 1).", choices=tuple(DATASETS))
  shot: int = option(5, 'Support points per curve in training.', low=1, high=1000)
  query: int = option(10, 'Query points per curve in training.', low=1, high=1000)
  table1: bool = option(False, 'Train both learners on 5, 10 and 20 shots.')
  inner_steps: int = option(1, 'Inner steps, in training and in testing.', low=0, high=100)
  alpha: float | None = option(
    None, "MAML's inner rate, 0.01 by default; initial α of Meta-SGD, by default from U[0.005, 0.1].", **running.RATE
  )
  meta_batch: int = option(4, 'Curves per meta-iteration.', low=1, high=10_000)
  meta_iterations: int = option(60_000, 'Meta-iterations.', low=1, high=2**31 - 1)
  learning_rate: float = option(1e-3, 'Learning rate of Adam, the outer optimiser.', low=1e-12, high=1e3)
  seeds: int = option(3, 'Training runs, side by side.', low=1, high=1000)
  seed: int = option(0, 'Seed of the first training run; run i uses seed + i.', low=0, high=2**31 - 1001)
  eval_seed: int = option(0, 'Seed of the curves and points of the test.', low=0, high=2**31 - 1)
  eval_tasks: int = option(100, 'Unseen curves in the test.', low=2, high=100_000)
  eval_repeats: int = option(100, 'Draws of support and query points per curve.', low=1, high=10_000)
  eval_query: int = option(100, 'Query points per curve in testing.', low=1, high=10_000)
  bad_steps: str = trainings.bad_steps_option()
  tensorboard: bool = option(False, 'Also write event files for TensorBoard.')

  def __post_init__(self):
    options.check(self)
    if self.table1:
      refuse_beside('table1 trains all cells of the table', self, ('learner', 'shot'))

  @property
  def runs(self) -> list[tuple[str, int]]:
    """Returns a pair (learner, shots) for each training."""
    learners, shots = (LEARNERS, TEST_SHOTS) if self.table1 else (self.learner, (self.shot,))
    return [(learner, shot) for shot in shots for learner in learners]


AllTrained = dict[tuple[str, int], trainings.Trained]
"""The result of each training, by (learner, shots)."""


def build_learner(name: str, config: Config) -> ms.Learner:
  """Returns the learner with the paper's network, of layer sizes 1-40-40-1."""
  model = ms.nn.from_linen(ms.nn.MLP())
  if name == 'maml':
    rate = 0.01 if config.alpha is None else config.alpha
    return ms.maml(model, mean_squared_error, alpha=rate, steps=config.inner_steps)
  start = () if config.alpha is None else (config.alpha, config.alpha)
  return ms.meta_sgd(model, mean_squared_error, alpha=ms.AlphaConfig(*start), steps=config.inner_steps)


def plan(config: Config, devices: int = 1) -> list[tuple[trainings.Training, ms.Learner]]:
  """Returns the trainings of `config.runs`, each with its learner. The function itself trains nothing.

  Args:
    config: Configuration of the experiment.
    devices: Number of devices of each process. If there are few curves of few points, one device is faster than several
      devices.

  Raises:
    ValueError: if the devices cannot share the curves of a meta-iteration evenly.
  """
  learners = {name: build_learner(name, config) for name in LEARNERS}
  optimizer = trainings.optimizer_of(config, optax.adam(config.learning_rate))
  placement = ms.Placement(mesh=ms.sharding.task_mesh(config.meta_batch, devices=devices))
  how = dict(optimizer=optimizer, placement=placement, chunk=running.chunk(config, 1000))
  keys = reporting.seed_keys(config.seed, config.seeds)
  found = []
  for name, shot in config.runs:
    tasks = sinusoid(DATASETS[config.dataset], shot=shot, query=config.query)
    label = f'{NAMES[name]} {shot}-shot'
    training = running.by_gradient(config, f'{name}_{shot}shot', label, keys, tasks, learner=learners[name], **how)
    found.append((training, learners[name]))
  return found


def run(
  config: Config,
  workdir: PathLike,
  keeping: resuming.Keeping | None = None,
  devices: int = 1,
  jobs: Jobs = SINGLE,
) -> list[dict]:
  """Trains and tests the learners, prints and draws the results, and writes files. Returns the rows of results.json.

  `devices` is as in `plan`. `jobs` says whether the trainings get processes of their own.
  """
  with resuming.open_run(workdir, config, keeping) as opened:
    return opened.rows or _run(config, opened, devices, jobs)


def _run(config: Config, opened: resuming.Run, devices: int, jobs: Jobs) -> list[dict]:
  names = ('inner_steps', 'meta_iterations', 'meta_batch', 'query', 'eval_query', 'eval_repeats')
  about_run = running.settings(config, *names)
  tests = {shot: sinusoid(DATASETS[config.dataset], shot=shot, query=config.eval_query) for shot in TEST_SHOTS}
  trained, results, rows = {}, [], []
  planned = plan(config, devices)
  jobs.train([training for training, _ in planned], opened)
  for (name, shot), (training, learner) in zip(config.runs, planned, strict=True):
    trained[name, shot] = done = running.train(training, opened)
    for test_shot, tasks in tests.items():
      about = {'dataset': config.dataset, 'learner': name, 'train_shot': shot, 'test_shot': test_shot}
      results.append(_test(about, learner, done.state.meta, tasks, config, devices))
      rows.append(results[-1].row(opened.path, about_run | {'metric': 'MSE'} | done.skipped))
    running.write_results('regression', config, opened, rows)
  print(_table(results, config))
  reporting.save_pictures(opened.path, _pictures(trained, config), opened.metrics)
  return rows


def _test(about: dict, learner: ms.Learner, meta: ms.MetaParams, tasks, config: Config, devices: int) -> Result:
  metas, metric_fn, repeats = running.each_run(meta), mean_squared_error, config.eval_repeats
  values = running.evaluate(learner, metas, tasks, config, devices, metric_fn=metric_fn, repeats=repeats)
  return Result(about, values)


def _table(results: list[Result], config: Config) -> str:
  """Returns the mean squared errors as text, each beside the paper's number if the paper has one."""
  cells = {(r.about['learner'], r.about['train_shot'], r.about['test_shot']): r for r in results}
  papers = PAPER_TABLE if config.dataset == 'sinusoids' and config.inner_steps == 1 else {}
  lines = [
    f'mean squared error after {config.inner_steps} inner step(s): mean ± 95% interval over {config.eval_tasks} unseen '
    f'curves; {config.seeds} training run(s) of {config.meta_iterations:,} meta-iterations',
    f'{"trained on":<11}{"learner":<10}' + ''.join(f'{f"{s}-shot test":<14}{"paper":<14}' for s in TEST_SHOTS),
  ]
  for name, shot in config.runs:
    line = f'{f"{shot}-shot":<11}{NAMES[name]:<10}'
    for test_shot, paper in zip(TEST_SHOTS, papers.get((name, shot), (None,) * 3), strict=True):
      star = '*' if (shot, test_shot) in SECOND_HAND else ''
      published = f'{ms.Interval(*paper)}{star}' if paper else '-'
      line += f'{cells[name, shot, test_shot].estimate!s:<13} {published:<13} '
    lines.append(line)
  if papers and any(shot in (10, 20) for _, shot in config.runs):
    lines.append('* second-hand: we found no quotation of this number that names the paper as its source')
  if config.seeds > 1:
    lines.append('95% interval of the mean over training runs:')
    for name, shot in config.runs:
      spans = [f'{s}-shot ±{cells[name, shot, s].over_runs.ci95:.2f}' for s in TEST_SHOTS]
      lines.append(f'{f"{shot}-shot":<11}{NAMES[name]:<10}{"   ".join(spans)}')
  for shot in dict.fromkeys(shot for _, shot in config.runs):
    if {(name, shot) for name in LEARNERS} <= set(config.runs):
      lines.append(f'MAML − Meta-SGD, trained on {shot} shots, on the same curves:')
      for s in TEST_SHOTS:
        pair = running.difference(cells['maml', shot, s], cells['meta_sgd', shot, s], 'curves')
        lines.append(f'           {s}-shot test {pair}')
  return '\n'.join(lines)


def _pictures(trained: AllTrained, config: Config) -> running.Pictures:
  pictures: running.Pictures = {}
  for shot in dict.fromkeys(shot for _, shot in trained):
    metas = {name: done.state.meta for (name, of_shot), done in trained.items() if of_shot == shot}
    pictures[f'curves_{shot}shot'] = functools.partial(_draw_fits, metas, shot, config)
    pictures |= running.alpha_pictures({f'{name}_{shot}shot': meta for name, meta in metas.items()})
  curves = {f'{NAMES[name]}, {shot}-shot': done.curves['loss'] for (name, shot), done in trained.items()}
  ylabel = 'query MSE, mean of the chunk'
  return pictures | {'learning_curves': methodcaller('learning_curves', curves, ylabel=ylabel, log=True)}


def _draw_fits(metas: dict[str, ms.MetaParams], shot: int, config: Config, plotting):
  """Returns a figure like Figure 3 of the paper, with three unseen curves and the first run of each learner.

  Of `DRAWN` curves, these are the curves with the lower quartile, the median and the upper quartile of the first
  learner's error.
  """
  tasks = sinusoid(DATASETS[config.dataset], shot=shot)
  x = np.linspace(-5.0, 5.0, 200, dtype=np.float32)
  keys = jax.random.split(test_keys(config.eval_seed)[1], (DRAWN, 3))
  draw = jax.jit(jax.vmap(functools.partial(_fits, tasks, metas, config, x)))
  truths, supports, paths = jax.device_get(draw(keys))
  errors = np.mean((paths[next(iter(metas))][:, -1] - truths) ** 2, 1)
  chosen = np.argsort(errors)[[DRAWN // 4, DRAWN // 2, 3 * DRAWN // 4]]
  fits = [[plotting.Fit(NAMES[name], paths[name][i, 0], paths[name][i, -1]) for name in metas] for i in chosen]
  return plotting.adaptation_curves(x, truths[chosen], [reporting.one_run(supports, i) for i in chosen], fits)


def _fits(tasks, metas: dict[str, ms.MetaParams], config: Config, x, keys):
  """Returns a curve at x `[P]`, its support, and the predictions of each learner after 0, …, k steps, `[k + 1, P]`."""
  task_key, episode_key, adapt_key = keys
  task = tasks.sample(task_key)
  support = tasks.episode(task, episode_key).support
  paths = {}
  for name, meta in metas.items():
    learner = build_learner(name, config)
    path = learner.path(reporting.one_run(meta, 0), support, adapt_key)
    paths[name] = jax.vmap(learner.predict, (0, None))(path, x[:, None])[..., 0]
  return task(x), support, paths


def _prepare(
  config: Config, workdir: PathLike, keeping: resuming.Keeping, devices: int | None, jobs: Jobs
) -> running.Prepared:
  planned = [training for training, _ in plan(config, devices or 1)]
  return planned, functools.partial(run, config, workdir, keeping, devices or 1, jobs)


if __name__ == '__main__':
  running.main('regression', Config, _prepare)
