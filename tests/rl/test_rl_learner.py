import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from aiming import aiming, light
from finite_mdp import all_trajectories, environment, expected_return, random_mdp, table_policy
from problems import assert_close, assert_trees_close, saying, to_float64

import metasgd_jax as ms
from metasgd_jax import rl
from metasgd_jax.rl.learner import act_again, explorer

POLICY = rl.gaussian(2, 1, hidden=(8,))
ENVIRONMENT = aiming()
TASKS = rl.task_distribution(ENVIRONMENT)
INNER = {
  'meta_sgd': rl.policy_gradient(ENVIRONMENT, POLICY, trajectories=6),
  'meta_sgd, 2 steps': rl.policy_gradient(ENVIRONMENT, POLICY, trajectories=6, steps=2),
  'meta_sgd, rates by layer': rl.policy_gradient(
    ENVIRONMENT, POLICY, trajectories=6, alpha=ms.AlphaConfig(per='layer')
  ),
  'meta_sgd, first order': rl.policy_gradient(ENVIRONMENT, POLICY, trajectories=6, first_order=True),
  'maml': rl.policy_gradient(ENVIRONMENT, POLICY, trajectories=6, alpha=0.1),
  'maml, score, over trajectories': rl.policy_gradient(
    ENVIRONMENT, POLICY, trajectories=6, alpha=0.1, estimator='score', mean_over='trajectory'
  ),
  'maml, lvc, 2 steps': rl.policy_gradient(ENVIRONMENT, POLICY, trajectories=6, alpha=0.1, estimator='lvc', steps=2),
  'maml, lvc, 3 steps': rl.policy_gradient(ENVIRONMENT, POLICY, trajectories=6, alpha=0.1, estimator='lvc', steps=3),
}


@pytest.fixture(
  params=[pytest.param(name, marks=[pytest.mark.slow] if name == 'maml, lvc, 3 steps' else []) for name in INNER]
)
def name(request):
  return request.param


EXPERIENCE = jax.jit(INNER['meta_sgd'].experience)
"""All of these draw alike."""


@functools.cache
def compiled(name):
  """The inner loop of compiled parts, so that each is compiled once for all that is asked of it."""
  inner = INNER[name]
  explore = explorer(EXPERIENCE, jax.jit(inner.step, static_argnums=3), inner.steps)
  return inner._replace(experience=EXPERIENCE, explore=explore, replay=jax.jit(inner.replay))


def start(name):
  inner = compiled(name)
  return rl.policy_learner(inner), jax.jit(inner.init)(jax.random.key(0)), draw_episode(0)


@jax.jit
def draw_episode(seed):
  sample_key, episode_key = jax.random.split(jax.random.key(seed))
  return TASKS.episode(TASKS.sample(sample_key), episode_key)


@pytest.mark.slow
def test_all_of_them_draw_alike(name):
  meta, task = jax.jit(INNER[name].init)(jax.random.key(0)), jnp.float32(0.5)
  own = jax.jit(INNER[name].experience)(meta.theta, task, jax.random.key(1))
  assert_trees_close(own, EXPERIENCE(meta.theta, task, jax.random.key(1)), rtol=1e-6)


def described(tree):
  return jax.tree.map(lambda a: (a.shape, a.dtype), tree)


def test_adapt_keeps_structure_shapes_and_dtypes_and_path_holds_each_step(name):
  learner, meta, episode = start(name)
  assert (meta.alpha is None) == name.startswith('maml')
  adapted = learner.adapt(meta, episode.support, jax.random.key(1))
  assert described(adapted) == described(meta.theta)
  path = jax.device_get(learner.path(meta, episode.support, jax.random.key(1)))
  assert len(path['log_std']) == INNER[name].steps + 1
  assert_trees_close(jax.tree.map(lambda a: a[0], path), meta.theta, rtol=0, atol=0)
  assert_trees_close(jax.tree.map(lambda a: a[-1], path), adapted, rtol=1e-4, atol=1e-5)
  assert not np.allclose(adapted['Dense_0']['kernel'], meta.theta['Dense_0']['kernel'])


@pytest.mark.parametrize('options', [{}, dict(alpha=0.1)])
def test_a_part_of_the_policy_adapts(options):
  """As with rates of zero for the rest."""
  whole = rl.gaussian(2, 1, hidden=(4,))
  head = whole._replace(adapts=lambda name: name.startswith('Dense_1'))
  part = rl.policy_gradient(ENVIRONMENT, head, trajectories=3, **options)
  meta, task = jax.jit(part.init)(jax.random.key(0)), jnp.float32(0.5)
  rates = jax.tree.map(jnp.zeros_like, meta.theta) | {'Dense_1': 0.1}

  @jax.jit
  def steps(theta):
    drawn = part.experience(theta, task, jax.random.key(1))
    every = rl.policy_gradient(ENVIRONMENT, whole, trajectories=3, alpha=rates)
    own = jax.tree.map(lambda a: jnp.full_like(a, 0.1), meta.alpha)
    return part.step(ms.MetaParams(theta, own), theta, drawn, 0), every.step(
      ms.MetaParams(theta, None), theta, drawn, 0
    )

  assert_trees_close(*steps(meta.theta), rtol=1e-6)
  if not options:
    assert meta.alpha['Dense_0'] == {'bias': None, 'kernel': None}
    assert described(meta.alpha['Dense_1']) == described(meta.theta['Dense_1'])


@jax.jit
def slope_by_hand(theta, task, key):
  """The slope of Σ log π(a) A over the valid steps of new trajectories, and how many steps those are."""
  drawn = rl.collect(ENVIRONMENT, POLICY, theta, task, key, num=6)
  advantages = rl.advantages(drawn)

  def total(theta):
    log_probs = POLICY.log_prob(POLICY.apply(theta, drawn.observations), drawn.actions)
    return jnp.sum(jnp.where(drawn.valid, log_probs * advantages, 0))

  return jax.grad(total)(theta), drawn.valid.sum()


def adapt_rates(meta):
  """What each entry of θ is moved by, times the slope."""
  if meta.alpha is None:
    return jax.tree.map(lambda t: 0.1, meta.theta)
  return jax.tree.map(lambda a, part: jax.tree.map(lambda t: np.asarray(a), part), meta.alpha, meta.theta)


def test_a_step_is_adapt_on_trajectories_of_the_policy_before_it(name):
  """The inner loop put together by hand: the plain policy gradient of log-probabilities, whatever the estimator."""
  learner, meta, episode = start(name)
  theta = meta.theta
  rates = adapt_rates(meta)
  for key in jax.random.split(jax.random.key(1), INNER[name].steps):
    slope, steps = jax.device_get(slope_by_hand(theta, episode.support, key))
    count = 6 if 'over trajectories' in name else steps
    theta = jax.tree.map(lambda t, a, g, n=count: np.float32(t + a * g / n), theta, rates, slope)
  assert_trees_close(learner.adapt(meta, episode.support, jax.random.key(1)), theta, rtol=1e-3, atol=1e-5)


def test_replay_is_what_explore_did_and_follows_meta(name):
  inner = compiled(name)
  _, meta, episode = start(name)
  experiences, path = inner.explore(meta, episode.support, jax.random.key(1))
  assert len(experiences) == inner.steps
  assert len(path) == inner.steps + 1
  assert_trees_close(inner.replay(meta, experiences), path[-1], rtol=1e-4, atol=1e-5)
  other = meta._replace(theta=jax.tree.map(lambda a: np.asarray(a) + np.float32(0.1), meta.theta))
  moved = inner.replay(other, experiences)
  assert not np.allclose(moved['Dense_0']['kernel'], path[-1]['Dense_0']['kernel'] + 0.1, rtol=1e-4)


def test_first_order_lets_the_adapted_policy_move_as_theta_does():
  inner = INNER['meta_sgd, first order']
  _, meta, episode = start('meta_sgd')  # Nothing before the first derivative knows of the order.
  experiences, _ = compiled('meta_sgd').explore(meta, episode.support, jax.random.key(1))
  along = jax.tree.map(lambda a: np.ones(a.shape, a.dtype), meta.theta)
  move = lambda inner: jax.jit(
    lambda meta: jax.jvp(lambda theta: inner.replay(meta._replace(theta=theta), experiences), (meta.theta,), (along,))
  )(meta)[1]
  assert_trees_close(move(inner), along, rtol=0, atol=0)
  assert not np.allclose(move(INNER['meta_sgd'])['Dense_0']['kernel'], 1, rtol=1e-3)


def test_what_lies_after_an_end_does_not_reach_a_gradient():
  """Not even where it is no number, as what is observed of a simulation that blew up."""
  inner = INNER['meta_sgd, 2 steps']
  _, meta, episode = start('meta_sgd, 2 steps')
  explored = compiled('meta_sgd, 2 steps').explore(meta, episode.support, jax.random.key(1))
  experiences, _ = jax.device_get(explored)

  def ended(experience, junk):
    drawn = experience.trajectories
    valid = drawn.valid.copy()
    valid[::2, 2:] = False
    spoil = lambda leaf: np.where(valid.reshape(valid.shape + (1,) * (leaf.ndim - 2)), leaf, np.float32(junk))
    spoilt = {name: spoil(getattr(drawn, name)) for name in ('observations', 'actions', 'log_probs', 'rewards')}
    return rl.Experience(drawn._replace(valid=valid, **spoilt), np.where(valid, experience.advantages, np.float32(0)))

  @jax.jit
  def slopes(meta, experiences, last):
    def value(meta):
      theta = inner.replay(meta, experiences)
      return inner.surrogate(rl.likelihood_ratio, act_again(POLICY, theta, last), last)

    return jax.value_and_grad(value)(meta)

  clean, spoilt = ([ended(e, junk) for e in experiences] for junk in (0.0, np.nan))
  expected = slopes(meta, tuple(clean), clean[0])
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(expected))
  assert_trees_close(slopes(meta, tuple(spoilt), spoilt[0]), expected, rtol=0, atol=0)


def test_rates_scale_each_step_when_drawn_and_when_replayed():
  plain = compiled('maml, lvc, 2 steps')
  options = dict(trajectories=6, steps=2, alpha=0.1, estimator='lvc')
  halved, none = (rl.policy_gradient(ENVIRONMENT, POLICY, rates=rates, **options) for rates in ((1.0, 0.5), (1.0, 0.0)))
  _, meta, episode = start('maml, lvc, 2 steps')
  experiences, full = plain.explore(meta, episode.support, jax.random.key(1))
  _, half = jax.jit(halved.explore)(meta, episode.support, jax.random.key(1))
  assert_trees_close(half[1], full[1], rtol=1e-6)
  assert_trees_close(jax.jit(none.replay)(meta, experiences), full[1], rtol=1e-6)
  middle = jax.tree.map(lambda a, b: (np.asarray(a) + np.asarray(b)) / 2, full[1], full[2])
  assert_trees_close(half[2], middle, rtol=1e-5, atol=1e-6)
  assert_trees_close(jax.jit(halved.replay)(meta, experiences), middle, rtol=1e-5, atol=1e-6)


def not_compiled(name):
  return jax.value_and_grad(rl.policy_learner(INNER[name]).loss, has_aux=True)


@functools.cache
def loss_and_slope(name):
  return jax.jit(not_compiled(name))


DERIVED = ('meta_sgd, 2 steps', 'maml, score, over trajectories')
"""Those whose second derivatives are looked at whenever tests run."""


@pytest.mark.parametrize(
  'name', [pytest.param(name, marks=[pytest.mark.slow] * (name not in DERIVED)) for name in INNER], indirect=True
)
def test_batched_equals_a_loop_and_every_part_that_is_learned_gets_a_gradient(name):
  _, meta, _ = start(name)
  keys = jax.random.split(jax.random.key(2), 3)
  at_once = jax.jit(jax.vmap(lambda meta, seed, key: loss_and_slope(name)(meta, draw_episode(seed), key), (None, 0, 0)))
  batched = jax.device_get(at_once(meta, np.arange(3), keys))
  for i in range(3):
    one = loss_and_slope(name)(meta, draw_episode(i), keys[i])
    assert_trees_close(jax.tree.map(lambda a, i=i: a[i], batched), one, rtol=2e-3, atol=1e-5)
  for path, slope in jax.tree_util.tree_leaves_with_path(jax.tree.map(lambda a: a.mean(0), batched[1])):
    assert np.all(np.isfinite(slope)), path
    assert np.max(np.abs(slope)) > 0, path


@pytest.mark.slow
def test_compiled_equals_not(name):
  _, meta, episode = start(name)
  about = meta, episode, jax.random.key(2)
  assert_trees_close(loss_and_slope(name)(*about), not_compiled(name)(*about), rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize('estimator', ['dice', pytest.param('score', marks=pytest.mark.slow)])
def test_the_outer_gradient_is_the_slope_of_the_surrogate_with_all_trajectories_held(estimator):
  with jax.enable_x64(True):
    inner = light(steps=2, estimator=estimator)
    learner, meta = rl.policy_learner(inner), to_float64(jax.jit(inner.init)(jax.random.key(0)))
    episode, key = draw_episode(0), jax.random.key(1)

    @jax.jit
    def draw(meta):
      experiences, path = inner.explore(meta, episode.support, key)
      return experiences, inner.experience(path[-1], *episode.query.x)

    @jax.jit
    @jax.value_and_grad
    def held(meta, experiences, after):
      distributions = inner.policy.apply(inner.replay(meta, experiences), after.trajectories.observations)
      return -inner.surrogate(rl.likelihood_ratio, distributions, after)

    drawn = draw(meta)
    slope = held(meta, *drawn)[1]
    assert_slopes_by_differences(lambda meta: held(meta, *drawn)[0], meta, slope)
    assert_trees_close(
      jax.jit(jax.grad(learner.loss, has_aux=True))(meta, episode, key)[0], slope, rtol=1e-6, atol=1e-9
    )


def assert_slopes_by_differences(value, meta, slope, directions=3, h=1e-7):
  """Along random directions of θ and of α."""
  rng = np.random.default_rng(0)
  for part in ('theta', 'alpha'):
    at, grad = jax.device_get((getattr(meta, part), getattr(slope, part)))
    for _ in range(directions):
      along = jax.tree.map(lambda a: rng.normal(size=a.shape), at)
      ahead, behind = (
        value(meta._replace(**{part: jax.tree.map(lambda a, d, step=step: a + step * d, at, along)}))
        for step in (h, -h)
      )
      found = sum(jax.tree.leaves(jax.tree.map(np.vdot, grad, along)))
      assert_close(found, float(ahead - behind) / (2 * h), rtol=1e-5, atol=1e-8)


def test_info_has_the_returns_before_and_after():
  learner, meta, episode = start('meta_sgd, 2 steps')
  (loss, info), _ = loss_and_slope('meta_sgd, 2 steps')(meta, episode, jax.random.key(1))
  experiences, path = compiled('meta_sgd, 2 steps').explore(meta, episode.support, jax.random.key(1))
  acted = learner.predict(path[-1], episode.query.x)
  assert_close(info['return_before'], experiences[0].trajectories.rewards.sum(-1).mean(), rtol=1e-5)
  assert_close(info['return_after'], acted.rewards.sum(-1).mean(), rtol=1e-5)
  assert_close(loss, 0, atol=1e-5)


def test_sampled_inner_gradient_is_the_exact_one_on_average():
  """Through every part: trajectories, advantages without a baseline, the surrogate, the step."""
  with jax.enable_x64(True):
    mdp = random_mdp(1)
    plain = rl.AdvantageConfig(discount=1.0, baseline=False, normalized=False)
    inner = rl.policy_gradient(
      environment(mdp), table_policy(), alpha=1.0, trajectories=20_000, advantage=plain, mean_over='trajectory'
    )
    theta = np.random.default_rng(3).normal(size=(3, 2))
    adapted = jax.jit(rl.policy_learner(inner).adapt)(ms.MetaParams(theta, None), (), jax.random.key(0))
    exact = jax.jit(jax.grad(lambda theta: expected_return(mdp, theta)))(theta)
    np.testing.assert_allclose(adapted - theta, exact, atol=0.05)
    assert len(all_trajectories(mdp)[1]) > 50  # It is not one path that all take.


@pytest.mark.parametrize('name', ['meta_sgd', pytest.param('maml', marks=pytest.mark.slow)], indirect=True)
def test_meta_training_with_optax(name):
  learner, optimizer = rl.policy_learner(INNER[name]), optax.adam(1e-2)
  state = ms.init(jax.random.key(0), TASKS, learner=learner, optimizer=optimizer)
  returns = []
  record = lambda progress: returns.extend(progress.info['return_after'])
  ms.train(
    state, TASKS, learner=learner, optimizer=optimizer, meta_iterations=100, meta_batch=4, chunk=50, callbacks=[record]
  )
  assert np.mean(returns[-20:]) > np.mean(returns[:20]) + 0.5


def test_evaluate_takes_what_was_done_for_outputs():
  inner = light(lambda state, action: action > 2, alpha=0.1)
  learner, meta = rl.policy_learner(inner), jax.jit(inner.init)(jax.random.key(0))
  evaluate = functools.partial(ms.evaluate, learner, meta, TASKS, jax.random.key(3), num_tasks=4)

  def error_where_steps_are_valid(drawn, task):
    error = jnp.mean(jnp.where(drawn.valid, drawn.actions[..., 0] - task, 0) ** 2)
    return jnp.where(jnp.mean(drawn.valid.astype(jnp.float32)) > 0.7, error, jnp.nan)

  returns, errors = (evaluate(metric_fn=metric) for metric in (rl.mean_return, error_where_steps_are_valid))
  assert returns.shape == (4, 1, 2)
  np.testing.assert_allclose(returns, -4 * errors, rtol=1e-4, equal_nan=False)


def test_returns_by_step_are_those_of_the_path():
  learner, meta, episode = start('meta_sgd, 2 steps')
  found = rl.returns_by_step(learner, meta, episode.support, jax.random.key(5))
  assert found.shape == (3, 6)
  adapt_key, judge_key = jax.random.split(jax.random.key(5))
  path = jax.device_get(learner.path(meta, episode.support, adapt_key))
  collect = jax.jit(functools.partial(rl.collect, ENVIRONMENT, POLICY, num=6))
  for t, key in enumerate(jax.random.split(judge_key, 3)):
    drawn = collect(jax.tree.map(lambda a, t=t: a[t], path), episode.support, key)
    assert_close(found[t], drawn.rewards.sum(-1), rtol=1e-4)


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    (dict(alpha=None), ['alpha', 'AlphaConfig', 'None']),
    (dict(alpha=ms.AlphaConfig(by_step=True)), ['alpha', 'by_step=False', 'by_step=True', 'rates']),
    (dict(mean_over='batch'), ['mean_over', "'step', 'trajectory'", "'batch'"]),
    (dict(estimator='reinforce'), ['estimator', "'reinforce'"]),
    (dict(steps=-1), ['steps', 'at least 0', '-1']),
    (dict(steps=2, rates=(1.0,)), ['rates', 'steps=2', '(1.0,)']),
    (dict(rates=(float('nan'),)), ['rates', 'finite', 'nan']),
    (dict(trajectories=0), ['trajectories', 'at least 1', '0']),
  ],
)
def test_bad_options(options, message):
  with pytest.raises(ValueError, match=saying(*message)):
    rl.policy_gradient(ENVIRONMENT, POLICY, **options)


@pytest.mark.parametrize(
  ('policy', 'message'),
  [
    (rl.gaussian(3, 1, hidden=(8,)), ["environment's observations", '(2,)']),
    (rl.gaussian(2, 2, hidden=(8,)), ["policy's actions", '(2,)', "environment's", '(1,)', 'action_size']),
  ],
)
def test_a_policy_for_another_environment(policy, message):
  with pytest.raises(ValueError, match=saying(*message)):
    rl.policy_gradient(ENVIRONMENT, policy)


def test_a_rate_that_does_not_fit_is_named():
  inner = rl.policy_gradient(ENVIRONMENT, POLICY, alpha={'Dense_9': 0.1})
  with pytest.raises(ValueError, match=saying("alpha['Dense_9']", 'theta')):
    jax.eval_shape(inner.init, jax.random.key(0))
