"""Common parts of the learners, which adapt to the support, predict the query, and are evaluated on the query."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from metasgd_jax.types import Batch, Episode, Learner, Model, PyTree

Metric = Callable[[Any, Any], chex.Array]
"""A loss or a metric, `(outputs, targets) → scalar`."""


def check_metrics(metrics: Mapping[str, Metric] | None) -> dict[str, Metric]:
  """Returns the metrics as a dict. Raises ValueError if a metric is named 'loss'."""
  metrics = dict(metrics or {})
  if 'loss' in metrics:
    raise ValueError("metrics contain the name 'loss', which info reserves for the value of loss_fn; rename the metric")
  return metrics


def measure(metrics: Mapping[str, Metric], outputs: Any, targets: Any) -> dict[str, chex.Array]:
  """Returns the value of each metric by its name. A learner's `loss` returns these values as info."""
  return {name: metric(outputs, targets) for name, metric in metrics.items()}


def check_way(way: int) -> None:
  """Raises ValueError unless `way` is an integer of at least 2."""
  if isinstance(way, bool) or not isinstance(way, int) or way < 2:
    raise ValueError(f'way must be an integer of at least 2, got {way!r}')


class WithStatistics(NamedTuple):
  """Adapted parameters, and the batch-norm statistics of the support, which normalise the query."""

  theta: PyTree
  statistics: PyTree


def of_parameters(
  model: Model,
  loss_fn: Metric,
  init: Callable[[chex.PRNGKey, Episode], PyTree],
  adapt: Callable[[PyTree, Batch], PyTree],
  path: Callable[[PyTree, Batch], PyTree],
  *,
  inductive: bool,
  metrics: Mapping[str, Metric] | None,
) -> Learner:
  """Builds a learner whose adapted state is θ′, the parameters of the model, or with `inductive` a `WithStatistics`.

  Args:
    model: Network.
    loss_fn: Loss of the query, `(outputs, targets) → scalar`.
    init: Function that returns the initial meta-parameters, `(key, episode) → meta`; consumes key.
    adapt: Function that returns the adapted parameters, `(meta, support) → θ′`.
    path: Function `(meta, support) → θ` that returns θ after 0, 1, …, k inner steps, stacked: leaves `[k + 1, …]`.
    inductive: Whether each query item is normalised by the batch-norm statistics of the support; see `nn.BatchNorm`.
    metrics: Metrics of the query; see `meta_sgd`.

  Raises:
    ValueError: if a metric is named 'loss', or if `inductive` is set and the model has no statistics.
  """
  check_inductive(model, inductive)

  def adapt_(meta, support):
    return finish(adapt(meta, support), support)

  def path_(meta, support, key=None):
    del key
    thetas = path(meta, support)
    return jax.vmap(lambda theta: finish(theta, support))(thetas) if inductive else thetas

  def finish(theta, support):
    return WithStatistics(theta, support_statistics(model, theta, support.x, inductive)) if inductive else theta

  def predict(adapted, x):
    return model.apply(adapted.theta, x, adapted.statistics) if inductive else model.apply(adapted, x)

  return episodic(init, adapt_, predict, loss_fn=loss_fn, metrics=metrics)._replace(path=path_)


def episodic(
  init: Callable[[chex.PRNGKey, Episode], PyTree],
  adapt: Callable[[PyTree, Batch], PyTree],
  predict: Callable[[PyTree, Any], chex.Array],
  *,
  loss_fn: Metric,
  metrics: Mapping[str, Metric] | None,
) -> Learner:
  """Builds a learner with deterministic adaptation, whose training loss is `loss_fn` on the query.

  The learner's `path` contains a single state, the result of `adapt`: leaves `[1, …]`.

  Args:
    init: Function that returns the initial meta-parameters, `(key, episode) → meta`; consumes key.
    adapt: Function that returns the adapted state, `(meta, support) → adapted`.
    predict: Function that predicts the query, `(adapted, x [Q, …]) → outputs [Q, …]`.
    loss_fn: Loss of the query, `(outputs, targets) → scalar`.
    metrics: Metrics of the query; see `meta_sgd`.

  Raises:
    ValueError: if a metric is named 'loss'.
  """
  metrics = check_metrics(metrics)

  def adapt_(meta, support, key=None):
    del key  # Adaptation is deterministic.
    return adapt(meta, support)

  def path(meta, support, key=None):
    return jax.tree.map(lambda a: jnp.asarray(a)[None], adapt_(meta, support, key))

  def loss(meta, episode: Episode, key=None):
    outputs = predict(adapt_(meta, episode.support, key), episode.query.x)
    return loss_fn(outputs, episode.query.y), measure(metrics, outputs, episode.query.y)

  return Learner(init, adapt_, path, predict, loss)


def support_statistics(model: Model, theta: PyTree, x: Any, inductive: bool) -> PyTree:
  """Returns the batch-norm statistics of the support x if `inductive` is set, and `None` otherwise."""
  return model.statistics(theta, x) if inductive and model.statistics else None


def apply(model: Model, theta: PyTree, x: Any, statistics: PyTree) -> Any:
  """Returns the outputs of the model. Batch norm uses `statistics`, or the statistics of x if they are `None`."""
  return model.apply(theta, x) if statistics is None else model.apply(theta, x, statistics)


def check_adapts_all(model: Model) -> None:
  """Raises ValueError if the model has `adapts`, because the learner cannot adapt only a part of θ."""
  if model.adapts is not None:
    raise ValueError(
      'this learner adapts all of theta, got a model with `adapts`; use meta_sgd or maml to adapt a part of theta'
    )


def check_inductive(model: Model, inductive: bool) -> None:
  """Raises ValueError if `inductive` is set and the model has no statistics."""
  if inductive and model.statistics is None:
    raise ValueError(
      'inductive=True needs a Model with `statistics`, got statistics=None; build the model with nn.from_linen, '
      'or leave inductive=False if the network has no batch norm'
    )
