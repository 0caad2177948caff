"""The command `metasgd`: a trained model sorts a folder of pictures by a few examples, or says what it is.

What takes time to import is imported in the command that uses it.
"""

import argparse
import csv
import difflib
import functools
import io
import os
import pathlib
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np

from metasgd_jax.version import __version__


def _say(text: str = '') -> None:
  """Prints lines, with escapes for what names of files and facts of models may hold and a terminal may obey."""
  from metasgd_jax.datasets.messages import printable

  print('\n'.join(map(printable, text.split('\n'))), flush=True)


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line and returns its exit code: 0, or 1 after a mistake, told in a sentence on standard error."""
  args = parse(sys.argv[1:] if argv is None else argv)
  from metasgd_jax.datasets.messages import DatasetError
  from metasgd_jax.writers import WriterError

  for stream in (sys.stdout, sys.stderr):  # A file's name may hold what a terminal cannot show.
    if isinstance(stream, io.TextIOWrapper):
      stream.reconfigure(errors='backslashreplace')
  try:
    finish = args.prepare(args)
  except (DatasetError, ValueError, WriterError) as e:
    return _refuse(e)
  try:
    finish()
  except WriterError as e:
    return _refuse(e)
  return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
  """Returns the arguments; exits with code 2, naming what is nearest, where there is a mistake in them."""
  parser_class: Any = functools.partial(_Parser, given=argv, allow_abbrev=False)
  parser = parser_class(
    prog='metasgd', description='Few-shot classification of pictures by a trained model, adapted in one step.'
  )
  parser.add_argument('--version', action='version', version=f'metasgd_jax {__version__}')
  commands = parser.add_subparsers(title='commands', required=True, metavar='command', parser_class=parser_class)

  predict = commands.add_parser(
    'predict',
    help='sort a folder of pictures by a few examples',
    usage='%(prog)s --support=DIR --query=DIR --out=DIR [options]',
    description='Adapts to the classes of --support in one step, and sorts the pictures of --query among them.',
  )
  predict.add_argument('--model', default='omniglot', help="a model's file or name (default: omniglot)")
  predict.add_argument('--support', metavar='DIR', required=True, help='examples: a sub-folder for each class')
  predict.add_argument('--query', metavar='DIR', required=True, help='the pictures to sort')
  predict.add_argument('--out', metavar='DIR', required=True, help='gets predictions.csv and predictions.png')
  mode = predict.add_mutually_exclusive_group()
  mode.add_argument('--inductive', action='store_true', help='each answer depends on its own picture alone (default)')
  mode.add_argument(
    '--transductive',
    dest='inductive',
    action='store_false',
    help='normalise all of --query together: better where it has dozens of pictures, with all classes among them',
  )
  predict.add_argument(
    '--invert',
    choices=('auto', 'yes', 'no'),
    default='auto',
    help='turn light into dark; auto: where the model wants dark backgrounds and the examples have light ones',
  )
  predict.set_defaults(inductive=True, prepare=_prepare_predict, parser=predict)

  info = commands.add_parser(
    'info', help='say what a model is', description='Says what a model is; without --model, which ship with metasgd.'
  )
  info.add_argument('--model', help="a model's file or name")
  info.set_defaults(prepare=_prepare_info, parser=info)

  args, unknown = parser.parse_known_args(argv)
  if unknown:
    args.parser.error(f'unrecognized arguments: {" ".join(unknown)}')
  return args


class _Parser(argparse.ArgumentParser):
  """An argparse parser whose errors name the command or flag that is nearest to one it does not know."""

  def __init__(self, *args, given: Sequence[str] = (), **kwargs):
    super().__init__(*args, **kwargs)
    self._given = given

  def error(self, message: str) -> NoReturn:
    known = list(self._option_string_actions)
    for action in self._actions:
      if isinstance(action, argparse._SubParsersAction):
        known += list(action.choices)
    for word in (word.partition('=')[0] for word in self._given):
      wanted = [k for k in known if k.startswith('--') == word.startswith('--')]
      if word not in known and (near := difflib.get_close_matches(word, wanted, 1)):
        message += f'; for {word}, did you mean {near[0]}?'
        break
    super().error(message)


def _refuse(e: Exception) -> int:
  from metasgd_jax.datasets.messages import printable

  print(f'error: {printable(" ".join(str(e).split()))}', file=sys.stderr)
  return 1


def _prepare_predict(args: argparse.Namespace) -> Callable[[], None]:
  """Reads and checks everything, and adapts; what it returns answers, draws and writes."""
  from metasgd_jax.classifier import FewShotClassifier
  from metasgd_jax.datasets import image_folder
  from metasgd_jax.datasets.messages import at_home
  from metasgd_jax.model_file import load_model

  out, query_dir = at_home(args.out), at_home(args.query)
  model = load_model(args.model)
  *size, channels = model.config.image_shape
  fit = 'pad' if model.config.background == 'dark' else 'crop'  # A drawing's strokes go to its edges.
  how: dict[str, Any] = dict(size=tuple(size), channels=channels, fit=fit, report=_say)
  support = image_folder.load(args.support, **how)
  if not 2 <= len(support.names) <= model.config.way:
    raise ValueError(
      f'--support={args.support} has {len(support.names)} class(es), and the model tells '
      f'{_classes(model.config)} apart; a class is a sub-folder'
    )
  query = image_folder.read_images(query_dir, **how)
  _check_out(out, {'--support': at_home(args.support), '--query': query_dir})
  invert: Any = {'auto': 'auto', 'yes': True, 'no': False}[args.invert]
  classifier = FewShotClassifier(model, inductive=args.inductive, invert=invert)
  sizes = [int(n) for n in support.bank.sizes]
  _say('adapting, and compiling for it first, which takes some seconds')
  classifier.fit(support.bank.images, np.repeat(np.arange(len(sizes)), sizes))
  names = [path.relative_to(query_dir) for path in query.paths]
  examples = {path.resolve() for path in support.paths}
  seen = [path.resolve() in examples for path in query.paths]
  return lambda: _predict(classifier, support, sizes, query, names, seen, out)


def _predict(classifier, support, sizes, query, names: list[pathlib.Path], seen: list[bool], out: pathlib.Path) -> None:
  """Answers, draws, writes and tells; pictures `seen` among the examples are not judged."""
  from metasgd_jax import writers

  _say(f'answering {len(names)} pictures')
  probabilities = classifier.predict_proba(query.images)
  answers = [support.names[i] for i in probabilities.argmax(1)]
  known = [len(name.parts) > 1 and name.parts[0] in support.names for name in names]
  truth = [name.parts[0] if k and not s else None for name, k, s in zip(names, known, seen, strict=True)]
  examples = np.split(support.bank.images, np.cumsum(sizes)[:-1])
  picture = _draw(support.names, examples, query.images, probabilities, [str(name) for name in names], truth)
  files = {'predictions.csv': _table(support.names, names, answers, probabilities)}
  if picture is not None:
    files['predictions.png'] = picture
  try:
    out.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
      with writers.atomic(out / name) as file:
        file.write(data)
    if picture is None:  # One of an earlier run would be taken for this one's.
      (out / 'predictions.png').unlink(missing_ok=True)
  except OSError as e:
    raise writers.WriterError(f'{out} cannot be written ({e.strerror}); give another --out') from e

  _say()
  _say(f'classes: {_counted(dict(zip(support.names, sizes, strict=True)))}')
  _say(f'answers: {_counted(Counter(answers))}')
  if classifier.inverted_:
    _say('light and dark were exchanged, as the model wants')
  if skipped := len(support.skipped) + len(query.skipped):
    _say(f'skipped: {skipped} that cannot be read, named above')
  if left_out := sum(k and s for k, s in zip(known, seen, strict=True)):
    are, them = ('picture is', 'it') if left_out == 1 else ('pictures are', 'them')
    _say(f'{left_out} {are} among the examples too; the accuracy leaves {them} out')
  if right := [a == t for a, t in zip(answers, truth, strict=True) if t is not None]:
    _say(f'accuracy: {np.mean(right):.1%} of {len(right)} pictures in folders named like a class')
  _say(f'results: {" and ".join(str(out / name) for name in files)}')
  if picture is None:
    _say("there is no predictions.png, for want of matplotlib; pip install 'metasgd_jax[plots]'")


def _check_out(out: pathlib.Path, inputs: Mapping[str, pathlib.Path]) -> None:
  """Raises WriterError where results cannot go, or would be taken for pictures the next time."""
  from metasgd_jax.writers import WriterError

  for flag, folder in inputs.items():
    if pathlib.Path(os.path.realpath(out)).is_relative_to(os.path.realpath(folder)):  # Path.resolve fails at loops.
      raise WriterError(f'--out={out} lies in {flag}, whose pictures the results would join; give another --out')
  there = next(path for path in (out, *out.absolute().parents) if path.exists())
  if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
    why = 'cannot be written' if there.is_dir() else 'is a file'
    raise WriterError(f'--out={out} cannot be written, since {there} {why}; give another --out')


def _table(classes: Sequence[str], names: Iterable[pathlib.Path], answers, probabilities: np.ndarray) -> bytes:
  text = io.StringIO()
  writer = csv.writer(text, lineterminator='\n')
  writer.writerow(['file', 'prediction', *classes])
  for name, answer, row in zip(names, answers, probabilities, strict=True):
    writer.writerow([name, answer, *(f'{p:.6f}' for p in row)])
  return text.getvalue().encode(errors='surrogateescape')


def _draw(classes, examples, query, probabilities, names, truth) -> bytes | None:
  """The sheet as PNG, or None without matplotlib."""
  try:
    from metasgd_jax import plotting
  except ImportError:
    return None
  shown = lambda text: text.encode(errors='replace').decode()  # A name that is no text at all has surrogates.
  figure = plotting.prediction_sheet(
    [shown(name) for name in classes],
    [part / 255 for part in examples],
    query / 255,
    probabilities,
    [shown(name) for name in names],
    [shown(name) if name else None for name in truth],
  )
  file = io.BytesIO()
  with warnings.catch_warnings():
    warnings.filterwarnings('ignore', 'Glyph .* missing')  # Names in scripts that the font lacks show as boxes.
    figure.savefig(file, format='png', dpi=150)
  return file.getvalue()


def _counted(counts: Mapping[str, int]) -> str:
  return ', '.join(f'{name} {count}' for name, count in sorted(counts.items()))


def _prepare_info(args: argparse.Namespace) -> Callable[[], None]:
  from metasgd_jax import model_file

  if args.model is not None:
    lines = _about(model_file.load_model(args.model), model_file.model_size(args.model))
  else:
    lines = []
    for name in model_file.shipped_models():
      config = model_file.load_model(name).config
      lines.append(f'{name}: {_LEARNERS[config.learner]}, {_classes(config)}, {_images(config)}')
    lines = [*lines, 'more of one: metasgd info --model=NAME'] if lines else ['no model ships with this metasgd_jax']
  return lambda: _say('\n'.join(lines))


_LEARNERS = {'meta_sgd': 'Meta-SGD', 'maml': 'MAML'}


def _about(model, size: int) -> list[str]:
  import jax

  config, (theta, alpha) = model
  count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
  lines = [
    f'learner      {_LEARNERS[config.learner]}, {config.inner_steps} inner step(s)',
    f'network      Conv4, {config.filters} filters, hidden layer {config.hidden or "none"}',
    f'tells apart  {_classes(config)}',
    f'images       {_images(config)}',
    f'parameters   {count(theta):,}',
  ]
  if alpha is None:
    lines.append(f'alpha        {config.alpha:g}, one rate for all, not learned')
  else:
    rates = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(alpha)])
    lines.append(
      f'alpha        {rates.size:,} learned rates, mean {rates.mean():.4g}, {np.mean(rates < 0):.1%} negative'
    )
  lines += [
    f'size         {size / 1e6:.2f} MB',
    'training' if config.training else 'training     nothing is said of it',
  ]
  width = max(map(len, config.training), default=0)
  return [*lines, *(f'  {name:{width}}  {_fact(value)}' for name, value in config.training.items())]


def _classes(config) -> str:
  return f'2 to {config.way} classes' if config.way > 2 else '2 classes'


def _images(config) -> str:
  height, width, channels = config.image_shape
  kind = {1: 'grey', 3: 'colour'}.get(channels, f'{channels} channels')
  return f'{height}x{width}, {kind}' + (', light on a dark background' if config.background == 'dark' else '')


def _fact(value: Any) -> str:
  if isinstance(value, dict):
    return ', '.join(f'{name} {_fact(v)}' for name, v in value.items())
  if isinstance(value, list):
    return ', '.join(map(_fact, value))
  if isinstance(value, bool) or value is None:
    return {True: 'yes', False: 'no', None: 'unknown'}[value]
  return f'{value:,}' if isinstance(value, int) else f'{value:g}' if isinstance(value, float) else str(value)
