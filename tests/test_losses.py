import jax
import jax.numpy as jnp
import numpy as np
import pytest

import metasgd_jax as ms
from metasgd_jax.losses import accuracy, cross_entropy, masked, mean_squared_error, per_token

LABELS = jnp.array([[0, 1, 2], [2, 0, 1]])
LOGITS = 9.0 * jax.nn.one_hot(LABELS, 3)


def test_of_tokens_it_is_the_metric_of_all_of_them():
  logits = jax.random.normal(jax.random.key(0), (2, 4, 3))
  labels = jax.random.randint(jax.random.key(1), (2, 4), 0, 3)
  expected = -np.mean([jax.nn.log_softmax(logits)[b, i, labels[b, i]] for b in range(2) for i in range(4)])
  np.testing.assert_allclose(per_token(cross_entropy)(logits, labels), expected, rtol=1e-6)


@pytest.mark.parametrize('targets', [LABELS.T, LABELS[:, :2], (LABELS, jnp.ones((3, 2), bool))])
def test_tokens_and_targets_must_be_of_one_shape(targets):
  with pytest.raises(ValueError, match=r'targets must be one a token, \(2, 3\) for outputs \(2, 3, 3\), got \('):
    per_token(accuracy)(LOGITS, targets)


def test_padded_tokens():
  wrong = LABELS.at[0, 2].set(0).at[1, 2].set(0)
  there = jnp.array([[True, True, False], [True, True, True]])
  np.testing.assert_allclose(per_token(masked(accuracy))(LOGITS, (wrong, there)), 4 / 5, rtol=1e-6)


@pytest.mark.parametrize('metric', [mean_squared_error, lambda outputs, targets: jnp.mean(jnp.abs(outputs - targets))])
def test_a_mask_of_all_items_is_the_plain_metric_in_half_precision(metric):
  outputs, y = jnp.full((75, 1), 30.0, jnp.float16), jnp.zeros((75, 1), jnp.float16)
  plain, padded = metric(outputs, y), masked(metric)(outputs, (y, jnp.ones(75, bool)))
  assert jnp.isfinite(plain)
  assert (padded, padded.dtype) == (plain, plain.dtype)


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16, jnp.float32])
def test_accuracy_is_counted_in_single_precision(dtype):
  logits = jax.nn.one_hot(jnp.zeros(75, int), 2, dtype=dtype)
  np.testing.assert_allclose(accuracy(logits, jnp.zeros(75, int).at[0].set(1)), 74 / 75, rtol=1e-6)


def test_a_shape_that_would_be_broadcast_is_refused():
  with pytest.raises(ValueError, match=r'outputs and targets must have one shape, got \(3, 1\) and \(3,\)'):
    mean_squared_error(jnp.ones((3, 1)), jnp.ones(3))
  with pytest.raises(ValueError, match=r'logits must be \[B, N\] and labels \[B\], got \(3, 2\) and \(2,\)'):
    ms.losses.accuracy(jnp.ones((3, 2)), jnp.zeros(2, int))
