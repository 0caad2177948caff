"""Memory of the host: how much is available, and how to release freed memory."""

import ctypes
import pathlib


def release_freed() -> bool:
  """Releases freed memory to the operating system with glibc's malloc_trim. Returns whether malloc_trim exists.

  XLA's compiler frees hundreds of MiB that malloc would otherwise keep for the lifetime of the process.
  """
  try:
    trim = ctypes.CDLL(None).malloc_trim
  except (AttributeError, OSError, TypeError):  # The C library is not glibc, or the system is Windows.
    return False
  trim(0)
  return True


def available() -> int | None:
  """Returns the number of bytes that this process can still allocate on Linux, or `None` if the system reports none.

  If a control group (cgroup version 2) limits the memory of the process, the number is at most the memory that remains
  below this limit.
  """
  try:
    lines = pathlib.Path('/proc/meminfo').read_text().splitlines()
    system = next(1024 * int(line.split()[1]) for line in lines if line.startswith('MemAvailable:'))
  except (OSError, StopIteration, ValueError):
    return None
  group = pathlib.Path('/sys/fs/cgroup')
  try:
    limit, used = (int((group / name).read_text()) for name in ('memory.max', 'memory.current'))
  except (OSError, ValueError):  # Without a control group, or with 'max', there is no limit.
    return system
  return max(0, min(system, limit - used))
