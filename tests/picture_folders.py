"""Folders of pictures for tests of `metasgd predict`, and calls of this command."""

from PIL import Image
from small_models import pictures

from metasgd_jax import cli

SHOWN = {'blot': 2, 'columns': 1, 'diagonals': 3, 'frame': 4, 'rows': 2}
SHAPES = ('rows', 'columns', 'diagonals', 'blot', 'frame')


def save(path, name, seed, size=28, mode='L'):
  path.parent.mkdir(parents=True, exist_ok=True)
  image = pictures([SHAPES.index(name)], seed=seed)[0]
  Image.fromarray(image).resize((size, size + 2), Image.Resampling.NEAREST).convert(mode).save(path)


def predict(folders, model_file, *more, out='out', **changes):
  flags = {'model': model_file, 'support': folders / 'support', 'query': folders / 'query', 'out': folders / out}
  return cli.main(['predict', *(f'--{name}={value}' for name, value in (flags | changes).items()), *more])


def left(folder):
  return sorted(str(path.relative_to(folder)) for path in folder.rglob('*'))
