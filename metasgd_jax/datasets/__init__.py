"""Real data sets as class banks. No other part of metasgd_jax imports tensorflow_datasets."""

from metasgd_jax.datasets import (
  cifar_fs as cifar_fs,
  image_folder as image_folder,
  mini_imagenet as mini_imagenet,
  omniglot as omniglot,
)
from metasgd_jax.datasets.messages import DatasetError as DatasetError
from metasgd_jax.datasets.splits import (
  ClassNames as ClassNames,
  Splits as Splits,
  published_split as published_split,
  read_list as read_list,
  split_bank as split_bank,
  split_by_lists as split_by_lists,
  split_by_seed as split_by_seed,
)
