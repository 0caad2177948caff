"""Meta-SGD and MAML of a policy: adapting is a policy-gradient step on trajectories of the policy's own."""

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, get_args

import chex
import jax
import jax.numpy as jnp

from metasgd_jax.inner.adaptation import adapt
from metasgd_jax.inner.alpha import Per, broadcast_alpha, check_alpha_range, init_alpha
from metasgd_jax.inner.loop import check_steps
from metasgd_jax.rl.advantages import MAML_ADVANTAGES, AdvantageConfig, advantages
from metasgd_jax.rl.rollout import check_num, collect, undiscounted_return
from metasgd_jax.rl.surrogate import Estimator, Surrogate, likelihood_ratio, surrogate_of
from metasgd_jax.rl.types import Environment, Policy, Trajectories
from metasgd_jax.types import Batch, Episode, Learner, MetaParams, PyTree, TaskDistribution

MeanOver = Literal['step', 'trajectory']
"""What a surrogate is a mean over: a task's valid steps, as in MAML's released code, or its trajectories.

The expected return's own derivatives are those over trajectories; over steps they are smaller by the mean length, which
differs from task to task where some end early.
"""


class RolloutRequest(NamedTuple):
  """What `predict` of a policy's learner takes: the task to act in, and the key that it consumes there.

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
  """Trajectories of one task, leaves `[B, …]`, and their advantages `[B, H]`.

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
  """How a policy adapts to one task, as pure functions; `policy_learner` and `trpo_meta_step` are made of it.

  Attributes:
    environment: the tasks.
    policy: what adapts.
    steps: k, inner steps.
    init: `key → MetaParams`; consumes key.
    experience: `(θ, task, key) → Experience` of the policy with θ; consumes key; no gradient goes through it.
    step: `(meta, θ, experience, i) → θ`, inner step i, counted from 0.
    explore: `(meta, task, key) → (experiences, path)`: k inner steps, each on experience of the policy before it; a
      k-tuple of `Experience`, and θ after 0, 1, …, k steps, a (k + 1)-tuple. Consumes key, split into one a step.
    replay: `(meta, experiences) → θ′`: the same steps on experiences drawn before, under this or another meta.
    surrogate: `(surrogate, distributions [B, H], experience) → scalar`: its mean over the experience.

  Example:
    >>> inner = ms.rl.policy_gradient(ms.rl.navigation(horizon=5), ms.rl.gaussian(2, 2, hidden=(8,)), trajectories=3)
    >>> meta, task = inner.init(jax.random.key(0)), inner.environment.sample(jax.random.key(1))
    >>> experiences, path = jax.jit(inner.explore)(meta, task, jax.random.key(2))
    >>> len(experiences), len(path)  # k = 1 step: experience of θ, then θ and θ′.
    (1, 2)
    >>> again = jax.jit(inner.replay)(meta, experiences)  # The same step, nothing drawn anew.
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


def policy_gradient(
  environment: Environment,
  policy: Policy,
  *,
  alpha: PyTree = None,
  alpha_range: tuple[float, float] = (0.005, 0.1),
  alpha_per: Per = 'entry',
  trajectories: int = 20,
  steps: int = 1,
  rates: Sequence[float] | None = None,
  first_order: bool = False,
  estimator: Estimator = 'dice',
  advantage: AdvantageConfig = MAML_ADVANTAGES,
  mean_over: MeanOver = 'step',
) -> PolicyGradient:
  """Builds the inner loop: θ′ = θ − α ∘ ∇L(θ), L the surrogate's negative on trajectories of θ, `steps` times.

  Algorithm 2 of Li et al. 2017, by `metasgd_jax.adapt`. The defaults are MAML's released code's, but for DiCE, which is
  unbiased; on 2D navigation α from 0.5, estimator='lvc', λ = 0.9 and a damping of 0.01 in `trpo_meta_step` learn much
  better. Every step draws trajectories of its own θ_t. Their
  advantages and log-probabilities are constants; how the sampling depends on θ is the surrogate's part.

  Args:
    environment: the tasks.
    policy: what adapts.
    alpha: where given, the rate, held still and no part of meta, as `adapt` takes it: MAML. MAML's released script has
      0.5 for 2D navigation with actions in [−1, 1]. Where left out α is learned: Meta-SGD.
    alpha_range: where learned, α starts as one number drawn from U[low, high].
    alpha_per: where learned, what has a rate of its own; see `meta_sgd`.
    trajectories: B of each step, and of the judging after the last; the paper's 20.
    steps: k; the paper's 1.
    rates: `[k]`, step i takes rates[i] · α; ones where left out. MAML's released test script has 1, ½, ½, ….
    first_order: drop the second derivatives.
    estimator: what the inner step differentiates; see `surrogate.Estimator`.
    advantage: how advantages are estimated.
    mean_over: what a surrogate is a mean over.

  Raises:
    ValueError: a policy of other sizes than the environment's, an empty alpha_range, an unknown alpha_per, estimator or
      mean_over, rates that are not `steps` finite numbers, or a count that is none. From
      `init`: alpha does not fit θ, naming the leaf.

  Example:
    >>> environment, policy = ms.rl.navigation(horizon=5), ms.rl.gaussian(2, 2, hidden=(8,))
    >>> inner = ms.rl.policy_gradient(environment, policy, trajectories=3)  # Meta-SGD; alpha=0.5 would make it MAML.
    >>> meta, task = inner.init(jax.random.key(0)), environment.sample(jax.random.key(1))
    >>> experiences, (before, after) = jax.jit(inner.explore)(meta, task, jax.random.key(2))
    >>> jax.tree.structure(after) == jax.tree.structure(meta.alpha)
    True
  """
  low, high = alpha_range
  check_alpha_range(low, high)
  check_steps(steps)
  check_num(trajectories)
  for name, value, known in (('alpha_per', alpha_per, Per), ('mean_over', mean_over, MeanOver)):
    if value not in get_args(known):
      raise ValueError(f'{name} must be one of {get_args(known)}, got {value!r}')
  if rates is not None and (len(rates) != steps or not all(map(math.isfinite, rates))):
    raise ValueError(f'rates must be {steps} finite numbers, one for each of steps={steps}, got {rates}')
  inner_surrogate = surrogate_of(estimator)
  _check_sizes(environment, policy)

  def init(key) -> MetaParams:
    theta_key, alpha_key = jax.random.split(key)
    theta = policy.init(theta_key)
    if alpha is not None:
      broadcast_alpha(alpha, theta)
      return MetaParams(theta, None)
    return MetaParams(theta, init_alpha(alpha_key, theta, low=low, high=high, per=alpha_per))

  def experience(theta, task, key) -> Experience:
    drawn = collect(environment, policy, theta, task, key, num=trajectories)
    return Experience(drawn, advantages(drawn, advantage))

  def surrogate(function: Surrogate, distributions, experience: Experience):
    drawn = experience.trajectories
    actions = jnp.where(drawn.valid[..., None], drawn.actions, 0)
    log_probs = policy.log_prob(distributions, actions)
    values = jax.vmap(function)(log_probs, drawn.log_probs, experience.advantages, drawn.valid)
    return jnp.sum(values) / (jnp.sum(drawn.valid) if mean_over == 'step' else len(values))

  def loss_fn(theta, experience: Experience):
    return -surrogate(inner_surrogate, act_again(policy, theta, experience), experience)

  def step(meta: MetaParams, theta, experience: Experience, i: int):
    rate = meta.alpha if alpha is None else alpha
    if rates is not None:
      rate = jax.tree.map(lambda a: rates[i] * a, rate)
    return adapt(theta, rate, experience, loss_fn=loss_fn, first_order=first_order)

  def replay(meta: MetaParams, experiences):
    theta = meta.theta
    for i, drawn in enumerate(experiences):
      theta = step(meta, theta, drawn, i)
    return theta

  return PolicyGradient(
    environment, policy, int(steps), init, experience, step, explorer(experience, step, int(steps)), replay, surrogate
  )


def explorer(experience: Callable, step: Callable, steps: int) -> Callable:
  """Returns `PolicyGradient.explore` of its `experience` and `step`."""

  def explore(meta: MetaParams, task, key):
    experiences, path = [], [meta.theta]
    for i, step_key in enumerate(jax.random.split(key, steps)):
      experiences.append(experience(path[-1], task, step_key))
      path.append(step(meta, path[-1], experiences[-1], i))
    return tuple(experiences), tuple(path)

  return explore


def _check_sizes(environment: Environment, policy: Policy) -> None:
  """Raises ValueError unless the policy takes the environment's observations and gives its actions."""
  observation = jax.ShapeDtypeStruct((environment.observation_size,), jnp.result_type(float))
  draw = lambda key, seen: policy.sample(policy.apply(policy.init(key), seen), key)
  try:
    shape = jax.eval_shape(draw, jax.random.key(0), observation).shape
  except (TypeError, ValueError) as e:
    raise ValueError(f"the policy does not take the environment's observations, {observation.shape}: {e}") from e
  if shape != (environment.action_size,):
    raise ValueError(
      f"the policy's actions are {shape}, the environment's {(environment.action_size,)}; build it with its "
      'observation_size and action_size'
    )


def act_again(policy: Policy, theta: PyTree, experience: Experience) -> PyTree:
  """Returns the policy's distributions `[B, H]` where the experience's actions were taken.

  What was observed after an end is taken to be zero: were it not finite, no mask on what follows would keep it out of
  the gradient.
  """
  drawn = experience.trajectories
  return policy.apply(theta, jnp.where(drawn.valid[..., None], drawn.observations, 0))


def policy_learner(inner: PolicyGradient) -> Learner:
  """Builds the `Learner` whose support is a task and whose query says where to act: for `train` and `evaluate`.

  adapt: `inner.explore`'s last θ. predict: `(θ′, RolloutRequest) → Trajectories [B, …]`, so that a metric is a function
  of what was done, such as `mean_return`. loss: the negative of TRPO's surrogate on the query's trajectories of θ′,
  whose gradient at the point goes up the return after adapting. It is the expected return's own with means over
  trajectories, neither discounted nor normalised, by DiCE, as the inner trajectories become many; otherwise tasks weigh
  by their advantages' deviation and their number of steps. Its value says nothing (it is zero where
  advantages are normalised), so info has the mean undiscounted returns, `return_before` and `return_after` adapting.
  Outer optimisers of optax take it; for the paper's own see `trpo_meta_step`. The tasks are `task_distribution`'s.

  Args:
    inner: from `policy_gradient`.

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
    del episode  # The policy knows its shapes.
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
  """Returns the environment's tasks for `train` and `evaluate`: the support is the task, the query a `RolloutRequest`.

  An episode is `Episode(task, Batch(RolloutRequest(task, key), task))`, so that a metric's second argument is the task.

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
  """Returns the mean undiscounted return of trajectories, scalar, whatever the task: a `metric_fn` of `evaluate`.

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
  """Returns the undiscounted return of each of B fresh trajectories after 0, 1, …, k inner steps, `[k + 1, B]`.

  Those it is judged on are not those it adapted to. One task; the caller vmaps. A learner with more steps than it was
  trained with may be given.

  Args:
    learner: of `policy_learner`.
    meta: its meta-parameters.
    task: of the environment.
    key: consumed: split into one for adapting and k + 1 for judging.

  Example:
    >>> inner = ms.rl.policy_gradient(ms.rl.navigation(horizon=5), ms.rl.gaussian(2, 2, hidden=(8,)), trajectories=3)
    >>> meta, task = inner.init(jax.random.key(0)), inner.environment.sample(jax.random.key(1))
    >>> of = jax.jit(ms.rl.returns_by_step, static_argnums=0)
    >>> returns = of(ms.rl.policy_learner(inner), meta, task, jax.random.key(2))
    >>> returns.shape, returns.mean(1).shape  # [k + 1, B]; the mean return before the step, and after.
    ((2, 3), (2,))
  """
  adapt_key, judge_key = jax.random.split(key)
  path = learner.path(meta, task, adapt_key)
  keys = jax.random.split(judge_key, len(jax.tree.leaves(path)[0]))
  act = lambda theta, key: learner.predict(theta, RolloutRequest(task, key))
  return undiscounted_return(jax.vmap(act)(path, keys))
