"""Checks of an export: of its arguments before it begins, and of the numbers that the exported programs compute."""

import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metasgd_jax.io.files import PathLike, WriterError, as_path
from metasgd_jax.tree import is_key, named
from metasgd_jax.types import Batch, Episode, PyTree

PLATFORMS = ('cpu', 'cuda', 'tpu', 'rocm')
_CLOSE = 1e-4  # Relative to the largest output. Two compilations of an inner step round differently in float32.


def writable(path: PathLike) -> pathlib.Path:
  """Returns the path of a file that will be written, with the home directory in place of `~`.

  Raises:
    ValueError: if `path` is neither a string nor a path, or if the user after `~` has no home directory.
    WriterError: if the folder of the file does not exist, if the path itself is a folder, or if the file's name
      contains a NUL character.
  """
  place, reason = as_path(path), None
  if place.is_dir():
    reason = 'it is a folder'
  elif '\0' in place.name:
    reason = 'its name contains a NUL character'
  elif not place.parent.is_dir():
    reason = f'No such file or directory: there is no folder {place.parent}'
  if reason:
    raise WriterError(f'{place} cannot be written ({reason}); give another path')
  return place


def known_platforms(platforms: Sequence[str]) -> tuple[str, ...]:
  """Returns the platforms as a tuple. Raises ValueError unless each is one of `PLATFORMS` and occurs once."""
  if isinstance(platforms, str) or not platforms or len(set(platforms) & set(PLATFORMS)) < len(platforms):
    raise ValueError(f'`platforms` must be one or more of {", ".join(PLATFORMS)}, each once, got {platforms!r}')
  return tuple(platforms)


def as_arrays(meta: PyTree) -> PyTree:
  """Returns the parameters as arrays of the dtypes that JAX gives them.

  Raises ValueError if a .npy file cannot store a parameter.
  """
  for name, leaf in named(meta):
    if is_key(leaf) or np.asarray(leaf).dtype.kind not in 'biufc':
      got = str(leaf.dtype) if isinstance(leaf, jax.Array) else repr(leaf)
      advice = 'cast it to float32, or replace a key of jax.random by jax.random.key_data(key)'
      raise ValueError(f'the parameter {name} must be an array of numbers with a NumPy dtype, got {got:.80}; {advice}')
  return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.result_type(leaf)), meta)


def check_episode(episode: Episode) -> None:
  """Raises ValueError unless support and query are batches whose leaves have the items as their first dimension."""
  support, query = episode
  if not isinstance(support, Batch) or not isinstance(query, Batch):
    raise ValueError(
      f'`support` and `query` must be Batch(x, y), got {type(support).__name__} and {type(query).__name__}'
    )
  used = Episode(support, Batch(query.x, None))
  for name, leaf in named(used):
    if is_key(leaf) or not np.shape(leaf):
      got = 'a key of jax.random' if is_key(leaf) else f'the scalar {leaf!r:.80}'
      raise ValueError(f'{name} must be an array of numbers whose first dimension counts the items, got {got}')
  for what, batch in used._asdict().items():
    counts = {np.shape(leaf)[0] for leaf in jax.tree.leaves(batch)}
    if len(counts) != 1 or 0 in counts:
      raise ValueError(
        f'all leaves of {what} must have the same first dimension, which is the number of items and at least 1, '
        f'got {sorted(counts)}'
      )


def check_close(ours: PyTree, theirs: PyTree) -> None:
  """Raises WriterError unless the exported programs and the learner give equal outputs, up to float32 rounding.

  Args:
    ours: Outputs of the learner.
    theirs: Outputs of the exported programs.
  """
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
    a, b = np.asarray(a), np.asarray(b)
    finite = np.isfinite(a) & np.isfinite(b)  # Logits of absent classes may be -inf.
    size = np.max(np.abs(a[finite]), initial=1e-30)
    if not np.allclose(a, b, rtol=0, atol=_CLOSE * size, equal_nan=True):
      off = np.max(np.abs(a[finite] - b[finite]), initial=0)
      raise WriterError(
        f"the outputs of the exported programs differ from the learner's by {off:.3g} where both are finite, "
        'so no file is written; report this to the developers of metasgd_jax'
      )


def is_int(value: Any) -> bool:
  """Returns whether a value is an integer and not a bool."""
  return isinstance(value, int) and not isinstance(value, bool)
