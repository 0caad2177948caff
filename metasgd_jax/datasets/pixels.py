"""Converts an opened image to an upright image with eight bits per channel and without transparency."""

import numpy as np
from PIL import Image, ImageOps

_DEPTHS = (8, 10, 12, 14, 16)
"""Numbers of bits that the values of a 16-bit image may really use. Cameras and microscopes often use 10, 12 or 14."""


def in_mode(opened: Image.Image, mode: str) -> Image.Image:
  """Decodes an image, turns it upright, fills its transparent parts, and converts it to the mode 'L' or 'RGB'.

  Raises:
    ValueError: if the range of the image's pixel values is unknown, or if it is a colour image of 16 bits whose values
      are so small that it would be almost black with eight bits.
  """
  colour_of_16_bits = 'RGB;16' in str(getattr(opened, 'tile', ''))  # Pillow keeps only the upper eight bits.
  opened.load()
  try:
    image = ImageOps.exif_transpose(opened)
  except Exception:  # The image may be intact although its EXIF data is broken.
    image = opened
  image = _eight_bit(image)
  if colour_of_16_bits and 0 < np.asarray(image).max() < 16:
    raise ValueError(
      'the values of its 16-bit colours are so small that it would be almost black; scale them up, and save the image '
      'with 8 bits'
    )
  if image.has_transparency_data:
    image = _filled(image.convert('RGBA'))
  return image.convert('RGB').convert(mode)


def _eight_bit(image: Image.Image) -> Image.Image:
  """Returns a 16-bit grey image as an 8-bit image, and an image of another mode unchanged.

  The values of the image are assumed to use the smallest number of bits in `_DEPTHS` that can hold all of them. If the
  file declares one grey value as transparent, the result has an alpha channel in which the pixels of this value are
  transparent.
  """
  if not image.mode.startswith(('I', 'F')):
    return image
  values = np.asarray(image)
  if image.mode == 'F' or values.min() < 0 or values.max() > 0xFFFF:
    raise ValueError(f'the range of its pixel values is unknown (mode {image.mode}); save the image with 8 bits')
  bits = next(bits for bits in _DEPTHS if values.max() < 1 << bits)
  grey = Image.fromarray((values.astype(np.uint32) >> (bits - 8)).astype(np.uint8))
  if 'transparency' in image.info:
    opaque = values != image.info['transparency']
    grey.putalpha(Image.fromarray(np.where(opaque, 255, 0).astype(np.uint8)))
  return grey


def _filled(image: Image.Image) -> Image.Image:
  """Returns an RGBA image on a white background, or on a black one if that more than doubles the contrast."""
  on_white, on_black = (
    Image.alpha_composite(Image.new('RGBA', image.size, ground), image) for ground in ('white', 'black')
  )
  return on_black if 2 * _contrast(on_white) < _contrast(on_black) else on_white


def _contrast(image: Image.Image) -> int:
  return int(np.ptp(np.asarray(image.convert('RGB').convert('L')).astype(int)))
