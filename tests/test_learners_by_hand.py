"""Each learner of the comparison against NumPy: loops over items, entries and slots, from the papers' equations."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import assert_close, assert_trees_close, episodes, random_bank, relative_error, to_float64

import metasgd_jax as ms
from metasgd_jax.learners.mann import Memory, access
from metasgd_jax.learners.matching import cosine
from metasgd_jax.learners.meta_lstm import preprocess
from metasgd_jax.learners.siamese import pair_loss

WAY = 3
LOOSE = dict(rtol=2e-5, atol=2e-5)


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def softmax(x):
  e = np.exp(x - x.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def as_numpy(tree):
  return jax.tree.map(lambda a: np.asarray(a, np.float64), tree)


def linear(units=4):
  """An embedding that NumPy does as well: x @ W."""
  return ms.Model(
    init=lambda key, x: jax.random.normal(key, (int(np.prod(x.shape[1:])), units)) / 4,
    apply=lambda theta, x: x.reshape(x.shape[0], -1) @ theta,
  )


def embed(theta, x):
  return np.asarray(x, np.float64).reshape(len(x), -1) @ np.asarray(theta, np.float64)


@pytest.fixture(scope='module')
def episode():
  tasks = ms.tasks.few_shot(random_bank(size=4), way=WAY, shot=2, query=2)
  return jax.tree.map(lambda a: a[0], episodes(tasks, 1))


def lstm(p, c, h, x):
  """One step of flax's OptimizedLSTMCell by its parameters: gates i, f, g, o."""
  gate = lambda n: x @ p[f'i{n}']['kernel'] + h @ p[f'h{n}']['kernel'] + p[f'h{n}']['bias']
  c = sigmoid(gate('f')) * c + sigmoid(gate('i')) * np.tanh(gate('g'))
  return c, sigmoid(gate('o')) * np.tanh(c)


def test_prototypical_distances(episode):
  learner = ms.learners.prototypical(linear(), way=WAY)
  theta = learner.init(jax.random.key(0), episode)
  support, query = embed(theta, episode.support.x), embed(theta, episode.query.x)
  expected = np.zeros((len(query), WAY))
  for q in range(len(query)):
    for n in range(WAY):
      centre = np.mean([s for s, y in zip(support, episode.support.y, strict=True) if y == n], 0)
      expected[q, n] = -np.sum((query[q] - centre) ** 2)
  assert_close(learner.predict(learner.adapt(theta, episode.support, None), episode.query.x), expected, **LOOSE)


class TestMatching:
  def attention(self, f, g, labels, scale):
    """p(y | x, S) by loops over queries and supports."""
    p = np.zeros((len(f), WAY))
    for q in range(len(f)):
      cosines = np.array([f[q] @ s / (np.linalg.norm(f[q]) * np.linalg.norm(s)) for s in g])
      for weight, y in zip(softmax(scale * cosines), labels, strict=True):
        p[q, y] += weight
    return p

  def test_attention(self, episode):
    learner = ms.learners.matching(linear(), way=WAY, scale=7.0)
    meta = learner.init(jax.random.key(0), episode)
    expected = self.attention(
      embed(meta.theta, episode.query.x), embed(meta.theta, episode.support.x), np.asarray(episode.support.y), 7.0
    )
    found = learner.predict(learner.adapt(meta, episode.support, None), episode.query.x)
    assert_close(np.exp(found), expected, **LOOSE)
    loss = -np.mean(np.log(expected[np.arange(len(expected)), np.asarray(episode.query.y)]))
    assert_close(learner.loss(meta, episode, None)[0], loss, **LOOSE)

  def test_full_context_embeddings(self, episode):
    learner = ms.learners.matching(linear(), way=WAY, full_context=True, read_steps=3)
    meta = learner.init(jax.random.key(0), episode)
    both = as_numpy(meta.support_context)
    support, units = embed(meta.theta, episode.support.x), 4
    zero = np.zeros(units)
    contexts = []
    for name, order in (('OptimizedLSTMCell_0', 1), ('OptimizedLSTMCell_1', -1)):
      c, h, outputs = zero, zero, []
      for x in support[::order]:
        c, h = lstm(both[name], c, h, x)
        outputs.append(h)
      contexts.append(np.array(outputs)[::order])
    g = contexts[0] + contexts[1] + support
    p = as_numpy(meta.query_context)['OptimizedLSTMCell_0']
    f = []
    for x in embed(meta.theta, episode.query.x):
      c, h = zero, zero
      for _ in range(3):
        read = softmax(h @ g.T) @ g
        c, out = lstm(p, c, h, np.concatenate([x, read]))
        h = out + x
      f.append(h)
    expected = self.attention(np.array(f), g, np.asarray(episode.support.y), 10.0)
    found = learner.predict(learner.adapt(meta, episode.support, None), episode.query.x)
    assert_close(np.exp(found), expected, **LOOSE)

  def test_the_temperature_is_learned(self, episode):
    learner = ms.learners.matching(linear(), way=WAY)
    meta = learner.init(jax.random.key(0), episode)
    grad = jax.grad(lambda m: learner.loss(m, episode, None)[0])(meta)
    assert abs(float(grad.log_scale)) > 1e-6

  def test_a_row_of_zeros_has_no_cosine_and_a_gradient(self):
    a, b = jnp.zeros((2, 3)), jnp.ones((1, 3))
    assert np.array_equal(cosine(a, b), [[0], [0]])
    assert np.all(np.isfinite(jax.grad(lambda a: cosine(a, b).sum())(a)))


class TestSiamese:
  def test_pairs(self, episode):
    learner = ms.learners.siamese(linear(), way=WAY)
    meta = learner.init(jax.random.key(0), episode)
    meta = meta._replace(weights=jnp.array([-0.5, 0.2, -1.0, -0.1]), bias=jnp.float32(0.3))
    support, query = embed(meta.theta, episode.support.x), embed(meta.theta, episode.query.x)
    w, same, different = np.asarray(meta.weights, np.float64), [], []
    nearest = np.full((len(query), WAY), -np.inf)
    for q, y in zip(range(len(query)), np.asarray(episode.query.y), strict=True):
      for s, label in zip(support, np.asarray(episode.support.y), strict=True):
        logit = w @ np.abs(query[q] - s) + 0.3
        nearest[q, label] = max(nearest[q, label], logit)
        p = sigmoid(logit)
        same.append(-np.log(p)) if y == label else different.append(-np.log(1 - p))
    assert_close(learner.predict(learner.adapt(meta, episode.support, None), episode.query.x), nearest, **LOOSE)
    assert_close(learner.loss(meta, episode, None)[0], (np.mean(same) + np.mean(different)) / 2, **LOOSE)

  def test_pairs_of_one_kind_alone(self):
    logits = jnp.array([[1.0, -2.0]])
    assert np.isfinite(pair_loss(logits, jnp.array([[True, True]])))
    assert np.isfinite(pair_loss(logits, jnp.array([[False, False]])))

  def test_kochs_twins_are_the_papers(self):
    model = ms.nn.from_linen(ms.nn.KochNet())
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 105, 105, 1)))
    kernels = [shapes[f'Conv_{i}']['kernel'].shape for i in range(4)]
    assert kernels == [(10, 10, 1, 64), (7, 7, 64, 128), (4, 4, 128, 128), (4, 4, 128, 256)]
    assert shapes['Dense_0']['kernel'].shape == (9216, 4096)
    least = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 65, 65, 1)))
    assert least['Dense_0']['kernel'].shape == (256, 4096)
    with pytest.raises(ValueError, match='KochNet takes images .* of at least 65x65 .*, got'):
      model.init(jax.random.key(0), jnp.zeros((1, 65, 64, 1)))


class TestMann:
  def test_memory(self):
    """Three accesses of a small memory, slot by slot."""
    rng = np.random.default_rng(0)
    slots, width, heads = 6, 4, 2
    state = Memory(
      jnp.asarray(rng.normal(size=(slots, width)), jnp.float32),
      jnp.asarray(rng.uniform(size=slots), jnp.float32),
      jnp.asarray(softmax(rng.normal(size=(heads, slots))), jnp.float32),
      jnp.zeros(heads * width),
    )
    rows, usage, read_weights = (np.asarray(a, np.float64) for a in state[:3])
    for _ in range(3):
      keys, gates = rng.normal(size=(heads, width)), rng.normal(size=heads)
      state = access(state, jnp.asarray(keys, jnp.float32), jnp.asarray(gates, jnp.float32))
      order = np.argsort(usage, kind='stable')
      least_used = np.zeros(slots)
      least_used[order[:heads]] = 1
      shares = [sigmoid(gate) for gate in gates]
      write = np.array([a * r + (1 - a) * least_used for a, r in zip(shares, read_weights, strict=True)])
      rows = rows.copy()
      rows[order[0]] = 0
      for slot in range(slots):
        for head in range(heads):
          rows[slot] += write[head, slot] * keys[head]
      read_weights = np.array([
        softmax(np.array([key @ row / np.linalg.norm(key) / np.linalg.norm(row) for row in rows])) for key in keys
      ])  # fmt: skip
      usage = 0.99 * usage + read_weights.sum(0) + write.sum(0)
      assert_close(state.rows, rows, **LOOSE)
      assert_close(state.weights, read_weights, **LOOSE)
      assert_close(state.usage, usage, **LOOSE)
      assert_close(state.read, np.concatenate([w @ rows for w in read_weights]), **LOOSE)

  @pytest.mark.parametrize('kind', ['memory', 'plain'])
  def test_the_sequence_is_label_shifted(self, kind, episode):
    """An item's answer depends on earlier labels, not on its own or later ones."""
    cell = {
      'memory': ms.learners.MemoryCell(WAY, units=8, slots=8, width=4, heads=2), 'plain': ms.learners.PlainCell(WAY, 8)
    }[kind]  # fmt: skip
    learner = ms.learners.mann(way=WAY, cell=cell, size=None)
    meta = learner.init(jax.random.key(0), episode)
    x, y = episode.support

    def answer(y, i):
      """The answer at the i-th item, from what was seen before it."""
      adapted = learner.adapt(meta, ms.Batch(x[:i], y[:i]), None)
      return learner.predict(adapted, x[i : i + 1])[0]

    first = answer(y, 3)
    assert not np.allclose(first, answer(y.at[2].set((y[2] + 1) % WAY), 3))  # The label just before.
    assert not np.allclose(first, answer(y.at[0].set((y[0] + 1) % WAY), 3), atol=1e-7)
    # The same answers come from one pass over the whole sequence, in the order that loss draws.
    order = jax.random.permutation(jax.random.key(5), 12)
    both = [jnp.concatenate(parts) for parts in zip(*episode, strict=True)]
    x, y = (a[order] for a in both)
    logits = jnp.stack([answer(y, i) for i in range(1, 12)])
    loss, info = learner.loss(meta, episode, jax.random.key(5))
    start = learner.init(jax.random.key(0), episode)
    zero_label = jnp.concatenate([x[0].reshape(-1), jnp.zeros(WAY)])
    before = cell.apply({'params': start}, cell.start(), zero_label)[1]
    logits = jnp.concatenate([before[None], logits])
    assert_close(loss, ms.losses.cross_entropy(logits, y), **LOOSE)
    right = np.argmax(logits, -1) == np.asarray(y)
    for n in range(4):
      nth = [i for i in range(12) if np.sum(np.asarray(y)[:i] == int(y[i])) == n]
      assert len(nth) == WAY
      assert_close(info[f'instance_{n + 1}'], right[np.array(nth)].mean())

  def test_images_are_scaled(self, episode):
    learner = ms.learners.mann(way=WAY, size=2)
    meta = learner.init(jax.random.key(0), episode)
    inputs = meta['OptimizedLSTMCell_0']['ii']['kernel'].shape[0]
    assert inputs == 2 * 2 + WAY + 4 * 40

  def test_the_papers_sizes(self):
    cell = ms.learners.MemoryCell(5)
    assert (cell.units, cell.slots, cell.width, cell.heads, cell.decay) == (200, 128, 40, 4, 0.99)

  def test_a_key_is_needed(self, episode):
    learner = ms.learners.mann(way=WAY)
    with pytest.raises(ValueError, match='the order of the sequence is random: loss needs a key, got None'):
      learner.loss(learner.init(jax.random.key(0), episode), episode, None)


class Linear(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dense(WAY)(x.reshape(x.shape[0], -1))


class TestMetaLstm:
  def test_preprocessing(self):
    x = np.array([2.0, -0.5, 1e-6, 0.0, -1e-5])
    expected = [
      [np.log(abs(v)) / 10, np.sign(v)] if abs(v) >= np.exp(-10) else [-1, np.exp(10) * v] for v in x
    ]  # fmt: skip
    assert_close(preprocess(jnp.asarray(x, jnp.float32)), expected, rtol=1e-5, atol=1e-5)

  def test_two_updates(self, episode):
    learner = ms.learners.meta_lstm(ms.nn.from_linen(Linear()), ms.losses.cross_entropy, steps=2, units=3)
    meta = learner.init(jax.random.key(0), episode)
    p = as_numpy(meta.optimizer)
    x = np.asarray(episode.support.x, np.float64).reshape(len(episode.support.x), -1)
    y = np.asarray(episode.support.y)
    theta = as_numpy(meta.theta)['Dense_0']
    b, w = theta['bias'], theta['kernel']
    state = {}
    for _ in range(2):
      probabilities = softmax(x @ w + b)
      loss = -np.mean(np.log(probabilities[np.arange(len(y)), y]))
      error = (probabilities - np.eye(WAY)[y]) / len(y)
      grads = {'b': error.sum(0), 'w': x.T @ error}
      new = {}
      for name, values in (('b', b), ('w', w)):
        out = np.zeros_like(values)
        for place in np.ndindex(values.shape):
          c, h, f, i = state.get((name, place), (np.zeros(3), np.zeros(3), 0.0, 0.0))
          seen = []
          for v in (grads[name][place], loss):
            seen += [np.log(abs(v)) / 10, np.sign(v)] if abs(v) >= np.exp(-10) else [-1, np.exp(10) * v]
          c, h = lstm(p['OptimizedLSTMCell_0'], c, h, np.array(seen))
          f = sigmoid(p['forget_weights'] @ [*h, values[place], f] + p['forget_bias'])
          i = sigmoid(p['input_weights'] @ [*h, values[place], i] + p['input_bias'])
          out[place] = f * values[place] - i * grads[name][place]
          state[name, place] = c, h, f, i
        new[name] = out
      b, w = new['b'], new['w']
    adapted = learner.adapt(meta, episode.support, None)
    assert_close(adapted['Dense_0']['bias'], b, **LOOSE)
    assert_close(adapted['Dense_0']['kernel'], w, **LOOSE)
    path = learner.path(meta, episode.support, None)
    assert_trees_close(jax.tree.map(lambda a: a[0], path), meta.theta)
    assert_trees_close(jax.tree.map(lambda a: a[-1], path), adapted)

  def test_it_starts_as_a_gradient_step(self, episode):
    learner = ms.learners.meta_lstm(ms.nn.from_linen(Linear()), ms.losses.cross_entropy)
    meta = learner.init(jax.random.key(0), episode)
    assert 4 < float(meta.optimizer['forget_bias']) < 6
    assert -5 < float(meta.optimizer['input_bias']) < -4

  def test_no_second_derivatives_are_taken(self, episode):
    """The outer gradient takes the losses and gradients that the LSTM sees as constants."""
    learner = ms.learners.meta_lstm(ms.nn.from_linen(Linear()), ms.losses.cross_entropy, steps=1, units=3)
    rng = np.random.default_rng(0)
    meta = learner.init(jax.random.key(0), episode)
    draw = lambda tree: jax.tree.map(lambda a: rng.normal(size=a.shape), tree)
    # Gates half open and with large weights of θ, so that each of the terms counts.
    theta, p, along = draw(meta.theta), draw(meta.optimizer), draw(meta.theta)
    x = np.asarray(episode.support.x, np.float64).reshape(len(episode.support.x), -1)
    y = np.asarray(episode.support.y)

    def step(theta, seen):
      """A step from θ, with the loss and the gradient at `seen`."""
      probabilities = softmax(x @ seen['kernel'] + seen['bias'])
      loss = -np.mean(np.log(probabilities[np.arange(len(y)), y]))
      error = (probabilities - np.eye(WAY)[y]) / len(y)
      new = {}
      for name, grad in (('kernel', x.T @ error), ('bias', error.sum(0))):
        inputs = np.stack(
          [part for v in (grad, np.full(grad.shape, loss)) for part in (np.log(abs(v)) / 10, np.sign(v))]
        )
        zero = np.zeros((grad.size, 3))
        _, h = lstm(p['OptimizedLSTMCell_0'], zero, zero, inputs.reshape(4, -1).T)
        at = theta[name].ravel()
        f, i = (
          sigmoid(h @ p[f'{gate}_weights'][:3] + p[f'{gate}_weights'][3] * at + p[f'{gate}_bias'])
          for gate in ('forget', 'input')
        )
        new[name] = (f * at - i * grad.ravel()).reshape(grad.shape)
      return new

    def slope(function, h=1e-5):
      moved = lambda sign: {name: a + sign * h * along['Dense_0'][name] for name, a in theta['Dense_0'].items()}
      return jax.tree.map(lambda a, b: (a - b) / (2 * h), function(moved(1)), function(moved(-1)))

    with jax.enable_x64(True):
      adapted = lambda t: learner.adapt(meta._replace(theta=t, optimizer=p), to_float64(episode.support), None)
      value, moved = jax.jvp(adapted, (to_float64(theta),), (to_float64(along),))
    assert_trees_close(value['Dense_0'], step(theta['Dense_0'], theta['Dense_0']), rtol=1e-9, atol=1e-9)
    assert_trees_close(moved['Dense_0'], slope(lambda t: step(t, theta['Dense_0'])), rtol=1e-7, atol=1e-7)
    second_order = slope(lambda t: step(t, t))
    with jax.enable_x64(True):
      assert relative_error(second_order, moved['Dense_0']) > 0.05


class TestFineTuning:
  def test_the_floor_is_gradient_descent_by_hand(self, episode):
    learner = ms.learners.fine_tuning(linear(), classes=9, way=WAY, alpha=0.2, steps=3)
    meta = learner.init(jax.random.key(0), episode)
    theta = np.asarray(meta.theta, np.float64)
    x = np.asarray(episode.support.x, np.float64).reshape(len(episode.support.x), -1)
    y = np.asarray(episode.support.y)
    w, b = np.zeros((4, WAY)), np.zeros(WAY)
    for _ in range(3):
      features = x @ theta
      error = (softmax(features @ w + b) - np.eye(WAY)[y]) / len(y)
      theta, w, b = theta - 0.2 * x.T @ (error @ w.T), w - 0.2 * features.T @ error, b - 0.2 * error.sum(0)
    adapted = learner.adapt(meta, episode.support, None)
    assert_close(adapted.theta, theta, **LOOSE)
    assert_close(adapted.weights, w, **LOOSE)
    assert_close(adapted.bias, b, **LOOSE)

  def test_it_is_trained_on_all_classes(self):
    bank = random_bank(classes=6, size=4)
    learner = ms.learners.fine_tuning(linear(), classes=6, way=WAY)
    one = jax.tree.map(lambda a: a[0], episodes(ms.tasks.all_classes(bank, batch=7), 1))
    meta = learner.init(jax.random.key(0), one)
    features = embed(meta.theta, one.query.x)
    p = softmax(features @ np.asarray(meta.weights, np.float64))
    assert_close(learner.loss(meta, one, None)[0], -np.mean(np.log(p[np.arange(7), np.asarray(one.query.y)])), **LOOSE)


def test_an_ensemble_is_the_mean_of_its_members_probabilities(episode):
  learner = ms.meta_sgd(ms.nn.from_linen(Linear()), ms.losses.cross_entropy, steps=2)
  metas = [learner.init(jax.random.key(i), episode) for i in range(3)]
  together = ms.learners.ensemble(learner)
  meta = jax.tree.map(lambda *leaves: jnp.stack(leaves), *metas)
  expected = np.mean([
    softmax(np.asarray(learner.predict(learner.adapt(one, episode.support, None), episode.query.x), np.float64))
    for one in metas
  ], 0)  # fmt: skip
  found = together.predict(together.adapt(meta, episode.support, None), episode.query.x)
  assert_close(np.exp(found), expected, **LOOSE)
  path = together.path(meta, episode.support, None)
  at = lambda step: together.predict(jax.tree.map(lambda a: a[step], path), episode.query.x)
  assert_close(at(2), found, **LOOSE)
  assert not np.allclose(at(0), at(1))
