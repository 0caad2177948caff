"""Functions that turn a module of flax Linen, flax NNX or Equinox into a `Model`.

Haiku needs no such function: `ms.Model(*hk.without_apply_rng(hk.transform(f)))` is a `Model`. The page
docs/composition.md shows how to use modules that have state besides their parameters.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import chex
import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from metasgd_jax.types import Model, equal_by_arguments


@equal_by_arguments
def from_linen(module: nn.Module) -> Model:
  """Returns a `Model` of a Linen module whose only variables are parameters.

  θ is the 'params' collection of the module. `Model.statistics` returns the collection 'statistics', which the layers
  `nn.BatchNorm` and `nn.ConvBlock` write. If `Model.apply` receives this collection, these layers normalise with its
  means and variances.

  Raises:
    ValueError: if `module` is not a Linen module. The model's `init` raises ValueError if `module.init` creates no
      parameters or a collection other than 'params', such as running averages; the layers `nn.BatchNorm` and
      `nn.ConvBlock` do not write 'statistics' in `init`. The model's `apply` raises ValueError if a call of the module
      draws random numbers, for example because dropout is active.

  Example:
    >>> model = ms.nn.from_linen(ms.nn.MLP())
    >>> list(model.init(jax.random.key(0), jnp.zeros((1, 1))))
    ['Dense_0', 'Dense_1', 'Dense_2']
  """
  if not isinstance(module, nn.Module):
    raise ValueError(
      f'`module` must be an instance of flax.linen.Module, got {module!r:.60}; give nn.from_nnx or nn.from_equinox a '
      'function that builds a module of these libraries'
    )

  def init(key, x):
    variables = module.init(key, jax.tree.map(jnp.asarray, x))
    if others := sorted(set(variables) - {'params'}):
      raise _not_pure(module, f"the collections {others} besides 'params'")
    if 'params' not in variables:
      raise ValueError(
        f'{type(module).__name__} has no parameters, so there is nothing to learn; give a module with some'
      )
    return variables['params']

  def apply(theta, x, statistics=None):
    with _without_keys(module, flax.errors.InvalidRngError, 'deterministic=True'):
      return module.apply({'params': theta, 'statistics': statistics or {}}, x)

  def statistics(theta, x):
    with _without_keys(module, flax.errors.InvalidRngError, 'deterministic=True'):
      return module.apply({'params': theta}, x, mutable=['statistics'])[1].get('statistics', {})

  return Model(init, apply, statistics)


def from_nnx(build: Callable[[Any], Any]) -> Model:
  """Returns a `Model` of an NNX module whose only variables are parameters.

  θ is a dict of the module's parameters, nested like the module. `nnx.merge(nnx.graphdef(module), θ)` returns a module
  with the parameters θ. The names that `adapt_only` receives are paths of attributes, such as 'layers.0.kernel'.

  `nnx.RNN` and `nnx.Bidirectional` store a key for the initial state of their cells. The key is constant in a `Model`,
  as it is in Linen. The cells of NNX ignore it, because their initial state is zero unless `carry_init` is given.

  Each call returns a model that equals no other, and JAX compiles a program for each model. In a loop, build the model
  once.

  Args:
    build: Function `nnx.Rngs → module`, such as `lambda rngs: nnx.Linear(3, 1, rngs=rngs)`. `init` calls `build`.
      `from_nnx` also traces `build` once to find the module's structure. This creates no array. The module is called
      with a batch `[B, …]`.

  Raises:
    ValueError: if `build` is not a function, if it does not return an `nnx.Module`, or if the module has variables
      that are not parameters (such as running averages or keys of dropout), an array that is not a variable, or
      parameters that are not floating-point.

  Example:
    >>> from flax import nnx
    >>> model = ms.nn.from_nnx(lambda rngs: nnx.Linear(3, 1, rngs=rngs))
    >>> theta = model.init(jax.random.key(0), jnp.zeros((5, 3)))
    >>> list(theta), model.apply(theta, jnp.zeros((5, 3))).shape
    (['bias', 'kernel'], (5, 1))
  """
  from flax import nnx

  _check_function(build, 'nnx.Rngs → nnx.Module', 'rngs', isinstance(build, nnx.Module | nn.Module))

  def checked(module):
    """Returns the module. Raises ValueError if an array in it is not a variable.

    The check runs while `nnx.eval_shape` traces `build`, because afterwards such an array would be a static attribute.
    """
    _check_returned(module, nnx.Module, 'nnx.Module')
    for path, node in nnx.iter_graph(module):
      if any(map(_is_array, jax.tree.leaves(node, is_leaf=lambda n: isinstance(n, nnx.Variable | nnx.Pytree)))):
        name = '.'.join([type(module).__name__, *map(str, path)])
        raise ValueError(
          f'{name} is an array, but not an nnx.Variable; '
          'wrap it in nnx.Param to learn it, or create it outside the module if it is a constant'
        )
    return module

  abstract = nnx.eval_shape(lambda: checked(build(nnx.Rngs(0))))
  graphdef, rest = nnx.graphdef(abstract), nnx.state(abstract, nnx.Not(nnx.Param))
  recurrent = nnx.RNN, nnx.Bidirectional
  carries = {(*path, 'rngs') for path, node in nnx.iter_graph(abstract) if type(node) in recurrent}
  if others := {type(other).__name__ for path, other in nnx.to_flat_state(rest) if path[:-1] not in carries}:
    raise _not_pure(abstract, f'variables of the types {sorted(others)} besides nnx.Param')
  _check_floating(type(abstract).__name__, jax.tree.leaves(nnx.to_pure_dict(nnx.state(abstract, nnx.Param))))

  def init(key: chex.PRNGKey, x: Any):
    del x  # The parameter shapes of an NNX module do not depend on the input.
    return nnx.to_pure_dict(nnx.state(build(nnx.Rngs(key)), nnx.Param))

  def apply(theta, x):
    return nnx.merge(graphdef, theta, jax.tree.map(_key_or_count, rest))(x)

  return Model(init, apply)


def from_equinox(build: Callable[[chex.PRNGKey], Any]) -> Model:
  """Returns a `Model` of an Equinox module without state.

  θ is the module with `None` in place of everything that is not a parameter. `eqx.combine(θ, module)` returns a module
  with the parameters θ. The parameters are the floating-point JAX arrays of the module. NumPy arrays, and JAX arrays of
  integers or Booleans, are constants, which must not depend on the key. The names that `adapt_only` receives are
  paths of attributes, such as 'layers.0.weight'. `checkpoint`, `io.files.write_params` and `eqx.tree_serialise_leaves`
  can save such a θ.

  Each call returns a model that equals no other, and JAX compiles a program for each model. In a loop, build the model
  once.

  Args:
    build: Function `key → module`, such as `lambda key: eqx.nn.Linear(3, 1, key=key)`; consumes key. `init` calls
      `build`. `from_equinox` also traces `build` to find the module's structure and constants. This creates no
      parameter. The module is called with a single item, as is usual in Equinox, inside a `jax.vmap` over the batch.

  Raises:
    ImportError: if Equinox is not installed.
    ValueError: if `build` is not a function or does not return an `eqx.Module`, or if the module has no parameters, has
      complex parameters, has state (such as running averages), or has constants that depend on the key. The model's
      `apply` raises ValueError if a call of the module needs a random key, for example because dropout is active.

  Example:
    >>> import equinox as eqx
    >>> model = ms.nn.from_equinox(lambda key: eqx.nn.Linear(3, 1, key=key))
    >>> theta = model.init(jax.random.key(0), jnp.zeros((5, 3)))
    >>> theta.weight.shape, model.apply(theta, jnp.zeros((5, 3))).shape
    ((1, 3), (5, 1))
  """
  try:
    import equinox as eqx
  except ImportError as error:
    raise ImportError('Equinox is not installed; run pip install equinox') from error

  given: Any = build
  is_module = isinstance(given, eqx.Module) and any(map(_is_array, jax.tree.leaves(given)))
  _check_function(build, 'key → eqx.Module', 'key', is_module or isinstance(given, nn.Module))
  statics: list[Any] = []

  def arrays(key):
    """Returns the JAX arrays of the module, and appends the rest of the module to `statics`.

    Inside `eval_shape` the arrays are abstract, while the rest of the module is concrete.
    """
    module: Any = build(key)
    if type(module) is tuple and any(isinstance(part, eqx.nn.State) for part in module):
      raise _not_pure(module[0], 'state (`build` returns the pair of eqx.nn.make_with_state)')
    _check_returned(module, eqx.Module, 'eqx.Module')
    leaves = jax.tree.leaves(module, is_leaf=lambda leaf: isinstance(leaf, eqx.nn.StateIndex))
    if any(isinstance(leaf, eqx.nn.StateIndex) for leaf in leaves):
      raise _not_pure(module, 'state (eqx.nn.StateIndex)')
    of_jax, static = eqx.partition(module, lambda leaf: isinstance(leaf, jax.Array))
    statics.append(static)
    return of_jax

  parameters, constants = eqx.partition(jax.eval_shape(arrays, jax.random.key(0)), _is_parameter)
  static, name = statics[0], type(statics[0]).__name__
  _check_floating(name, jax.tree.leaves(parameters))
  if not jax.tree.leaves(parameters):
    raise ValueError(
      f'{name} has no parameters, that is, no floating-point JAX arrays; '
      'if its parameters are NumPy arrays, convert them with jnp.asarray'
    )
  if jax.tree.leaves(constants):
    # The function is compiled, because the compiler then removes the parameters, which are not used, and creates none.
    constants_of = jax.jit(lambda key: eqx.filter(arrays(key), _is_parameter, inverse=True))
    constants, others = (constants_of(jax.random.key(seed)) for seed in (0, 1))
    if not all(map(np.array_equal, jax.tree.leaves(constants), jax.tree.leaves(others))):
      raise ValueError(f'{name} has arrays of integers or Booleans that depend on the key; create them outside `build`')
    static = eqx.combine(constants, static)

  def init(key: chex.PRNGKey, x: Any):
    del x  # The parameter shapes of an Equinox module do not depend on the input.
    return eqx.filter(build(key), _is_parameter)

  def apply(theta, x):
    module = eqx.combine(theta, static)
    with _without_keys(module, RuntimeError, 'eqx.nn.inference_mode'):
      return jax.vmap(module)(x)

  return Model(init, apply)


@contextlib.contextmanager
def _without_keys(module, kind: type[Exception], option: str):
  """Raises ValueError if a call of a module needs a random key, because a `Model` has none.

  The library of the module then raises an error of the given kind, whose text speaks of a key or of an 'rng'. The
  message recommends the option, with which dropout needs no key.
  """
  try:
    yield
  except kind as error:
    what = str(error).split(' (http')[0]
    if 'requires a key' not in what and ' needs PRNG' not in what:
      raise
    raise ValueError(
      f'{type(module).__name__} draws random numbers ({what}), but a Model is a pure function of its parameters; '
      f'turn dropout off with {option}, or pass the key in the batch of `adapt`, as docs/composition.md shows'
    ) from error


def _key_or_count(leaf: jax.ShapeDtypeStruct) -> jax.Array:
  """Returns the array for a leaf of a random stream of NNX: a constant key, or the count 0."""
  is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
  return jnp.broadcast_to(jax.random.key(0) if is_key else jnp.zeros((), leaf.dtype), leaf.shape)


def _is_array(leaf) -> bool:
  return isinstance(leaf, jax.Array | np.ndarray)


def _is_parameter(leaf) -> bool:
  """Returns whether a leaf is a concrete or abstract JAX array whose dtype is neither an integer nor Boolean."""
  is_jax = isinstance(leaf, jax.Array | jax.ShapeDtypeStruct)
  return is_jax and not (jnp.issubdtype(leaf.dtype, jnp.integer) or jnp.issubdtype(leaf.dtype, jnp.bool_))


def _not_pure(module, what: str) -> ValueError:
  """Returns the error for a module that has more than parameters. `what` names the other variables or the state."""
  return ValueError(
    f'{type(module).__name__} has {what}, but a Model is a pure function of its parameters; '
    'pass the rest in the batch of `adapt`, as docs/composition.md shows'
  )


def _check_function(build, kind: str, argument: str, is_module: bool) -> None:
  if not callable(build) or is_module:
    raise ValueError(f'`build` must be a function {kind}, got {type(build).__name__}; write `lambda {argument}: …`')


def _check_returned(module, kind: type, name: str) -> None:
  if not isinstance(module, kind):
    raise ValueError(f'`build` must return an {name}, got {type(module).__name__}')


def _check_floating(name: str, leaves) -> None:
  if wrong := sorted({str(leaf.dtype) for leaf in leaves if not jnp.issubdtype(leaf.dtype, jnp.floating)}):
    has = f'{name} has parameters of dtype {", ".join(wrong)}, which cannot be learned'
    raise ValueError(f'{has}; make each parameter floating-point, and split a complex parameter into two real arrays')
