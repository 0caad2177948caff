"""Prints the output of the commands."""


def say(*lines: str) -> None:
  """Prints lines. Control characters, which file names and the contents of model files may have, are escaped."""
  from metasgd_jax.datasets.messages import printable

  print(*map(printable, lines), sep='\n', flush=True)
