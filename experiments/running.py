"""The common parts of the experiments: they read the command line, train, test on unseen tasks, and write results."""

import contextlib
import functools
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags, logging

import metasgd_jax as ms
from experiments import inspecting, options, processes, reporting, resuming, trainings
from experiments.jobs import Jobs, cores, stop_with_parent
from experiments.processes import Machines
from experiments.reporting import Result
from experiments.resuming import Keeping, Run
from experiments.trainings import Trained, Training
from metasgd_jax.io import files
from metasgd_jax.outer.placement import TasksAtOnce
from metasgd_jax.types import Tasks

flags.disclaim_key_flags()  # Then --help lists the flags defined here as flags of the experiment.

Pictures = dict[str, Callable[[Any], Any]]
"""Maps the name of each figure to the function that draws it: the function takes the module `metasgd_jax.plotting`."""

Prepared = tuple[Sequence[Training], Callable[[], object]]
"""The trainings of a command, and the function that runs the command."""

TABLES = ('table1', 'table2', 'table3', 'table4')
WHAT_IS_TRAINED = (*TABLES, 'dataset', 'network', 'adapts', 'start', 'evaluate', 'optimizer', 'budget')
"""Options whose values are in the name of the default work directory. The learners are too, unless a table is made."""

SECONDS = 10.0
"""Least number of seconds between two lines about the progress of a test."""

RATE: dict[str, Any] = dict(low=-100.0, high=100.0, kind=float)
"""Bounds and type of an option that is an inner rate."""


def main(experiment: str, config_class: type, prepare: Callable[..., Prepared]) -> None:
  """Runs an experiment from the command line, in the processes that the flags of `Machines` describe.

  Args:
    experiment: Name of the experiment.
    config_class: Class of its configuration.
    prepare: Function `(config, workdir, keeping, devices, jobs) → (plan, run)`, where `keeping` is a `resuming.Keeping`
      and `jobs` a `jobs.Jobs`. It loads the data, builds the learners and checks the settings, but trains nothing.
      `main` then calls `run()`, or inspects the trainings of `plan` if `--plan` or `--debug_task` is given.
  """

  def prepare_from_flags():
    stop_with_parent()
    machines = options.from_flags(Machines)
    processes.start(machines)
    with processes.together(), contextlib.ExitStack() as opened:
      if 'rbg' in (impl := str(jax.random.key_impl(jax.random.key(0)))):
        raise ValueError(f'JAX_DEFAULT_PRNG_IMPL={impl} selects keys that draw other numbers under jax.vmap; unset it')
      config: Any = options.from_flags(config_class)
      keeping, given = options.from_flags(Keeping), flags.FLAGS.workdir
      path = default_workdir(experiment, config) if given is None else given
      opened.enter_context(_leaving_no_new_directory(path))
      workdir = processes.open_workdir(path)
      cache = f'--compilation_cache={flags.FLAGS["compilation_cache"].value}'
      jobs = Jobs([*job_command(experiment, config, keeping), cache], cores(keeping, machines.devices))
      plan, run = prepare(config, workdir, keeping, machines.devices, jobs)
      if keeping.only is not None:
        plan = [trainings.named(keeping.only, plan)]
        run = functools.partial(trainings.train_only, plan[0], config, workdir, keeping)
      if looked := inspecting.look(plan, config, workdir, keeping):
        return looked
      opened.pop_all()
      return run

  resuming.define_flags(config_class, Keeping, Machines)
  options.main(prepare_from_flags, config_class)


@contextlib.contextmanager
def _leaving_no_new_directory(path: str) -> Iterator[None]:
  """Removes the directories that the `with` block creates for `path`, if they are empty."""
  whole = files.as_path(path)
  missing = [one for one in (whole, *whole.parents) if not os.path.lexists(one)]
  try:
    yield
  finally:
    with contextlib.suppress(OSError):  # It is not empty, or does not exist.
      for one in missing:
        one.rmdir()


def job_command(experiment: str, config: Any, keeping: Keeping) -> list[str]:
  """Returns the module and the flags of a program that trains what this program trains and saves it as often."""
  kept = options.flag_texts(keeping, ('checkpoint_every',))
  return [f'experiments.{experiment}', *options.flag_texts(config), *kept]


def default_workdir(experiment: str, config: Any) -> str:
  """Returns the default work directory, such as runs/classification_omniglot or runs/regression_table1.

  Its name contains the name of the experiment and the values of `WHAT_IS_TRAINED` that are not defaults. The name of a
  table's directory contains no learner, because that directory holds the cells of all learners.
  """
  table = any(getattr(config, name, False) for name in TABLES)
  texts = options.flag_texts(config, WHAT_IS_TRAINED if table else ('learner', *WHAT_IS_TRAINED))
  values = [pathlib.Path(text.removeprefix('--').rpartition('=')[2]) for text in texts]
  # The file names of models are often the same, so the name of their directory is included.
  names = [name for value in values for name in (value.parent.name, value.stem) if name.strip('.')]
  return '_'.join([f'runs/{experiment}', *names])


def by_gradient(config: Any, name: str, label: str, keys, tasks, *, learner, optimizer, **more: Any) -> Training:
  """Returns a `Training` that calls `ms.train` with the `meta_iterations` and the `meta_batch` of the configuration.

  Args:
    config: Configuration of the experiment.
    name: Name of the training in the names of files.
    label: Name of the training in printed text.
    keys: Random key of one run, `[]`, or of R runs side by side, `[R]`.
    tasks: Tasks to train on.
    learner: Learner that is trained.
    optimizer: Outer optimiser.
    **more: Further arguments of `ms.train`, such as `placement` and `chunk`.
  """
  start = functools.partial(ms.init, keys, tasks, learner=learner, optimizer=optimizer)
  counts = settings(config, 'meta_iterations', 'meta_batch')
  return trainings.by_gradient(name, label, start, tasks, learner=learner, optimizer=optimizer, **counts, **more)


def chunk(config: Any, most: int) -> int:
  """Returns the number of meta-iterations between callbacks: at most `most`, and at most a twentieth of the total."""
  return min(most, -(-config.meta_iterations // 20))


def settings(config: Any, *names: str) -> dict[str, Any]:
  """Returns the values of the settings with these names as a dict."""
  return {name: getattr(config, name) for name in names}


def train(training: Training, run: Run) -> Trained:
  """Trains as `trainings.train` does, and writes the meta-parameters to params_NAME.safetensors."""
  return _written(training.name, trainings.train(training, run), run)


def train_runs(name: str, runs: Sequence[Training], run: Run) -> Trained:
  """Trains the runs of a learner one after the other, and writes their meta-parameters to params_NAME.safetensors.

  The results are joined by `joined`.
  """
  return _written(name, joined([trainings.train(training, run) for training in runs]), run)


def _written(name: str, trained: Trained, run: Run) -> Trained:
  files.write_params(run.path(f'params_{name}.safetensors'), trained.state.meta)
  return trained


def joined(runs: Sequence[Trained]) -> Trained:
  """Joins the results of R trainings of one run each: leaves of the state, and the values, get a first axis `[R]`."""
  state = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(one.state for one in runs))
  curves = {
    name: (steps, np.concatenate([one.curves[name][1] for one in runs], 1))
    for name, (steps, _) in runs[0].curves.items()
  }
  values = [one.values for one in runs if one.values is not None]
  return Trained(state, curves, values=np.stack(values) if values else None)


def evaluate(
  learner: ms.Learner,
  metas: Sequence[Any],
  tasks: Tasks,
  config: Any,
  devices: int | None,
  tasks_at_once: TasksAtOnce = 'auto',
  **more: Any,
) -> np.ndarray:
  """Returns the metric of each run on the same unseen tasks, after 0, 1, …, k inner steps: `[R, tasks, k + 1]`.

  Args:
    learner: Learner that is tested.
    metas: Meta-parameters of each of R runs.
    tasks: Distribution of the unseen tasks.
    config: Configuration, whose `eval_tasks` and `eval_seed` determine the tasks.
    devices: Number of devices of each process that may share the tasks; `None` for all.
    tasks_at_once: Number of tasks that a device computes at the same time.
    **more: Further arguments of `ms.evaluate`, such as `metric_fn`. With `repeats`, the result for a task is the mean
      over its repeats.
  """
  logging.info('testing on %d tasks', config.eval_tasks)
  key, _ = reporting.test_keys(config.eval_seed)
  placement = ms.Placement(tasks_at_once, processes.mesh_to_judge(config.eval_tasks, devices))
  how = dict(num_tasks=config.eval_tasks, placement=placement, report=_Progress(config.eval_tasks), **more)
  return np.stack([ms.evaluate(learner, meta, tasks, key, **how).mean(1) for meta in metas])


class _Progress:
  """Logs how many tasks of a test are done, at most once in `SECONDS` seconds."""

  def __init__(self, total: int):
    self.total, self.last = total, time.monotonic()

  def __call__(self, done: int) -> None:
    if done < self.total and time.monotonic() - self.last >= SECONDS:
      logging.info('tested on %d of %d tasks', done, self.total)
      self.last = time.monotonic()


def each_run(meta: Any) -> list[Any]:
  """Splits a tree of R runs, whose leaves are `[R, …]`, into a list of R trees, one per run."""
  return [reporting.one_run(meta, r) for r in range(len(jax.tree.leaves(meta)[0]))]


def write_results(experiment: str, config: Any, run: Run, rows: list[dict[str, Any]]) -> None:
  """Writes the rows so far to results.json. Then ends the program if it has received a signal to stop."""
  files.write_json(run.path('results.json'), {**options.recipe(experiment, config), 'rows': rows})
  run.ask()


def difference(first: Result, second: Result, unit: str) -> str:
  """Returns, as text, the mean difference of two results on the same tasks, with confidence intervals.

  The first interval is over tasks. If there are several training runs, a second interval is over these runs.
  """
  values = (first.values - second.values)[..., -1]
  text = f'{ms.confidence_interval(values.mean(0))} over {unit}'
  if len(values) == 1:
    return text
  return f'{text}, ±{ms.confidence_interval(values.mean(1)).ci95:.2f} over training runs'


def alpha_pictures(metas: dict[str, Any]) -> Pictures:
  """Returns pictures for `save_pictures`. For each NAME in `metas`, the picture alpha_NAME shows α of the first run.

  Args:
    metas: Maps a NAME to the meta-parameters of R runs. Meta-parameters without an α get no picture.
  """
  pictures: Pictures = {}
  for name, meta in metas.items():
    if getattr(meta, 'alpha', None) is not None:
      pictures[f'alpha_{name}'] = functools.partial(reporting.draw_alpha, meta.alpha)
  return pictures
