"""The host's memory."""

import ctypes


def give_back() -> bool:
  """Returns what was freed to the system, by glibc's malloc_trim; returns whether there was anything to do it with.

  XLA's compiler frees hundreds of MiB that malloc would otherwise keep for as long as the process lives.
  """
  try:
    trim = ctypes.CDLL(None).malloc_trim
  except (AttributeError, OSError, TypeError):  # Not glibc; on Windows the process itself is no library.
    return False
  trim(0)
  return True
