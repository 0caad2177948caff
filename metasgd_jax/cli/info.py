"""`metasgd info`: describes a model, or lists the models that ship with the package."""

import argparse
import json
from typing import Any

import jax
import numpy as np

from metasgd_jax.cli.telling import say
from metasgd_jax.deploy import model_file

_LEARNERS = {'meta_sgd': 'Meta-SGD', 'maml': 'MAML', 'prototypical': 'Prototypical Networks'}


def run(args: argparse.Namespace) -> None:
  """Prints a description of the model, or a list of the models that ship with the package."""
  if args.model is not None:
    say(*about(model_file.load_model(args.model), model_file.model_size(args.model)))
    return
  for name in model_file.shipped_models():
    config = model_file.load_model(name).config
    say(f'{name}: {_LEARNERS[config.learner]}, 2 to {config.way} classes, {_images(config)}')
  say('metasgd info --model=NAME describes one of them')


def about(model: Any, size: int) -> list[str]:
  """Returns the lines of text that describe a model. `size` is the number of bytes of the model's file."""
  config, meta = model
  facts = config.training
  width = max(map(len, facts), default=0)
  return [
    f'learner      {_LEARNERS[config.learner]}, {config.inner_steps} inner step(s)',
    f'network      Conv4, {config.filters} filters, hidden layer {config.hidden or "none"}',
    f'classes      2 to {config.way}',
    f'images       {_images(config)}',
    f'parameters   {sum(leaf.size for leaf in jax.tree.leaves(getattr(meta, "theta", meta))):,}',
    f'alpha        {_rates(config, getattr(meta, "alpha", None))}',
    f'likeness     {_least_likeness(config)}',
    f'size         {size / 1e6:.2f} MB',
    'training' if facts else 'training     the file has no facts about it',
    *(f'  {name:{width}}  {_fact(value)}' for name, value in facts.items()),
  ]


def _images(config) -> str:
  height, width, channels = config.image_shape
  kind = {1: 'grey', 3: 'colour'}.get(channels, f'{channels} channels')
  return f'{height}x{width}, {kind}' + (', light on a dark background' if config.background == 'dark' else '')


def _rates(config, alpha) -> str:
  if config.learner == 'prototypical':
    return 'none, the parameters do not adapt'
  if alpha is None:
    return f'{config.alpha:g}, one rate for all, not learned'
  rates = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(alpha)])
  return f'{rates.size:,} learned rates, mean {rates.mean():.4g}, {np.mean(rates < 0):.1%} negative'


def _least_likeness(config) -> str:
  if config.least_likeness is None:
    return 'not measured'
  one, five = config.least_likeness
  return f'1% of pictures are below {one:.3f} with one example of each class, {five:.3f} with five'


def _fact(value: Any) -> str:
  if value is None or isinstance(value, bool):
    return {True: 'yes', False: 'no', None: 'unknown'}[value]
  if isinstance(value, int):
    return f'{value:,}'
  return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
