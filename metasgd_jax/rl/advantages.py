"""Discounted returns, a linear baseline, and generalised advantages.

The advantage of an action says how much better the action was than expected.
"""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular

from metasgd_jax.rl.types import Trajectories


@dataclasses.dataclass(frozen=True)
class AdvantageConfig:
  """How advantages are estimated. The defaults are those of MAML's released code for 2D navigation.

  Attributes:
    discount: Discount factor γ of one step. The default is 0.99.
    decay: Decay λ of the generalised advantages. With 1 the advantages are the returns minus the baseline.
    baseline: Whether the linear baseline is subtracted. It is fitted to the same trajectories whose advantages are
      estimated. If False, the baseline is zero.
    ridge: Ridge coefficient of the baseline's fit.
    bootstrap: Whether the baseline's value of the last observation replaces the rewards that would follow, if the time
      limit and not the task ended the trajectory. If False, as in MAML's released code, this value is taken to be zero.
      If the horizon ends all trajectories, True has little effect: the baseline has the time step as an input and is
      fitted to returns that stop at the horizon, so the baseline's value at the horizon is close to zero. If the task
      ends some trajectories earlier, the baseline's value at the horizon can be farther from zero.
    normalized: Whether advantages are normalised to mean 0 and standard deviation 1 over the valid steps of a task.

  Raises:
    ValueError: if `discount` or `decay` is not in [0, 1], if `ridge` is not positive, or if `bootstrap` is True and
      `baseline` is False.

  Example:
    >>> import dataclasses
    >>> dataclasses.replace(ms.rl.MAML_ADVANTAGES, decay=0.9).decay
    0.9
  """

  discount: float = 0.99
  decay: float = 1.0
  baseline: bool = True
  ridge: float = 1e-5
  bootstrap: bool = False
  normalized: bool = True

  def __post_init__(self):
    for name in ('discount', 'decay'):
      if not 0 <= getattr(self, name) <= 1:
        raise ValueError(f'`{name}` must be in [0, 1], got {getattr(self, name)}')
    if not self.ridge > 0:
      raise ValueError(
        f'`ridge` must be above 0, because features may be linearly dependent, got {self.ridge}; use 1e-5'
      )
    if self.bootstrap and not self.baseline:
      raise ValueError('bootstrap=True needs the values of the baseline, got baseline=False; set baseline=True')


MAML_ADVANTAGES = AdvantageConfig()
"""Settings of Finn et al. 2017 for 2D navigation."""


def advantages(trajectories: Trajectories, config: AdvantageConfig = MAML_ADVANTAGES) -> chex.Array:
  """Returns the advantages of the trajectories of one task, `[B, H]`. They are zero after the end of a trajectory.

  First the baseline is fitted to the discounted returns of these trajectories. Then the advantages are computed by
  equation 16 of Schulman et al. 2016. Finally the advantages are normalised. `config` can switch off the first and the
  last step. The dtype is that of the rewards and observations together. If it is float16 or bfloat16, the baseline and
  the normalisation are computed in float32.

  Args:
    trajectories: Trajectories of one task, with leaves `[B, …]`.
    config: How the advantages are estimated, for example the discount γ and the decay λ.

  Example:
    >>> environment, policy = ms.rl.navigation(horizon=20), ms.rl.gaussian(2, 2, hidden=(8,))
    >>> theta, task = policy.init(jax.random.key(0)), environment.sample(jax.random.key(1))
    >>> ms.rl.advantages(ms.rl.collect(environment, policy, theta, task, jax.random.key(2), num=3)).shape
    (3, 20)
  """
  t = trajectories
  if config.baseline:
    returns = jax.vmap(discounted_returns, (0, 0, None))(t.rewards, t.valid, config.discount)
    features = jax.vmap(linear_features)(t.observations)
    weights = fit_linear(features, returns, t.valid, ridge=config.ridge)
    values = features @ weights
  else:
    values = jnp.zeros_like(t.rewards)
  last_values = jnp.zeros_like(values[:, 0])
  if config.bootstrap:
    steps = jnp.sum(t.valid, -1)
    last = jax.vmap(lambda o, n: linear_features(o[None], first_step=n)[0])(t.last_observation, steps)
    last_values = jnp.where(t.terminated, 0, last @ weights)
  estimate = functools.partial(generalized_advantages, discount=config.discount, decay=config.decay)
  result = jax.vmap(estimate)(t.rewards, values, t.valid, last_values)
  result = normalize(result, t.valid) if config.normalized else result
  return result.astype(jnp.result_type(t.rewards, t.observations, float))


def discounted_returns(rewards: chex.Array, valid: chex.Array, discount: float) -> chex.Array:
  """Returns R_t = Σ_{s ≥ t} γ^{s−t} r_s over the valid steps s of one trajectory, `[H]`.

  Args:
    rewards: Rewards of the trajectory, `[H]`.
    valid: Whether each step was taken, `[H]`, bool.
    discount: Discount factor γ of one step.

  Example:
    >>> print(ms.rl.discounted_returns(jnp.array([1.0, 1.0, 1.0]), jnp.array([True, True, True]), 0.5))
    [1.75 1.5  1.  ]
  """
  return _discounted_sums(jnp.where(valid, rewards, 0), discount)


def generalized_advantages(
  rewards: chex.Array,
  values: chex.Array,
  valid: chex.Array,
  last_value: chex.Numeric = 0.0,
  *,
  discount: float,
  decay: float,
) -> chex.Array:
  """Returns A_t = Σ_{s ≥ t} (γλ)^{s−t} δ_s with δ_t = r_t + γ V_{t+1} − V_t for one trajectory, `[H]`.

  This is equation 16 of Schulman et al. 2016 (generalised advantage estimation). The advantages are zero after the end
  of the trajectory.

  Args:
    rewards: Rewards of the trajectory, `[H]`.
    values: Values V of the observation before each step, `[H]`.
    valid: Whether each step was taken, `[H]`, bool.
    last_value: Value V of the observation after the last valid step, `[]`. It is zero if the task ended the trajectory.
    discount: Discount factor γ of one step.
    decay: Decay λ.

  Example:
    >>> rewards, valid = jnp.array([1.0, 1.0]), jnp.array([True, True])
    >>> print(ms.rl.generalized_advantages(rewards, jnp.zeros(2), valid, discount=0.5, decay=1.0))
    [1.5 1. ]
  """
  follows = jnp.append(valid[1:], False)
  after = jnp.where(follows, jnp.append(values[1:], 0), last_value)
  return _discounted_sums(jnp.where(valid, rewards + discount * after - values, 0), discount * decay)


def linear_features(observations: chex.Array, first_step: chex.Numeric = 0) -> chex.Array:
  """Returns the features o, o², t/100, (t/100)², (t/100)³ and 1 of each step: `[H, O]` → `[H, 2 O + 4]`.

  These are the features of the linear baseline of Duan et al. 2016. The observation o is clipped to ±10, and the time
  step t is divided by 100, whatever the horizon is. Both details are those of rllab's code for this baseline.

  Args:
    observations: Observations o, `[H, O]`.
    first_step: Time step t of the first observation.

  Example:
    >>> ms.rl.linear_features(jnp.zeros((20, 2))).shape
    (20, 8)
  """
  o = jnp.clip(observations, -10, 10).astype(jnp.result_type(observations, float))
  t = ((first_step + jnp.arange(len(o))) / 100).astype(o.dtype)[:, None]
  return jnp.concatenate([o, o**2, t, t**2, t**3, jnp.ones_like(t)], -1)


def fit_linear(features: chex.Array, targets: chex.Array, valid: chex.Array, *, ridge: float = 1e-5) -> chex.Array:
  """Returns the weights w `[F]` that minimise Σ (features · w − targets)² + ridge ‖w‖² over the valid steps.

  The solution is computed in closed form, by a QR decomposition of the features stacked on √ridge I. The error of this
  method grows with the condition number of the features. The error of the normal equations grows with the square of
  the condition number, which is too much for single precision: for a pendulum, cos² + sin² = 1 makes the features
  linearly dependent. Features in float16 or bfloat16 are fitted in float32, and the weights are then float32.

  Args:
    features: Features of each step, `[…, F]`.
    targets: Targets of the fit, `[…]`.
    valid: Whether each step was taken, `[…]`, bool.
    ridge: Ridge coefficient. The default, 1e-5, is that of rllab.

  Example:
    >>> weights = ms.rl.fit_linear(jnp.ones((4, 1)), jnp.array([1.0, 3.0, 1.0, 3.0]), jnp.ones(4, bool))
    >>> print(weights.round(3))
    [2.]
  """
  size = features.shape[-1]
  dtype = jnp.promote_types(features.dtype, jnp.float32)  # There is no QR decomposition in lower precision.
  rows = jnp.where(valid[..., None], features, 0).reshape(-1, size).astype(dtype)
  rows = jnp.concatenate([rows, ridge**0.5 * jnp.eye(size, dtype=rows.dtype)])
  targets = jnp.append(jnp.where(valid, targets, 0), jnp.zeros(size, targets.dtype))
  q, r = jnp.linalg.qr(rows)
  return solve_triangular(r, targets @ q)


def normalize(values: chex.Array, valid: chex.Array, *, epsilon: float = 1e-8) -> chex.Array:
  """Returns (x − mean) / (deviation + ε) for the valid entries, and zero for the other entries.

  The mean and the standard deviation are those of the valid entries. If these entries are all equal, the result is
  exactly zero, because the first valid entry is subtracted from x before the mean is computed. Otherwise the rounding
  error of the mean could be much larger than ε. Values in float16 or bfloat16 are normalised in float32.

  Args:
    values: Values x, `[…]`.
    valid: Whether each entry is valid, `[…]`, bool.
    epsilon: Number ε that is added to the deviation. The default, 1e-8, is that of rllab.

  Example:
    >>> print(ms.rl.normalize(jnp.array([1.0, 3.0, 9.0]), jnp.array([True, True, False])))
    [-1.  1.  0.]
  """
  dtype = jnp.result_type(values, float)
  x = jnp.asarray(values, jnp.promote_types(dtype, jnp.float32))
  x = jnp.where(valid, x - x.ravel()[jnp.argmax(valid)], 0)
  count = jnp.maximum(jnp.sum(valid), 1).astype(x.dtype)
  x = jnp.where(valid, x - jnp.sum(x) / count, 0)
  return (x / (jnp.sqrt(jnp.sum(x * x) / count) + epsilon)).astype(dtype)


def _discounted_sums(x, discount):
  """Returns y_t = x_t + discount · y_{t+1}, `[H]`, as floats even if x contains integers."""
  x = x.astype(jnp.result_type(x, float))

  def body(later, now):
    total = now + discount * later
    return total, total

  return jax.lax.scan(body, jnp.zeros_like(x[0]), x, reverse=True)[1]
