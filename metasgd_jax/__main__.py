"""python -m metasgd_jax: the same as the command `metasgd`."""

import sys

from metasgd_jax.cli import main

if __name__ == '__main__':
  sys.exit(main())
