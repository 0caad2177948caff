"""Data sets of few-shot classification by name, as banks to train, validate and test on."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import metasgd_jax as ms
from metasgd_jax.datasets import cifar_fs, image_folder, mini_imagenet, omniglot, splits
from metasgd_jax.tasks import augmentation

DATASETS = ('glyphs', 'omniglot', 'mini_imagenet', 'cifar_fs', 'folder')
AUGMENTATIONS: dict[str, augmentation.Augment | None] = {
  'none': None,
  'shift': augmentation.shift(2),
  'natural': augmentation.chain(augmentation.flip, augmentation.shift(4), augmentation.light(0.4)),
}


class Data(NamedTuple):
  """Banks of classes that have none in common; `None` for glyphs, which have no bank, and for no validation."""

  train: ms.tasks.ClassBank | None
  validation: ms.tasks.ClassBank | None
  test: ms.tasks.ClassBank | None


def load(config: Any) -> Data:
  """Returns the banks of `config.dataset`.

  Raises:
    ValueError: settings that do not fit the data.
    DatasetError: the data set cannot be had.
  """
  if config.dataset == 'glyphs':
    return Data(None, None, None)
  where, archives = config.data_dir, dict(archives=config.archives, verify_archives=config.verify_archives)
  if config.dataset == 'omniglot':
    characters = omniglot.load(where, **archives, report=print)
    if config.split == 'vinyals':
      found = omniglot.vinyals_split(characters)
    else:
      found = omniglot.random_split(characters, seed=config.split_seed, validation=config.validation_classes)
    found = found._replace(train=ms.tasks.rotate_classes(found.train))
  elif config.dataset == 'mini_imagenet':
    found = mini_imagenet.load(where, size=config.image_size or 84, cache=config.cache, report=print)
  elif config.dataset == 'cifar_fs':
    found = cifar_fs.load(where, **archives, report=print)
  else:
    found = folder(config)
  return Data(found.train, found.validation if len(found.validation.sizes) else None, found.test)


def folder(config: Any) -> splits.Splits:
  """Returns the classes of any folder of images, shared out by seed: 64% to train on, 16% to validate, 20% to test."""
  images = image_folder.load(config.data_dir, size=config.image_size or 84, channels=config.channels, report=print)
  return splits.split_bank(images.bank, images.names, splits.split_by_seed(images.names, seed=config.split_seed))


def tasks(bank: ms.tasks.ClassBank | None, *, way: int, shot: int, query: int) -> ms.TaskDistribution:
  """Returns the tasks of a bank; of glyphs where there is none."""
  if bank is None:
    return ms.tasks.glyphs(way=way, shot=shot, query=query)
  return ms.tasks.few_shot(bank, way=way, shot=shot, query=query)


def training_tasks(bank: ms.tasks.ClassBank | None, config: Any, *, shot: int, query: int) -> Any:
  """Returns what to train on: of a bank that is too large for the device a stream; augmented if asked for."""
  if bank is not None and streamed(bank, config.stream):
    found: Any = ms.tasks.stream(bank, way=config.way, shot=shot, query=query)
  else:
    found = tasks(bank, way=config.way, shot=shot, query=query)
  augment = AUGMENTATIONS[config.augmentation]
  return ms.tasks.augmented(found, augment) if augment else found


def streamed(bank: ms.tasks.ClassBank, choice: str) -> bool:
  """Returns whether images stay on the host: 'yes', 'no', or with 'auto' where they would fill half of the device."""
  if choice != 'auto':
    return choice == 'yes'
  statistics: dict[str, int] = jax.devices()[0].memory_stats() or {}
  return bank.images.nbytes > statistics.get('bytes_limit', np.inf) / 2


def accuracy_by_instance(learner: ms.Learner, meta: Any, sequences: ms.TaskDistribution, key, num_tasks: int):
  """Returns the accuracy at the first item of its class, the second, …, of sequences of unseen tasks: `[tasks, n]`."""

  @jax.jit
  def of_task(meta, tasks, key):
    sample_key, episode_key, order_key = jax.random.split(key, 3)
    info = learner.loss(meta, tasks.episode(tasks.sample(sample_key), episode_key), order_key)[1]
    names = sorted((name for name in info if name.startswith('instance_')), key=lambda name: int(name.split('_')[1]))
    return jnp.stack([info[name] for name in names])

  of_tasks: Callable = jax.jit(lambda keys: jax.lax.map(lambda k: of_task(meta, sequences.as_arguments(), k), keys))
  return np.asarray(of_tasks(jax.random.split(key, num_tasks)))
