"""The description that a checkpoint stores beside its arrays, and the checks of this description."""

import json
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from metasgd_jax.io import files, provenance
from metasgd_jax.tree import is_key, named, named_arrays
from metasgd_jax.types import PyTree

FORMAT = 1
"""Version of the format. It increases when older checkpoints can no longer be read."""


class CheckpointError(Exception):
  """A checkpoint cannot be used or written. The message says why, and what to do."""


def describe(state: PyTree, *, step: int, metric: float | None, config: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the description of a checkpoint, as values that JSON can store.

  It has the step, the metric, the configuration, the versions, and the shape, dtype and checksum of each leaf.
  """
  about = {
    'format': FORMAT, 'step': step, 'metric': metric, 'config': _as_json(config),
    'versions': provenance.collect()['versions'], 'leaves': _leaves(state),
  }  # fmt: skip
  return about | {'checksum': _checksum(about)}


def check_about(about: Any, step: int) -> None:
  """Raises ValueError unless a description is unchanged, has fields of the right types, and is of the given step."""
  if not isinstance(about, dict):
    raise ValueError('it has no description')
  if about.get('format') != FORMAT:
    raise ValueError(f'it has format {about.get("format")}, not {FORMAT}')
  if about.get('checksum') != _checksum({k: v for k, v in about.items() if k != 'checksum'}):
    raise ValueError('its description has changed since it was written')
  for name, right in _FIELDS.items():  # Whoever changes a description can also change its checksum.
    if not right(about.get(name)):
      raise ValueError(f'its description has {name}={about.get(name)!r:.80}')
  if about['step'] != step:
    raise ValueError(f'it is of step {about["step"]}, not of the {step} that its folder is called')


def check_config(found: Mapping[str, Any], asked: Mapping[str, Any], where: files.PathLike) -> None:
  """Raises CheckpointError unless both configurations are the same. The message names the fields that differ."""
  ours = _as_json(asked)
  names = [name for name in {**found, **ours} if found.get(name, ours) != ours.get(name, found)]
  if names:
    shown = lambda config, name: f'{config[name]!r:.200}' if name in config else 'nothing'
    fields = '; '.join(f'{_named(name)}: {shown(found, name)} there, {shown(ours, name)} asked for' for name in names)
    raise CheckpointError(
      f'{where} holds an unfinished run of another configuration ({fields}); give another --workdir, the same '
      'configuration to continue that run, or --restart to start again'
    )


def check_leaves(found: Mapping[str, Any], like: PyTree, where: files.PathLike) -> None:
  """Raises CheckpointError unless the described shapes, dtypes and kinds of keys are those of the state `like`.

  The message names the first leaf that differs.
  """
  ours = _leaves(like)
  for name in {**found, **ours}:
    there, here = (
      {k: described.get(name, {}).get(k) for k in ('shape', 'dtype', 'keys')} for described in (found, ours)
    )  # fmt: skip
    if there != here:
      raise CheckpointError(
        f'{where} does not fit what is trained: {_named(name)} is {_shown(there)} there and {_shown(here)} here; give '
        'another --workdir, or --restart to start again'
      )


def crc32(array: np.ndarray) -> int:
  """Returns the CRC-32 checksum of an array's bytes."""
  return zlib.crc32(np.ascontiguousarray(array).tobytes())


def _is_leaf(value: Any) -> bool:
  return isinstance(value, dict) and isinstance(value.get('shape'), list) and isinstance(value.get('dtype'), str)


_FIELDS: dict[str, Callable[[Any], bool]] = {
  'step': lambda value: type(value) is int and value >= 0,
  'metric': lambda value: value is None or type(value) is float or (type(value) is int and abs(value) < 2**63),
  'config': lambda value: isinstance(value, dict),
  'versions': lambda value: isinstance(value, dict) and all(isinstance(version, str) for version in value.values()),
  'leaves': lambda value: isinstance(value, dict) and all(map(_is_leaf, value.values())),
}


def _leaves(state: PyTree) -> dict[str, dict[str, Any]]:
  arrays = named_arrays(state)
  return {
    name: {
      'shape': list(arrays[name].shape), 'dtype': str(arrays[name].dtype), 'crc32': crc32(arrays[name]),
      'keys': str(jax.random.key_impl(leaf)) if is_key(leaf) else None,
    }
    for name, leaf in named(state)
  }  # fmt: skip


def _checksum(about: Mapping[str, Any]) -> int:
  return zlib.crc32(json.dumps(_as_json(about), sort_keys=True).encode())


def _as_json(value: Any) -> Any:
  return json.loads(json.dumps(value))


def _shown(leaf: Mapping[str, Any]) -> str:
  return 'nothing' if leaf['dtype'] is None else f'{_named(leaf["dtype"])}{leaf["shape"]!s:.80}'


def _named(name: str) -> str:
  """Returns a name in a form that fits into a sentence. The name comes from a file, which may contain any text."""
  return name if name.isprintable() and len(name) <= 200 else f'{name[:200]!a}'
