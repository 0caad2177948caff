"""An experiment's command as a shell would run it, but in this process: importing JAX anew takes seconds."""

import contextlib
import io
import pathlib
import runpy
import subprocess
import sys
import warnings

import pytest
from absl import logging
from absl.testing import flagsaver

from experiments import options

ROOT = pathlib.Path(__file__).resolve().parents[1]


def run(module, *given):
  """`python -m experiments.module` with these flags; JAX is as the tests have it, and nothing is logged."""
  out, err, verbosity = io.StringIO(), io.StringIO(), logging.get_verbosity()
  with pytest.MonkeyPatch.context() as patch, flagsaver.flagsaver(), warnings.catch_warnings():
    patch.chdir(ROOT)
    patch.setattr(sys, 'argv', [f'{module}.py', *given])
    patch.setattr(options, '_start_jax', lambda cache: None)
    patch.setattr(options.app, 'run', lambda start, flags_parser: start(flags_parser(sys.argv)))
    warnings.filterwarnings('ignore', '.* found in sys.modules', RuntimeWarning)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
      code = _exit_code(module)
  logging.set_verbosity(verbosity)
  return subprocess.CompletedProcess(sys.argv, code, out.getvalue(), err.getvalue())


def _exit_code(module):
  """What a shell would get; a sentence that a program ends with goes to stderr."""
  try:
    runpy.run_module(f'experiments.{module}', run_name='__main__', alter_sys=True)
  except SystemExit as e:
    if not isinstance(e.code, str):
      return e.code or 0
    print(e.code, file=sys.stderr)
    return 1
  return 0
