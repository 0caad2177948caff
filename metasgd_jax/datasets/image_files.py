"""Image files found and decoded to uint8 arrays of one size; what cannot be decoded is left out and named.

Files are not trusted: only plain formats are opened, images of too many pixels are refused before they are decoded,
and a folder that is linked into itself is read once.
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
from typing import Literal, NamedTuple, get_args

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from metasgd_jax.datasets.messages import DatasetError, Report, first_line, printing

SUFFIXES = ('.png', '.jpg', '.jpeg', '.bmp', '.gif', '.webp', '.tif', '.tiff', '.ppm', '.pgm')
SECONDS_BETWEEN_REPORTS = 5.0
REPORTED_ONE_BY_ONE = 10
SECONDS_OF_A_FILE = 60.0
"""A file that takes longer to decode is skipped: some are made so that they take hours."""

Fit = Literal['crop', 'pad']
"""What becomes of an image of another shape: cut to its middle, or laid on a ground of its border's median colour."""

_LARGE = 1 << 24
_large_ones = threading.BoundedSemaphore(2)
"""Of more pixels than _LARGE, so many are decoded at once; the largest allowed takes 1.5 GB."""

_TILE_WIDTH, _TILE_HEIGHT = 322, 323
"""Tags of TIFF files."""
_TILE_TO_IMAGE = 4
_SMALL_TILE = 1 << 20
"""A tile of a TIFF file has at most _TILE_TO_IMAGE times the image's pixels, or these few."""

_FORMATS = ('PNG', 'JPEG', 'BMP', 'GIF', 'WEBP', 'TIFF', 'PPM')


class Images(NamedTuple):
  """Images without labels.

  Attributes:
    paths: M files, in the order of the images.
    images: `[M, H, W, D]` uint8.
    skipped: files that could not be decoded, each with the reason.
  """

  paths: tuple[pathlib.Path, ...]
  images: np.ndarray
  skipped: tuple[tuple[pathlib.Path, str], ...]


def read_image(
  path: str | os.PathLike[str], size: int | tuple[int, int], channels: int, fit: Fit = 'crop'
) -> np.ndarray:
  """Returns an image file as `[H, W, D]` uint8, brought to the shape H:W and then scaled with Lanczos.

  It is turned as its EXIF orientation says; what is transparent shows white; of an animation the first frame is
  taken, and of 16 bits the upper eight.

  Args:
    path: a PNG, JPEG, BMP, GIF, WebP, TIFF, PPM or PGM file.
    size: H = W, or (H, W).
    channels: D, 3 for RGB or 1 for grey.
    fit: how it is brought to the shape; see `Fit`.

  Raises:
    ValueError: a size below 1, channels other than 1 and 3, or an unknown fit.
    DatasetError: the file cannot be decoded; the message says why.
  """
  image = _decode(path, check_form(size, channels, fit), channels, fit)
  if isinstance(image, str):
    raise DatasetError(f'{path} cannot be read as an image: {image}')
  return image


def read_all(
  paths: Sequence[pathlib.Path], size: int | tuple[int, int], channels: int, report: Report, fit: Fit = 'crop'
) -> Images:
  """Decodes many files in threads; see `read_image`.

  Args:
    paths: in the order that the images are wanted in.
    size: H = W, or (H, W).
    channels: D.
    report: called with a line every few seconds, for each of the first files that are skipped, and with the number
      of the rest.
    fit: see `Fit`.

  Raises:
    ValueError: a size below 1, channels other than 1 and 3, or an unknown fit.
  """
  form, report = check_form(size, channels, fit), printing(report)
  images = np.empty((len(paths), *form, channels), np.uint8)
  read: list[pathlib.Path] = []
  skipped: list[tuple[pathlib.Path, str]] = []
  reported = time.monotonic()
  pool = concurrent.futures.ThreadPoolExecutor(min(os.cpu_count() or 1, 16))  # Pillow decodes without the GIL.
  try:
    decoded = pool.map(functools.partial(_decode, form=form, channels=channels, fit=fit), paths)
    for i, (path, image) in enumerate(zip(paths, decoded, strict=True)):
      if isinstance(image, str):
        skipped.append((path, image))
        if len(skipped) <= REPORTED_ONE_BY_ONE:
          report(f'skipped {path}: {image}')
      else:
        images[len(read)] = image
        read.append(path)
      if time.monotonic() - reported >= SECONDS_BETWEEN_REPORTS:
        report(f'read {i + 1:,} of {len(paths):,} images')
        reported = time.monotonic()
  finally:
    pool.shutdown(cancel_futures=True)
  if len(skipped) > REPORTED_ONE_BY_ONE:
    report(f'skipped {len(skipped) - REPORTED_ONE_BY_ONE:,} more files')
  return Images(tuple(read), images[: len(read)], tuple(skipped))


def list_images(directory: pathlib.Path) -> list[pathlib.Path]:
  """Returns the image files in a directory and its sub-folders, sorted; hidden files and folders are left out.

  Links are followed, but not back to where they are, and no folder is entered twice.

  Raises:
    DatasetError: the directory is missing or is a file, or it or a folder in it cannot be listed.
  """
  found, seen = [], set()
  waiting = [directory]
  while waiting:
    folder = waiting.pop()
    entries = list_directory(folder)
    try:
      status = folder.stat()
    except OSError as e:
      raise DatasetError(f'the directory of images {folder} cannot be listed ({first_line(e)})') from e
    if (status.st_dev, status.st_ino) in seen:
      continue
    seen.add((status.st_dev, status.st_ino))
    found += [path for path in entries if path.suffix.lower() in SUFFIXES and not is_folder(path)]
    waiting += [path for path in reversed(entries) if is_folder(path)]
  return sorted(found)


def list_directory(directory: pathlib.Path) -> list[pathlib.Path]:
  """Returns what is in a directory, sorted, without hidden names and archivers' leftovers.

  Raises:
    DatasetError: it is missing, is a file, or cannot be listed.
  """
  try:
    paths = sorted(directory.iterdir())
  except FileNotFoundError as e:
    raise DatasetError(f'the directory of images {directory} does not exist') from e
  except NotADirectoryError as e:
    raise DatasetError(f'{directory} is a file where a directory of images should be; give the directory') from e
  except (OSError, ValueError) as e:
    raise DatasetError(f'the directory of images {directory} cannot be listed ({first_line(e)})') from e
  return [path for path in paths if not path.name.startswith('.') and path.name != '__MACOSX']


def is_folder(path: pathlib.Path) -> bool:
  """Says whether a path is a directory or a link to one; a link to a directory that the link itself is in is none."""
  if not os.path.isdir(path):  # noqa: PTH112 (pathlib's raises where a directory above may not be entered.)
    return False
  return not (path.is_symlink() and pathlib.Path(os.path.realpath(path.parent)).is_relative_to(os.path.realpath(path)))


def check_form(size: int | tuple[int, int], channels: int, fit: Fit = 'crop') -> tuple[int, int]:
  """Returns (H, W); raises ValueError unless they are 1 or more, channels is 1 or 3, and fit is a `Fit`."""
  if fit not in get_args(Fit):
    raise ValueError(f'fit must be one of {get_args(Fit)}, got {fit!r}')
  sides = tuple(size) if isinstance(size, tuple | list) else (size, size)
  if len(sides) != 2 or not all(isinstance(side, int) and side >= 1 for side in sides):
    raise ValueError(f'size must be an integer of 1 or more, or two (height, width), got {size!r}')
  if channels not in (1, 3):
    raise ValueError(f'channels must be 3 (RGB) or 1 (grey), got {channels!r}')
  return sides


def _decode(path: str | os.PathLike[str], form: tuple[int, int], channels: int, fit: Fit) -> np.ndarray | str:
  """Returns the image, or why there is none."""
  height, width = form
  try:
    status = pathlib.Path(path).stat()
    if not stat.S_ISREG(status.st_mode):  # Opening a pipe would wait for ever.
      return 'it is not a file'
    if status.st_size == 0:
      return 'the file is empty'
    with _Timed(path) as file, Image.open(file, formats=_FORMATS) as opened:
      pixels = opened.width * opened.height
      if _is_too_large(pixels):
        return _too_large()
      tile = _tile(opened)
      if tile > max(_TILE_TO_IMAGE * pixels, _SMALL_TILE):
        return f'it is kept in tiles of {tile:,} pixels, and has {pixels:,}'
      with _large_ones if max(pixels, tile) > _LARGE else contextlib.nullcontext():
        file.restart()  # Waiting for others does not count.
        opened.load()
        image = _eight_bit(_upright(opened))
        if image.has_transparency_data:
          image = image.convert('RGBA')
          image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
        image = image.convert('RGB')
        if channels == 1:
          image = image.convert('L')
        shaped = _crop if fit == 'crop' else _pad
        image = shaped(image, height, width).resize((width, height), Image.Resampling.LANCZOS)
        return np.array(image).reshape(height, width, channels)
  except (Image.DecompressionBombError, Image.DecompressionBombWarning):
    return _too_large()
  except UnidentifiedImageError:
    return 'it is not an image of a known format'
  except OSError as e:
    return e.strerror or first_line(e)
  except Exception as e:  # Decoders raise anything at broken files.
    return f'it is broken ({first_line(e)})'


class _Timed(io.BufferedReader):
  """A file that can be read for some time only; decoders come back for more all the while."""

  def __init__(self, path: str | os.PathLike[str]):
    super().__init__(io.FileIO(path))
    self.restart()

  def restart(self) -> None:
    self._until = time.monotonic() + SECONDS_OF_A_FILE

  def read(self, size: int | None = -1) -> bytes:
    if time.monotonic() > self._until:
      raise OSError(f'it takes more than {SECONDS_OF_A_FILE:g} s to decode')
    return super().read(size)


def _tile(image: Image.Image) -> int:
  """Returns the pixels of a tile of a TIFF file, which is decoded whole; 0 of a file without tiles.

  Of strips, Pillow and libtiff decode no more rows than the image has, whatever their tag says.
  """
  tags = getattr(image, 'tag_v2', {})
  number = lambda tag: max(map(int, np.ravel(tags.get(tag, 0))), default=0)  # It may come as several.
  return number(_TILE_WIDTH) * max(number(_TILE_HEIGHT), 1)


def _is_too_large(pixels: int) -> bool:
  return Image.MAX_IMAGE_PIXELS is not None and pixels > Image.MAX_IMAGE_PIXELS


def _too_large() -> str:
  return f'it has more pixels than Pillow takes to be safe ({Image.MAX_IMAGE_PIXELS:,})'


def _upright(image: Image.Image) -> Image.Image:
  try:
    return ImageOps.exif_transpose(image)
  except Exception:  # What is wrong with the EXIF part need not be wrong with the image.
    return image


def _crop(image: Image.Image, height: int, width: int) -> Image.Image:
  """Returns the largest part about the centre that has the shape height:width, to the nearest pixel."""
  scale = min(image.height / height, image.width / width)
  kept_height, kept_width = max(1, round(height * scale)), max(1, round(width * scale))
  top, left = (image.height - kept_height) // 2, (image.width - kept_width) // 2
  return image.crop((left, top, left + kept_width, top + kept_height))


def _pad(image: Image.Image, height: int, width: int) -> Image.Image:
  """Returns the image in the middle of the smallest ground of the shape height:width that it lies on."""
  scale = max(image.height / height, image.width / width)
  full = (max(image.width, round(width * scale)), max(image.height, round(height * scale)))
  if _is_too_large(full[0] * full[1]):
    raise OSError(f'it is too thin, {image.width}x{image.height}, to be laid on a ground of the shape {height}:{width}')
  pixels = np.asarray(image).reshape(image.height, image.width, -1)
  border = np.concatenate([pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]])
  colour = tuple(int(v) for v in np.median(border, 0))
  ground = Image.new(image.mode, full, colour if len(colour) > 1 else colour[0])
  ground.paste(image, ((full[0] - image.width) // 2, (full[1] - image.height) // 2))
  return ground


def _eight_bit(image: Image.Image) -> Image.Image:
  """Returns 16-bit grey as 8-bit, and other modes as they are."""
  if not image.mode.startswith(('I', 'F')):
    return image
  values = np.asarray(image)
  if image.mode == 'F' or values.min() < 0 or values.max() > 0xFFFF:
    raise ValueError(f'pixels of mode {image.mode} have no known range')
  return Image.fromarray((values.astype(np.uint32) >> 8).astype(np.uint8))
