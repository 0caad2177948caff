"""The data that passes between the parts, and the letters used for its shapes.

Shape letters, the same in every docstring:
  T tasks in a meta-batch    S support items of a task    Q query items of a task
  N ways (classes)           K shots (support items per class; for regression, S = K)
  C classes in a bank        I drawings (images) of a class
  R training runs side by side (one per seed)             k inner steps
  H, W, D image height, width, channels
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
from jax.tree_util import Partial

PyTree = Any

Adapts = Callable[[str], bool]
"""Whether a leaf of θ adapts, by its name, such as 'Dense_0.kernel'."""


class Batch(NamedTuple):
  """Inputs and targets of one task: `x [S, …]`, `y [S, …]`."""

  x: Any
  y: Any


class Episode(NamedTuple):
  """One task's data: `support` to adapt on, `query` to be judged on."""

  support: Any
  query: Any


class MetaParams(NamedTuple):
  """What Meta-SGD learns: θ, the initialisation, and α, a rate and direction for each of its entries.

  Attributes:
    theta: any pytree of floating-point arrays.
    alpha: a pytree of θ's structure or a prefix of it; `None` where α is held still and so not learned, and for a leaf
      of θ that does not adapt.
  """

  theta: PyTree
  alpha: PyTree


class Model(NamedTuple):
  """A network as two pure functions.

  Attributes:
    init: `(key, x [B, …]) → θ`; consumes key.
    apply: `(θ, x [B, …]) → outputs [B, …]`; where there are statistics also `(θ, x, statistics)`, with which no output
      depends on the other items of x.
    statistics: `(θ, x [B, …]) →` batch norm's means and variances over x, a pytree; `None` for a network without.
    adapts: which leaves of θ an inner loop moves, by their names; all of them where it is `None`. The rest is
      meta-learned and shared by all tasks; see `partly` and `low_rank`.
  """

  init: Callable[[chex.PRNGKey, Any], PyTree]
  apply: Callable[..., Any]
  statistics: Callable[[PyTree, Any], PyTree] | None = None
  adapts: Adapts | None = None


class Learner(NamedTuple):
  """A few-shot learner as pure functions of one task; callers batch them with `jax.vmap`.

  Attributes:
    init: `(key, episode) → meta`, any pytree; the episode gives shapes only; consumes key.
    adapt: `(meta, support, key) → adapted`; consumes key where the learner is stochastic.
    path: `(meta, support, key) → adapted` after 0, 1, …, k steps, stacked on a leading axis `[k + 1]`.
    predict: `(adapted, x [Q, …]) → outputs [Q, …]`.
    loss: `(meta, episode, key) → (scalar, info)`; what the outer optimiser lowers, and a dict of scalars.
  """

  init: Callable[[chex.PRNGKey, Episode], PyTree]
  adapt: Callable[[PyTree, Any, chex.PRNGKey], PyTree]
  path: Callable[[PyTree, Any, chex.PRNGKey], PyTree]
  predict: Callable[[PyTree, Any], Any]
  loss: Callable[[PyTree, Episode, chex.PRNGKey], tuple[chex.Array, dict[str, chex.Array]]]


class TaskDistribution(NamedTuple):
  """Tasks as data, drawn on the device.

  Both functions run inside jit, traced once: all randomness must come from the key, since NumPy's would be a constant.
  One that holds arrays should be a `jax.tree_util.Partial(function, array)`: the arrays are then arguments of the
  compiled program; in a closure they would be constants copied into it.

  Attributes:
    sample: `key → task`, a pytree; consumes key.
    episode: `(task, key) → Episode`, a draw of the task's support and query; consumes key.
  """

  sample: Callable[[chex.PRNGKey], PyTree]
  episode: Callable[[PyTree, chex.PRNGKey], Episode]

  def as_arguments(self) -> 'TaskDistribution':
    """Returns the same as a pytree that a jitted function takes; arrays in closures stay constants."""
    return TaskDistribution(*(f if isinstance(f, Partial) else Partial(f) for f in self))


class TaskStream(NamedTuple):
  """Tasks whose data stay on the host and are sent to the device for a chunk of meta-iterations at a time.

  Attributes:
    send: `(sample keys [B], episode keys [B]) → TaskDistribution` that gives the tasks and episodes of these pairs of
      keys, and of no others. Called from a thread of its own, while the device works on the chunk before.
  """

  send: Callable[[chex.PRNGKey, chex.PRNGKey], TaskDistribution]
