"""Prints the output of the commands."""

import io
import sys


def escape_unprintable() -> None:
  r"""Makes stdout and stderr print an escape, such as \u2212, for each character that they cannot encode.

  Python would raise UnicodeEncodeError, for example for a minus sign in cp1252 or for the name of a file in any bytes.
  """
  for stream in (sys.stdout, sys.stderr):
    if isinstance(stream, io.TextIOWrapper):
      stream.reconfigure(errors='backslashreplace')


def say(*lines: str) -> None:
  """Prints lines. Control characters are escaped, because file names and model files may contain them."""
  from metasgd_jax.datasets.messages import printable

  print(*map(printable, lines), sep='\n', flush=True)
