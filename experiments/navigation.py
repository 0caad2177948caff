"""2D navigation by policy gradients: Table 4 and Figure 4 of Li et al. 2017.

python -m experiments.navigation             Meta-SGD and MAML from a fixed start, beside the paper's numbers
python -m experiments.navigation --table4    the same from fixed and from varying starts, and with TRPO: Table 4
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from operator import methodcaller
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np

from experiments import navigation_table, options, reporting, resuming, running, trainings
from experiments.command import flag_texts, refuse_beside
from experiments.jobs import SINGLE, Jobs
from experiments.navigation_table import label, updates
from experiments.navigation_training import (
  STARTS,
  CellKey,
  build_environments,
  build_inner,
  file_name,
  is_not_finite,
  key,
  plan,
)
from experiments.options import option
from experiments.reporting import NAMES, Result, test_keys
from experiments.resuming import Keeping
from metasgd_jax import rl
from metasgd_jax.io import files
from metasgd_jax.io.files import PathLike
from metasgd_jax.rl.surrogate import Estimator

LEARNERS = ('meta_sgd', 'maml')
OPTIMIZERS = ('adam', 'trpo')
SETTINGS: dict[str, dict[str, Any]] = {
  'adam': dict(meta_iterations=1000, meta_batch=80, decay=0.97),
  'trpo': dict(meta_iterations=100, meta_batch=20, decay=0.9),
}
"""Settings whose default depends on the outer optimiser. TRPO has the paper's numbers of meta-iterations and tasks.

With Adam, the settings were chosen on validation tasks; see docs/results.md.
"""
QUICK = {
  'meta_sgd': dict(meta_iterations=300, meta_batch=40),
  'maml': dict(meta_iterations=100, meta_batch=40),
}
"""Settings of Adam with `--budget=quick`, by learner. After 100 meta-iterations MAML improves only slowly."""
RATES = {
  ('adam', 'meta_sgd'): (0.02, 5e-4),
  ('adam', 'maml'): (0.005, 5e-4),
  ('trpo', 'meta_sgd'): (0.5, 0.25),
  ('trpo', 'maml'): (0.5, 0.25),
}
"""Inner rate of MAML or initial α of Meta-SGD, and `later_rate`, by outer optimiser and learner.

With TRPO both learners have the rates of MAML's released scripts, where the surrogate is a mean over steps. With Adam
the surrogate is a mean over trajectories of 100 steps, so that 0.005 is the same rate as 0.5. The first update with
Adam brings the policy near the goal, so that further updates must be small. The rates with Adam were chosen on
validation tasks.
"""
OF_ONE = {
  'adam': ('budget', 'learning_rate', 'alpha_learning_rate', 'clip', 'bad_steps'),
  'trpo': ('max_kl', 'curvature_tasks', 'damping'),
}
"""Settings that only one of the outer optimisers has."""
FILM_STEPS = 30
"""Number of environment steps that an animation shows. An adapted policy reaches the goal sooner."""


@dataclasses.dataclass(frozen=True)
class Config:
  """Settings of section 4.3 of the paper, except for the outer optimiser: the paper uses TRPO.

  Settings that the paper does not give are mostly those of MAML's released code. Four defaults differ from MAML's code.
  MAML's code uses the estimator 'score', which is biased. It uses a decay of 1, which makes the updates noisier. For
  TRPO, it uses a damping of 1e-5, as in rllab, which makes the steps too long if the curvature is computed from few
  tasks. It computes the curvature from all tasks, which would be most of the work here.
  A test may take more inner steps than the training. These additional steps have the inner rate `later_rate`, the same
  for all parameters, because the α that Meta-SGD learns is made for the steps of the training.
  """

  learner: tuple[str, ...] = option(LEARNERS, 'Learners to train.', choices=LEARNERS)
  start: tuple[str, ...] = option(('fixed',), 'Task sets: the start is the origin, or varies.', choices=STARTS)
  optimizer: tuple[str, ...] = option(('adam',), 'Outer optimisers; the paper uses TRPO.', choices=OPTIMIZERS)
  table4: bool = option(False, 'Train both learners on both task sets, with Adam and with TRPO.')
  budget: str = option(
    'full', 'quick: fewer meta-iterations of fewer tasks with Adam, and no TRPO in --table4.', choices=('full', 'quick')
  )
  inner_steps: int = option(1, 'Updates in training.', low=1, high=10)
  eval_updates: int = option(3, 'Updates in testing, each on new trajectories.', low=1, high=100)
  alpha: float | None = option(None, 'Inner rate of MAML, initial α of Meta-SGD.', **running.RATE)
  later_rate: float | None = option(
    None, 'Inner rate of the updates of the test beyond --inner_steps.', low=0.0, high=100.0, kind=float
  )
  estimator: str = option('lvc', 'Estimator of the inner gradient; score is biased.', choices=get_args(Estimator))
  trajectories: int = option(20, 'Trajectories per task, before each update and after the last.', low=2, high=1000)
  meta_batch: int | None = option(None, 'Tasks per meta-iteration.', low=1, high=10_000, kind=int)
  meta_iterations: int | None = option(None, 'Meta-iterations.', low=1, high=2**31 - 1, kind=int)
  max_kl: float = option(0.01, 'Bound on the divergence of a TRPO step, in nats.', low=1e-9, high=10.0)
  curvature_tasks: int | None = option(None, "Tasks for TRPO's curvature; by default 4.", low=1, high=10_000, kind=int)
  damping: float = option(0.01, "Damping that is added to TRPO's curvature.", low=0.0, high=1e3)
  learning_rate: float = option(3e-3, 'First learning rate of Adam for θ; it falls to zero.', low=1e-12, high=1e3)
  alpha_learning_rate: float = option(3e-2, 'First learning rate of Adam for α.', low=1e-12, high=1e3)
  clip: float = option(1.0, 'Bound on the norm of the meta-gradient with Adam.', low=1e-9, high=1e9)
  discount: float = option(0.99, 'Discount per step.', low=0.0, high=1.0)
  decay: float | None = option(None, 'λ of the generalised advantages.', low=0.0, high=1.0, kind=float)
  seeds: int = option(1, 'Number of training runs.', low=1, high=1000)
  seed: int = option(0, 'Seed of the first training run; run i uses seed + i.', low=0, high=2**31 - 1001)
  eval_seed: int = option(0, 'Seed of the tasks of the test.', low=0, high=2**31 - 1)
  eval_tasks: int = option(600, 'Unseen tasks in the test.', low=2, high=100_000)
  bad_steps: str = trainings.bad_steps_option()
  tensorboard: bool = option(False, 'Also write event files for TensorBoard.')

  def __post_init__(self):
    options.check(self)
    if self.table4:
      refuse_beside('table4 trains all cells of the table', self, ('start', 'learner', 'optimizer'))
    for optimizer in set(OPTIMIZERS) - set(self.optimizers):
      if given := flag_texts(self, OF_ONE[optimizer]):
        got, advice = f'optimizer={",".join(self.optimizers)}', f'add {optimizer} to optimizer'
        if self.table4:
          got, advice = '--table4 with --budget=quick, which leaves TRPO out', 'leave --budget=quick out'
        raise ValueError(
          f'{given[0]} works only with optimizer={optimizer}, got {got}; {advice}, or leave {given[0]} out'
        )
    batch = self.meta_batch or SETTINGS['trpo']['meta_batch']
    if self.curvature_tasks is not None and self.curvature_tasks > batch:
      raise ValueError(f'curvature_tasks={self.curvature_tasks} is more than meta_batch={batch}; lower curvature_tasks')

  @property
  def optimizers(self) -> tuple[str, ...]:
    """Names of the outer optimisers."""
    return self.optimizer if not self.table4 else OPTIMIZERS if self.budget == 'full' else ('adam',)

  @property
  def cells(self) -> list['Config']:
    """Returns the configuration of each training, in which no setting is `None` except for `curvature_tasks`."""
    starts, learners = (STARTS, LEARNERS) if self.table4 else (self.start, self.learner)
    return [self._cell(*what) for what in itertools.product(starts, self.optimizers, learners)]

  def _cell(self, start: str, optimizer: str, learner: str) -> 'Config':
    rate, later = RATES[optimizer, learner]
    known = SETTINGS[optimizer] | {'alpha': rate, 'later_rate': later}
    if self.budget == 'quick' and optimizer == 'adam':
      known |= QUICK[learner]
    given = {name: getattr(self, name) for name in known if getattr(self, name) is not None}
    one: dict[str, Any] = dict(start=(start,), learner=(learner,), optimizer=(optimizer,), table4=False, budget='full')
    of_others = {name for other in set(OPTIMIZERS) - {optimizer} for name in OF_ONE[other]}
    one |= {field.name: field.default for field in dataclasses.fields(self) if field.name in of_others}
    return dataclasses.replace(self, **one, **known | given)


AllTrained = dict[CellKey, trainings.Trained]
"""The result of each training."""


def run(
  config: Config,
  workdir: PathLike,
  keeping: Keeping | None = None,
  devices: int | None = None,
  jobs: Jobs = SINGLE,
) -> list[dict]:
  """Trains and tests the learners, prints and draws the results, and writes files. Returns the rows of results.json.

  `devices` is as in `plan`. `jobs` says whether the trainings get processes of their own.
  """
  with resuming.open_run(workdir, config, keeping) as opened:
    return opened.rows or _run(config, opened, devices, jobs)


@np.errstate(invalid='ignore')  # Returns that are not finite give a warning of their own.
def _run(config: Config, opened: resuming.Run, devices: int | None, jobs: Jobs) -> list[dict]:
  environments, trained, results, rows = build_environments(), {}, [], []
  planned = plan(config, environments, devices)
  jobs.train(list(itertools.chain(*planned)), opened)
  for cell, runs in zip(config.cells, planned, strict=True):
    start, name, optimizer = key(cell)
    trained[key(cell)] = running.train_runs(file_name(*key(cell)), runs, opened)
    about = {'start': start, 'learner': name, 'optimizer': optimizer}
    results.append(Result(about, np.asarray(trained[key(cell)].values)))
    settings = running.settings(cell, 'inner_steps', 'meta_iterations', 'meta_batch', 'trajectories', 'alpha')
    settings |= trained[key(cell)].skipped
    settings['metric'] = f'mean undiscounted return after {updates(config.eval_updates)}'
    rows.append(results[-1].row(opened.path, settings))
    running.write_results('navigation', config, opened, rows)
  budgets = [f'{cell.meta_iterations:,} × {cell.meta_batch}' for cell in config.cells]
  print(navigation_table.text(results, budgets, config.seeds, config.trajectories))
  for cell, result in zip(config.cells, results, strict=True):
    if said := is_not_finite(result.values, cell):
      print(f'{reporting.WARNING}{label(*key(cell))}: {said}')
  walks = functools.cache(functools.partial(_walks, trained, environments, config))
  reporting.save_pictures(opened.path, _pictures(trained, walks), opened.metrics)
  _save_films(opened, trained, walks)
  return rows


def _pictures(trained: AllTrained, walks: Callable[[str], list[list]]) -> running.Pictures:
  pictures: running.Pictures = {}
  for start in dict.fromkeys(start for start, *_ in trained):
    pictures[f'paths_{start}'] = functools.partial(_draw_paths, walks, start)
  curves = {label(*cell): done.curves['return_after'] for cell, done in trained.items()}
  ylabel = 'mean return after the update, training tasks'
  pictures['learning_curves'] = methodcaller('learning_curves', curves, ylabel=ylabel)
  metas = {file_name(*cell): done.state.meta for cell, done in trained.items()}
  return pictures | running.alpha_pictures(metas)


def _draw_paths(walks, start: str, plotting):
  return plotting.navigation_paths(walks(start))


def _walks(trained: AllTrained, environments, config: Config, start: str) -> list[list]:
  """Returns a list for each of three unseen tasks, with the `Walks` of the first run of each learner.

  If the start has several outer optimisers, the policies are those of the first one.
  """
  from metasgd_jax.plotting import Walks

  columns: list[list] = [[], [], []]
  keys = [jax.random.split(key) for key in jax.random.split(test_keys(config.eval_seed)[1], len(columns))]
  act = jax.jit(_act, static_argnums=0)
  cells = [cell for cell in config.cells if cell.start == (start,)]
  for cell in [cell for cell in cells if cell.optimizer == cells[0].optimizer]:
    inner = build_inner(environments[start], cell, steps=cell.eval_updates)
    meta = reporting.one_run(trained[key(cell)].state.meta, 0)
    for column, (task_key, walk_key) in zip(columns, keys, strict=True):
      task = environments[start].sample(task_key)
      paths, returns = jax.device_get(act(inner, meta, task, walk_key))
      column.append(Walks(NAMES[cell.learner[0]], np.asarray(task.start), np.asarray(task.goal), paths, returns))
  return columns


def _act(inner: rl.PolicyGradient, meta, task, key):
  """Returns the positions `[k + 1, B, H + 1, 2]` and mean returns `[k + 1]` of trajectories after 0, …, k updates."""
  explore_key, act_key = jax.random.split(key)
  _, thetas = inner.explore(meta, task, explore_key)
  keys = jax.random.split(act_key, len(thetas))
  drawn = [inner.experience(theta, task, key).trajectories for theta, key in zip(thetas, keys, strict=True)]
  paths = [jnp.concatenate([d.observations, d.last_observation[:, None]], 1) for d in drawn]
  return jnp.stack(paths), jnp.stack([rl.mean_return(d) for d in drawn])


def _save_films(opened: resuming.Run, trained: AllTrained, walks: Callable[[str], list[list]]) -> None:
  """Writes one animation for each task set, if matplotlib is installed. Each animation shows one unseen task."""
  try:
    from metasgd_jax import plotting
  except ImportError:
    return
  for start in dict.fromkeys(start for start, *_ in trained):
    path = opened.path(f'adaptation_{start}.gif')
    with files.atomic(path) as file:
      file.write(plotting.navigation_gif(walks(start)[0], steps=FILM_STEPS))
    print(f'animation: {path}')


def _prepare(config: Config, workdir: PathLike, keeping: Keeping, devices: int | None, jobs: Jobs) -> running.Prepared:
  planned = list(itertools.chain(*plan(config, build_environments(), devices)))
  jobs = dataclasses.replace(jobs, least=1)  # A training is fastest if it is bound to a core; see docs/cores.md.
  return planned, functools.partial(run, config, workdir, keeping, devices, jobs)


if __name__ == '__main__':
  running.main('navigation', Config, _prepare)
