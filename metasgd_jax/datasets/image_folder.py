"""Reads a folder of images, either as a class bank with one sub-folder per class, or as images without labels."""

import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from metasgd_jax.datasets import image_files
from metasgd_jax.datasets.image_files import Fit, Images, check_form, read_all, read_image as read_image
from metasgd_jax.datasets.messages import DatasetError, Report, printing
from metasgd_jax.datasets.splits import some
from metasgd_jax.io.files import PathLike, as_path
from metasgd_jax.tasks.few_shot import ClassBank


class ImageFolder(NamedTuple):
  """The classes of a folder of images.

  Attributes:
    names: Names of the C classes, sorted. The name of a class is the name of its folder.
    bank: Class bank with images `[M, H, W, D]`. The classes are in the order of `names`.
    paths: Paths of the M image files, in the order of the images. They are sorted within each class.
    skipped: Paths of the files that could not be decoded, each with the reason.
  """

  names: tuple[str, ...]
  bank: ClassBank
  paths: tuple[pathlib.Path, ...]
  skipped: tuple[tuple[pathlib.Path, str], ...]


def load(
  directory: PathLike,
  *,
  size: int | tuple[int, int],
  channels: int = 3,
  fit: Fit = 'crop',
  report: Report = lambda line: None,
) -> ImageFolder:
  """Returns the classes of a folder that has one sub-folder per class.

  The images of a class are all images in its sub-folder, at any depth.

  Images are brought to the aspect ratio of `size` and scaled with Lanczos; `read_image` describes the decoding. A file
  that cannot be decoded is skipped and reported. Images outside of the class folders are left out and reported. A file
  is ignored if neither its suffix nor the beginning of its content is that of an image.

  Args:
    directory: Directory that contains the class folders. `~` is the home directory.
    size: Height and width (H, W) of the images, or one number for both.
    channels: Number of channels D, 3 for RGB or 1 for grey.
    fit: How an image is brought to the aspect ratio of `size`; see `image_files.Fit`.
    report: Function that is called with a line of text before images are read, and every few seconds while images are
      read.

  Raises:
    DatasetError: if the directory is missing, is a file or has no sub-folder, or if a class has no image that can be
      read.
    ValueError: if a size is not an integer of at least 1, if `channels` is neither 1 nor 3, or if `fit` is unknown.
  """
  check_form(size, channels, fit)
  directory, report = as_path(directory), printing(report)
  entries = image_files.list_directory(directory)
  folders = [path for path in entries if image_files.is_folder(path)]
  if not folders:
    raise DatasetError(f'{directory} has no sub-folders; put the images of each class in a separate sub-folder')
  if loose := [path.name for path in entries if path not in folders and image_files.is_image(path)]:
    report(f'left out {some(loose, "image", "images")} outside of the folders of the classes in {directory}')
  class_of = {path: c for c, folder in enumerate(folders) for path in image_files.list_images(folder)}
  report(f'reading {len(class_of):,} images from {directory}')
  found = read_all(tuple(class_of), size, channels, report, fit)
  names = tuple(folder.name for folder in folders)
  advice = 'add images, or remove the folders of these classes'
  sizes = class_sizes(directory, names, [class_of[path] for path in found.paths], advice)
  return ImageFolder(names, ClassBank(found.images, sizes), found.paths, found.skipped)


def class_sizes(directory: pathlib.Path, names: Sequence[str], labels: Sequence[int], advice: str) -> np.ndarray:
  """Returns the number of images of each class, `[C]`.

  Args:
    directory: Directory of the images, which the error message names.
    names: Names of the C classes.
    labels: Index of the class of each image that could be read.
    advice: Advice that ends the error message.

  Raises:
    DatasetError: if a class has no image.
  """
  sizes = np.bincount(labels, minlength=len(names)).astype(int)
  if empty := [name for name, count in zip(names, sizes, strict=True) if count == 0]:
    raise DatasetError(f'{directory} has {some(empty, "class", "classes")} without an image that can be read; {advice}')
  return sizes


def read_images(
  directory: PathLike,
  *,
  size: int | tuple[int, int],
  channels: int = 3,
  fit: Fit = 'crop',
  report: Report = lambda line: None,
) -> Images:
  """Returns all images of a folder and its sub-folders, without labels. The images are sorted by path.

  Every file is opened, whatever its suffix is. A file that is not an image, or that cannot be decoded, is skipped and
  reported.

  Args:
    directory: Directory that contains the images. `~` is the home directory.
    size: Height and width (H, W) of the images, or one number for both.
    channels: Number of channels D, 3 for RGB or 1 for grey.
    fit: How an image is brought to the aspect ratio of `size`; see `image_files.Fit`.
    report: Function that is called with a line of text before images are read, and every few seconds while images are
      read.

  Raises:
    DatasetError: if the directory is missing, is a file, or has no image that can be read.
    ValueError: if a size is not an integer of at least 1, if `channels` is neither 1 nor 3, or if `fit` is unknown.
  """
  check_form(size, channels, fit)
  directory, report = as_path(directory), printing(report)
  paths = image_files.list_files(directory)
  report(f'reading {len(paths):,} files from {directory}')
  found = read_all(paths, size, channels, report, fit)
  if not found.paths:
    raise DatasetError(f'{directory} has no image that can be read ({len(found.skipped)} files were tried); add images')
  return found
