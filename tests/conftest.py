"""Settings of all tests: shapes are never broadcast by accident, and a warning is an error."""

import gc
import importlib.metadata
import os
import pathlib
import tempfile

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
os.environ.setdefault('NPROC', '4')  # As sharding.cpu_cores_as_devices has it, for two devices.
# Compiling is most of the suite's time, and takes half of it with programs in one part and XLA's older fusion emitters,
# which jaxlib 0.12 has no more. XLA ends a process that gives it a flag it does not know.
os.environ.setdefault(
  'XLA_FLAGS',
  '--xla_cpu_parallel_codegen_split_count=1'
  + ' --xla_cpu_use_fusion_emitters=false'
  * importlib.metadata.version('jaxlib').startswith(('0.7.', '0.8.', '0.9.', '0.10.')),
)

# Threads of two workers that share cores wait for each other, so each worker has a core of its own.
if (worker := os.environ.get('PYTEST_XDIST_WORKER')) and hasattr(os, 'sched_setaffinity'):
  cores = sorted(os.sched_getaffinity(0))
  os.sched_setaffinity(0, {cores[int(worker.removeprefix('gw')) % len(cores)]})

import jax
import pytest

jax.config.update('jax_num_cpu_devices', 2)
jax.config.update('jax_numpy_rank_promotion', 'raise')
jax.config.update('jax_disable_most_optimizations', True)  # See `optimized`.

# A program is compiled once: files have many in common, and each forgets its own, see `forget_programs`.
COMPILED = tempfile.TemporaryDirectory(prefix='metasgd-compiled-')
jax.config.update('jax_compilation_cache_dir', COMPILED.name)
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)

gc.set_threshold(200_000, 20, 100)  # Tracing makes many small objects that live; looking for cycles so often costs 8%.

SHARED = pathlib.Path(__file__).resolve().parents[2] / 'shared' / 'data'


DEAREST = (
  'test_processes', 'test_learners', 'test_notebooks', 'test_few_shot_experiment', 'test_resuming', 'test_experiments',
  'test_navigation_experiment', 'test_large_learners', 'test_rl_learner', 'test_sharding', 'test_streaming',
  'test_meta_gradient', 'test_many_devices', 'test_omniglot', 'test_doctests', 'test_checkpoint', 'test_optimizer',
  'test_training',
)  # fmt: skip
"""Files that take longest. Workers begin with them, so that none has long to do when the others are done."""


def pytest_collection_modifyitems(items):
  """Marks the tests that use the fixture `optimized`, and puts the longest files first."""
  for item in items:
    if 'optimized' in item.fixturenames:
      item.add_marker('optimized')
  places = {name: place for place, name in enumerate(DEAREST)}
  items.sort(key=lambda item: places.get(item.path.stem, len(places)))


@pytest.fixture
def optimized():
  """Compiles with all optimisations, for tests of what fusion and reordering do to numbers.

  `make test-slow` runs these tests once more with XLA_FLAGS empty, and so as users compile.
  """
  jax.config.update('jax_disable_most_optimizations', False)
  yield
  jax.config.update('jax_disable_most_optimizations', True)


@pytest.fixture(
  params=[
    pytest.param(False, id='plain'),
    pytest.param(True, id='optimized', marks=[pytest.mark.slow, pytest.mark.optimized]),
  ]
)
def both_compilers(request):
  """Runs a test as the suite compiles, and once more as users do."""
  if request.param:
    request.getfixturevalue('optimized')


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
