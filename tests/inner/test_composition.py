"""Other libraries' models in Meta-SGD's inner loop: the same weights give the same numbers in all."""

import functools
import sys
from typing import NamedTuple

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from problems import assert_trees_close, saying

import metasgd_jax as ms
from metasgd_jax.io import checkpoint

FILTERS, WAY = 2, 3
CROSS_ENTROPY = ms.losses.cross_entropy


# One network six times: a 3×3 convolution, ReLU, the mean over places, a dense layer; all with biases.


def plain(theta, x):
  """By shifts and products, without a library's layer."""
  padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
  shifts = [(i, j, padded[:, i : i + x.shape[1], j : j + x.shape[2]]) for i in range(3) for j in range(3)]
  hidden = sum(shifted @ theta['kernel'][i, j] for i, j, shifted in shifts) + theta['bias'].reshape(1, 1, 1, -1)
  return jax.nn.relu(hidden).mean((1, 2)) @ theta['weights'] + theta['shift'].reshape(1, -1)


class Linen(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dense(WAY)(nn.relu(nn.Conv(FILTERS, (3, 3))(x)).mean((1, 2)))


class Nnx(nnx.Module):
  def __init__(self, rngs):
    self.conv = nnx.Conv(1, FILTERS, (3, 3), rngs=rngs)
    self.dense = nnx.Linear(FILTERS, WAY, rngs=rngs)

  def __call__(self, x):
    return self.dense(nnx.relu(self.conv(x)).mean((1, 2)))


class Equinox(eqx.Module):
  conv: eqx.nn.Conv2d
  dense: eqx.nn.Linear
  activation: object = jax.nn.relu  # A leaf that is no array.

  def __init__(self, key):
    self.conv = eqx.nn.Conv2d(1, FILTERS, 3, padding=1, key=key)
    self.dense = eqx.nn.Linear(FILTERS, WAY, key=key)

  def __call__(self, x):  # [H, W, 1]
    return self.dense(self.activation(self.conv(x.transpose(2, 0, 1))).mean((1, 2)))


@hk.without_apply_rng
@hk.transform
def haiku(x):
  return hk.Linear(WAY)(jax.nn.relu(hk.Conv2D(FILTERS, 3)(x)).mean((1, 2)))


def bare_nnx(theta, x):
  graphdef, _ = nnx.split(nnx.eval_shape(lambda: Nnx(nnx.Rngs(0))))
  return nnx.merge(graphdef, theta)(x)


def bare_equinox(theta, x):
  static = eqx.filter(Equinox(jax.random.key(0)), eqx.is_inexact_array, inverse=True)
  return jax.vmap(eqx.combine(theta, static))(x)


class Way(NamedTuple):
  """A library's model, its apply with nothing of `ms.nn` in it, and how common weights are put into its θ."""

  model: ms.Model
  bare: object
  put: object


def put_nnx(w):
  return {'conv': {'kernel': w['kernel'], 'bias': w['bias']}, 'dense': {'kernel': w['weights'], 'bias': w['shift']}}


def put_equinox(w):
  theta = eqx.filter(Equinox(jax.random.key(0)), eqx.is_inexact_array)
  leaves = w['kernel'].transpose(3, 2, 0, 1), w['bias'].reshape(-1, 1, 1), w['weights'].T, w['shift']
  return eqx.tree_at(lambda m: (m.conv.weight, m.conv.bias, m.dense.weight, m.dense.bias), theta, leaves)


WAYS = {
  'plain': lambda: Way(ms.Model(None, plain), plain, lambda w: w),
  'linen': lambda: Way(
    ms.nn.from_linen(Linen()),
    lambda theta, x: Linen().apply({'params': theta}, x),
    lambda w: {
      'Conv_0': {'kernel': w['kernel'], 'bias': w['bias']},
      'Dense_0': {'kernel': w['weights'], 'bias': w['shift']},
    },
  ),
  'nnx': lambda: Way(ms.nn.from_nnx(Nnx), bare_nnx, put_nnx),
  'equinox': lambda: Way(ms.nn.from_equinox(Equinox), bare_equinox, put_equinox),
  'haiku': lambda: Way(
    ms.Model(*haiku),
    haiku.apply,
    lambda w: {'conv2_d': {'w': w['kernel'], 'b': w['bias']}, 'linear': {'w': w['weights'], 'b': w['shift']}},
  ),
}


def single():
  """The first episode, in float32."""
  return jax.tree.map(lambda a: a[0].astype(np.float32 if a.dtype == float else np.int32), problem()[1])


def problem(tasks=2):
  """Common weights, rates and episodes, as NumPy arrays in float64."""
  rng = np.random.default_rng(0)
  shapes = dict(kernel=(3, 3, 1, FILTERS), bias=(FILTERS,), weights=(FILTERS, WAY), shift=(WAY,))
  theta = {name: rng.normal(size=shape) for name, shape in shapes.items()}
  alpha = {name: rng.uniform(-0.1, 0.5, shape) for name, shape in shapes.items()}
  batch = lambda n: ms.Batch(rng.normal(size=(tasks, n, 4, 4, 1)), np.tile(np.arange(n) % WAY, (tasks, 1)))
  return ms.MetaParams(theta, alpha), ms.Episode(batch(3), batch(6))


def by_hand(meta, support, query):
  """Loss of the query after a step on the support, the gradient written down; NumPy alone."""

  def forward(w, x):
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    patches = np.stack([padded[:, i : i + 4, j : j + 4, 0] for i in range(3) for j in range(3)], -1)  # [B, H, W, 9]
    hidden = patches @ w['kernel'].reshape(9, FILTERS) + w['bias']
    means = np.maximum(hidden, 0).mean((1, 2))
    logits = means @ w['weights'] + w['shift']
    return patches, hidden, means, logits - np.log(np.exp(logits).sum(1, keepdims=True))

  patches, hidden, means, log_p = forward(meta.theta, support.x)
  delta = (np.exp(log_p) - np.eye(WAY)[support.y]) / len(support.y)
  d_hidden = (delta @ meta.theta['weights'].T)[:, None, None] / 16 * (hidden > 0)
  grads = {
    'kernel': np.einsum('bhwp,bhwf->pf', patches, d_hidden).reshape(3, 3, 1, FILTERS),
    'bias': d_hidden.sum((0, 1, 2)),
    'weights': means.T @ delta,
    'shift': delta.sum(0),
  }
  adapted = {name: t - meta.alpha[name] * grads[name] for name, t in meta.theta.items()}
  return -forward(adapted, query.x)[3][np.arange(len(query.y)), query.y].mean()


@functools.cache
def expected():
  """The plain pytree's loss and meta-gradient, common weights."""
  return measured(WAYS['plain'](), 'bare')


def measured(way, how):
  """The mean loss of the tasks and its gradient by (θ, α), of the common weights."""
  with jax.enable_x64(True):
    common, episodes = problem()
    put = lambda meta: ms.MetaParams(way.put(meta.theta), way.put(meta.alpha))

    def by_model(common):
      learner = ms.meta_sgd(way.model, CROSS_ENTROPY)
      meta, back = jax.vjp(put, common)
      (loss, _), grads = ms.mean_loss_and_grad(learner, meta, episodes, jax.random.split(jax.random.key(0), 2))
      return loss, back(grads)[0]

    loss_fn = lambda theta, batch: CROSS_ENTROPY(way.bare(theta, batch.x), batch.y)

    def loss(meta):
      one = lambda task: loss_fn(ms.adapt(*put(meta), task.support, loss_fn=loss_fn), task.query)
      return jnp.mean(jax.vmap(one)(episodes))

    return jax.jit(by_model if how == 'model' else jax.value_and_grad(loss))(common)


class TestFiveLibraries:
  @pytest.mark.parametrize('how', ['model', 'bare'])
  @pytest.mark.parametrize('library', WAYS)
  def test_the_same_weights_give_the_same_loss_and_meta_gradient(self, library, how):
    loss, grads = measured(WAYS[library](), how)
    np.testing.assert_allclose(loss, expected()[0], rtol=1e-9)
    assert_trees_close(grads, expected()[1], rtol=1e-9, atol=1e-12)

  def test_they_are_those_of_numpy(self):
    """The loss itself, and slopes along directions of θ and of α by differences."""
    meta, episodes = problem()
    tasks = [jax.tree.map(lambda a, i=i: a[i], episodes) for i in range(2)]
    loss = lambda meta: np.mean([by_hand(meta, *task) for task in tasks])
    value, grads = expected()
    np.testing.assert_allclose(value, loss(meta), rtol=1e-12)
    rng = np.random.default_rng(1)
    for part, at in meta._asdict().items():
      for _ in range(3):
        along = {name: rng.normal(size=t.shape) for name, t in at.items()}
        ahead, behind = (
          loss(meta._replace(**{part: {name: t + h * along[name] for name, t in at.items()}})) for h in (1e-6, -1e-6)
        )
        by_gradient = sum(np.vdot(getattr(grads, part)[name], a) for name, a in along.items())
        np.testing.assert_allclose(by_gradient, (ahead - behind) / 2e-6, rtol=1e-6, atol=1e-9)

  @pytest.mark.parametrize('library', ['linen', 'nnx', 'equinox', 'haiku'])
  def test_starts_are_of_the_key_and_a_head_alone_may_adapt(self, library):
    model = WAYS[library]().model
    one = single()
    last = lambda name: name.lower().startswith(('dense', 'linear'))
    learner = ms.meta_sgd(ms.adapt_only(model, last), CROSS_ENTROPY)
    start = jax.jit(jax.vmap(lambda seed: learner.init(jax.random.key(seed), one)))
    starts = jax.device_get(start(np.array([0, 0, 1])))
    first, again, other = (jax.tree.map(lambda a, i=i: a[i], starts) for i in range(3))
    assert_trees_close(first, again, rtol=0, atol=0)
    differs = [not np.allclose(a, b) for a, b in zip(*map(jax.tree.leaves, (first.theta, other.theta)), strict=True)]
    assert sum(differs) >= 2
    adapt = lambda meta: learner.adapt(meta, one.support, None)
    adapted, predicted = jax.jit(lambda meta: (adapt(meta), learner.predict(adapt(meta), one.query.x)))(again)
    moved = {
      n: bool(np.any(np.asarray(a) != t)) for (n, a), (_, t) in zip(*map(leaves, (adapted, again.theta)), strict=True)
    }
    assert moved == {name: last(name) for name in moved}
    assert sum(moved.values()) == 2
    assert predicted.shape == (6, WAY)

  @pytest.mark.parametrize('library', ['linen', 'nnx', 'equinox', 'haiku'])
  def test_a_train_state_is_saved_and_read(self, library, tmp_path):
    """By `checkpoint`, whatever the library's own containers are."""
    one = single()
    tasks = ms.TaskDistribution(lambda key: (), lambda task, key: one)
    learner = ms.meta_sgd(WAYS[library]().model, CROSS_ENTROPY)
    start = lambda seed: ms.init(jax.random.key(seed), tasks, learner=learner, optimizer=optax.adam(1e-3))
    state, other = start(0), start(1)
    with checkpoint.Checkpoints(tmp_path / 'c', like=other, config={}) as kept:
      kept.save(state)
    with checkpoint.Checkpoints(tmp_path / 'c', like=other, config={}) as kept:
      assert_trees_close(kept.latest.state._replace(key=None), state._replace(key=None), rtol=0, atol=0)

  def test_a_state_of_nnx_is_a_theta_as_it_is(self):
    """What `nnx.split` gives, with variables in it, as α too."""
    module = Nnx(nnx.Rngs(0))
    graphdef, theta = nnx.split(module)
    one = single()
    loss_fn = lambda theta, batch: CROSS_ENTROPY(nnx.merge(graphdef, theta)(batch.x), batch.y)

    @jax.jit
    def both(theta):
      alpha = ms.init_alpha(jax.random.key(0), theta, ms.AlphaConfig(0.1, 0.1))
      as_dict = ms.adapt(nnx.to_pure_dict(theta), 0.1, one.support, loss_fn=loss_fn)
      return ms.adapt(theta, alpha, one.support, loss_fn=loss_fn), as_dict

    adapted, as_dict = both(theta)
    assert_trees_close(nnx.to_pure_dict(adapted), as_dict)
    nnx.update(module, adapted)
    np.testing.assert_allclose(module.dense.bias[...], as_dict['dense']['bias'], rtol=1e-6)
    assert np.abs(module.dense.bias[...]).max() > 1e-4


class TestRecurrentNnx:
  def test_a_recurrent_layer_is_a_model_although_it_has_a_key(self):
    """Outputs and an inner step are those of the module itself, whose initial state is zero."""
    builds = (
      lambda rngs: nnx.RNN(nnx.OptimizedLSTMCell(2, 3, rngs=rngs)),
      lambda rngs: nnx.Sequential(nnx.RNN(nnx.GRUCell(2, 3, rngs=rngs), rngs=rngs), nnx.relu),
      lambda rngs: nnx.Bidirectional(*[nnx.RNN(nnx.SimpleCell(2, 3, rngs=rngs)) for _ in range(2)]),
    )
    loss = lambda module, x: jnp.mean((module(x) - 1) ** 2)

    def by_both(build, model, key, x):
      theta, module = model.init(key, x), build(nnx.Rngs(key))
      loss_fn = lambda theta, x: loss(functools.partial(model.apply, theta), x)
      adapted = jax.vmap(lambda x: ms.adapt(theta, 0.1, x, loss_fn=loss_fn, adjoint='hvp'))(x[None])
      grads = nnx.to_pure_dict(nnx.grad(loss)(module, x))
      expected = module(x), jax.tree.map(lambda t, g: t - 0.1 * g, theta, grads)
      return (model.apply(theta, x), jax.tree.map(lambda a: a[0], adapted)), expected

    found = jax.jit(lambda key, x: [by_both(build, ms.nn.from_nnx(build), key, x) for build in builds])
    for ours, expected in found(jax.random.key(0), jnp.linspace(-1, 1, 12).reshape(2, 3, 2)):
      assert_trees_close(ours, expected)

  def test_dropout_in_a_recurrent_layer_is_refused(self):
    class Cell(nnx.GRUCell):
      def __init__(self, rngs):
        super().__init__(2, 3, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    with pytest.raises(ValueError, match=saying('RNN has variables', "['RngCount', 'RngKey']", 'pure function')):
      ms.nn.from_nnx(lambda rngs: nnx.RNN(Cell(rngs)))


def leaves(tree):
  return [
    (jax.tree_util.keystr(path, simple=True, separator='.'), leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  ]


class Scaled(eqx.Module):
  weight: object
  constant: object

  def __call__(self, x):
    return x * self.weight * self.constant


class TestMistakes:
  @pytest.mark.parametrize(
    ('layer', 'types'),
    [
      (lambda rngs: nnx.BatchNorm(2, rngs=rngs), "['BatchStat']"),
      (lambda rngs: nnx.Dropout(0.5, rngs=rngs), "['RngCount', 'RngKey']"),
    ],
    ids=['averages', 'dropout'],
  )
  def test_nnx_with_other_variables(self, layer, types):
    build = lambda rngs: nnx.Sequential(nnx.Linear(2, 2, rngs=rngs), layer(rngs))
    with pytest.raises(ValueError, match=saying('Sequential has variables', types, 'nnx.Param', 'pure function')):
      ms.nn.from_nnx(build)

  def test_equinox_with_state(self):
    build = lambda key: eqx.nn.Sequential([eqx.nn.BatchNorm(2, 'batch', mode='batch')])
    with pytest.raises(ValueError, match=saying('Sequential has state', 'eqx.nn.StateIndex', 'pure function')):
      ms.nn.from_equinox(build)

  def test_equinox_with_state_beside_it(self):
    build = eqx.nn.make_with_state(lambda key: eqx.nn.BatchNorm(2, 'batch', mode='batch'))
    with pytest.raises(ValueError, match=saying('BatchNorm has state', 'make_with_state', 'in the batch of `adapt`')):
      ms.nn.from_equinox(build)

  def test_active_dropout(self):
    linen = nn.Sequential([nn.Dense(2), nn.Dropout(0.5, deterministic=False)])
    equinox = lambda key: eqx.nn.Sequential([eqx.nn.Linear(2, 2, key=key), eqx.nn.Dropout()])
    for model, option in (
      (ms.nn.from_linen(linen), 'deterministic=True'),
      (ms.nn.from_equinox(equinox), 'eqx.nn.inference_mode'),
    ):
      x = jnp.ones((1, 2))
      for call in (model.apply, model.statistics) if model.statistics else (model.apply,):
        with pytest.raises(ValueError, match=saying('Sequential draws random', option, 'key in the batch of `adapt`')):
          jax.eval_shape(lambda x, model=model, call=call: call(model.init(jax.random.key(0), x), x), x)

  @pytest.mark.parametrize(
    'array',
    [lambda: jnp.arange(3.0), lambda: np.arange(3.0), lambda: (jnp.arange(3.0),)],
    ids=['jax', 'numpy', 'tuple'],
  )
  def test_nnx_with_an_array_that_is_no_variable(self, array):
    class Scaled(nnx.Module):
      def __init__(self, rngs):
        self.dense = nnx.Linear(3, 3, rngs=rngs)
        self.scale = array()

    with pytest.raises(ValueError, match=saying('Scaled.scale', 'an array', 'in nnx.Param', 'outside the module')):
      ms.nn.from_nnx(Scaled)

  @pytest.mark.parametrize(
    'constant',
    [np.arange(3.0, dtype=np.float32), np.arange(3), np.arange(3) > 0, jnp.arange(3), jnp.arange(3) > 0],
    ids=['float NumPy', 'int NumPy', 'bool NumPy', 'int JAX', 'bool JAX'],
  )
  def test_equinoxs_constants_are_no_parameters(self, constant):
    made = jnp.asarray if isinstance(constant, jax.Array) else np.asarray
    held = np.asarray(constant)
    model = ms.nn.from_equinox(lambda key: Scaled(jax.random.normal(key, (3,)), made(held)))
    theta = jax.jit(lambda key: model.init(key, None))(jax.random.key(1))
    assert theta.constant is None
    assert isinstance(theta.weight, jax.Array)
    x = jnp.ones((2, 3))
    np.testing.assert_allclose(
      jax.jit(model.apply)(theta, x), np.asarray(theta.weight) * np.stack([held, held]), rtol=1e-6
    )

  @pytest.mark.parametrize(
    ('build', 'message'),
    [
      (lambda key: Scaled(jnp.ones(9), jax.random.permutation(key, 9)), ['Scaled has arrays', 'depend on the key']),
      (lambda key: Scaled(jnp.ones(9, jnp.complex64), 1), ['Scaled has parameters', 'complex64']),
      (lambda key: Scaled(np.ones(9), 1), ['Scaled has no parameters', 'floating-point JAX arrays']),
    ],
    ids=['by key', 'complex', 'none'],
  )
  def test_equinox_with_what_cannot_be_learned(self, build, message):
    with pytest.raises(ValueError, match=saying(*message)):
      ms.nn.from_equinox(build)

  @pytest.mark.parametrize('library', ['nnx', 'equinox'])
  def test_what_does_not_build_a_module(self, library):
    adapter, kind, module = {
      'nnx': (ms.nn.from_nnx, 'nnx.Module', nnx.Linear(3, 1, rngs=nnx.Rngs(0))),
      'equinox': (ms.nn.from_equinox, 'eqx.Module', eqx.nn.Linear(3, 1, key=jax.random.key(0))),
    }[library]
    for wrong, name in ((module, 'Linear'), (5, 'int')):
      with pytest.raises(ValueError, match=saying('build', 'a function', f'→ {kind}', f'got {name}', 'write `lambda')):
        adapter(wrong)
    with pytest.raises(ValueError, match=saying('build', f'return an {kind}', 'got int')):
      adapter(lambda _: 3)

  @pytest.mark.parametrize('module', [nnx.Linear(3, 1, rngs=nnx.Rngs(0)), nn.Dense], ids=['nnx', 'class'])
  def test_what_is_no_linen_module(self, module):
    with pytest.raises(ValueError, match=saying('`module`', 'instance of flax.linen.Module', 'got', 'from_nnx')):
      ms.nn.from_linen(module)

  @pytest.mark.parametrize('from_', [ms.nn.from_nnx, ms.nn.from_equinox])
  def test_a_linen_module_in_place_of_a_function(self, from_):
    with pytest.raises(ValueError, match=saying('`build` must be a function', 'got MLP', 'lambda')):
      from_(ms.nn.MLP())

  def test_a_module_without_parameters(self):
    class Nothing(nn.Module):
      def __call__(self, x):
        return x

    with pytest.raises(ValueError, match=saying('Nothing has no parameters', 'give a module')):
      ms.nn.from_linen(Nothing()).init(jax.random.key(0), jnp.ones((1, 2)))

  def test_equinox_that_is_not_installed(self, monkeypatch):
    monkeypatch.setitem(sys.modules, 'equinox', None)
    with pytest.raises(ImportError, match=saying('Equinox is not installed', 'pip install equinox')):
      ms.nn.from_equinox(Equinox)

  def test_no_array_is_made_before_init(self):
    """A module of 4 TB is described at once."""
    huge = 10**6
    ms.nn.from_nnx(lambda rngs: nnx.Linear(huge, huge, rngs=rngs))
    ms.nn.from_equinox(lambda key: eqx.nn.Linear(huge, huge, key=key))


@pytest.mark.parametrize(
  ('network', 'advice'),
  [
    (Linen(), 'an object of type Linen; give `nn.from_linen(module)`'),
    (Linen, 'the class Linen; give `nn.from_linen(module)`'),
    (ms.nn.MLP(), 'an object of type MLP; give `nn.from_linen(module)`'),
    (Nnx, 'the class Nnx; give `nn.from_nnx` a function'),
    (Equinox, 'the class Equinox; give `nn.from_equinox` a function'),
    (lambda theta, x: x, 'an object of type function; give `Model(init, apply)`'),
    (None, 'an object of type NoneType; give `Model(init, apply)`'),
  ],
)
def test_what_is_no_model_is_told_which_adapter_it_needs(network, advice):
  build = ms.learners
  takers = [
    lambda network: ms.meta_sgd(network, CROSS_ENTROPY),
    lambda network: ms.maml(network, CROSS_ENTROPY),
    lambda network: build.meta_lstm(network, CROSS_ENTROPY),
    lambda network: build.inner_optimizer(network, CROSS_ENTROPY, optimizer_fn=optax.sgd, hyper=0.1),
    lambda network: build.fine_tuning(network, classes=4, way=3),
    *(lambda network, one=one: one(network, way=3) for one in (build.matching, build.siamese, build.prototypical)),
    lambda network: ms.adapt_only(network, lambda name: True),
    lambda network: ms.low_rank(network, 1, lambda name: True),
  ]
  for taker in takers:
    with pytest.raises(ValueError, match=saying('the network must be a Model', advice)):
      taker(network)
