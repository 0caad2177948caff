"""Real data sets as class banks. Only this package imports tensorflow_datasets."""

from metasgd_jax.datasets import cifar_fs, image_folder, mini_imagenet, omniglot
from metasgd_jax.datasets.messages import DatasetError
from metasgd_jax.datasets.splits import (
  ClassNames,
  Splits,
  published_split,
  read_list,
  split_bank,
  split_by_lists,
  split_by_seed,
)

__all__ = [
  'ClassNames',
  'DatasetError',
  'Splits',
  'cifar_fs',
  'image_folder',
  'mini_imagenet',
  'omniglot',
  'published_split',
  'read_list',
  'split_bank',
  'split_by_lists',
  'split_by_seed',
]
