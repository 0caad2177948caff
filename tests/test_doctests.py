"""The examples in docstrings give what they say."""

import doctest
import importlib
import io
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metasgd_jax as ms

PACKAGE = pathlib.Path(ms.__file__).parent
NAMES = {'jax': jax, 'jnp': jnp, 'ms': ms, 'np': np, 'optax': optax}  # What every example may use.


def examples():
  """Each docstring of the package with examples, by its name."""
  found = {}
  for path in sorted(PACKAGE.rglob('*.py')):
    if '>>>' not in path.read_text():
      continue
    module = importlib.import_module(
      '.'.join(path.relative_to(PACKAGE.parent).with_suffix('').parts).removesuffix('.__init__')
    )
    for test in doctest.DocTestFinder(exclude_empty=True).find(module, extraglobs=NAMES):
      if test.examples:
        found[test.name] = test
  return found


EXAMPLES = examples()


@pytest.mark.parametrize('test', [pytest.param(test, id=name) for name, test in EXAMPLES.items()])
def test_example_gives_what_it_says(test):
  told = io.StringIO()
  test.globs = dict(NAMES)  # An example stands by itself: it sees nothing else of its module.
  with jax.numpy_rank_promotion('allow'):  # As it is outside of this suite.
    failed, tried = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS, verbose=False).run(test, out=told.write)
  assert tried
  assert not failed, told.getvalue()
