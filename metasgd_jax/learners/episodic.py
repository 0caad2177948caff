"""What learners have in common: they adapt to the support, answer the query, and are judged on it."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from metasgd_jax.types import Batch, Episode, Learner, Model, PyTree

Metric = Callable[[Any, Any], chex.Array]
"""`(outputs, targets) → scalar`."""


def check_metrics(metrics: Mapping[str, Metric] | None) -> dict[str, Metric]:
  """Returns the metrics as a dict; raises ValueError where one has the name of the loss."""
  metrics = dict(metrics or {})
  if 'loss' in metrics:
    raise ValueError("a metric cannot be named 'loss', which is loss_fn's own name in info; give it another")
  return metrics


def measure(metrics: Mapping[str, Metric], outputs: Any, targets: Any) -> dict[str, chex.Array]:
  """Returns each metric's value by its name: what `loss` gives as info."""
  return {name: metric(outputs, targets) for name, metric in metrics.items()}


def check_way(way: int) -> None:
  """Raises ValueError unless way is an integer of at least 2."""
  if isinstance(way, bool) or not isinstance(way, int) or way < 2:
    raise ValueError(f'way must be an integer of at least 2, got {way!r}')


class WithStatistics(NamedTuple):
  """Adapted parameters, and batch norm's statistics of the support, by which the query is normalised."""

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
  """Builds a learner whose adapted state is θ′, the model's parameters; with `inductive` a `WithStatistics`.

  Args:
    model: the network.
    loss_fn: `(outputs, targets) → scalar`, of the query.
    init: `(key, episode) → meta`; consumes key.
    adapt: `(meta, support) → θ′`.
    path: `(meta, support) → θ` after 0, 1, …, k steps, `[k + 1]` in front.
    inductive: normalise each query item by the support's statistics; see `nn.BatchNorm`.
    metrics: as in `meta_sgd`.

  Raises:
    ValueError: a metric named 'loss', or inductive with a model that has no statistics.
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
  """Builds a learner that adapts at once, with nothing random, and is trained as it is judged: by loss_fn on the query.

  Its `path` has the one state there is: `[1]` in front.

  Args:
    init: `(key, episode) → meta`; consumes key.
    adapt: `(meta, support) → adapted`.
    predict: `(adapted, x [Q, …]) → outputs [Q, …]`.
    loss_fn: `(outputs, targets) → scalar`.
    metrics: as in `meta_sgd`.

  Raises:
    ValueError: a metric named 'loss'.
  """
  metrics = check_metrics(metrics)

  def adapt_(meta, support, key=None):
    del key  # Nothing here is random.
    return adapt(meta, support)

  def path(meta, support, key=None):
    return jax.tree.map(lambda a: jnp.asarray(a)[None], adapt_(meta, support, key))

  def loss(meta, episode: Episode, key=None):
    outputs = predict(adapt_(meta, episode.support, key), episode.query.x)
    return loss_fn(outputs, episode.query.y), measure(metrics, outputs, episode.query.y)

  return Learner(init, adapt_, path, predict, loss)


def support_statistics(model: Model, theta: PyTree, x: Any, inductive: bool) -> PyTree:
  """Returns batch norm's statistics of the support where the query is to be normalised by them, `None` otherwise."""
  return model.statistics(theta, x) if inductive and model.statistics else None


def apply(model: Model, theta: PyTree, x: Any, statistics: PyTree) -> Any:
  """Returns the model's outputs, normalised by the statistics given, or where they are `None` by x's own."""
  return model.apply(theta, x) if statistics is None else model.apply(theta, x, statistics)


def check_adapts_all(model: Model) -> None:
  """Raises ValueError where a model says that a part of θ adapts, for a learner that adapts all of it."""
  if model.adapts is not None:
    raise ValueError('this learner adapts all of theta; meta_sgd and maml take a model of which a part adapts')


def check_inductive(model: Model, inductive: bool) -> None:
  """Raises ValueError where a model has no statistics to give."""
  if inductive and model.statistics is None:
    raise ValueError(
      'inductive=True needs a Model with `statistics`, such as from_linen makes; without batch norm leave it False'
    )
