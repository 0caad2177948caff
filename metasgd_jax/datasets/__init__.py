"""Real data sets as class banks. The only place that imports tensorflow_datasets."""

from metasgd_jax.datasets import omniglot
from metasgd_jax.datasets.preparing import DatasetError

__all__ = ['DatasetError', 'omniglot']
