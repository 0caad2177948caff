"""Temperatures and calibration errors, against data whose calibration is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import conv_learner, random_bank
from scipy.special import softmax

import metasgd_jax as ms
from experiments import calibration


def drawn(scale, count=20_000):
  """Logits, which are `scale` times those of the distribution from which the labels are drawn."""
  rng = np.random.default_rng(0)
  logits = rng.normal(0, 1.5, (count, 4)).astype(np.float32)
  labels = (softmax(logits, 1).cumsum(1) < rng.uniform(size=(count, 1))).sum(1)
  return logits * scale, np.minimum(labels, 3)


def errors(logits, labels, temperature=1.0):
  """Both calibration errors of one task."""
  values = calibration.accuracy_and_gaps(jnp.asarray(logits), jnp.asarray(labels), temperature=temperature)
  found = calibration.calibration_errors(np.asarray(values)[None, 1:])
  return found['calibration_error'], found['calibration_error_uncalibrated']


@pytest.mark.parametrize('scale', [0.2, 1.0, 6.0])
def test_the_best_temperature_is_the_scale_of_the_logits(scale):
  logits, labels = drawn(scale)
  found = calibration.best_temperature(logits, labels)
  assert found == pytest.approx(scale, rel=0.05)
  error, uncalibrated = errors(logits, labels, found)
  assert error < 0.01
  assert scale == 1 or uncalibrated > 0.05


def test_the_error_is_the_mean_gap_between_probability_and_accuracy():
  certain = np.log(np.array([[0.9, 0.1]] * 10))
  assert errors(certain, np.array([0] * 9 + [1]))[1] == pytest.approx(0, abs=1e-6)
  assert errors(certain, np.array([0] * 5 + [1] * 5))[1] == pytest.approx(0.4, abs=1e-6)
  two_bins = np.log(np.array([[0.9, 0.1]] * 10 + [[0.6, 0.4]] * 10))
  labels = np.array([0] * 5 + [1] * 5 + [0] * 8 + [1] * 2)
  assert errors(two_bins, labels)[1] == pytest.approx((0.4 + 0.2) / 2, abs=1e-6)
  assert errors(2 * two_bins, labels, temperature=2.0)[0] == pytest.approx((0.4 + 0.2) / 2, abs=1e-6)


def test_the_gaps_of_tasks_are_joined_before_they_become_an_error():
  logits = np.log(np.array([[0.9, 0.1]] * 5))
  tasks = [calibration.bin_gaps(jnp.asarray(logits), jnp.asarray(labels)) for labels in ([0] * 5, [0, 0, 0, 0, 1])]
  gaps = np.stack([np.concatenate([task, task]) for task in tasks])  # 100% and 80% right, and 90% sure.
  assert calibration.calibration_errors(gaps)['calibration_error'] == pytest.approx(0, abs=1e-6)


def test_the_metric_begins_with_the_accuracy_and_has_the_same_size_for_many_classes():
  logits, labels = drawn(1.0, count=50)
  values = calibration.accuracy_and_gaps(jnp.asarray(logits), jnp.asarray(labels), temperature=0.5)
  assert values[0] == pytest.approx(np.mean(logits.argmax(1) == labels))
  shapes = jax.ShapeDtypeStruct((6345, 423), jnp.bfloat16), jax.ShapeDtypeStruct((6345,), jnp.int32)
  wide = jax.eval_shape(lambda x, y: calibration.accuracy_and_gaps(x, y, temperature=0.5), *shapes)
  assert (wide.shape, wide.dtype) == (values.shape, jnp.float32)
  assert wide.size == 1 + 2 * calibration.BINS


def test_wrong_answers_at_every_temperature_give_the_highest_one():
  assert calibration.best_temperature(np.array([[5.0, 0.0]] * 4), np.array([1] * 4)) == pytest.approx(100, rel=1e-3)


@pytest.mark.parametrize('count', [8, 98])
def test_right_answers_alone_are_as_sure_as_one_wrong_answer_among_two_more_allows(count):
  logits = np.array([[5.0, 0.0]] * count)
  found = calibration.best_temperature(logits, np.zeros(count, int))
  assert softmax(logits / found, 1)[0, 0] == pytest.approx(1 - 1 / (count + 2), rel=1e-3)


def test_logits_that_are_not_finite_are_refused():
  logits = np.array([[5.0, 0.0], [np.nan, 0.0], [np.inf, 0.0]])
  with pytest.raises(ValueError, match='finite logits, but 2 of 3 predictions'):
    calibration.best_temperature(logits, np.zeros(3, int))


@pytest.mark.slow
def test_the_last_step_alone_is_that_of_all_steps():
  learner = conv_learner(steps=2)
  tasks = ms.tasks.few_shot(random_bank(size=16), way=5, shot=1, query=1)
  key = jax.random.key(0)
  episode = tasks.episode(tasks.sample(key), key)
  meta = jax.jit(learner.init)(key, episode)
  alone = calibration.last_step(learner)
  assert alone == calibration.last_step(learner)  # Equal learners share their programs.
  found, every = (
    ms.evaluate(one, meta, tasks, key, metric_fn=calibration.with_labels, num_tasks=3)[:, 0] for one in (alone, learner)
  )
  assert (found.shape, every.shape) == ((3, 1, 5, 6), (3, 3, 5, 6))
  np.testing.assert_allclose(found[:, 0], every[:, -1], rtol=1e-4, atol=1e-5)
  logits, labels = calibration.split(found)
  np.testing.assert_array_equal(logits[:5], found[0, 0, :, :5])
  assert sorted(labels[:5].tolist()) == [0, 1, 2, 3, 4]
