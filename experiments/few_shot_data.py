"""Loads data sets for few-shot classification, and draws tasks from them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import metasgd_jax as ms
from metasgd_jax.datasets import cifar_fs, image_folder, mini_imagenet, omniglot, splits
from metasgd_jax.tasks.augmentation import Augment, chain, flip, light, shift
from metasgd_jax.types import Tasks

DATASETS = ('glyphs', 'omniglot', 'mini_imagenet', 'cifar_fs', 'folder')
AUGMENTATIONS: dict[str, Augment | None] = {
  'none': None,
  'shift': shift(2),
  'natural': chain(flip, shift(4), light(0.4)),
}


class Data(NamedTuple):
  """Class banks to train, validate and test on. The banks have no class in common.

  A bank is `None` if the data set has no classes for that purpose. For glyphs all three are `None`, because the program
  generates glyphs and needs no bank.
  """

  train: ms.tasks.ClassBank | None
  validation: ms.tasks.ClassBank | None
  test: ms.tasks.ClassBank | None


def load(config: Any) -> Data:
  """Returns the class banks of `config.dataset`.

  Raises:
    ValueError: if settings do not fit the data.
    DatasetError: if the data set cannot be loaded.
  """
  if config.dataset == 'glyphs':
    return Data(None, None, None)
  if config.dataset == 'mini_imagenet':
    found = mini_imagenet.load(config.data_dir, size=config.image_size or 84, cache=config.cache, report=print)
  elif config.dataset == 'folder':
    found = load_folder(config)
  else:
    found = load_archived(config)
  return Data(found.train, found.validation if len(found.validation.sizes) else None, found.test)


def load_unseen(config: Any) -> ms.tasks.ClassBank | None:
  """Returns the classes on which a model is tested that this run does not train, or `None` for glyphs.

  They are the test classes of `config.dataset`. A folder without class lists is tested on all of its classes.

  Raises:
    ValueError: if settings do not fit the data.
    DatasetError: if the data set cannot be loaded.
  """
  if config.dataset != 'folder' or config.class_lists:
    return load(config).test
  images = load_images(config)
  check_part('whole', images.names, images.bank, config.way, max(config.test_shots), config.eval_query)
  return images.bank


def load_archived(config: Any) -> splits.Splits:
  """Returns the classes of CIFAR-FS or Omniglot, which tfds prepares.

  Each training class of Omniglot gives three more classes: its images rotated by 90, 180 and 270 degrees.
  """
  source = {'archives': config.archives, 'verify_archives': config.verify_archives, 'report': print}
  if config.dataset == 'cifar_fs':
    return cifar_fs.load(config.data_dir, **source)
  characters = omniglot.load(config.data_dir, size=config.image_size or 28, **source)
  if config.split == 'vinyals':
    found = omniglot.vinyals_split(characters)
  else:
    found = omniglot.random_split(characters, seed=config.split_seed, validation=config.validation_classes)
  return found._replace(train=ms.tasks.rotate_classes(found.train))


def load_folder(config: Any) -> splits.Splits:
  """Returns the classes of a folder of images, split by the lists in the folder `config.class_lists`.

  Without `class_lists` the split is random: 64% of the classes to train on, 16% for validation, and 20% to test on.
  """
  images = load_images(config)
  if config.class_lists:
    parts = splits.ClassNames._fields
    names = splits.ClassNames(*(splits.read_list(f'{config.class_lists}/{part}.txt') for part in parts))
  else:
    names = splits.split_by_seed(images.names, seed=config.split_seed)
  found = splits.split_bank(images.bank, images.names, names)
  check_part('train', names.train, found.train, config.way, config.shot, config.query)
  check_part('test', names.test, found.test, config.way, max(config.test_shots), config.eval_query)
  if config.validate_every:
    check_part('validation', names.validation, found.validation, config.way, max(config.test_shots), config.eval_query)
  return found


def load_images(config: Any) -> image_folder.ImageFolder:
  """Returns the images of a folder with a sub-folder for each class."""
  return image_folder.load(config.data_dir, size=config.image_size or 84, channels=config.channels, report=print)


def check_part(part: str, names: Sequence[str], bank: ms.tasks.ClassBank, way: int, shot: int, query: int) -> None:
  """Raises ValueError if a part of a folder has too few classes, or if a class of the part has too few images."""
  if way > len(names):
    raise ValueError(f'way={way} is more than the {len(names)} classes of the {part} part; add classes, or lower way')
  least = int(np.argmin(bank.sizes))
  if shot + query > bank.sizes[least]:
    raise ValueError(
      f'class {names[least]!r} of the {part} part has {bank.sizes[least]} images, but a task needs '
      f'shot + query = {shot} + {query}; add images, lower query (in testing, eval_query), or remove the class'
    )


def tasks(bank: ms.tasks.ClassBank | None, config: Any, *, shot: int, query: int) -> Tasks:
  """Returns few-shot tasks from the classes of a bank, or tasks of generated glyphs if `bank` is `None`."""
  if bank is None:
    return ms.tasks.glyphs(way=config.way, shot=shot, query=query)
  return from_indices(bank, ms.tasks.image_indices(bank, way=config.way, shot=shot, query=query))


def from_indices(bank: ms.tasks.ClassBank, indices: ms.TaskDistribution) -> Tasks:
  """Returns the tasks of `indices`, with images in place of indices.

  If the bank's images are in host memory, the images of the tasks are streamed to the device.
  """
  if isinstance(bank.images, jax.Array):
    return ms.tasks.few_shot_from(indices, bank.images)
  return ms.tasks.stream(bank, indices)


def placed(data: Data, choice: str) -> Data:
  """Returns the data with all images on the device, except for the banks that are to be streamed."""
  for part, bank in data._asdict().items():
    if bank is not None and not streamed(bank, choice):
      data = data._replace(**{part: bank._replace(images=jnp.asarray(bank.images))})
  return data


def streamed(bank: ms.tasks.ClassBank, choice: str) -> bool:
  """Returns whether the images stay in host memory and are streamed to the device.

  `choice` is 'yes', 'no' or 'auto', which streams images that would fill more than half of the device's memory.
  """
  if choice != 'auto':
    return choice == 'yes'
  statistics: dict[str, int] = jax.local_devices()[0].memory_stats() or {}
  return bank.images.nbytes > statistics.get('bytes_limit', np.inf) / 2
