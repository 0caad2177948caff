"""Few-shot learners: each function of this package builds a `Learner`."""

from metasgd_jax.learners.ensemble import ensemble
from metasgd_jax.learners.fine_tuning import fine_tuning
from metasgd_jax.learners.inner_optimizer import WithHyper, inner_optimizer
from metasgd_jax.learners.maml import maml
from metasgd_jax.learners.mann import MemoryCell, PlainCell, mann
from metasgd_jax.learners.matching import matching
from metasgd_jax.learners.meta_lstm import meta_lstm
from metasgd_jax.learners.meta_sgd import meta_sgd
from metasgd_jax.learners.prototypical import prototypical
from metasgd_jax.learners.siamese import siamese

__all__ = [
  'MemoryCell',
  'PlainCell',
  'WithHyper',
  'ensemble',
  'fine_tuning',
  'inner_optimizer',
  'maml',
  'mann',
  'matching',
  'meta_lstm',
  'meta_sgd',
  'prototypical',
  'siamese',
]
