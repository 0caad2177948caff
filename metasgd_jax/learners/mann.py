"""Memory-augmented networks (Santoro et al. 2016): the task is a sequence, and learning it is remembering."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from metasgd_jax.learners.episodic import Metric, check_metrics, check_way, measure
from metasgd_jax.losses import cross_entropy
from metasgd_jax.types import Batch, Episode, Learner, PyTree


class Memory(NamedTuple):
  """The external memory between two steps.

  Attributes:
    rows: M `[slots, width]`.
    usage: w_u `[slots]`.
    weights: w_r `[heads, slots]`, of the last read.
    read: r `[heads * width]`, what was read.
  """

  rows: chex.Array
  usage: chex.Array
  weights: chex.Array
  read: chex.Array


def access(memory: Memory, keys: chex.Array, gates: chex.Array, decay: float = 0.99) -> Memory:
  """Writes the keys where memory was last read or is least used, then reads it (Santoro et al., equations 2 to 8).

  With n heads and w_lu = 1 at the n least used slots, 0 elsewhere:

      w_w ← σ(gate) w_r(t−1) + (1 − σ(gate)) w_lu(t−1);  the least used row is zeroed;  M ← M + Σ_heads w_w ⊗ key
      w_r ← softmax_i(cos(key, M_i));  r ← Σ_i w_r(i) M_i;  w_u ← decay · w_u + Σ_heads (w_r + w_w)

  Args:
    memory: after the step before.
    keys: `[heads, width]`.
    gates: `[heads]`.
    decay: of the usage.
  """
  heads, slots = memory.weights.shape
  _, least = jax.lax.top_k(-memory.usage, heads)  # The least used first.
  least_used = jnp.sum(jax.nn.one_hot(least, slots), 0)  # [slots]
  gates = jax.nn.sigmoid(gates)[:, None]
  write = gates * memory.weights + (1 - gates) * least_used[None]  # [heads, slots]
  rows = memory.rows * (1 - jax.nn.one_hot(least[0], slots))[:, None] + write.T @ keys
  unit = lambda v: v * jax.lax.rsqrt(jnp.sum(jnp.square(v), -1, keepdims=True) + 1e-8)
  weights = jax.nn.softmax(unit(keys) @ unit(rows).T)
  usage = decay * memory.usage + jnp.sum(weights + write, 0)
  return Memory(rows, usage, weights, (weights @ rows).ravel())


class SequenceCell(Protocol):
  """A network that sees one item at a time: a Linen module."""

  def start(self) -> PyTree:
    """Returns the state before the first item."""

  def __call__(self, state: PyTree, inputs: chex.Array) -> tuple[PyTree, chex.Array]:
    """Takes inputs `[D]` and returns the next state and logits `[N]`."""


class PlainCell(nn.Module):
  """An LSTM and a dense layer: what the memory is compared with (Santoro et al., section 4.1).

  Attributes:
    way: N.
    units: of the LSTM.

  Example:
    >>> learner = ms.learners.mann(way=3, cell=ms.learners.PlainCell(way=3, units=8), size=None)
    >>> support = ms.Batch(jnp.zeros((6, 4)), jnp.array([0, 0, 1, 1, 2, 2]))
    >>> meta = jax.jit(learner.init)(jax.random.key(0), ms.Episode(support, support))
    >>> sorted(meta)
    ['Dense_0', 'OptimizedLSTMCell_0']
  """

  way: int
  units: int = 200

  def start(self):
    """Returns the LSTM's cell and output, zero."""
    return jnp.zeros(self.units), jnp.zeros(self.units)

  @nn.compact
  def __call__(self, state, inputs):
    """One step."""
    state, out = nn.OptimizedLSTMCell(self.units)(state, inputs)
    return state, nn.Dense(self.way)(out)


class MemoryCell(nn.Module):
  """An LSTM controller with an external memory (Santoro et al. 2016, section 3).

  The controller's inputs are the item and what was read before; from its output come a key in [−1, 1] and a gate for
  each head. The classifier sees the output and what is read now.

  Attributes:
    way: N.
    units: of the controller.
    slots: rows of the memory.
    width: of a row.
    heads: reads a step; the n least used slots are written.
    decay: γ, of the usage.

  Example:
    >>> cell = ms.learners.MemoryCell(way=3, units=8, slots=6, width=5, heads=2)
    >>> state, inputs = cell.start(), jnp.zeros(4 + 3)  # An item of 4 numbers, and the label before it, one-hot.
    >>> variables = jax.jit(cell.init)(jax.random.key(0), state, inputs)
    >>> (controller, memory), logits = jax.jit(cell.apply)(variables, state, inputs)
    >>> memory.rows.shape, logits.shape
    ((6, 5), (3,))
  """

  way: int
  units: int = 200
  slots: int = 128
  width: int = 40
  heads: int = 4
  decay: float = 0.99

  def start(self):
    """Returns the controller's state, zero, and a memory of 1e-6 of which nothing is used."""
    heads, slots = self.heads, self.slots
    memory = Memory(
      jnp.full((slots, self.width), 1e-6),
      jnp.zeros(slots),
      jnp.zeros((heads, slots)),
      jnp.zeros(heads * self.width),
    )
    return (jnp.zeros(self.units), jnp.zeros(self.units)), memory

  @nn.compact
  def __call__(self, state, inputs):
    """One step."""
    controller, memory = state
    controller, out = nn.OptimizedLSTMCell(self.units)(controller, jnp.concatenate([inputs, memory.read]))
    keys = jnp.tanh(nn.Dense(self.heads * self.width, name='keys')(out)).reshape(self.heads, self.width)
    memory = access(memory, keys, nn.Dense(self.heads, name='gates')(out), self.decay)
    return (controller, memory), nn.Dense(self.way)(jnp.concatenate([out, memory.read]))


class Remembered(NamedTuple):
  """The state after the support: the parameters, the cell's state, and the last item's label, one-hot `[N]`."""

  params: PyTree
  state: PyTree
  label: chex.Array


def mann(*, way: int, cell: Any = None, size: int | None = 20, metrics: Mapping[str, Metric] | None = None) -> Learner:
  """Builds the learner of sequences: at each step it sees an item and the label of the one before.

  loss: the episode's items, support and query together, in random order; the mean cross-entropy of the answers at all
  of them, which are asked before the label is shown. With 5 ways, 1 shot and 9 query items these are the paper's
  sequences of 50. info has the accuracy at the n-th item of its class, `instance_1` onwards; at the first it can
  only be a guess, among the labels not seen yet: 46% right at best with 5 ways.

  adapt: reads the support in its order; predict: each query item is the one that follows. `meta` is the cell's
  parameters.

  Args:
    way: N.
    cell: a Linen module after `SequenceCell`; `MemoryCell(way)` where left out.
    size: images are scaled to size×size, the paper's 20; `None` leaves inputs as they are.
    metrics: as in `meta_sgd`; over all items of the sequence.

  Raises:
    ValueError: a way below 2 or a metric named 'loss'. From `loss`: a key that is `None`.

  Example:
    >>> learner = ms.learners.mann(way=3, size=None)
    >>> support = ms.Batch(jnp.arange(6.0).reshape(6, 1), jnp.array([0, 0, 1, 1, 2, 2]))  # 3 ways, 2 shots.
    >>> meta = jax.jit(learner.init)(jax.random.key(0), ms.Episode(support, support))
    >>> adapted = jax.jit(learner.adapt)(meta, support, jax.random.key(1))
    >>> jax.jit(learner.predict)(adapted, jnp.zeros((4, 1))).shape
    (4, 3)
  """
  check_way(way)
  metrics = check_metrics(metrics)
  cell = MemoryCell(way) if cell is None else cell

  def flat(x):
    if size is not None:
      x = jax.image.resize(x, (x.shape[0], size, size, x.shape[3]), 'linear')
    return x.reshape(x.shape[0], -1)

  def init(key, episode: Episode) -> PyTree:
    inputs = flat(episode.support.x)[0]
    return cell.init(key, cell.start(), jnp.concatenate([inputs, jnp.zeros(way)]))['params']

  def step(params, state, inputs):
    return cell.apply({'params': params}, state, inputs)

  def run(params, x, labels):
    """The final state, and the logits at each item `[L, N]`."""
    labels = jax.nn.one_hot(labels, way)
    before = jnp.concatenate([jnp.zeros((1, way)), labels[:-1]])
    inputs = jnp.concatenate([flat(x), before], 1)
    state, logits = jax.lax.scan(lambda s, i: step(params, s, i), cell.start(), inputs)
    return Remembered(params, state, labels[-1]), logits

  def adapt(meta, support: Batch, key=None) -> Remembered:
    del key  # Nothing here is random.
    return run(meta, support.x, support.y)[0]

  def path(meta, support: Batch, key=None):
    del key
    return jax.tree.map(lambda a: a[None], adapt(meta, support))

  def predict(adapted: Remembered, x):
    ask = lambda item: step(adapted.params, adapted.state, jnp.concatenate([item, adapted.label]))[1]
    return jax.vmap(ask)(flat(x))

  def loss(meta, episode: Episode, key):
    if key is None:
      raise ValueError('the order of the sequence is random: loss needs a key, got None')
    x, y = (jnp.concatenate(parts) for parts in zip(*episode, strict=True))
    order = jax.random.permutation(key, y.shape[0])
    x, y = x[order], y[order]
    _, logits = run(meta, x, y)
    info = measure(metrics, logits, y)
    per_instance = accuracy_by_instance(logits, y, way)
    info |= {f'instance_{n + 1}': value for n, value in enumerate(per_instance)}
    return cross_entropy(logits, y), info

  return Learner(init, adapt, path, predict, loss)


def accuracy_by_instance(logits: chex.Array, labels: chex.Array, way: int) -> chex.Array:
  """Returns the accuracy at the first item of each class, at the second, and so on, `[L / N]`.

  Args:
    logits: `[L, N]`, in the order that items were seen.
    labels: `[L]`, as many of each class.
    way: N.
  """
  seen = jnp.cumsum(jax.nn.one_hot(labels, way, dtype=jnp.int32), 0)
  nth = jnp.take_along_axis(seen, labels[:, None], 1)[:, 0] - 1  # [L]
  right = (jnp.argmax(logits, -1) == labels).astype(logits.dtype)
  return jnp.zeros(labels.shape[0] // way, logits.dtype).at[nth].add(right) / way
