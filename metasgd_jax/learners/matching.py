"""Matching Networks (Vinyals et al. 2016): a query's label is a vote of the support's, weighted by similarity."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from metasgd_jax.learners.episodic import Metric, apply, check_inductive, check_way, episodic, support_statistics
from metasgd_jax.losses import cross_entropy
from metasgd_jax.types import Batch, Episode, Learner, Model, PyTree


class MatchingParams(NamedTuple):
  """What Matching Networks learn.

  Attributes:
    theta: of the embedding, f′ = g′.
    log_scale: `[]`, the logarithm of what cosines are multiplied by: the softmax's inverse temperature.
    support_context: of g's LSTMs; `None` without full context embeddings.
    query_context: of f's LSTM; `None` likewise.
  """

  theta: PyTree
  log_scale: chex.Array
  support_context: PyTree
  query_context: PyTree


class Support(NamedTuple):
  """An embedded support: the parameters, batch norm's statistics or `None`, features `[S, D]` and labels `[S]`."""

  params: MatchingParams
  statistics: PyTree
  features: chex.Array
  labels: chex.Array


class SupportContext(nn.Module):
  """g(x_i, S) = →h_i + ←h_i + g′(x_i): an LSTM over the support in each direction (Vinyals et al., appendix A.2)."""

  @nn.compact
  def __call__(self, features):
    """`[S, D]` → `[S, D]`."""
    units = features.shape[-1]
    forward = nn.RNN(nn.OptimizedLSTMCell(units))
    backward = nn.RNN(nn.OptimizedLSTMCell(units), reverse=True, keep_order=True)
    return forward(features[None])[0] + backward(features[None])[0] + features


class QueryContext(nn.Module):
  """f(x, S): an LSTM that reads the support with attention for K steps (Vinyals et al., appendix A.1).

  From h_0 = 0, c_0 = 0:

      r_{k−1} = Σ_i softmax_i(h_{k−1} · g_i) g_i
      ĥ_k, c_k = LSTM(f′(x), [h_{k−1}, r_{k−1}], c_{k−1});  h_k = ĥ_k + f′(x)

  A hidden state [h, r] is the same as the hidden state h with r among the inputs.

  Attributes:
    steps: K.
  """

  steps: int

  @nn.compact
  def __call__(self, features, support):
    """`[Q, D]` and `[S, D]` → `[Q, D]`."""
    cell = nn.OptimizedLSTMCell(features.shape[-1])
    h = c = jnp.zeros_like(features)
    for _ in range(self.steps):
      read = jax.nn.softmax(h @ support.T) @ support
      (c, _), out = cell((c, h), jnp.concatenate([features, read], -1))
      h = out + features
    return h


def matching(
  embedding: Model,
  *,
  way: int,
  full_context: bool = False,
  read_steps: int = 5,
  scale: float = 10.0,
  inductive: bool = False,
  metrics: Mapping[str, Metric] | None = None,
) -> Learner:
  """Builds the learner: p(y | x, S) = Σ_i a(x, x_i) y_i, a = softmax_i(s · cos(f(x), g(x_i))) (Vinyals et al., eq. 1).

  The outputs are log p: logsumexp over a class's terms, less that over all. A softmax over bare cosines, which span 2
  at the most, is nearly flat: hence the learned s, which is not in the paper.

  Args:
    embedding: f′ = g′, `[B, …]` → `[B, D]`.
    way: N.
    full_context: let f and g depend on the whole support.
    read_steps: K, of f's LSTM; the paper's experiments do not state it, 5 is what reimplementations take.
    scale: s at the start.
    inductive: normalise each query item by the support's statistics; see `nn.BatchNorm`.
    metrics: as in `meta_sgd`.

  Raises:
    ValueError: a way below 2, read_steps below 1, a scale not above 0, a metric named 'loss', or inductive with a model
      that has no statistics.

  Example:
    >>> learner = ms.learners.matching(ms.nn.from_linen(ms.nn.MLP(outputs=8)), way=3)
    >>> support = ms.Batch(jnp.arange(6.0).reshape(6, 1), jnp.array([0, 0, 1, 1, 2, 2]))  # 3 ways, 2 shots.
    >>> meta = jax.jit(learner.init)(jax.random.key(0), ms.Episode(support, support))
    >>> adapted = jax.jit(learner.adapt)(meta, support, jax.random.key(1))
    >>> jax.jit(learner.predict)(adapted, jnp.zeros((4, 1))).shape
    (4, 3)
  """
  check_way(way)
  check_inductive(embedding, inductive)
  if read_steps < 1:
    raise ValueError(f'read_steps must be at least 1, got {read_steps}')
  if not scale > 0:
    raise ValueError(f'scale must be above 0, got {scale}')
  query_context = QueryContext(read_steps)

  def init(key, episode: Episode) -> MatchingParams:
    theta_key, support_key, query_key = jax.random.split(key, 3)
    theta = embedding.init(theta_key, episode.support.x)
    contexts = None, None
    if full_context:
      features = embedding.apply(theta, episode.support.x)
      contexts = (
        SupportContext().init(support_key, features)['params'],
        query_context.init(query_key, features, features)['params'],
      )
    return MatchingParams(theta, jnp.log(jnp.float32(scale)), *contexts)

  def adapt(meta: MatchingParams, support: Batch) -> Support:
    statistics = support_statistics(embedding, meta.theta, support.x, inductive)
    features = embedding.apply(meta.theta, support.x)
    if full_context:
      features = SupportContext().apply({'params': meta.support_context}, features)
    return Support(meta, statistics, features, support.y)

  def predict(adapted: Support, x: Any):
    meta = adapted.params
    features = apply(embedding, meta.theta, x, adapted.statistics)
    if full_context:
      features = query_context.apply({'params': meta.query_context}, features, adapted.features)
    attention = jnp.exp(meta.log_scale) * cosine(features, adapted.features)  # [Q, S]
    return jax.nn.log_softmax(by_class(attention, adapted.labels, way, jax.nn.logsumexp))

  return episodic(init, adapt, predict, loss_fn=cross_entropy, metrics=metrics)


def cosine(a: chex.Array, b: chex.Array, epsilon: float = 1e-12) -> chex.Array:
  """Returns the cosines between the rows of `[Q, D]` and of `[S, D]`, `[Q, S]`; 0 for a row of zeros."""
  unit = lambda v: v * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(v), -1, keepdims=True), epsilon))
  return unit(a) @ unit(b).T


def by_class(values: chex.Array, labels: chex.Array, way: int, reduce) -> chex.Array:
  """Returns `reduce` of the columns of each class: `[Q, S]` and labels `[S]` → `[Q, N]`; −∞ for a class of none."""
  mine = labels[None] == jnp.arange(way)[:, None]  # [N, S]
  return reduce(jnp.where(mine[None], values[:, None], -jnp.inf), -1)
