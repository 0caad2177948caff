"""The data types that the modules share, and the letters that stand for sizes in shapes.

Docstrings use these letters, unless they define a letter themselves:

- T: tasks in a meta-batch.
- N: ways (classes of a task).
- K: shots (support items per class; for regression, S = K).
- S: support items of a task.
- Q: query items of a task.
- k: inner steps.
- C: classes in a bank.
- I: drawings (images) of a class.
- H, W, D: image height, width and channels. In `[B, D]`, D is the number of features of an item.
- B: items of any batch.
- R: training runs side by side (one per seed).
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Hashable
from typing import Any, ClassVar, NamedTuple, ParamSpec, TypeVar, get_args

import chex
import jax
import numpy as np
from jax.tree_util import Partial

PyTree = Any

Keys = tuple[chex.PRNGKey, chex.PRNGKey]

Adapts = Callable[[str], bool]
"""Function from the name of a leaf of θ, such as 'Dense_0.kernel', to whether the leaf adapts in the inner loop."""


class Batch(NamedTuple):
  """Inputs and targets of one task: `x [S, …]`, `y [S, …]`.

  Example:
    >>> batch = ms.Batch(x=jnp.zeros((5, 3)), y=jnp.zeros((5, 1)))
    >>> batch.x.shape
    (5, 3)
  """

  x: Any
  y: Any


class Episode(NamedTuple):
  """Data of one task: the `support`, to which a learner adapts, and the `query`, on which it is evaluated.

  Example:
    >>> episode = ms.Episode(ms.Batch(jnp.zeros(5), jnp.zeros(5)), ms.Batch(jnp.zeros(10), jnp.zeros(10)))
    >>> episode.query.x.shape
    (10,)
  """

  support: Any
  query: Any


class MetaParams(NamedTuple):
  """Meta-parameters of Meta-SGD: the initialisation θ, and the rates α, which scale and direct the update of θ.

  Attributes:
    theta: Initialisation θ, any pytree of floating-point arrays.
    alpha: Rates, a pytree with θ's structure or a prefix of that structure. The entry of a leaf of θ that does not
      adapt is `None`. If the rates are fixed and not learned, `alpha` itself is `None`.

  Example:
    >>> meta = ms.MetaParams(theta={'w': jnp.ones(2)}, alpha={'w': jnp.full(2, 0.1)})
    >>> len(jax.tree.leaves(meta))  # MetaParams is a pytree, so an optax optimiser updates θ and α together.
    2
  """

  theta: PyTree
  alpha: PyTree


class Model(NamedTuple):
  """A network as pure functions.

  Attributes:
    init: Function `(key, x [B, …]) → θ`; consumes key.
    apply: Function `(θ, x [B, …]) → outputs [B, …]`. If the model has `statistics`, it can also be called as `(θ, x,
      statistics)`, and an output then does not depend on the other items of x.
    statistics: Function `(θ, x [B, …]) → pytree`, which returns the means and variances of batch norm over x. It is
      `None` if the model does not offer them, such as a model from `nn.from_equinox` or `nn.from_nnx`.
    adapts: Function from the name of a leaf of θ to whether the leaf adapts in an inner loop. If it is `None`, all
      leaves adapt. A leaf that does not adapt is still meta-learned, and is the same for all tasks; see `adapt_only`
      and `low_rank`.

  Example:
    >>> model = ms.Model(
    ...   init=lambda key, x: {'w': jax.random.normal(key, (x.shape[-1], 1))},
    ...   apply=lambda theta, x: x @ theta['w'],
    ... )
    >>> model.apply(model.init(jax.random.key(0), jnp.zeros((5, 3))), jnp.zeros((5, 3))).shape
    (5, 1)
  """

  init: Callable[[chex.PRNGKey, Any], PyTree]
  apply: Callable[..., Any]
  statistics: Callable[[PyTree, Any], PyTree] | None = None
  adapts: Adapts | None = None


class Learner(NamedTuple):
  """A few-shot learner as pure functions of one task. Callers batch the functions over tasks with `jax.vmap`.

  Two learners are equal, and share their compiled programs, if the same function of `learners` built them from equal
  arguments; see `equal_by_arguments`.

  Attributes:
    init: Function `(key, episode) → meta`, which returns the initial meta-parameters, any pytree; consumes key. Only
      the shapes of the episode are used.
    adapt: Function `(meta, support, key) → adapted`; consumes key if the learner is stochastic.
    path: Function `(meta, support, key) → adapted`, like `adapt`, but its result contains the states after 0, 1, …, k
      inner steps, stacked on a leading axis `[k + 1]`.
    predict: Function `(adapted, x [Q, …]) → outputs [Q, …]`.
    loss: Function `(meta, episode, key) → (scalar, info)`. The outer optimiser minimises the scalar, and `info` is a
      dict of scalars to report.

  Example:
    >>> learner = ms.maml(ms.nn.from_linen(ms.nn.MLP()), ms.losses.mean_squared_error)
    >>> learner._fields
    ('init', 'adapt', 'path', 'predict', 'loss')
  """

  init: Callable[[chex.PRNGKey, Episode], PyTree]
  adapt: Callable[[PyTree, Any, chex.PRNGKey], PyTree]
  path: Callable[[PyTree, Any, chex.PRNGKey], PyTree]
  predict: Callable[[PyTree, Any], Any]
  loss: Callable[[PyTree, Episode, chex.PRNGKey], tuple[chex.Array, dict[str, chex.Array]]]


@functools.partial(jax.tree_util.register_dataclass, data_fields=['sample', 'episode'], meta_fields=['changes'])
@dataclasses.dataclass(frozen=True)
class TaskDistribution:
  """Tasks that are drawn on the device.

  A task distribution is a pytree, so it can be an argument of a jitted function. `sample` and `episode` are each traced
  once inside jit: all randomness must come from the key, because a number drawn by NumPy would be a constant. If a
  function uses arrays, pass it as `jax.tree_util.Partial(function, array)`. The arrays are then arguments of the
  compiled program; in a closure they would be constants that are copied into the program.

  Attributes:
    sample: Function `key → task`, which returns any pytree; consumes key.
    episode: Function `(task, key) → Episode`, which draws a support and a query of the task; consumes key.
    changes: Functions `change` that `map_episode` has applied to the episodes of this distribution, in order.

  Example:
    >>> def episode(slope, key):
    ...   x = jax.random.normal(key, (15,))
    ...   return ms.Episode(ms.Batch(x[:5], slope * x[:5]), ms.Batch(x[5:], slope * x[5:]))
    >>> tasks = ms.TaskDistribution(sample=jax.random.normal, episode=episode)
    >>> jax.jit(lambda tasks, key: tasks.episode(tasks.sample(key), key))(tasks, jax.random.key(0)).support.x.shape
    (5,)
  """

  sample: Callable[[chex.PRNGKey], PyTree]
  episode: Callable[[PyTree, chex.PRNGKey], Episode]
  changes: tuple[Callable, ...] = ()
  sent_at_once: ClassVar[None] = None

  def __post_init__(self):
    for name in ('sample', 'episode'):
      function = getattr(self, name)
      # JAX also builds this class with placeholders that are not callable. A callable that is a pytree stays as it is.
      if callable(function) and jax.tree_util.all_leaves([function]):
        object.__setattr__(self, name, Partial(function))

  def prepare(self, keys: Callable[[], Keys]) -> 'TaskDistribution':
    """Returns the distribution itself, because it already has the data of all tasks.

    Args:
      keys: Not used here. `TaskStream.prepare`, which has the same signature, uses it.
    """
    return self

  def map_episode(self, change: Callable[[Callable], Callable]) -> 'TaskDistribution':
    """Returns the distribution with its function `episode` replaced by the function `change(episode)`.

    Args:
      change: Function that receives an episode function, `(task, key) → Episode`, and returns another one. If `change`
        uses arrays, pass it as `jax.tree_util.Partial(change, array)`.
    """
    # `change` is called inside the traced function. If it were called here, each chunk of a stream would have a new
    # function, which JAX would compile again.
    return TaskDistribution(self.sample, Partial(_changed, Partial(change), self.episode), (*self.changes, change))


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class TaskStream:
  """Tasks whose data stay on the host. The data are sent to the device for a chunk of meta-iterations at a time.

  Attributes:
    send: Function `(sample keys [B], episode keys [B]) → TaskDistribution`. The distribution gives the tasks and
      episodes of these pairs of keys, and of no other keys. `train` calls `send` in a separate thread, while the device
      works on the previous chunk.
    sent_at_once: Largest number of tasks whose data `evaluate` sends at the same time.
    changes: Functions `change` that `map_episode` has applied to the episodes of this stream, in order.

  Example:
    >>> bank = ms.tasks.class_bank(np.zeros((20, 10, 28, 28, 1), np.uint8))
    >>> tasks = ms.tasks.stream(bank, ms.tasks.image_indices(bank, way=5, shot=1, query=3))
    >>> sample_keys, episode_keys = jax.random.split(jax.random.key(0), (2, 4))  # Keys of four episodes.
    >>> sent = tasks.send(sample_keys, episode_keys)
    >>> draw = jax.jit(lambda tasks, sample_key, episode_key: tasks.episode(tasks.sample(sample_key), episode_key))
    >>> draw(sent, sample_keys[0], episode_keys[0]).support.x.shape
    (5, 28, 28, 1)
  """

  send: Callable[[chex.PRNGKey, chex.PRNGKey], TaskDistribution]
  sent_at_once: int = 128
  changes: tuple[Callable, ...] = ()

  def prepare(self, keys: Callable[[], Keys]) -> TaskDistribution:
    """Sends the data of B episodes to the device, and returns a distribution that gives these episodes.

    Args:
      keys: Function that returns the keys of the B tasks and of their episodes, `(sample keys [B], episode keys [B])`.
    """
    return self.send(*keys())

  def map_episode(self, change: Callable[[Callable], Callable]) -> 'TaskStream':
    """Returns the stream whose distributions have their function `episode` replaced by `change(episode)`.

    Args:
      change: Function that receives an episode function and returns another one; see `TaskDistribution.map_episode`.
    """

    def send(*keys):
      return self.send(*keys).map_episode(change)

    return dataclasses.replace(self, send=send, changes=(*self.changes, change))


def _changed(change, episode, task, key):
  return change(episode)(task, key)


Tasks = TaskDistribution | TaskStream


def check_count(name: str, value: int, least: int = 1) -> None:
  """Raises ValueError unless `value` is an integer of at least `least`. The message calls the value `name`."""
  if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
    raise ValueError(f'{name} must be an integer of at least {least}, got {value!r}')


def check_choice(name: str, value: Any, choices: Any) -> None:
  """Raises ValueError unless `value` is one of the values of `choices`, which is a `Literal` type.

  In the message, `name` is the name of the value.
  """
  if value not in get_args(choices):
    raise ValueError(f'{name} must be one of {get_args(choices)}, got {value!r}')


_ADAPTERS = {
  'flax.linen': 'give `nn.from_linen(module)`',
  'flax.nnx': 'give `nn.from_nnx` a function that builds the module, such as `lambda rngs: …`',
  'equinox': 'give `nn.from_equinox` a function that builds the module, such as `lambda key: …`',
}
"""What to do with a module of another library, by the first part of the name of the Python module of its classes."""


def check_model(model: Any) -> None:
  """Raises ValueError unless `model` is a `Model`. For modules of other libraries, the message names the adapter."""
  if isinstance(model, Model):
    return
  kind = model if isinstance(model, type) else type(model)
  origins = [origin.__module__ for origin in kind.__mro__]
  advice = [text for name, text in _ADAPTERS.items() if any(origin.startswith(name) for origin in origins)]
  what = f'the class {kind.__name__}' if isinstance(model, type) else f'an object of type {kind.__name__}'
  raise ValueError(f'the network must be a Model, got {what}; {(*advice, "give `Model(init, apply)`")[0]}')


_Arguments = ParamSpec('_Arguments')
_Result = TypeVar('_Result')


def equal_by_arguments(build: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
  """Decorates a builder of functions: equal arguments then give equal functions.

  JAX keeps a compiled program for each object that is a static argument, such as the learner of `train`. A function
  equals only itself. A learner that is built anew in each round of a loop would therefore be compiled in each round,
  and all its programs would be kept. The functions of a decorated builder are compared by the arguments that they were
  built from, so that all rounds share one program. `jax.clear_caches()` frees the programs. The decorator itself has
  no cache.

  Arguments are compared as pytrees. Numbers of different types, such as 1 and 1.0, count as different, because programs
  traced with them differ in dtypes. This holds for arguments and for fields of a dataclass such as a Linen module. A
  function among the arguments equals only itself, unless a decorated builder returned it. The functions of a
  decorated builder must be pure, as for `jax.jit`: if a function reads a global variable, a new value of the variable
  does not cause a new compilation. If an argument is not hashable, such as an array, or a module with a list among its
  fields, the result equals only itself.

  Args:
    build: Function that returns a function, or a NamedTuple of functions such as a `Learner` or a `Model`.

  Example:
    >>> first, again = (ms.maml(ms.nn.from_linen(ms.nn.MLP()), ms.losses.mean_squared_error) for _ in range(2))
    >>> first == again
    True
    >>> adam = ms.types.equal_by_arguments(optax.adam)  # Builders of other libraries can be decorated too.
    >>> adam(1e-3) == adam(1e-3), adam(1e-3) == adam(1e-2)
    (True, False)
  """
  signature = inspect.signature(build)

  @functools.wraps(build)
  def built(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> Any:
    result: Any = build(*args, **kwargs)
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    leaves, structure = jax.tree.flatten(bound.arguments)
    try:
      hash((structure, *leaves))
    except TypeError:
      return result
    key = build, structure, tuple(leaves), _types(leaves)
    if callable(result):
      return _Built(result, key)
    return result._make(_Built(part, (i, key)) if callable(part) else part for i, part in enumerate(result))

  return built


def _types(leaves: list) -> tuple:
  """Returns the types of leaves and of their fields. The types of 1 and 1.0 differ, although 1 == 1.0."""
  return tuple((type(leaf), _types(_fields(leaf))) for leaf in leaves)


def _fields(leaf: Any) -> list:
  if not dataclasses.is_dataclass(leaf) or isinstance(leaf, type):
    return []
  return jax.tree.leaves([getattr(leaf, field.name) for field in dataclasses.fields(leaf) if field.compare])


class _Built:
  """A function that equals another one if their keys are equal. A key contains the builder and its arguments."""

  def __init__(self, function: Callable, key: Hashable):
    functools.update_wrapper(self, function)
    self.function, self.key, self.hash = function, key, hash(key)

  def __call__(self, *args, **kwargs):
    return self.function(*args, **kwargs)

  def __eq__(self, other):
    return isinstance(other, _Built) and self.key == other.key

  def __hash__(self):
    return self.hash


@equal_by_arguments
def equal_partial(function: Callable, **options: Any) -> Callable:
  """Returns `functools.partial(function, **options)`. Calls with equal arguments return equal functions."""
  return functools.partial(function, **options)
