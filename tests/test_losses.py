import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from problems import saying

import metasgd_jax as ms
from metasgd_jax.losses import accuracy, cross_entropy, masked, mean_squared_error, per_token

LABELS = np.array([[0, 1, 2], [2, 0, 1]], np.int32)
LOGITS = 9 * np.eye(3, dtype=np.float32)[LABELS]


def test_of_tokens_it_is_the_metric_of_all_of_them():
  rng = np.random.default_rng(0)
  logits, labels = rng.normal(size=(2, 4, 3)).astype(np.float32), rng.integers(0, 3, (2, 4), np.int32)
  log_p = scipy.special.log_softmax(logits, -1)
  expected = -np.mean([log_p[b, i, labels[b, i]] for b in range(2) for i in range(4)])
  np.testing.assert_allclose(jax.jit(per_token(cross_entropy))(logits, labels), expected, rtol=1e-6)


@pytest.mark.parametrize('targets', [LABELS.T, LABELS[:, :2], (LABELS, np.ones((3, 2), bool))])
def test_tokens_and_targets_must_be_of_one_shape(targets):
  with pytest.raises(ValueError, match=saying('one entry per token', '(2, 3) for outputs (2, 3, 3)', 'got (')):
    per_token(accuracy)(LOGITS, targets)


def test_padded_tokens():
  wrong = np.array([[0, 1, 0], [2, 0, 0]], np.int32)
  there = np.array([[True, True, False], [True, True, True]])
  np.testing.assert_allclose(jax.jit(per_token(masked(accuracy)))(LOGITS, (wrong, there)), 4 / 5, rtol=1e-6)


@pytest.mark.parametrize('metric', [mean_squared_error, lambda outputs, targets: jnp.mean(jnp.abs(outputs - targets))])
def test_a_mask_of_all_items_is_the_plain_metric_in_half_precision(metric):
  outputs, y = np.full((75, 1), 30.0, np.float16), np.zeros((75, 1), np.float16)
  plain, padded = metric(*jax.device_put((outputs, y))), masked(metric)(outputs, (y, np.ones(75, bool)))
  assert np.isfinite(plain)
  assert (padded, padded.dtype) == (plain, plain.dtype)


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16, jnp.float32])
def test_accuracy_is_counted_in_single_precision(dtype):
  logits, labels = np.tile(np.array([[1, 0]], dtype), (75, 1)), np.arange(75) == 0
  np.testing.assert_allclose(jax.jit(accuracy)(logits, labels.astype(np.int32)), 74 / 75, rtol=1e-6)


def test_a_shape_that_would_be_broadcast_is_refused():
  with pytest.raises(ValueError, match=saying('outputs and targets', 'same shape', 'got (3, 1) and (3,)')):
    mean_squared_error(np.ones((3, 1)), np.ones(3))
  with pytest.raises(ValueError, match=saying('logits', '[B, N]', 'labels', 'got (3, 2) and (2,)')):
    ms.losses.accuracy(np.ones((3, 2)), np.zeros(2, int))


@pytest.mark.parametrize('label', [-1, 3, 7])
@pytest.mark.parametrize('metric', [cross_entropy, accuracy])
def test_a_label_that_is_no_class_is_refused_or_gives_nan(metric, label):
  logits, labels = LOGITS[0], np.array([0, label, 1])
  with pytest.raises(ValueError, match=saying('labels', 'from 0 to 2', f'got {label}', 'renumber')):
    metric(logits, labels)
  value, slope = jax.jit(jax.value_and_grad(metric))(logits, labels)
  assert np.isnan(value)
  assert metric is accuracy or np.isnan(slope[1]).all()


@pytest.mark.parametrize(
  'metric', [cross_entropy, accuracy, lambda *given: masked(accuracy)(given[0], (given[1], np.ones(3, bool)))]
)
def test_labels_are_numbers_that_jax_can_hold(metric):
  assert np.isfinite(metric(LOGITS[0], [0, 2, 1]))
  with pytest.raises(ValueError, match=saying('label', '4294967296', 'renumber')):
    metric(LOGITS[0], np.array([0, 2**32, 1]))
  with pytest.raises(ValueError, match=saying('labels', "['a', 'b', 'c']", 'encode')):
    metric(LOGITS[0], ['a', 'b', 'c'])
  with pytest.raises(ValueError, match=saying('labels', '[[0], [1, 2], 3]', 'encode')):
    metric(LOGITS[0], [[0], [1, 2], 3])
  assert np.isfinite(jax.jit(lambda label: metric(LOGITS[0], [label, 2, label]))(1))


def test_padding_may_have_any_label():
  labels, mask = np.array([0, -100, 2]), np.array([True, False, True])
  value, slope = jax.jit(jax.value_and_grad(masked(cross_entropy)))(LOGITS[0][[0, 0, 2]], (labels, mask))
  np.testing.assert_allclose(value, cross_entropy(LOGITS[0][[0, 2]], np.array([0, 2])), rtol=1e-6)
  assert np.isfinite(slope).all()
  assert not slope[1].any()
