"""`metasgd predict`: classifies a folder of images, given a few examples of each class."""

import argparse
import csv
import io
import os
import pathlib
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from metasgd_jax.cli.telling import how_many, load_model, say


def add(commands: Any) -> None:
  """Adds this command to the subparsers `commands`."""
  parser = commands.add_parser(
    'predict',
    help='sort a folder of pictures by a few examples',
    usage='%(prog)s --support=DIR --query=DIR --out=DIR [options]',
    description='Adapts to the classes of --support in one step, and sorts the pictures of --query among them.',
  )
  parser.add_argument('--model', default='omniglot', help="a model's file or name (default: omniglot)")
  parser.add_argument('--support', metavar='DIR', required=True, help='examples: a sub-folder for each class')
  parser.add_argument('--query', metavar='DIR', required=True, help='the pictures to sort')
  parser.add_argument('--out', metavar='DIR', required=True, help='gets predictions.csv and predictions.png')
  mode = parser.add_mutually_exclusive_group()
  mode.add_argument('--inductive', action='store_true', help='each answer depends on its own picture alone (default)')
  mode.add_argument(
    '--transductive',
    dest='inductive',
    action='store_false',
    help='normalise all of --query together: better where it has dozens of pictures, with all classes among them',
  )
  parser.add_argument(
    '--invert',
    choices=('auto', 'yes', 'no'),
    default='auto',
    help='turn light into dark; auto: of each picture with a light background, where the model wants dark ones',
  )
  parser.set_defaults(inductive=True, prepare=prepare, parser=parser)


def prepare(args: argparse.Namespace) -> Callable[[], None]:
  """Reads and checks all inputs, and adapts the model. Returns a function that predicts and writes the results."""
  from metasgd_jax.datasets import image_folder
  from metasgd_jax.datasets.messages import at_home
  from metasgd_jax.deploy.classifier import FewShotClassifier

  out, query_dir = at_home(args.out), at_home(args.query)
  model = load_model(args.model)
  *size, channels = model.config.image_shape
  fit = 'pad' if model.config.background == 'dark' else 'crop'  # Cropping could cut off strokes.
  how: dict[str, Any] = dict(size=tuple(size), channels=channels, fit=fit, report=say)
  support = image_folder.load(args.support, **how)
  if not 2 <= len(support.names) <= model.config.way:
    raise ValueError(
      f'--support={args.support} has {len(support.names)} class(es), but the model supports '
      f'{how_many(model.config)}; make a sub-folder for each class'
    )
  query = image_folder.read_images(query_dir, **how)
  _check_out(out, {'--support': at_home(args.support), '--query': query_dir})
  invert: Any = {'auto': 'auto', 'yes': True, 'no': False}[args.invert]
  classifier = FewShotClassifier(model, inductive=args.inductive, invert=invert)
  sizes = [int(n) for n in support.bank.sizes]
  say('adapting, and compiling for it first, which takes some seconds')
  classifier.fit(support.bank.images, np.repeat(np.arange(len(sizes)), sizes))
  names = [path.relative_to(query_dir) for path in query.paths]
  examples = {path.resolve() for path in support.paths}
  seen = [path.resolve() in examples for path in query.paths]
  return lambda: _predict(classifier, support, sizes, query, names, seen, out)


def _predict(classifier, support, sizes, query, names: list[pathlib.Path], seen: list[bool], out: pathlib.Path) -> None:
  """Predicts, draws, writes and reports. Images that were `seen` among the examples do not count for the accuracy."""
  from metasgd_jax.io import files

  say(f'answering {len(names)} pictures')
  probabilities = classifier.predict_proba(query.images)
  answers = [support.names[i] for i in probabilities.argmax(1)]
  known = [len(name.parts) > 1 and name.parts[0] in support.names for name in names]
  truth = [name.parts[0] if k and not s else None for name, k, s in zip(names, known, seen, strict=True)]
  examples = np.split(support.bank.images, np.cumsum(sizes)[:-1])
  picture = _draw(support.names, examples, query.images, probabilities, [str(name) for name in names], truth)
  results = {'predictions.csv': _table(support.names, names, answers, probabilities)}
  if picture is not None:
    results['predictions.png'] = picture
  try:
    out.mkdir(parents=True, exist_ok=True)
    for name, data in results.items():
      with files.atomic(out / name, 'give another --out') as file:
        file.write(data)
    if picture is None:  # A file of an earlier run would look like a result of this run.
      (out / 'predictions.png').unlink(missing_ok=True)
  except OSError as e:
    raise files.WriterError(f'{out} cannot be written ({e.strerror}); give another --out') from e

  say()
  say(f'classes: {_counted(dict(zip(support.names, sizes, strict=True)))}')
  say(f'answers: {_counted(Counter(answers))}')
  if classifier.inverted_:
    say('light and dark were exchanged, as the model wants')
  if skipped := len(support.skipped) + len(query.skipped):
    say(f'skipped: {skipped} that cannot be read, named above')
  if left_out := sum(k and s for k, s in zip(known, seen, strict=True)):
    are, them = ('picture is', 'it') if left_out == 1 else ('pictures are', 'them')
    say(f'{left_out} {are} among the examples too; the accuracy leaves {them} out')
  if right := [a == t for a, t in zip(answers, truth, strict=True) if t is not None]:
    say(f'accuracy: {np.mean(right):.1%} of {len(right)} pictures in folders named like a class')
  say(f'results: {" and ".join(str(out / name) for name in results)}')
  if picture is None:
    say("there is no predictions.png, for want of matplotlib; pip install 'metasgd_jax[plots]'")


def _check_out(out: pathlib.Path, inputs: Mapping[str, pathlib.Path]) -> None:
  """Raises WriterError if the results cannot be written, or if the next run would read them as images."""
  from metasgd_jax.io.files import WriterError

  for flag, folder in inputs.items():
    if pathlib.Path(os.path.realpath(out)).is_relative_to(os.path.realpath(folder)):  # Path.resolve fails on loops.
      raise WriterError(f'--out={out} lies in {flag}, so results would mix with images there; give another --out')
  there = next(path for path in (out, *out.absolute().parents) if path.exists())
  if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
    why = 'cannot be written' if there.is_dir() else 'is a file'
    raise WriterError(f'--out={out} cannot be written, because {there} {why}; give another --out')


def _table(classes: Sequence[str], names: Iterable[pathlib.Path], answers, probabilities: np.ndarray) -> bytes:
  text = io.StringIO()
  writer = csv.writer(text, lineterminator='\n')
  writer.writerow(['file', 'prediction', *classes])
  for name, answer, row in zip(names, answers, probabilities, strict=True):
    writer.writerow([name, answer, *(f'{p:.6f}' for p in row)])
  return text.getvalue().encode(errors='surrogateescape')


def _draw(classes, examples, query, probabilities, names, truth) -> bytes | None:
  """Returns the sheet of predictions as PNG, or None if matplotlib is not installed."""
  try:
    from metasgd_jax import plotting
  except ImportError:
    return None
  shown = lambda text: text.encode(errors='replace').decode()  # A file name that is not valid text has surrogates.
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
    warnings.filterwarnings('ignore', 'Glyph .* missing')  # Characters that the font lacks are shown as boxes.
    figure.savefig(file, format='png', dpi=150)
  return file.getvalue()


def _counted(counts: Mapping[str, int]) -> str:
  return ', '.join(f'{name} {count}' for name, count in sorted(counts.items()))
