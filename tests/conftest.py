"""Settings of all tests: shapes are never broadcast by accident, and a warning is an error."""

import os
import pathlib
import subprocess
import sys
import tempfile

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
os.environ.setdefault('NPROC', '4')  # As sharding.cpu_cores_as_devices has it, for two devices.


def knows_flag(flag):
  """Whether XLA has a flag; a process that gives it one that it has not is aborted."""
  ask = [sys.executable, '-c', 'import jax; jax.devices("cpu")']
  return not subprocess.run(ask, env=os.environ | {'XLA_FLAGS': flag}, capture_output=True, check=False).returncode


# XLA's newer way to make code of fusions takes three times as long to compile. Whoever sets XLA_FLAGS, if only to a
# space, has tests compiled as theirs; xdist's workers and the programs that tests start get them from here.
QUICK = '--xla_cpu_use_fusion_emitters=false'
if 'XLA_FLAGS' not in os.environ and knows_flag(QUICK):
  os.environ['XLA_FLAGS'] = QUICK

import jax
import pytest

jax.config.update('jax_num_cpu_devices', 2)
jax.config.update('jax_numpy_rank_promotion', 'raise')
jax.config.update('jax_disable_most_optimizations', True)  # Compiling is most of the suite's time; see `optimized`.

# A program is compiled once: files have many in common, and each forgets its own, see `forget_programs`.
COMPILED = tempfile.TemporaryDirectory(prefix='metasgd-compiled-')
jax.config.update('jax_compilation_cache_dir', COMPILED.name)
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)

SHARED = pathlib.Path(__file__).resolve().parents[2] / 'shared' / 'data'


@pytest.fixture
def optimized():
  """Compiles as users do, but for `QUICK`, for tests of what fusion and reordering do to numbers."""
  jax.config.update('jax_disable_most_optimizations', False)
  yield
  jax.config.update('jax_disable_most_optimizations', True)


@pytest.fixture(scope='module', autouse=True)
def forget_programs():
  """Frees a file's compiled programs: thousands in one process take gigabytes, and crash the compiler at last."""
  yield
  jax.clear_caches()


@pytest.fixture(scope='session')
def shared_data():
  """The folder of data sets beside the project, where there is one."""
  if not SHARED.is_dir():
    pytest.skip(f'needs Omniglot in {SHARED.parent.name}/{SHARED.name} beside the project, which is not there')
  return SHARED
