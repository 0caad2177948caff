"""Runs of the regression experiment that share their compiled programs and draw nothing."""

import contextlib
import functools

import pytest

from experiments import regression, reporting, trainings


@contextlib.contextmanager
def quick_regression():
  """Builds each learner, data set and optimiser once for all runs inside."""
  with pytest.MonkeyPatch.context() as patch:
    for module, name in ((regression, 'build_learner'), (regression, 'sinusoid'), (trainings, 'optimizer_of')):
      patch.setattr(module, name, functools.cache(getattr(module, name)))
    patch.setattr(regression.optax, 'adam', functools.cache(regression.optax.adam))
    patch.setattr(reporting, 'save_pictures', lambda *_: None)
    yield
