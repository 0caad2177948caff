"""`metasgd info`: describes a model, or lists the models that ship with the package."""

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np

from metasgd_jax.cli.telling import how_many, load_model, say


def add(commands: Any) -> None:
  """Adds this command to the subparsers `commands`."""
  parser = commands.add_parser(
    'info', help='say what a model is', description='Says what a model is; without --model, which ship with metasgd.'
  )
  parser.add_argument('--model', help="a model's file or name")
  parser.set_defaults(prepare=prepare, parser=parser)


def prepare(args: argparse.Namespace) -> Callable[[], None]:
  """Reads the model. Returns a function that prints its description."""
  from metasgd_jax.deploy import model_file

  if args.model is not None:
    lines = about(load_model(args.model), model_file.model_size(args.model))
  else:
    lines = []
    for name in model_file.shipped_models():
      config = model_file.load_model(name).config
      lines.append(f'{name}: {_LEARNERS[config.learner]}, {how_many(config)}, {_images(config)}')
    lines = [*lines, 'more of one: metasgd info --model=NAME'] if lines else ['no model ships with this metasgd_jax']
  return lambda: say('\n'.join(lines))


_LEARNERS = {'meta_sgd': 'Meta-SGD', 'maml': 'MAML'}


def about(model: Any, size: int) -> list[str]:
  """Returns the lines that describe a model, whose file has `size` bytes."""
  import jax

  config, (theta, alpha) = model
  count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
  lines = [
    f'learner      {_LEARNERS[config.learner]}, {config.inner_steps} inner step(s)',
    f'network      Conv4, {config.filters} filters, hidden layer {config.hidden or "none"}',
    f'tells apart  {how_many(config)}',
    f'images       {_images(config)}',
    f'parameters   {count(theta):,}',
  ]
  if alpha is None:
    lines.append(f'alpha        {config.alpha:g}, one rate for all, not learned')
  else:
    rates = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(alpha)])
    lines.append(
      f'alpha        {rates.size:,} learned rates, mean {rates.mean():.4g}, {np.mean(rates < 0):.1%} negative'
    )
  lines += [
    f'size         {size / 1e6:.2f} MB',
    'training' if config.training else 'training     nothing is said of it',
  ]
  width = max(map(len, config.training), default=0)
  return [*lines, *(f'  {name:{width}}  {_fact(value)}' for name, value in config.training.items())]


def _images(config) -> str:
  height, width, channels = config.image_shape
  kind = {1: 'grey', 3: 'colour'}.get(channels, f'{channels} channels')
  return f'{height}x{width}, {kind}' + (', light on a dark background' if config.background == 'dark' else '')


def _fact(value: Any) -> str:
  if isinstance(value, dict):
    return ', '.join(f'{name} {_fact(v)}' for name, v in value.items())
  if isinstance(value, list):
    return ', '.join(map(_fact, value))
  if isinstance(value, bool) or value is None:
    return {True: 'yes', False: 'no', None: 'unknown'}[value]
  return f'{value:,}' if isinstance(value, int) else f'{value:g}' if isinstance(value, float) else str(value)
