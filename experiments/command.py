"""An experiment's command line: help on one screen, settings from a file, mistakes answered with what is nearest."""

import dataclasses
import json
import pathlib
import re
import sys
import textwrap
from collections.abc import Sequence
from typing import Any, NoReturn

from absl import flags

from metasgd_jax.cli.telling import cut, near, with_cut, words
from metasgd_jax.datasets.messages import printable

WIDTH = 100
LEFT = 31

TOPICS = {  # title → flags with a line of their own, flags that are only named
  'What is trained': (
    'learner table1 table2 table3 table4 network adapts',
    'start rank widths width depth heads filters precision',
  ),
  'Tasks': (
    'dataset data_dir way shot query trajectories',
    'archives verify_archives cache split split_seed validation_classes class_lists image_size channels augmentation '
    'stream tokens length',
  ),
  'The inner step': (
    'inner_steps alpha',
    'adjoint inductive multi_step_loss alpha_by_step floor_rate later_rate estimator discount decay',
  ),
  'The outer loop': (
    'meta_iterations meta_batch learning_rate',
    'optimizer max_kl damping curvature_tasks tasks_at_once schedule clip validate_every ensemble bad_steps',
  ),
  'Seeds and tests': ('seeds eval_tasks', 'seed eval_seed eval_shots eval_query eval_repeats eval_updates'),
  'The run': (
    'workdir config',
    'restart checkpoint_every keep_checkpoints tensorboard profile plan debug_task compilation_cache',
  ),
  'Devices and processes': ('', 'devices distributed coordinator num_processes process_id'),
}
_HELP, _HELP_ALL = {'--help', '-help', '-h', '--helpshort', '-?'}, {'--helpfull', '--help_all'}


def parse(config_class: type, argv: Sequence[str]) -> list[str]:
  """Returns the arguments that are no flags, after the program's name, with all flags set; for `app.run`.

  `--help` and its kin print and end the program, a mistake ends it with a sentence and the exit code 2.

  Args:
    config_class: of the experiment's configuration, which a file of `--config` has.
    argv: the program's name, and what it was given.
  """
  asked = _asked(argv[1:])
  if asked & _HELP:
    print(help_text())
    sys.exit(0)
  if asked & _HELP_ALL:
    print(f'{_about()}\n{flags.FLAGS.main_module_help()}')
    sys.exit(0)
  try:
    rest = flags.FLAGS(list(argv))
    path = flags.FLAGS['config'].value
    if path is not None:
      settings = from_file(path, config_class, pathlib.Path(argv[0]).stem)
      rest = flags.FLAGS([argv[0], *settings, *argv[1:]])  # Of a flag given twice the last counts.
  except flags.Error as e:
    _refuse(f'{with_cut(_sentence(e), argv[1:])}{_advice(argv, config_class)}')
  except RecursionError:  # Of absl's search for a flag that is near to a name of thousands of letters.
    _refuse(f'unknown flag {cut(max(argv[1:], key=len))}')
  except ValueError as e:
    _refuse(str(e))
  return rest


def from_file(path: str, config_class: type, experiment: str) -> list[str]:
  """Returns the flags that give the settings in a results.json or config.json of an earlier run.

  Args:
    path: of the file.
    config_class: the settings are its fields; those that the file lacks have their defaults.
    experiment: its name, which must be that of results.json.

  Raises:
    ValueError: there is no such file, it is of another experiment, has unknown fields, or values that they do not take.
  """
  from experiments import options

  found = _read_json(path)
  config = found
  if isinstance(found, dict) and 'config' in found and 'command' in found:
    of = re.search(r'experiments\.(\w+)', str(found.get('command')))
    if of and of[1] != experiment:
      raise ValueError(f'--config={path} is of experiments.{of[1]}, not of experiments.{experiment}; give it to that')
    config = found['config']
  if not isinstance(config, dict) or not config:
    raise ValueError(f'--config={path} holds no settings; give results.json or config.json of a run')
  fields = [field.name for field in dataclasses.fields(config_class)]
  for name in config:
    if name not in fields:
      raise ValueError(
        f'--config={path} has the field {cut(str(name))!r}, which experiments.{experiment} does not know'
        f'{near(name, fields) or "; is it of another experiment?"}'
      )
  try:
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in config.items()}
    return options.flag_texts(config_class(**values), config)
  except (TypeError, ValueError) as e:
    raise ValueError(f'--config={path}: {e}') from e


def help_text() -> str:
  """Returns what `--help` shows: flags by topic, the ones most used with a line each, the others named."""
  ours = set(_ours())
  lines = [
    *textwrap.wrap(_about(), WIDTH),
    f'usage: python -m experiments.{pathlib.Path(sys.argv[0]).stem} [--name=value …]',
  ]
  lines[-1] += '; --helpfull says more of each'
  known = {name for parts in TOPICS.values() for part in parts for name in part.split()}
  for title, (shown, named) in (TOPICS | {'More': ('', ' '.join(sorted(ours - known)))}).items():
    whole = [line for name in shown.split() if name in ours for line in _lines(name)]
    brief = textwrap.wrap('  '.join(_brief(name) for name in named.split() if name in ours), WIDTH - 4)
    if whole or brief:
      lines += [f'{title}:', *whole, *(f'  {line}' for line in brief)]
  return '\n'.join(lines)


def _ours() -> list[str]:
  """The names of the experiment's flags."""
  return [flag.name for flag in flags.FLAGS.get_key_flags_for_module(sys.argv[0])] + ['compilation_cache']


def _asked(given: Sequence[str]) -> set[str]:
  """The questions for help among what was given, `--help=true` among them, and no value of another flag."""
  found, before = set(), ''
  for word in given:
    if word == '--':
      break
    name, equals, value = word.partition('=')
    if not _takes_next(before) and (not equals or value.lower() in ('true', 't', '1', 'yes')):
      found.add(name)
    before = '' if _takes_next(before) else word
  return found


def _takes_next(word: str) -> bool:
  """Whether a word is a flag whose value is the next one."""
  name = word.removeprefix('-').removeprefix('-')
  return word.startswith('-') and name in flags.FLAGS and not flags.FLAGS[name].boolean


def _about() -> str:
  return (sys.modules['__main__'].__doc__ or '').strip().partition('\n')[0]


def _lines(name: str) -> list[str]:
  """A flag, its default and what it is: in one line, or three of a flag that takes some of many names."""
  flag = flags.FLAGS[name]
  text, room = ' '.join(str(flag.help).split()), WIDTH - LEFT - 4
  listed = isinstance(flag.default, list)
  if len(text) > room and not listed:
    text = text.partition(';')[0]
  parts = textwrap.wrap(text, room, max_lines=3 if listed else 1, placeholder='…')
  return [f'  {_brief(name) if i == 0 else "":{LEFT}} {part}' for i, part in enumerate(parts)]


def _brief(name: str) -> str:
  """A flag with its default."""
  flag = flags.FLAGS[name]
  if flag.boolean:
    return f'--no{name}' if flag.default else f'--{name}'
  value = flag.default
  text = '…' if value is None else ','.join(value) if isinstance(value, list) else str(value)
  text = text if len(text) < 20 else '…'
  return f'--{name}={text}'


def _sentence(e: flags.Error) -> str:
  if isinstance(e, flags.UnrecognizedFlagError):
    return f'unknown flag --{cut(e.flagname)}'
  return ' '.join(str(e).split()).removeprefix('ERROR:: ').rstrip('.')


def _advice(argv: Sequence[str], config_class: type) -> str:
  """What was probably meant by the first flag that is not known, or by the first value that is none of its choices."""
  choices = {field.name: field.metadata['choices'] for field in dataclasses.fields(config_class)}
  ours = _ours()
  negated = [f'no{name}' for name in ours if flags.FLAGS[name].boolean]
  for word, value in words(argv[1:]):
    name = word.removeprefix('-').removeprefix('-')
    if not word.startswith('-'):
      continue
    if name not in flags.FLAGS and name not in negated:
      return near(name, ours + negated).replace('did you mean ', 'did you mean --')
    for item in value.split(',') if choices.get(name) else ():
      if item not in choices[name]:
        return near(item, choices[name])
  return ''


def _read_json(path: str) -> Any:
  try:
    place = pathlib.Path(path).expanduser()
    if not path or place.is_dir():
      raise ValueError('it is a folder' if path else 'no file is named')
    if not place.is_file():
      raise ValueError('there is no such file')
    if place.stat().st_size > 2**28:
      raise ValueError('it is larger than any results')
    return json.loads(place.read_bytes())
  except (OSError, ValueError, RuntimeError, RecursionError) as e:
    raise ValueError(f'--config={path} cannot be read ({e}); give results.json or config.json of a run') from e


def _refuse(message: str) -> NoReturn:
  print(f'error: {printable(message)}', file=sys.stderr)
  sys.exit(2)
