"""ResNet-12, the transformer, and the sequences that it is meta-trained on."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import assert_slopes_by_differences, episodes, saying, to_float64

import metasgd_jax as ms
from metasgd_jax.tasks.markov import MarkovConfig, markov_chains

CHAINS = MarkovConfig(tokens=4, length=6)
SMALL = dict(tokens=4, length=6, width=8, depth=2, heads=2)
OF_SEQUENCES = ms.losses.per_token(ms.losses.cross_entropy)


def entries(tree):
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


def pictures(count, size=16, depth=1):
  return jnp.asarray(np.random.default_rng(0).normal(size=(count, size, size, depth)), jnp.float32)


class TestResNet12:
  def test_has_the_papers_layers(self):
    """8 of 3 convolutions and 4 of shortcuts, at 84×84 in colour; 12.4 million parameters without the last layer."""
    model = ms.nn.from_linen(ms.nn.ResNet12(5))
    theta = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((2, 84, 84, 3)))
    widths, depth, expected = (64, 160, 320, 640), 3, 0
    for width in widths:
      expected += 9 * depth * width + 2 * 9 * width * width + depth * width + 4 * 2 * width
      depth = width
    assert entries(theta) == expected + 640 * 5 + 5
    assert expected == pytest.approx(12.4e6, rel=0.01)
    outputs = jax.eval_shape(model.apply, theta, jnp.ones((2, 84, 84, 3)))
    features = ms.nn.from_linen(ms.nn.ResNet12(None))
    assert outputs.shape == (2, 5)
    body = {name: layer for name, layer in theta.items() if name != 'Dense_0'}
    assert jax.eval_shape(features.apply, body, jnp.ones((2, 84, 84, 3))).shape == (2, 640)

  def test_a_block_by_hand(self):
    block = ms.nn.from_linen(ms.nn.ResidualBlock(3))
    x = pictures(2, 4, 2)
    rng = np.random.default_rng(1)
    theta = jax.jit(block.init)(jax.random.key(0), x)
    theta = jax.tree.map(lambda t: t + 0.1 * rng.normal(size=t.shape).astype(np.float32), jax.device_get(theta))

    def layer(theta, x, i):
      kernel, norm = theta[f'Conv_{i}']['kernel'], theta[f'BatchNorm_{i}']
      y = jax.lax.conv_general_dilated(x, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
      mean, variance = y.mean((0, 1, 2), keepdims=True), y.var((0, 1, 2), keepdims=True)
      scale, bias = (norm[n].reshape(1, 1, 1, -1) for n in ('scale', 'bias'))
      return (y - mean) / jnp.sqrt(variance + 1e-3) * scale + bias

    leaky = lambda a: jnp.where(a > 0, a, 0.1 * a)

    def by_hand(theta, x):
      y = x
      for i in (1, 2):
        y = leaky(layer(theta, y, i))
      y = leaky(layer(theta, y, 3) + layer(theta, x, 0))
      return y.reshape(2, 2, 2, 2, 2, 3).max((2, 4))

    both = jax.jit(lambda theta, x: (block.apply(theta, x), by_hand(theta, x)))
    np.testing.assert_allclose(*both(theta, x), rtol=1e-4, atol=1e-5)

  def test_is_inductive_with_the_supports_statistics(self):
    model = ms.nn.from_linen(ms.nn.ResNet12(3, widths=(4, 4)))
    x = pictures(4)

    @jax.jit
    def both(x):
      theta = model.init(jax.random.key(0), x)
      statistics = model.statistics(theta, x)
      return jax.lax.map(lambda one: model.apply(theta, one[None], statistics)[0], x), model.apply(theta, x)

    np.testing.assert_allclose(*both(x), rtol=1e-3, atol=1e-4)

  @pytest.mark.parametrize('shape', [(2, 16, 16), (2, 8, 16, 1)])
  def test_pictures_that_do_not_suit(self, shape):
    with pytest.raises(ValueError, match=saying('ResNet12', 'at least 16x16', shape)):
      ms.nn.from_linen(ms.nn.ResNet12()).init(jax.random.key(0), np.ones(shape, np.float32))


class TestTransformer:
  @pytest.mark.parametrize('causal', [True, False])
  def test_a_place_sees_none_after_it_where_it_is_causal(self, causal):
    model = ms.nn.from_linen(ms.nn.Transformer(**SMALL, causal=causal))
    x = np.random.default_rng(0).integers(0, 4, (3, 6))
    other = x.copy()
    other[:, 4] = (x[:, 4] + 1) % 4

    @jax.jit
    def both(*of):
      theta = model.init(jax.random.key(0), x)
      return [model.apply(theta, x) for x in of]

    before, after = both(x, other)
    assert before.shape == (3, 6, 4)
    assert np.allclose(before[:, :4], after[:, :4], atol=1e-6) == causal
    assert not np.allclose(before[:, 4:], after[:, 4:], atol=1e-4)

  def test_a_block_by_hand(self):
    block = ms.nn.from_linen(ms.nn.TransformerBlock(heads=2, hidden=5, causal=True))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 3, 4)), jnp.float32)
    theta = jax.device_get(jax.jit(block.init)(jax.random.key(0), x))
    norm = lambda a: (a - a.mean(-1, keepdims=True)) / np.sqrt(a.var(-1, keepdims=True) + 1e-6)
    a = np.asarray(x[0], np.float64)
    q, k, v = (norm(a) @ theta[n]['kernel'] for n in ('query', 'key', 'value'))
    seen = []
    for head in (slice(0, 2), slice(2, 4)):
      scores = np.where(np.tri(3), q[:, head] @ k[:, head].T / np.sqrt(2), -np.inf)
      weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
      seen.append(weights @ v[:, head])
    a = a + np.concatenate(seen, -1) @ theta['out']['kernel']
    inner = jax.jit(jax.nn.gelu)(norm(a) @ theta['dense_in']['kernel'])
    expected = a + inner @ theta['dense_out']['kernel']
    np.testing.assert_allclose(jax.jit(block.apply)(theta, x)[0], expected, rtol=1e-4, atol=1e-5)

  @pytest.mark.slow
  def test_meta_gradient_by_differences(self):
    """Of an inner loop that moves norms and a low-rank change of attention."""
    model = ms.adapt_only(ms.nn.from_linen(ms.nn.Transformer(**SMALL | dict(depth=1))), lambda name: 'norm' in name)
    learner = ms.meta_sgd(ms.low_rank(model, 2, lambda name: 'query' in name), OF_SEQUENCES, steps=2)
    with jax.enable_x64(True):
      one = jax.device_get(episodes(markov_chains(CHAINS, shot=2, query=2), 1))
      one = to_float64(jax.tree.map(lambda a: a[0], one))
      meta = to_float64(jax.jit(learner.init)(jax.random.key(0), one))
      noise = lambda t: np.asarray(t) + 0.1 * np.random.default_rng(t.size).normal(size=t.shape)
      meta = jax.tree.map(noise, meta)
      assert_slopes_by_differences(lambda m: learner.loss(m, one, None)[0], meta, h=1e-6)

  @pytest.mark.parametrize(
    ('x', 'options', 'parts'),
    [
      (np.ones((2, 3), np.float32), {}, ('integer tokens', '[B, L]', 'float32')),
      (np.ones((2, 7), int), {}, ('6 tokens', 'got 7', 'length')),
      (np.ones((2, 3), int), dict(heads=3), ('multiple', 'width=8', 'heads=3')),
    ],
  )
  def test_what_does_not_suit(self, x, options, parts):
    with pytest.raises(ValueError, match=saying(*parts)):
      ms.nn.from_linen(ms.nn.Transformer(**{**SMALL, **options})).init(jax.random.key(0), x)


class Masked(nn.Module):
  @nn.compact
  def __call__(self, x):
    features = nn.Embed(5, 3)(x['tokens']) * x['mask'][..., None]
    return nn.Dense(2)(features.sum(1))


def test_a_linen_module_takes_a_pytree_of_unlike_arrays():
  x = {'tokens': np.array([[0, 1, 4], [2, 3, 0]]), 'mask': np.array([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0]], np.float32)}
  model = ms.nn.from_linen(Masked())
  theta = model.init(jax.random.key(0), x)
  other = x | {'tokens': np.array([[0, 1, 0], [2, 3, 0]])}
  assert np.array_equal(model.apply(theta, x), model.apply(theta, other))
  assert model.apply(theta, x).shape == (2, 2)


class TestMarkovChains:
  def test_sequences_follow_the_chain(self):
    tasks = markov_chains(MarkovConfig(tokens=3, length=400, concentration=2.0), shot=20, query=20)
    task = jax.jit(tasks.sample)(jax.random.key(0))
    rows = np.exp(np.asarray(task.log_transitions))
    np.testing.assert_allclose(rows.sum(1), 1, rtol=1e-5)
    one = jax.jit(tasks.episode)(task, jax.random.key(1))
    assert one.support.x.shape == one.support.y.shape == (20, 400)
    np.testing.assert_array_equal(one.query.x[:, 1:], one.query.y[:, :-1])
    counts = np.zeros((3, 3))
    np.add.at(counts, (np.ravel(one.support.x), np.ravel(one.support.y)), 1)
    np.testing.assert_allclose(counts / counts.sum(1, keepdims=True), rows, atol=0.03)
    assert not np.array_equal(one.support.x, one.query.x)

  def test_the_chain_itself_is_the_best_there_is(self):
    tasks = markov_chains(shot=1, query=500)

    @jax.jit
    def losses(keys):
      query = tasks.episode(tasks.sample(keys[0]), jax.random.key(1)).query
      return jax.lax.map(lambda key: OF_SEQUENCES(tasks.sample(key)(query.x), query.y), keys)

    best, *others = losses(jax.vmap(jax.random.key)(np.arange(3, 8)))
    assert len(others) == 4
    assert 0 < best < min(*others, np.log(8))

  def test_low_concentrations_stay_finite(self):
    task = jax.jit(markov_chains(MarkovConfig(concentration=1e-3), shot=1, query=1).sample)(jax.random.key(0))
    assert np.all(np.isfinite(task.log_transitions))

  @pytest.mark.parametrize(
    ('options', 'parts'),
    [
      (dict(tokens=1), ('tokens', 'integer of at least 2', 'got 1')),
      (dict(length=0), ('length', 'integer of at least 1', 'got 0')),
      (dict(concentration=0.0), ('concentration', 'finite', 'above 0', '0.0')),
    ],
  )
  def test_bad_settings(self, options, parts):
    with pytest.raises(ValueError, match=saying(*parts)):
      MarkovConfig(**options)
    with pytest.raises(ValueError, match=saying('query', 'at least 1', 'got 0')):
      markov_chains(shot=1, query=0)
