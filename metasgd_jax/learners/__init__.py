"""Few-shot learners: each function of this package builds a `Learner`."""

from metasgd_jax.learners.ensemble import ensemble as ensemble
from metasgd_jax.learners.fine_tuning import fine_tuning as fine_tuning
from metasgd_jax.learners.inner_optimizer import WithHyper as WithHyper, inner_optimizer as inner_optimizer
from metasgd_jax.learners.maml import maml as maml
from metasgd_jax.learners.mann import MemoryCell as MemoryCell, PlainCell as PlainCell, mann as mann
from metasgd_jax.learners.matching import matching as matching
from metasgd_jax.learners.meta_lstm import meta_lstm as meta_lstm
from metasgd_jax.learners.meta_sgd import meta_sgd as meta_sgd
from metasgd_jax.learners.prototypical import prototypical as prototypical
from metasgd_jax.learners.siamese import siamese as siamese
