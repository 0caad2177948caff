"""Losses and metrics of outputs against targets, as scalars."""

from collections.abc import Callable

import chex
import jax.numpy as jnp
import optax


def mean_squared_error(outputs: chex.Array, targets: chex.Array) -> chex.Array:
  """Returns the mean of (outputs − targets)²; both `[B, …]`.

  Raises:
    ValueError: shapes that differ, which would be broadcast.
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
  """
  _check_labels(logits, labels)
  return jnp.mean(optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels))


def accuracy(logits: chex.Array, labels: chex.Array) -> chex.Array:
  """Returns the share of items whose greatest logit is their label's; logits `[B, N]`, integer labels `[B]`.

  Raises:
    ValueError: other shapes, or labels that are not integers.
  """
  _check_labels(logits, labels)
  return jnp.mean((jnp.argmax(logits, -1) == labels).astype(logits.dtype))


def per_token(metric: Callable[[chex.Array, chex.Array], chex.Array]) -> Callable[..., chex.Array]:
  """Returns a metric of sequences, that of all their tokens together: outputs `[B, L, N]`, targets `[B, L]`."""

  def of_sequences(outputs: chex.Array, targets: chex.Array) -> chex.Array:
    return metric(outputs.reshape(-1, outputs.shape[-1]), targets.reshape(-1))

  return of_sequences


def _check_labels(logits, labels):
  shapes = jnp.shape(logits), jnp.shape(labels)
  if len(shapes[0]) != 2 or shapes[0][:1] != shapes[1]:
    raise ValueError(f'logits must be [B, N] and labels [B], got {shapes[0]} and {shapes[1]}')
  if not jnp.issubdtype(jnp.result_type(labels), jnp.integer):
    raise ValueError(f'labels must be integers, 0 to N - 1, got {jnp.result_type(labels)}')
