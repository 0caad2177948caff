"""Losses and metrics of outputs against targets, as scalars."""

import chex
import jax.numpy as jnp
import optax


def mean_squared_error(outputs: chex.Array, targets: chex.Array) -> chex.Array:
  """Returns the mean of (outputs − targets)²; both `[B, …]`, of the same shape."""
  chex.assert_equal_shape([outputs, targets])
  return jnp.mean(optax.losses.squared_error(outputs, targets))


def cross_entropy(logits: chex.Array, labels: chex.Array) -> chex.Array:
  """Returns the mean cross-entropy in nats; logits `[B, N]`, integer labels `[B]`."""
  chex.assert_rank([logits, labels], [2, 1])
  return jnp.mean(optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels))


def accuracy(logits: chex.Array, labels: chex.Array) -> chex.Array:
  """Returns the share of items whose greatest logit is their label's; logits `[B, N]`, labels `[B]`."""
  chex.assert_rank([logits, labels], [2, 1])
  return jnp.mean((jnp.argmax(logits, -1) == labels).astype(logits.dtype))
