"""Inner steps by the hundred: few of the θ_t are kept, and the derivatives are the same."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import (
  OneLayer,
  SmallConvNet,
  assert_trees_close,
  conv_learner,
  episodes,
  random_bank,
  sinusoid_learner,
  to_float64,
)

import metasgd_jax as ms
from metasgd_jax.inner import adjoint


@pytest.mark.parametrize('steps', [3, 4, 7, 20, 37, 200, 1000])
def test_the_schedule_takes_each_step_back_in_order_from_a_theta_that_is_there(steps):
  plan = adjoint.schedule(steps)
  rooms, taken, back = {0: 0}, collections.Counter(), []
  for source, target in plan.moves.tolist():
    if target < 0:
      back.append(rooms[source])
    else:
      taken[rooms[source]] += 1
      rooms[target] = rooms[source] + 1
      assert 0 < target < plan.rooms  # θ_0 stays.
  assert back == list(range(steps))[::-1]
  assert max(taken.values()) <= adjoint.AGAIN + 1
  assert all(target > 0 for _, target in plan.moves[: steps - 1].tolist())  # The way forward.


def test_rooms_grow_far_slower_than_steps():
  assert [adjoint.schedule(n).rooms for n in (20, 200, 2000)] == [4, 10, 22]


@pytest.mark.parametrize('steps', [1, 2, 3, 9, 23])
def test_equals_reverse_mode_over_reverse_mode(steps):
  learners = [sinusoid_learner(steps=steps, adjoint=adjoint, hidden=(6,)) for adjoint in ('reverse', 'revolve')]
  episode = jax.tree.map(lambda a: a[0], jax.device_get(episodes(ms.tasks.sinusoid(), 1)))
  meta = jax.jit(learners[0].init)(jax.random.key(2), episode)
  with jax.enable_x64(True):
    # By the support too, which the inner gradient closes over.
    gradients = [jax.grad(lambda *of, learner=learner: learner.loss(*of, None)[0], (0, 1)) for learner in learners]
    both = jax.jit(lambda *of: [gradient(*of) for gradient in gradients])
    assert_trees_close(*both(to_float64(meta), to_float64(episode)), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize('network', [OneLayer, pytest.param(SmallConvNet, marks=pytest.mark.slow)])
def test_several_tasks_side_by_side(network):
  """Labels are integers, and pictures may be constants of the program: neither has a derivative."""
  tasks = ms.tasks.few_shot(random_bank(size=8), way=3, shot=1, query=1)
  keys = jax.random.split(jax.random.key(0), 2)
  two = jax.device_get(episodes(tasks, 2))
  meta = jax.jit(conv_learner(way=3, network=network).init)(keys[0], jax.tree.map(lambda a: a[0], two))
  with jax.enable_x64(True):
    meta, two = to_float64(meta), to_float64(two)
    learners = [conv_learner(way=3, network=network, steps=4, adjoint=a) for a in ('reverse', 'hvp', 'revolve')]

    def gradients(meta, two):
      return [ms.mean_loss_and_grad(learner, meta, two, keys, tasks_at_once='all') for learner in learners]

    found = jax.jit(gradients)(meta, two) + jax.jit(lambda meta: gradients(meta, two))(meta)
  for other in found[1:]:
    assert_trees_close(other, found[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize('name', ['hvp', 'revolve'])
def test_no_tracer_of_a_surrounding_vmap_is_kept(name):
  """The loss closes over the batch of a task, integers and floats."""

  def outer(theta, x, y):
    loss = lambda theta, _: jnp.sum(jnp.tanh(theta * x) * y)
    return ms.adapt(theta, 0.1, None, loss_fn=loss, steps=3, adjoint=name)

  def mean(theta):
    return jnp.mean(jax.vmap(outer, (None, 0, 0))(theta, jnp.arange(2.0), jnp.arange(2)))

  with jax.checking_leaks():
    jax.jit(jax.grad(mean)).trace(0.5)


def test_a_third_derivative():
  """Its own derivatives can be taken again."""
  with jax.enable_x64(True):
    x = jnp.asarray(np.random.default_rng(0).normal(size=3))
    loss_fn = lambda theta, _: jnp.sum(jnp.sin(theta) ** 2)

    def outer(theta, adjoint):
      return loss_fn(ms.adapt(theta, 0.1, None, loss_fn=loss_fn, steps=5, adjoint=adjoint), None)

    curvature = lambda adjoint: jax.grad(lambda t: jnp.sum(jax.grad(outer)(t, adjoint) ** 2))(x)
    assert_trees_close(*jax.jit(lambda: [curvature(adjoint) for adjoint in ('revolve', 'reverse')])(), rtol=1e-9)


def intermediates(steps, adjoint):
  learner = sinusoid_learner(steps=steps, adjoint=adjoint, hidden=(64, 64))
  tasks = ms.tasks.sinusoid()
  episode = jax.tree.map(lambda a: a[0], jax.device_get(episodes(tasks, 1)))
  meta = jax.eval_shape(learner.init, jax.random.key(2), episode)
  gradient = jax.jit(jax.grad(lambda meta: learner.loss(meta, episode, None)[0]))
  return gradient.lower(meta).compile().memory_analysis().temp_size_in_bytes, 4 * sum(
    t.size for t in jax.tree.leaves(meta.theta)
  )


@pytest.mark.slow
def test_memory_of_two_hundred_steps(optimized):
  """Beside two steps', where θ is nearly all there is: ten θ more, which XLA may copy once, not two hundred."""
  (two, theta), (many, _), (all_kept, _) = (
    intermediates(2, 'revolve'), intermediates(200, 'revolve'), intermediates(200, 'hvp'),
  )  # fmt: skip
  assert many < two + 20 * theta
  assert all_kept > two + 150 * theta
