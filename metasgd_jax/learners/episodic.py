"""Functions that learners share. A learner adapts to the support, and its predictions are evaluated on the query."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from metasgd_jax.inner.adaptation import Adjoint, adapt, adapt_path
from metasgd_jax.losses import are_classes, one_hot
from metasgd_jax.types import Batch, Episode, Learner, Model, PyTree, check_choice, check_count, check_model

Metric = Callable[[Any, Any], chex.Array]
"""A loss or a metric, `(outputs, targets) → scalar`."""

Metrics = Mapping[str, Metric] | None
"""Metrics by their names."""

Init = Callable[[chex.PRNGKey, Episode], PyTree]
"""Function that returns the initial meta-parameters, `(key, episode) → meta`; consumes key."""

Adapt = Callable[[PyTree, Batch], PyTree]
"""Function `(meta, support) → adapted`."""

Predict = Callable[[PyTree, Any], chex.Array]
"""Function `(adapted, x [Q, …]) → outputs [Q, …]`."""

Objective = Callable[[PyTree, Episode], tuple[chex.Array, Any]]
"""Function `(meta, episode) → (scalar, outputs)`: the training loss, and the outputs for the query, used by metrics."""

InnerLoop = tuple[Callable[..., PyTree], Callable[..., PyTree]]
"""Two functions `(θ, rates, support, loss_fn=support loss) → pytree`.

The first one returns θ′. The second one returns θ after 0, 1, …, k inner steps, stacked.
"""

Start = Callable[[Any], tuple[PyTree, PyTree]]
"""Function `meta → (θ, rates)`."""


class WithStatistics(NamedTuple):
  """Adapted parameters, and the batch-norm statistics of the support, which normalise the query."""

  theta: PyTree
  statistics: PyTree


class EmbeddedSupport(NamedTuple):
  """Embedded support of a task.

  Attributes:
    meta: Meta-parameters of the learner.
    statistics: Batch-norm statistics of the support, or `None` if the query is normalised by its own statistics.
    features: Features of the support, `[S, D]`.
    labels: Labels of the support, `[S]`.
  """

  meta: Any
  statistics: PyTree
  features: chex.Array
  labels: chex.Array


def of_parameters(
  model: Model, loss_fn: Metric, init: Init, inner: InnerLoop, *, start: Start = tuple, inductive: bool, **options: Any
) -> Learner:
  """Builds a learner whose adapted state is θ′, the parameters of the model.

  If `inductive` is set, the adapted state is a `WithStatistics`, which contains θ′.

  Args:
    model: Network.
    loss_fn: Loss of the support and of the query, `(outputs, targets) → scalar`.
    init: Function that returns the initial meta-parameters; see `Init`.
    inner: Inner loop, such as that of `inner_loop`.
    start: Function `meta → (θ, rates)`: the θ from which the inner loop starts, and its rates. By default θ and the
      rates are the two fields of meta.
    inductive: Whether each query item is normalised by the batch-norm statistics of the support; see `nn.BatchNorm`.
    options: Other options of `episodic`.

  Raises:
    ValueError: if a metric is named 'loss', or if `inductive` is set and the model has no statistics.
  """
  check_inductive(model, inductive)
  adapt, path = inner

  def support_loss(theta, support: Batch):
    return loss_fn(model.apply(theta, support.x), support.y)

  def finish(theta, support):
    return WithStatistics(theta, support_statistics(model, theta, support.x, inductive)) if inductive else theta

  def adapt_(meta, support):
    return finish(adapt(*start(meta), support, loss_fn=support_loss), support)

  def path_(meta, support, key=None):
    del key
    thetas = path(*start(meta), support, loss_fn=support_loss)
    return jax.vmap(lambda theta: finish(theta, support))(thetas) if inductive else thetas

  def predict(adapted, x):
    return model.apply(adapted.theta, x, adapted.statistics) if inductive else model.apply(adapted, x)

  return episodic(init, adapt_, predict, loss_fn=loss_fn, **options)._replace(path=path_)


def inner_loop(model: Model, steps: int, adjoint: Adjoint = 'reverse', **options: Any) -> InnerLoop:
  """Returns the functions `adapt` and `adapt_path` as an `InnerLoop`.

  Their arguments `steps`, `adapts` (from the model) and `options` are already set. `adjoint` is set in `adapt` only.

  Raises:
    ValueError: if `model` is no Model, if `steps` is not an integer of at least 0, or if `adjoint` is unknown.
  """
  check_model(model)
  check_count('steps', steps, 0)
  check_choice('adjoint', adjoint, Adjoint)
  options |= dict(steps=steps, adapts=model.adapts)
  return functools.partial(adapt, adjoint=adjoint, **options), functools.partial(adapt_path, **options)


def episodic(
  init: Init, adapt: Adapt, predict: Predict, *, loss_fn: Metric, metrics: Metrics, objective: Objective | None = None
) -> Learner:
  """Builds a learner that adapts deterministically. Its training loss is `loss_fn` on the query.

  The learner's `path` contains a single state, the result of `adapt`: leaves `[1, …]`.

  Args:
    init: Function that returns the initial meta-parameters; see `Init`.
    adapt: Function that returns the adapted state; see `Adapt`.
    predict: Function that predicts the query; see `Predict`.
    loss_fn: Loss of the query, `(outputs, targets) → scalar`.
    metrics: Metrics of the query; see `meta_sgd`.
    objective: Training loss, if it is not `loss_fn` of the query after adaptation; see `Objective`.

  Raises:
    ValueError: if a metric is named 'loss'.
  """
  metrics = dict(metrics or {})
  if 'loss' in metrics:
    raise ValueError("no metric may be named 'loss', because the training loss has this name in `info`; rename it")

  def adapt_(meta, support, key=None):
    del key  # Adaptation is deterministic.
    return adapt(meta, support)

  def path(meta, support, key=None):
    return jax.tree.map(lambda a: jnp.asarray(a)[None], adapt_(meta, support, key))

  def query_loss(meta, episode):
    outputs = predict(adapt(meta, episode.support), episode.query.x)
    return loss_fn(outputs, episode.query.y), outputs

  def loss(meta, episode: Episode, key=None):
    del key
    value, outputs = (objective or query_loss)(meta, episode)
    return value, measure(metrics, outputs, episode.query.y)

  return Learner(init, adapt_, path, predict, loss)


def measure(metrics: Mapping[str, Metric], outputs: Any, targets: Any) -> dict[str, chex.Array]:
  """Returns `{name: value}` for the metrics. A learner's `loss` returns this dict as info."""
  return {name: metric(outputs, targets) for name, metric in metrics.items()}


def support_statistics(model: Model, theta: PyTree, x: Any, inductive: bool) -> PyTree:
  """Returns the batch-norm statistics of the support x if `inductive` is set, and `None` otherwise."""
  return model.statistics(theta, x) if inductive and model.statistics else None


def embed_support(embedding: Model, meta: Any, support: Batch, way: int, inductive: bool) -> EmbeddedSupport:
  """Returns the embedded support. The parameters of the embedding are `meta.theta`.

  Raises:
    ValueError: if a label is not from 0 to way − 1. Labels that JAX traces are not checked; see `are_classes`.
  """
  are_classes(support.y, way)
  statistics = support_statistics(embedding, meta.theta, support.x, inductive)
  return EmbeddedSupport(meta, statistics, embedding.apply(meta.theta, support.x), support.y)


def class_means(features: chex.Array, labels: chex.Array, way: int) -> chex.Array:
  """Returns the mean of the features `[S, D]` of each class, `[N, D]`, for labels `[S]` from 0 to N − 1."""
  members = one_hot(labels, way).T  # [N, S]
  return members @ features / jnp.sum(members, 1, keepdims=True)


def apply(model: Model, theta: PyTree, x: Any, statistics: PyTree) -> Any:
  """Returns the outputs of the model. If `statistics` is `None`, batch norm uses the statistics of x instead."""
  return model.apply(theta, x) if statistics is None else model.apply(theta, x, statistics)


def check_all_adapt(model: Model) -> None:
  """Raises ValueError if `model` is no Model, or if it has `adapts`: the learner cannot adapt only a part of θ."""
  check_model(model)
  if model.adapts is not None:
    raise ValueError(
      'this learner adapts all of theta, got a model whose `adapts` selects only some leaves; use meta_sgd or maml'
    )


def check_inductive(model: Model, inductive: bool) -> None:
  """Raises ValueError if `model` is no Model, or if `inductive` is set and the model has no statistics."""
  check_model(model)
  if inductive and model.statistics is None:
    raise ValueError(
      'inductive=True needs a Model with the function `statistics`, got statistics=None; build the model with '
      'nn.from_linen, or set inductive=False'
    )
