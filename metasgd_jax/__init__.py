"""Meta-SGD (Li et al. 2017) and its kin as pure functions in JAX."""

import importlib
from typing import TYPE_CHECKING, Any

from metasgd_jax import losses, rl, tasks
from metasgd_jax.inner.adaptation import adapt, adapt_path
from metasgd_jax.inner.alpha import init_alpha
from metasgd_jax.inner.optimizer import adapt_path_with_optimizer, adapt_with_optimizer, scale_by_alpha
from metasgd_jax.inner.parts import adapt_only, low_rank
from metasgd_jax.outer import sharding
from metasgd_jax.outer.evaluation import Interval, confidence_interval, evaluate
from metasgd_jax.outer.loop import Progress, TrainState
from metasgd_jax.outer.memory import MemoryPlan, plan_memory
from metasgd_jax.outer.objective import mean_loss, mean_loss_and_grad
from metasgd_jax.outer.placement import Placement
from metasgd_jax.outer.training import init, train, train_step
from metasgd_jax.types import Batch, Episode, Learner, MetaParams, Model, TaskDistribution, TaskStream
from metasgd_jax.version import __version__

if TYPE_CHECKING:
  from metasgd_jax import datasets, learners, nn
  from metasgd_jax import plotting as plotting
  from metasgd_jax.deploy.classifier import FewShotClassifier
  from metasgd_jax.deploy.export import Exported, export_learner, export_model, load_exported
  from metasgd_jax.deploy.model_file import FewShotModel, ModelConfig, load_model, save_model
  from metasgd_jax.io import checkpoint, files
  from metasgd_jax.learners import maml, meta_sgd

_LATER = {
  'checkpoint': 'io.checkpoint',
  'datasets': 'datasets',
  'files': 'io.files',
  'learners': 'learners',
  'nn': 'nn',
  'plotting': 'plotting',
  'FewShotClassifier': 'deploy.classifier:FewShotClassifier',
  'FewShotModel': 'deploy.model_file:FewShotModel',
  'ModelConfig': 'deploy.model_file:ModelConfig',
  'load_model': 'deploy.model_file:load_model',
  'save_model': 'deploy.model_file:save_model',
  'Exported': 'deploy.export:Exported',
  'export_learner': 'deploy.export:export_learner',
  'export_model': 'deploy.export:export_model',
  'load_exported': 'deploy.export:load_exported',
  'maml': 'learners:maml',
  'meta_sgd': 'learners:meta_sgd',
}
"""Modules, and names of modules, that import flax, orbax or other libraries: they are imported when first used."""


def __getattr__(name: str) -> Any:
  if name not in _LATER:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  module, _, attribute = _LATER[name].partition(':')
  found = importlib.import_module(f'{__name__}.{module}')
  globals()[name] = getattr(found, attribute) if attribute else found
  return globals()[name]


def __dir__() -> list[str]:
  return sorted({*globals(), *_LATER})


__all__ = [
  'Batch',
  'Episode',
  'Exported',
  'FewShotClassifier',
  'FewShotModel',
  'Interval',
  'Learner',
  'MemoryPlan',
  'MetaParams',
  'Model',
  'ModelConfig',
  'Placement',
  'Progress',
  'TaskDistribution',
  'TaskStream',
  'TrainState',
  '__version__',
  'adapt',
  'adapt_only',
  'adapt_path',
  'adapt_path_with_optimizer',
  'adapt_with_optimizer',
  'checkpoint',
  'confidence_interval',
  'datasets',
  'evaluate',
  'export_learner',
  'export_model',
  'files',
  'init',
  'init_alpha',
  'learners',
  'load_exported',
  'load_model',
  'losses',
  'low_rank',
  'maml',
  'mean_loss',
  'mean_loss_and_grad',
  'meta_sgd',
  'nn',
  'plan_memory',
  'rl',
  'save_model',
  'scale_by_alpha',
  'sharding',
  'tasks',
  'train',
  'train_step',
]
