"""The LSTM meta-learner (Ravi and Larochelle 2017): the inner update is a gated step that an LSTM emits."""

from collections.abc import Mapping
from typing import NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from metasgd_jax.inner.loop import check_steps
from metasgd_jax.learners.episodic import Metric, check_adapts_all, of_parameters
from metasgd_jax.types import Batch, Episode, Learner, Model, PyTree


class MetaLstmParams(NamedTuple):
  """What is learned.

  Attributes:
    theta: θ_0, the cell state's start.
    optimizer: of the two LSTMs.
  """

  theta: PyTree
  optimizer: PyTree


def preprocess(x: chex.Array, p: float = 10.0) -> chex.Array:
  """Returns two numbers for each, of a size that a network can use: `[…]` → `[…, 2]` (Ravi and Larochelle, 3.2).

  `(log|x| / p, sgn x)` where `|x| ≥ e^−p`, otherwise (−1, e^p x).
  """
  large = jnp.abs(x) >= jnp.exp(-p)
  log = jnp.log(jnp.where(large, jnp.abs(x), 1.0)) / p
  return jnp.stack([jnp.where(large, log, -1.0), jnp.where(large, jnp.sign(x), jnp.exp(p) * x)], -1)


class Gates(nn.Module):
  """The forget and input gates of every entry of θ; the weights are shared over entries (section 3.2).

  An LSTM of `units` sees the preprocessed loss and gradient; then f = σ(W_F [h, θ, f_prev] + b_F) and
  i = σ(W_I [h, θ, i_prev] + b_I). At the start f is nearly 1 and i small: a gradient step. b_F ~ U(4, 6),
  b_I ~ U(−5, −4), the other weights of the gates ~ U(−0.01, 0.01).

  Attributes:
    units: of the LSTM.
  """

  units: int = 20

  def start(self, entries: int):
    """Returns the LSTM's state, f and i, all zero."""
    zeros = jnp.zeros((entries, self.units))
    return (zeros, zeros), jnp.zeros(entries), jnp.zeros(entries)

  @nn.compact
  def __call__(self, state, theta, loss, gradient):
    """θ and its gradient `[P]` → the next state; its f and i are `[P]`."""
    lstm, f, i = state
    inputs = jnp.concatenate([preprocess(gradient), jnp.broadcast_to(preprocess(loss), (theta.size, 2))], -1)
    lstm, h = nn.OptimizedLSTMCell(self.units)(lstm, inputs)

    def gate(name, before, low, high):
      weights = self.param(f'{name}_weights', _uniform(-0.01, 0.01), (self.units + 2,))
      bias = self.param(f'{name}_bias', _uniform(low, high), ())
      return jax.nn.sigmoid(h @ weights[:-2] + weights[-2] * theta + weights[-1] * before + bias)

    return lstm, gate('forget', f, 4.0, 6.0), gate('input', i, -5.0, -4.0)


def _uniform(low, high):
  return lambda key, shape: jax.random.uniform(key, shape, minval=low, maxval=high)


def meta_lstm(
  model: Model,
  loss_fn: Metric,
  *,
  steps: int = 12,
  units: int = 20,
  inductive: bool = False,
  metrics: Mapping[str, Metric] | None = None,
) -> Learner:
  """Builds the learner: θ ← f ∘ θ − i ∘ ∇L_support(θ), `steps` times, the gates by an LSTM (section 3.1).

  The losses and gradients that the LSTM sees are constants to the outer gradient, as in the paper; so no second
  derivatives are taken. A step's intermediates are computed again in the backward pass; the LSTM's state of every entry
  of θ is kept. `meta` is a `MetaLstmParams`. The paper trains with Adam at 1e-3 and clips the gradient to norm 0.25.

  Args:
    model: the network.
    loss_fn: `(outputs, targets) → scalar`.
    steps: inner steps, each on the whole support: the paper's 12 for 1 shot (5 for 5).
    units: of the first LSTM.
    inductive: as in `meta_sgd`.
    metrics: as in `meta_sgd`.

  Raises:
    ValueError: steps that are no count, a metric named 'loss', a model of which a part adapts, or inductive with one
      that has no statistics.

  Example:
    >>> learner = ms.learners.meta_lstm(ms.nn.from_linen(ms.nn.MLP(outputs=3)), ms.losses.cross_entropy, steps=2)
    >>> support = ms.Batch(jnp.arange(6.0).reshape(6, 1), jnp.array([0, 0, 1, 1, 2, 2]))  # 3 ways, 2 shots.
    >>> meta = jax.jit(learner.init)(jax.random.key(0), ms.Episode(support, support))
    >>> adapted = jax.jit(learner.adapt)(meta, support, jax.random.key(1))
    >>> jax.jit(learner.predict)(adapted, jnp.zeros((4, 1))).shape
    (4, 3)
  """
  check_steps(steps)
  check_adapts_all(model)
  gates = Gates(units)

  def init(key, episode: Episode) -> MetaLstmParams:
    theta_key, gates_key = jax.random.split(key)
    theta = model.init(theta_key, episode.support.x)
    some = jnp.zeros(2)
    return MetaLstmParams(theta, gates.init(gates_key, gates.start(2), some, jnp.zeros(()), some)['params'])

  def states(meta: MetaLstmParams, support: Batch):
    """θ after 0, 1, …, k steps, flat `[k + 1, P]`, and the function that gives it its structure."""
    flat, unravel = ravel_pytree(meta.theta)

    @jax.checkpoint
    def step(carry, _):
      theta, state = carry
      seen = jax.lax.stop_gradient(theta)
      loss, grad = jax.value_and_grad(lambda t: loss_fn(model.apply(unravel(t), support.x), support.y))(seen)
      state = gates.apply({'params': meta.optimizer}, state, theta, loss, grad)
      _, f, i = state  # type: ignore[misc]
      theta = f * theta - i * grad
      return (theta, state), theta

    _, later = jax.lax.scan(step, (flat, gates.start(flat.size)), length=int(steps))
    return jnp.concatenate([flat[None], later]), unravel

  def adapt(meta, support):
    thetas, unravel = states(meta, support)
    return unravel(thetas[-1])

  def path(meta, support):
    thetas, unravel = states(meta, support)
    return jax.vmap(unravel)(thetas)

  return of_parameters(model, loss_fn, init, adapt, path, inductive=inductive, metrics=metrics)
