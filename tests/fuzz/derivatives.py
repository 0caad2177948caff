"""Random losses, whose meta-gradients by every adjoint are compared with those of a plain loop and with differences."""

import functools
from typing import NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from custom_rules import CANNOT_BE_COMPARED, FALSE, FALSE_SOMEWHERE, TRUE
from hypothesis import strategies as st

import metasgd_jax as ms
from metasgd_jax.inner.adaptation import Adjoint

ADJOINTS = get_args(Adjoint)


def _stopped(x):
  return x * jax.lax.stop_gradient(jnp.cos(x))


def _through_by_stopping(x):
  return x + jax.lax.stop_gradient(jnp.round(4 * x) / 4 - x)


def _halved_in_a_loop(x):
  size = jax.lax.while_loop(lambda s: s > 1, lambda s: s / 2, jnp.max(jnp.abs(jax.lax.stop_gradient(x))))
  return jnp.sin(x) * size


def _in_a_branch(x):
  return jax.lax.cond(jnp.sum(x) > 0, jnp.tanh, jax.nn.softplus, x)


STOPPING = {
  'a part is stopped': lambda: _stopped,
  'straight through by stopping': lambda: _through_by_stopping,
  'a loop without derivative': lambda: _halved_in_a_loop,
}
SMOOTH = TRUE | CANNOT_BE_COMPARED | {'a branch': lambda: _in_a_branch}
LAYERS = SMOOTH | FALSE | FALSE_SOMEWHERE | STOPPING
del LAYERS['unlike its transpose']  # JAX has no batching rule for `linear_call`.


class Network(NamedTuple):
  """A loss and the way in which its meta-gradient is computed.

  Attributes:
    layers: Names of one or two layers.
    closed_over: Whether the loss uses an array that it does not receive, and that has a derivative too.
    classes: Whether the labels are integers.
    steps: Number of inner steps.
    transform: How the meta-gradient is transformed.
    seed: Seed of the arrays.
  """

  layers: list[str]
  closed_over: bool
  classes: bool
  steps: int
  transform: str
  seed: int


@st.composite
def networks(draw):
  layers = draw(st.lists(st.sampled_from(sorted(LAYERS)), min_size=1, max_size=2))
  transform = draw(st.sampled_from(['one task', 'vmap', 'gradient of vmap']))
  return Network(
    layers, draw(st.booleans()), draw(st.booleans()), draw(st.integers(1, 5)), transform, draw(st.integers(0, 999))
  )


def _loss(network: Network, layers, scale, theta, batch):
  x = batch.x
  for layer, name in zip(layers, ('w1', 'w2'), strict=False):
    x = layer(x @ theta[name])
  if network.closed_over:
    x = x * scale[None]
  outputs = jnp.sin(x) @ theta['last']
  measure = ms.losses.cross_entropy if network.classes else ms.losses.mean_squared_error
  return measure(outputs, batch.y)


def _outer(network: Network, layers, theta, alpha, scale, batch, adapt):
  adapted = adapt(theta, alpha, batch, functools.partial(_loss, network, layers, scale))
  return sum(jnp.sum(jnp.cos(leaf) * (1 + 0.1 * i)) for i, leaf in enumerate(jax.tree.leaves(adapted)))


def _plain(steps, theta, alpha, batch, loss):
  for _ in range(steps):
    theta = jax.tree.map(lambda t, a, g: t - a * g, theta, alpha, jax.grad(loss)(theta, batch))
  return theta


def _ours(steps, adjoint, theta, alpha, batch, loss):
  return ms.adapt(theta, alpha, batch, loss_fn=loss, steps=steps, adjoint=adjoint)


def _gradient(network: Network, layers, adapt):
  """Returns the function `(theta, alpha, scale, batches) → gradients` of a network, transformed as it says."""
  outer = functools.partial(_outer, network, layers, adapt=adapt)
  tasks = jax.vmap(outer, (None, None, None, 0))
  if network.transform == 'gradient of vmap':
    gradient = jax.grad(lambda *given: jnp.mean(tasks(*given)), (0, 1, 2))
  elif network.transform == 'vmap':
    gradient = jax.vmap(jax.grad(outer, (0, 1, 2)), (None, None, None, 0))
  else:
    gradient = jax.grad(lambda *given: outer(*given[:3], _first(given[3])), (0, 1, 2))
  return jax.jit(gradient)


def _first(batches):
  return jax.tree.map(lambda a: a[0], batches)


def _arrays(network: Network):
  rng = np.random.default_rng(network.seed)
  theta = {'w1': rng.normal(0, 0.7, (3, 4)), 'w2': rng.normal(0, 0.7, (4, 4)), 'last': rng.normal(0, 0.7, (4, 2))}
  alpha = {name: rng.uniform(-0.05, 0.2, leaf.shape) for name, leaf in theta.items()}
  y = rng.integers(0, 2, (2, 5)) if network.classes else rng.normal(0, 1, (2, 5, 2))
  return jax.tree.map(jnp.asarray, (theta, alpha, rng.normal(1, 0.2, 4), ms.Batch(rng.normal(0, 1, (2, 5, 3)), y)))


def check(network: Network) -> bool:
  """Checks the gradients of θ, α and what the loss closes over. Every network is right, so none may be refused."""
  layers = [LAYERS[name]() for name in network.layers]
  with jax.enable_x64(True):
    arrays = _arrays(network)
    expected = _gradient(network, layers, functools.partial(_plain, network.steps))(*arrays)
    for adjoint in ADJOINTS:
      found = _gradient(network, layers, functools.partial(_ours, network.steps, adjoint))(*arrays)
      for ours, theirs in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        size = max(1.0, float(np.max(np.abs(theirs), initial=0.0)))
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-9 * size, err_msg=f'{adjoint} of {network}')
    if network.seed % 20 == 0:  # It takes half a minute.
      with jax.checking_leaks():
        _gradient(network, layers, functools.partial(_ours, network.steps, 'revolve')).trace(*arrays)
    if network.transform == 'one task' and all(name in SMOOTH for name in network.layers):
      _check_differences(network, layers, arrays, expected)
  return True


def _check_differences(network: Network, layers, arrays, gradients) -> None:
  """Compares the plain loop's own derivative along a direction with a central difference of its values."""
  theta, alpha, scale, batches = arrays
  value = jax.jit(
    lambda *given: _outer(network, layers, *given, _first(batches), adapt=functools.partial(_plain, network.steps))
  )
  rng = np.random.default_rng(network.seed + 1)
  along = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), (theta, alpha, scale))

  def moved(h):
    return value(*jax.tree.map(lambda a, d: a + h * d, (theta, alpha, scale), along))

  fine, coarse = ((moved(h) - moved(-h)) / (2 * h) for h in (1e-5, 2e-5))
  if not np.allclose(fine, coarse, rtol=1e-3, atol=1e-5):
    return  # The network runs away in its inner steps, so that a difference says nothing about its derivative.
  slope = sum(np.sum(g * d) for g, d in zip(*map(jax.tree.leaves, (gradients, along)), strict=True))
  np.testing.assert_allclose(fine, slope, rtol=1e-4, atol=1e-5, err_msg=str(network))
