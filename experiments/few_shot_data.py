"""Loads data sets for few-shot classification, and draws tasks from them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

import metasgd_jax as ms
from metasgd_jax.datasets import cifar_fs, image_files, image_folder, mini_imagenet, omniglot, splits
from metasgd_jax.deploy.inputs import has_light_border
from metasgd_jax.io.files import as_path
from metasgd_jax.tasks.augmentation import Augment, chain, flip, light, shift
from metasgd_jax.types import Tasks

DATASETS = ('glyphs', 'omniglot', 'mini_imagenet', 'cifar_fs', 'folder')
CHARACTERS = ('glyphs', 'omniglot')
"""Data sets of drawings, which are light on dark."""

WORKS_WITH = {
  'data_dir': DATASETS[1:],
  'archives': ('omniglot', 'cifar_fs'),
  'verify_archives': ('omniglot', 'cifar_fs'),
  'cache': ('mini_imagenet',),
  'split': ('omniglot',),
  'split_seed': ('omniglot', 'folder'),
  'validation_classes': ('omniglot',),
  'class_lists': ('folder',),
  'image_size': ('omniglot', 'mini_imagenet', 'folder'),
  'channels': ('folder',),
  'stream': DATASETS[1:],
}
"""The data sets with which an option has an effect. An option that is not listed here has an effect with all."""

AUGMENTATIONS: dict[str, Augment | None] = {
  'none': None,
  'shift': shift(2),
  'natural': chain(flip, shift(4), light(0.4)),
}


class Data(NamedTuple):
  """Class banks to train, validate and test on. The banks have no class in common.

  A bank is `None` if the data set has no classes for that purpose. For glyphs all three are `None`, because the program
  generates glyphs and needs no bank. `test_names` are the names of the folders of the test classes, if they were read
  from folders.
  """

  train: ms.tasks.ClassBank | None
  validation: ms.tasks.ClassBank | None
  test: ms.tasks.ClassBank | None
  test_names: tuple[str, ...] = ()


def image_shape(data: Data) -> tuple[int, int, int]:
  """Returns the shape `(H, W, D)` of the images, which for glyphs is `(28, 28, 1)`."""
  return (28, 28, 1) if data.test is None else data.test.images.shape[1:]


def load(config: Any) -> Data:
  """Returns the class banks of `config.dataset`.

  Raises:
    ValueError: if settings do not fit the data.
    DatasetError: if the data set cannot be loaded.
  """
  if config.dataset == 'glyphs':
    return Data(None, None, None)
  names: tuple[str, ...] = ()
  if config.dataset == 'mini_imagenet':
    names = splits.published_split('mini_imagenet').test
    found = mini_imagenet.load(config.data_dir, size=config.image_size or 84, cache=config.cache, report=print)
  elif config.dataset == 'folder':
    found, names = load_folder(config)
  else:
    found = load_archived(config)
  return Data(found.train, found.validation if len(found.validation.sizes) else None, found.test, names)


def load_for_model(config: Any, model: ms.ModelConfig) -> Data:
  """Returns the classes to test a trained model on, without classes to train or validate on.

  The classes are the test classes of the data set. For a folder they are the classes that the file test.txt in
  `config.class_lists` lists, or all classes if there are no lists.

  The images are prepared as `metasgd predict` prepares them: they get the size and the channels of the model, and if
  the model was trained on dark backgrounds, images with a light border are inverted.

  Raises:
    ValueError: if settings do not fit the data.
    DatasetError: if the data set cannot be loaded.
  """
  if config.dataset == 'glyphs':
    return Data(None, None, None)
  form: Any = dict(size=model.image_shape[:2], channels=model.image_shape[2], fit=model.fit)
  image_files.check_form(**form)
  if config.dataset == 'folder':
    bank, names = load_test_folder(config, form)
  else:
    data: Any = load(config)
    bank, names = reshaped(data.test, **form), data.test_names
    check_test(f'the test part of {config.dataset}', range(len(bank.sizes)), bank.sizes, config)
  light = has_light_border(bank.images, white=255) & (model.background == 'dark')
  if light.any():
    bank = bank._replace(images=np.where(light[:, None, None, None], 255 - bank.images, bank.images))
  return Data(None, None, bank, names)


def load_test_folder(config: Any, form: dict[str, Any]) -> tuple[ms.tasks.ClassBank, tuple[str, ...]]:
  """Returns the classes of a folder to test a model on, and their names. `form` has arguments of `image_folder.load`.

  The numbers of classes and images are checked before the images are read, and again without unreadable images.
  """
  listed = splits.read_list(f'{config.class_lists}/test.txt') if config.class_lists else None
  what = f'--data_dir={config.data_dir}' if listed is None else f'{config.class_lists}/test.txt'
  folders = [path for path in image_files.list_directory(as_path(config.data_dir)) if image_files.is_folder(path)]
  counts = {path.name: len(image_files.list_images(path)) for path in folders}
  parts = splits.ClassNames((), (), tuple(counts) if listed is None else listed)
  if counts:  # Otherwise `image_folder.load` raises a better error.
    splits.split_by_lists(tuple(counts), parts)  # Raises ValueError for a class that is not in the folder.
    check_test(what, parts.test, [counts[name] for name in parts.test], config)
  images = image_folder.load(config.data_dir, report=print, **form)
  bank = images.bank if listed is None else splits.split_bank(images.bank, images.names, parts).test
  check_test(what, parts.test, bank.sizes, config)
  return bank, images.names if listed is None else listed


def reshaped(
  bank: ms.tasks.ClassBank, size: tuple[int, int], channels: int, fit: image_files.Fit
) -> ms.tasks.ClassBank:
  """Returns a bank whose images have another size and number of channels, as if they were read from files."""
  if bank.images.shape[1:] == (*size, channels):
    return bank
  mode = 'L' if channels == 1 else 'RGB'
  opened = (Image.fromarray(image[..., 0] if image.shape[2] == 1 else image) for image in bank.images)
  return bank._replace(images=np.stack([image_files.resized(image.convert(mode), size, fit) for image in opened]))


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


def load_folder(config: Any) -> tuple[splits.Splits, tuple[str, ...]]:
  """Returns the classes of a folder of images, and the names of the test classes.

  The classes are split by the lists in the folder `config.class_lists`.

  Without `class_lists` the split is random: 64% of the classes to train on, 16% for validation, and 20% to test on.
  """
  images = load_images(config)
  if config.class_lists:
    parts = splits.ClassNames._fields
    names = splits.ClassNames(*(splits.read_list(f'{config.class_lists}/{part}.txt') for part in parts))
  else:
    names = splits.split_by_seed(images.names, seed=config.split_seed)
  found = splits.split_bank(images.bank, images.names, names)
  sizes = {'--shot': config.shot, '--query': config.query}
  check_part('the train part', names.train, found.train.sizes, config.way, sizes)
  check_test('the test part', names.test, found.test.sizes, config)
  if config.validate_every:
    way = validation_way(config.way, len(names.validation))
    check_test('the validation part', names.validation, found.validation.sizes, config, way)
  return found, names.test


def load_images(config: Any) -> image_folder.ImageFolder:
  """Returns the images of a folder with a sub-folder for each class."""
  return image_folder.load(config.data_dir, size=config.image_size or 84, channels=config.channels, report=print)


def validation_way(way: int, classes: int) -> int:
  """Returns the number of ways in validation, which is lower than `way` if there are fewer validation classes."""
  return min(way, max(2, classes))


def check_test(what: str, names: Sequence[Any], sizes: Any, config: Any, way: int | None = None) -> None:
  """Raises the errors of `check_part` for the tasks of a test, of `way` classes, which is `config.way` by default."""
  needed = {'--eval_shots': max(config.test_shots), '--eval_query': config.eval_query}
  check_part(what, names, sizes, way or config.way, needed)


def check_part(what: str, names: Sequence[Any], sizes: Any, way: int, needed: dict[str, int]) -> None:
  """Raises ValueError if a part of a data set has too few classes, or if a class of the part has too few images.

  Args:
    what: Words for the part.
    names: Names of its classes.
    sizes: Number of images of each class.
    way: Number of classes of a task.
    needed: Number of images of each class that a task needs, by the names of the flags that ask for them.
  """
  if way > len(names):
    raise ValueError(f'{what} has only {len(names)} classes, but --way={way}; add classes, or lower --way')
  least = int(np.argmin(sizes))
  if sum(needed.values()) > sizes[least]:
    flags, counts = ' + '.join(needed), ' + '.join(map(str, needed.values()))
    raise ValueError(
      f'class {names[least]!r} of {what} has only {sizes[least]} images, but a task needs {flags} = {counts}; '
      f'lower {" or ".join(needed)}, add images, or remove the class'
    )


def serves(bank: ms.tasks.ClassBank | None, *, way: int, shot: int, query: int) -> bool:
  """Returns whether a bank has enough classes, and enough images of each class, for tasks of these sizes."""
  return bank is not None and way <= len(bank.sizes) and shot + query <= np.min(bank.sizes)


def tasks(bank: ms.tasks.ClassBank | None, way: int, *, shot: int, query: int) -> Tasks:
  """Returns few-shot tasks from the classes of a bank, or tasks of generated glyphs if `bank` is `None`."""
  if bank is None:
    return ms.tasks.glyphs(way=way, shot=shot, query=query)
  return from_indices(bank, ms.tasks.image_indices(bank, way=way, shot=shot, query=query))


def from_indices(bank: ms.tasks.ClassBank, indices: ms.TaskDistribution) -> Tasks:
  """Returns the tasks of `indices`, with images in place of indices.

  If the bank's images are in host memory, the images of the tasks are streamed to the device.
  """
  if isinstance(bank.images, jax.Array):
    return ms.tasks.few_shot_from(indices, bank.images)
  return ms.tasks.stream(bank, indices)


def placed(data: Data, choice: str) -> Data:
  """Returns the data with all images on the device, except for the banks that are to be streamed."""
  for part in ('train', 'validation', 'test'):
    bank = getattr(data, part)
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
