"""Prints the output of the commands."""


def say(*lines: str) -> None:
  """Prints lines. Control characters are escaped, because file names and model files may contain them."""
  from metasgd_jax.datasets.messages import printable

  print(*map(printable, lines), sep='\n', flush=True)
