"""The LSTM meta-learner (Ravi and Larochelle 2017), whose inner update has gates that an LSTM computes."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from metasgd_jax.inner.loop import LossFn
from metasgd_jax.learners.episodic import Metric, Metrics, check_all_adapt, of_parameters
from metasgd_jax.types import Batch, Episode, Learner, Model, PyTree, check_count, equal_by_arguments


class MetaLstmParams(NamedTuple):
  """Meta-parameters of the LSTM meta-learner.

  Attributes:
    theta: Initial parameters θ_0, which are the initial cell state of the second LSTM.
    optimizer: Parameters of the two LSTMs.
  """

  theta: PyTree
  optimizer: PyTree


def preprocess(x: jax.Array, p: float = 10.0) -> jax.Array:
  """Maps each entry to two numbers of moderate size: `[…]` → `[…, 2]` (Ravi and Larochelle, section 3.2).

  The two numbers are `(log|x| / p, sgn x)` if `|x| ≥ e^−p`, and `(−1, e^p x)` otherwise.
  """
  large = jnp.abs(x) >= jnp.exp(-p)
  log = jnp.log(jnp.where(large, jnp.abs(x), 1.0)) / p
  return jnp.stack([jnp.where(large, log, -1.0), jnp.where(large, jnp.sign(x), jnp.exp(p) * x)], -1)


class Gates(nn.Module):
  """The forget and input gates of every entry of θ. All entries share the same weights (section 3.2 of the paper).

  A first LSTM receives the preprocessed loss and gradient, and its output is h. The gates are then
  f = σ(W_F [h, θ, f_prev] + b_F) and i = σ(W_I [h, θ, i_prev] + b_I). The gates form the second LSTM, whose cell state
  is θ. Initially f is nearly 1 and i is small, so that the update is close to a gradient step. The initial values are
  b_F ~ U(4, 6) and b_I ~ U(−5, −4), and the other weights of the gates are drawn from U(−0.01, 0.01).

  Attributes:
    units: Number of units of the first LSTM.
  """

  units: int = 20

  def start(self, entries: int):
    """Returns the initial state (state of the first LSTM, gates f, gates i) for `entries` entries of θ: all zeros."""
    zeros = jnp.zeros((entries, self.units))
    return (zeros, zeros), jnp.zeros(entries), jnp.zeros(entries)

  @nn.compact
  def __call__(self, state, theta, loss, gradient):
    """Returns the next state (state of the first LSTM, gates f `[P]`, gates i `[P]`).

    P is the number of entries of θ, and the gradient has the shape `[P]`.
    """
    lstm, f, i = state
    inputs = jnp.concatenate([preprocess(gradient), jnp.broadcast_to(preprocess(loss), (theta.size, 2))], -1)
    lstm, h = nn.OptimizedLSTMCell(self.units)(lstm, inputs)

    def gate(name, before, low, high):
      weights = self.param(f'{name}_weights', jax.random.uniform, (self.units + 2,), float, -0.01, 0.01)
      bias = self.param(f'{name}_bias', jax.random.uniform, (), float, low, high)
      return jax.nn.sigmoid(h @ weights[:-2] + weights[-2] * theta + weights[-1] * before + bias)

    return lstm, gate('forget', f, 4.0, 6.0), gate('input', i, -5.0, -4.0)


@equal_by_arguments
def meta_lstm(
  model: Model, loss_fn: Metric, *, steps: int = 12, units: int = 20, inductive: bool = False, metrics: Metrics = None
) -> Learner:
  """Builds the learner, which adapts θ by `steps` updates θ ← f ∘ θ − i ∘ ∇L_support(θ).

  An LSTM computes the gates f and i (Ravi and Larochelle 2017, section 3.1).

  The outer gradient treats the losses and gradients that the LSTM receives as constants, as in the paper, so no second
  derivatives are taken. For the backward pass, each step keeps θ and the LSTM's state for every entry of θ, and the
  other intermediates of the step are computed again. `meta` is a `MetaLstmParams`. The paper trains with Adam at a
  learning rate of 1e-3 and clips the outer gradient to norm 0.25.

  Args:
    model: Network.
    loss_fn: Loss of the support and of the query, `(outputs, targets) → scalar`.
    steps: Number of inner steps, each on the whole support. The paper uses 12 for 1 shot and 5 for 5 shots.
    units: Number of units of the first LSTM; see `Gates`.
    inductive: Whether each query item is normalised by the batch-norm statistics of the support; see `meta_sgd`.
    metrics: Metrics of the query; see `meta_sgd`.

  Raises:
    ValueError: if `steps` is not an integer of at least 0, if a metric is named 'loss', if only a part of the model
      adapts, or if `inductive` is set and the model has no statistics.

  Example:
    >>> learner = ms.learners.meta_lstm(ms.nn.from_linen(ms.nn.MLP(outputs=3)), ms.losses.cross_entropy, steps=2)
    >>> support = ms.Batch(jnp.arange(6.0).reshape(6, 1), jnp.array([0, 0, 1, 1, 2, 2]))  # 3 ways, 2 shots.
    >>> meta = jax.jit(learner.init)(jax.random.key(0), ms.Episode(support, support))
    >>> adapted = jax.jit(learner.adapt)(meta, support, jax.random.key(1))
    >>> jax.jit(learner.predict)(adapted, jnp.zeros((4, 1))).shape
    (4, 3)
  """
  check_count('steps', steps, 0)
  check_all_adapt(model)
  gates = Gates(units)

  def init(key, episode: Episode) -> MetaLstmParams:
    theta_key, gates_key = jax.random.split(key)
    theta = model.init(theta_key, episode.support.x)
    some = jnp.zeros(2)
    return MetaLstmParams(theta, gates.init(gates_key, gates.start(2), some, jnp.zeros(()), some)['params'])

  def path(theta: PyTree, optimizer: PyTree, support: Batch, loss_fn: LossFn) -> PyTree:
    flat, unravel = ravel_pytree(theta)
    value_and_grad = jax.value_and_grad(lambda flat: loss_fn(unravel(flat), support))

    @jax.checkpoint
    def step(carry, _):
      theta, state = carry
      loss, grad = value_and_grad(jax.lax.stop_gradient(theta))
      state = gates.apply({'params': optimizer}, state, theta, loss, grad)
      _, f, i = state  # type: ignore[misc]
      theta = f * theta - i * grad
      return (theta, state), theta

    _, later = jax.lax.scan(step, (flat, gates.start(flat.size)), length=int(steps))
    return jax.vmap(unravel)(jnp.concatenate([flat[None], later]))

  def adapt(theta: PyTree, optimizer: PyTree, support: Batch, loss_fn: LossFn) -> PyTree:
    return jax.tree.map(lambda thetas: thetas[-1], path(theta, optimizer, support, loss_fn))

  return of_parameters(model, loss_fn, init, (adapt, path), inductive=inductive, metrics=metrics)
