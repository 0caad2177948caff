"""What stands in a checkpoint beside its arrays, and whether it is what is asked for."""

import json
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from metasgd_jax import leaves, writers
from metasgd_jax.types import PyTree

FORMAT = 1
"""Raised when an older checkpoint can no longer be read."""


class CheckpointError(Exception):
  """A checkpoint cannot be used or written; the message says why and what to do."""


def describe(state: PyTree, *, step: int, metric: float | None, config: Mapping[str, Any]) -> dict[str, Any]:
  """Returns as JSON step, metric, configuration, versions, and the shape, dtype and checksum of each leaf."""
  about = {
    'format': FORMAT, 'step': step, 'metric': metric, 'config': _as_json(config),
    'versions': writers.provenance()['versions'], 'leaves': _leaves(state),
  }  # fmt: skip
  return about | {'checksum': _checksum(about)}


def check_about(about: Mapping[str, Any]) -> None:
  """Raises ValueError unless a description is what was written."""
  if about.get('format') != FORMAT:
    raise ValueError(f'it is of format {about.get("format")}, not {FORMAT}')
  if about.get('checksum') != _checksum({k: v for k, v in about.items() if k != 'checksum'}):
    raise ValueError('its description is not what was written')


def check_config(found: Mapping[str, Any], asked: Mapping[str, Any], where: writers.PathLike) -> None:
  """Raises CheckpointError, naming the fields that differ, unless both configurations are the same."""
  ours = _as_json(asked)
  names = [name for name in {**found, **ours} if found.get(name, ours) != ours.get(name, found)]
  if names:
    shown = lambda config, name: repr(config[name]) if name in config else 'nothing'
    fields = '; '.join(f'{name}: {shown(found, name)} there, {shown(ours, name)} asked for' for name in names)
    raise CheckpointError(
      f'{where} holds an unfinished run of another configuration ({fields}); give another --workdir, the same '
      'configuration to go on with it, or --restart to begin anew'
    )


def check_leaves(found: Mapping[str, Any], like: PyTree, where: writers.PathLike) -> None:
  """Raises CheckpointError, naming the first leaf, unless shapes, dtypes and kinds of keys are those of a state."""
  ours = _leaves(like)
  for name in {**found, **ours}:
    there, here = (
      {k: described.get(name, {}).get(k) for k in ('shape', 'dtype', 'keys')} for described in (found, ours)
    )  # fmt: skip
    if there != here:
      raise CheckpointError(
        f'{where} does not fit what is trained: {name} is {_shown(there)} there and {_shown(here)} here; give another '
        '--workdir, or --restart to begin anew'
      )


def crc32(array: np.ndarray) -> int:
  """Returns the checksum of an array's bytes."""
  return zlib.crc32(np.ascontiguousarray(array).tobytes())


def _leaves(state: PyTree) -> dict[str, dict[str, Any]]:
  arrays = leaves.named_arrays(state)
  return {
    name: {
      'shape': list(arrays[name].shape), 'dtype': str(arrays[name].dtype), 'crc32': crc32(arrays[name]),
      'keys': str(jax.random.key_impl(leaf)) if leaves.is_key(leaf) else None,
    }
    for name, leaf in leaves.named(state)
  }  # fmt: skip


def _checksum(about: Mapping[str, Any]) -> int:
  return zlib.crc32(json.dumps(_as_json(about), sort_keys=True).encode())


def _as_json(value: Any) -> Any:
  return json.loads(json.dumps(value))


def _shown(leaf: Mapping[str, Any]) -> str:
  return 'nothing' if leaf['dtype'] is None else f'{leaf["dtype"]}{leaf["shape"]}'
