"""Peers: meta-training programs with PyTorch libraries, for the same networks, weights and tasks as metasgd_jax.

A peer is built from a network, its parameters, α, and tasks `(x, y, query_x, query_y)` with the leading axis T. It has
a method for its loss and meta-gradient, and `peer(n)` takes n meta-iterations with Adam. `Loop` and `Func` are Meta-SGD
with one rate per parameter entry. `TorchOpt` and `Higher` are MAML with one rate for all parameters, as in the examples
of the two libraries.
"""

import functools
from collections.abc import Callable

import higher
import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
import torchopt
from torch import nn


def mlp() -> nn.Module:
  """Returns the network for regression, 1-40-40-1."""
  return nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))


def mlp_apply(p, x):
  """Returns the outputs of `mlp` for the list p of its parameters."""
  x = F.relu(F.linear(x, p[0], p[1]))
  x = F.relu(F.linear(x, p[2], p[3]))
  return F.linear(x, p[4], p[5])


class ChannelsLast(nn.Module):
  """Flattens images `[B, D, H, W]` to `[B, H·W·D]`, in the order of metasgd_jax."""

  def forward(self, x):
    return x.permute(0, 2, 3, 1).flatten(1)


def conv4(way: int, shape: tuple[int, int, int], filters: int, hidden: int) -> nn.Module:
  """Returns the classifier of the paper, with max-pooling before ReLU as in `ms.nn.Conv4`."""
  (height, width, channels), layers = shape, []
  for i in range(4):
    layers += [
      nn.Conv2d(filters if i else channels, filters, 3, padding=1, bias=False),
      nn.BatchNorm2d(filters, eps=1e-3, track_running_stats=False),
      nn.MaxPool2d(2),
      nn.ReLU(),
    ]
  features = filters * (height // 16) * (width // 16)
  middle = [nn.Linear(features, hidden), nn.ReLU()] if hidden else []
  return nn.Sequential(*layers, ChannelsLast(), *middle, nn.Linear(hidden or features, way))


def conv4_apply(p, x):
  """Returns the outputs of `conv4` for the list p of its parameters."""
  for i in range(0, 12, 3):
    x = F.batch_norm(F.conv2d(x, p[i], padding=1), None, None, p[i + 1], p[i + 2], True, eps=1e-3)
    x = F.relu(F.max_pool2d(x, 2))
  x = x.permute(0, 2, 3, 1).flatten(1)
  if len(p) > 14:
    x = F.relu(F.linear(x, p[12], p[13]))
  return F.linear(x, p[-2], p[-1])


def in_torchs_order(theta) -> list[np.ndarray]:
  """Returns the θ of metasgd_jax, or a gradient with θ's structure, as a list in the order of the networks above."""
  out = []
  for name in sorted(theta):
    leaf = theta[name]
    if 'scale' in leaf:
      out += [np.transpose(leaf['kernel'], (3, 2, 0, 1)), leaf['scale'], leaf['bias']]
    else:
      out += [np.transpose(leaf['kernel']), leaf['bias']]
  return [np.array(a) for a in out]


class Loop:
  """Meta-SGD with torch.autograd.grad, one task after another. The meta-gradients are summed as they are computed."""

  learns_alpha = True
  draw: Callable[[], list] | None = None  # Returns new tasks for a meta-iteration. If None, the tasks stay.

  def __init__(self, net, apply, loss_fn, theta, alpha, tasks) -> None:
    del net
    self.apply, self.loss_fn, self.tasks = apply, loss_fn, tasks
    self.theta = [torch.tensor(t, requires_grad=True) for t in theta]
    self.alpha = [torch.full_like(t, alpha, requires_grad=True) for t in self.theta]
    self.outer = torch.optim.Adam(self.theta + self.alpha, lr=1e-3)

  def task_loss(self, theta, alpha, x, y, query_x, query_y):
    grads = torch.autograd.grad(self.loss_fn(self.apply(theta, x), y), theta, create_graph=True)
    adapted = [t - a * g for t, a, g in zip(theta, alpha, grads, strict=True)]
    return self.loss_fn(self.apply(adapted, query_x), query_y)

  def backward(self) -> float:
    self.outer.zero_grad()
    total, count = 0.0, len(self.tasks[0])
    for task in zip(*self.tasks, strict=True):
      loss = self.task_loss(self.theta, self.alpha, *task) / count
      loss.backward()
      total += loss.item()
    return total

  def meta_gradient(self) -> tuple[float, list[np.ndarray]]:
    loss = self.backward()
    return loss, [p.grad.numpy() for p in self.theta + self.alpha]

  def __call__(self, iterations: int) -> None:
    for _ in range(iterations):
      self.tasks = self.draw() if self.draw else self.tasks
      self.backward()
      self.outer.step()


class Func(Loop):
  """Meta-SGD with torch.func: the gradient of a task's loss is vmapped over tasks, and compiled if `compiled`."""

  def __init__(self, *args, compiled: bool = False) -> None:
    super().__init__(*args)

    def task_loss(params, x, y, query_x, query_y):
      theta, alpha = params
      grads = torch.func.grad(lambda t: self.loss_fn(self.apply(t, x), y))(theta)
      adapted = [t - a * g for t, a, g in zip(theta, alpha, grads, strict=True)]
      return self.loss_fn(self.apply(adapted, query_x), query_y)

    over_tasks = torch.func.vmap(torch.func.grad_and_value(task_loss), in_dims=(None, 0, 0, 0, 0))

    def mean(params, *tasks):
      grads, losses = over_tasks(params, *tasks)
      return [[g.mean(0) for g in part] for part in grads], losses.mean()

    self.mean = torch.compile(mean) if compiled else mean

  def backward(self) -> float:
    grads, loss = self.mean(([t.detach() for t in self.theta], [a.detach() for a in self.alpha]), *self.tasks)
    for p, g in zip(self.theta + self.alpha, grads[0] + grads[1], strict=True):
      p.grad = g
    return loss.item()


class _OfModule(Loop):
  learns_alpha = False

  def __init__(self, net, apply, loss_fn, theta, alpha, tasks) -> None:
    super().__init__(net, apply, loss_fn, theta, alpha, tasks)
    self.net = net.to(self.theta[0].dtype)
    with torch.no_grad():
      for parameter, value in zip(net.parameters(), theta, strict=True):
        parameter.copy_(torch.tensor(value))
    self.rate, self.theta, self.alpha = alpha, list(net.parameters()), []
    self.outer = torch.optim.Adam(self.theta, lr=1e-3)


class TorchOpt(_OfModule):
  """MAML with TorchOpt's differentiable SGD, whose state is saved and then restored after each task."""

  def __init__(self, *args) -> None:
    super().__init__(*args)
    self.inner = torchopt.MetaSGD(self.net, lr=self.rate)

  def backward(self) -> float:
    self.outer.zero_grad()
    total, count = 0.0, len(self.tasks[0])
    net_state = torchopt.extract_state_dict(self.net, by='reference')
    inner_state = torchopt.extract_state_dict(self.inner, by='reference')
    for x, y, query_x, query_y in zip(*self.tasks, strict=True):
      self.inner.step(self.loss_fn(self.net(x), y))
      loss = self.loss_fn(self.net(query_x), query_y) / count
      loss.backward()
      total += loss.item()
      torchopt.recover_state_dict(self.net, net_state)
      torchopt.recover_state_dict(self.inner, inner_state)
    return total


class Higher(_OfModule):
  """MAML with the patched module and the differentiable SGD of the library higher."""

  def backward(self) -> float:
    self.outer.zero_grad()
    total, count = 0.0, len(self.tasks[0])
    inner = torch.optim.SGD(self.net.parameters(), lr=self.rate)
    for x, y, query_x, query_y in zip(*self.tasks, strict=True):
      with higher.innerloop_ctx(self.net, inner, copy_initial_weights=False) as (net, steps):
        steps.step(self.loss_fn(net(x), y))
        loss = self.loss_fn(net(query_x), query_y) / count
        loss.backward()
        total += loss.item()
    return total


# All peers except torch.compile, whose compilation of a vmapped convolution did not end.
ON_CONV4 = ('torch, autograd loop', 'torch.func', 'TorchOpt, MAML', 'higher, MAML')
PEERS: dict[str, Callable[..., Loop]] = {
  'torch, autograd loop': Loop,
  'torch.func': Func,
  'torch.func, torch.compile': functools.partial(Func, compiled=True),
  'TorchOpt, MAML': TorchOpt,
  'higher, MAML': Higher,
}


def of_conv4(way: int, sizes, theta, alpha: float, episodes, names=None, dtype=torch.float32) -> dict[str, Loop]:
  """Returns peers on Conv4, as a dict by name.

  Args:
    way: Number of classes, N.
    sizes: Shape of an image, filters and hidden units, as `Setting.sizes`.
    theta: Arrays of θ from `in_torchs_order`.
    alpha: Initial rate of the inner step.
    episodes: Episodes `[T, …]` of NumPy arrays.
    names: Names of the peers to return. By default they are `ON_CONV4`.
    dtype: Data type of the parameters and images.
  """
  images = lambda a: torch.tensor(np.array(a), dtype=dtype).permute(0, 1, 4, 2, 3).contiguous()
  labels = lambda a: torch.tensor(np.array(a)).long()
  arrays = [f(a) for part in episodes for f, a in zip((images, labels), part, strict=True)]
  theta = [torch.tensor(np.array(t), dtype=dtype).numpy() for t in theta]
  return {
    name: build(conv4(way, *sizes), conv4_apply, F.cross_entropy, theta, alpha, arrays)
    for name, build in PEERS.items()
    if name in (ON_CONV4 if names is None else names)
  }


def check_equal(peer: Loop, loss: float, theta, alpha) -> None:
  """Raises AssertionError unless the peer, in float64, has the given loss and meta-gradient (theta, alpha)."""
  their_loss, their_grads = peer.meta_gradient()
  np.testing.assert_allclose(their_loss, loss, rtol=1e-6)
  ours = in_torchs_order(theta) + (in_torchs_order(alpha) if peer.learns_alpha else [])
  flat = lambda arrays: np.concatenate([np.ravel(a) for a in arrays])
  error = np.linalg.norm(flat(their_grads) - flat(ours)) / np.linalg.norm(flat(ours))
  assert error < 1e-6, f'the meta-gradient of {type(peer).__name__} differs by a relative error of {error:.1e}'
