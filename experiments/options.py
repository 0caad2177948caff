"""Settings of an experiment: the fields of a frozen dataclass, which are also the flags of a command line."""

import dataclasses
import os
import pathlib
import sys
from collections.abc import Callable, Sequence
from logging import WARNING, Formatter
from typing import Any, TypeVar

import jax
from absl import app, flags, logging

from experiments import command, reporting
from experiments.command import cut, flag_texts, near
from metasgd_jax import datasets
from metasgd_jax.cli.telling import escape_unprintable
from metasgd_jax.io import checkpoint, files
from metasgd_jax.outer import sharding

Bound = float | None
Names = Sequence[str]
C = TypeVar('C')

_CACHE = pathlib.Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache') / 'metasgd_jax'
_FAILURES = (checkpoint.CheckpointError, datasets.DatasetError, files.WriterError, reporting.TrainingError)

flags.DEFINE_string('compilation_cache', str(_CACHE), 'Directory that keeps compiled programs; empty to keep none.')
flags.disclaim_key_flags()  # Then --help lists the flags defined here as flags of the experiment.


class Parser(flags.ArgumentParser, flags.ArgumentSerializer):
  """Converts text to the value of an option, and a value to text. In the text, commas separate the items of a tuple."""

  def __init__(self, kind: type, low: Bound, high: Bound, choices: Names):
    bounds: Any = dict(lower_bound=low, upper_bound=high)
    parsers: Any = {bool: flags.BooleanParser(), str: flags.ArgumentParser(), float: flags.FloatParser(**bounds)}
    self.kind, self.choices = kind, choices
    self.item = flags.EnumParser(choices) if choices else parsers.get(kind, flags.IntegerParser(**bounds))
    self.syntactic_help = _description(kind, low, high, choices)

  def parse(self, argument: str) -> Any:
    """Converts a text from the command line to a value.

    Raises:
      ValueError: if the text is not valid. The message says what the value must be.
    """
    parts = [part.strip() for part in argument.split(',') if part] if self.kind is tuple else [argument]
    hint = ''.join(near(part, self.choices) for part in parts)
    mistake = ValueError(f'{"give" if self.kind is tuple else "it must be"} {self.syntactic_help}{hint}')
    try:
      items = tuple(self.item.parse(part) for part in parts)
    except ValueError as e:
      raise mistake from e
    if len(set(items)) < len(items):
      raise mistake
    return items if self.kind is tuple else items[0]

  def serialize(self, value: Any) -> str:
    """Returns the text of a value for the command line. `parse` converts the text back to the value."""
    return ','.join(map(str, value)) if self.kind is tuple else str(value)

  def allows(self, value: Any) -> bool:
    """Returns whether a value has the right type, is not an empty tuple, and equals `parse(serialize(value))`."""
    types = (int, float) if self.kind is float else self.kind
    if not isinstance(value, types) or (self.kind is tuple and not value):
      return False
    try:
      return self.parse(self.serialize(value)) == value
    except ValueError:
      return False


def _description(kind: type, low: Bound, high: Bound, choices: Names) -> str:
  """Returns the words that follow "must be" in a message, or "give" if the values are items of a tuple."""
  if kind is tuple and len(choices) == 2:
    return f'{", ".join(choices)}, or both separated by a comma'
  if kind is tuple:
    items = f'some of {", ".join(choices)}' if choices else f'whole numbers of at least {low}'
    return f'{items}, each once, separated by commas'
  if choices:
    return f'one of {", ".join(choices)}'
  bounds = '' if low is None else f', at least {low}' if high is None else f', from {low} to {high}'
  return f'of type {kind.__name__}{bounds}'


def option(
  default: Any, about: str, *, low: Bound = None, high: Bound = None, choices: Names = (), kind: type | None = None
) -> Any:
  """Returns a dataclass field that is also a flag.

  Args:
    default: value if the flag is not given. If it is a tuple, the flag takes several values: names if there are
      `choices`, and whole numbers otherwise.
    about: text for `--help`.
    low: smallest value allowed.
    high: largest value allowed.
    choices: names allowed.
    kind: bool, int, float, str or tuple. By default, it is the type of `default`.
  """
  parser = Parser(kind or type(default), low, high, choices)
  return dataclasses.field(default=default, metadata=dict(about=about, choices=choices, parser=parser))


def check(config: Any) -> None:
  """Raises ValueError if a field has a value that its option does not allow. `__post_init__` of a config calls this."""
  for field in dataclasses.fields(config):
    value, parser = getattr(config, field.name), field.metadata['parser']
    if value is not field.default and not parser.allows(value):
      kind = 'a tuple: ' if parser.kind is tuple else ''
      raise ValueError(f'`{field.name}` must be {kind}{parser.syntactic_help}, got {cut(repr(value))}')


def define_flags(config_class: type) -> None:
  """Defines a flag for each field of the dataclass."""
  for field in dataclasses.fields(config_class):
    parser, default = field.metadata['parser'], field.default
    text = None if default is None else parser.serialize(default)
    flags.DEFINE(parser, field.name, text, field.metadata['about'], serializer=parser, boolean=parser.kind is bool)


def from_flags(config_class: type[C]) -> C:
  """Returns the configuration that the command line gives."""
  names = [field.name for field in dataclasses.fields(config_class)]  # type: ignore[arg-type]
  return config_class(**{name: flags.FLAGS[name].value for name in names})


def as_flags(config: Any) -> str:
  """Returns one text: the flags of all values that differ from their defaults, separated by spaces."""
  return ' '.join(flag_texts(config))


def recipe(experiment: str, config: Any) -> dict[str, Any]:
  """Returns the command and the settings of a run, which are written to results.json."""
  text = f'python -m experiments.{experiment} {as_flags(config)}'
  return {'command': text.rstrip(), 'config': dataclasses.asdict(config)}


def main(prepare: Callable[[], Callable[[], object]], config_class: type) -> None:
  """Runs an experiment from the command line.

  Args:
    prepare: Function that reads the flags, builds and checks all parts of the run, and returns a function that performs
      the run. A ValueError from `prepare` is a mistake of the user, so its message is printed without a traceback. A
      ValueError from the run is a defect of the program, so its traceback is printed.
    config_class: Class of the experiment's configuration; see `command.parse`.
  """

  def start(_: Sequence[str]) -> None:
    logging.get_absl_handler().addFilter(_is_ours)
    logging.get_absl_handler().setFormatter(Formatter('%(asctime)s %(message)s', '%H:%M:%S'))
    _start_jax(flags.FLAGS['compilation_cache'].value)
    try:
      run = prepare()
    except (ValueError, *_FAILURES) as e:
      sys.exit(f'error: {e}')
    try:
      run()
    except _FAILURES as e:
      sys.exit(f'error: {e}')
    except reporting.StoppedError as e:
      if jax.process_count() > 1:  # The processes end together.
        raise
      sys.stdout.flush()
      sys.stderr.flush()
      os._exit(int(e.code or 1))  # Python would end under a thread that still compiles, and then crash.

  escape_unprintable()
  logging.set_verbosity(logging.INFO)
  app.run(start, flags_parser=lambda argv: command.parse(config_class, argv))


def _is_ours(record: Any) -> bool:
  """Returns whether a log record is a warning or comes from this project.

  Other records are dropped, because JAX and orbax write many records at level INFO.
  """
  root, path = pathlib.Path(__file__).parents[1], pathlib.Path(record.pathname)
  return record.levelno >= WARNING or any(path.is_relative_to(root / part) for part in ('experiments', 'metasgd_jax'))


def _start_jax(cache: str | None) -> None:
  """Makes JAX use all cores of a CPU, and cache compiled programs in the directory `cache` if it is given.

  If JAX already has a number of CPU devices or a cache directory in its settings, that setting is kept.
  """
  sharding.cpu_cores_as_devices()
  if cache and not getattr(jax.config, 'jax_compilation_cache_dir', None):
    jax.config.update('jax_compilation_cache_dir', str(pathlib.Path(cache).expanduser()))
