import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from finite_mdp import all_trajectories, environment, expected_return, random_mdp, table_policy
from problems import assert_close, assert_slopes_by_differences, assert_trees_close, to_float64

import metasgd_jax as ms
from metasgd_jax import rl
from metasgd_jax.rl.learner import act_again

POLICY = rl.gaussian(2, 1, hidden=(8,))


def aiming():
  """Tasks to solve at once: stand at 0 and each step say the task's number; the reward is less the squared error."""
  return rl.Environment(
    sample=lambda key: jax.random.uniform(key, minval=-1.0, maxval=1.0),
    reset=lambda task, key: jnp.zeros((), jnp.int32),
    observe=lambda task, state: jnp.stack([jnp.ones_like(task), state / 4]),
    step=lambda task, state, action, key: (state + 1, -((action[0] - task) ** 2), (state >= 2) & (action[0] > 2)),
    observation_size=2,
    action_size=1,
    horizon=4,
  )


ENVIRONMENT = aiming()
TASKS = rl.task_distribution(ENVIRONMENT)
INNER = {
  'meta_sgd': rl.policy_gradient(ENVIRONMENT, POLICY, trajectories=6),
  'meta_sgd, 2 steps': rl.policy_gradient(ENVIRONMENT, POLICY, trajectories=6, steps=2),
  'meta_sgd, rates by layer': rl.policy_gradient(ENVIRONMENT, POLICY, trajectories=6, alpha_per='layer'),
  'meta_sgd, first order': rl.policy_gradient(ENVIRONMENT, POLICY, trajectories=6, first_order=True),
  'maml': rl.policy_gradient(ENVIRONMENT, POLICY, trajectories=6, alpha=0.1),
  'maml, score, over trajectories': rl.policy_gradient(
    ENVIRONMENT, POLICY, trajectories=6, alpha=0.1, estimator='score', mean_over='trajectory'
  ),
  'maml, lvc, 3 steps': rl.policy_gradient(ENVIRONMENT, POLICY, trajectories=6, alpha=0.1, estimator='lvc', steps=3),
}


@pytest.fixture(params=INNER)
def name(request):
  return request.param


def start(name, seed=0):
  learner = rl.policy_learner(INNER[name])
  episode = draw_episode(seed)
  return learner, learner.init(jax.random.key(seed), episode), episode


def draw_episode(seed):
  sample_key, episode_key = jax.random.split(jax.random.key(seed))
  return TASKS.episode(TASKS.sample(sample_key), episode_key)


def described(tree):
  return jax.tree.map(lambda a: (a.shape, a.dtype), tree)


def test_adapt_keeps_structure_shapes_and_dtypes_and_path_holds_each_step(name):
  learner, meta, episode = start(name)
  assert (meta.alpha is None) == name.startswith('maml')
  adapted = jax.jit(learner.adapt)(meta, episode.support, jax.random.key(1))
  assert described(adapted) == described(meta.theta)
  path = jax.jit(learner.path)(meta, episode.support, jax.random.key(1))
  assert len(path['log_std']) == INNER[name].steps + 1
  assert_trees_close(jax.tree.map(lambda a: a[0], path), meta.theta, rtol=0, atol=0)
  assert_trees_close(jax.tree.map(lambda a: a[-1], path), adapted, rtol=1e-4, atol=1e-5)
  assert not np.allclose(adapted['Dense_0']['kernel'], meta.theta['Dense_0']['kernel'])


def test_a_step_is_adapt_on_trajectories_of_the_policy_before_it(name):
  """The inner loop put together by hand: the plain policy gradient of log-probabilities, whatever the estimator."""
  inner = INNER[name]
  learner, meta, episode = start(name)
  theta, collect = meta.theta, jax.jit(functools.partial(rl.collect, ENVIRONMENT, POLICY, num=6))
  for key in jax.random.split(jax.random.key(1), inner.steps):
    drawn = collect(theta, episode.support, key)
    advantages = jax.jit(rl.advantages)(drawn)

    def negative(theta, drawn=drawn, advantages=advantages):
      log_probs = POLICY.log_prob(POLICY.apply(theta, drawn.observations), drawn.actions)
      count = 6 if 'over trajectories' in name else drawn.valid.sum()
      return -jnp.sum(jnp.where(drawn.valid, log_probs * advantages, 0)) / count

    rate = 0.1 if meta.alpha is None else meta.alpha
    theta = ms.adapt(theta, rate, None, loss_fn=lambda theta, _, loss=negative: loss(theta))
  adapted = jax.jit(learner.adapt)(meta, episode.support, jax.random.key(1))
  assert_trees_close(adapted, theta, rtol=1e-3, atol=1e-5)


def test_replay_is_what_explore_did_and_follows_meta(name):
  inner = INNER[name]
  _, meta, episode = start(name)
  experiences, path = jax.jit(inner.explore)(meta, episode.support, jax.random.key(1))
  assert len(experiences) == inner.steps
  assert len(path) == inner.steps + 1
  replay = jax.jit(inner.replay)
  assert_trees_close(replay(meta, experiences), path[-1], rtol=1e-4, atol=1e-5)
  other = meta._replace(theta=jax.tree.map(lambda a: a + 0.1, meta.theta))
  moved = replay(other, experiences)
  assert not np.allclose(moved['Dense_0']['kernel'], path[-1]['Dense_0']['kernel'] + 0.1, rtol=1e-4)


def test_what_lies_after_an_end_does_not_reach_a_gradient():
  """Not even where it is no number, as what is observed of a simulation that blew up."""
  inner = INNER['meta_sgd, 2 steps']
  _, meta, episode = start('meta_sgd, 2 steps')
  experiences, _ = jax.jit(inner.explore)(meta, episode.support, jax.random.key(1))
  cut = lambda valid: valid.at[::2, 2:].set(False)

  def ended(experience, junk):
    drawn = experience.trajectories
    valid = cut(drawn.valid)
    spoil = lambda leaf: jnp.where(valid.reshape(valid.shape + (1,) * (leaf.ndim - 2)), leaf, junk)
    spoilt = {name: spoil(getattr(drawn, name)) for name in ('observations', 'actions', 'log_probs', 'rewards')}
    return rl.Experience(drawn._replace(valid=valid, **spoilt), jnp.where(valid, experience.advantages, 0))

  @jax.jit
  def slopes(meta, experiences, last):
    def value(meta):
      theta = inner.replay(meta, experiences)
      return inner.surrogate(rl.likelihood_ratio, act_again(POLICY, theta, last), last)

    return jax.value_and_grad(value)(meta)

  clean, spoilt = ([ended(e, junk) for e in experiences] for junk in (0.0, jnp.nan))
  expected = slopes(meta, tuple(clean), clean[0])
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(expected))
  assert_trees_close(slopes(meta, tuple(spoilt), spoilt[0]), expected, rtol=0, atol=0)


def test_rates_scale_each_step_when_drawn_and_when_replayed():
  options = dict(trajectories=6, steps=2, alpha=0.3)
  plain, halved, none = (
    rl.policy_gradient(ENVIRONMENT, POLICY, rates=rates, **options) for rates in (None, (1.0, 0.5), (1.0, 0.0))
  )
  meta, task, key = plain.init(jax.random.key(0)), draw_episode(0).support, jax.random.key(1)
  experiences, full = plain.explore(meta, task, key)
  _, half = halved.explore(meta, task, key)
  _, still = none.explore(meta, task, key)
  assert_trees_close(half[1], full[1], rtol=1e-6)
  assert_trees_close(still[2], full[1], rtol=1e-6)
  middle = jax.tree.map(lambda a, b: (a + b) / 2, full[1], full[2])
  assert_trees_close(half[2], middle, rtol=1e-5, atol=1e-6)
  assert_trees_close(halved.replay(meta, experiences), middle, rtol=1e-5, atol=1e-6)


def test_batched_equals_a_loop_and_compiled_equals_not(name):
  learner, meta, _ = start(name)
  keys, several = jax.random.split(jax.random.key(2), 3), [draw_episode(seed) for seed in range(3)]
  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *several)
  grad = jax.value_and_grad(learner.loss, has_aux=True)
  batched = jax.jit(jax.vmap(grad, (None, 0, 0)))(meta, stacked, keys)
  compiled = jax.jit(grad)
  for i, of_one in enumerate((grad, compiled, compiled)):
    one = of_one(meta, several[i], keys[i])
    assert_trees_close(jax.tree.map(lambda a, i=i: a[i], batched), one, rtol=2e-3, atol=1e-5)


def test_every_part_that_is_learned_gets_a_gradient(name):
  learner, meta, _ = start(name)
  keys = jax.random.split(jax.random.key(2), 3)
  several = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[draw_episode(seed) for seed in range(3)])
  grads = jax.jit(lambda: ms.value_and_grad(learner, meta, several, keys)[1])()
  for path, grad in jax.tree_util.tree_leaves_with_path(grads):
    assert np.all(np.isfinite(grad)), path
    assert float(jnp.max(jnp.abs(grad))) > 0, path


@pytest.mark.parametrize('estimator', ['dice', 'score'])
def test_the_outer_gradient_is_the_slope_of_the_surrogate_with_all_trajectories_held(estimator):
  with jax.enable_x64(True):
    inner = rl.policy_gradient(ENVIRONMENT, POLICY, trajectories=6, steps=2, estimator=estimator)
    learner, meta = rl.policy_learner(inner), to_float64(inner.init(jax.random.key(0)))
    episode = draw_episode(0)
    experiences, path = jax.jit(inner.explore)(meta, episode.support, jax.random.key(1))
    after = jax.jit(inner.experience)(path[-1], *episode.query.x)

    def held(meta):
      distributions = POLICY.apply(inner.replay(meta, experiences), after.trajectories.observations)
      return -inner.surrogate(rl.likelihood_ratio, distributions, after)

    assert_slopes_by_differences(held, meta)
    found = jax.jit(jax.grad(lambda m: learner.loss(m, episode, jax.random.key(1))[0]))(meta)
    assert_trees_close(found, jax.jit(jax.grad(held))(meta), rtol=1e-6, atol=1e-9)


def test_info_has_the_returns_before_and_after():
  learner, meta, episode = start('meta_sgd, 2 steps')
  loss, info = learner.loss(meta, episode, jax.random.key(1))
  experiences, path = INNER['meta_sgd, 2 steps'].explore(meta, episode.support, jax.random.key(1))
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
    theta = jnp.asarray(np.random.default_rng(3).normal(size=(3, 2)))
    adapted = jax.jit(rl.policy_learner(inner).adapt)(ms.MetaParams(theta, None), (), jax.random.key(0))
    np.testing.assert_allclose(adapted - theta, jax.grad(expected_return, 1)(mdp, theta), atol=0.05)
    assert len(all_trajectories(mdp)[1]) > 50  # It is not one path that all take.


@pytest.mark.parametrize('build', [dict(alpha=0.1), dict(alpha_range=(0.1, 0.1))])
def test_trpo_meta_iterations_raise_the_return_after_an_update(build):
  inner = rl.policy_gradient(ENVIRONMENT, POLICY, trajectories=10, **build)
  step = functools.partial(rl.trpo_meta_step, inner=inner, meta_batch=10, max_kl=0.05, damping=0.01)
  meta = inner.init(jax.random.key(0))
  keys = jax.random.split(jax.random.key(1), 30)
  trained, info = jax.jit(lambda meta, keys: jax.lax.scan(step, meta, keys))(meta, keys)
  assert jax.tree.structure(trained) == jax.tree.structure(meta)
  assert (np.asarray(info['kl']) <= 0.05 + 1e-6).all()
  assert np.mean(np.asarray(info['step']) > 0) > 0.8
  assert (np.asarray(info['improvement'])[np.asarray(info['step']) > 0] > 0).all()
  learner, judge_keys = rl.policy_learner(inner), jax.random.split(jax.random.key(9), 50)
  tasks = jax.vmap(ENVIRONMENT.sample)(judge_keys)
  judge = jax.jit(jax.vmap(functools.partial(rl.returns_by_step, learner), (None, 0, 0)))
  before, after = judge(meta, tasks, judge_keys).mean((0, 2)), judge(trained, tasks, judge_keys).mean((0, 2))
  assert after[1] > before[1] + 3
  assert after[1] > after[0] + 0.8  # It has learned to adapt, not only a better start.


def test_a_trpo_meta_step_by_its_parts():
  """Collected by hand for each task; then one TRPO step of the mean over tasks."""
  with jax.enable_x64(True):
    trpo_by_its_parts(INNER['meta_sgd, 2 steps'])


def trpo_by_its_parts(inner):
  meta, key = inner.init(jax.random.key(0)), jax.random.key(4)
  found, info = jax.jit(functools.partial(rl.trpo_meta_step, inner=inner, meta_batch=3, damping=0.01))(meta, key)
  explore, experience = jax.jit(inner.explore), jax.jit(inner.experience)
  explored, after = [], []
  for sample_key, explore_key, act_key in jax.random.split(key, (3, 3)).T:
    task = ENVIRONMENT.sample(sample_key)
    explored.append(explore(meta, task, explore_key))
    after.append(experience(explored[-1][1][-1], task, act_key))

  def distributions(meta):
    return [
      POLICY.apply(inner.replay(meta, e), a.trajectories.observations)
      for (e, _), a in zip(explored, after, strict=True)
    ]

  def surrogate(distributions):
    means = []
    for d, (drawn, advantages) in zip(distributions, after, strict=True):
      ratios = jnp.exp(POLICY.log_prob(d, drawn.actions) - drawn.log_probs)
      means.append(jnp.sum(jnp.where(drawn.valid, ratios * advantages, 0)) / drawn.valid.sum())
    return sum(means) / 3

  def kl(old, new):
    valid = [a.trajectories.valid for a in after]
    total = sum(jnp.sum(jnp.where(v, POLICY.kl(p, q), 0)) for v, p, q in zip(valid, old, new, strict=True))
    return total / sum(v.sum() for v in valid)

  expected, update = jax.jit(
    lambda meta: rl.trpo_update(meta, distributions=distributions, surrogate=surrogate, kl=kl, damping=0.01)
  )(meta)
  assert update.step > 0
  assert_trees_close(found, expected, rtol=1e-5, atol=1e-8)
  assert_close(info['kl'], update.kl, rtol=1e-5)
  assert_close(info['improvement'], update.improvement, rtol=1e-5)
  assert_close(info['return_before'], np.mean([e[0][0].trajectories.rewards.sum(-1) for e in explored]), rtol=1e-4)
  assert_close(info['return_after'], np.mean([a.trajectories.rewards.sum(-1) for a in after]), rtol=1e-4)


def test_tasks_at_once_and_seeds_side_by_side_change_no_number():
  inner = INNER['meta_sgd']
  step = lambda **options: jax.jit(
    functools.partial(rl.trpo_meta_step, inner=inner, meta_batch=4, damping=0.01, **options)
  )
  keys = jax.random.split(jax.random.key(0), (2, 2))
  metas = jax.vmap(inner.init)(keys[0])
  alone = [step(tasks_at_once=1)(jax.tree.map(lambda a, i=i: a[i], metas), keys[1][i]) for i in range(2)]
  other = step(tasks_at_once=3)(jax.tree.map(lambda a: a[0], metas), keys[1][0])  # Three, and then one.
  assert_trees_close(other, alone[0], rtol=5e-3, atol=1e-4)
  together = jax.jit(jax.vmap(functools.partial(rl.trpo_meta_step, inner=inner, meta_batch=4, damping=0.01)))(
    metas, keys[1]
  )
  for i in range(2):
    assert_trees_close(jax.tree.map(lambda a, i=i: a[i], together), alone[i], rtol=5e-3, atol=1e-4)


def test_curvature_of_a_part_of_the_tasks_keeps_the_bound_over_all():
  inner = INNER['meta_sgd']
  step = lambda **options: jax.jit(
    functools.partial(rl.trpo_meta_step, inner=inner, meta_batch=4, damping=0.01, **options)
  )
  meta, key = inner.init(jax.random.key(0)), jax.random.key(1)
  whole, part = step()(meta, key), step(curvature_tasks=2)(meta, key)
  assert_close(part[1]['return_after'], whole[1]['return_after'], rtol=1e-5)  # The same trajectories.
  assert 0 < part[1]['kl'] <= 0.01
  assert not np.allclose(part[0].theta['Dense_0']['kernel'], whole[0].theta['Dense_0']['kernel'], rtol=1e-3)


@pytest.mark.parametrize('name', ['meta_sgd', 'maml'], indirect=True)
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
  learner, meta, _ = start('maml, lvc, 3 steps')
  evaluate = functools.partial(ms.evaluate, learner, meta, TASKS, jax.random.key(3), num_tasks=4)
  returns = evaluate(metric_fn=rl.mean_return)
  assert returns.shape == (4, 1, 4)
  errors = evaluate(
    metric_fn=lambda drawn, task: jnp.mean(jnp.where(drawn.valid, drawn.actions[..., 0] - task, 0) ** 2)
  )
  steps = evaluate(metric_fn=lambda drawn, task: jnp.mean(drawn.valid.astype(jnp.float32)))
  np.testing.assert_allclose(returns, -4 * errors, rtol=1e-4)
  assert (steps > 0.7).all()


def test_returns_by_step_are_those_of_the_path():
  learner, meta, episode = start('meta_sgd, 2 steps')
  found = rl.returns_by_step(learner, meta, episode.support, jax.random.key(5))
  assert found.shape == (3, 6)
  adapt_key, judge_key = jax.random.split(jax.random.key(5))
  path = learner.path(meta, episode.support, adapt_key)
  for t, key in enumerate(jax.random.split(judge_key, 3)):
    theta = jax.tree.map(lambda a, t=t: a[t], path)
    drawn = rl.collect(ENVIRONMENT, POLICY, theta, episode.support, key, num=6)
    assert_close(found[t], drawn.rewards.sum(-1), rtol=1e-4)


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    (dict(alpha_range=(0.2, 0.1)), 'alpha must start from a finite range'),
    (dict(alpha_per='row'), r"alpha_per must be one of \('entry', 'leaf', 'layer', 'all'\), got 'row'"),
    (dict(mean_over='batch'), r"mean_over must be one of \('step', 'trajectory'\), got 'batch'"),
    (dict(estimator='reinforce'), 'estimator must be one of'),
    (dict(steps=-1), 'steps must be an integer of at least 0, got -1'),
    (dict(steps=2, rates=(1.0,)), r'rates must be 2 finite numbers, one for each of steps=2, got \(1.0,\)'),
    (dict(rates=(float('nan'),)), 'rates must be 1 finite numbers'),
    (dict(trajectories=0), 'num, of trajectories, must be an integer of at least 1, got 0'),
  ],
)
def test_bad_options(options, message):
  with pytest.raises(ValueError, match=message):
    rl.policy_gradient(ENVIRONMENT, POLICY, **options)


@pytest.mark.parametrize(
  ('policy', 'message'),
  [
    (rl.gaussian(3, 1, hidden=(8,)), r"the policy does not take the environment's observations, \(2,\): "),
    (rl.gaussian(2, 2, hidden=(8,)), r"the policy's actions are \(2,\), the environment's \(1,\); build it with its"),
  ],
)
def test_a_policy_for_another_environment(policy, message):
  with pytest.raises(ValueError, match=message):
    rl.policy_gradient(ENVIRONMENT, policy)


def test_a_rate_that_does_not_fit_is_named():
  inner = rl.policy_gradient(ENVIRONMENT, POLICY, alpha={'Dense_9': 0.1})
  with pytest.raises(ValueError, match=r"alpha\['Dense_9'\] matches nothing in theta"):
    inner.init(jax.random.key(0))


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    (dict(meta_batch=0), 'meta_batch must be an integer of at least 1, got 0'),
    (dict(tasks_at_once=0), 'tasks_at_once must be an integer of at least 1, got 0'),
    (dict(meta_batch=2, curvature_tasks=3), 'curvature_tasks must be at most meta_batch=2, got 3'),
  ],
)
def test_bad_options_of_a_meta_step(options, message):
  inner = INNER['maml']
  with pytest.raises(ValueError, match=message):
    rl.trpo_meta_step(inner.init(jax.random.key(0)), jax.random.key(1), inner=inner, **options)
