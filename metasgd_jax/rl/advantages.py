"""How much better an action was than expected: returns, a linear baseline, and generalised advantages."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular

from metasgd_jax.rl.types import Trajectories


@dataclasses.dataclass(frozen=True)
class AdvantageConfig:
  """How advantages are estimated; the defaults are those of MAML's released code for 2D navigation.

  Attributes:
    discount: γ, a step's; 0.99.
    decay: λ of the generalised advantages; 1 makes them returns minus the baseline.
    baseline: subtract the linear baseline, fitted to the very trajectories; without, it is zero.
    ridge: of the baseline's fit.
    bootstrap: where time, not the task, ends a trajectory, count the baseline's value of what would follow. The code
      does not. The baseline sees the time and is fitted to returns that the horizon cuts, so of trajectories that are
      all cut it says that nearly nothing follows; it says more where the task ends some before.
    normalized: to mean 0 and deviation 1 over a task's valid steps.

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
        raise ValueError(f'{name} must be in [0, 1], got {getattr(self, name)}')
    if not self.ridge > 0:
      raise ValueError(f'ridge must be above 0, got {self.ridge}; features may be linearly dependent')
    if self.bootstrap and not self.baseline:
      raise ValueError('bootstrap=True takes its value from the baseline, and baseline is False; set it')


MAML_ADVANTAGES = AdvantageConfig()
"""Finn et al. 2017, 2D navigation."""


def advantages(trajectories: Trajectories, config: AdvantageConfig = MAML_ADVANTAGES) -> chex.Array:
  """Returns the advantages `[B, H]` of one task's trajectories, leaves `[B, …]`; zero after the end.

  The baseline is fitted to these trajectories' own discounted returns; then equation 16 of Schulman et al. 2016, and
  then they are normalised.

  Args:
    trajectories: of one task, leaves `[B, …]`.
    config: discount, λ, and whether there is a baseline.

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
  estimate = lambda r, v, valid, last: generalized_advantages(
    r, v, valid, last, discount=config.discount, decay=config.decay
  )
  result = jax.vmap(estimate)(t.rewards, values, t.valid, last_values)
  return normalize(result, t.valid) if config.normalized else result


def discounted_returns(rewards: chex.Array, valid: chex.Array, discount: float) -> chex.Array:
  """Returns R_t = Σ_{s ≥ t} γ^{s−t} r_s over the valid steps s of one trajectory, `[H]`.

  Args:
    rewards: `[H]`.
    valid: `[H]` bool.
    discount: γ.

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
  """Returns A_t = Σ_{s ≥ t} (γλ)^{s−t} δ_s with δ_t = r_t + γ V_{t+1} − V_t, of one trajectory, `[H]`.

  Equation 16 of Schulman et al. 2016 (generalised advantage estimation). After the end it is zero.

  Args:
    rewards: `[H]`.
    values: `[H]`, V of each step's observation.
    valid: `[H]` bool.
    last_value: `[]`, V after the last valid step: zero where the task ended the trajectory.
    discount: γ.
    decay: λ.

  Example:
    >>> rewards, valid = jnp.array([1.0, 1.0]), jnp.array([True, True])
    >>> print(ms.rl.generalized_advantages(rewards, jnp.zeros(2), valid, discount=0.5, decay=1.0))
    [1.5 1. ]
  """
  follows = jnp.append(valid[1:], False)
  after = jnp.where(follows, jnp.append(values[1:], 0), last_value)
  return _discounted_sums(jnp.where(valid, rewards + discount * after - values, 0), discount * decay)


def linear_features(observations: chex.Array, first_step: chex.Numeric = 0) -> chex.Array:
  """Returns o, o², t/100, (t/100)², (t/100)³ and 1 of each step: `[H, O]` → `[H, 2 O + 4]`.

  The linear feature baseline of Duan et al. 2016, with o cut to ±10 and t in steps of 1/100 whatever the
  horizon, as in rllab's code for it.

  Args:
    observations: `[H, O]`.
    first_step: t of the first of them.

  Example:
    >>> ms.rl.linear_features(jnp.zeros((20, 2))).shape
    (20, 8)
  """
  o = jnp.clip(observations, -10, 10)
  t = ((first_step + jnp.arange(len(o))) / 100).astype(o.dtype)[:, None]
  return jnp.concatenate([o, o**2, t, t**2, t**3, jnp.ones_like(t)], -1)


def fit_linear(features: chex.Array, targets: chex.Array, valid: chex.Array, *, ridge: float = 1e-5) -> chex.Array:
  """Returns the w `[F]` that makes Σ (features · w − targets)² + ridge ‖w‖² over the valid steps least.

  In closed form, by a QR decomposition of the features over √ridge I. Its error grows with their condition number,
  where that of the normal equations grows with its square, which single precision does not bear: a pendulum's
  cos² + sin² = 1 makes features linearly dependent.

  Args:
    features: `[…, F]`.
    targets: `[…]`.
    valid: `[…]` bool.
    ridge: rllab's 1e-5.

  Example:
    >>> weights = ms.rl.fit_linear(jnp.ones((4, 1)), jnp.array([1.0, 3.0, 1.0, 3.0]), jnp.ones(4, bool))
    >>> print(weights.round(3))
    [2.]
  """
  size = features.shape[-1]
  rows = jnp.where(valid[..., None], features, 0).reshape(-1, size)
  rows = jnp.concatenate([rows, ridge**0.5 * jnp.eye(size, dtype=rows.dtype)])
  targets = jnp.append(jnp.where(valid, targets, 0), jnp.zeros(size, targets.dtype))
  q, r = jnp.linalg.qr(rows)
  return solve_triangular(r, targets @ q)


def normalize(values: chex.Array, valid: chex.Array, *, epsilon: float = 1e-8) -> chex.Array:
  """Returns (x − mean) / (deviation + ε), both over the valid entries alone; zero elsewhere.

  Args:
    values: `[…]`.
    valid: `[…]` bool.
    epsilon: rllab's 1e-8.

  Example:
    >>> print(ms.rl.normalize(jnp.array([1.0, 3.0, 9.0]), jnp.array([True, True, False])))
    [-1.  1.  0.]
  """
  count = jnp.maximum(jnp.sum(valid), 1)
  x = jnp.where(valid, values, 0)
  x = jnp.where(valid, x - jnp.sum(x) / count, 0)
  return x / (jnp.sqrt(jnp.sum(x * x) / count) + epsilon)


def _discounted_sums(x, discount):
  """Y_t = x_t + discount · y_{t+1}, `[H]`."""

  def body(later, now):
    total = now + discount * later
    return total, total

  return jax.lax.scan(body, jnp.zeros_like(x[0]), x, reverse=True)[1]
