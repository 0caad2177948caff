"""Calibration: probabilities of a few-shot classifier that mean what they say (Guo et al. 2017)."""

import chex
import jax
import jax.numpy as jnp
import numpy as np

import metasgd_jax as ms
from metasgd_jax.types import equal_partial

BINS = 15
"""Number of bins of the calibration error, as in Guo et al. 2017, section 5."""
RANGE = (0.01, 100.0)
"""The temperatures among which `best_temperature` looks for the best one."""


def accuracy_and_gaps(logits: chex.Array, labels: chex.Array, *, temperature: float) -> chex.Array:
  """A `metric_fn` of `ms.evaluate`: the accuracy, and the gaps of both calibration errors, `[1 + 2 · BINS]`.

  The first gaps are those of softmax(logits / temperature), and the last gaps are those of softmax(logits). The size
  of the result does not depend on the numbers of classes and of query items.
  """
  accuracy = ms.losses.accuracy(logits, labels)
  gaps = [bin_gaps(logits, labels, t) for t in (temperature, 1.0)]
  return jnp.concatenate([accuracy[None].astype(gaps[0].dtype), *gaps])


def bin_gaps(logits: chex.Array, labels: chex.Array, temperature: float = 1.0) -> chex.Array:
  """Returns the gap of each bin, `[BINS]`: the sum of (right − probability) over its predictions, divided by Q.

  The Q predictions are put into `BINS` bins of equal width by their probability. `right` is 1 for a right prediction
  and 0 for a wrong one.
  """
  wide = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
  probability = jnp.max(jax.nn.softmax(wide / temperature), -1)
  right = (jnp.argmax(logits, -1) == labels).astype(wide.dtype)
  bins = jnp.minimum((probability * BINS).astype(jnp.int32), BINS - 1)
  return jnp.mean(jax.nn.one_hot(bins, BINS, dtype=wide.dtype) * (right - probability)[:, None], 0)


def calibration_errors(gaps: np.ndarray) -> dict[str, float]:
  """Returns the calibration errors with and without the temperature, as a part of a row of results.

  An error is the expected calibration error, from 0 to 1 (Guo et al. 2017, equation 3): the mean over predictions of
  the difference between the accuracy and the mean probability of the bin.

  Args:
    gaps: Gaps of T tasks from `accuracy_and_gaps`, `[T, 2 · BINS]`. All tasks have the same number of query items.
  """
  errors = np.abs(gaps.astype(np.float64).mean(0)).reshape(2, BINS).sum(1)
  return dict(zip(('calibration_error', 'calibration_error_uncalibrated'), map(float, errors), strict=True))


def with_labels(logits: chex.Array, labels: chex.Array) -> chex.Array:
  """A `metric_fn` of `ms.evaluate`: the logits `[Q, N]` beside the labels, `[Q, N + 1]`; see `split`."""
  wide = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))  # bfloat16 would round labels above 256.
  return jnp.concatenate([wide, labels[:, None].astype(wide.dtype)], 1)


def split(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns the logits `[n, N]` and the labels `[n]` of all query items.

  `values` are those of the metric `with_labels` on T tasks, `[T, 1, Q, N + 1]`, for a learner from `last_step`.
  """
  flat = values.reshape(-1, values.shape[-1])
  return flat[:, :-1], flat[:, -1].astype(int)


def last_step(learner: ms.Learner) -> ms.Learner:
  """Returns a learner that is evaluated after the last inner step only, so that a large metric is computed once."""
  return learner._replace(path=equal_partial(_adapted_alone, adapt=learner.adapt))


def _adapted_alone(meta, support, key, *, adapt):
  return jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], adapt(meta, support, key))


def best_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
  """Returns the temperature T in `RANGE` with the lowest cross-entropy of softmax(logits / T).

  The labels are smoothed by 1 / (n + 2), where n is the number of predictions, as in Platt 1999, section 2.2. Without
  smoothing, the best T would be the lowest one if all n predictions are right, and every probability would be 1. The
  cross-entropy is convex in 1 / T, so a search over log T finds its minimum.

  Args:
    logits: Logits, `[n, N]`.
    labels: Labels, `[n]`.

  Raises:
    ValueError: if a logit is not finite.
  """
  from scipy.optimize import minimize_scalar
  from scipy.special import log_softmax

  logits = logits.astype(np.float64)
  if bad := int(np.sum(~np.isfinite(logits).all(1))):
    raise ValueError(
      f'a temperature needs finite logits, but {bad} of {len(logits)} predictions have logits that are not finite; '
      'train with a lower learning rate, or clip the gradient'
    )
  smoothing = 1 / (len(labels) + 2)
  targets = np.full(logits.shape, smoothing / (logits.shape[1] - 1))
  targets[np.arange(len(labels)), labels] = 1 - smoothing

  def cross_entropy(log_temperature: float) -> float:
    return float(-np.mean(np.sum(targets * log_softmax(logits / np.exp(log_temperature), 1), 1)))

  return float(np.exp(minimize_scalar(cross_entropy, bounds=np.log(RANGE), method='bounded').x))
