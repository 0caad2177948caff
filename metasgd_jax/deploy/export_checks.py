"""Checks that are made before a learner is exported: of the path, platforms, parameters, episode and facts."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metasgd_jax.io.files import PathLike, WriterError
from metasgd_jax.tree import is_key, named
from metasgd_jax.types import Batch, PyTree

PLATFORMS = ('cpu', 'cuda', 'tpu', 'rocm')


def place(path: PathLike) -> pathlib.Path:
  """Returns the path to write to. Raises WriterError, before anything is compiled, if there is no such folder."""
  try:
    found = pathlib.Path(path).expanduser()
    if '\0' in str(found):
      raise ValueError('the name contains a NUL character')
    if found.parent.is_dir() and not found.is_dir():
      return found
    reason = 'it is a folder' if found.is_dir() else f'there is no folder {found.parent}'
  except (RuntimeError, ValueError, OSError) as e:  # A ~ of an unknown user, or a NUL in the name.
    reason = str(e)
  raise WriterError(f'{path} cannot be written ({reason}); give another path')


def known_platforms(platforms: Sequence[str]) -> tuple[str, ...]:
  """Returns the platforms as a tuple. Raises ValueError unless each is one of `PLATFORMS` and occurs once."""
  names = tuple(platforms)
  if isinstance(platforms, str) or not names or len(set(names)) < len(names) or set(names) - set(PLATFORMS):
    raise ValueError(f'platforms must be some of {", ".join(PLATFORMS)}, each once, got {platforms!r}')
  return names


def as_arrays(meta: PyTree) -> PyTree:
  """Returns the parameters as arrays of JAX's dtypes. Raises ValueError if the file cannot hold one or its name."""
  arrays = []
  for name, leaf in named(meta):
    if not name.isprintable() or '\\' in name or not {'', '.', '..'}.isdisjoint(name.split('/')):
      raise ValueError(f'the parameter {name!r:.80} has a name that a file in a zip cannot have; rename it')
    if is_key(leaf):
      raise ValueError(
        f'the parameter {name} is a key of jax.random, which no file can hold; pass jax.random.key_data(key) instead'
      )
    try:
      arrays.append(jnp.asarray(leaf, jnp.result_type(leaf)))
    except (TypeError, ValueError) as e:
      raise ValueError(f'the parameter {name} must be an array of numbers, got {leaf!r:.80}') from e
    if np.dtype(arrays[-1].dtype).kind not in 'biufc':
      raise ValueError(f'the parameter {name} must have a dtype of NumPy, got {arrays[-1].dtype}; cast it to float32')
  return jax.tree.unflatten(jax.tree.structure(meta), arrays)


def check_items(batch: Batch, what: str) -> None:
  """Raises ValueError unless the first dimension of all leaves is the same number of items, at least 1."""
  counts = set()
  for name, leaf in named(batch):
    if is_key(leaf) or not np.shape(leaf):
      got = 'a key of jax.random' if is_key(leaf) else f'the scalar {leaf!r:.80}'
      raise ValueError(f'{what}.{name} must be an array of numbers with the items in front, got {got}')
    counts.add(np.shape(leaf)[0])
  if len(counts) != 1 or 0 in counts:
    raise ValueError(f'the leaves of {what} must have one number of items in front, at least 1, got {sorted(counts)}')


def as_json(says: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the facts as JSON stores them. Raises ValueError if JSON cannot store one of them."""
  try:
    return json.loads(json.dumps(dict(says), allow_nan=False))
  except (TypeError, ValueError, RecursionError) as e:
    raise ValueError(f'the file cannot hold this fact ({first(e)}); facts must be values of JSON, without NaN') from e


def first(e: Exception) -> str:
  """Returns the first line of an error's text, or the name of its type if the text is empty."""
  return (str(e).strip().splitlines() or [type(e).__name__])[0][:200]
