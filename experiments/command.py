"""Parses the command line of an experiment, reads settings from the file of `--config`, and writes `--help`."""

import dataclasses
import difflib
import json
import pathlib
import sys
import textwrap
from collections.abc import Container, Sequence
from typing import Any

from absl import flags

WIDTH = 100
MOST_USED = (
  *('learner', 'table1', 'table2', 'table3', 'table4', 'network', 'adapts', 'dataset', 'data_dir', 'way', 'shot'),
  *('query', 'trajectories', 'inner_steps', 'alpha', 'meta_iterations', 'meta_batch', 'learning_rate', 'seeds'),
  *('eval_tasks', 'workdir', 'config'),
)
"""Flags with a line of their own in `--help`."""


def parse(config_class: type, argv: Sequence[str]) -> list[str]:
  """Sets all flags, and returns a list that contains only the program's name, as `app.run` expects.

  `--help` and `--helpfull` end the program with exit code 0. If an argument is wrong, this function prints one sentence
  to stderr and ends the program with exit code 2.

  Args:
    config_class: Class of the experiment's configuration. The file of `--config` contains values of its fields.
    argv: The program's name and the arguments.
  """
  if {'-h', '--help', '--helpfull'} & set(argv):
    print(flags.FLAGS.main_module_help() if '--helpfull' in argv else help_text())
    sys.exit(0)
  try:
    rest = flags.FLAGS(list(argv))[1:]
    path = flags.FLAGS['config'].value
    if path is not None:
      settings = from_file(path, config_class, pathlib.Path(argv[0]).stem)
      flags.FLAGS([argv[0], *settings, *argv[1:]])  # If a flag is given twice, its last value counts.
    if rest:
      raise ValueError(f'unknown argument {cut(rest[0])!r}; options look like --name=value')
  except (flags.Error, ValueError, RecursionError) as e:
    message = str(e).removeprefix('ERROR:: ')
    for word in argv[1:]:
      value = word.partition('=')[2] or word
      message = message.replace(value, cut(value))
    print(f'error: {message}', file=sys.stderr)
    sys.exit(2)
  return [argv[0]]


def from_file(path: str, config_class: type, experiment: str) -> list[str]:
  """Returns the flags, such as '--way=5', for the settings in the results.json or config.json of an earlier run.

  Args:
    path: path of the file.
    config_class: dataclass of the settings. A setting that the file lacks has its default.
    experiment: name of the experiment, for messages.

  Raises:
    ValueError: if the file cannot be read, has no settings, has unknown settings, or has values that are not
      allowed.
  """
  try:
    found = json.loads(pathlib.Path(path).expanduser().read_bytes())
    config = found.get('config', found) if isinstance(found, dict) else None
    if not config or not isinstance(config, dict):
      raise ValueError('it holds no settings')
    known = [field.name for field in dataclasses.fields(config_class)]
    for name in config:
      if name not in known:
        raise ValueError(f'it has an unknown setting {cut(name)!r}{near(name, known)}')
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in config.items()}
    return flag_texts(config_class(**values), config)
  except (OSError, RuntimeError, TypeError, ValueError) as e:
    raise ValueError(
      f'--config={path} is no results.json or config.json of experiments.{experiment}: {e}; give another file'
    ) from e


def flag_texts(config: Any, names: Container[str] | None = None) -> list[str]:
  """Returns the flags, such as '--way=5', of all values of a configuration that are not the defaults.

  Args:
    config: the configuration.
    names: names of the fields to include; by default, all.
  """
  texts = []
  for field in dataclasses.fields(config):
    name, value = field.name, getattr(config, field.name)
    included = value != field.default and (names is None or name in names)
    if included and isinstance(value, bool):
      texts.append(f'--{name}' if value else f'--no{name}')
    elif included:
      texts.append(f'--{name}={field.metadata["parser"].serialize(value)}')
  return texts


def refuse_beside(what: str, config: Any, names: Container[str]) -> None:
  """Raises ValueError if an option in `names` is given. `what` names the other option, and says what it does."""
  if given := flag_texts(config, names):
    raise ValueError(f'{what}, got {" ".join(given)} too; leave one of the two out')


def help_text() -> str:
  """Returns the text of `--help`: the descriptions of the most used flags, and the names of the other flags."""
  about, experiment = (sys.modules['__main__'].__doc__ or '').partition('\n')[0], pathlib.Path(sys.argv[0]).stem
  usage = f'usage: python -m experiments.{experiment} [--name=value …]; --helpfull describes all flags'
  ours = [*flags.FLAGS.get_key_flags_for_module(sys.argv[0]), flags.FLAGS['compilation_cache']]
  used = [flag for flag in ours if flag.name in MOST_USED]
  others = [_brief(flag) for flag in ours if flag not in used]
  lines = [*textwrap.wrap(about, WIDTH), usage]
  for flag in used:
    choices = ', '.join(getattr(flag.parser, 'choices', ()))
    text = f'  {_brief(flag):31} {flag.help}' + (f' ({choices})' if choices else '')
    limit = 3 if choices else 1
    lines += textwrap.wrap(text, WIDTH, subsequent_indent=' ' * 34, max_lines=limit, placeholder=' …')
  lines += ['Other flags:', textwrap.indent(textwrap.fill('  '.join(others), WIDTH - 2), '  ')]
  return '\n'.join(lines)


def _brief(flag: flags.Flag) -> str:
  """Returns a flag with its default value as text, such as '--way=5'."""
  if flag.boolean:
    return f'--no{flag.name}' if flag.default else f'--{flag.name}'
  return f'--{flag.name}={textwrap.shorten(flag.default_unparsed or "…", 20, placeholder="…")}'


def near(word: str, known: Sequence[str]) -> str:
  """Returns a question that suggests the known word nearest to `word`, or an empty string if none is near."""
  found = difflib.get_close_matches(cut(word), known, 1)
  return f'; did you mean {found[0]}?' if found and found[0] != word else ''


def cut(text: str) -> str:
  """Returns a text from the command line, cut after 80 characters."""
  return text if len(text) <= 80 else f'{text[:80]}…'
