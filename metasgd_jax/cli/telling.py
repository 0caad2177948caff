"""Functions that print the output of the commands, and that shorten long text from the command line for messages."""


def say(*lines: str) -> None:
  """Prints lines. Control characters, which file names and the contents of model files may have, are escaped."""
  from metasgd_jax.datasets.messages import printable

  print(*map(printable, lines), sep='\n', flush=True)


def cut(text: str) -> str:
  """Returns a text from the command line, cut after 80 characters."""
  return text if len(text) <= 80 else f'{text[:80]}…'
