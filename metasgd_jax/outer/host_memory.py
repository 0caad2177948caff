"""The host's memory."""

import ctypes
import pathlib


def release_freed() -> bool:
  """Returns freed memory to the system with glibc's malloc_trim, and returns whether this C library has it.

  XLA's compiler frees hundreds of MiB that malloc would otherwise keep for the lifetime of the process.
  """
  try:
    trim = ctypes.CDLL(None).malloc_trim
  except (AttributeError, OSError, TypeError):  # Not glibc; on Windows the process itself is no library.
    return False
  trim(0)
  return True


def available() -> int | None:
  """Returns the bytes that this process may still take, of Linux; `None` where the system does not say.

  What the system has available, or a control group (version 2) leaves, whichever is less.
  """
  try:
    lines = pathlib.Path('/proc/meminfo').read_text().splitlines()
    system = next(1024 * int(line.split()[1]) for line in lines if line.startswith('MemAvailable:'))
  except (OSError, StopIteration, ValueError):
    return None
  group = pathlib.Path('/sys/fs/cgroup')
  try:
    limit, used = (int((group / name).read_text()) for name in ('memory.max', 'memory.current'))
  except (OSError, ValueError):  # No group, or 'max': no limit.
    return system
  return max(0, min(system, limit - used))
