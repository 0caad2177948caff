import itertools
import platform
import subprocess
import sys
import types

import jax
import optax
import pytest
from problems import sinusoid_learner

import metasgd_jax as ms
from metasgd_jax.outer import host_memory, training

SCATTERED = """
import ctypes, pathlib
from metasgd_jax.outer import host_memory
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
resident = lambda: int(pathlib.Path('/proc/self/statm').read_text().split()[1]) * 4096 / 2**20
blocks = [libc.malloc(100_000) for _ in range(2_000)]  # Below the size that malloc maps by itself.
for block in blocks:
  ctypes.memset(block, 1, 100_000)
for block in blocks[:-1]:
  libc.free(block)
before = resident()
assert host_memory.give_back()
print(before - resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason="malloc_trim is glibc's")
def test_freed_memory_goes_back_to_the_system():
  out = subprocess.run([sys.executable, '-c', SCATTERED], capture_output=True, text=True, check=True).stdout
  assert float(out) > 150  # Of 190 MiB.


def test_without_malloc_trim_nothing_happens(monkeypatch):
  monkeypatch.setattr(host_memory.ctypes, 'CDLL', lambda name: object())
  assert not host_memory.give_back()


@pytest.mark.parametrize(('seconds', 'times'), [(2.0, 1), (0.1, 0)])
def test_training_gives_back_what_compiling_left(seconds, times, monkeypatch):
  """Once where compiling took over a second, and not where the program was there already; by a clock of the test's."""
  calls, clock = [], itertools.count(0, seconds)
  monkeypatch.setattr(host_memory, 'give_back', lambda: calls.append(1))
  monkeypatch.setattr(training, 'time', types.SimpleNamespace(perf_counter=lambda: next(clock)))
  tasks, learner, optimizer = ms.tasks.sinusoid(), sinusoid_learner(hidden=(4,)), optax.sgd(0.1)
  state = ms.init(jax.random.key(0), tasks, learner=learner, optimizer=optimizer)
  ms.train(state, tasks, learner=learner, optimizer=optimizer, meta_iterations=2, meta_batch=2, chunk=1)
  assert len(calls) == times
