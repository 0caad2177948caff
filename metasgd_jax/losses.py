"""Losses and metrics: functions of outputs and targets that return a scalar."""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from metasgd_jax.types import equal_partial


def mean_squared_error(outputs: chex.Array, targets: chex.Array) -> chex.Array:
  """Returns the mean of (outputs − targets)² over all entries. Both arrays have the same shape `[B, …]`.

  Raises:
    ValueError: if the shapes differ. Otherwise the arrays would be broadcast silently.

  Example:
    >>> print(ms.losses.mean_squared_error(jnp.array([1.0, 2.0]), jnp.array([0.0, 0.0])))
    2.5
  """
  shapes = jnp.shape(outputs), jnp.shape(targets)
  if shapes[0] != shapes[1]:
    raise ValueError(
      f'outputs and targets must have the same shape, got {shapes[0]} and {shapes[1]}; reshape one of them'
    )
  return jnp.mean(optax.losses.squared_error(outputs, targets))


def cross_entropy(logits: chex.Array, labels: chex.Array) -> chex.Array:
  """Returns the mean cross-entropy in nats, for logits `[B, N]` and integer labels `[B]` from 0 to N − 1.

  Inside `jax.jit` the values of the labels are not known in advance. A label out of range then makes the loss and its
  gradient NaN.

  Raises:
    ValueError: if the shapes do not match, if the labels are not integers, or, outside of `jax.jit`, if a label is out
      of range.

  Example:
    >>> print(ms.losses.cross_entropy(jnp.zeros((3, 2)), jnp.array([0, 1, 1])).round(3))  # ln 2
    0.693
  """
  labels = _checked_labels(logits, labels)
  losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
  valid = are_classes(labels, jnp.shape(logits)[1])
  return jnp.mean(losses * jnp.where(valid, 1, jnp.nan).astype(losses.dtype))  # A product makes the gradient NaN too.


def accuracy(logits: chex.Array, labels: chex.Array) -> chex.Array:
  """Returns the fraction of items whose label has the largest logit, for logits `[B, N]` and integer labels `[B]`.

  Labels are from 0 to N − 1. Inside `jax.jit` a label out of range makes the result NaN.

  Raises:
    ValueError: if the shapes do not match, if the labels are not integers, or, outside of `jax.jit`, if a label is out
      of range.

  Example:
    >>> print(ms.losses.accuracy(jnp.array([[2.0, 1.0], [0.0, 1.0]]), jnp.array([0, 0])))
    0.5
  """
  labels = _checked_labels(logits, labels)
  wide = _at_least_float32(logits)  # bfloat16 would round 74/75 to 0.988.
  valid = are_classes(labels, jnp.shape(logits)[1])
  # A label that does not fit into int32 is no class.
  right = jnp.argmax(logits, -1).astype(jnp.int32) == jnp.asarray(labels).astype(jnp.int32)
  return jnp.mean(jnp.where(valid, right.astype(wide), jnp.asarray(jnp.nan, wide)))


def per_token(metric: Callable[[chex.Array, chex.Array], chex.Array]) -> Callable[..., chex.Array]:
  """Returns a metric of sequences, which applies `metric` to all tokens of a batch of sequences together.

  The outputs have shape `[B, L, N]` and the targets `[B, L]`, for sequences of L tokens. For padded sequences use
  `per_token(masked(metric))`, whose targets are `(y [B, L], mask [B, L])`.

  Args:
    metric: Metric of outputs `[B, N]` and targets `[B]`, such as `cross_entropy`.

  Raises (from the returned metric):
    ValueError: if there is not one target per token.

  Example:
    >>> print(ms.losses.per_token(ms.losses.accuracy)(jnp.zeros((4, 7, 3)), jnp.zeros((4, 7), int)))
    1.0
  """
  return equal_partial(_of_sequences, metric=metric)


def masked(metric: Callable[[chex.Array, chex.Array], chex.Array]) -> Callable[..., chex.Array]:
  """Returns a metric of padded batches, which is the mean of `metric` over the real items of a batch.

  The outputs have shape `[B, …]`, and the targets are a pair (y, mask), as in `Batch(x, (y, mask))`. The shape of y is
  `[B, …]`. The mask `[B]` is true for a real item and false for padding. The outputs must be finite at the padding. The
  values of y at the padding are replaced by 0. The padding then has no influence on the result, but it does influence
  the statistics of batch norm. For a batch without real items the mean is 0, and its gradient is 0 too.

  Args:
    metric: Metric that is a mean over items, such as the metrics of this module.

  Raises (from the returned metric):
    ValueError: if the targets are not a pair, or if the mask is not an array `[B]` of booleans.

  Example:
    >>> outputs, y, mask = jnp.array([1.0, 3.0, 0.0]), jnp.zeros(3), jnp.array([True, True, False])
    >>> print(ms.losses.masked(ms.losses.mean_squared_error)(outputs, (y, mask)))
    5.0
  """
  return equal_partial(_of_items, metric=metric)


def _of_sequences(outputs: chex.Array, targets: Any, *, metric) -> chex.Array:
  shape, found = jnp.shape(outputs), {jnp.shape(leaf) for leaf in jax.tree.leaves(targets)}
  if len(shape) < 2 or found != {shape[:-1]}:
    got = ', '.join(map(str, found))
    raise ValueError(
      f'the targets must have one entry per token, which is the shape {shape[:-1]} for outputs {shape}, got {got}'
    )
  return metric(jnp.reshape(outputs, (-1, shape[-1])), jax.tree.map(jnp.ravel, targets))


def _of_items(outputs: chex.Array, targets: tuple[chex.Array, chex.Array], *, metric) -> chex.Array:
  if not isinstance(targets, tuple | list) or len(targets) != 2:
    raise ValueError(f'the targets must be a pair (y, mask), got {type(targets).__name__}; give Batch(x, (y, mask))')
  y, mask = targets[0], jnp.asarray(targets[1])
  items, dtype = jnp.shape(outputs)[:1], mask.dtype
  if jnp.shape(mask) != items or not jnp.issubdtype(dtype, jnp.bool_):
    raise ValueError(
      f'the mask must be an array of booleans of shape {items}, one for each item, '
      f'got {dtype} of shape {jnp.shape(mask)}'
    )
  y = jnp.asarray(as_labels(y))
  y = jax.vmap(lambda real, target: jnp.where(real, target, jnp.zeros_like(target)))(mask, y)
  values = jax.vmap(lambda output, target: metric(output[None], target[None]))(outputs, y)
  wide = _at_least_float32(values)  # Like jnp.mean: a float16 sum overflows early.
  count = jnp.maximum(jnp.sum(mask), 1).astype(wide)
  mean = jnp.sum(jnp.where(mask, values, jnp.zeros_like(values)), dtype=wide) / count
  return mean.astype(values.dtype) if jnp.issubdtype(values.dtype, jnp.floating) else mean


def are_classes(labels: chex.Array, classes: int) -> chex.Array:
  """Returns whether each label is a class, from 0 to N − 1, as booleans `[B]`.

  The losses and metrics return NaN if a label is not a class. JAX would otherwise interpret such a label as another
  class, or as none of the classes.

  Args:
    labels: Integer labels `[B]`.
    classes: Number N of classes.

  Raises:
    ValueError: if a label is not a class and the values of the labels are known, as they are outside of `jax.jit`.
  """
  if not isinstance(labels, jax.core.Tracer) and getattr(labels, 'is_fully_addressable', True):
    values = np.asarray(labels)
    if (wrong := values[(values < 0) | (values >= classes)]).size:
      raise ValueError(f'labels must be from 0 to {classes - 1}, for {classes} classes, got {wrong[0]}; renumber them')
  labels = jnp.asarray(labels)
  return (labels >= 0) & (labels < classes)


def one_hot(labels: chex.Array, classes: int) -> chex.Array:
  """Returns the one-hot vectors `[B, N]` of labels `[B]`. The row of a label that is not a class is NaN."""
  return jnp.where(are_classes(labels, classes)[:, None], jax.nn.one_hot(labels, classes), jnp.nan)


def _at_least_float32(values: chex.Array) -> type:
  return jnp.float64 if jnp.result_type(values) == jnp.float64 else jnp.float32


def as_labels(labels: Any) -> chex.Array | np.ndarray:
  """Returns labels as an array, which is one of NumPy unless they are or contain arrays of JAX.

  Raises:
    ValueError: if the labels are not numbers, or if some integers are too large for JAX, which would cut them off.
  """
  if any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(labels)):
    return jnp.asarray(labels)
  try:
    found = np.asarray(labels)
  except ValueError:  # Lists of different lengths.
    found = np.empty(0, object)
  if found.dtype.kind not in 'biufcV':
    raise ValueError(f'the labels must be an array of numbers, got {labels!r:.80}; encode them as numbers')
  if found.dtype.kind in 'iu':
    kept = jax.dtypes.canonicalize_dtype(found.dtype)
    if (cut := found[found.astype(kept) != found]).size:
      raise ValueError(f'the label {cut[0]} does not fit into {kept}; renumber the labels')
  return found


def _checked_labels(logits, labels) -> chex.Array | np.ndarray:
  labels = as_labels(labels)
  shapes = jnp.shape(logits), jnp.shape(labels)
  if len(shapes[0]) != 2 or shapes[0][:1] != shapes[1]:
    raise ValueError(f'logits must have shape [B, N] and labels shape [B], got {shapes[0]} and {shapes[1]}')
  if not jnp.issubdtype(jnp.result_type(labels), jnp.integer):
    raise ValueError(f'`labels` must be integers from 0 to N - 1, got dtype {jnp.result_type(labels)}')
  return labels
