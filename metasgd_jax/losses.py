"""Losses and metrics of outputs against targets, as scalars."""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax


def mean_squared_error(outputs: chex.Array, targets: chex.Array) -> chex.Array:
  """Returns the mean of (outputs − targets)²; both `[B, …]`.

  Raises:
    ValueError: shapes that differ, which would be broadcast.

  Example:
    >>> print(ms.losses.mean_squared_error(jnp.array([1.0, 2.0]), jnp.array([0.0, 0.0])))
    2.5
  """
  if jnp.shape(outputs) != jnp.shape(targets):
    raise ValueError(
      f'outputs and targets must have one shape, got {jnp.shape(outputs)} and {jnp.shape(targets)}; reshape one'
    )
  return jnp.mean(optax.losses.squared_error(outputs, targets))


def cross_entropy(logits: chex.Array, labels: chex.Array) -> chex.Array:
  """Returns the mean cross-entropy in nats; logits `[B, N]`, integer labels `[B]`, 0 to N − 1.

  Raises:
    ValueError: other shapes, or labels that are not integers.

  Example:
    >>> print(ms.losses.cross_entropy(jnp.zeros((3, 2)), jnp.array([0, 1, 1])).round(3))  # ln 2
    0.693
  """
  _check_labels(logits, labels)
  return jnp.mean(optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels))


def accuracy(logits: chex.Array, labels: chex.Array) -> chex.Array:
  """Returns the share of items whose greatest logit is their label's; logits `[B, N]`, integer labels `[B]`.

  Raises:
    ValueError: other shapes, or labels that are not integers.

  Example:
    >>> print(ms.losses.accuracy(jnp.array([[2.0, 1.0], [0.0, 1.0]]), jnp.array([0, 0])))
    0.5
  """
  _check_labels(logits, labels)
  wide = jnp.promote_types(jnp.result_type(logits), jnp.float32)  # bfloat16 has no 74/75.
  return jnp.mean((jnp.argmax(logits, -1) == labels).astype(wide))


def per_token(metric: Callable[[chex.Array, chex.Array], chex.Array]) -> Callable[..., chex.Array]:
  """Returns a metric of sequences, that of all their tokens together: outputs `[B, L, N]`, targets `[B, L]`.

  Of sequences that are padded: `per_token(masked(metric))`, whose targets are `(y [B, L], mask [B, L])`.

  Raises (from the metric made):
    ValueError: targets that are not one for each token.

  Example:
    >>> print(ms.losses.per_token(ms.losses.accuracy)(jnp.zeros((4, 7, 3)), jnp.zeros((4, 7), int)))
    1.0
  """

  def of_sequences(outputs: chex.Array, targets: Any) -> chex.Array:
    shapes = jnp.shape(outputs), {jnp.shape(leaf) for leaf in jax.tree.leaves(targets)}
    if len(shapes[0]) < 2 or shapes[1] != {shapes[0][:-1]}:
      raise ValueError(
        f'targets must be one a token, {shapes[0][:-1]} for outputs {shapes[0]}, got {", ".join(map(str, shapes[1]))}'
      )
    return metric(jnp.reshape(outputs, (-1, shapes[0][-1])), jax.tree.map(jnp.ravel, targets))

  return of_sequences


def masked(metric: Callable[[chex.Array, chex.Array], chex.Array]) -> Callable[..., chex.Array]:
  """Returns the metric's mean over the items that are there, of a padded batch: outputs `[B, …]`, targets (y, mask).

  y is `[B, …]`; mask `[B]` is true where there is an item: `Batch(x, (y, mask))`. The metric must be a mean over items,
  as those of this file are. What stands in the padding has no influence, but on batch norm's statistics and provided
  that outputs and y are finite there (zeros will do); with no item at all the mean is 0, and so is its gradient.

  Raises (from the metric made):
    ValueError: targets that are no pair, or a mask that is not `[B]` of booleans.

  Example:
    >>> outputs, y, mask = jnp.array([1.0, 3.0, 0.0]), jnp.zeros(3), jnp.array([True, True, False])
    >>> print(ms.losses.masked(ms.losses.mean_squared_error)(outputs, (y, mask)))
    5.0
  """

  def of_items(outputs: chex.Array, targets: tuple[chex.Array, chex.Array]) -> chex.Array:
    if not isinstance(targets, tuple | list) or len(targets) != 2:
      raise ValueError(f'targets must be a pair (y, mask), got {type(targets).__name__}; give Batch(x, (y, mask))')
    y, mask = targets
    if jnp.shape(mask) != jnp.shape(outputs)[:1] or not jnp.issubdtype(jnp.result_type(mask), jnp.bool_):
      raise ValueError(
        f'mask must be booleans of shape {jnp.shape(outputs)[:1]}, one an item, '
        f'got {jnp.result_type(mask)} of shape {jnp.shape(mask)}'
      )
    values = jax.vmap(lambda output, target: metric(output[None], target[None]))(outputs, y)
    wide = jnp.promote_types(values.dtype, jnp.float32)  # As jnp.mean sums: a sum in float16 is soon infinite.
    mean = jnp.sum(jnp.where(mask, values, 0), dtype=wide) / jnp.maximum(jnp.sum(mask), 1)
    return mean.astype(values.dtype) if jnp.issubdtype(values.dtype, jnp.floating) else mean

  return of_items


def _check_labels(logits, labels):
  shapes = jnp.shape(logits), jnp.shape(labels)
  if len(shapes[0]) != 2 or shapes[0][:1] != shapes[1]:
    raise ValueError(f'logits must be [B, N] and labels [B], got {shapes[0]} and {shapes[1]}')
  if not jnp.issubdtype(jnp.result_type(labels), jnp.integer):
    raise ValueError(f'labels must be integers, 0 to N - 1, got {jnp.result_type(labels)}')
