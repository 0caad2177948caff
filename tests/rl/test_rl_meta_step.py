"""A meta-iteration with TRPO against its parts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from aiming import aiming, light
from problems import assert_close, assert_trees_close, saying

import metasgd_jax as ms
from metasgd_jax import rl
from metasgd_jax.rl.meta_step import explore_tasks

INNER = light()
DAMPED = rl.TrpoConfig(damping=0.01)


@functools.cache
def meta_step(inner=INNER, **options):
  """One meta-iteration of three tasks, compiled."""
  return jax.jit(functools.partial(rl.trpo_meta_step, inner=inner, meta_batch=3, trpo=DAMPED, **options))


@functools.partial(jax.jit, static_argnames='inner')
def meta_step_by_parts(meta, key, curved, inner=INNER):
  """Collected for each task, then one TRPO step of the mean over tasks, with the curvature of those `curved [3]`."""
  sample_keys, explore_keys, act_keys = jax.random.split(key, (3, 3))
  tasks = jax.vmap(inner.environment.sample)(sample_keys)
  explored, path = jax.vmap(inner.explore, (None, 0, 0))(meta, tasks, explore_keys)
  after = jax.vmap(inner.experience)(path[-1], tasks, act_keys)
  drawn, advantages = after

  def distributions(meta):
    again = lambda explored, drawn: inner.policy.apply(inner.replay(meta, explored), drawn.observations)
    return jax.vmap(again)(explored, drawn)

  def surrogate(distributions):
    ratios = jnp.exp(inner.policy.log_prob(distributions, drawn.actions) - drawn.log_probs)
    return jnp.mean(jnp.sum(jnp.where(drawn.valid, ratios * advantages, 0), (1, 2)) / drawn.valid.sum((1, 2)))

  def kl(old, new, valid=drawn.valid):
    return jnp.sum(jnp.where(valid, inner.policy.kl(old, new), 0)) / valid.sum()

  part = functools.partial(kl, valid=drawn.valid & curved[:, None, None])
  fisher = rl.fisher_product(distributions, part, meta, damping=0.01)
  meta, update = rl.trpo_update(meta, distributions=distributions, surrogate=surrogate, kl=kl, fisher=fisher)
  mean_return = lambda drawn: drawn.rewards.sum(-1).mean()
  returns = dict(return_before=mean_return(explored[0].trajectories), return_after=mean_return(drawn))
  return meta, returns | update._asdict()


@pytest.fixture(scope='module')
def metas():
  """Two in float64, and a key for each."""
  with jax.enable_x64(True):
    keys = jax.random.split(jax.random.key(0), (2, 2))
    return jax.device_get(jax.jit(jax.vmap(INNER.init))(keys[0])), keys[1]


def of_run(tree, i):
  return jax.tree.map(lambda a: a[i], tree)


@pytest.mark.parametrize(
  ('curved', 'options'),
  [
    ([True, True, True], dict(placement=ms.Placement(1))),
    pytest.param([True, True, False], dict(placement=ms.Placement(2), curvature_tasks=2), marks=pytest.mark.slow),
  ],
)
def test_a_trpo_meta_step_by_its_parts(metas, curved, options):
  """Of two tasks at once, and then one, too."""
  metas, keys = metas
  with jax.enable_x64(True):
    expected = meta_step_by_parts(of_run(metas, 0), keys[0], np.array(curved))
    found = meta_step(**options)(of_run(metas, 0), keys[0])
    assert 0 < expected[1]['kl'] <= 0.01
    assert_trees_close(found, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.slow
def test_two_inner_steps_by_their_parts():
  """`return_before` is that of the first step's trajectories, and derivatives go through both steps."""
  inner = light(steps=2)
  with jax.enable_x64(True):
    meta, key = jax.jit(inner.init)(jax.random.key(0)), jax.random.key(1)
    expected = meta_step_by_parts(meta, key, np.array([True] * 3), inner)
    found = meta_step(inner, placement=ms.Placement(1))(meta, key)
    assert expected[1]['kl'] > 0
    assert_trees_close(found, expected, rtol=1e-5, atol=1e-8)


def test_curvature_of_a_part_of_the_tasks_is_another(metas):
  metas, keys = metas
  with jax.enable_x64(True):
    whole, part = (
      meta_step(**options)(of_run(metas, 0), keys[0])
      for options in (dict(placement=ms.Placement(1)), dict(placement=ms.Placement(2), curvature_tasks=2))
    )
    assert_close(part[1]['return_after'], whole[1]['return_after'], rtol=1e-5)  # The same trajectories.
    assert 0 < part[1]['kl'] <= 0.01
    assert not np.allclose(part[0].theta['Dense_0']['kernel'], whole[0].theta['Dense_0']['kernel'], rtol=1e-3)


def test_tasks_at_once_and_seeds_side_by_side_change_no_number(metas):
  metas, keys = metas
  with jax.enable_x64(True):
    together = jax.device_get(
      jax.jit(jax.vmap(meta_step(placement=ms.Placement(2))))(metas, keys)
    )  # Two tasks, and then one.
    for i in range(2):
      alone = meta_step(placement=ms.Placement(1))(of_run(metas, i), keys[i])
      assert_trees_close(of_run(together, i), alone, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize('tasks_at_once', [pytest.param(1, marks=pytest.mark.slow), 2])
def test_tasks_are_explored_as_each_of_them_is(tasks_at_once):
  """Over two steps; two tasks at once, and then one."""
  inner = light(steps=2)
  meta, keys = jax.jit(inner.init)(jax.random.key(0)), jax.random.split(jax.random.key(5), 3)
  tasks = np.linspace(-1, 1, 3, dtype=np.float32)
  explore = jax.jit(lambda *about: explore_tasks(inner, *about, tasks_at_once))
  experiences, thetas = jax.device_get(explore(meta, tasks, keys))
  alone = jax.jit(inner.explore)
  for i in range(3):
    expected, path = alone(meta, tasks[i], keys[i])
    assert_trees_close(of_run((experiences, thetas), i), (expected, path[-1]), rtol=1e-4, atol=1e-5)


def test_the_options_of_the_update_are_handed_to_it(monkeypatch):
  given = {}

  def update(meta, **options):
    given.update(options)
    return meta, rl.TrpoInfo(jnp.zeros(()), jnp.zeros(()), jnp.zeros(()))

  monkeypatch.setattr('metasgd_jax.rl.meta_step.trpo_update', update)
  config = rl.TrpoConfig(max_kl=0.3, cg_steps=3, damping=0.2, backtrack_ratio=0.4, max_backtracks=5)
  step = functools.partial(rl.trpo_meta_step, inner=INNER, meta_batch=2, trpo=config)
  jax.eval_shape(step, jax.eval_shape(INNER.init, jax.random.key(0)), jax.random.key(0))
  assert given['config'] == config


def test_a_divergence_is_the_mean_over_its_own_tasks(monkeypatch):
  """If the divergence of every step is 1, the mean is 1, over all tasks and over those of the curvature."""

  def update(meta, *, kl, fisher, **_):
    return meta, rl.TrpoInfo(kl=kl(None, None), improvement=fisher, step=jnp.zeros(()))

  monkeypatch.setattr('metasgd_jax.rl.meta_step.fisher_product', lambda _, kl, *args, **options: kl(None, None))
  monkeypatch.setattr('metasgd_jax.rl.meta_step.trpo_update', update)
  inner = light(steps=0, alpha=0.1)
  inner = inner._replace(policy=inner.policy._replace(kl=lambda old, new: 1.0))
  step = jax.jit(functools.partial(rl.trpo_meta_step, inner=inner, meta_batch=3, curvature_tasks=2))
  info = step(inner.init(jax.random.key(0)), jax.random.key(1))[1]
  np.testing.assert_allclose([info['kl'], info['improvement']], 1, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize('build', [dict(alpha=0.1), dict(alpha=ms.AlphaConfig(0.1, 0.1))])
def test_trpo_meta_iterations_raise_the_return_after_an_update(build):
  inner = rl.policy_gradient(aiming(), rl.gaussian(2, 1, hidden=(8,)), trajectories=10, **build)
  step = functools.partial(rl.trpo_meta_step, inner=inner, meta_batch=10, trpo=rl.TrpoConfig(max_kl=0.05, damping=0.01))
  meta = jax.jit(inner.init)(jax.random.key(0))
  keys = jax.random.split(jax.random.key(1), 30)
  trained, info = jax.device_get(jax.jit(lambda meta, keys: jax.lax.scan(step, meta, keys))(meta, keys))
  assert jax.tree.structure(trained) == jax.tree.structure(meta)
  assert (info['kl'] <= 0.05 + 1e-6).all()
  assert np.mean(info['step'] > 0) > 0.8
  assert (info['improvement'][info['step'] > 0] > 0).all()
  learner, judge_keys = rl.policy_learner(inner), jax.random.split(jax.random.key(9), 50)
  judge_one = lambda meta, key: rl.returns_by_step(learner, meta, inner.environment.sample(key), key)
  judge = jax.jit(jax.vmap(judge_one, (None, 0)))
  before, after = (np.asarray(judge(m, judge_keys)).mean((0, 2)) for m in (meta, trained))
  assert after[1] > before[1] + 3
  assert after[1] > after[0] + 0.8  # It has learned to adapt, not only a better start.


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    (dict(meta_batch=0), ['meta_batch', 'at least 1', '0']),
    (dict(meta_batch=2, curvature_tasks=3), ['curvature_tasks', 'meta_batch=2', '3']),
  ],
)
def test_bad_options_of_a_meta_step(options, message):
  with pytest.raises(ValueError, match=saying(*message)):
    rl.trpo_meta_step(None, jax.random.key(1), inner=INNER, **options)
