"""Calibration: probabilities of a few-shot classifier that mean what they say (Guo et al. 2017)."""

import chex
import jax.numpy as jnp
import numpy as np

BINS = 15
"""Number of bins of the calibration error, as in Guo et al. 2017, section 5."""
RANGE = (0.01, 100.0)
"""The temperatures among which `best_temperature` looks for the best one."""


def with_labels(logits: chex.Array, labels: chex.Array) -> chex.Array:
  """A `metric_fn` of `ms.evaluate`: the logits `[Q, N]` beside the labels, `[Q, N + 1]`; see `split`."""
  wide = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))  # bfloat16 would round labels above 256.
  return jnp.concatenate([wide, labels[:, None].astype(wide.dtype)], 1)


def accuracies(values: np.ndarray) -> np.ndarray:
  """Returns the accuracy on the query, `[…]`, given values of the metric `with_labels`, `[…, Q, N + 1]`."""
  return np.mean(np.argmax(values[..., :-1], -1) == values[..., -1], -1)


def split(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns the logits `[n, N]` and the labels `[n]` of all query items after the last inner step.

  `values` are those of the metric `with_labels` on T tasks, `[T, k + 1, Q, N + 1]`.
  """
  last = values[:, -1].reshape(-1, values.shape[-1])
  return last[:, :-1], last[:, -1].astype(int)


def best_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
  """Returns the temperature T in `RANGE` with the lowest cross-entropy of softmax(logits / T).

  The cross-entropy is convex in 1 / T, so a search over log T finds its minimum.
  """
  from scipy.optimize import minimize_scalar

  bounds = np.log(RANGE)
  found = minimize_scalar(lambda t: cross_entropy(logits / np.exp(t), labels), bounds=bounds, method='bounded')
  return float(np.exp(found.x))


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> float:
  """Returns the mean cross-entropy in nats."""
  from scipy.special import log_softmax

  return float(-np.mean(log_softmax(logits.astype(np.float64), 1)[np.arange(len(labels)), labels]))


def calibration_error(logits: np.ndarray, labels: np.ndarray) -> float:
  """Returns the expected calibration error, from 0 to 1 (Guo et al. 2017, equation 3).

  The predictions are put into `BINS` bins of equal width by their probability. The result is the mean over predictions
  of the difference between the accuracy and the mean probability of the bin.
  """
  from scipy.special import softmax

  probabilities = softmax(logits.astype(np.float64), 1)
  sure, right = probabilities.max(1), probabilities.argmax(1) == labels
  bins = np.minimum((sure * BINS).astype(int), BINS - 1)
  gaps = np.bincount(bins, right - sure, BINS)
  return float(np.abs(gaps).sum() / len(labels))
