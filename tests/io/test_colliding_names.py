"""Two leaves whose simple paths are the same: each has a name of its own, and nothing takes one for the other."""

import jax
import jax.numpy as jnp
import numpy as np

import metasgd_jax as ms
from metasgd_jax.io import checkpoint, files
from metasgd_jax.tree import named

THETA = {'a': {'b': np.array([1.0, 1.0], np.float32)}, 'a.b': np.array([2.0, 2.0], np.float32)}
LIKE = jax.tree.map(np.zeros_like, THETA)


def assert_theta(found):
  jax.tree.map(np.testing.assert_array_equal, found, THETA)


def test_names():
  assert [name for name, _ in named(THETA)] == ["['a']['b']", "['a.b']"]
  assert [name for name, _ in named({'a': THETA['a'], 'c': 1})] == ['a.b', 'c']


def test_checkpoint(tmp_path):
  state = lambda theta: ms.TrainState(jnp.int32(10), jax.random.key(0), ms.MetaParams(theta, None), ())
  with checkpoint.Checkpoints(tmp_path, like=state(LIKE), config={}) as kept:
    kept.save(state(THETA))
  assert_theta(checkpoint.newest(tmp_path, like=state(LIKE), config={}).state.meta.theta)


def test_params(tmp_path):
  files.write_params(tmp_path / 'p.safetensors', THETA)
  assert_theta(files.read_params(tmp_path / 'p.safetensors', LIKE))


def test_low_rank():
  """The change is of the matrix that was chosen alone."""
  theta = {'a': {'b': jnp.eye(2)}, 'a.b': 2 * jnp.eye(2)}
  model = ms.Model(lambda key, x: theta, lambda theta, x: (x @ theta['a']['b'], x @ theta['a.b']))
  changed = ms.low_rank(model, 1, lambda name: name == "['a']['b']")
  x = jnp.ones((1, 2))
  start = changed.init(jax.random.key(0), x)
  assert list(start['factors']) == ["['a']['b']"]
  alpha = ms.init_alpha(jax.random.key(1), start, ms.AlphaConfig(0.1, 0.1), adapts=changed.adapts)
  assert alpha['base'] == {'a': {'b': None}, 'a.b': None}
  assert len(jax.tree.leaves(alpha['factors'])) == 2
  factors = {'a': jnp.ones((2, 1)), 'b': jnp.ones((1, 2))}
  one, other = changed.apply({**start, 'factors': {"['a']['b']": factors}}, x)
  np.testing.assert_array_equal(one, x @ (jnp.eye(2) + 1))
  np.testing.assert_array_equal(other, 2 * x)
