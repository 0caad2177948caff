"""Meta-training on sine curves: 4 tasks, 5 shots, 10 query points, one step; ours against TorchOpt, in one run.

    python -m benchmarks.sinusoids

TorchOpt's loop is written as its own examples write MAML: a differentiable optimiser inside, its state kept and put
back for each task, Adam outside. It learns θ alone; ours learns α as well. Before anything is timed, both compute the
loss and the meta-gradient of the same tasks from the same weights, and these must be equal.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import torchopt

import metasgd_jax as ms
from benchmarks import timing
from metasgd_jax import writers
from metasgd_jax.losses import mean_squared_error

TASKS, SHOT, QUERY, ALPHA = 4, 5, 10, 0.01
LAYERS = ('Dense_0', 'Dense_1', 'Dense_2')


class OurRun:
  """Meta-training by `metasgd_jax.train`; the state stays where it is between turns."""

  def __init__(self, learner: ms.Learner):
    self.tasks = ms.tasks.sinusoid(shot=SHOT, query=QUERY)
    self.learner, self.optimizer = learner, optax.adam(1e-3)
    self.state = ms.init(jax.random.key(0), self.tasks, learner=learner, optimizer=self.optimizer)

  def __call__(self, iterations: int) -> None:
    done = int(self.state.step)
    self.state = ms.train(
      self.state, self.tasks, learner=self.learner, optimizer=self.optimizer, meta_iterations=done + iterations,
      meta_batch=TASKS, chunk=1000,
    )  # fmt: skip


class TorchOptRun:
  """MAML by TorchOpt, one meta-iteration after the other."""

  def __init__(self, theta) -> None:
    self.net = torch.nn.Sequential(
      torch.nn.Linear(1, 40), torch.nn.ReLU(), torch.nn.Linear(40, 40), torch.nn.ReLU(), torch.nn.Linear(40, 1)
    )
    with torch.no_grad():
      for layer, name in zip(self.net[::2], LAYERS, strict=True):
        layer.weight.copy_(torch.tensor(np.asarray(theta[name]['kernel']).T))
        layer.bias.copy_(torch.tensor(np.asarray(theta[name]['bias'])))
    self.inner = torchopt.MetaSGD(self.net, lr=ALPHA)
    self.outer = torch.optim.Adam(self.net.parameters(), lr=1e-3)

  def draw(self):
    low, high = torch.tensor([0.1, 0.8, 0.0]), torch.tensor([5.0, 1.2, torch.pi])
    amplitude, frequency, phase = low + (high - low) * torch.rand(3)
    x = torch.rand(SHOT + QUERY, 1) * 10 - 5
    y = amplitude * torch.sin(frequency * x + phase)
    return x[:SHOT], y[:SHOT], x[SHOT:], y[SHOT:]

  def loss(self, tasks) -> torch.Tensor:
    losses = []
    net_state = torchopt.extract_state_dict(self.net, by='reference')
    inner_state = torchopt.extract_state_dict(self.inner, by='reference')
    for x, y, query_x, query_y in tasks:
      self.inner.step(torch.nn.functional.mse_loss(self.net(x), y))
      losses.append(torch.nn.functional.mse_loss(self.net(query_x), query_y))
      torchopt.recover_state_dict(self.net, net_state)
      torchopt.recover_state_dict(self.inner, inner_state)
    return torch.stack(losses).mean()

  def __call__(self, iterations: int) -> None:
    for _ in range(iterations):
      self.outer.zero_grad()
      self.loss([self.draw() for _ in range(TASKS)]).backward()
      self.outer.step()


def check_equal(ours: OurRun, theirs: TorchOptRun) -> None:
  """Raises AssertionError unless loss and meta-gradient are equal to rounding."""
  sample_keys, episode_keys = jax.random.split(jax.random.key(1), (2, TASKS))
  episodes = jax.vmap(ours.tasks.episode)(jax.vmap(ours.tasks.sample)(sample_keys), episode_keys)
  keys = jax.random.split(jax.random.key(2), TASKS)
  (loss, _), grads = ms.value_and_grad(ours.learner, ours.state.meta, episodes, keys)
  arrays = [episodes.support.x, episodes.support.y, episodes.query.x, episodes.query.y]
  theirs.outer.zero_grad()
  torch_loss = theirs.loss([[torch.tensor(np.asarray(a[i])) for a in arrays] for i in range(TASKS)])
  torch_loss.backward()
  np.testing.assert_allclose(torch_loss.item(), float(loss), rtol=1e-5)
  for layer, name in zip(theirs.net[::2], LAYERS, strict=True):
    for got, expected in ((layer.weight.grad.T, 'kernel'), (layer.bias.grad, 'bias')):
      np.testing.assert_allclose(got, grads.theta[name][expected], rtol=1e-3, atol=1e-5 * float(jnp.abs(loss)))


def main() -> None:
  """Checks, times and prints."""
  model = ms.nn.from_linen(ms.nn.MLP())
  maml = OurRun(ms.maml(model, mean_squared_error, alpha=ALPHA))
  meta_sgd = OurRun(ms.meta_sgd(model, mean_squared_error))
  theirs = TorchOptRun(maml.state.meta.theta)
  check_equal(maml, theirs)
  print('losses and meta-gradients are equal; timing in turn', flush=True)
  found = timing.rates(
    {
      'metasgd_jax, Meta-SGD': meta_sgd,
      'metasgd_jax, MAML': maml,
      f'TorchOpt {torchopt.__version__}, MAML, 1 thread': functools.partial(_with_threads, theirs, 1),
      f'TorchOpt {torchopt.__version__}, MAML, {torch.get_num_threads()} threads': functools.partial(
        _with_threads, theirs, torch.get_num_threads()
      ),
    }
  )
  print(timing.table(found, 'metasgd_jax, Meta-SGD'))
  about = writers.provenance()
  print(f'\ntorch {torch.__version__}, {about["versions"]}, {about["device"]}')


def _with_threads(run: TorchOptRun, threads: int, iterations: int) -> None:
  torch.set_num_threads(threads)
  run(iterations)


if __name__ == '__main__':
  main()
