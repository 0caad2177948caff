"""Meta-gradients against what does not share their code: a closed form, NumPy, finite differences, float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import (
  SmallConvNet,
  assert_slopes_by_differences,
  conv_learner,
  episodes,
  random_bank,
  relative_error,
  to_float64,
)

import metasgd_jax as ms

STEPS = [1, 3]


def quadratic_tasks(count=5, size=6, seed=0):
  """Tasks ½θᵀAθ − bᵀθ, a support and a query one each, as NumPy arrays `[T, n, n]` and `[T, n]`."""
  rng = np.random.default_rng(seed)
  root = rng.normal(size=(2, count, size, size))
  return root @ root.swapaxes(-1, -2) / size + 0.5 * np.eye(size), rng.normal(size=(2, count, size)), rng


def closed_form(theta, alpha, a, b, c, d, steps):
  """The meta-gradient of one quadratic task by powers of J = I − diag(α)A, with θ_k = θ* + J^k(θ − θ*)."""
  jacobian = np.eye(theta.size) - alpha[:, None] * a
  power = functools.partial(np.linalg.matrix_power, jacobian)
  best = np.linalg.solve(a, b)
  at_query = c @ (best + power(steps) @ (theta - best)) - d
  d_alpha = sum(-(a @ power(t) @ (theta - best)) * (power(steps - 1 - t).T @ at_query) for t in range(steps))
  return power(steps).T @ at_query, d_alpha


@pytest.mark.parametrize('mapping', ['all', 1])
@pytest.mark.parametrize('steps', STEPS)
def test_closed_form_on_quadratic_tasks(steps, mapping):
  (a, c), (b, d), rng = quadratic_tasks()
  theta, alpha = rng.normal(size=6), rng.uniform(-0.1, 0.4, size=6)

  def loss_fn(t, task):
    return 0.5 * t @ task.x @ t - task.y @ t

  def loss(meta, episode, key):
    del key
    adapted = ms.adapt(meta.theta, meta.alpha, episode.support, loss_fn=loss_fn, steps=steps)
    return loss_fn(adapted, episode.query), {}

  learner = ms.Learner(None, None, None, None, loss)
  with jax.enable_x64(True):
    meta = ms.MetaParams(jnp.asarray(theta), jnp.asarray(alpha))
    tasks = jax.tree.map(jnp.asarray, ms.Episode(ms.Batch(a, b), ms.Batch(c, d)))
    keys = jax.random.split(jax.random.key(0), len(b))
    grads = jax.jit(lambda: ms.mean_loss_and_grad(learner, meta, tasks, keys, tasks_at_once=mapping)[1])()
    assert grads.theta.dtype == jnp.float64
  expected = [closed_form(theta, alpha, *task, steps) for task in zip(a, b, c, d, strict=True)]
  np.testing.assert_allclose(grads.theta, np.mean([e[0] for e in expected], 0), rtol=1e-9, atol=1e-9)
  np.testing.assert_allclose(grads.alpha, np.mean([e[1] for e in expected], 0), rtol=1e-9, atol=1e-9)


class NumpyNet:
  """A ReLU net with mean squared error, its gradient, and its Hessian times a vector (Pearlmutter), by hand."""

  def __init__(self, x, y):
    self.x, self.y = x, y

  def grad(self, layers):
    activations, outputs = self._forward(layers)
    return self._backward(layers, activations, 2 * (outputs - self.y) / self.y.size)

  def hessian_times(self, layers, vector):
    activations, outputs = self._forward(layers)
    delta = 2 * (outputs - self.y) / self.y.size
    r_activations = [np.zeros_like(self.x)]  # Of R{·}, the derivative along `vector`.
    for i, ((w, _), (vw, vb)) in enumerate(zip(layers, vector, strict=True)):
      r = r_activations[-1] @ w + activations[i] @ vw + vb
      r_activations.append(r * (activations[i + 1] > 0) if i < len(layers) - 1 else r)
    r_delta = 2 * r_activations[-1] / self.y.size
    result = []
    for i in reversed(range(len(layers))):
      result.append((r_activations[i].T @ delta + activations[i].T @ r_delta, r_delta.sum(0)))
      r_delta = (r_delta @ layers[i][0].T + delta @ vector[i][0].T) * (activations[i] > 0)
      delta = delta @ layers[i][0].T * (activations[i] > 0)
    return result[::-1]

  def _forward(self, layers):
    activations = [self.x]
    for i, (w, b) in enumerate(layers):
      out = activations[-1] @ w + b
      activations.append(np.maximum(out, 0) if i < len(layers) - 1 else out)
    return activations, activations[-1]

  @staticmethod
  def _backward(layers, activations, delta):
    result = []
    for i in reversed(range(len(layers))):
      result.append((activations[i].T @ delta, delta.sum(0)))
      delta = delta @ layers[i][0].T * (activations[i] > 0)
    return result[::-1]


def numpy_meta_gradient(theta, alpha, support, query, steps):
  """Meta-SGD's meta-gradient of one task, by the chain rule written out; layers are lists of (w, b)."""
  combine = lambda f, *lists: [
    tuple(f(*leaves) for leaves in zip(*layer, strict=True)) for layer in zip(*lists, strict=True)
  ]
  at, path = theta, []
  for _ in range(steps):
    grads = support.grad(at)
    path.append((at, grads))
    at = combine(lambda t, a, g: t - a * g, at, alpha, grads)
  v = query.grad(at)
  d_alpha = combine(np.zeros_like, theta)
  for at, grads in reversed(path):
    d_alpha = combine(lambda total, g, v: total - g * v, d_alpha, grads, v)
    v = combine(lambda v, h: v - h, v, support.hessian_times(at, combine(lambda a, v: a * v, alpha, v)))
  return v, d_alpha


@pytest.mark.parametrize('steps', STEPS)
def test_independent_numpy(steps):
  learner = ms.meta_sgd(ms.nn.from_linen(ms.nn.MLP(stddev=0.5)), ms.losses.mean_squared_error, steps=steps)
  tasks = episodes(ms.tasks.sinusoid(shot=5, query=10), 4)
  meta = jax.jit(learner.init)(jax.random.key(1), jax.tree.map(lambda a: a[0], jax.device_get(tasks)))
  rng = np.random.default_rng(0)
  with jax.enable_x64(True):
    meta, tasks = to_float64(meta), to_float64(tasks)
    meta = meta._replace(alpha=jax.tree.map(lambda a: jnp.asarray(rng.uniform(-0.02, 0.05, a.shape)), meta.alpha))
    keys = jax.random.split(jax.random.key(0), 4)
    grads = jax.jit(lambda: ms.mean_loss_and_grad(learner, meta, tasks, keys)[1])()
  names = ['Dense_0', 'Dense_1', 'Dense_2']
  layers = lambda tree: [tuple(np.asarray(tree[n][leaf], np.float64) for leaf in ('kernel', 'bias')) for n in names]
  each = []
  for i in range(4):
    support, query = (NumpyNet(np.asarray(part.x[i]), np.asarray(part.y[i])) for part in tasks)
    each.append(numpy_meta_gradient(layers(meta.theta), layers(meta.alpha), support, query, steps))
  for got, expected in ((grads.theta, [e[0] for e in each]), (grads.alpha, [e[1] for e in each])):
    for i, layer in enumerate(layers(got)):
      for j, leaf in enumerate(layer):
        np.testing.assert_allclose(leaf, np.mean([e[i][j] for e in expected], 0), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
  ('network', 'steps'),
  [
    (SmallConvNet, 3),
    pytest.param(functools.partial(ms.nn.Conv4, filters=3, hidden=6), 1, marks=pytest.mark.slow),
    pytest.param(functools.partial(ms.nn.Conv4, filters=3, hidden=6), 3, marks=pytest.mark.slow),
  ],
)
def test_finite_differences_through_conv4(network, steps):
  learner = conv_learner(way=3, network=network, steps=steps, alpha=ms.AlphaConfig(0.1, 0.1))
  tasks = ms.tasks.glyphs(way=3, shot=2, query=2)
  episode = jax.tree.map(lambda a: a[0], jax.device_get(episodes(tasks, 1)))
  meta = jax.jit(learner.init)(jax.random.key(1), episode)
  with jax.enable_x64(True):
    meta, episode = to_float64(meta), to_float64(episode)
    assert_slopes_by_differences(lambda m: learner.loss(m, episode, None)[0], meta)


@pytest.fixture(scope='module')
def two_tasks():
  return jax.device_get(episodes(ms.tasks.glyphs(way=5, shot=1, query=3), 2))


@functools.partial(jax.jit, static_argnames=('network', 'mapping'))
def loss_and_grads(meta, tasks, network, mapping):
  learner = conv_learner(network=network, alpha=ms.AlphaConfig(0.1, 0.1))
  keys = jax.random.split(jax.random.key(0), 2)
  (loss, _), grads = ms.mean_loss_and_grad(learner, meta, tasks, keys, tasks_at_once=mapping)
  return loss, grads


@pytest.fixture(scope='module')
def in_float64(request, two_tasks):
  """A network, its meta-parameters, and their loss and gradient in float64, compiled as the suite compiles."""
  network, first = request.param, jax.tree.map(lambda a: a[0], two_tasks)
  meta = jax.jit(conv_learner(network=network, alpha=ms.AlphaConfig(0.1, 0.1)).init)(jax.random.key(0), first)
  with jax.enable_x64(True):
    return network, meta, jax.device_get(loss_and_grads(to_float64(meta), to_float64(two_tasks), network, 1))


@pytest.mark.slow
@pytest.mark.parametrize(
  ('in_float64', 'mapping'),
  [(SmallConvNet, 'all'), (ms.nn.Conv4, 'all'), (ms.nn.Conv4, 1)],
  indirect=['in_float64'],
)
def test_compiled_float32_conv4_equals_float64(in_float64, mapping, two_tasks, optimized):
  """A pooling gradient that compares x with its maximum fails here: XLA may round the two sides apart."""
  network, meta, (loss64, double) = in_float64
  with jax.default_matmul_precision('highest'):  # An accelerator's own default rounds products to fewer bits.
    loss, single = loss_and_grads(meta, two_tasks, network, mapping)
  assert double.theta['ConvBlock_0']['kernel'].dtype == np.float64
  np.testing.assert_allclose(loss, loss64, rtol=1e-5)
  single = jax.device_get(single)
  for part in ('theta', 'alpha'):
    for name, leaf in getattr(double, part).items():
      assert relative_error(getattr(single, part)[name], leaf) < 1e-3, (part, name)


def test_sharding_the_tasks_changes_nothing():
  """Each task must adapt on its own support alone, on whichever device it is."""
  learner = conv_learner()
  tasks = episodes(ms.tasks.few_shot(random_bank(), way=5, shot=1, query=2), 4)
  meta = jax.jit(learner.init)(jax.random.key(0), jax.tree.map(lambda a: a[0], jax.device_get(tasks)))
  keys = jax.random.split(jax.random.key(0), 4)
  grads = jax.jit(lambda m, e, k: ms.mean_loss_and_grad(learner, m, e, k))
  mesh = jax.make_mesh((2,), ('tasks',), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices('cpu')[:2])
  over_tasks = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('tasks'))
  whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  (loss, _), plain = grads(*jax.device_put((meta, tasks, keys), jax.devices('cpu')[0]))
  sharded_tasks, sharded_keys = jax.device_put((tasks, keys), over_tasks)
  (sharded_loss, _), sharded = grads(jax.device_put(meta, whole), sharded_tasks, sharded_keys)
  np.testing.assert_allclose(loss, sharded_loss, rtol=1e-6)
  assert relative_error(*jax.device_get((sharded, plain))) < 1e-5
