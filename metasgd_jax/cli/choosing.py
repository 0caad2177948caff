"""Chooses the model of `metasgd predict` by the pictures, which are drawings or photographs."""

from collections.abc import Sequence

import numpy as np

from metasgd_jax.cli.telling import say
from metasgd_jax.datasets import image_files
from metasgd_jax.deploy.kinds import kind_of, kind_of_model, shipped_for
from metasgd_jax.deploy.model_file import FewShotModel, ModelConfig, load_model
from metasgd_jax.io.files import as_path

EXAMPLES = 10
"""Largest number of examples by which `choose` recognises their kind."""
LOOKED_AT = 200
"""Largest number of examples, and of pictures, that `warn_of_other_kind` looks at."""


def choose(model: str, support: str) -> tuple[str, FewShotModel]:
  """Returns the name and the content of the model that --model gives.

  With --model=auto it is the shipped model for the kind of pictures in --support, and the choice is printed.

  Raises:
    ValueError: if the model cannot be read.
    DatasetError: if --support cannot be listed.
  """
  if model != 'auto':
    return model, load_model(model)
  paths = image_files.list_images(as_path(support))
  read = image_files.read_all(_some(paths, EXAMPLES), 84, 3, lambda line: None)
  kind = kind_of(read.images) if read.paths else 'drawings'  # Without a picture, the call fails later with a reason.
  suits = shipped_for(kind)
  name = suits or 'omniglot'
  if suits and read.paths:
    say(f'the examples look like {kind}, so the model is {name}; --model=NAME chooses another')
  elif not suits:
    say(f'the examples look like {kind}, but no model for {kind} ships with metasgd, so the model is {name}')
  return name, load_model(name)


def warn_of_other_kind(name: str, config: ModelConfig, parts: Sequence[np.ndarray]) -> None:
  """Says so if the pictures are of another kind than those that the model was trained on. Looks at some of them."""
  trained = kind_of_model(config)
  if trained is None:
    return
  found = kind_of(np.concatenate([_some(images, LOOKED_AT) for images in parts]))
  if found != trained:
    say(
      f'warning: these pictures look like {found}, but the model {name} was trained on {trained}; it may make more '
      'errors than usual'
    )


def _some(items, most: int):
  """Returns at most `most` of the items, at equal distances."""
  return items[:: -(-len(items) // most) or 1]
