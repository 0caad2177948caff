"""The provenance of a result: versions, the device, and settings of JAX."""

import contextlib
import importlib.metadata
import os
import pathlib
import platform
from typing import Any

import jax

_PACKAGES = ('metasgd_jax', 'jax', 'jaxlib', 'optax', 'flax', 'numpy', 'orbax-checkpoint', 'tensorflow-datasets')

_JAX_SETTINGS = ('enable_x64', 'default_matmul_precision', 'default_prng_impl', 'threefry_partitionable')
"""Settings of JAX that change the numbers of a result."""


def collect() -> dict[str, Any]:
  """Returns the package versions, the device and JAX's settings that a result was made with, as values for JSON.

  Example:
    >>> from metasgd_jax.io import provenance
    >>> sorted(provenance.collect())
    ['device', 'jax_settings', 'versions']
  """
  versions = {'python': platform.python_version()}
  for name in _PACKAGES:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      versions[name] = importlib.metadata.version(name)
  devices = jax.devices()
  device = {'platform': devices[0].platform, 'kind': devices[0].device_kind, 'count': len(devices)}
  if devices[0].platform == 'cpu':
    device['cores'] = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    device['cpu'] = _cpu_model()
  settings = {f'jax_{name}': getattr(jax.config, f'jax_{name}') for name in _JAX_SETTINGS}
  settings['XLA_FLAGS'] = os.environ.get('XLA_FLAGS')
  return {'versions': versions, 'device': device, 'jax_settings': settings}


def _cpu_model() -> str:
  with contextlib.suppress(OSError):
    for line in pathlib.Path('/proc/cpuinfo').read_text().splitlines():
      if line.startswith('model name'):
        return line.split(':', 1)[1].strip()
  return platform.processor() or platform.machine()
