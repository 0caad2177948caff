"""Conv4 on images with the shape of a data set: the programs of metasgd_jax and of plain JAX, and their FLOPs.

The roof is the rate at which the machine computes a large matrix product, in FLOP/s.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import metasgd_jax as ms
from benchmarks import ALPHA, Setting, ours

QUERY, INSTANCES, CLASSES = 15, 20, 64
OURS, PLAIN = 'metasgd_jax', 'plain JAX (lax.conv, vmap, one device)'
ROOF, SIDE = 'matrix product', 2048
VARIANTS = (
  f'{OURS}, one device',
  f"{OURS}, one device, tasks_at_once='all'",
  f'{OURS}, one device, tasks_at_once=4',
  f"{OURS}, adjoint='hvp'",
  f"{OURS}, adjoint='checkpoint'",
  f'{OURS}, bfloat16',
)


class PlainConv4(nn.Module):
  """Conv4 written with flax and lax only. Its parameters have the same names as those of `ms.nn.Conv4`."""

  way: int
  filters: int = 64
  hidden: int = 32

  @nn.compact
  def __call__(self, x):
    """Maps `[B, H, W, D]` to `[B, way]`."""
    for i in range(4):
      x = PlainBlock(self.filters, name=f'ConvBlock_{i}')(x)
    x = x.reshape(x.shape[0], -1)
    return nn.Dense(self.way)(nn.relu(nn.Dense(self.hidden)(x)) if self.hidden else x)


class PlainBlock(nn.Module):
  features: int

  @nn.compact
  def __call__(self, x):
    """Maps `[B, H, W, D]` to `[B, H // 2, W // 2, features]`."""
    kernel = self.param('kernel', nn.initializers.glorot_uniform(), (3, 3, x.shape[-1], self.features))
    scale = self.param('scale', nn.initializers.ones, (self.features,))
    bias = self.param('bias', nn.initializers.zeros, (self.features,))
    x = jax.lax.conv_general_dilated(x, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
    x = nn.standardize(x, axis=(0, 1, 2), epsilon=1e-3) * scale + bias
    return nn.relu(nn.max_pool(x, (2, 2), (2, 2)))


def learner(network, **options) -> ms.Learner:
  """Returns a Meta-SGD learner for a network."""
  return ms.meta_sgd(ms.nn.from_linen(network), ms.losses.cross_entropy, alpha=ms.AlphaConfig(ALPHA, ALPHA), **options)


def task_distribution(setting: Setting) -> ms.TaskDistribution:
  """Returns few-shot tasks whose images are noise."""
  shape = setting.sizes[0]
  images = np.random.default_rng(0).integers(0, 256, (CLASSES, INSTANCES, *shape), np.uint8)
  return ms.tasks.few_shot(ms.tasks.class_bank(images), way=setting.way, shot=setting.shot, query=QUERY)


def work(setting: Setting, filters: int | None = None) -> float:
  """Returns the number of FLOPs of the convolutions in a meta-iteration, if they are computed directly.

  A direct 3×3 convolution from D to F channels takes 2·9·D·F FLOPs for each pixel of the output. For the query, a layer
  takes 3 operations of this size: the convolution, and the gradients of its kernel and of its input. For the support, a
  layer takes 9: the same 3, and the derivatives of each of them with respect to its two operands. The first layer needs
  no gradient of its input, and takes 2 operations for the query and 4 for the support.

  Args:
    setting: What is trained.
    filters: Number of filters, by default that of the setting.
  """
  (side, _, channels), known, _ = setting.sizes
  filters, total = filters or known, 0.0
  for i in range(4):
    one_image = side**2 * 2 * 9 * (filters if i else channels) * filters
    total += one_image * setting.way * (QUERY * (3 if i else 2) + setting.shot * (9 if i else 4))
    side //= 2
  return total * setting.tasks


def our_runs(setting: Setting, names) -> dict:
  """Returns the programs of metasgd_jax and of plain JAX whose names are in `names`, as a dict by name."""
  build = functools.partial(ours.Run, tasks=task_distribution(setting), num_tasks=setting.tasks, chunk=20)
  _, filters, hidden = setting.sizes
  net = ms.nn.Conv4(setting.way, filters=filters, hidden=hidden)
  half = ms.nn.Conv4(setting.way, filters=filters, hidden=hidden, dtype=jnp.bfloat16)
  plain = PlainConv4(setting.way, filters, hidden)
  makers = (
    lambda: build(learner(net)),
    lambda: build(learner(net), tasks_at_once='all'),
    lambda: build(learner(net), tasks_at_once=4),
    lambda: build(learner(net, adjoint='hvp'), devices=True),
    lambda: build(learner(net, adjoint='checkpoint'), devices=True),
    lambda: build(learner(half), devices=True),
  )
  known = {
    OURS: lambda: build(learner(net), devices=True),
    **dict(zip(VARIANTS, makers, strict=True)),
    PLAIN: lambda: build(learner(plain), tasks_at_once='all'),
  }
  return {name: make() for name, make in known.items() if name in names}


def matrix_product():
  """Returns the program that measures the roof: an iteration is one product of two SIDE×SIDE float32 matrices."""
  a = jax.random.normal(jax.random.key(0), (SIDE, SIDE))
  product = jax.jit(lambda a, n: jax.lax.fori_loop(0, n, lambda i, b: a @ b * 0.02, a))
  return lambda iterations: jax.block_until_ready(product(a, iterations))
