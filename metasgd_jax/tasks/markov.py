"""Markov chains over tokens: each task is one chain, which is learned from a few of its sequences."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from metasgd_jax.types import Batch, Episode, TaskDistribution, check_count, equal_partial


@dataclasses.dataclass(frozen=True)
class MarkovConfig:
  """Parameters of the distribution from which chains are drawn.

  Attributes:
    tokens: Number of tokens, V. The tokens are the states of the chain.
    length: Number of inputs of a sequence, L. L + 1 tokens are drawn, because each target is the next token.
    concentration: Concentration of the Dirichlet distribution from which each row of transition probabilities is drawn.
      Near 0, one token is by far the most probable in each row. At 1, a row is distributed uniformly over all
      probability vectors.

  Example:
    >>> tasks = ms.tasks.markov_chains(ms.tasks.MarkovConfig(tokens=4, length=6), shot=3, query=2)
    >>> tasks.episode(tasks.sample(jax.random.key(0)), jax.random.key(1)).support.x.shape
    (3, 6)
  """

  tokens: int = 8
  length: int = 16
  concentration: float = 0.2

  def __post_init__(self):
    check_count('tokens', self.tokens, 2)
    check_count('length', self.length)
    if not 0 < self.concentration < float('inf'):
      raise ValueError(f'concentration must be a finite number above 0, got {self.concentration}')


class MarkovChain(NamedTuple):
  """A task: one Markov chain, given by `log_transitions` `[V, V]`.

  Row i of `log_transitions` has the log-probabilities of the token that follows token i.

  Example:
    >>> chain = ms.tasks.MarkovChain(jnp.log(jnp.array([[0.5, 0.5], [1.0, 0.0]])))
    >>> logits = chain(jnp.array([0, 1, 0]))  # Logits of the token after each of three tokens.
    >>> print(jax.nn.softmax(logits)[1])  # Token 0 always follows token 1.
    [1. 0.]
  """

  log_transitions: jax.Array

  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns the best possible logits, which are those of the true chain: `[…, V]` for tokens x `[…]`."""
    return self.log_transitions[x]


def markov_chains(config: MarkovConfig = MarkovConfig(), *, shot: int, query: int) -> TaskDistribution:
  """Returns the distribution of tasks on Markov chains. A task is a `MarkovChain`.

  An episode has sequences of tokens, `[shot, L]` in the support and `[query, L]` in the query. The targets y are the
  inputs x, shifted by one token: y[t] follows x[t]. The first token of a sequence has a uniform distribution.

  Args:
    config: Parameters of the distribution of chains.
    shot: Number of support sequences, K.
    query: Number of query sequences.

  Raises:
    ValueError: if `shot` or `query` is below 1.

  Example:
    >>> tasks = ms.tasks.markov_chains(shot=3, query=2)
    >>> episode = tasks.episode(tasks.sample(jax.random.key(0)), jax.random.key(1))
    >>> episode.support.x.shape[0], episode.query.x.shape[0]
    (3, 2)
  """
  check_count('shot', shot)
  check_count('query', query)
  episode = equal_partial(_episode, config=config, shot=shot, query=query)
  return TaskDistribution(equal_partial(_sample, config=config), episode)


def _sample(key, *, config) -> MarkovChain:
  gammas = jax.random.loggamma(key, config.concentration, (config.tokens, config.tokens), jnp.float32)
  return MarkovChain(jax.nn.log_softmax(gammas))


def _episode(task: MarkovChain, key, *, config, shot, query) -> Episode:
  first_key, step_key = jax.random.split(key)
  first = jax.random.randint(first_key, (shot + query,), 0, config.tokens)

  def step(now, key):
    return jax.random.categorical(key, task(now)).astype(first.dtype), now

  last, before = jax.lax.scan(step, first, jax.random.split(step_key, config.length))
  x = before.T
  y = jnp.concatenate([x[:, 1:], last[:, None]], 1)
  return Episode(Batch(x[:shot], y[:shot]), Batch(x[shot:], y[shot:]))
