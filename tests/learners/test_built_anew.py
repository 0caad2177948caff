"""Learners, tasks and metrics that are built anew from equal arguments share their compiled programs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import OneLayer, assert_close, assert_trees_close, compilations, random_bank

import metasgd_jax as ms
from metasgd_jax import rl
from metasgd_jax.outer.bad_numbers import skip_bad_steps
from metasgd_jax.types import equal_by_arguments, equal_partial

MSE, CROSS_ENTROPY, ACCURACY = ms.losses.mean_squared_error, ms.losses.cross_entropy, ms.losses.accuracy
OPTIMIZER = optax.sgd(0.1)
BANK = random_bank(size=4)


def mlp(hidden=(4,), **options):
  return ms.nn.from_linen(ms.nn.MLP(hidden, **options))


def net():
  return ms.nn.from_linen(OneLayer(3))


def hyper_learner(rate):
  return ms.learners.inner_optimizer(mlp(), MSE, optimizer_fn=optax.sgd, hyper=rate)


def partial_learner(rank):
  return ms.meta_sgd(ms.low_rank(ms.adapt_only(mlp(), str.isascii), rank, str.isprintable), MSE)


def inner_of_policy(alpha=0.5, start='fixed', std=1.0):
  environment, policy = rl.navigation(start, horizon=3), rl.gaussian(2, 2, hidden=(4,), std=std)
  return rl.policy_gradient(environment, policy, alpha=alpha, trajectories=2)


BUILDERS = {  # A builder, and two different arguments.
  'a model': (lambda hidden: mlp((hidden,)), 4, 5),
  'the type of a field of a module': (lambda deviation: mlp(stddev=deviation), 1, 1.0),
  'a model that adapts in part': (lambda adapts: ms.adapt_only(mlp(), adapts), str.isascii, str.isprintable),
  'low_rank': (partial_learner, 1, 2),
  'its alpha': (lambda per: ms.meta_sgd(mlp(), MSE, alpha=ms.AlphaConfig(per=per)), 'leaf', 'all'),
  'policy_gradient': (inner_of_policy, ms.AlphaConfig(), 0.5),
  'its environment': (lambda start: inner_of_policy(start=start), 'fixed', 'varying'),
  'policy_learner': (lambda std: rl.policy_learner(inner_of_policy(std=std)), 1.0, 2.0),
  'pendulum': (lambda horizon: rl.pendulum(horizon=horizon), 5, 6),
  'meta_sgd': (lambda steps: ms.meta_sgd(mlp(), MSE, steps=steps), 1, 2),
  'its loss': (lambda loss: ms.meta_sgd(mlp(), loss), MSE, CROSS_ENTROPY),
  'its model': (lambda scale: ms.meta_sgd(mlp(stddev=scale), MSE), 0.1, 0.2),
  'its weights': (lambda weight: ms.meta_sgd(mlp(), MSE, steps=2, step_weights=[weight, 1.0]), 0.5, 0.6),
  'its metrics': (lambda metric: ms.meta_sgd(net(), CROSS_ENTROPY, metrics={'a': metric}), ACCURACY, CROSS_ENTROPY),
  'the name of a metric': (lambda name: ms.meta_sgd(net(), CROSS_ENTROPY, metrics={name: ACCURACY}), 'a', 'b'),
  'maml': (lambda alpha: ms.maml(mlp(), MSE, alpha=alpha), {'Dense_0': None, 'Dense_1': 0.1}, 0.1),
  'the type of a rate': (lambda alpha: ms.maml(mlp(), MSE, alpha=alpha), 1.0, np.float32(1)),
  'inner_optimizer': (hyper_learner, 0.1, 0.2),
  'meta_lstm': (lambda units: ms.learners.meta_lstm(mlp(), MSE, units=units), 3, 4),
  'prototypical': (lambda way: ms.learners.prototypical(net(), way=way), 3, 4),
  'matching': (lambda scale: ms.learners.matching(net(), way=3, scale=scale), 7.0, 8.0),
  'siamese': (lambda way: ms.learners.siamese(net(), way=way), 3, 4),
  'mann': (lambda way: ms.learners.mann(way=3, cell=ms.learners.PlainCell(3, units=way)), 3, 4),
  'fine_tuning': (lambda alpha: ms.learners.fine_tuning(net(), classes=5, way=3, alpha=alpha), 0.1, 0.2),
  'ensemble': (lambda way: ms.learners.ensemble(ms.learners.prototypical(net(), way=way)), 3, 4),
  'per_token': (ms.losses.per_token, ACCURACY, CROSS_ENTROPY),
  'masked': (lambda metric: ms.losses.per_token(ms.losses.masked(metric)), ACCURACY, CROSS_ENTROPY),
  'shift': (ms.tasks.augmentation.shift, 1, 2),
  'light': (ms.tasks.augmentation.light, 0.1, 0.2),
  'chain': (lambda pixels: ms.tasks.augmentation.chain(ms.tasks.augmentation.shift(pixels)), 1, 2),
  'optax': (equal_by_arguments(optax.adam), 1e-3, 1e-2),
  'skip_bad_steps': (lambda rate: skip_bad_steps(equal_by_arguments(optax.adam)(rate)), 1e-3, 1e-2),
  'a partial function': (lambda axis: equal_partial(jnp.sum, axis=axis), 0, 1),
}


@pytest.mark.parametrize('name', BUILDERS)
def test_equal_arguments_give_equal_functions_and_others_do_not(name):
  build, argument, other = BUILDERS[name]
  first, again, different = build(argument), build(argument), build(other)
  assert first == again
  assert hash(first) == hash(again)
  assert first != different


def test_defaults_and_keywords_are_the_same_arguments():
  assert ms.meta_sgd(mlp(), MSE) == ms.meta_sgd(mlp(), loss_fn=MSE, steps=1, alpha=ms.AlphaConfig(0.005, high=0.1))


TASKS = {  # A builder, and two different arguments.
  'sinusoid': (lambda shot: ms.tasks.sinusoid(shot=shot), 5, 6),
  'sinusoid, its ranges': (lambda high: ms.tasks.sinusoid(ms.tasks.SinusoidConfig(x=(0.0, high))), 1.0, 2.0),
  'glyphs': (lambda size: ms.tasks.glyphs(ms.tasks.GlyphConfig(size=size), way=3, shot=1, query=1), 8, 9),
  'markov': (lambda query: ms.tasks.markov_chains(shot=1, query=query), 1, 2),
  'few_shot': (lambda way: ms.tasks.few_shot(BANK, way=way, shot=1, query=1), 3, 4),
  'all_classes': (lambda batch: ms.tasks.all_classes(BANK, batch=batch), 3, 4),
  'augmented': (
    lambda pixels: ms.tasks.augmented(
      ms.tasks.few_shot(BANK, way=3, shot=1, query=1), ms.tasks.augmentation.shift(pixels)
    ),
    1,
    2,
  ),
}


@pytest.mark.parametrize('name', TASKS)
def test_tasks_of_equal_arguments_are_one_program(name):
  """Arrays, such as those of a bank, are arguments of the program."""
  build, argument, other = TASKS[name]
  first, again, different = (jax.tree.structure(build(value)) for value in (argument, argument, other))
  assert first == again
  assert first != different


def sine_round(steps=1, shot=5, deviation=0.1):
  learner, tasks = ms.meta_sgd(mlp(stddev=deviation), MSE, steps=steps), ms.tasks.sinusoid(shot=shot)
  return trained(learner, tasks, ms.losses.mean_squared_error)


def image_round(tasks):
  options = dict(way=3, metrics={'accuracy': ms.losses.accuracy})
  return trained(ms.learners.prototypical(net(), **options), tasks, ms.losses.accuracy)


def partial_round():
  return trained(partial_learner(1), ms.tasks.sinusoid(), MSE)


def policy_round():
  """TRPO has a loop of its own."""
  inner = inner_of_policy(ms.AlphaConfig())
  state = rl.train(rl.init(jax.random.key(0), inner), inner=inner, meta_iterations=2, meta_batch=2)
  learner, tasks = rl.policy_learner(inner), rl.task_distribution(inner.environment)
  options = dict(metric_fn=rl.mean_return, num_tasks=2, repeats=1)
  return jax.device_get((state.meta, ms.evaluate(learner, state.meta, tasks, jax.random.key(1), **options)))


def trained(learner, tasks, metric):
  options = dict(learner=learner, optimizer=OPTIMIZER)
  state = ms.init(jax.random.key(0), tasks, **options)
  state = ms.train(state, tasks, meta_iterations=2, meta_batch=2, **options)
  values = ms.evaluate(learner, state.meta, tasks, jax.random.key(1), metric_fn=metric, num_tasks=2, repeats=1)
  return jax.device_get((state.meta, values))


def images():
  return ms.tasks.augmented(
    ms.tasks.few_shot(random_bank(size=4), way=3, shot=1, query=1), ms.tasks.augmentation.shift(1)
  )


def streamed():
  bank = random_bank(size=4)
  return ms.tasks.stream(bank, ms.tasks.image_indices(bank, way=3, shot=1, query=1))


@pytest.mark.parametrize(
  'one_round',
  [sine_round, partial_round, policy_round, lambda: image_round(images()), lambda: image_round(streamed())],
  ids=['sines', 'low rank', 'policy', 'bank', 'stream'],
)
def test_a_round_in_which_all_is_built_anew_compiles_nothing(one_round):
  with compilations() as found:
    first = one_round()
  assert found
  with compilations() as found:
    again = one_round()
  assert not found
  assert all(map(np.array_equal, jax.tree.leaves(first), jax.tree.leaves(again)))


@pytest.mark.parametrize('options', [dict(steps=2), dict(shot=6), dict(deviation=0.2)])
def test_a_round_of_other_arguments_has_a_program_of_its_own(options):
  first = sine_round()
  with compilations() as found:
    other = sine_round(**options)
  assert found
  assert not np.array_equal(jax.tree.leaves(first)[0], jax.tree.leaves(other)[0])


def test_learning_rates_in_the_optimisers_state_share_a_program():
  learner, tasks = ms.meta_sgd(mlp(), MSE), ms.tasks.sinusoid()
  how = dict(meta_iterations=3, meta_batch=2, learner=learner)
  optimizer = optax.inject_hyperparams(optax.adam)(learning_rate=0.1, b1=0.5)
  start = ms.init(jax.random.key(0), tasks, learner=learner, optimizer=optimizer)

  def trained(rate):
    hyperparams = start.opt_state.hyperparams | {'learning_rate': jnp.float32(rate)}
    state = start._replace(opt_state=start.opt_state._replace(hyperparams=hyperparams))
    return ms.train(state, tasks, optimizer=optimizer, **how).meta

  trained(0.1)
  with compilations() as found:
    several = [trained(rate) for rate in (0.2, 0.4)]
  assert not found
  for rate, meta in zip((0.2, 0.4), several, strict=True):
    plain = optax.adam(rate, b1=0.5)
    state = ms.train(start._replace(opt_state=plain.init(start.meta)), tasks, optimizer=plain, **how)
    assert_trees_close(meta, state.meta, rtol=1e-4, atol=1e-5)


def test_arrays_among_the_arguments_keep_programs_apart():
  one, two = (ms.maml(mlp(), MSE, alpha=jnp.float32(alpha)) for alpha in (0.0, 0.5))
  assert one != two
  assert one != ms.maml(mlp(), MSE, alpha=jnp.float32(0.0))
  tasks = ms.tasks.sinusoid()
  episode = tasks.episode(tasks.sample(jax.random.key(0)), jax.random.key(1))
  meta = one.init(jax.random.key(2), episode)
  adapt = jax.jit(lambda learner, meta: learner.adapt(meta, episode.support, None), static_argnums=0)
  still, moved = (adapt(learner, meta)['Dense_1']['bias'] for learner in (one, two))
  assert_close(still, meta.theta['Dense_1']['bias'])
  assert not np.allclose(moved, still)


def test_a_learner_that_holds_a_tracer_leaks_nothing():
  """It is built inside of a trace, from a loss that is a closure."""

  @jax.jit
  def total(scale):
    tasks = ms.tasks.sinusoid()
    learner = ms.maml(mlp(), lambda outputs, targets: scale * MSE(outputs, targets), alpha=0.1)
    episode = tasks.episode(tasks.sample(jax.random.key(0)), jax.random.key(1))
    return learner.loss(learner.init(jax.random.key(2), episode), episode, None)[0]

  with jax.checking_leaks():
    one, two = total(1.0), total(2.0)
  assert np.isfinite(one)
  assert one != two


def test_functions_keep_their_names():
  learner = ms.learners.prototypical(net(), way=3)
  assert learner.init.__name__ == 'init'
  assert (
    'jit_init'
    in jax.jit(learner.init)
    .lower(jax.random.key(0), ms.Episode(*[ms.Batch(np.zeros((3, 4), np.float32), np.arange(3))] * 2))
    .as_text()
  )
