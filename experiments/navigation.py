"""2D navigation by policy gradients: Table 4 and Figure 4 of Li et al. 2017.

python -m experiments.navigation             Meta-SGD and MAML from a fixed start, beside the paper's figures
python -m experiments.navigation --table4    both task sets: all of Table 4
"""

import dataclasses
import functools
import math
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
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
from metasgd_jax import rl
from metasgd_jax.io import files
from metasgd_jax.outer import sharding
from metasgd_jax.rl.meta_step import check_curvature

LEARNERS = ('meta_sgd', 'maml')
STARTS = ('fixed', 'varying')
MAML_RATE = 0.5
"""MAML's released script, with actions in [−1, 1]."""
FILM_STEPS = 30
"""Of an animation; a path that knows its goal is there sooner."""

PAPER_TABLE = {  # (learner, start) → mean return after one update and half-width; Li et al. 2017, Table 4.
  ('maml', 'fixed'): (-9.12, 0.66),
  ('meta_sgd', 'fixed'): (-8.64, 0.68),
  ('maml', 'varying'): (-10.71, 0.76),
  ('meta_sgd', 'varying'): (-10.15, 0.62),
}


@dataclasses.dataclass(frozen=True)
class Config:
  """The paper's settings, section 4.3; what it leaves out is MAML's released code's, but where an option says so."""

  learner: tuple[str, ...] = option(LEARNERS, 'What to train.', choices=LEARNERS)
  start: tuple[str, ...] = option(('fixed',), 'Where tasks start: at the origin, or anywhere.', choices=STARTS)
  table4: bool = option(False, 'Train both learners on both task sets, whatever --learner and --start say.')
  inner_steps: int = option(1, 'Updates in training.', low=1, high=10)
  eval_updates: int = option(3, 'Updates in testing, each on trajectories of the policy before it.', low=1, high=100)
  alpha: float | None = option(
    None, "MAML's inner rate (0.5 if not given), and Meta-SGD's start (the same).", low=-100.0, high=100.0, kind=float
  )
  later_rate: float = option(
    0.5, "Of testing's updates beyond --inner_steps, times α; MAML's released test script halves it.", low=0.0,
    high=100.0,
  )  # fmt: skip
  estimator: str = option(
    'lvc', "Of the inner gradient: DiCE, low-variance curvature, or MAML's released score function, which is biased.",
    choices=('dice', 'lvc', 'score'),
  )  # fmt: skip
  trajectories: int = option(20, 'Of a task before an update, and after the last.', low=2, high=1000)
  meta_batch: int = option(20, 'Tasks in a meta-iteration.', low=1, high=10_000)
  meta_iterations: int = option(100, 'Meta-iterations.', low=1, high=2**31 - 1)
  optimizer: str = option('trpo', "The outer one: TRPO, the paper's, or Adam.", choices=('trpo', 'adam'))
  max_kl: float = option(0.01, 'Of a TRPO step, in nats.', low=1e-9, high=10.0)
  curvature_tasks: int | None = option(
    None, "Tasks of a meta-iteration that TRPO's curvature is taken from; 4, or all of fewer, if not given. With all "
    'of 20 it is most of the work.', low=1, high=10_000, kind=int,
  )  # fmt: skip
  damping: float = option(
    0.01, "Added to TRPO's curvature. rllab and MAML's released code have 1e-5: steps too long for a curvature of few "
    'tasks.', low=0.0, high=1e3,
  )  # fmt: skip
  learning_rate: float = option(1e-3, 'Of Adam.', low=1e-12, high=1e3)
  discount: float = option(0.99, 'Of a step.', low=0.0, high=1.0)
  decay: float = option(
    0.9, "λ of the generalised advantages; MAML's released code has 1, whose updates are noisier.", low=0.0, high=1.0
  )  # fmt: skip
  seeds: int = option(1, 'Training runs, side by side.', low=1, high=1000)
  seed: int = option(0, 'Of the first run; the next has the next.', low=0, high=2**31 - 1001)
  eval_seed: int = option(0, 'Of the tasks to test on.', low=0, high=2**31 - 1)
  eval_tasks: int = option(600, 'Unseen tasks to test on.', low=2, high=100_000)

  tensorboard: bool = option(False, "Write TensorBoard's event files too.")

  def __post_init__(self):
    options.check(self)
    if self.curvature_tasks is not None and self.curvature_tasks > self.meta_batch:
      raise ValueError(f'curvature_tasks={self.curvature_tasks} is more than meta_batch={self.meta_batch}; lower it')

  @property
  def curved(self) -> int:
    """Tasks that TRPO's curvature is taken from."""
    return min(4, self.meta_batch) if self.curvature_tasks is None else self.curvature_tasks

  @property
  def runs(self) -> list[tuple[str, str]]:
    """What is trained: (start, learner)."""
    starts, learners = (STARTS, LEARNERS) if self.table4 else (self.start, self.learner)
    return [(start, learner) for start in starts for learner in learners]


@dataclasses.dataclass(frozen=True)
class Trained:
  """One training: its task set and learner, the last meta-parameters of R runs, and its curves."""

  start: str
  name: str
  meta: ms.MetaParams
  curves: dict[str, tuple[np.ndarray, np.ndarray]]

  @property
  def label(self) -> str:
    """What people read."""
    return f'{NAMES[self.name]}, {self.start} start'


def build_inner(name: str, environment: rl.Environment, config: Config, steps: int | None = None) -> rl.PolicyGradient:
  """Returns how the learner adapts, with the paper's policy, 2-100-100-2; MAML and Meta-SGD differ by α alone."""
  rate = MAML_RATE if config.alpha is None else config.alpha
  alpha = dict(alpha=rate) if name == 'maml' else dict(alpha_range=(rate, rate))
  return rl.policy_gradient(
    environment, rl.gaussian(environment.observation_size, environment.action_size),
    trajectories=config.trajectories, steps=steps or config.inner_steps, estimator=cast(Any, config.estimator),
    advantage=dataclasses.replace(rl.MAML_ADVANTAGES, discount=config.discount, decay=config.decay),
    rates=[1.0 if i < config.inner_steps else config.later_rate for i in range(steps or config.inner_steps)], **alpha,
  )  # fmt: skip


def plan(config: Config, environments: dict[str, rl.Environment], devices: int | None = None) -> list[Training]:
  """Returns what `config.runs` names, before it is trained, on so many devices; on as many as can where left out.

  Raises:
    ValueError: the devices cannot share the tasks of a meta-iteration, or of its curvature, evenly.
  """
  curved = config.curved if config.optimizer == 'trpo' else 0
  mesh = sharding.task_mesh(config.meta_batch if devices else math.gcd(config.meta_batch, curved), devices=devices)
  check_curvature(mesh, curved)
  return [_training(start, name, environments[start], mesh, config) for start, name in config.runs]


def _training(start: str, name: str, environment: rl.Environment, mesh, config: Config) -> Training:
  inner = build_inner(name, environment, config)
  keys = reporting.seed_keys(config.seed, config.seeds)
  label, chunk = f'{NAMES[name]}, {start} start', min(5, -(-config.meta_iterations // 20))
  if config.optimizer == 'adam':
    tasks, learner, adam = rl.task_distribution(environment), rl.policy_learner(inner), optax.adam(config.learning_rate)
    return trainings.by_gradient(
      f'{name}_{start}', label, lambda: ms.init(keys, tasks, learner=learner, optimizer=adam), tasks, learner=learner,
      optimizer=adam, meta_iterations=config.meta_iterations, meta_batch=config.meta_batch, chunk=chunk,
      placement=ms.Placement('all', mesh),
    )  # fmt: skip

  def go(state, step, callbacks):
    return rl.train(
      state, inner=inner, meta_iterations=step, meta_batch=config.meta_batch,
      curvature_tasks=config.curved, trpo=rl.TrpoConfig(max_kl=config.max_kl, damping=config.damping), chunk=chunk,
      callbacks=callbacks, placement=ms.Placement(mesh=mesh),
    )  # fmt: skip

  return Training(f'{name}_{start}', label, config.meta_iterations, chunk, lambda: rl.init(keys, inner), go)


def run(
  config: Config, workdir: files.PathLike, keeping: Keeping | None = None, devices: int | None = None
) -> list[dict]:
  """Trains, tests, prints, draws and writes; returns the rows of results.json. `devices` is as in `plan`."""
  with resuming.open_run(workdir, config, keeping) as opened:
    return opened.rows or _run(config, opened, devices)


def _run(config: Config, opened: resuming.Run, devices: int | None) -> list[dict]:
  workdir, environments = opened.workdir, build_environments()
  about_run = {
    'inner_steps': config.inner_steps, 'meta_iterations': config.meta_iterations, 'meta_batch': config.meta_batch,
    'trajectories': config.trajectories, 'optimizer': config.optimizer,
    'metric': f'mean undiscounted return after {config.eval_updates} updates',
  }  # fmt: skip
  trained: list[Trained] = []
  results: list[reporting.Result] = []
  rows: list[dict] = []
  for (start, name), training in zip(config.runs, plan(config, environments, devices), strict=True):
    logging.info('%s: compiling', training.label)
    done = trainings.train(training, opened)
    trained.append(Trained(start, name, done.state.meta, done.curves))
    files.write_params(workdir / f'params_{name}_{start}.msgpack', trained[-1].meta)
    logging.info('%s: testing on %d unseen tasks', training.label, config.eval_tasks)
    results.append(_test(trained[-1], environments[start], config, devices))
    rows.append(results[-1].row(workdir, about_run))
    files.write_json(workdir / 'results.json', {**options.recipe('navigation', config), 'rows': rows})
    opened.stop.ask()
  print(_table(results, config))
  walks = functools.cache(functools.partial(_walks, trained, environments, config))
  reporting.save_pictures(workdir, _pictures(trained, walks), opened.metrics)
  _save_films(workdir, trained, walks)
  return rows


def build_environments() -> dict[str, rl.Environment]:
  """Returns both task sets."""
  return {start: rl.navigation(cast(Any, start)) for start in STARTS}


def _test(trained: Trained, environment, config: Config, devices: int | None) -> reporting.Result:
  learner = rl.policy_learner(build_inner(trained.name, environment, config, steps=config.eval_updates))
  values = [
    ms.evaluate(
      learner, reporting.one_run(trained.meta, r), rl.task_distribution(environment), test_keys(config.eval_seed)[0],
      metric_fn=rl.mean_return, num_tasks=config.eval_tasks,
      placement=ms.Placement('all', processes.mesh_to_judge(config.eval_tasks, devices)),
    )[:, 0]
    for r in range(config.seeds)
  ]  # fmt: skip
  return reporting.Result({'start': trained.start, 'learner': trained.name}, np.stack(values))


def _table(results: list[reporting.Result], config: Config) -> str:
  """Returns as text, each beside the paper's, and the paired difference."""
  counts = range(config.eval_updates + 1)
  lines = [
    f'mean undiscounted return ± 95% interval over {config.eval_tasks} unseen tasks; {config.seeds} training run(s) of '
    f'{config.meta_iterations:,} meta-iterations of {config.meta_batch} tasks, {config.trajectories} trajectories '
    'before and after each update',
    f'{"start":<9}{"learner":<10}' + ''.join(f'{f"{n} updates":<15}' for n in counts) + 'paper, 1 update',
  ]  # fmt: skip
  by_cell = {(r.about['start'], r.about['learner']): r for r in results}
  for (start, name), result in by_cell.items():
    cells = [ms.confidence_interval(result.values[..., n].mean(0)) for n in counts]
    paper = ms.Interval(*PAPER_TABLE[name, start])
    lines.append(f'{start:<9}{NAMES[name]:<10}' + ''.join(f'{cell!s:<15}' for cell in cells) + str(paper))
  if config.seeds > 1:
    lines.append('95% interval of the mean over training runs:')
    for (start, name), result in by_cell.items():
      spans = [f'±{ms.confidence_interval(result.values[..., n].mean(1)).ci95:.2f}' for n in counts]
      lines.append(f'{start:<9}{NAMES[name]:<10}' + ''.join(f'{span:<15}' for span in spans))
  for start in STARTS:
    if {(start, name) for name in LEARNERS} <= set(by_cell):
      difference = by_cell[start, 'meta_sgd'].values - by_cell[start, 'maml'].values  # [R, tasks, updates]
      lines.append(f'Meta-SGD − MAML, {start} start, on the same tasks:')
      for n in counts:
        over_tasks, over_runs = (ms.confidence_interval(difference[..., n].mean(axis)) for axis in (0, 1))
        more = f', ±{over_runs.ci95:.2f} over training runs' if config.seeds > 1 else ''
        lines.append(f'         {n} updates {over_tasks} over tasks{more}')
  return '\n'.join(lines)


def _pictures(trained: list[Trained], walks: Callable[[str], list[list]]) -> dict[str, Callable[[Any], Any]]:
  pictures: dict[str, Callable[[Any], Any]] = {}
  for start in dict.fromkeys(t.start for t in trained):
    pictures[f'paths_{start}'] = functools.partial(_draw_paths, walks, start)
  curves = {t.label: t.curves['return_after'] for t in trained}
  pictures['learning_curves'] = lambda plotting: plotting.learning_curves(
    curves, ylabel='mean return after the update, training tasks'
  )
  for t in trained:
    if t.meta.alpha is not None:
      pictures[f'alpha_{t.name}_{t.start}'] = functools.partial(reporting.draw_alpha, t.meta.alpha)
  return pictures


def _walks(trained: list[Trained], environments, config: Config, start: str) -> list[list]:
  """For each of three unseen tasks, what the first run of each learner does there."""
  from metasgd_jax.plotting import Walks

  columns: list[list] = [[], [], []]
  keys = [jax.random.split(key) for key in jax.random.split(test_keys(config.eval_seed)[1], len(columns))]
  for t in trained:
    if t.start != start:
      continue
    inner = build_inner(t.name, environments[start], config, steps=config.eval_updates)
    act = jax.jit(functools.partial(_act, inner))
    for column, (task_key, walk_key) in zip(columns, keys, strict=True):
      task = environments[start].sample(task_key)
      paths, returns = jax.device_get(act(reporting.one_run(t.meta, 0), task, walk_key))
      column.append(Walks(NAMES[t.name], np.asarray(task.start), np.asarray(task.goal), paths, returns))
  return columns


def _act(inner: rl.PolicyGradient, meta, task, key):
  """Positions `[k + 1, B, H + 1, 2]` and mean returns `[k + 1]` of fresh trajectories after 0, 1, …, k updates."""
  explore_key, act_key = jax.random.split(key)
  _, thetas = inner.explore(meta, task, explore_key)
  keys = jax.random.split(act_key, len(thetas))
  drawn = [inner.experience(theta, task, key).trajectories for theta, key in zip(thetas, keys, strict=True)]
  paths = [jnp.concatenate([d.observations, d.last_observation[:, None]], 1) for d in drawn]
  return jnp.stack(paths), jnp.stack([rl.mean_return(d) for d in drawn])


def _draw_paths(walks, start: str, plotting):
  return plotting.navigation_paths(walks(start))


def _save_films(workdir, trained: list[Trained], walks: Callable[[str], list[list]]) -> None:
  """Writes an animation of one unseen task for each task set; nothing without matplotlib."""
  try:
    from metasgd_jax import plotting
  except ImportError:
    return
  for start in dict.fromkeys(t.start for t in trained):
    film = plotting.navigation_animation(walks(start)[0], steps=FILM_STEPS)
    path = workdir / f'adaptation_{start}.gif'
    with tempfile.TemporaryDirectory(dir=workdir, prefix='.film-') as aside:
      film.save(pathlib.Path(aside) / path.name, writer='pillow', dpi=80)
      (pathlib.Path(aside) / path.name).replace(path)
    print(f'animation: {path}')


def _prepare() -> Callable[[], object]:
  config, keeping = options.from_flags(Config), options.from_flags(Keeping)
  devices = options.from_flags(Machines).devices
  workdir = processes.open_workdir(flags.FLAGS.workdir)
  looked_into = trainings.look(plan(config, build_environments(), devices), config, workdir, keeping)
  return looked_into or (lambda: run(config, workdir, keeping, devices))


if __name__ == '__main__':
  resuming.define_flags(Config, Keeping, Machines, workdir='runs/navigation')
  processes.main(_prepare, Config)
