import platform
import subprocess
import sys

import pytest

from metasgd_jax.outer import host_memory

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
assert host_memory.release_freed()
print(before - resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason="malloc_trim is glibc's")
def test_freed_memory_goes_back_to_the_system():
  out = subprocess.run([sys.executable, '-c', SCATTERED], capture_output=True, text=True, check=True).stdout
  assert float(out) > 150  # Of 190 MiB.


def test_without_malloc_trim_nothing_happens(monkeypatch):
  monkeypatch.setattr(host_memory.ctypes, 'CDLL', lambda name: object())
  assert not host_memory.release_freed()
