"""Meta-SGD and MAML on 2D navigation, written as usual in PyTorch, with autograd and Gymnasium environments.

Trajectories are sampled for one task after another. The environments of a task are stepped together in a
`SyncVectorEnv`. The outer optimiser is TRPO or Adam. For TRPO, products with the Fisher matrix are second derivatives
of the divergence. The graph of the divergence is built once and is used for all products.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import gymnasium
import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from gymnasium.vector import SyncVectorEnv

TASKS, TRAJECTORIES, HORIZON = 20, 20, 100
DISCOUNT, DECAY, RIDGE, DAMPING = 0.99, 1.0, 1e-5, 1e-5
MAX_KL, CG_STEPS, CG_TOLERANCE, RATIO, BACKTRACKS = 0.01, 10, 1e-10, 0.8, 15
SIZES = (2, 100, 100, 2)


class Navigation2D(gymnasium.Env):
  """2D navigation: a point moves in the plane to a goal that it cannot observe."""

  def __init__(self) -> None:
    self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)
    self.start, self.goal = np.zeros(2, np.float32), np.zeros(2, np.float32)

  def set_task(self, start, goal) -> None:
    self.start, self.goal = start, goal

  def reset(self, *, seed=None, options=None):
    super().reset(seed=seed, options=options)
    self.position = self.start
    return self.position, {}

  def step(self, action):
    self.position = self.position + 0.1 * np.clip(action, -1, 1)
    x, y = self.position - self.goal
    return self.position, -math.sqrt(x * x + y * y), bool(abs(x) < 0.01 and abs(y) < 0.01), False, {}


class Batch(NamedTuple):
  """Trajectories of one task, and their advantages. Every tensor has the leading axes `[B, H]`."""

  observations: torch.Tensor
  actions: torch.Tensor
  log_probs: torch.Tensor
  rewards: torch.Tensor
  valid: torch.Tensor
  advantages: torch.Tensor


def new_theta() -> list[torch.Tensor]:
  """Returns the initial weight and bias of each layer of the policy, and log σ at the end of the list."""
  theta = []
  for inputs, outputs in itertools.pairwise(SIZES):
    theta += [torch.nn.init.xavier_uniform_(torch.empty(outputs, inputs)), torch.zeros(outputs)]
  return [*theta, torch.zeros(SIZES[-1])]


def mean_of(theta, x):
  """Returns the mean of the policy at the observations x."""
  x = F.relu(F.linear(x, theta[0], theta[1]))
  x = F.relu(F.linear(x, theta[2], theta[3]))
  return F.linear(x, theta[4], theta[5])


def log_prob(mean, log_std, actions):
  """Returns the log density of each action."""
  return _normal(mean, log_std).log_prob(actions).sum(-1)


def discounted(values, discount):
  """Returns y_t = x_t + discount · y_{t+1} for values x, `[B, H]`."""
  total, sums = torch.zeros_like(values[:, 0]), []
  for t in reversed(range(values.shape[1])):
    total = values[:, t] + discount * total
    sums.append(total)
  return torch.stack(sums[::-1], 1)


def advantages(observations, rewards, valid):
  """Returns normalised generalised advantages `[B, H]`, with a linear baseline fitted to the same trajectories."""
  o = observations.clamp(-10, 10)
  t = (torch.arange(o.shape[1], dtype=o.dtype) / 100).expand(o.shape[:2]).unsqueeze(-1)
  features = torch.cat([o, o**2, t, t**2, t**3, torch.ones_like(t)], -1)
  returns = discounted(rewards, DISCOUNT)
  rows = torch.cat([features[valid], math.sqrt(RIDGE) * torch.eye(features.shape[-1], dtype=o.dtype)])
  targets = torch.cat([returns[valid], torch.zeros(features.shape[-1], dtype=o.dtype)])
  values = (features @ torch.linalg.lstsq(rows, targets.unsqueeze(-1)).solution).squeeze(-1) * valid
  after = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], 1)
  result = discounted((rewards + DISCOUNT * after - values) * valid, DISCOUNT * DECAY)
  taken = result[valid]
  return (result - taken.mean()) / (taken.std(correction=0) + 1e-8) * valid


def surrogate_of(theta, batch: Batch):
  """Returns (surrogate, mean, log σ): TRPO's surrogate, averaged over the valid steps, and the policy's actions."""
  mean, log_std = mean_of(theta, batch.observations), theta[-1]
  ratio = (log_prob(mean, log_std, batch.actions) - batch.log_probs).exp()
  return (ratio * batch.advantages).sum() / batch.valid.sum(), mean, log_std


class Peer:
  """A learner with parameters θ and rates α: `peer(n)` takes n meta-iterations with TRPO.

  Meta-SGD learns α. MAML keeps it fixed.
  """

  def __init__(self, theta: Sequence[torch.Tensor], rate: float, learns_alpha: bool) -> None:
    self.theta = [t.clone().requires_grad_() for t in theta]
    self.alpha = [torch.full_like(t, rate).requires_grad_(learns_alpha) for t in self.theta]
    self.params = self.theta + (self.alpha if learns_alpha else [])
    self.envs = SyncVectorEnv([Navigation2D] * TRAJECTORIES)
    self.adam = torch.optim.Adam(self.params, 1e-3)

  def sample(self, theta, start, goal) -> Batch:
    self.envs.call('set_task', start, goal)
    observation, _ = self.envs.reset()
    valid, observations, actions, rewards, valids = np.ones(TRAJECTORIES, bool), [], [], [], []
    with torch.no_grad():
      std = theta[-1].exp()
      for _ in range(HORIZON):
        observations.append(torch.from_numpy(observation.copy()))
        mean = mean_of(theta, observations[-1])
        actions.append(mean + std * torch.randn_like(mean))
        observation, reward, terminated, _, _ = self.envs.step(actions[-1].numpy())
        rewards.append(np.where(valid, reward, 0))
        valids.append(valid)
        valid = valid & ~terminated
      seen, done = torch.stack(observations, 1), torch.stack(actions, 1)
      log_probs = log_prob(mean_of(theta, seen), theta[-1], done)
      reward, valid = torch.from_numpy(np.stack(rewards, 1)).to(seen.dtype), torch.from_numpy(np.stack(valids, 1))
      return Batch(seen, done, log_probs, reward, valid, advantages(seen, reward, valid))

  def inner_loss(self, theta, batch: Batch):
    """Returns the negative of the DiCE surrogate, averaged over the valid steps."""
    log_ratios = (
      log_prob(mean_of(theta, batch.observations), theta[-1], batch.actions) - batch.log_probs
    ) * batch.valid
    until = log_ratios.cumsum(-1)
    return -((until.exp() - (until - log_ratios).exp()) * batch.advantages).sum() / batch.valid.sum()

  def adapt(self, batch: Batch, create_graph: bool = True) -> list[torch.Tensor]:
    grads = torch.autograd.grad(self.inner_loss(self.theta, batch), self.theta, create_graph=create_graph)
    return [t - a * g for t, a, g in zip(self.theta, self.alpha, grads, strict=True)]

  def objective(self, before, after, old=None, create_graph: bool = True):
    """Returns (surrogate, divergence, policies): TRPO's surrogate, KL(old ‖ new), and the adapted policies.

    The policies are a list with (mean, log σ) for each task. If `old` is `None`, the new policies also serve as old.
    """
    surrogate, divergence, count, now = 0.0, 0.0, 0, []
    for i, (b, a) in enumerate(zip(before, after, strict=True)):
      value, mean, log_std = surrogate_of(self.adapt(b, create_graph), a)
      surrogate = surrogate + value / len(before)
      now.append((mean.detach(), log_std.detach()))
      was = now[-1] if old is None else old[i]
      kl = torch.distributions.kl_divergence(_normal(*was), _normal(mean, log_std)).sum(-1)
      divergence, count = divergence + (kl * a.valid).sum(), count + a.valid.sum()
    return surrogate, divergence / count, now

  def curvature(self, divergence) -> Callable[[torch.Tensor], torch.Tensor]:
    """Returns the function `v → F v`, where F is the Hessian of the divergence plus DAMPING times the identity."""
    first = _flat(torch.autograd.grad(divergence, self.params, create_graph=True))

    def product(v):
      return _flat(torch.autograd.grad(first @ v, self.params, retain_graph=True)) + DAMPING * v

    return product

  def update(self, before, after) -> None:
    """Takes one TRPO step, which changes the parameters in place."""
    surrogate, divergence, old = self.objective(before, after)
    gradient = _flat(torch.autograd.grad(surrogate, self.params, retain_graph=True))
    product = self.curvature(divergence)
    direction = conjugate_gradient(product, gradient)
    size = torch.sqrt(2 * MAX_KL / (direction @ product(direction)))
    start = _flat([p.detach() for p in self.params])
    for i in range(BACKTRACKS):
      self._set(start + RATIO**i * size * direction)
      new, kl, _ = self.objective(before, after, old, create_graph=False)
      if new > surrogate and kl <= MAX_KL:
        return
    self._set(start)

  def draw(self) -> tuple[list[Batch], list[Batch]]:
    """Returns (before, after): for new tasks, a list of batches before the inner step, and one after it."""
    start = np.zeros(2, np.float32)
    before, after = [], []
    for goal in new_goals():
      before.append(self.sample(self.theta, start, goal))
      after.append(self.sample(self.adapt(before[-1], create_graph=False), start, goal))
    return before, after

  def draw_only(self, iterations: int) -> None:
    """Runs meta-iterations without updates: only sampling and inner steps."""
    for _ in range(iterations):
      self.draw()

  def __call__(self, iterations: int) -> None:
    """Takes `iterations` meta-iterations with TRPO."""
    for _ in range(iterations):
      self.update(*self.draw())

  def train_with_adam(self, iterations: int) -> None:
    """Takes `iterations` meta-iterations with Adam."""
    for _ in range(iterations):
      self.adam.zero_grad()
      for goal in new_goals():
        start = np.zeros(2, np.float32)
        theta = self.adapt(self.sample(self.theta, start, goal))
        after = self.sample([t.detach() for t in theta], start, goal)
        self.add_gradient(theta, after)
      self.adam.step()

  def add_gradient(self, theta, after: Batch) -> None:
    """Adds the gradient of the outer loss of one task, whose adapted parameters are `theta`, as a part of TASKS."""
    (-surrogate_of(theta, after)[0] / TASKS).backward()

  def _set(self, flat) -> None:
    torch.nn.utils.vector_to_parameters(flat, self.params)


def new_goals() -> np.ndarray:
  """Returns the goals of TASKS new tasks, `[TASKS, 2]`."""
  return np.random.default_rng().uniform(-0.5, 0.5, (TASKS, 2)).astype(np.float32)


def conjugate_gradient(product, b):
  """Returns x with product(x) ≈ b."""
  x, r, p = torch.zeros_like(b), b.clone(), b.clone()
  square = r @ r
  for _ in range(CG_STEPS):
    if square < CG_TOLERANCE:
      break
    image = product(p)
    rate = square / (p @ image)
    x, r = x + rate * p, r - rate * image
    after = r @ r
    p, square = r + after / square * p, after
  return x


def build(learns_alpha: bool, rate: float, threads: int, update: str) -> Callable[[int], None]:
  """Returns a function that takes n meta-iterations of a new peer.

  `update` is 'adam', 'trpo' or 'none', which means that the meta-parameters are not updated. `threads` becomes the
  number of PyTorch's threads in this process.
  """
  torch.set_num_threads(threads)
  peer = Peer(new_theta(), rate, learns_alpha)
  programs: dict[str, Callable[[int], None]] = {'adam': peer.train_with_adam, 'trpo': peer, 'none': peer.draw_only}
  return programs[update]


def _normal(mean, log_std):
  return torch.distributions.Normal(mean, log_std.exp(), validate_args=False)


def _flat(tensors) -> torch.Tensor:
  return torch.cat([t.reshape(-1) for t in tensors])
