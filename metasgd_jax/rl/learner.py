"""Meta-SGD and MAML for a policy: an inner step is a policy-gradient step on trajectories of the policy itself."""

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp

from metasgd_jax.inner.adaptation import adapt
from metasgd_jax.inner.alpha import AlphaConfig, broadcast_alpha, init_alpha
from metasgd_jax.rl.advantages import MAML_ADVANTAGES, AdvantageConfig, advantages
from metasgd_jax.rl.rollout import check_sizes, collect, undiscounted_return
from metasgd_jax.rl.surrogate import Estimator, Surrogate, likelihood_ratio, surrogate_of
from metasgd_jax.rl.types import Environment, Policy, Trajectories
from metasgd_jax.types import (
  Batch,
  Episode,
  Learner,
  MetaParams,
  PyTree,
  TaskDistribution,
  check_choice,
  check_count,
  equal_by_arguments,
)

MeanOver = Literal['step', 'trajectory']
"""What a surrogate is averaged over.

- `step`: the valid steps of a task, as in MAML's released code.
- `trajectory`: the trajectories of a task.

The derivatives of the mean over trajectories are estimates of those of the expected return. The derivatives of the mean
over steps are smaller: they are divided by the mean length of the trajectories. This length differs from task to task
if some trajectories end early.
"""


class RolloutRequest(NamedTuple):
  """Asks a `policy_learner` to act: the input of its function `predict`.

  Attributes:
    task: Task in which the policy acts.
    key: Random key, which `predict` consumes.

  Example:
    >>> inner = ms.rl.policy_gradient(ms.rl.navigation(horizon=5), ms.rl.gaussian(2, 2, hidden=(8,)), trajectories=3)
    >>> meta, task = inner.init(jax.random.key(0)), inner.environment.sample(jax.random.key(1))
    >>> request = ms.rl.RolloutRequest(task, key=jax.random.key(2))
    >>> trajectories = ms.rl.policy_learner(inner).predict(meta.theta, request)
    >>> trajectories.rewards.shape  # [B, H]
    (3, 5)
  """

  task: PyTree
  key: chex.PRNGKey


class Experience(NamedTuple):
  """Trajectories of one task, with leaves `[B, …]`, and their advantages `[B, H]`.

  Example:
    >>> inner = ms.rl.policy_gradient(ms.rl.navigation(horizon=5), ms.rl.gaussian(2, 2, hidden=(8,)), trajectories=3)
    >>> meta, task = inner.init(jax.random.key(0)), inner.environment.sample(jax.random.key(1))
    >>> experience = inner.experience(meta.theta, task, jax.random.key(2))
    >>> experience.trajectories.actions.shape, experience.advantages.shape
    ((3, 5, 2), (3, 5))
  """

  trajectories: Trajectories
  advantages: chex.Array


class PolicyGradient(NamedTuple):
  """How a policy adapts to one task, as pure functions. `policy_learner` and `trpo_meta_step` use these functions.

  Attributes:
    environment: Environment that gives the tasks.
    policy: Policy that adapts.
    steps: Number of inner steps k.
    init: `key → MetaParams`; consumes key.
    experience: `(θ, task, key) → Experience` of the policy with parameters θ; consumes key. No gradient flows through
      the experience.
    step: `(meta, θ, experience, i) → θ`, inner step i, counted from 0.
    explore: `(meta, task, key) → (experiences, path)`; consumes key, which is split into one key per step. `explore`
      takes k inner steps. Before each step, the policy draws new experience with its current θ. `experiences` is a
      k-tuple of `Experience`, and `path` is a (k + 1)-tuple of θ after 0, 1, …, k steps.
    replay: `(meta, experiences) → θ′`. `replay` takes the same inner steps as `explore`, but on experiences that were
      drawn before, with the same meta or with another meta.
    surrogate: `(function, distributions [B, H], experience) → scalar`. The argument `function` is a surrogate such as
      `likelihood_ratio`, and `distributions` are the policy's distributions of the actions. The result is the mean of
      the surrogate over the steps or the trajectories of the experience; see `MeanOver`.

  Example:
    >>> inner = ms.rl.policy_gradient(ms.rl.navigation(horizon=5), ms.rl.gaussian(2, 2, hidden=(8,)), trajectories=3)
    >>> meta, task = inner.init(jax.random.key(0)), inner.environment.sample(jax.random.key(1))
    >>> experiences, path = jax.jit(inner.explore)(meta, task, jax.random.key(2))
    >>> len(experiences), len(path)  # k = 1 step: experience of θ, then θ and θ′.
    (1, 2)
    >>> again = jax.jit(inner.replay)(meta, experiences)  # The same step on the same trajectories.
    >>> bool(jnp.allclose(again['log_std'], path[-1]['log_std'], atol=1e-5))
    True
  """

  environment: Environment
  policy: Policy
  steps: int
  init: Callable[[chex.PRNGKey], MetaParams]
  experience: Callable[[PyTree, PyTree, chex.PRNGKey], Experience]
  step: Callable[[MetaParams, PyTree, Experience, int], PyTree]
  explore: Callable[[MetaParams, PyTree, chex.PRNGKey], tuple[tuple[Experience, ...], tuple[PyTree, ...]]]
  replay: Callable[[MetaParams, tuple[Experience, ...]], PyTree]
  surrogate: Callable[[Surrogate, PyTree, Experience], chex.Array]


@equal_by_arguments
def policy_gradient(
  environment: Environment,
  policy: Policy,
  *,
  alpha: AlphaConfig | PyTree = AlphaConfig(),
  trajectories: int = 20,
  steps: int = 1,
  rates: Sequence[float] | None = None,
  first_order: bool = False,
  estimator: Estimator = 'dice',
  advantage: AdvantageConfig = MAML_ADVANTAGES,
  mean_over: MeanOver = 'step',
) -> PolicyGradient:
  """Builds the inner loop of a policy, which computes θ′ = θ − α ∘ ∇L(θ) `steps` times.

  L is the negative of the surrogate on trajectories of θ. This is the inner loop of Algorithm 2 of Li et al. 2017,
  computed by `metasgd_jax.adapt`. Each inner step draws new trajectories with the current θ_t. No gradient flows
  through the advantages, or through the log-probabilities that were recorded when the actions were drawn. The surrogate
  computes the log-probabilities again as functions of θ, and so accounts for how the sampling depends on θ.

  The defaults are those of MAML's released code, except for the estimator: the default is DiCE, which is unbiased. On
  2D navigation, the policy learns much better with an α that starts at 0.5, `estimator='lvc'`, λ = 0.9 and
  `TrpoConfig(damping=0.01)`.

  Args:
    environment: Environment that gives the tasks.
    policy: Policy that adapts.
    alpha: Either an `AlphaConfig` or fixed rates. With an `AlphaConfig`, which says how α starts, α is learned: the
      learner is Meta-SGD. Any other value is interpreted as fixed rates, in a form that `adapt` accepts. Fixed rates
      are not part of meta: the learner is MAML. For 2D navigation with actions in [−1, 1], MAML's released script uses
      0.5.
    trajectories: Number of trajectories B of each inner step, and of the evaluation after the last inner step. The
      paper uses 20.
    steps: Number of inner steps k. The paper uses 1.
    rates: Factors of α, `[k]`. Inner step i uses the rate rates[i] · α. By default all factors are 1. MAML's released
      test script uses 1, ½, ½, ….
    first_order: Whether second derivatives are dropped.
    estimator: Surrogate that the inner step differentiates; see `surrogate.Estimator`.
    advantage: How advantages are estimated.
    mean_over: What a surrogate is averaged over; see `MeanOver`.

  Raises:
    ValueError: if the sizes of the policy are not those of the environment, if `alpha` is `None` or an `AlphaConfig`
      with `by_step=True`, if `estimator` or `mean_over` is unknown, if `rates` is not a sequence of `steps` finite
      numbers, if `steps` is not an integer of at least 0, or if `trajectories` is not an integer of at least 1. The
      function `init` of the result raises ValueError if `alpha` does not fit θ, and the message names the leaf.

  Example:
    >>> environment, policy = ms.rl.navigation(horizon=5), ms.rl.gaussian(2, 2, hidden=(8,))
    >>> inner = ms.rl.policy_gradient(environment, policy, trajectories=3)  # Meta-SGD; alpha=0.5 would make it MAML.
    >>> meta, task = inner.init(jax.random.key(0)), environment.sample(jax.random.key(1))
    >>> experiences, (before, after) = jax.jit(inner.explore)(meta, task, jax.random.key(2))
    >>> jax.tree.structure(after) == jax.tree.structure(meta.alpha)
    True
  """
  learned = isinstance(alpha, AlphaConfig)
  if alpha is None or (learned and alpha.by_step):
    raise ValueError(
      f'alpha must be fixed rates, or an AlphaConfig with by_step=False, got {alpha}; for a factor per step, '
      'give the argument `rates`'
    )
  check_count('steps', steps, 0)
  check_count('trajectories', trajectories)
  check_choice('mean_over', mean_over, MeanOver)
  if rates is not None and (len(rates) != steps or not all(map(math.isfinite, rates))):
    raise ValueError(f'`rates` must be {steps} finite numbers, one per inner step (steps={steps}), got {rates}')
  inner_surrogate = surrogate_of(estimator)
  abstract = jax.eval_shape(policy.init, jax.random.key(0))
  check_sizes(policy, abstract, environment.observation_size, environment.action_size)

  def init(key) -> MetaParams:
    theta_key, alpha_key = jax.random.split(key)
    theta = policy.init(theta_key)
    if learned:
      return MetaParams(theta, init_alpha(alpha_key, theta, alpha, adapts=policy.adapts))
    broadcast_alpha(alpha, theta)
    return MetaParams(theta, None)

  def experience(theta, task, key) -> Experience:
    drawn = collect(environment, policy, theta, task, key, num=trajectories)
    return Experience(drawn, advantages(drawn, advantage))

  def surrogate(function: Surrogate, distributions, experience: Experience):
    drawn = experience.trajectories
    actions = jnp.where(drawn.valid[..., None], drawn.actions, 0)
    log_probs = policy.log_prob(distributions, actions)
    values = jax.vmap(function)(log_probs, drawn.log_probs, experience.advantages, drawn.valid)
    return jnp.sum(values) / (jnp.sum(drawn.valid).astype(values.dtype) if mean_over == 'step' else len(values))

  def loss_fn(theta, experience: Experience):
    return -surrogate(inner_surrogate, act_again(policy, theta, experience), experience)

  def step(meta: MetaParams, theta, experience: Experience, i: int):
    rate = meta.alpha if learned else alpha
    if rates is not None:
      rate = jax.tree.map(lambda a: rates[i] * a, rate)
    return adapt(theta, rate, experience, loss_fn=loss_fn, first_order=first_order, adapts=policy.adapts)

  def replay(meta: MetaParams, experiences):
    theta = meta.theta
    for i, drawn in enumerate(experiences):
      theta = step(meta, theta, drawn, i)
    return theta

  return PolicyGradient(
    environment, policy, int(steps), init, experience, step, explorer(experience, step, int(steps)), replay, surrogate
  )


def explorer(experience: Callable, step: Callable, steps: int) -> Callable:
  """Returns the function `PolicyGradient.explore` for the given `experience` and `step`."""

  def explore(meta: MetaParams, task, key):
    experiences, path = [], [meta.theta]
    for i, step_key in enumerate(jax.random.split(key, steps)):
      experiences.append(experience(path[-1], task, step_key))
      path.append(step(meta, path[-1], experiences[-1], i))
    return tuple(experiences), tuple(path)

  return explore


def act_again(policy: Policy, theta: PyTree, experience: Experience) -> PyTree:
  """Returns the policy's distributions `[B, H]` at the observations of the experience.

  Observations after the end of a trajectory are replaced by zero, because they may be NaN or infinite. The gradient
  would then be NaN, even if the distributions at these observations were masked afterwards.
  """
  drawn = experience.trajectories
  return policy.apply(theta, jnp.where(drawn.valid[..., None], drawn.observations, 0))


@equal_by_arguments
def policy_learner(inner: PolicyGradient) -> Learner:
  """Builds a `Learner` for `train` and `evaluate`.

  In its episodes, the support is a task, and the input of the query is a `RolloutRequest`.

  - `adapt` returns the last θ of `inner.explore`.
  - `predict` is `(θ′, RolloutRequest) → Trajectories [B, …]`. A metric is therefore a function of trajectories, such as
    `mean_return`.
  - `loss` is the negative of TRPO's surrogate on the trajectories of the query, which are sampled with θ′. A small step
    of gradient descent on the loss raises the return after adapting.

  The gradient of the loss approaches that of the negative expected return as the number of inner trajectories grows, if
  the estimator is DiCE, the mean is over trajectories, and advantages are neither discounted nor normalised. With other
  settings the limit is different. In particular, each task has its own weight in the gradient: if advantages are
  normalised, the weight depends on the standard deviation of the task's advantages, and if the mean is over steps, on
  the mean length of the task's trajectories.

  The value of the loss does not measure progress. For example, it is zero if advantages are normalised. The info that
  `loss` returns therefore has the mean undiscounted returns before and after adapting, `return_before` and
  `return_after`. The outer optimiser can be any optimiser of optax. The outer optimiser of the paper is TRPO; see
  `trpo_meta_step`. The tasks for this learner come from `task_distribution`.

  Args:
    inner: Inner loop from `policy_gradient`.

  Example:
    >>> inner = ms.rl.policy_gradient(ms.rl.navigation(horizon=5), ms.rl.gaussian(2, 2, hidden=(8,)), trajectories=3)
    >>> learner, tasks = ms.rl.policy_learner(inner), ms.rl.task_distribution(inner.environment)
    >>> optimizer = optax.adam(1e-3)
    >>> state = ms.init(jax.random.key(0), tasks, learner=learner, optimizer=optimizer)
    >>> show = lambda progress: print(progress.step, sorted(progress.info))
    >>> options = dict(meta_iterations=2, meta_batch=2, callbacks=[show])
    >>> state = ms.train(state, tasks, learner=learner, optimizer=optimizer, **options)
    2 ['loss', 'return_after', 'return_before']
  """

  def init(key, episode: Episode) -> MetaParams:
    del episode  # The policy knows the shapes of its parameters.
    return inner.init(key)

  def adapt_(meta, task, key):
    return inner.explore(meta, task, key)[1][-1]

  def path(meta, task, key):
    return jax.tree.map(lambda *thetas: jnp.stack(thetas), *inner.explore(meta, task, key)[1])

  def predict(theta, rollouts: RolloutRequest) -> Trajectories:
    return inner.experience(theta, *rollouts).trajectories

  def loss(meta, episode: Episode, key):
    experiences, thetas = inner.explore(meta, episode.support, key)
    after = inner.experience(thetas[-1], *episode.query.x)
    distributions = act_again(inner.policy, thetas[-1], after)
    before = (experiences[0] if experiences else after).trajectories
    info = {'return_before': mean_return(before), 'return_after': mean_return(after.trajectories)}
    return -inner.surrogate(likelihood_ratio, distributions, after), info

  return Learner(init, adapt_, path, predict, loss)


def task_distribution(environment: Environment) -> TaskDistribution:
  """Returns the tasks of an environment, for `train` and `evaluate`.

  An episode is `Episode(task, Batch(RolloutRequest(task, key), task))`: the support is the task, and the input of the
  query is a `RolloutRequest`. The target of the query is the task, so the second argument of a metric is the task.

  Example:
    >>> tasks = ms.rl.task_distribution(ms.rl.navigation())
    >>> episode = tasks.episode(tasks.sample(jax.random.key(0)), jax.random.key(1))
    >>> type(episode.support).__name__, type(episode.query.x).__name__
    ('Navigation', 'RolloutRequest')
  """
  return TaskDistribution(environment.sample, _episode)


def _episode(task, key) -> Episode:
  return Episode(task, Batch(RolloutRequest(task, key), task))


def mean_return(trajectories: Trajectories, task: PyTree = None) -> chex.Array:
  """Returns the mean undiscounted return of trajectories, a scalar. It can be a `metric_fn` of `evaluate`.

  The argument `task` is not used.

  Example:
    >>> inner = ms.rl.policy_gradient(ms.rl.navigation(horizon=5), ms.rl.gaussian(2, 2, hidden=(8,)), trajectories=3)
    >>> learner, tasks = ms.rl.policy_learner(inner), ms.rl.task_distribution(inner.environment)
    >>> meta = inner.init(jax.random.key(0))
    >>> values = ms.evaluate(learner, meta, tasks, jax.random.key(1), metric_fn=ms.rl.mean_return, num_tasks=4)
    >>> values.shape  # [task, draw, inner step]
    (4, 1, 2)
  """
  del task
  return jnp.mean(undiscounted_return(trajectories))


def returns_by_step(learner: Learner, meta: PyTree, task: PyTree, key: chex.PRNGKey) -> chex.Array:
  """Returns the undiscounted returns of B new trajectories after 0, 1, …, k inner steps, `[k + 1, B]`.

  The policy is not evaluated on the trajectories that it adapted to. The function is for one task; use `jax.vmap` for
  several tasks. The learner may have more inner steps than were used in training.

  Args:
    learner: Learner from `policy_learner`.
    meta: Meta-parameters of the learner.
    task: Task of the environment.
    key: Random key, consumed. It is split into one key for adapting and k + 1 keys for evaluation.

  Example:
    >>> inner = ms.rl.policy_gradient(ms.rl.navigation(horizon=5), ms.rl.gaussian(2, 2, hidden=(8,)), trajectories=3)
    >>> meta, task = inner.init(jax.random.key(0)), inner.environment.sample(jax.random.key(1))
    >>> of = jax.jit(ms.rl.returns_by_step, static_argnums=0)
    >>> returns = of(ms.rl.policy_learner(inner), meta, task, jax.random.key(2))
    >>> returns.shape, returns.mean(1).shape  # [k + 1, B]; [k + 1], the mean returns before and after the step.
    ((2, 3), (2,))
  """
  adapt_key, judge_key = jax.random.split(key)
  path = learner.path(meta, task, adapt_key)
  keys = jax.random.split(judge_key, len(jax.tree.leaves(path)[0]))
  trajectories = jax.vmap(lambda theta, key: learner.predict(theta, RolloutRequest(task, key)))(path, keys)
  return undiscounted_return(trajectories)
