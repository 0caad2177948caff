"""Any folder of images: one sub-folder per class as a class bank, or all images of a folder without labels."""

import os
import pathlib
from typing import NamedTuple

import numpy as np

from metasgd_jax.datasets.image_files import (
  SUFFIXES,
  Fit,
  Images,
  check_form,
  is_folder,
  list_directory,
  list_images,
  read_all,
)
from metasgd_jax.datasets.image_files import read_image as read_image
from metasgd_jax.datasets.messages import DatasetError, Report, at_home, printing
from metasgd_jax.datasets.splits import some
from metasgd_jax.tasks.few_shot import ClassBank


class ImageFolder(NamedTuple):
  """A folder of classes.

  Attributes:
    names: of the C classes, sorted: the names of their folders.
    bank: images `[M, H, W, D]` by class, in the order of the names.
    paths: M files, in the order of the images; within a class they are sorted.
    skipped: files that could not be decoded, each with the reason.
  """

  names: tuple[str, ...]
  bank: ClassBank
  paths: tuple[pathlib.Path, ...]
  skipped: tuple[tuple[pathlib.Path, str], ...]


def load(
  directory: str | os.PathLike[str],
  *,
  size: int | tuple[int, int],
  channels: int = 3,
  fit: Fit = 'crop',
  report: Report = lambda line: None,
) -> ImageFolder:
  """Reads a folder whose sub-folders are the classes, whatever lies deeper in a class being the class's too.

  Images are brought to the shape asked for and scaled with Lanczos (`read_image` says the rest). A file that cannot be
  decoded is skipped and reported, and so are images that lie beside the classes' folders; files that are not called
  images are left alone.

  Args:
    directory: what contains the classes' folders; `~` is the home directory.
    size: H = W, or (H, W).
    channels: D, 3 for RGB or 1 for grey.
    fit: what becomes of an image of another shape; see `image_files.Fit`.
    report: called with a line before, and every few seconds while, images are read.

  Raises:
    DatasetError: the directory is missing, is a file or has no sub-folder, or a class has no image that can be read.
    ValueError: a size below 1, channels other than 1 and 3, or an unknown fit.
  """
  check_form(size, channels, fit)
  directory, report = at_home(directory), printing(report)
  entries = list_directory(directory)
  folders = [path for path in entries if is_folder(path)]
  if not folders:
    raise DatasetError(f'{directory} has no sub-folders; put the images of each class in a folder of their own there')
  if loose := [path.name for path in entries if path.suffix.lower() in SUFFIXES and path not in folders]:
    report(f'left out {some(loose, "image", "images")} beside the folders of the classes in {directory}')
  class_of = {path: c for c, folder in enumerate(folders) for path in list_images(folder)}
  report(f'reading {len(class_of):,} images from {directory}')
  found = read_all(tuple(class_of), size, channels, report, fit)
  sizes = np.bincount([class_of[path] for path in found.paths], minlength=len(folders)).astype(int)
  if empty := [folder.name for folder, count in zip(folders, sizes, strict=True) if count == 0]:
    raise DatasetError(
      f'{directory} has {some(empty, "class", "classes")} without an image that can be read; fill or remove them'
    )
  return ImageFolder(tuple(f.name for f in folders), ClassBank(found.images, sizes), found.paths, found.skipped)


def read_images(
  directory: str | os.PathLike[str],
  *,
  size: int | tuple[int, int],
  channels: int = 3,
  fit: Fit = 'crop',
  report: Report = lambda line: None,
) -> Images:
  """Reads all images of a folder and its sub-folders, sorted, without labels.

  Args:
    directory: what contains the images; `~` is the home directory.
    size: H = W, or (H, W).
    channels: D, 3 for RGB or 1 for grey.
    fit: what becomes of an image of another shape; see `image_files.Fit`.
    report: called with a line before, and every few seconds while, images are read.

  Raises:
    DatasetError: the directory is missing, is a file, or has no image that can be read.
    ValueError: a size below 1, channels other than 1 and 3, or an unknown fit.
  """
  check_form(size, channels, fit)
  directory, report = at_home(directory), printing(report)
  paths = list_images(directory)
  report(f'reading {len(paths):,} images from {directory}')
  found = read_all(paths, size, channels, report, fit)
  if not found.paths:
    raise DatasetError(f'{directory} has no image that can be read ({len(found.skipped)} were tried)')
  return found
