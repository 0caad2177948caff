"""What the commands print: lines, and what a model is for."""

from typing import Any


def say(text: str = '') -> None:
  """Prints lines, with escapes for what names of files and facts of models may hold and a terminal may obey."""
  from metasgd_jax.datasets.messages import printable

  print('\n'.join(map(printable, text.split('\n'))), flush=True)


def how_many(config: Any) -> str:
  """Returns how many classes a model tells apart."""
  return f'2 to {config.way} classes' if config.way > 2 else '2 classes'
