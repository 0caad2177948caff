"""Few-shot learners, each a builder of a `Learner`."""

from metasgd_jax.learners.maml import maml
from metasgd_jax.learners.meta_sgd import meta_sgd

__all__ = ['maml', 'meta_sgd']
