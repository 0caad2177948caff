import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import OneLayer, assert_trees_close, random_bank, saying, sinusoid_learner

import metasgd_jax as ms
from metasgd_jax.outer import bad_numbers, loop, training

TASKS = ms.tasks.sinusoid()
LEARNER = sinusoid_learner(hidden=(8,))
ADAM = optax.adam(1e-2)

# A problem of one weight, which compiles fast.
POINTS = np.linspace(-1, 1, 5, dtype=np.float32)[:, None]
LINES = ms.TaskDistribution(
  lambda key: jax.random.normal(key, (1, 1)), lambda slope, key: ms.Episode(*[ms.Batch(POINTS, POINTS @ slope)] * 2)
)
LINE = ms.Model(lambda key, x: {'w': jax.random.normal(key, (1, 1))}, lambda theta, x: x @ theta['w'])
OF_LINES = ms.meta_sgd(LINE, ms.losses.mean_squared_error)


def start(seed=0, learner=LEARNER, optimizer=ADAM):
  return ms.init(jax.random.key(seed), TASKS, learner=learner, optimizer=optimizer)


def train(state, iterations, learner=LEARNER, optimizer=ADAM, **kwargs):
  options = dict(meta_batch=4, chunk=10) | kwargs
  return ms.train(state, TASKS, learner=learner, optimizer=optimizer, meta_iterations=iterations, **options)


def without_key(state):
  return state._replace(key=jax.random.key_data(state.key))


def test_equals_steps_taken_one_by_one(both_compilers):
  state = start()
  step = jax.jit(lambda s: ms.train_step(s, TASKS, learner=LEARNER, optimizer=ADAM, meta_batch=4))
  losses, infos = [], []
  expected = state
  for _ in range(25):
    expected, info = step(expected)
    losses.append(float(info['loss']))
  got = train(state, 25, callbacks=[lambda p: infos.append(p.info['loss'])])
  assert_trees_close(without_key(got), without_key(expected), rtol=1e-4, atol=1e-5)
  assert [len(i) for i in infos] == [10, 10, 5]
  np.testing.assert_allclose(np.concatenate(infos), losses, rtol=1e-4)


def test_the_state_is_donated_but_not_that_of_the_caller_or_of_callbacks():
  state, kept = start(), []
  train(state, 25, callbacks=[lambda progress: kept.append(progress.state)])
  copies = jax.device_get([without_key(s) for s in (state, *kept)])
  assert [int(copy.step) for copy in copies] == [0, 10, 20, 25]
  iteration = training._GradientIteration(LEARNER, ADAM, 4, ms.Placement())
  compiled = loop._run_chunk.lower(state, TASKS, 0, iteration=iteration, chunk=10).compile()
  size = sum(leaf.nbytes for leaf in jax.tree.leaves((state.meta, state.opt_state)))
  assert compiled.memory_analysis().alias_size_in_bytes >= size


def test_a_last_chunk_of_numpys_count_is_the_same_program():
  optimizer, before = optax.sgd(1e-3), loop._run_chunk._cache_size()
  train(start(optimizer=optimizer), np.int64(25), optimizer=optimizer)
  assert loop._run_chunk._cache_size() - before == 1


def test_a_state_at_the_end_is_returned_as_any_other():
  state = jax.device_get(start()._replace(key=None))._replace(key=jax.random.key(0), step=np.int32(5))
  mesh = ms.sharding.task_mesh(4)
  found = train(state, 5, placement=ms.Placement(mesh=mesh))
  assert all(leaf.devices() == {jax.devices()[0]} for leaf in jax.tree.leaves(found))


def test_a_stream_is_trained_step_by_step_too():
  """Outside of jit, where it can send."""
  bank = random_bank()
  streamed = ms.tasks.stream(bank, ms.tasks.image_indices(bank, way=3, shot=1, query=2))
  resident = ms.tasks.few_shot(bank, way=3, shot=1, query=2)
  learner = ms.maml(ms.nn.from_linen(OneLayer(3)), ms.losses.cross_entropy)
  learner = learner._replace(loss=jax.jit(learner.loss))  # Its operations are not compiled one by one.
  options = dict(learner=learner, optimizer=optax.sgd(0.1))
  a, b = (
    ms.train_step(ms.init(jax.random.key(0), tasks, **options), tasks, meta_batch=2, **options)[0]
    for tasks in (streamed, resident)
  )
  assert_trees_close(a.meta, b.meta, rtol=1e-5)


def test_step_i_depends_on_the_seed_and_i_alone(both_compilers):
  """So a run that stops and goes on ends bitwise where one that never stopped does."""
  whole = train(start(), 30)
  resumed = train(train(start(), 10), 30)
  assert all(jax.tree.leaves(jax.tree.map(np.array_equal, without_key(resumed), without_key(whole))))


def test_tasks_differ_from_step_to_step_and_seed_to_seed():
  frozen = optax.set_to_zero()
  losses = []
  for seed in (0, 1):
    state = start(optimizer=frozen)._replace(key=jax.random.key(seed))
    train(state, 20, optimizer=frozen, callbacks=[lambda p: losses.extend(p.info['loss'].tolist())])
  assert len(set(losses)) == 40


def test_seeds_side_by_side_equal_each_alone(both_compilers):
  assert_seeds_train_alike(LINES, OF_LINES)


@pytest.mark.slow
def test_seeds_of_a_network_side_by_side_equal_each_alone(optimized):
  assert_seeds_train_alike(TASKS, LEARNER)


def assert_seeds_train_alike(tasks, learner):
  """Three together, each alone, and each beside no other."""

  def trained(seeds):
    state = ms.init(seeds, tasks, learner=learner, optimizer=ADAM)
    state = ms.train(state, tasks, learner=learner, optimizer=ADAM, meta_iterations=20, meta_batch=4, chunk=10)
    return jax.device_get(without_key(state))

  row = lambda tree, r: jax.tree.map(lambda a: a[r], tree)
  seeds = jax.jit(jax.vmap(jax.random.key))(np.array([3, 4, 5]))
  together = trained(seeds)
  for r in range(3):
    for got in (trained(seeds[r]), row(trained(seeds[r : r + 1]), 0)):
      assert_trees_close(got, row(together, r), rtol=1e-4, atol=1e-5)


def test_compiles_once():
  before = loop._run_chunk._cache_size()
  seen = []
  optimizer = optax.sgd(1e-3)
  train(start(optimizer=optimizer), 35, optimizer=optimizer, callbacks=[
    lambda p: seen.append(loop._run_chunk._cache_size() - before)
  ])  # fmt: skip
  assert seen == [1, 1, 1, 1]


def test_a_bank_is_an_argument_of_the_program_and_not_a_constant():
  images = np.random.default_rng(0).integers(0, 256, (50, 20, 28, 28, 1), np.uint8)
  tasks = ms.tasks.few_shot(ms.tasks.class_bank(images), way=5, shot=1, query=2)
  text = jax.jit(lambda t, k: t.episode(t.sample(k), k)).lower(tasks, jax.random.key(0)).as_text()
  assert len(text) < 200_000
  assert 'tensor<1000x28x28x1xui8>' in text


@functools.partial(jax.tree_util.register_dataclass, data_fields=['scale'], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Scaled:
  """A function that is a pytree, as Equinox's modules are."""

  scale: jax.Array

  def __call__(self, key):
    return self.scale * jax.random.normal(key, (1, 1))


def test_a_function_that_is_a_pytree_keeps_its_arrays():
  tasks = ms.TaskDistribution(Scaled(jnp.float32(2.0)), LINES.episode)
  assert [float(leaf) for leaf in jax.tree.leaves(tasks)] == [2.0]
  found, expected = jax.jit(lambda tasks, key: (tasks.sample(key), 2 * LINES.sample(key)))(tasks, jax.random.key(0))
  np.testing.assert_allclose(found, expected)


def test_progress_tells_where_a_run_is():
  seen = []
  train(start(), 25, callbacks=[seen.append])
  assert [(p.step, p.total) for p in seen] == [(10, 25), (20, 25), (25, 25)]
  assert [int(p.state.step) for p in seen] == [10, 20, 25]
  assert 0 < seen[0].seconds < seen[1].seconds < seen[2].seconds


def test_the_rate_of_a_resumed_run_is_that_of_its_own_steps():
  seen = []
  train(train(start(), 10), 30, callbacks=[seen.append])
  assert [p.step for p in seen] == [20, 30]
  np.testing.assert_allclose([p.rate * p.seconds for p in seen], [10, 20])


def test_nothing_is_done_when_all_is_done():
  state = train(start(), 10)
  seen = []
  assert train(state, 10, callbacks=[seen.append]) is state
  assert not seen


def test_alpha_may_have_an_optimiser_of_its_own():
  optimizer = optax.partition(
    {'theta': optax.adam(1e-2), 'alpha': optax.set_to_zero()}, ms.MetaParams('theta', 'alpha')
  )
  state = start(optimizer=optimizer)
  got = train(state, 10, optimizer=optimizer)
  assert all(jax.tree.leaves(jax.tree.map(np.array_equal, got.meta.alpha, state.meta.alpha)))
  assert not np.array_equal(got.meta.theta['Dense_0']['kernel'], state.meta.theta['Dense_0']['kernel'])


def test_weight_decay_cannot_move_mamls_rate():
  learner, optimizer = sinusoid_learner(ms.maml, hidden=(8,), alpha=0.05), optax.adamw(1e-2, weight_decay=0.5)
  state = train(start(learner=learner, optimizer=optimizer), 10, learner=learner, optimizer=optimizer)
  assert state.meta.alpha is None
  loss_fn = lambda t, b: jnp.mean((learner.predict(t, b.x) - b.y) ** 2)

  @jax.jit
  def adapted(meta):
    support = TASKS.episode(TASKS.sample(jax.random.key(0)), jax.random.key(1)).support
    return learner.adapt(meta, support, None), ms.adapt(meta.theta, 0.05, support, loss_fn=loss_fn)

  assert_trees_close(*adapted(state.meta))


def test_strict_dtype_promotion_is_possible_around_optax():
  """Under 'strict' optax.adam fails, so only its update may be wrapped; the rest must keep dtypes."""

  def first(key):
    episode = TASKS.episode(TASKS.sample(key), key)
    batch = jax.tree.map(lambda a: a[None], episode)
    return ms.mean_loss_and_grad(LEARNER, LEARNER.init(key, episode), batch, key[None])

  with jax.numpy_dtype_promotion('strict'):
    (loss, _), grads = jax.eval_shape(first, jax.random.key(0))
  assert loss.dtype == jnp.float32
  assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype(jnp.float32)}


def test_golden_run():
  """The first losses of a run; a change here changes every published figure and must be meant."""
  losses = []
  train(start(), 5, callbacks=[lambda p: losses.extend(p.info['loss'].tolist())])
  np.testing.assert_allclose(losses, GOLDEN, rtol=1e-3)


GOLDEN = [1.6542, 6.244, 5.2074, 7.8259, 7.2635]


@pytest.mark.parametrize('name', ['meta_iterations', 'meta_batch', 'chunk'])
def test_counts_below_one(name):
  options = dict(meta_iterations=5, meta_batch=4, chunk=10) | {name: 0}
  with pytest.raises(ValueError, match=saying(name, 'an integer of at least 1', 'got 0')):
    ms.train(start(), TASKS, learner=LEARNER, optimizer=ADAM, **options)


def constant(key):
  return jnp.full((), np.random.default_rng().normal(), jnp.float32)


def through_jit(key):
  return jax.jit(lambda key: jax.random.normal(key))(key)


@pytest.mark.parametrize(
  ('sample', 'warned'),
  [
    (constant, True),
    (lambda key: {'a': constant(key), 'b': jnp.zeros(3) + jax.random.normal(key).astype(jnp.int32) * 0 + 1}, False),
    (lambda key: (constant(key), 2), True),
    (lambda key: None, False),
    (through_jit, False),
    (lambda key: jax.random.normal(key), False),
  ],
)
def test_a_sample_that_does_not_use_its_key_is_reported(sample, warned):
  """That of NumPy is drawn once, when it is traced; two tasks that happen to be equal are no reason."""
  tasks = ms.TaskDistribution(sample, lambda task, key: LINES.episode(jnp.zeros((1, 1)), key))
  expected = pytest.warns(UserWarning, match='does not use its key') if warned else contextlib.nullcontext()
  with expected:
    ms.init(jax.random.key(0), tasks, learner=OF_LINES, optimizer=ADAM)


def test_a_callback_that_is_in_no_list():
  with pytest.raises(ValueError, match=saying('`callbacks` must be a sequence of functions', 'give [function]')):
    ms.train(start(), TASKS, learner=LEARNER, optimizer=ADAM, meta_iterations=5, meta_batch=4, callbacks=print)


def test_a_state_that_is_past_the_end():
  with pytest.raises(ValueError, match=saying('has done 10', 'meta_iterations=5')):
    train(train(start(), 10), 5)


def test_runs_that_are_not_at_the_same_step():
  with pytest.raises(ValueError, match=saying('side by side', '[0 3]')):
    train(start()._replace(step=jnp.array([0, 3])), 5)


@pytest.mark.parametrize('key', [0, jax.random.PRNGKey(0), jax.random.split(jax.random.key(0), (2, 2))])
def test_a_key_of_another_kind(key):
  with pytest.raises(
    ValueError, match=saying('`key` must be', 'jax.random.key(seed)', '[R]', getattr(key, 'dtype', int))
  ):
    ms.init(key, TASKS, learner=LEARNER, optimizer=ADAM)


@pytest.mark.parametrize('impl', ['rbg', 'unsafe_rbg'])
def test_keys_whose_numbers_change_under_vmap_are_refused_everywhere(impl):
  key, state = jax.random.key(0, impl=impl), start()
  refused = [
    lambda: ms.init(key, TASKS, learner=LEARNER, optimizer=ADAM),
    lambda: train(state._replace(key=key), 1),
    lambda: train(state._replace(key=jax.random.split(key, 2), step=jnp.zeros(2, int)), 1),
    lambda: ms.evaluate(LEARNER, state.meta, TASKS, key, metric_fn=ms.losses.mean_squared_error, num_tasks=2),
    lambda: bad_numbers.inspect_step(state._replace(key=key), TASKS, learner=LEARNER, meta_batch=2),
    lambda: ms.train_step(state._replace(key=key), TASKS, learner=LEARNER, optimizer=ADAM, meta_batch=2),
    lambda: ms.rl.trpo_meta_step(None, key, inner=None),
  ]
  for call in refused:
    with pytest.raises(ValueError, match=saying('`key` must be', 'threefry2x32', f'got {impl}', 'jax.random.key(seed')):
      call()


@pytest.mark.parametrize('per', ['leaf', 'layer', 'all'])
def test_a_rate_for_each_leaf_or_layer_or_one_for_all_is_learned(per):
  learner = sinusoid_learner(hidden=(8,), alpha=ms.AlphaConfig(per=per))
  state = start(learner=learner)
  rates = jax.tree.leaves(state.meta.alpha)
  assert len(rates) == {'leaf': 4, 'layer': 2, 'all': 1}[per]
  assert {r.shape for r in rates} == {()}
  trained = jax.tree.leaves(train(state, 20, learner=learner).meta.alpha)
  assert all(float(a) != float(b) for a, b in zip(rates, trained, strict=True))


def test_an_unknown_number_of_tasks_at_once():
  with pytest.raises(ValueError, match=saying('tasks_at_once must be', "'all'", "got 'pmap'")):
    train(start(), 5, placement=ms.Placement('pmap'))


@pytest.mark.parametrize(
  'make',
  [
    lambda: optax.polyak_sgd(max_learning_rate=0.01),
    lambda: optax.chain(optax.adam(1e-3), optax.contrib.reduce_on_plateau()),
    lambda: optax.noisy_sgd(1e-3, key=jax.random.key(0)),
    lambda: optax.MultiSteps(optax.adam(1e-3), 2),
    lambda: optax.apply_if_finite(optax.adamw(1e-3), 2),
  ],
  ids=['polyak', 'plateau', 'noisy', 'multi', 'finite'],
)
@pytest.mark.parametrize(
  'keys',
  [pytest.param(jax.random.key(0), marks=pytest.mark.slow), jax.random.split(jax.random.key(0))],
  ids=['one', 'two'],
)
def test_optimisers_that_ask_for_the_loss_or_hold_a_key(make, keys):
  optimizer = make()
  state = ms.init(keys, LINES, learner=OF_LINES, optimizer=optimizer)
  options = dict(learner=OF_LINES, optimizer=optimizer, meta_batch=2)
  seen = []
  trained = ms.train(state, LINES, meta_iterations=4, chunk=2, callbacks=[seen.append], **options)
  assert np.isfinite([progress.info['loss'] for progress in seen]).all()
  before, after = (np.asarray(jax.tree.leaves(s.meta)[0]) for s in (state, trained))
  assert np.isfinite(after).all()
  assert (before != after).any()


def test_polyaks_step_is_of_the_meta_batchs_loss():
  """Its rate is (loss − f_min) / ‖gradient‖² (Loizou et al. 2021), here below the bound."""
  optimizer = optax.polyak_sgd(max_learning_rate=1e9)
  state = start(optimizer=optimizer)

  @jax.jit
  def steps(state):
    after, info = ms.train_step(state, TASKS, learner=LEARNER, optimizer=optimizer, meta_batch=2)
    _, grads = gradient_at(state, LEARNER, 2)
    rate = info['loss'] / optax.tree.norm(grads) ** 2
    return jax.tree.map(jnp.subtract, state.meta, after.meta), jax.tree.map(lambda g: rate * g, grads)

  assert_trees_close(*steps(state), rtol=1e-3, atol=1e-6)


def gradient_at(state, learner, meta_batch):
  keys = loop.step_keys(state.key, state.step, meta_batch)
  batch = jax.vmap(TASKS.episode)(jax.vmap(TASKS.sample)(keys[0]), keys[1])
  return ms.mean_loss_and_grad(learner, state.meta, batch, keys[2])


PAIR = lambda task, key: (ms.Batch(jnp.ones((5, 1)), jnp.ones((5, 1))),) * 2


@pytest.mark.parametrize(
  ('options', 'said'),
  [
    (dict(tasks=(TASKS.sample, TASKS.episode)), ['`tasks` must be', 'TaskDistribution', 'TaskStream', 'got tuple']),
    (dict(optimizer=optax.adam), ['`optimizer` must be', 'optax.adam(1e-3)', 'got <function']),
    (
      dict(tasks=ms.TaskDistribution(TASKS.sample, PAIR)),
      ['tasks must return', 'ms.Episode(support, query)', 'got tuple'],
    ),
    (
      dict(tasks=ms.TaskDistribution(TASKS.sample, lambda task, key: ms.Episode(*[tuple(b) for b in PAIR(task, key)]))),
      ['support', 'plain tuple', 'ms.Batch(x, y)'],
    ),
  ],
)
def test_parts_that_are_none(options, said):
  with pytest.raises(ValueError, match=saying(*said)):
    ms.init(jax.random.key(0), **(dict(tasks=TASKS, learner=LEARNER, optimizer=ADAM) | options))


@pytest.mark.parametrize(
  ('optimizer', 'error'),
  [
    (optax.lookahead(optax.sgd(0.1), 2, 0.5), 'AttributeError'),
    (optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.1)), 'TypeError'),
    (optax.contrib.sophia(0.1), 'obj_fn'),
    (optax.lbfgs(), 'value_fn'),
  ],
  ids=['lookahead', 'sam', 'sophia', 'line search'],
)
def test_an_optimiser_that_needs_more_than_a_gradient(optimizer, error):
  with pytest.raises(ValueError, match=saying('the update of `optimizer` fails', error, 'use another')):
    state = ms.init(jax.random.key(0), LINES, learner=OF_LINES, optimizer=optimizer)
    ms.train(state, LINES, learner=OF_LINES, optimizer=optimizer, meta_iterations=1, meta_batch=2)


def test_the_state_of_another_optimiser():
  state = ms.init(jax.random.key(0), LINES, learner=OF_LINES, optimizer=optax.sgd(0.1))
  with pytest.raises(
    ValueError, match=saying('optimizer state', 'not one of `optimizer`', 'optimizer.init(state.meta)')
  ):
    ms.train(state, LINES, learner=OF_LINES, optimizer=ADAM, meta_iterations=1, meta_batch=2)


@pytest.mark.parametrize('options', [dict(tasks=(TASKS.sample, TASKS.episode)), dict(optimizer=optax.adam)])
def test_parts_that_are_none_in_training(options):
  given = dict(tasks=TASKS, learner=LEARNER, optimizer=ADAM) | options
  with pytest.raises(ValueError, match=saying(f'`{next(iter(options))}` must be')):
    ms.train(start(), meta_iterations=5, meta_batch=4, **given)


@pytest.mark.parametrize('meta_batch', [0, 4.0, True])
def test_a_step_of_no_tasks(meta_batch):
  with pytest.raises(ValueError, match=saying('meta_batch', 'an integer of at least 1', f'got {meta_batch}')):
    ms.train_step(start(), TASKS, learner=LEARNER, optimizer=ADAM, meta_batch=meta_batch)


def test_a_loss_that_is_not_finite_is_told_once():
  infinite = ms.TaskDistribution(LINES.sample, lambda slope, key: LINES.episode(slope + jnp.inf, key))
  state = ms.init(jax.random.key(0), infinite, learner=OF_LINES, optimizer=ADAM)
  with pytest.warns(RuntimeWarning, match=saying('loss is not finite', 'meta-iteration 0', 'labels')) as told:
    ms.train(state, infinite, learner=OF_LINES, optimizer=ADAM, meta_iterations=3, meta_batch=2, chunk=1)
  assert len(told) == 1


def test_memory_that_the_compiler_has_freed_is_released(monkeypatch):
  released = []
  monkeypatch.setattr(loop.host_memory, 'release_freed', lambda: released.append(1))
  state = ms.init(jax.random.key(0), LINES, learner=OF_LINES, optimizer=ADAM)
  for seconds in (1e9, 0):
    monkeypatch.setattr(loop, 'LONG_COMPILATION', seconds)
    ms.train(state, LINES, learner=OF_LINES, optimizer=ADAM, meta_iterations=2, meta_batch=2, chunk=1)
  assert released == [1]
