"""Finds image files and decodes them to uint8 arrays of one size.

Files that cannot be decoded are skipped and reported. Files are not trusted: only some common formats are opened,
images with too many pixels are refused before they are decoded, and a folder that is linked into itself is read once.
"""

import concurrent.futures
import contextlib
import functools
import io
import os
import pathlib
import stat
import threading
import time
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from metasgd_jax.datasets.messages import DatasetError, Report, with_progress
from metasgd_jax.datasets.pixels import in_mode
from metasgd_jax.io.files import PathLike, as_path, first_line
from metasgd_jax.types import check_choice

_SUFFIXES = (
  *('.png', '.apng', '.jpg', '.jpeg', '.jpe', '.jfif', '.bmp', '.dib', '.gif', '.webp', '.tif', '.tiff'),
  *('.ppm', '.pgm', '.pbm', '.pnm', '.avif', '.heic', '.heif', '.jp2', '.j2k', '.ico', '.tga'),
)
REPORTED_ONE_BY_ONE = 10
SECONDS_OF_A_FILE = 60.0
"""Time limit for decoding one file. A slower file is skipped, because malicious files can take hours."""

Fit = Literal['crop', 'pad']
"""How an image is brought to the aspect ratio of the target size.

- `crop`: the image is cropped to its centre.
- `pad`: the image is padded on two opposite sides with the median colour of its border.
"""

_LARGE = 1 << 24
_large_ones = threading.BoundedSemaphore(2)
"""Limits how many images with more than `_LARGE` pixels are decoded at once. The largest allowed image takes 1.5 GB."""

_TILE_WIDTH, _TILE_HEIGHT = 322, 323
"""Numbers of the TIFF tags for the size of a tile."""
_SMALL_TILE = 1 << 20
"""A tile of a TIFF file may have this number of pixels, whatever the size of the image. A larger tile may have at most
four times the number of pixels of the image."""

_FORMATS = ('PNG', 'JPEG', 'BMP', 'DIB', 'GIF', 'WEBP', 'TIFF', 'PPM', 'AVIF', 'JPEG2000', 'ICO')


class Images(NamedTuple):
  """Images without labels.

  Attributes:
    paths: Paths of the M image files, in the order of the images.
    images: Decoded images, `[M, H, W, D]` uint8.
    skipped: Paths of the files that could not be decoded, each with the reason.
  """

  paths: tuple[pathlib.Path, ...]
  images: np.ndarray
  skipped: tuple[tuple[pathlib.Path, str], ...]


def read_image(path: PathLike, size: int | tuple[int, int], channels: int, fit: Fit = 'crop') -> np.ndarray:
  """Returns an image file as an array, `[H, W, D]` uint8.

  The image is brought to the aspect ratio H:W and then scaled with Lanczos. It is rotated or mirrored as its EXIF
  orientation says. Transparent parts become black if the image has more than twice as much contrast on black as on
  white, as an image with white strokes has. Otherwise, transparent parts become white. Only the first frame of an
  animation is used.

  A grey image of 16 bits is reduced to 8 bits. The number of bits that its values really use is assumed to be 8, 10,
  12, 14 or 16: the smallest of these numbers that can hold all values of the image. Of an image of 16 bits with colours
  or an alpha channel, only the upper 8 bits are read. If its values have at most 14 bits, it cannot be read.

  Args:
    path: Path of a PNG, JPEG, BMP, GIF, WebP, TIFF, PNM, AVIF, JPEG 2000, ICO or TGA file, or of a HEIC file if the
      package pillow-heif is installed. Except for TGA, the format is found from the content, whatever the suffix is.
    size: Height and width (H, W) of the result, or one number for both.
    channels: Number of channels D, 3 for RGB or 1 for grey.
    fit: How the image is brought to the aspect ratio; see `Fit`.

  Raises:
    ValueError: if a size is not an integer of at least 1, if `channels` is neither 1 nor 3, or if `fit` is unknown.
    DatasetError: if the file cannot be decoded; the message says why.
  """
  image = _decode(as_path(path), check_form(size, channels, fit), channels, fit)
  if isinstance(image, str):
    raise DatasetError(f'{path} cannot be read as an image: {image}')
  return image


def read_all(
  paths: Sequence[pathlib.Path], size: int | tuple[int, int], channels: int, report: Report, fit: Fit = 'crop'
) -> Images:
  """Returns the images of many files as `Images`, with a list of the files that cannot be decoded.

  Each file is decoded as `read_image` does it. Several threads decode files at the same time.

  Args:
    paths: Paths of the files. The images have the same order.
    size: Height and width (H, W) of the images, or one number for both.
    channels: Number of channels D, 3 for RGB or 1 for grey.
    report: Function that is called with a line of text every few seconds. It is also called for each of the first 10
      files that are skipped, for each of the first 10 images whose pixels all have the same value, and at the end with
      the number of further such files and images.
    fit: How an image is brought to the aspect ratio of `size`; see `Fit`.

  Raises:
    ValueError: if a size is not an integer of at least 1, if `channels` is neither 1 nor 3, or if `fit` is unknown.
  """
  form = check_form(size, channels, fit)
  images = np.empty((len(paths), *form, channels), np.uint8)
  read: list[pathlib.Path] = []
  skipped: list[tuple[pathlib.Path, str]] = []
  uniform = 0
  pool = concurrent.futures.ThreadPoolExecutor(min(os.cpu_count() or 1, 16))  # Pillow decodes without holding the GIL.
  try:
    decoded = pool.map(functools.partial(_decode, form=form, channels=channels, fit=fit), paths)
    for path, image in with_progress(zip(paths, decoded, strict=True), len(paths), report):
      if isinstance(image, str):
        skipped.append((path, image))
        if len(skipped) <= REPORTED_ONE_BY_ONE:
          report(f'skipped {path}: {image}')
      else:
        images[len(read)] = image
        read.append(path)
        if (image == image[0, 0]).all():
          uniform += 1
          if uniform <= REPORTED_ONE_BY_ONE:
            report(f'{path} is uniform: all of its pixels have the value {", ".join(map(str, image[0, 0]))}')
  finally:
    pool.shutdown(cancel_futures=True)
  if len(skipped) > REPORTED_ONE_BY_ONE:
    report(f'skipped {len(skipped) - REPORTED_ONE_BY_ONE:,} more files')
  if uniform > REPORTED_ONE_BY_ONE:
    report(f'{uniform - REPORTED_ONE_BY_ONE:,} more images are uniform')
  return Images(tuple(read), images[: len(read)], tuple(skipped))


def list_files(directory: pathlib.Path) -> list[pathlib.Path]:
  """Returns the paths of the files in a directory and its sub-folders, sorted.

  Hidden files and folders are left out. Links are followed, except for a link to a folder that contains the link. No
  folder is read twice.

  Raises:
    DatasetError: if the directory is missing or is a file, or if the directory or one of its folders cannot be listed.
  """
  found, seen = [], set()
  waiting = [directory]
  while waiting:
    folder = waiting.pop()
    entries = list_directory(folder)
    if (place := os.path.realpath(folder)) not in seen:
      seen.add(place)
      found += [path for path in entries if not is_folder(path)]
      waiting += [path for path in reversed(entries) if is_folder(path)]
  return sorted(found)


def list_images(directory: pathlib.Path) -> list[pathlib.Path]:
  """Returns the paths of `list_files` for which `is_image` is true."""
  return [path for path in list_files(directory) if is_image(path)]


def is_image(path: pathlib.Path) -> bool:
  """Returns whether a file has the suffix of an image, or begins like an image of a known format."""
  if path.suffix.lower() in _SUFFIXES:
    return True
  try:
    if not stat.S_ISREG(path.stat().st_mode):
      return False
    with path.open('rb') as file:
      start = file.read(16)
  except (OSError, ValueError):
    return False
  signatures = [Image.OPEN[name][1] for name in _formats(path)]
  return len(start) == 16 and any(is_of(start) for is_of in signatures if is_of)


def list_directory(directory: pathlib.Path) -> list[pathlib.Path]:
  """Returns the paths in a directory, sorted, without hidden names and without the folder `__MACOSX` of macOS archives.

  Raises:
    DatasetError: if the directory is missing, is a file, or cannot be listed.
  """
  try:
    paths = sorted(directory.iterdir())
  except FileNotFoundError as e:
    raise DatasetError(f'the directory of images {directory} does not exist; give another directory') from e
  except NotADirectoryError as e:
    raise DatasetError(f'{directory} is a file and not a directory of images; give a directory') from e
  except (OSError, ValueError) as e:
    raise DatasetError(
      f'the directory of images {directory} cannot be listed ({first_line(e)}); make the directory readable'
    ) from e
  return [path for path in paths if not path.name.startswith('.') and path.name != '__MACOSX']


def is_folder(path: pathlib.Path) -> bool:
  """Returns whether a path is a directory, or a link to a directory that does not contain the link."""
  if not os.path.isdir(path):  # noqa: PTH112 (pathlib's is_dir raises if a parent directory may not be entered.)
    return False
  return not (path.is_symlink() and pathlib.Path(os.path.realpath(path.parent)).is_relative_to(os.path.realpath(path)))


def check_form(size: int | tuple[int, int], channels: int, fit: Fit = 'crop') -> tuple[int, int]:
  """Returns `size` as a pair (H, W).

  Raises:
    ValueError: unless H and W are integers of 1 or more, `channels` is 1 or 3, and `fit` is a `Fit`.
  """
  check_choice('fit', fit, Fit)
  sides = tuple(size) if isinstance(size, tuple | list) else (size, size)
  if len(sides) != 2 or not all(isinstance(side, int) and side >= 1 for side in sides):
    raise ValueError(f'`size` must be an integer of 1 or more, or a pair (height, width) of these, got {size!r}')
  if channels not in (1, 3):
    raise ValueError(f'channels must be 3 (RGB) or 1 (grey), got {channels!r}')
  return sides


def _decode(path: PathLike, form: tuple[int, int], channels: int, fit: Fit) -> np.ndarray | str:
  """Returns the image, `[H, W, D]` uint8. If the file cannot be decoded, returns a text that says why."""
  try:
    status = pathlib.Path(path).stat()
    if not stat.S_ISREG(status.st_mode):  # Opening a pipe would wait forever.
      return 'it is not a regular file'
    if status.st_size == 0:
      return 'the file is empty'
    with _Timed(path) as file, Image.open(file, formats=_formats(path)) as opened, _turn(opened):
      file.restart()  # The time limit does not include the time that this file waited in `_turn`.
      return resized(in_mode(opened, 'L' if channels == 1 else 'RGB'), form, fit)
  except (Image.DecompressionBombError, Image.DecompressionBombWarning):
    return f'it has more pixels than Pillow considers safe ({Image.MAX_IMAGE_PIXELS:,})'
  except UnidentifiedImageError:
    if pathlib.Path(path).suffix.lower() in ('.heic', '.heif') and not _heif():
      return 'it is HEIC, which needs pillow-heif; run pip install pillow-heif'
    return 'it is not an image of a known format'
  except OSError as e:
    return e.strerror or first_line(e)
  except Exception as e:  # Decoders raise many kinds of errors for broken files.
    return f'it is broken ({first_line(e)})'


def _formats(path: PathLike) -> tuple[str, ...]:
  """Returns the formats that are tried for a file. TGA, which has no signature, is tried only for the suffix .tga."""
  Image.init()
  by_suffix = ('TGA',) if pathlib.Path(path).suffix.lower() == '.tga' else ()
  return tuple(name for name in (*_FORMATS, *_heif(), *by_suffix) if name in Image.OPEN)


@functools.cache
def _heif() -> tuple[str, ...]:
  try:
    import pillow_heif
  except ImportError:
    return ()
  pillow_heif.register_heif_opener()
  return ('HEIF',)


class _Timed(io.BufferedReader):
  """A file whose reads raise OSError after a time limit, so that a decoder that takes too long is stopped."""

  def __init__(self, path: PathLike):
    super().__init__(io.FileIO(path))
    self.restart()

  def restart(self) -> None:
    self._until = time.monotonic() + SECONDS_OF_A_FILE

  def read(self, size: int | None = -1) -> bytes:
    if time.monotonic() > self._until:
      raise OSError(f'it takes more than {SECONDS_OF_A_FILE:g} s to decode')
    return super().read(size)


def _turn(image: Image.Image) -> contextlib.AbstractContextManager[Any]:
  """Checks the size of an image, and returns the context manager in which the image must be decoded.

  To limit the memory that images take together, at most two large images are decoded at the same time. The context
  manager of another large image waits on entry. The tiles of a TIFF file are checked too, because a tile is decoded as
  a whole even if it is larger than the image. Strips need no check: Pillow and libtiff decode no more rows than the
  image has, even if the file says that a strip has more rows.

  Raises:
    DecompressionBombError: if the image has more pixels than Pillow considers safe.
    OSError: if the image is stored in tiles that are much larger than the image.
  """
  pixels = image.width * image.height
  if _are_too_many(pixels):
    raise Image.DecompressionBombError
  tags = getattr(image, 'tag_v2', {})
  width, height = (int(np.max(tags.get(tag, 0))) for tag in (_TILE_WIDTH, _TILE_HEIGHT))  # A tag may have many values.
  tile = width * max(height, 1)
  if tile > max(4 * pixels, _SMALL_TILE):
    raise OSError(f'its tiles have {tile:,} pixels each, but the image has only {pixels:,}; save it without tiles')
  return _large_ones if max(pixels, tile) > _LARGE else contextlib.nullcontext()


def _are_too_many(pixels: int) -> bool:
  return Image.MAX_IMAGE_PIXELS is not None and pixels > Image.MAX_IMAGE_PIXELS


def resized(image: Image.Image, form: tuple[int, int], fit: Fit) -> np.ndarray:
  """Returns an image in the size (H, W) as an array, `[H, W, D]` uint8."""
  height, width = form
  shaped = _crop(image, height, width) if fit == 'crop' else _pad(image, height, width)
  return np.array(shaped.resize((width, height), Image.Resampling.LANCZOS)).reshape(height, width, -1)


def _crop(image: Image.Image, height: int, width: int) -> Image.Image:
  """Returns the largest centred part of the image that has the aspect ratio height:width, to the nearest pixel."""
  scale = min(image.height / height, image.width / width)
  kept_height, kept_width = max(1, round(height * scale)), max(1, round(width * scale))
  top, left = (image.height - kept_height) // 2, (image.width - kept_width) // 2
  return image.crop((left, top, left + kept_width, top + kept_height))


def _pad(image: Image.Image, height: int, width: int) -> Image.Image:
  """Returns the image centred on the smallest background that contains it and has the aspect ratio height:width."""
  scale = max(image.height / height, image.width / width)
  full = (max(image.width, round(width * scale)), max(image.height, round(height * scale)))
  if _are_too_many(full[0] * full[1]):
    raise OSError(
      f"it is too thin, {image.width}x{image.height}, to be padded to the aspect ratio {height}:{width}; use fit='crop'"
    )
  pixels = np.asarray(image).reshape(image.height, image.width, -1)
  border = np.concatenate([pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]])
  colour = tuple(int(v) for v in np.median(border, 0))
  ground = Image.new(image.mode, full, colour if len(colour) > 1 else colour[0])
  ground.paste(image, ((full[0] - image.width) // 2, (full[1] - image.height) // 2))
  return ground
