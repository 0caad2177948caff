"""Each learner of the comparison against NumPy: loops over items, entries and slots, from the papers' equations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import (
  OneLayer,
  assert_close,
  assert_trees_close,
  episodes,
  random_bank,
  relative_error,
  saying,
  to_float64,
)

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
  return jax.tree.map(lambda a: a[0], jax.device_get(episodes(tasks, 1)))


def meta_of(learner, episode, seed=0):
  return jax.device_get(jax.jit(learner.init)(jax.random.key(seed), episode))


def answers_and_loss(learner, meta, episode):
  """What is predicted of the query, and the loss."""

  @jax.jit
  def both(meta, episode):
    adapted = learner.adapt(meta, episode.support, None)
    return learner.predict(adapted, episode.query.x), learner.loss(meta, episode, None)[0]

  return jax.device_get(both(meta, episode))


def lstm(p, c, h, x):
  """One step of flax's OptimizedLSTMCell by its parameters: gates i, f, g, o."""
  gate = lambda n: x @ p[f'i{n}']['kernel'] + h @ p[f'h{n}']['kernel'] + p[f'h{n}']['bias']
  c = sigmoid(gate('f')) * c + sigmoid(gate('i')) * np.tanh(gate('g'))
  return c, sigmoid(gate('o')) * np.tanh(c)


def test_prototypical_distances(episode):
  learner = ms.learners.prototypical(linear(), way=WAY)
  theta = meta_of(learner, episode)
  support, query = embed(theta, episode.support.x), embed(theta, episode.query.x)
  expected = np.zeros((len(query), WAY))
  for q in range(len(query)):
    for n in range(WAY):
      centre = np.mean([s for s, y in zip(support, episode.support.y, strict=True) if y == n], 0)
      expected[q, n] = -np.sum((query[q] - centre) ** 2)
  assert_close(answers_and_loss(learner, theta, episode)[0], expected, **LOOSE)


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
    meta = meta_of(learner, episode)
    expected = self.attention(
      embed(meta.theta, episode.query.x), embed(meta.theta, episode.support.x), np.asarray(episode.support.y), 7.0
    )
    found, found_loss = answers_and_loss(learner, meta, episode)
    assert_close(np.exp(found), expected, **LOOSE)
    loss = -np.mean(np.log(expected[np.arange(len(expected)), np.asarray(episode.query.y)]))
    assert_close(found_loss, loss, **LOOSE)

  def test_full_context_embeddings(self, episode):
    learner = ms.learners.matching(linear(), way=WAY, full_context=True, read_steps=3)
    meta = meta_of(learner, episode)
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
    assert_close(np.exp(answers_and_loss(learner, meta, episode)[0]), expected, **LOOSE)

  def test_the_temperature_is_learned(self, episode):
    learner = ms.learners.matching(linear(), way=WAY)
    meta = meta_of(learner, episode)
    grad = jax.jit(jax.grad(lambda m: learner.loss(m, episode, None)[0]))(meta)
    assert abs(float(grad.log_scale)) > 1e-6

  def test_a_row_of_zeros_has_no_cosine_and_a_gradient(self):
    a, b = np.zeros((2, 3), np.float32), np.ones((1, 3), np.float32)
    both = jax.jit(lambda a: (cosine(a, b), jax.grad(lambda a: cosine(a, b).sum())(a)))
    value, grad = both(a)
    assert np.array_equal(value, [[0], [0]])
    assert np.all(np.isfinite(grad))


class TestSiamese:
  def test_pairs(self, episode):
    learner = ms.learners.siamese(linear(), way=WAY)
    meta = meta_of(learner, episode)
    np.testing.assert_allclose(meta.weights, [-0.5] * 4)  # −1 / √D.
    meta = meta._replace(weights=np.float32([-0.5, 0.2, -1.0, -0.1]), bias=np.float32(0.3))
    support, query = embed(meta.theta, episode.support.x), embed(meta.theta, episode.query.x)
    w, same, different = np.asarray(meta.weights, np.float64), [], []
    nearest = np.full((len(query), WAY), -np.inf)
    for q, y in zip(range(len(query)), np.asarray(episode.query.y), strict=True):
      for s, label in zip(support, np.asarray(episode.support.y), strict=True):
        logit = w @ np.abs(query[q] - s) + 0.3
        nearest[q, label] = max(nearest[q, label], logit)
        p = sigmoid(logit)
        same.append(-np.log(p)) if y == label else different.append(-np.log(1 - p))
    found, loss = answers_and_loss(learner, meta, episode)
    assert_close(found, nearest, **LOOSE)
    assert_close(loss, (np.mean(same) + np.mean(different)) / 2, **LOOSE)

  def test_pairs_of_one_kind_alone(self):
    logits = np.float32([[1.0, -2.0]])
    for same in (True, False):
      assert np.isfinite(jax.jit(pair_loss)(logits, np.array([[same, same]])))

  def test_kochs_twins_are_the_papers(self):
    model = ms.nn.from_linen(ms.nn.KochNet())
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 105, 105, 1)))
    kernels = [shapes[f'Conv_{i}']['kernel'].shape for i in range(4)]
    assert kernels == [(10, 10, 1, 64), (7, 7, 64, 128), (4, 4, 128, 128), (4, 4, 128, 256)]
    assert shapes['Dense_0']['kernel'].shape == (9216, 4096)
    least = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 65, 65, 1)))
    assert least['Dense_0']['kernel'].shape == (256, 4096)
    with pytest.raises(ValueError, match=saying('KochNet', 'at least 65x65', '(1, 65, 64, 1)')):
      model.init(jax.random.key(0), np.zeros((1, 65, 64, 1)))


class TestMann:
  def test_memory(self):
    """Three accesses of a small memory, slot by slot."""
    rng = np.random.default_rng(0)
    slots, width, heads = 6, 4, 2
    state = Memory(
      np.float32(rng.normal(size=(slots, width))),
      np.float32(rng.uniform(size=slots)),
      np.float32(softmax(rng.normal(size=(heads, slots)))),
      np.zeros(heads * width, np.float32),
    )
    rows, usage, read_weights = (np.asarray(a, np.float64) for a in state[:3])
    compiled = jax.jit(access)
    for _ in range(3):
      keys, gates = rng.normal(size=(heads, width)), rng.normal(size=heads)
      state = compiled(state, np.float32(keys), np.float32(gates))
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
      read_weights = np.array(
        [softmax(np.array([key @ row / np.linalg.norm(key) / np.linalg.norm(row) for row in rows])) for key in keys]
      )
      usage = 0.99 * usage + read_weights.sum(0) + write.sum(0)
      assert_close(state.rows, rows, **LOOSE)
      assert_close(state.weights, read_weights, **LOOSE)
      assert_close(state.usage, usage, **LOOSE)
      assert_close(state.read, np.concatenate([w @ rows for w in read_weights]), **LOOSE)

  @pytest.mark.parametrize('query', [1, pytest.param(3, marks=pytest.mark.slow)])
  @pytest.mark.parametrize('kind', ['memory', 'plain'])
  def test_the_sequence_is_label_shifted(self, kind, query):
    """An item's answer depends on earlier labels, not on its own or later ones."""
    cell = {
      'memory': ms.learners.MemoryCell(WAY, units=8, slots=8, width=4, heads=2),
      'plain': ms.learners.PlainCell(WAY, 8),
    }[kind]
    learner = ms.learners.mann(way=WAY, cell=cell, size=None)
    tasks = ms.tasks.few_shot(random_bank(size=4), way=WAY, shot=1, query=query)
    items = WAY * (1 + query)
    episode = jax.tree.map(lambda a: a[0], jax.device_get(episodes(tasks, 1)))
    meta = meta_of(learner, episode)
    x, y = (np.concatenate(parts) for parts in zip(*episode, strict=True))

    def answer(x, y, i):
      """The answer at the i-th item, from what was seen before it."""
      adapted = learner.adapt(meta, ms.Batch(x[:i], y[:i]), None)
      return learner.predict(adapted, x[i : i + 1])[0]

    others = [y, *((y + (np.arange(items) == i)) % WAY for i in (2, 0))]
    first, *rest = jax.jit(jax.vmap(lambda y: answer(x, y, 3)))(np.stack(others))
    assert not np.allclose(first, rest[0])  # The label just before.
    assert not np.allclose(first, rest[1], atol=1e-7)
    # The same answers come from one pass over the whole sequence, in the order that loss draws.
    order = np.asarray(jax.random.permutation(jax.random.key(5), items))
    x, y = x[order], y[order]

    @jax.jit
    def of_the_sequence(meta):
      zero_label = jnp.concatenate([x[0].reshape(-1), jnp.zeros(WAY)])
      before = cell.apply({'params': meta}, cell.start(), zero_label)[1]
      return learner.loss(meta, episode, jax.random.key(5)), before

    (loss, info), before = of_the_sequence(meta)
    logits = np.stack([before, *(jax.jit(answer, static_argnums=2)(x, y, i) for i in range(1, items))])
    assert_close(loss, -np.mean(np.log(softmax(np.float64(logits))[np.arange(items), y])), **LOOSE)
    right = np.argmax(logits, -1) == y
    for n in range(1 + query):
      nth = [i for i in range(items) if np.sum(y[:i] == y[i]) == n]
      assert len(nth) == WAY
      assert_close(info[f'instance_{n + 1}'], right[np.array(nth)].mean())

  def test_images_are_scaled(self, episode):
    meta = jax.eval_shape(ms.learners.mann(way=WAY, size=2).init, jax.random.key(0), episode)
    inputs = meta['OptimizedLSTMCell_0']['ii']['kernel'].shape[0]
    assert inputs == 2 * 2 + WAY + 4 * 40

  def test_the_papers_sizes(self):
    cell = ms.learners.MemoryCell(5)
    assert (cell.units, cell.slots, cell.width, cell.heads, cell.decay) == (200, 128, 40, 4, 0.99)

  def test_a_key_is_needed(self, episode):
    learner = ms.learners.mann(way=WAY)
    with pytest.raises(ValueError, match=saying('order', 'random', 'key', 'None')):
      learner.loss(jax.eval_shape(learner.init, jax.random.key(0), episode), episode, None)


class TestMetaLstm:
  def test_preprocessing(self):
    x = np.array([2.0, -0.5, 1e-6, 0.0, -1e-5])
    expected = [[np.log(abs(v)) / 10, np.sign(v)] if abs(v) >= np.exp(-10) else [-1, np.exp(10) * v] for v in x]
    assert_close(jax.jit(preprocess)(np.float32(x)), expected, rtol=1e-5, atol=1e-5)

  def test_two_updates(self, episode):
    learner = ms.learners.meta_lstm(ms.nn.from_linen(OneLayer(WAY)), ms.losses.cross_entropy, steps=2, units=3)
    meta = meta_of(learner, episode)
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
    both = jax.jit(lambda *of: (learner.adapt(*of, None), learner.path(*of, None)))
    adapted, path = jax.device_get(both(meta, episode.support))
    assert_close(adapted['Dense_0']['bias'], b, **LOOSE)
    assert_close(adapted['Dense_0']['kernel'], w, **LOOSE)
    assert_trees_close(jax.tree.map(lambda a: a[0], path), meta.theta)
    assert_trees_close(jax.tree.map(lambda a: a[-1], path), adapted)

  def test_it_starts_as_a_gradient_step(self, episode):
    learner = ms.learners.meta_lstm(ms.nn.from_linen(OneLayer(WAY)), ms.losses.cross_entropy)
    meta = meta_of(learner, episode)
    assert 4 < float(meta.optimizer['forget_bias']) < 6
    assert -5 < float(meta.optimizer['input_bias']) < -4

  def test_no_second_derivatives_are_taken(self, episode):
    """The outer gradient takes the losses and gradients that the LSTM sees as constants."""
    learner = ms.learners.meta_lstm(ms.nn.from_linen(OneLayer(WAY)), ms.losses.cross_entropy, steps=1, units=3)
    rng = np.random.default_rng(0)
    meta = meta_of(learner, episode)
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
      both = jax.jit(lambda theta, along: jax.jvp(adapted, (theta,), (along,)))
      value, moved = both(to_float64(theta), to_float64(along))
    assert_trees_close(value['Dense_0'], step(theta['Dense_0'], theta['Dense_0']), rtol=1e-9, atol=1e-9)
    assert_trees_close(moved['Dense_0'], slope(lambda t: step(t, theta['Dense_0'])), rtol=1e-7, atol=1e-7)
    second_order = slope(lambda t: step(t, t))
    assert relative_error(second_order, moved['Dense_0']) > 0.05


class TestFineTuning:
  def test_the_floor_is_gradient_descent_by_hand(self, episode):
    learner = ms.learners.fine_tuning(linear(), classes=9, way=WAY, alpha=0.2, steps=3)
    meta = meta_of(learner, episode)
    theta = np.asarray(meta.theta, np.float64)
    x = np.asarray(episode.support.x, np.float64).reshape(len(episode.support.x), -1)
    y = np.asarray(episode.support.y)
    w, b = np.zeros((4, WAY)), np.zeros(WAY)
    for _ in range(3):
      features = x @ theta
      error = (softmax(features @ w + b) - np.eye(WAY)[y]) / len(y)
      theta, w, b = theta - 0.2 * x.T @ (error @ w.T), w - 0.2 * features.T @ error, b - 0.2 * error.sum(0)
    adapted = jax.jit(learner.adapt)(meta, episode.support, jax.random.key(0))
    assert_close(adapted.theta, theta, **LOOSE)
    assert_close(adapted.weights, w, **LOOSE)
    assert_close(adapted.bias, b, **LOOSE)

  def test_it_is_trained_on_all_classes(self):
    bank = random_bank(classes=6, size=4)
    learner = ms.learners.fine_tuning(linear(), classes=6, way=WAY)
    one = jax.tree.map(lambda a: a[0], jax.device_get(episodes(ms.tasks.all_classes(bank, batch=7), 1)))
    meta = meta_of(learner, one)
    features = embed(meta.theta, one.query.x)
    p = softmax(features @ np.asarray(meta.weights, np.float64))
    loss = jax.jit(lambda meta, one: learner.loss(meta, one, None)[0])(meta, one)
    assert_close(loss, -np.mean(np.log(p[np.arange(7), one.query.y])), **LOOSE)


def test_an_ensemble_is_the_mean_of_its_members_probabilities(episode):
  learner = ms.meta_sgd(ms.nn.from_linen(OneLayer(WAY)), ms.losses.cross_entropy, steps=2)
  together = ms.learners.ensemble(learner)

  @jax.jit
  def compare(keys, episode):
    meta = jax.vmap(learner.init, (0, None))(keys, episode)
    alone = lambda one: learner.predict(learner.adapt(one, episode.support, None), episode.query.x)
    found = together.predict(together.adapt(meta, episode.support, None), episode.query.x)
    path = together.path(meta, episode.support, None)
    by_step = [together.predict(jax.tree.map(lambda a, t=t: a[t], path), episode.query.x) for t in range(3)]
    losses = together.loss(meta, episode, None)[0], jax.lax.map(lambda one: learner.loss(one, episode, None)[0], meta)
    return jax.lax.map(alone, meta), found, by_step, losses

  alone, found, by_step, losses = jax.device_get(compare(jax.random.split(jax.random.key(0), 3), episode))
  assert_close(losses[0], np.mean(losses[1]), **LOOSE)
  assert_close(np.exp(found), np.mean(softmax(np.float64(alone)), 0), **LOOSE)
  assert_close(by_step[2], found, **LOOSE)
  assert not np.allclose(by_step[0], by_step[1])


BY_LABEL = {
  'prototypical': ms.learners.prototypical(linear(), way=WAY),
  'matching': ms.learners.matching(linear(), way=WAY),
  'siamese': ms.learners.siamese(linear(), way=WAY),
  'mann': ms.learners.mann(way=WAY, cell=ms.learners.PlainCell(WAY, 4), size=None),
}


@pytest.mark.parametrize('name', BY_LABEL)
def test_a_label_that_is_no_class_is_refused_or_gives_nan(name, episode):
  """Labels from 1 to N are the usual mistake; they would be taken for other classes, or for none."""
  learner = BY_LABEL[name]
  meta = meta_of(learner, episode)
  support, query = (batch._replace(y=batch.y + 1) for batch in episode)
  with pytest.raises(ValueError, match=f'labels must be from 0 to {WAY - 1}.*got {WAY}'):
    learner.adapt(meta, support, None)

  @jax.jit
  def answers_and_losses(meta, support, query):
    outputs = learner.predict(learner.adapt(meta, support, None), episode.query.x)
    wrong = ms.Episode(support, episode.query), ms.Episode(episode.support, query)
    loss = jax.value_and_grad(learner.loss, has_aux=True)
    return outputs, [loss(meta, each, jax.random.key(0)) for each in wrong]

  outputs, losses = answers_and_losses(meta, support, query)
  assert np.isnan(outputs).all()
  assert all(np.isnan(leaf).all() for leaf in jax.tree.leaves(losses))  # The metrics and gradients too.
