"""Meta-SGD (Li et al. 2017), which learns both the initialisation θ and the rates α."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from metasgd_jax.inner.adaptation import Adjoint
from metasgd_jax.inner.alpha import AlphaConfig, init_alpha
from metasgd_jax.learners.episodic import Metric, Metrics, inner_loop, measure, of_parameters
from metasgd_jax.types import Episode, Learner, MetaParams, Model, equal_by_arguments


@equal_by_arguments
def meta_sgd(
  model: Model,
  loss_fn: Metric,
  *,
  steps: int = 1,
  first_order: bool = False,
  adjoint: Adjoint = 'reverse',
  inductive: bool = False,
  alpha: AlphaConfig = AlphaConfig(),
  step_weights: Sequence[float] | None = None,
  metrics: Metrics = None,
) -> Learner:
  """Builds the Meta-SGD learner (Li et al. 2017, Algorithm 1).

  `adapt` applies θ ← θ − α ∘ ∇L_support(θ) `steps` times, which gives θ′, and `loss` is L_query(θ′). `meta` is a
  `MetaParams(theta, alpha)`.

  The values of α are not bounded. With several steps and a large α, training can diverge. The usual remedies are
  `optax.clip_by_global_norm` before the outer optimiser, or smaller initial rates.

  Args:
    model: Network. If the model has `adapts`, α has rates only for the leaves of θ that adapt.
    loss_fn: Loss of the support and of the query, `(outputs [B, …], targets [B, …]) → scalar`.
    steps: Number of inner steps. The paper uses 1.
    first_order: Whether second derivatives are dropped.
    adjoint: How the outer gradient goes back through the inner steps; see `Adjoint`. 'revolve' is for hundreds of
      steps.
    inductive: Whether each query item is normalised by the batch-norm statistics of the support (inductive), so that no
      output depends on the other query items. By default the query items are normalised together (transductive), as
      in the paper. See `nn.BatchNorm`.
    alpha: Range of the initial rates, and which parts of θ and which steps share a rate; see `AlphaConfig`. The
      defaults are the paper's.
    step_weights: Weights w_1, …, w_k of the inner steps. If they are given, the loss is Σ_t w_t L_query(θ_t) instead of
      L_query(θ_k). This is the multi-step loss of MAML++ without the annealing of its weights. The intermediates of
      all inner steps are then stored for the backward pass, as with adjoint='reverse'.
    metrics: Metrics `{name: (outputs, targets) → scalar}`, measured on the query after adaptation and returned as info.

  Raises:
    ValueError: if `alpha` is not an `AlphaConfig`, if `steps` is not an integer of at least 0, if `adjoint` is unknown,
      if `step_weights` is not one finite number per step, if a metric is named 'loss', or if `inductive` is set and
      the model has no statistics.

  Example:
    >>> tasks = ms.tasks.sinusoid(shot=5)
    >>> learner = ms.meta_sgd(ms.nn.from_linen(ms.nn.MLP()), ms.losses.mean_squared_error, steps=2)
    >>> episode = tasks.episode(tasks.sample(jax.random.key(0)), jax.random.key(1))
    >>> meta = learner.init(jax.random.key(2), episode)
    >>> meta.alpha['Dense_0']['kernel'].shape == meta.theta['Dense_0']['kernel'].shape
    True
    >>> theta = learner.adapt(meta, episode.support, jax.random.key(3))
    >>> learner.predict(theta, episode.query.x).shape
    (10, 1)
  """
  if not isinstance(alpha, AlphaConfig):
    raise ValueError(f'alpha must be an AlphaConfig, got {alpha!r:.80}; for rates that are not learned, use maml')
  inner = inner_loop(model, steps, adjoint, first_order=first_order, alpha_by_step=alpha.by_step)

  def init(key, episode: Episode) -> MetaParams:
    theta_key, alpha_key = jax.random.split(key)
    theta = model.init(theta_key, episode.support.x)
    return MetaParams(theta, init_alpha(alpha_key, theta, alpha, steps=steps, adapts=model.adapts))

  learner = of_parameters(model, loss_fn, init, inner, inductive=inductive, metrics=metrics)
  return learner if step_weights is None else _multi_step(learner, loss_fn, steps, step_weights, metrics)


def _multi_step(learner: Learner, loss_fn: Metric, steps: int, weights: Sequence[float], metrics: Metrics) -> Learner:
  """Returns a learner whose loss is Σ_t w_t L_query(θ_t), where inner step t has the weight w_t and returns θ_t.

  The metrics are measured after the last inner step.
  """
  if np.shape(weights) != (steps,) or not steps or not np.all(np.isfinite(weights)):
    raise ValueError(f'step_weights must be {steps} finite numbers, one per inner step, got {weights!r}')
  measured = dict(metrics or {})

  def loss(meta: MetaParams, episode: Episode, key=None):
    later = jax.tree.map(lambda a: a[1:], learner.path(meta, episode.support, key))
    outputs = jax.lax.map(lambda adapted: learner.predict(adapted, episode.query.x), later)
    losses = jax.vmap(loss_fn, (0, None))(outputs, episode.query.y)
    info = measure(measured, outputs[-1], episode.query.y)
    return jnp.dot(jnp.asarray(weights, losses.dtype), losses), info

  return learner._replace(loss=loss)
