"""Temperatures and calibration errors, against data whose calibration is known."""

import numpy as np
import pytest
from scipy.special import softmax

from experiments import calibration


def drawn(scale, count=20_000):
  """Logits, which are `scale` times those of the distribution from which the labels are drawn."""
  rng = np.random.default_rng(0)
  logits = rng.normal(0, 1.5, (count, 4)).astype(np.float32)
  labels = (softmax(logits, 1).cumsum(1) < rng.uniform(size=(count, 1))).sum(1)
  return logits * scale, np.minimum(labels, 3)


@pytest.mark.parametrize('scale', [0.2, 1.0, 6.0])
def test_the_best_temperature_is_the_scale_of_the_logits(scale):
  logits, labels = drawn(scale)
  found = calibration.best_temperature(logits, labels)
  assert found == pytest.approx(scale, rel=0.05)
  assert calibration.calibration_error(logits / found, labels) < 0.01


def test_the_error_is_the_mean_gap_between_probability_and_accuracy():
  certain = np.log(np.array([[0.9, 0.1]] * 10))
  assert calibration.calibration_error(certain, np.array([0] * 9 + [1])) == pytest.approx(0, abs=1e-9)
  assert calibration.calibration_error(certain, np.array([0] * 5 + [1] * 5)) == pytest.approx(0.4)
  two_bins = np.log(np.array([[0.9, 0.1]] * 10 + [[0.6, 0.4]] * 10))
  labels = np.array([0] * 5 + [1] * 5 + [0] * 8 + [1] * 2)
  assert calibration.calibration_error(two_bins, labels) == pytest.approx((0.4 + 0.2) / 2)


def test_wrong_answers_at_every_temperature_give_the_highest_one():
  assert calibration.best_temperature(np.array([[5.0, 0.0]] * 4), np.array([1] * 4)) == pytest.approx(100, rel=1e-3)


def test_accuracies_and_predictions_of_one_array():
  logits = np.array([[[2.0, 1.0], [0.0, 3.0], [1.0, 0.0]]])
  values = np.concatenate([logits, np.array([[[0.0], [0.0], [0.0]]])], -1)[None]  # [T, k + 1, Q, N + 1]
  assert calibration.accuracies(values).tolist() == [[pytest.approx(2 / 3)]]
  found, labels = calibration.split(values)
  assert np.array_equal(found, logits[0])
  assert labels.tolist() == [0, 0, 0]
