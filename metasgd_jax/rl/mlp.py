"""The multilayer perceptron that policies use, with parameters as a dict."""

import math
from collections.abc import Callable, Sequence

import chex
import jax
import jax.numpy as jnp

from metasgd_jax.types import PyTree, check_count


def mlp(
  inputs: int, hidden: Sequence[int], outputs: int
) -> tuple[Callable[[chex.PRNGKey], PyTree], Callable[[PyTree, chex.Array], chex.Array]]:
  """Returns `init: key → θ` and `apply: (θ, x […, inputs]) → […, outputs]` of an MLP with ReLU between its layers.

  θ has a dict with `kernel [in, out]` and `bias [out]` for each layer `Dense_0`, `Dense_1`, …. `apply` ignores other
  entries of θ. Weights start from U[−l, l] with l = √(6 / (in + out)) (Glorot & Bengio 2010, equation 16), and biases
  start from zero. This is the initialisation of rllab's policies (Duan et al. 2016), from which MAML's released code is
  a fork.

  Raises:
    ValueError: if the number of units of a hidden layer is not an integer of at least 1.
  """
  for units in hidden:
    check_count('hidden', units)
  sizes = [inputs, *hidden, outputs]
  layers = [f'Dense_{i}' for i in range(len(sizes) - 1)]

  def init(key) -> PyTree:
    theta = {}
    keys = jax.random.split(key, len(layers))
    for name, layer_key, before, after in zip(layers, keys, sizes[:-1], sizes[1:], strict=True):
      limit = math.sqrt(6 / (before + after))
      kernel = jax.random.uniform(layer_key, (before, after), minval=-limit, maxval=limit)
      theta[name] = {'kernel': kernel, 'bias': jnp.zeros(after, kernel.dtype)}
    return theta

  def apply(theta, x):
    # The matrix has one row per step. With more axes, XLA would transpose the operands before each product.
    rows = x.reshape(-1, inputs)
    for i, name in enumerate(layers):
      rows = rows @ theta[name]['kernel']
      rows = rows + jnp.broadcast_to(theta[name]['bias'], rows.shape)
      rows = jax.nn.relu(rows) if i < len(layers) - 1 else rows
    return rows.reshape(*x.shape[:-1], outputs)

  return init, apply
