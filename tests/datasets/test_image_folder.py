"""Folders of images: what is decoded, how, and what is said of what cannot be."""

import os
import pathlib
import re
import struct
import zlib

import numpy as np
import pillow_heif
import pytest
from PIL import Image
from problems import saying

from metasgd_jax.datasets import DatasetError, image_folder, messages
from metasgd_jax.datasets.image_folder import read_image

RED, BLUE, GREY = (200, 0, 0), (0, 0, 200), (90, 90, 90)


def save(path, colour=RED, size=(8, 8), **options):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.new('RGB', size, colour).save(path, **options)
  return path


def noise(seed, shape=(64, 64, 3)):
  return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def chunk(kind, data):
  return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))


def png_of_sixteen_bits(path, values, *more):
  height, width, channels = values.shape
  header = struct.pack('>IIBBBBB', width, height, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
  rows = b''.join(b'\0' + row.astype('>u2').tobytes() for row in values)
  parts = [chunk(b'IHDR', header), *more, chunk(b'IDAT', zlib.compress(rows)), chunk(b'IEND', b'')]
  path.write_bytes(b'\x89PNG\r\n\x1a\n' + b''.join(parts))


def tiff_of_sixteen_bits(path, values, alpha):
  """An RGBA file. If `alpha` is 1, its colours are multiplied by its alpha channel, and if it is 2, they are not."""
  height, width, _ = values.shape
  entries = [(256, 3, 1, width), (257, 3, 1, height), (258, 3, 4, 8), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 1, 144)]
  entries += [(277, 3, 1, 4), (278, 3, 1, height), (279, 4, 1, values.size * 2), (338, 3, 1, alpha)]
  table = b''.join(struct.pack('<HHII', *entry) for entry in entries)
  start = b'II*\0' + struct.pack('<I4H', 16, 16, 16, 16, 16) + struct.pack('<H', len(entries)) + table + bytes(6)
  path.write_bytes(start + values.astype('<u2').tobytes())


def png_that_claims(width, height):
  header = struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
  data = chunk(b'IDAT', zlib.compress(bytes(1000)))
  return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + data + chunk(b'IEND', b'')


class TestReadImage:
  def test_pixels_as_they_are_at_their_own_size(self, tmp_path):
    pixels = noise(0)
    Image.fromarray(pixels).save(tmp_path / 'a.png')
    assert np.array_equal(read_image(tmp_path / 'a.png', 64, 3), pixels)

  def test_centre_is_cropped_to_the_shape_and_scaled_with_lanczos(self, tmp_path):
    pixels = noise(1, (40, 100, 3))
    Image.fromarray(pixels).save(tmp_path / 'a.png')
    square = Image.fromarray(pixels[:, 30:70])
    assert np.array_equal(read_image(tmp_path / 'a.png', 10, 3), square.resize((10, 10), Image.Resampling.LANCZOS))
    flat = Image.fromarray(pixels[10:30])
    assert np.array_equal(read_image(tmp_path / 'a.png', (4, 20), 3), flat.resize((20, 4), Image.Resampling.LANCZOS))

  def test_a_drawing_is_laid_on_its_own_ground_where_asked(self, tmp_path):
    pixels = np.full((40, 100, 3), 230, np.uint8)
    pixels[10:30, 2:98] = RED
    Image.fromarray(pixels).save(tmp_path / 'a.png')
    ground = np.full((100, 100, 3), 230, np.uint8)
    ground[30:70] = pixels
    whole = Image.fromarray(ground).resize((20, 20), Image.Resampling.LANCZOS)
    assert np.array_equal(read_image(tmp_path / 'a.png', 20, 3, 'pad'), whole)
    grey = Image.fromarray(ground).convert('L').resize((20, 20), Image.Resampling.LANCZOS)
    assert np.array_equal(read_image(tmp_path / 'a.png', 20, 1, 'pad')[..., 0], grey)
    assert np.array_equal(read_image(tmp_path / 'a.png', (4, 10), 3, 'pad'), read_image(tmp_path / 'a.png', (4, 10), 3))

  def test_an_unknown_fit(self, tmp_path):
    with pytest.raises(ValueError, match=saying('fit', "('crop', 'pad')", "got 'stretch'")):
      read_image(save(tmp_path / 'a.png'), 8, 3, 'stretch')

  @pytest.mark.parametrize('fit', ['crop', 'pad'])
  @pytest.mark.parametrize('shape', [(1, 1), (1, 90), (90, 1), (7, 3)])
  def test_small_and_narrow_images(self, tmp_path, shape, fit):
    save(tmp_path / 'a.png', size=shape)
    assert (read_image(tmp_path / 'a.png', (9, 5), 3, fit) == RED).all()

  @pytest.mark.parametrize('channels', [1, 3])
  def test_grey_and_colour(self, tmp_path, channels):
    grey = noise(2, (8, 8))
    Image.fromarray(grey).save(tmp_path / 'grey.png')
    assert np.array_equal(read_image(tmp_path / 'grey.png', 8, channels), np.repeat(grey[:, :, None], channels, 2))
    save(tmp_path / 'red.png')
    red = read_image(tmp_path / 'red.png', 8, channels)
    assert red.shape == (8, 8, channels)
    assert red[3, 3].tolist() == ([60] if channels == 1 else list(RED))  # 0.299 of 200.

  def test_a_palette(self, tmp_path):
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:4], pixels[4:] = RED, BLUE
    Image.fromarray(pixels).convert('P', palette=Image.Palette.ADAPTIVE).save(tmp_path / 'a.png')
    with Image.open(tmp_path / 'a.png') as image:
      assert image.mode == 'P'
    assert np.array_equal(read_image(tmp_path / 'a.png', 8, 3), pixels)

  def test_what_is_transparent_shows_white(self, tmp_path):
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[:, 4:] = (*BLUE, 255)
    pixels[0, 0] = (0, 0, 0, 102)
    Image.fromarray(pixels).save(tmp_path / 'a.png')
    image = read_image(tmp_path / 'a.png', 8, 3)
    assert image[0, 0].tolist() == [153, 153, 153]
    assert image[1, 1].tolist() == [255, 255, 255]
    assert image[1, 5].tolist() == list(BLUE)

  def test_a_palette_with_a_transparent_colour(self, tmp_path):
    image = Image.new('P', (8, 8), 1)
    image.putpalette([0, 0, 0, *RED])
    image.putpixel((2, 3), 0)
    image.save(tmp_path / 'a.png', transparency=0)
    read = read_image(tmp_path / 'a.png', 8, 3)
    assert read[3, 2].tolist() == [255, 255, 255]
    assert read[0, 0].tolist() == list(RED)

  @pytest.mark.parametrize('suffix', ['png', 'pgm', 'tif'])
  def test_sixteen_bits(self, tmp_path, suffix):
    values = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1024 + 255
    Image.fromarray(values).save(tmp_path / f'a.{suffix}')
    assert np.array_equal(read_image(tmp_path / f'a.{suffix}', 8, 1)[:, :, 0], values >> 8)

  @pytest.mark.parametrize('bits', [8, 10, 12, 14, 16])
  def test_fewer_bits_in_sixteen(self, tmp_path, bits):
    values = np.arange(64, dtype=np.uint16).reshape(8, 8) << (bits - 6)
    Image.fromarray(values).save(tmp_path / 'a.png')
    assert np.array_equal(read_image(tmp_path / 'a.png', 8, 1)[:, :, 0], values >> (bits - 8))

  def test_a_transparent_value_of_sixteen_bits(self, tmp_path):
    values = np.arange(64, dtype=np.uint16).reshape(8, 8) << 10
    Image.fromarray(values).save(tmp_path / 'a.png', transparency=int(values[1, 1]))
    expected = np.where(values == values[1, 1], 255, values >> 8)
    assert np.array_equal(read_image(tmp_path / 'a.png', 8, 1)[:, :, 0], expected)

  @pytest.mark.parametrize('mode', ['RGB', 'RGBA', 'LA'])
  def test_colours_of_sixteen_bits(self, tmp_path, mode):
    values = np.arange(8 * 8 * len(mode)).reshape(8, 8, len(mode)) % 64 * 1024
    if mode != 'RGB':
      values[..., -1] = 0xFFFF
    png_of_sixteen_bits(tmp_path / 'a.png', values)
    expected = values[..., :3] if mode != 'LA' else values[..., [0, 0, 0]]
    assert np.array_equal(read_image(tmp_path / 'a.png', 8, 3), expected >> 8)
    for bits in (8, 10, 12, 14):
      few = values >> (16 - bits)
      if mode != 'RGB':
        few[..., -1] = 0xFFFF
      png_of_sixteen_bits(tmp_path / f'{bits}.png', few)
      with pytest.raises(DatasetError, match=saying('below 16,384', 'multiply the values')):
        read_image(tmp_path / f'{bits}.png', 8, 3)

  @pytest.mark.parametrize('alpha', [1, 2])
  def test_tiff_files_of_sixteen_bits(self, tmp_path, alpha):
    values = np.arange(8 * 8 * 4).reshape(8, 8, 4) * 256
    values[..., 3] = 0xFFFF
    tiff_of_sixteen_bits(tmp_path / 'a.tiff', values, alpha)
    assert np.array_equal(read_image(tmp_path / 'a.tiff', 8, 3), values[..., :3] >> 8)
    values[..., :3] >>= 2
    tiff_of_sixteen_bits(tmp_path / 'b.tiff', values, alpha)
    with pytest.raises(DatasetError, match=saying('below 16,384', 'multiply the values')):
      read_image(tmp_path / 'b.tiff', 8, 3)

  @pytest.mark.parametrize('ink', [0, 0x2020])
  def test_dark_ink_of_sixteen_bits_on_transparency(self, tmp_path, ink):
    values = np.full((8, 8, 4), ink)
    values[..., 3] = np.where(np.eye(8), 0xFFFF, 0)
    png_of_sixteen_bits(tmp_path / 'a.png', values)
    assert np.array_equal(read_image(tmp_path / 'a.png', 8, 1)[:, :, 0], np.where(np.eye(8), ink >> 8, 255))

  def test_a_transparent_colour_of_sixteen_bits(self, tmp_path):
    values = (np.arange(64).reshape(8, 8, 1) * 1024 + 7).repeat(3, 2)
    png_of_sixteen_bits(tmp_path / 'a.png', values, chunk(b'tRNS', values[1, 1].astype('>u2').tobytes()))
    expected = np.where(values == values[1, 1], 255, values >> 8)
    assert np.array_equal(read_image(tmp_path / 'a.png', 8, 3), expected)

  @pytest.mark.parametrize('light', [255, 240])
  def test_light_strokes_on_transparency_stay_visible(self, tmp_path, light):
    pixels = np.full((8, 8, 4), (light, light, light, 0), np.uint8)
    pixels[2, 1:7, 3] = 255
    Image.fromarray(pixels).save(tmp_path / 'a.png')
    expected = np.where(pixels[..., 3] > 0, light, 0)
    assert np.array_equal(read_image(tmp_path / 'a.png', 8, 1)[:, :, 0], expected)

  @pytest.mark.parametrize('orientation', range(1, 9))
  def test_turned_as_exif_says(self, tmp_path, orientation):
    upright = np.zeros((8, 8, 3), np.uint8)
    upright[:4, :4], upright[:4, 4:], upright[4:, :4] = RED, BLUE, GREY
    stored = {
      1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.transpose(1, 0, 2),
      6: np.rot90(upright), 7: upright[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90(upright, 3),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / 'a.png', exif=exif)
    assert np.array_equal(read_image(tmp_path / 'a.png', 8, 3), upright)

  def test_sixteen_bits_turned(self, tmp_path):
    values = np.arange(16, dtype=np.uint16).reshape(4, 4) << 12
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(values).save(tmp_path / 'a.png', exif=exif)
    assert np.array_equal(read_image(tmp_path / 'a.png', 4, 1)[:, :, 0], values[::-1, ::-1] >> 8)

  def test_exif_that_is_rubbish_is_passed_over(self, tmp_path):
    save(tmp_path / 'a.png', exif=b'Exif\0\0rubbish')
    assert read_image(tmp_path / 'a.png', 8, 3)[0, 0].tolist() == list(RED)

  def test_the_first_frame_of_an_animation(self, tmp_path):
    frames = [Image.new('RGB', (8, 8), colour) for colour in (RED, BLUE)]
    for suffix in ('gif', 'webp', 'png', 'tif'):
      frames[0].save(tmp_path / f'a.{suffix}', save_all=True, append_images=frames[1:], lossless=True)
      assert read_image(tmp_path / f'a.{suffix}', 8, 3)[0, 0].tolist() == list(RED), suffix

  def test_ink_of_print(self, tmp_path):
    Image.new('CMYK', (8, 8), (0, 0, 0, 255)).save(tmp_path / 'a.jpg')
    assert read_image(tmp_path / 'a.jpg', 8, 3).max() < 10

  @pytest.mark.parametrize('size', [0, -3, (3,), (0, 3), (2.5, 2), 2.5])
  def test_sizes_that_cannot_be(self, tmp_path, size):
    with pytest.raises(ValueError, match=saying('size', 'integer of 1 or more', 'pair', f'got {size}')):
      read_image(save(tmp_path / 'a.png'), size, 3)

  def test_channels_that_cannot_be(self, tmp_path):
    with pytest.raises(ValueError, match=saying('channels', '3 (RGB)', '1 (grey)', 'got 4')):
      read_image(save(tmp_path / 'a.png'), 8, 4)


def broken_files(directory):
  """Makes files that cannot be decoded; returns their names with what should be said."""
  whole = directory.parents[1] / 'whole'
  whole.mkdir()
  Image.fromarray(noise(3)).save(whole / 'a.png')
  Image.fromarray(noise(3)).save(whole / 'a.jpg')
  Image.new('F', (4, 4)).save(whole / 'a.tif')
  png, jpeg = (whole / 'a.png').read_bytes(), (whole / 'a.jpg').read_bytes()
  contents = {
    'bits.png': (png[:3000] + bytes(2000) + png[5000:], ''),
    'bomb.png': (png_that_claims(100_000, 100_000), 'more pixels than Pillow considers safe'),
    'cut.jpg': (jpeg[: len(jpeg) // 2], 'truncated'),
    'cut.png': (png[: len(png) // 2], ''),
    'empty.png': (b'', 'the file is empty'),
    'head.png': (png[:20], ''),
    'large.png': (png_that_claims(10_000, 10_000), 'more pixels than Pillow considers safe'),
    'postscript.png': (b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n', 'not an image of a known format'),
    'real.tif': ((whole / 'a.tif').read_bytes(), 'the range of its pixel values is unknown (mode F)'),
    'text.png': (b'a letter', 'not an image of a known format'),
  }
  directory.mkdir(parents=True, exist_ok=True)
  for name, (data, _) in contents.items():
    (directory / name).write_bytes(data)
  return {name: text for name, (_, text) in contents.items()}


class TestBrokenFiles:
  def test_each_is_named_and_skipped(self, tmp_path):
    said = broken_files(tmp_path / 'data' / 'cat')
    good = save(tmp_path / 'data' / 'cat' / 'z.png')
    folder = image_folder.load(tmp_path / 'data', size=8)
    assert folder.paths == (good,)
    assert folder.bank.images.shape == (1, 8, 8, 3)
    assert {path.name for path, _ in folder.skipped} == set(said)
    for path, reason in folder.skipped:
      assert said[path.name] in reason
      assert '\n' not in reason

  def test_one_alone_is_an_error(self, tmp_path):
    (tmp_path / 'a.png').write_bytes(b'')
    with pytest.raises(DatasetError, match=saying('a.png', 'cannot be read', 'empty')):
      read_image(tmp_path / 'a.png', 8, 3)
    with pytest.raises(DatasetError, match=saying('nowhere', 'cannot be read', 'No such file')):
      read_image(tmp_path / 'nowhere', 8, 3)

  def test_ten_are_reported_and_then_their_number(self, tmp_path):
    for i in range(13):
      (tmp_path / f'{i:02d}.png').write_bytes(b'')
    save(tmp_path / 'good.png')
    lines = []
    found = image_folder.read_images(tmp_path, size=8, report=lines.append)
    assert len(found.skipped) == 13
    assert [line for line in lines if 'skipped' in line] == [
      *(f'skipped {tmp_path}/{i:02d}.png: the file is empty' for i in range(10)),
      'skipped 3 more files',
    ]

  def test_a_pipe_is_not_waited_for(self, tmp_path):
    save(tmp_path / 'good.png')
    os.mkfifo(tmp_path / 'pipe.png')
    found = image_folder.read_images(tmp_path, size=8)
    assert found.skipped == ((tmp_path / 'pipe.png', 'it is not a regular file'),)


class TestLoad:
  def test_classes_sorted_and_images_sorted_in_them(self, tmp_path):
    colours = {
      'chat à moustache/b c.PNG': (10, 0, 0),
      'chat à moustache/a.Jpeg': (20, 20, 20),
      'dog/x/1.bmp': (30, 0, 0),
      'dog/0.webp': (40, 40, 40),
      'dog/y.tiff': (50, 0, 0),
      '猫/é.ppm': (60, 0, 0),
    }
    for name, colour in colours.items():
      save(tmp_path / name, colour, **(dict(lossless=True) if name.endswith('webp') else {}))
    folder = image_folder.load(tmp_path, size=(4, 6))
    assert folder.names == ('chat à moustache', 'dog', '猫')
    assert folder.bank.images.shape == (6, 4, 6, 3)
    assert folder.bank.images.dtype == np.uint8
    assert folder.bank.sizes.tolist() == [2, 3, 1]
    names = [path.relative_to(tmp_path).as_posix() for path in folder.paths]
    assert names == [
      'chat à moustache/a.Jpeg', 'chat à moustache/b c.PNG', 'dog/0.webp', 'dog/x/1.bmp', 'dog/y.tiff', '猫/é.ppm',
    ]  # fmt: skip
    assert folder.bank.images[:, 2, 3].tolist() == [list(colours[name]) for name in names]
    assert folder.skipped == ()

  def test_files_that_are_not_called_images_are_left_alone(self, tmp_path):
    save(tmp_path / 'cat' / 'a.png')
    for name in ('cat/.hidden.png', 'cat/notes.txt', 'cat/Thumbs.db', '.git/x.png', '__MACOSX/a.png', 'README'):
      (tmp_path / name).parent.mkdir(exist_ok=True)
      (tmp_path / name).write_text('no image')
    folder = image_folder.load(tmp_path, size=8)
    assert folder.names == ('cat',)
    assert folder.skipped == ()

  @pytest.mark.parametrize(
    ('name', 'form'),
    [
      *[('a.jfif', 'JPEG'), ('a.jpe', 'JPEG'), ('a.apng', 'PNG'), ('a.dib', 'DIB'), ('a.pbm', 'PPM'), ('a.pnm', 'PPM')],
      *[('a.avif', 'AVIF'), ('a.jp2', 'JPEG2000'), ('a.tga', 'TGA'), ('a.ico', 'ICO'), ('a.HEIC', 'HEIF')],
      *[('photo', 'JPEG'), ('a.dat', 'PNG'), ('a.png', 'WEBP'), ('a.JPG', 'GIF')],
    ],
  )
  def test_the_content_tells_what_an_image_is(self, tmp_path, name, form):
    (tmp_path / 'cat').mkdir()
    pillow_heif.register_heif_opener()  # It also registers what writes such files.
    Image.new('1' if name == 'a.pbm' else 'RGB', (16, 16), 1 if name == 'a.pbm' else RED).save(
      tmp_path / 'cat' / name, form
    )
    folder = image_folder.load(tmp_path, size=8, channels=1)
    assert [path.name for path in folder.paths] == [name]
    assert abs(int(folder.bank.images[0, 4, 4, 0]) - (255 if name == 'a.pbm' else 60)) <= 3

  def test_a_uniform_image_is_told_of(self, tmp_path):
    save(tmp_path / 'cat' / 'a.png', GREY)
    lines = []
    image_folder.load(tmp_path, size=8, report=lines.append)
    assert any(re.search(saying('a.png is uniform', 'value 90'), line) for line in lines)
    save(tmp_path / 'cat' / 'b.png', RED)
    image_folder.load(tmp_path, size=8, report=lines.append)
    assert any(re.search(saying('b.png is uniform', 'value 200, 0, 0'), line) for line in lines)

  def test_images_beside_the_classes_are_told_of(self, tmp_path):
    save(tmp_path / 'cat' / 'a.png')
    save(tmp_path / 'loose.png')
    lines = []
    assert len(image_folder.load(tmp_path, size=8, report=lines.append).paths) == 1
    assert [line for line in lines if re.match(saying('left out 1 image (loose.png)', 'folders of the classes'), line)]

  def test_links_back_are_not_followed(self, tmp_path):
    for name in ('cat', 'dog'):
      save(tmp_path / 'data' / name / 'a.png')
    (tmp_path / 'data' / 'all').symlink_to(tmp_path / 'data')
    (tmp_path / 'data' / 'up').symlink_to('..')
    (tmp_path / 'data' / 'itself').symlink_to('itself')
    (tmp_path / 'data' / 'cat' / 'others').symlink_to('..')
    (tmp_path / 'data' / 'cat' / 'same').symlink_to('.')
    folder = image_folder.load(tmp_path / 'data', size=8)
    assert folder.names == ('cat', 'dog')
    assert folder.bank.sizes.tolist() == [1, 1]

  def test_a_folder_linked_twice_is_read_once(self, tmp_path):
    save(tmp_path / 'elsewhere' / 'a.png')
    (tmp_path / 'data').mkdir()
    for name in ('one', 'two'):
      (tmp_path / 'data' / name).symlink_to(tmp_path / 'elsewhere')
    found = image_folder.read_images(tmp_path / 'data', size=8)
    assert found.paths == (tmp_path / 'data' / 'one' / 'a.png',)

  def test_a_dangling_link_is_named(self, tmp_path):
    save(tmp_path / 'a.png')
    (tmp_path / 'b.png').symlink_to('nowhere')
    found = image_folder.read_images(tmp_path, size=8)
    assert found.skipped == ((tmp_path / 'b.png', 'No such file or directory'),)

  def test_home_is_understood(self, tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    save(tmp_path / 'data' / 'cat' / 'a.png')
    assert image_folder.load('~/data', size=8).names == ('cat',)
    assert len(image_folder.read_images('~/data', size=8).paths) == 1

  def test_progress_of_a_long_read(self, tmp_path, monkeypatch):
    monkeypatch.setattr(messages, 'SECONDS_BETWEEN_REPORTS', 0.0)
    for i in range(3):
      (tmp_path / 'cat').mkdir(exist_ok=True)
      Image.fromarray(noise(i)).save(tmp_path / 'cat' / f'{i}.png')
    lines = []
    image_folder.load(tmp_path, size=8, report=lines.append)
    assert lines == [f'reading 3 images from {tmp_path}', *(f'read {i} of 3 images' for i in (1, 2, 3))]


class TestReadImages:
  def test_flat_and_nested_sorted(self, tmp_path):
    for i, name in enumerate(('b.png', 'a/z.png', 'a/b/c.png')):
      save(tmp_path / name, (i, i, i))
    found = image_folder.read_images(tmp_path, size=8, channels=1)
    assert [path.relative_to(tmp_path).as_posix() for path in found.paths] == ['a/b/c.png', 'a/z.png', 'b.png']
    assert found.images[:, 0, 0, 0].tolist() == [2, 1, 0]

  def test_each_file_that_is_no_image_is_named(self, tmp_path):
    save(tmp_path / 'a.png')
    for name in ('notes.txt', 'b.heic'):
      (tmp_path / name).write_text('no image, but some text')
    lines = []
    found = image_folder.read_images(tmp_path, size=8, report=lines.append)
    assert [path.name for path, _ in found.skipped] == ['b.heic', 'notes.txt']
    for name in ('notes.txt', 'b.heic'):
      assert any(f'skipped {tmp_path / name}: ' in line for line in lines)

  def test_none(self, tmp_path):
    with pytest.raises(DatasetError, match=saying(tmp_path, 'no image', '0 files were tried')):
      image_folder.read_images(tmp_path, size=8)


@pytest.mark.parametrize('function', [image_folder.load, image_folder.read_images])
class TestBadDirectories:
  def test_missing(self, tmp_path, function):
    with pytest.raises(DatasetError, match=saying('nowhere', 'does not exist')):
      function(tmp_path / 'nowhere', size=8)

  def test_a_file(self, tmp_path, function):
    with pytest.raises(DatasetError, match=saying('a.png is a file', 'directory of images')):
      function(save(tmp_path / 'a.png'), size=8)

  def test_arguments_are_checked_before_anything_is_read(self, function):
    with pytest.raises(ValueError, match=saying('size', 'integer of 1 or more', '(height, width)', 'got 0')):
      function(pathlib.Path('nowhere'), size=0)


def test_no_class(tmp_path):
  save(tmp_path / 'a.png')
  with pytest.raises(DatasetError, match=saying(tmp_path, 'no sub-folders', 'put the images of each class')):
    image_folder.load(tmp_path, size=8)


def test_classes_without_images(tmp_path):
  save(tmp_path / 'cat' / 'a.png')
  (tmp_path / 'dog').mkdir()
  (tmp_path / 'eel').mkdir()
  (tmp_path / 'eel' / 'a.png').write_bytes(b'')
  with pytest.raises(DatasetError, match=saying('2 classes (dog, eel)', 'without an image')):
    image_folder.load(tmp_path, size=8)
