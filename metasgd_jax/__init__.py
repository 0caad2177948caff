"""Meta-SGD (Li et al. 2017) and its kin as pure functions in JAX."""

from metasgd_jax import learners, losses, nn, rl, sharding, tasks
from metasgd_jax.adaptation import adapt, adapt_path, init_alpha
from metasgd_jax.classifier import FewShotClassifier
from metasgd_jax.evaluation import Estimate, estimate, evaluate
from metasgd_jax.export import Exported, export_learner, export_model, load_exported
from metasgd_jax.inner_optax import adapt_with, adapt_with_path, scale_by_alpha
from metasgd_jax.learners import maml, meta_sgd
from metasgd_jax.memory_plan import MemoryPlan, plan_memory
from metasgd_jax.model_file import FewShotModel, ModelConfig, load_model, save_model
from metasgd_jax.objective import Mapping, mean_loss, value_and_grad
from metasgd_jax.partial import low_rank, partly
from metasgd_jax.training import Progress, TrainState, init, train, train_step
from metasgd_jax.types import Batch, Episode, Learner, MetaParams, Model, TaskDistribution, TaskStream
from metasgd_jax.version import __version__

__all__ = [
  'Batch',
  'Episode',
  'Estimate',
  'Exported',
  'FewShotClassifier',
  'FewShotModel',
  'Learner',
  'Mapping',
  'MemoryPlan',
  'MetaParams',
  'Model',
  'ModelConfig',
  'Progress',
  'TaskDistribution',
  'TaskStream',
  'TrainState',
  '__version__',
  'adapt',
  'adapt_path',
  'adapt_with',
  'adapt_with_path',
  'estimate',
  'evaluate',
  'export_learner',
  'export_model',
  'init',
  'init_alpha',
  'learners',
  'load_exported',
  'load_model',
  'losses',
  'low_rank',
  'maml',
  'mean_loss',
  'meta_sgd',
  'nn',
  'partly',
  'plan_memory',
  'rl',
  'save_model',
  'scale_by_alpha',
  'sharding',
  'tasks',
  'train',
  'train_step',
  'value_and_grad',
]
