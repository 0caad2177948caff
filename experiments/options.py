"""Configuration in frozen dataclasses; the command line's flags are made from their fields."""

import dataclasses
import functools
import os
import pathlib
import sys
from collections.abc import Callable, Container, Sequence
from logging import WARNING, Formatter
from typing import Any, TypeVar, cast

import jax
from absl import app, flags, logging

from experiments import command
from experiments.reporting import TrainingError
from metasgd_jax.cli.telling import cut
from metasgd_jax.datasets import DatasetError
from metasgd_jax.io.checkpoint import CheckpointError
from metasgd_jax.io.files import WriterError
from metasgd_jax.outer import sharding

C = TypeVar('C')
_PARTS = ('experiments', 'metasgd_jax')

flags.DEFINE_string(
  'compilation_cache',
  str(pathlib.Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache') / 'metasgd_jax'),
  'Where compiled programs are kept for the next run; empty for nowhere.',
)
flags.disclaim_key_flags()  # So that --help lists the flags as those of the experiment that defines them.


def option(
  default: Any,
  about: str,
  *,
  low: float | None = None,
  high: float | None = None,
  choices: Sequence[str] | None = None,
  kind: type | None = None,
) -> Any:
  """Returns a dataclass field that is a flag as well.

  Args:
    default: its value when not given. A tuple makes a flag of names with commas between; without choices, of numbers.
      An empty one may be given.
    about: what `--help` says of it.
    low: the least value allowed.
    high: the greatest.
    choices: the names allowed.
    kind: bool, int, float or str; the default's type where left out.
  """
  meta = dict(about=about, low=low, high=high, choices=choices, kind=kind or type(default))
  return dataclasses.field(default=default, metadata=meta)


def check(config: Any) -> None:
  """Raises ValueError where a value is out of its option's bounds; for `__post_init__`."""
  shown = lambda value: cut(repr(value))
  for field in dataclasses.fields(config):
    name, meta = field.name, field.metadata
    value: Any = getattr(config, name)
    if value is None and field.default is None:
      continue
    kind, low, high, choices = meta['kind'], meta['low'], meta['high'], meta['choices']
    kinds: Any = (int, float) if kind is float else kind
    if not isinstance(value, kinds) or (isinstance(value, bool) and kind is not bool):
      raise ValueError(f'{name} must be of type {kind.__name__}, got {shown(value)}')
    if kind is not tuple and ((low is not None and not value >= low) or (high is not None and not value <= high)):
      bounds = f'at least {low}' if high is None else f'from {low} to {high}'
      raise ValueError(f'{name} must be {bounds}, got {shown(value)}')
    if kind is tuple and ((not value and field.default) or len(set(value)) < len(value)):
      raise ValueError(f'{name} must be some of {", ".join(choices or ["numbers"])}, each once, got {shown(value)}')
    if kind is tuple and not choices and not all(type(item) is int and item >= low for item in value):
      raise ValueError(f'{name} must be whole numbers of at least {low}, got {shown(value)}')
    for item in (value if kind is tuple else (value,)) if choices else ():
      if item not in choices:
        raise ValueError(f'{name} must be one of {", ".join(choices)}, got {shown(item)}')


def define_flags(config_class: type) -> None:
  """Defines a flag for each field of the dataclass."""
  for field in dataclasses.fields(config_class):
    meta, default = field.metadata, cast(Any, field.default)
    kind, choices, text = meta['kind'], meta['choices'], meta['about']
    bounds = dict(lower_bound=meta['low'], upper_bound=meta['high'])
    if kind is bool:
      flags.DEFINE_bool(field.name, default, text)
    elif kind is int:
      flags.DEFINE_integer(field.name, default, text, **bounds)
    elif kind is float:
      flags.DEFINE_float(field.name, default, text, **bounds)
    elif kind is tuple and not choices:
      flags.DEFINE_list(field.name, [str(item) for item in default], f'{text} Numbers, with commas between.')
      message = f'must be whole numbers of at least {meta["low"]}'
      flags.register_validator(field.name, lambda items: all(item.isdecimal() for item in items), message=message)
    elif kind is tuple:
      flags.DEFINE_list(field.name, list(default), f'{text} One or more of {", ".join(choices)}, with commas between.')
      known = set(choices)
      flags.register_validator(field.name, known.issuperset, message=f'each must be one of {", ".join(choices)}')
    elif choices:
      flags.DEFINE_enum(field.name, default, list(choices), text)
    else:
      flags.DEFINE_string(field.name, default, text)


def from_flags(config_class: type[C]) -> C:
  """Returns the configuration that the command line asks for."""
  values = {}
  for field in dataclasses.fields(config_class):  # type: ignore[arg-type]
    value = flags.FLAGS[field.name].value
    if isinstance(value, list):
      value = tuple(value) if field.metadata['choices'] else tuple(int(item) for item in value)
    values[field.name] = value
  return config_class(**values)


def as_flags(config: Any) -> str:
  """Returns the flags that give this configuration, as one text."""
  return ' '.join(flag_texts(config))


def flag_texts(config: Any, names: Container[str] | None = None) -> list[str]:
  """Returns the flags that give this configuration, or those of these names: where values are not the defaults."""
  texts = []
  for field in dataclasses.fields(config):
    value, default = getattr(config, field.name), cast(Any, field.default)
    if value == default or (names is not None and field.name not in names):
      continue
    if isinstance(value, bool):
      texts.append(f'--{"" if value else "no"}{field.name}')
    else:
      texts.append(f'--{field.name}={",".join(map(str, value)) if isinstance(value, tuple) else value}')
  return texts


def recipe(experiment: str, config: Any) -> dict[str, Any]:
  """Returns what is needed to run it again, for results.json beside the rows, which have versions and device."""
  flags_text = as_flags(config)
  command = f'python -m experiments.{experiment}' + (f' {flags_text}' if flags_text else '')
  return {'command': command, 'config': dataclasses.asdict(config)}


def main(prepare: Callable[[], Callable[[], object]], config_class: type) -> None:
  """Runs an experiment from the command line.

  Args:
    config_class: of its configuration; see `command.parse`.
    prepare: reads the flags, builds and checks everything, and returns the run itself. A mistake of the user's ends
      it in one sentence; an error in the run is ours and keeps its traceback.
  """

  def start(argv: Sequence[str]) -> None:
    if len(argv) > 1:
      print(f'error: unknown argument {cut(argv[1])!r}; options look like --name=value', file=sys.stderr)
      sys.exit(2)
    logging.get_absl_handler().addFilter(_is_ours)
    logging.get_absl_handler().setFormatter(Formatter('%(asctime)s %(message)s', '%H:%M:%S'))
    _start_jax(flags.FLAGS['compilation_cache'].value)
    try:
      try:
        run = prepare()
      except ValueError as e:
        sys.exit(f'error: {e}')
      run()
    except (CheckpointError, DatasetError, TrainingError, WriterError) as e:
      sys.exit(f'error: {e}')

  logging.set_verbosity(logging.INFO)
  app.run(start, flags_parser=functools.partial(command.parse, config_class))


def _is_ours(record: Any) -> bool:
  """Whether a line of the log is a warning, or comes from here: JAX and orbax tell of much that nobody asked for."""
  here = pathlib.Path(__file__).parents[1]
  return record.levelno >= WARNING or any(here / part in pathlib.Path(record.pathname).parents for part in _PARTS)


def _start_jax(cache: str | None) -> None:
  """All cores of a CPU, and compiled programs kept, unless JAX's own settings say otherwise."""
  sharding.cpu_cores_as_devices()
  if cache and not getattr(jax.config, 'jax_compilation_cache_dir', None):
    jax.config.update('jax_compilation_cache_dir', str(pathlib.Path(cache).expanduser()))
