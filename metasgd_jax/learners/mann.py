"""Memory-augmented networks (Santoro et al. 2016), which learn a task by reading its items as a sequence."""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from metasgd_jax.learners.episodic import Metrics, episodic, measure
from metasgd_jax.losses import are_classes, cross_entropy, one_hot
from metasgd_jax.types import Batch, Episode, Learner, PyTree, check_count, equal_by_arguments


class Memory(NamedTuple):
  """State of the external memory between two steps.

  Attributes:
    rows: Memory matrix M `[slots, width]`.
    usage: Usage weights w_u `[slots]`.
    weights: Read weights w_r `[heads, slots]` of the last read.
    read: Vector r `[heads * width]` that the last read returned.
  """

  rows: jax.Array
  usage: jax.Array
  weights: jax.Array
  read: jax.Array


def access(memory: Memory, keys: jax.Array, gates: jax.Array, decay: float = 0.99) -> Memory:
  """Returns the memory after one write and one read (Santoro et al. 2016, equations 2 to 8).

  A slot is a row of the memory matrix M. The keys are written to the slots that were read in the previous step, and to
  the slots that are used least. The weights of this write are w_w. For n heads, w_lu is 1 at the n least used slots and
  0 elsewhere. `Memory` defines w_r, w_u and r. One step computes:

      w_w ← σ(gate) w_r(t−1) + (1 − σ(gate)) w_lu(t−1);  the least used slot is zeroed;  M ← M + Σ_heads w_w ⊗ key
      w_r ← softmax_i(cos(key, M_i));  r ← Σ_i w_r(i) M_i;  w_u ← decay · w_u + Σ_heads (w_r + w_w)

  Args:
    memory: Memory after the previous step.
    keys: Keys `[heads, width]`, which are both written and compared with the slots.
    gates: Write gates `[heads]`, before the sigmoid.
    decay: Decay of the usage weights per step.
  """
  heads, slots = memory.weights.shape
  _, least = jax.lax.top_k(-memory.usage, heads)  # Sorted: least[0] is the least used slot.
  least_used = jnp.sum(jax.nn.one_hot(least, slots), 0)  # [slots]
  gates = jax.nn.sigmoid(gates)[:, None]
  write = gates * memory.weights + (1 - gates) * least_used[None]  # [heads, slots]
  rows = memory.rows * (1 - jax.nn.one_hot(least[0], slots))[:, None] + write.T @ keys
  unit_keys, unit_rows = (v * jax.lax.rsqrt(jnp.sum(jnp.square(v), -1, keepdims=True) + 1e-8) for v in (keys, rows))
  weights = jax.nn.softmax(unit_keys @ unit_rows.T)
  usage = decay * memory.usage + jnp.sum(weights + write, 0)
  return Memory(rows, usage, weights, (weights @ rows).ravel())


class PlainCell(nn.Module):
  """An LSTM and a dense layer, the baseline without an external memory (Santoro et al., section 4.1).

  Attributes:
    way: Number N of ways (classes of a task).
    units: Number of units of the LSTM.

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
    """Returns the initial state of the LSTM: its cell state and its output, both zero."""
    return jnp.zeros(self.units), jnp.zeros(self.units)

  @nn.compact
  def __call__(self, state, inputs):
    """Reads one item: maps the state and the inputs `[D]` of the item to the next state and the logits `[N]`."""
    state, out = nn.OptimizedLSTMCell(self.units)(state, inputs)
    return state, nn.Dense(self.way)(out)


class MemoryCell(nn.Module):
  """An LSTM controller with an external memory (Santoro et al. 2016, section 3).

  The controller receives the current item and the vector that the previous step read from the memory. For each head,
  dense layers compute a key, with entries in [−1, 1], and a gate. Their input is the controller's output. The
  classifier receives the controller's output and the vector that the current step reads.

  Attributes:
    way: Number N of ways (classes of a task).
    units: Number of units of the controller.
    slots: Number of rows of the memory.
    width: Number of entries of each row.
    heads: Number n of read heads. A step writes to the rows that the previous step read and to the n least used rows.
      The gates divide the writing between them.
    decay: Decay γ of the usage weights per step.

  Example:
    >>> cell = ms.learners.MemoryCell(way=3, units=8, slots=6, width=5, heads=2)
    >>> state, inputs = cell.start(), jnp.zeros(4 + 3)  # An item of 4 numbers, and the previous label, one-hot.
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
    """Returns the initial state (controller, memory). The memory's rows are filled with 1e-6, and all else is 0."""
    rows, weights = jnp.full((self.slots, self.width), 1e-6), jnp.zeros((self.heads, self.slots))
    memory = Memory(rows, jnp.zeros(self.slots), weights, jnp.zeros(self.heads * self.width))
    return (jnp.zeros(self.units), jnp.zeros(self.units)), memory

  @nn.compact
  def __call__(self, state, inputs):
    """Reads one item: maps the state and the inputs `[D]` of the item to the next state and the logits `[N]`."""
    controller, memory = state
    controller, out = nn.OptimizedLSTMCell(self.units)(controller, jnp.concatenate([inputs, memory.read]))
    keys = jnp.tanh(nn.Dense(self.heads * self.width, name='keys')(out)).reshape(self.heads, self.width)
    memory = access(memory, keys, nn.Dense(self.heads, name='gates')(out), self.decay)
    return (controller, memory), nn.Dense(self.way)(jnp.concatenate([out, memory.read]))


class Remembered(NamedTuple):
  """State after the support: the parameters, the state of the cell, and the one-hot label `[N]` of the last item."""

  params: PyTree
  state: PyTree
  label: jax.Array


@equal_by_arguments
def mann(*, way: int, cell: Any = None, size: int | None = 20, metrics: Metrics = None) -> Learner:
  """Builds a learner that reads an episode as a sequence. Each step receives an item and the previous item's label.

  `loss` arranges all items of the episode, support and query together, in random order. It returns the mean
  cross-entropy of the predictions at all items, where each item is predicted before its label is shown. With 5 ways,
  1 shot and 9 query items per class, the sequences have 50 items, as in the paper. The info contains the accuracy at
  the n-th item of a class as `instance_n`, starting with `instance_1`. The label of a class's first item can only be
  guessed among the labels that were not seen before, so with 5 ways the expected `instance_1` is at most 46%.

  `adapt` reads the support in the given order. `predict` predicts each query item separately, as the item that follows
  the support. `meta` contains the parameters of the cell.

  Args:
    way: Number N of ways (classes of a task).
    cell: Linen module that reads one item at a time. `cell.start()` returns the state before the first item, and
      `cell(state, inputs [D])` returns the next state and logits `[N]`. The default is `MemoryCell(way)`.
    size: Height and width in pixels to which images are scaled; the paper uses 20. With `None` the inputs are not
      scaled.
    metrics: Metrics of all items of the sequence; see `meta_sgd`.

  Raises:
    ValueError: if `way` is not an integer of at least 2, if `size` is not an integer of at least 1, or if a metric is
      named 'loss'. The learner's functions raise ValueError if the inputs are not one array, or not images although
      `size` is set, and `loss` raises ValueError if the key is `None`.

  Example:
    >>> learner = ms.learners.mann(way=3, size=None)
    >>> support = ms.Batch(jnp.arange(6.0).reshape(6, 1), jnp.array([0, 0, 1, 1, 2, 2]))  # 3 ways, 2 shots.
    >>> meta = jax.jit(learner.init)(jax.random.key(0), ms.Episode(support, support))
    >>> adapted = jax.jit(learner.adapt)(meta, support, jax.random.key(1))
    >>> jax.jit(learner.predict)(adapted, jnp.zeros((4, 1))).shape
    (4, 3)
  """
  check_count('way', way, 2)
  if size is not None:
    check_count('size', size)
  measured = dict(metrics or {})
  cell = MemoryCell(way) if cell is None else cell

  def flat(x):
    if not isinstance(x, jax.Array | np.ndarray):
      raise ValueError(f'`x` of a batch must be one array [B, …], got {type(x).__name__}; concatenate its arrays')
    if size is not None:
      if x.ndim != 4:
        raise ValueError(
          f'size={size} scales images [B, H, W, D], got inputs of shape {x.shape}; set size=None for other inputs'
        )
      x = jax.image.resize(x, (x.shape[0], size, size, x.shape[3]), 'linear')
    return x.reshape(x.shape[0], -1)

  def init(key, episode: Episode) -> PyTree:
    inputs = flat(episode.support.x)[0]
    return cell.init(key, cell.start(), jnp.concatenate([inputs, jnp.zeros(way)]))['params']

  def run(params, x, labels):
    """Returns the state after the last item, and the logits at each item, `[L, N]`."""
    labels = one_hot(labels, way)
    before = jnp.concatenate([jnp.zeros((1, way)), labels[:-1]])
    inputs = jnp.concatenate([flat(x), before], 1)
    state, logits = jax.lax.scan(functools.partial(cell.apply, {'params': params}), cell.start(), inputs)
    return Remembered(params, state, labels[-1]), logits

  def adapt(meta, support: Batch) -> Remembered:
    return run(meta, support.x, support.y)[0]

  def predict(adapted: Remembered, x):
    def logits(item):
      inputs = jnp.concatenate([item, adapted.label])
      return cell.apply({'params': adapted.params}, adapted.state, inputs)[1]

    return jax.vmap(logits)(flat(x))

  def loss(meta, episode: Episode, key):
    if key is None:
      raise ValueError('`loss` needs a key for the random order of the sequence, got None; pass jax.random.key(seed)')
    x, y = (jnp.concatenate(parts) for parts in zip(*episode, strict=True))
    order = jax.random.permutation(key, y.shape[0])
    x, y = x[order], y[order]
    _, logits = run(meta, x, y)
    info = measure(measured, logits, y)
    valid = jnp.all(are_classes(y, way))
    by_instance = accuracy_by_instance(logits, y, way)
    by_instance = jnp.where(valid, by_instance, jnp.full_like(by_instance, jnp.nan))
    info |= {f'instance_{n + 1}': value for n, value in enumerate(by_instance)}
    return cross_entropy(logits, y), info

  return episodic(init, adapt, predict, loss_fn=cross_entropy, metrics=metrics)._replace(loss=loss)


def accuracy_by_instance(logits: jax.Array, labels: jax.Array, way: int) -> jax.Array:
  """Returns the accuracies `[L / N]`: at the first item of each class, at the second item of each class, and so on.

  Args:
    logits: Logits `[L, N]`, in the order in which the items were seen.
    labels: Labels `[L]`, in which all classes have the same number of items.
    way: Number N of ways (classes of a task).
  """
  seen = jnp.cumsum(jax.nn.one_hot(labels, way, dtype=jnp.int32), 0)
  nth = jnp.take_along_axis(seen, labels[:, None], 1)[:, 0] - 1  # [L]
  right = (jnp.argmax(logits, -1) == labels).astype(logits.dtype)
  return jnp.zeros(labels.shape[0] // way, logits.dtype).at[nth].add(right) / way
