"""Converts an opened image to an upright image with eight bits per channel and without transparency."""

import re

import numpy as np
from PIL import Image, ImageOps

_DEPTHS = (8, 10, 12, 14, 16)
"""Numbers of bits that the values of a 16-bit image may really use. Cameras and microscopes often use 10, 12 or 14."""

_SIXTEEN_BITS = re.compile(r'\b(RGB[AXa]?|LA|CMYK);16')
"""Pillow's names of the 16-bit formats of which it keeps the upper eight bits alone."""


def in_mode(opened: Image.Image, mode: str) -> Image.Image:
  """Decodes an image, turns it upright, fills its transparent parts, and converts it to the mode 'L' or 'RGB'.

  Raises:
    ValueError: if the range of the image's pixel values is unknown, or if an image of 16 bits with colours or an alpha
      channel seems to use fewer bits.
  """
  only_upper_bits = _SIXTEEN_BITS.search(str(getattr(opened, 'tile', '')))
  opened.load()
  try:
    image = ImageOps.exif_transpose(opened)
  except Exception:  # The image may be intact although its EXIF data is broken.
    image = opened
  if only_upper_bits:
    _check_upper_bits(image)
    if isinstance(key := image.info.get('transparency'), tuple):  # The transparent colour is given with 16 bits.
      image.info['transparency'] = tuple(value >> 8 for value in key)
  image = _eight_bit(image)
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


def _check_upper_bits(image: Image.Image) -> None:
  """Raises ValueError if the upper eight bits of 16-bit values show that the values use at most 14 bits.

  Such an image would be too dark, and its lower bits are lost. The colours of transparent pixels are not considered. A
  drawing in one dark colour on a transparent ground passes.
  """
  values = np.asarray(image)
  alpha = np.full(values.shape[:2], 255, np.uint8)
  if image.mode in ('RGBA', 'LA'):
    values, alpha = values[..., :-1], values[..., -1]
  colours = values[alpha > 0]
  is_drawing = np.ptp(alpha) and alpha.max() >= 64 and (colours == colours[:1]).all()
  if not is_drawing and colours.max(initial=0) < 64:
    raise ValueError(
      'all of its 16-bit values are below 16,384, so that little of it would be left with 8 bits; multiply the values '
      'until they use 16 bits, or save the image with 8 bits'
    )


def _filled(image: Image.Image) -> Image.Image:
  """Returns an RGBA image on a white background, or on a black one if that more than doubles the contrast."""
  on_white, on_black = (
    Image.alpha_composite(Image.new('RGBA', image.size, ground), image) for ground in ('white', 'black')
  )
  return on_black if 2 * _contrast(on_white) < _contrast(on_black) else on_white


def _contrast(image: Image.Image) -> int:
  return int(np.ptp(np.asarray(image.convert('RGB').convert('L')).astype(int)))
