"""2D navigation by policy gradients: Table 4 and Figure 4 of Li et al. 2017.

python -m experiments.navigation             Meta-SGD and MAML from a fixed start, beside the paper's numbers
python -m experiments.navigation --table4    the same from fixed and from varying starts: all of Table 4
"""

import dataclasses
import functools
import math
import pathlib
import tempfile
from collections.abc import Callable, Sequence
from operator import methodcaller
from typing import Any, cast, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

import metasgd_jax as ms
from experiments import options, reporting, resuming, running, trainings
from experiments.jobs import SINGLE, Jobs
from experiments.options import option
from experiments.reporting import NAMES, Result, test_keys
from experiments.resuming import Keeping
from experiments.trainings import Training
from metasgd_jax import rl
from metasgd_jax.io import files
from metasgd_jax.io.files import PathLike
from metasgd_jax.rl.meta_step import check_curvature
from metasgd_jax.rl.surrogate import Estimator

LEARNERS = ('meta_sgd', 'maml')
STARTS = ('fixed', 'varying')
MAML_RATE = 0.5
"""Inner rate of MAML's released script, with actions in [−1, 1]."""
FILM_STEPS = 30
"""Number of environment steps that an animation shows. An adapted policy reaches the goal sooner."""

PAPER_TABLE = {  # (learner, start) → mean return after one update and half-width; Li et al. 2017, Table 4.
  ('maml', 'fixed'): (-9.12, 0.66),
  ('meta_sgd', 'fixed'): (-8.64, 0.68),
  ('maml', 'varying'): (-10.71, 0.76),
  ('meta_sgd', 'varying'): (-10.15, 0.62),
}


@dataclasses.dataclass(frozen=True)
class Config:
  """Settings of the paper, section 4.3. Settings that the paper does not give are mostly those of MAML's released code.

  Four defaults differ from MAML's code. MAML's code uses the estimator 'score', which is biased. It uses a decay of 1,
  which makes the updates noisier. It uses a damping of 1e-5, as in rllab, which makes the steps too long if the
  curvature is computed from few tasks. It computes the curvature from all tasks, which would be most of the work here.
  A test may take more inner steps than the training. The inner rate of these additional steps is multiplied by
  `later_rate`, whose default, 0.5, is that of MAML's test script.
  """

  learner: tuple[str, ...] = option(LEARNERS, 'Learners to train.', choices=LEARNERS)
  start: tuple[str, ...] = option(('fixed',), 'Task sets: the start is the origin, or varies.', choices=STARTS)
  table4: bool = option(False, 'Train both learners on both task sets; --learner and --start have no effect.')
  inner_steps: int = option(1, 'Updates in training.', low=1, high=10)
  eval_updates: int = option(3, 'Updates in testing, each on new trajectories.', low=1, high=100)
  alpha: float | None = option(None, 'Inner rate of MAML, initial α of Meta-SGD; 0.5 by default.', **running.RATE)
  later_rate: float = option(0.5, 'Factor of α in the updates of the test beyond --inner_steps.', low=0.0, high=100.0)
  estimator: str = option('lvc', 'Estimator of the inner gradient; score is biased.', choices=get_args(Estimator))
  trajectories: int = option(20, 'Trajectories per task, before each update and after the last.', low=2, high=1000)
  meta_batch: int = option(20, 'Tasks per meta-iteration.', low=1, high=10_000)
  meta_iterations: int = option(100, 'Meta-iterations.', low=1, high=2**31 - 1)
  optimizer: str = option('trpo', 'Outer optimiser: TRPO, as in the paper, or Adam.', choices=('trpo', 'adam'))
  max_kl: float = option(0.01, 'Bound on the divergence of a TRPO step, in nats.', low=1e-9, high=10.0)
  curvature_tasks: int | None = option(None, "Tasks for TRPO's curvature; by default 4.", low=1, high=10_000, kind=int)
  damping: float = option(0.01, "Damping that is added to TRPO's curvature.", low=0.0, high=1e3)
  learning_rate: float = option(1e-3, 'Learning rate of Adam.', low=1e-12, high=1e3)
  discount: float = option(0.99, 'Discount per step.', low=0.0, high=1.0)
  decay: float = option(0.9, 'λ of the generalised advantages.', low=0.0, high=1.0)
  seeds: int = option(1, 'Training runs, side by side.', low=1, high=1000)
  seed: int = option(0, 'Seed of the first training run; run i uses seed + i.', low=0, high=2**31 - 1001)
  eval_seed: int = option(0, 'Seed of the tasks of the test.', low=0, high=2**31 - 1)
  eval_tasks: int = option(600, 'Unseen tasks in the test.', low=2, high=100_000)
  tensorboard: bool = option(False, 'Also write event files for TensorBoard.')

  def __post_init__(self):
    options.check(self)
    if self.curvature_tasks is not None and self.curvature_tasks > self.meta_batch:
      raise ValueError(
        f'curvature_tasks={self.curvature_tasks} is more than meta_batch={self.meta_batch}; lower curvature_tasks'
      )

  @property
  def curved(self) -> int:
    """Number of tasks from which TRPO computes the Fisher matrix: by default 4, or all tasks if there are fewer."""
    return self.curvature_tasks or min(4, self.meta_batch)

  @property
  def runs(self) -> list[tuple[str, str]]:
    """Returns a pair (start, learner) for each training."""
    starts, learners = (STARTS, LEARNERS) if self.table4 else (self.start, self.learner)
    return [(start, learner) for start in starts for learner in learners]


AllTrained = dict[tuple[str, str], trainings.Trained]
"""The result of each training, by (start, learner)."""


def build_environments() -> dict[str, rl.Environment]:
  """Returns `{start: environment}`, with one environment for each of the task sets 'fixed' and 'varying'."""
  return {start: rl.navigation(cast(Any, start)) for start in STARTS}


def build_inner(name: str, environment: rl.Environment, config: Config, steps: int | None = None) -> rl.PolicyGradient:
  """Returns the inner loop of a learner, with a policy of layer sizes 2-100-100-2, as in the paper.

  MAML and Meta-SGD differ only in α. `steps` is the number of updates, `config.inner_steps` by default.
  """
  steps, rate = steps or config.inner_steps, MAML_RATE if config.alpha is None else config.alpha
  how: dict[str, Any] = running.settings(config, 'trajectories', 'estimator')
  how['alpha'] = rate if name == 'maml' else ms.AlphaConfig(rate, rate)
  how['advantage'] = dataclasses.replace(rl.MAML_ADVANTAGES, discount=config.discount, decay=config.decay)
  how['rates'] = [1.0 if i < config.inner_steps else config.later_rate for i in range(steps)]
  policy = rl.gaussian(environment.observation_size, environment.action_size)
  return rl.policy_gradient(environment, policy, steps=steps, **how)


def plan(config: Config, environments: dict[str, rl.Environment], devices: int | None = None) -> list[Training]:
  """Returns the trainings of `config.runs`, before anything is trained.

  Args:
    config: Configuration of the experiment.
    environments: Environments of both task sets, from `build_environments`.
    devices: Number of devices of each process; `None` uses all that can share the tasks evenly.

  Raises:
    ValueError: if the devices cannot evenly share the tasks of a meta-iteration, or the `config.curved` tasks from
      which TRPO computes the curvature.
  """
  curved = config.curved if config.optimizer == 'trpo' else 0
  mesh = ms.sharding.task_mesh(config.meta_batch if devices else math.gcd(config.meta_batch, curved), devices=devices)
  check_curvature(mesh, curved)
  training_of = _by_trpo if config.optimizer == 'trpo' else _by_adam
  return [training_of(start, name, environments[start], mesh, config) for start, name in config.runs]


def _by_adam(start: str, name: str, environment: rl.Environment, mesh, config: Config) -> Training:
  keys, tasks = reporting.seed_keys(config.seed, config.seeds), rl.task_distribution(environment)
  learner, optimizer = rl.policy_learner(build_inner(name, environment, config)), optax.adam(config.learning_rate)
  how = dict(learner=learner, optimizer=optimizer, placement=ms.Placement('all', mesh), chunk=running.chunk(config, 5))
  return running.by_gradient(config, f'{name}_{start}', _label(start, name), keys, tasks, **how)


def _by_trpo(start: str, name: str, environment: rl.Environment, mesh, config: Config) -> Training:
  keys, inner = reporting.seed_keys(config.seed, config.seeds), build_inner(name, environment, config)
  chunk, placement = running.chunk(config, 5), ms.Placement(mesh=mesh)
  trpo = rl.TrpoConfig(max_kl=config.max_kl, damping=config.damping)
  train = functools.partial(rl.train, inner=inner, meta_batch=config.meta_batch, curvature_tasks=config.curved)

  def go(state, step, callbacks):
    return train(state, meta_iterations=step, trpo=trpo, placement=placement, chunk=chunk, callbacks=callbacks)

  start_state = functools.partial(rl.init, keys, inner)
  return Training(f'{name}_{start}', _label(start, name), config.meta_iterations, chunk, start_state, go)


def _label(start: str, name: str) -> str:
  return f'{NAMES[name]}, {start} start'


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


def _run(config: Config, opened: resuming.Run, devices: int | None, jobs: Jobs) -> list[dict]:
  environments = build_environments()
  about_run = running.settings(config, 'inner_steps', 'meta_iterations', 'meta_batch', 'trajectories', 'optimizer')
  about_run['metric'] = f'mean undiscounted return after {config.eval_updates} updates'
  trained, results, rows = {}, [], []
  planned = plan(config, environments, devices)
  jobs.train(planned, opened)
  for (start, name), training in zip(config.runs, planned, strict=True):
    trained[start, name] = running.train(training, opened)
    values = _test(name, trained[start, name].state.meta, environments[start], config, devices)
    results.append(Result({'start': start, 'learner': name}, values))
    rows.append(results[-1].row(opened.path, about_run))
    running.write_results('navigation', config, opened, rows)
  print(_table(results, config))
  walks = functools.cache(functools.partial(_walks, trained, environments, config))
  reporting.save_pictures(opened.path, _pictures(trained, walks), opened.metrics)
  _save_films(opened, trained, walks)
  return rows


def _test(name: str, meta: ms.MetaParams, environment: rl.Environment, config: Config, devices: int | None):
  learner = rl.policy_learner(build_inner(name, environment, config, steps=config.eval_updates))
  tasks, metas = rl.task_distribution(environment), running.each_run(meta)
  return running.evaluate(learner, metas, tasks, config, devices, 'all', metric_fn=rl.mean_return)


def _table(results: list[Result], config: Config) -> str:
  """Returns a text: the mean returns after 0, 1, … updates, the paper's mean returns, and Meta-SGD minus MAML."""
  counts = range(config.eval_updates + 1)
  lines = [
    f'mean undiscounted return ± 95% interval over {config.eval_tasks} unseen tasks; {config.seeds} training run(s) of '
    f'{config.meta_iterations:,} meta-iterations of {config.meta_batch} tasks, {config.trajectories} trajectories '
    'before and after each update',
    _line('start', 'learner', [f'{n} updates' for n in counts]) + 'paper, 1 update',
  ]
  cells = {}  # (start, learner) → the result after each number of updates.
  for start_and_name, result in zip(config.runs, results, strict=True):
    cells[start_and_name] = [Result(result.about, result.values[..., : n + 1]) for n in counts]
  for (start, name), found in cells.items():
    paper = ms.Interval(*PAPER_TABLE[name, start])
    lines.append(_line(start, NAMES[name], [cell.estimate for cell in found]) + str(paper))
  if config.seeds > 1:
    lines.append('95% interval of the mean over training runs:')
    for (start, name), found in cells.items():
      lines.append(_line(start, NAMES[name], [f'±{cell.over_runs.ci95:.2f}' for cell in found]))
  for start in STARTS:
    if {(start, name) for name in LEARNERS} <= set(cells):
      lines.append(f'Meta-SGD − MAML, {start} start, on the same tasks:')
      for n in counts:
        pair = running.difference(cells[start, 'meta_sgd'][n], cells[start, 'maml'][n], 'tasks')
        lines.append(f'         {n} updates {pair}')
  return '\n'.join(lines)


def _line(start: str, learner: str, cells: Sequence[Any]) -> str:
  return f'{start:<9}{learner:<10}' + ''.join(f'{cell!s:<15}' for cell in cells)


def _pictures(trained: AllTrained, walks: Callable[[str], list[list]]) -> running.Pictures:
  pictures: running.Pictures = {}
  for start in dict.fromkeys(start for start, _ in trained):
    pictures[f'paths_{start}'] = functools.partial(_draw_paths, walks, start)
  curves = {_label(start, name): done.curves['return_after'] for (start, name), done in trained.items()}
  ylabel = 'mean return after the update, training tasks'
  pictures['learning_curves'] = methodcaller('learning_curves', curves, ylabel=ylabel)
  return pictures | running.alpha_pictures({f'{name}_{start}': t.state.meta for (start, name), t in trained.items()})


def _draw_paths(walks, start: str, plotting):
  return plotting.navigation_paths(walks(start))


def _walks(trained: AllTrained, environments, config: Config, start: str) -> list[list]:
  """Returns a list for each of three unseen tasks, with the `Walks` of the first run of each learner."""
  from metasgd_jax.plotting import Walks

  columns: list[list] = [[], [], []]
  keys = [jax.random.split(key) for key in jax.random.split(test_keys(config.eval_seed)[1], len(columns))]
  act = jax.jit(_act, static_argnums=0)
  for name in [name for of_start, name in trained if of_start == start]:
    inner = build_inner(name, environments[start], config, steps=config.eval_updates)
    meta = reporting.one_run(trained[start, name].state.meta, 0)
    for column, (task_key, walk_key) in zip(columns, keys, strict=True):
      task = environments[start].sample(task_key)
      paths, returns = jax.device_get(act(inner, meta, task, walk_key))
      column.append(Walks(NAMES[name], np.asarray(task.start), np.asarray(task.goal), paths, returns))
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
  for start in dict.fromkeys(start for start, _ in trained):
    path = opened.path(f'adaptation_{start}.gif')
    with files.atomic(path) as file, tempfile.TemporaryDirectory() as directory:  # Matplotlib writes to paths only.
      film = plotting.navigation_animation(walks(start)[0], steps=FILM_STEPS)
      film.save(f'{directory}/film.gif', writer='pillow', dpi=80)
      file.write(pathlib.Path(directory, 'film.gif').read_bytes())
    print(f'animation: {path}')


def _prepare(config: Config, workdir: PathLike, keeping: Keeping, devices: int | None, jobs: Jobs) -> running.Prepared:
  planned = plan(config, build_environments(), devices)
  return planned, functools.partial(run, config, workdir, keeping, devices, jobs)


if __name__ == '__main__':
  running.main('navigation', Config, _prepare)
