"""A cart with a pole behind the interface of Gymnax 1.0, for the page on environments. The tests install no Gymnax."""

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class Params:
  gravity: float = 9.8
  masscart: float = 1.0
  masspole: float = 0.1
  length: float = 0.5
  polemass_length: float = 0.05
  force_mag: float = 10.0


class CartPole:
  """The equations are those of Barto, Sutton and Anderson 1983 without friction, with Euler steps of 0.02 s."""

  num_actions = 2

  def reset_env(self, key, params):
    del params
    state = jax.random.uniform(key, (4,), minval=-0.05, maxval=0.05)
    return state, {'state': state, 'time': 0}

  def step_env(self, key, state, action, params):
    del key
    _, speed, angle, turn = state['state']
    total = params.masscart + params.masspole
    push = params.force_mag * (2 * action - 1)
    pull = (push + params.polemass_length * turn**2 * jnp.sin(angle)) / total
    inertia = params.length * (4 / 3 - params.masspole * jnp.cos(angle) ** 2 / total)
    turning = (params.gravity * jnp.sin(angle) - jnp.cos(angle) * pull) / inertia
    moving = pull - params.polemass_length * turning * jnp.cos(angle) / total
    new = state['state'] + 0.02 * jnp.stack([speed, moving, turn, turning])
    fallen = (jnp.abs(new[0]) > 2.4) | (jnp.abs(new[2]) > 0.21)
    return new, {'state': new, 'time': state['time'] + 1}, jnp.ones(()), fallen, {}


def make(name):
  assert name == 'CartPole-v1'
  return CartPole(), Params()
