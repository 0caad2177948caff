"""Matching Networks (Vinyals et al. 2016): support labels vote for a query label, weighted by similarity."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from metasgd_jax.learners.episodic import EmbeddedSupport, Metrics, apply, check_inductive, embed_support, episodic
from metasgd_jax.losses import cross_entropy, one_hot
from metasgd_jax.types import Batch, Episode, Learner, Model, PyTree, check_count, equal_by_arguments


class MatchingParams(NamedTuple):
  """Meta-parameters of Matching Networks.

  Attributes:
    theta: Parameters of the embedding network. The same network computes f′ for the query and g′ for the support.
    log_scale: Logarithm `[]` of the scale s that multiplies the cosines. The scale is the inverse temperature of the
      softmax over the support.
    support_context: Parameters of the two LSTMs of `SupportContext`, or `None` without full context embeddings.
    query_context: Parameters of the LSTM of `QueryContext`, or `None` without full context embeddings.
  """

  theta: PyTree
  log_scale: jax.Array
  support_context: PyTree = None
  query_context: PyTree = None


class SupportContext(nn.Module):
  """g(x_i, S) = →h_i + ←h_i + g′(x_i), the support's features in context (Vinyals et al., appendix A.2).

  g′(x_i) are the features of the support item x_i. →h_i and ←h_i are the outputs of two LSTMs, of which one reads the
  support forwards, and the other backwards.
  """

  @nn.compact
  def __call__(self, features):
    """Maps the support's features `[S, D]` to features `[S, D]` in the context of the whole support."""
    units = features.shape[-1]
    forward = nn.RNN(nn.OptimizedLSTMCell(units))
    backward = nn.RNN(nn.OptimizedLSTMCell(units), reverse=True, keep_order=True)
    return forward(features[None])[0] + backward(features[None])[0] + features


class QueryContext(nn.Module):
  """f(x, S): an LSTM that reads the support with attention for K steps (Vinyals et al., appendix A.1).

  f′(x) are the features of the query items, and g_i the features of the support items. The states start at h_0 = 0 and
  c_0 = 0. Step k = 1, …, K computes:

      r_{k−1} = Σ_i softmax_i(h_{k−1} · g_i) g_i
      ĥ_k, c_k = LSTM(f′(x), [h_{k−1}, r_{k−1}], c_{k−1});  h_k = ĥ_k + f′(x)

  The paper's hidden state [h, r] is implemented as the hidden state h with r among the inputs, which is equivalent.

  Attributes:
    steps: Number K of attention steps.
  """

  steps: int

  @nn.compact
  def __call__(self, features, support):
    """Maps the query's features `[Q, D]` to features `[Q, D]` in the context of the support's features `[S, D]`."""
    cell = nn.OptimizedLSTMCell(features.shape[-1])
    h = c = jnp.zeros_like(features)
    for _ in range(self.steps):
      read = jax.nn.softmax(h @ support.T) @ support
      (c, _), out = cell((c, h), jnp.concatenate([features, read], -1))
      h = out + features
    return h


@equal_by_arguments
def matching(
  embedding: Model,
  *,
  way: int,
  full_context: bool = False,
  read_steps: int = 5,
  scale: float = 10.0,
  inductive: bool = False,
  metrics: Metrics = None,
) -> Learner:
  """Builds the learner: p(y | x, S) = Σ_i a(x, x_i) y_i, a = softmax_i(s · cos(f(x), g(x_i))) (Vinyals et al., eq. 1).

  The outputs are log p. For each class, log p is the logsumexp of s · cos over the support items of the class, minus
  the logsumexp over all support items. Cosines differ by at most 2, so their softmax without a scale is nearly flat.
  The learned scale s corrects this, and is not in the paper.

  Args:
    embedding: Network f′ = g′ that computes features, `[B, …]` → `[B, D]`.
    way: Number N of ways (classes of a task).
    full_context: Whether f and g depend on the whole support (full context embeddings).
    read_steps: Number K of attention steps of f's LSTM. The paper does not state the K of its experiments;
      reimplementations use 5.
    scale: Initial value of s.
    inductive: Whether each query item is normalised by the batch-norm statistics of the support; see `nn.BatchNorm`.
    metrics: Metrics of the query; see `meta_sgd`.

  Raises:
    ValueError: if `way` is not an integer of at least 2, if `read_steps` is below 1, if `scale` is not above 0, if a
      metric is named 'loss', or if `inductive` is set and the model has no statistics.

  Example:
    >>> learner = ms.learners.matching(ms.nn.from_linen(ms.nn.MLP(outputs=8)), way=3)
    >>> support = ms.Batch(jnp.arange(6.0).reshape(6, 1), jnp.array([0, 0, 1, 1, 2, 2]))  # 3 ways, 2 shots.
    >>> meta = jax.jit(learner.init)(jax.random.key(0), ms.Episode(support, support))
    >>> adapted = jax.jit(learner.adapt)(meta, support, jax.random.key(1))
    >>> jax.jit(learner.predict)(adapted, jnp.zeros((4, 1))).shape
    (4, 3)
  """
  check_count('way', way, 2)
  check_count('read_steps', read_steps)
  check_inductive(embedding, inductive)
  if not scale > 0:
    raise ValueError(f'`scale` must be above 0, got {scale}')
  support_context, query_context = SupportContext(), QueryContext(read_steps)

  def init(key, episode: Episode) -> MatchingParams:
    theta_key, support_key, query_key = jax.random.split(key, 3)
    meta = MatchingParams(embedding.init(theta_key, episode.support.x), jnp.log(jnp.float32(scale)))
    if not full_context:
      return meta
    features = embedding.apply(meta.theta, episode.support.x)
    of_support = support_context.init(support_key, features)['params']
    of_query = query_context.init(query_key, features, features)['params']
    return meta._replace(support_context=of_support, query_context=of_query)

  def adapt(meta: MatchingParams, support: Batch) -> EmbeddedSupport:
    embedded = embed_support(embedding, meta, support, way, inductive)
    if not full_context:
      return embedded
    return embedded._replace(features=support_context.apply({'params': meta.support_context}, embedded.features))

  def predict(adapted: EmbeddedSupport, x: Any):
    meta = adapted.meta
    features = apply(embedding, meta.theta, x, adapted.statistics)
    if full_context:
      features = query_context.apply({'params': meta.query_context}, features, adapted.features)
    attention = jnp.exp(meta.log_scale) * cosine(features, adapted.features)  # [Q, S]
    return jax.nn.log_softmax(by_class(attention, adapted.labels, way, jax.nn.logsumexp))

  return episodic(init, adapt, predict, loss_fn=cross_entropy, metrics=metrics)


def cosine(a: jax.Array, b: jax.Array, epsilon: float = 1e-12) -> jax.Array:
  """Returns the cosine similarity of each row of `a` `[Q, D]` and each row of `b` `[S, D]`, as an array `[Q, S]`.

  The similarity is 0 if one of the two rows is zero.
  """
  # Each row is scaled to length 1.
  a, b = (v * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(v), -1, keepdims=True), epsilon)) for v in (a, b))
  return a @ b.T


def by_class(values: jax.Array, labels: jax.Array, way: int, reduce) -> jax.Array:
  """Reduces `values` `[Q, S]` to one value per class, `[Q, N]`. `labels` `[S]` are the classes of the columns.

  For each class, the function `reduce`, such as a maximum, combines the columns of the class. It receives −∞ in place
  of the columns of other classes. The result is therefore −∞ for a class that has no column, and NaN for all classes if
  a label is not one of the N classes.
  """
  mine = one_hot(labels, way).T  # [N, S]
  others = jnp.where(jnp.isnan(mine), jnp.nan, -jnp.inf)
  return reduce(jnp.where(mine == 1, values[:, None], others), -1)
