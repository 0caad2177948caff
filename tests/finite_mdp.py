"""A decision process of three states and two actions in which every trajectory can be written down."""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metasgd_jax import rl

STATES, ACTIONS, HORIZON = 3, 2, 3
END = 2
"""Whoever comes into this state has ended; nobody starts in it."""


class Mdp(NamedTuple):
  start: np.ndarray  # [S]
  transitions: np.ndarray  # [S, A, S]
  rewards: np.ndarray  # [S, A]


def random_mdp(seed=0):
  rng = np.random.default_rng(seed)
  start = np.append(rng.dirichlet(np.ones(STATES - 1)), 0.0)
  return Mdp(start, rng.dirichlet(np.ones(STATES), (STATES, ACTIONS)), rng.normal(size=(STATES, ACTIONS)))


def table_policy():
  """Softmax of one number for each state and action; an observation is the state's row of the identity."""

  def log_prob(logits, actions):
    chosen = actions[..., 0].astype(jnp.int32)[..., None]
    return jnp.take_along_axis(jax.nn.log_softmax(logits), chosen, -1)[..., 0]

  return rl.Policy(
    init=lambda key: 0.5 * jax.random.normal(key, (STATES, ACTIONS)),
    apply=lambda theta, observations: observations @ theta,
    sample=lambda logits, key: jax.random.categorical(key, logits)[None].astype(logits.dtype),
    log_prob=log_prob,
    kl=lambda p, q: jnp.sum(jax.nn.softmax(p) * (jax.nn.log_softmax(p) - jax.nn.log_softmax(q)), -1),
  )


def environment(mdp):
  start, transitions, rewards = map(jnp.asarray, mdp)

  def step(task, state, action, key):
    action = action[0].astype(jnp.int32)
    after = jax.random.categorical(key, jnp.log(transitions[state, action]))
    return after, rewards[state, action], after == END

  return rl.Environment(
    sample=lambda key: (),
    reset=lambda task, key: jax.random.categorical(key, jnp.log(start)),
    observe=lambda task, state: jax.nn.one_hot(state, STATES, dtype=rewards.dtype),
    step=step,
    observation_size=STATES,
    action_size=1,
    horizon=HORIZON,
  )


def expected_return(mdp, theta):
  """By dynamic programming, backwards from the horizon; undiscounted."""
  policy = jax.nn.softmax(theta)
  values = jnp.zeros(STATES)
  for _ in range(HORIZON):
    goes_on = jnp.where(jnp.arange(STATES) == END, 0, values)
    values = jnp.sum(policy * (mdp.rewards + jnp.asarray(mdp.transitions) @ goes_on), -1)
  return mdp.start @ values


def all_trajectories(mdp):
  """Every trajectory once, [N] in front, with log_probs zero; and what of its probability is not the policy's."""
  rows = []
  for path in itertools.product(range(STATES), range(ACTIONS), repeat=HORIZON):
    states, actions = path[::2], path[1::2]
    length = next((t for t in range(1, HORIZON) if states[t] == END), HORIZON)
    if any((states[t], actions[t]) != (END, 0) for t in range(length, HORIZON)):
      continue  # What lies after the end is written in one way only.
    probability = mdp.start[states[0]]
    for t in range(HORIZON - 1):
      probability *= mdp.transitions[states[t], actions[t], states[t + 1]] if t < length else 1.0
    valid = np.arange(HORIZON) < length
    rewards = np.where(valid, mdp.rewards[states, actions], 0.0)
    rows.append((np.eye(STATES)[list(states)], np.array(actions)[:, None], rewards, valid, probability))
  observations, actions, rewards, valid, weights = (jnp.asarray(np.stack(column)) for column in zip(*rows, strict=True))
  drawn = rl.Trajectories(
    observations, actions, jnp.zeros(rewards.shape), rewards, valid, jnp.zeros(len(weights), bool), observations[:, -1]
  )
  return drawn, weights


def under(policy, theta, trajectories, weights):
  """The trajectories with θ's log-probabilities, and the probability of each under θ: both constants."""
  theta = jax.lax.stop_gradient(theta)
  log_probs = policy.log_prob(policy.apply(theta, trajectories.observations), trajectories.actions)
  log_probs = jnp.where(trajectories.valid, log_probs, 0)
  return trajectories._replace(log_probs=log_probs), weights * jnp.exp(jnp.sum(log_probs, -1))
