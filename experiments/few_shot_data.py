"""Data sets of few-shot classification by name, as banks to train, validate and test on."""

import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import metasgd_jax as ms
from metasgd_jax.datasets import cifar_fs, image_folder, mini_imagenet, omniglot, splits
from metasgd_jax.tasks import augmentation
from metasgd_jax.types import Tasks

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
    characters = omniglot.load(where, size=config.image_size or 28, **archives, report=print)
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
  """Returns the classes of any folder of images, by lists or by seed: 64% to train, 16% to validate, 20% to test."""
  images = image_folder.load(config.data_dir, size=config.image_size or 84, channels=config.channels, report=print)
  if config.class_lists:
    directory = pathlib.Path(config.class_lists).expanduser()
    names = splits.ClassNames(*(splits.read_list(directory / f'{part}.txt') for part in splits.ClassNames._fields))
  else:
    names = splits.split_by_seed(images.names, seed=config.split_seed)
  found = splits.split_bank(images.bank, images.names, names)
  parts = zip(splits.ClassNames._fields, names, found, strict=True)
  for part, those, bank in parts:
    if part != 'validation' or config.validate_every:
      check_part(part, those, bank, config)
  return found


def check_part(part: str, names: Sequence[str], bank: ms.tasks.ClassBank, config: Any) -> None:
  """Raises ValueError, naming the class and the flags, unless a part's classes suffice for its tasks."""
  if config.way > len(names):
    raise ValueError(
      f'way={config.way} asks for more classes than there are in the {part} part ({len(names)}); add classes, '
      'lower way, or share them out otherwise by class_lists'
    )
  shot, flag, query = config.shot, 'query', config.query
  if part != 'train':
    shot, flag, query = max(config.test_shots), 'eval_query', config.eval_query
  least = int(np.argmin(bank.sizes))
  if shot + query > bank.sizes[least]:
    raise ValueError(
      f'class {names[least]!r} of the {part} part has {bank.sizes[least]} images where '
      f'shot + {flag} = {shot} + {query} are wanted; add images, lower {flag}, or leave the class out'
    )


def tasks(bank: ms.tasks.ClassBank | None, config: Any, *, shot: int, query: int) -> Tasks:
  """Returns few-shot tasks of a bank, streamed where it is too large; of glyphs where there is none."""
  if bank is None:
    return ms.tasks.glyphs(way=config.way, shot=shot, query=query)
  return _of_indices(bank, ms.tasks.image_indices(bank, way=config.way, shot=shot, query=query))


def supervised(bank: ms.tasks.ClassBank, *, batch: int) -> Tasks:
  """Returns batches of all classes of a bank."""
  return _of_indices(bank, ms.tasks.class_indices(bank, batch=batch))


def augmented(found: Tasks, config: Any) -> Tasks:
  """Returns the tasks, their images augmented as the configuration says."""
  augment = AUGMENTATIONS[config.augmentation]
  return ms.tasks.augmented(found, augment) if augment else found


def placed(found: Data, choice: str) -> Data:
  """Returns the data with banks on the device, once for all learners, but for those that are to be streamed."""
  on_device = lambda bank: bank._replace(images=jnp.asarray(bank.images))
  return Data(*(bank if bank is None or streamed(bank, choice) else on_device(bank) for bank in found))


def _of_indices(bank, indices) -> Tasks:
  if isinstance(bank.images, jax.Array):
    return ms.tasks.few_shot_from(indices, bank.images)
  return ms.tasks.stream(bank, indices)


def streamed(bank: ms.tasks.ClassBank, choice: str) -> bool:
  """Returns whether images stay on the host: 'yes', 'no', or with 'auto' where they would fill half of the device."""
  if choice != 'auto':
    return choice == 'yes'
  statistics: dict[str, int] = jax.local_devices()[0].memory_stats() or {}
  return bank.images.nbytes > statistics.get('bytes_limit', np.inf) / 2
