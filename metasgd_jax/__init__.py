"""Meta-SGD (Li et al. 2017) and related meta-learning methods as pure functions in JAX."""

import importlib
from typing import TYPE_CHECKING, Any

from metasgd_jax import losses as losses, rl as rl, tasks as tasks
from metasgd_jax.inner.adaptation import adapt as adapt, adapt_path as adapt_path
from metasgd_jax.inner.alpha import AlphaConfig as AlphaConfig, init_alpha as init_alpha
from metasgd_jax.inner.optimizer import (
  adapt_path_with_optimizer as adapt_path_with_optimizer,
  adapt_with_optimizer as adapt_with_optimizer,
  scale_by_alpha as scale_by_alpha,
)
from metasgd_jax.inner.parts import adapt_only as adapt_only, low_rank as low_rank
from metasgd_jax.outer import sharding as sharding
from metasgd_jax.outer.evaluation import (
  Interval as Interval,
  confidence_interval as confidence_interval,
  evaluate as evaluate,
)
from metasgd_jax.outer.loop import Progress as Progress, TrainState as TrainState
from metasgd_jax.outer.memory import MemoryPlan as MemoryPlan, plan_memory as plan_memory
from metasgd_jax.outer.objective import mean_loss as mean_loss, mean_loss_and_grad as mean_loss_and_grad
from metasgd_jax.outer.placement import Placement as Placement
from metasgd_jax.outer.training import init as init, train as train, train_step as train_step
from metasgd_jax.types import (
  Batch as Batch,
  Episode as Episode,
  Learner as Learner,
  MetaParams as MetaParams,
  Model as Model,
  TaskDistribution as TaskDistribution,
  TaskStream as TaskStream,
)
from metasgd_jax.version import __version__ as __version__

if TYPE_CHECKING:
  from metasgd_jax import datasets as datasets, learners as learners, nn as nn, plotting as plotting
  from metasgd_jax.deploy.classifier import FewShotClassifier as FewShotClassifier
  from metasgd_jax.deploy.export import (
    Exported as Exported,
    export_learner as export_learner,
    export_model as export_model,
    load_exported as load_exported,
  )
  from metasgd_jax.deploy.model_file import (
    FewShotModel as FewShotModel,
    ModelConfig as ModelConfig,
    load_model as load_model,
    save_model as save_model,
  )
  from metasgd_jax.io import checkpoint as checkpoint, files as files
  from metasgd_jax.learners import maml as maml, meta_sgd as meta_sgd

_LATER = {
  **{name: f'io.{name}' for name in ('checkpoint', 'files')},
  **{name: name for name in ('datasets', 'learners', 'nn', 'plotting')},
  **{name: f'learners:{name}' for name in ('maml', 'meta_sgd')},
  'FewShotClassifier': 'deploy.classifier:FewShotClassifier',
  **{name: f'deploy.export:{name}' for name in ('Exported', 'export_learner', 'export_model', 'load_exported')},
  **{name: f'deploy.model_file:{name}' for name in ('FewShotModel', 'ModelConfig', 'load_model', 'save_model')},
}
"""Attributes of this package that are imported when they are first used, because they need flax, orbax or others.

Each value is the path of a module, or of an attribute of a module as 'module:attribute', inside this package.
"""


def __getattr__(name: str) -> Any:
  if name not in _LATER:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  module, _, attribute = _LATER[name].partition(':')
  found = importlib.import_module(f'{__name__}.{module}')
  globals()[name] = getattr(found, attribute) if attribute else found
  return globals()[name]


def __dir__() -> list[str]:
  return sorted({*globals(), *_LATER})
