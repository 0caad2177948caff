"""What the benchmarks count, against the programs they count it of."""

import math

import jax
import pytest

import metasgd_jax as ms
from benchmarks import Setting, conv4, navigation
from metasgd_jax import rl
from metasgd_jax.nn import few_channels


def flop(jaxpr) -> float:
  """FLOP of the convolutions in a jaxpr and those inside it, done directly."""
  total = 0.0
  for equation in jaxpr.eqns:
    name = equation.primitive.name
    if name == 'metasgd_conv':
      total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(equation.invars[1].aval.shape[1:4])
    elif name == 'metasgd_conv_kernel_gradient':
      y, kernel = equation.invars[1].aval.shape, equation.outvars[0].aval.shape
      total += 2 * math.prod(y) * math.prod(kernel[1:4])
    for value in jax.tree.leaves(equation.params, is_leaf=lambda v: hasattr(v, 'jaxpr')):
      inner = getattr(value, 'jaxpr', value)  # A scan's is closed, a checkpoint's is not.
      if hasattr(inner, 'eqns'):
        total += flop(inner) * equation.params.get('length', 1)
  return total


@pytest.mark.parametrize('setting', [Setting('omniglot', 5, 1, 2), Setting('mini_imagenet', 3, 2, 2)])
def test_work_is_that_of_the_convolutions(setting, monkeypatch):
  monkeypatch.setattr(few_channels, 'suits', lambda *shapes: False)  # This form has products with zeros.
  learner = conv4.learner(ms.nn.Conv4(setting.way, filters=8))
  tasks = conv4.task_distribution(setting)

  def gradient(meta, keys):
    both = jax.vmap(tasks.episode)(jax.vmap(tasks.sample)(keys), keys)
    return ms.mean_loss_and_grad(learner, meta, both, keys, tasks_at_once=1)[1]

  keys = jax.random.split(jax.random.key(0), 2)
  meta = jax.eval_shape(lambda key: learner.init(key, tasks.episode(tasks.sample(key), key)), keys[0])
  jaxpr = jax.make_jaxpr(gradient)(meta, keys)
  assert flop(jaxpr.jaxpr) == conv4.work(setting, filters=8)


def test_work_of_a_policy_is_that_of_its_matrix_products():
  """The baseline of the advantages has a few more products, with its 8 features."""
  inner = navigation.build_inner('Meta-SGD', horizon=5)
  learner, tasks = rl.policy_learner(inner), rl.task_distribution(inner.environment)
  key = jax.random.key(0)
  gradient = jax.grad(lambda meta, key: learner.loss(meta, tasks.episode(tasks.sample(key), key), key)[0])
  jaxpr = jax.make_jaxpr(gradient)(jax.eval_shape(inner.init, key), key)
  assert products(jaxpr.jaxpr) == pytest.approx(navigation.work(tasks=1, steps=20 * 5), rel=1e-3)


def products(jaxpr) -> float:
  """FLOP of the products of matrices in a jaxpr and those inside it."""
  total = 0.0
  for equation in jaxpr.eqns:
    if equation.primitive.name == 'dot_general':
      shapes = [v.aval.shape for v in equation.invars]
      (contracted, _), _ = equation.params['dimension_numbers']
      depth = math.prod(shapes[0][i] for i in contracted)
      total += 2 * math.prod(equation.outvars[0].aval.shape) * depth
    for value in jax.tree.leaves(equation.params, is_leaf=lambda v: hasattr(v, 'jaxpr')):
      inner = getattr(value, 'jaxpr', value)
      if hasattr(inner, 'eqns'):
        total += products(inner) * equation.params.get('length', 1)
  return total
