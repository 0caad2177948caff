"""`metasgd predict`: classifies a folder of images, given a few examples of each class."""

import argparse
import csv
import io
import os
import pathlib
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from metasgd_jax.cli.arguments import INVERT
from metasgd_jax.cli.choosing import choose, warn_of_other_kind
from metasgd_jax.cli.sorting import UNSURE, put, remove
from metasgd_jax.cli.telling import say
from metasgd_jax.datasets import image_folder
from metasgd_jax.datasets.image_files import REPORTED_ONE_BY_ONE
from metasgd_jax.datasets.messages import printable
from metasgd_jax.deploy.classifier import FewShotClassifier
from metasgd_jax.deploy.inputs import to_invert
from metasgd_jax.deploy.model_file import ModelConfig
from metasgd_jax.io import files

RESULTS = ('predictions.csv', 'predictions.png')
"""Names of the files that are written to --out."""


def run(args: argparse.Namespace) -> None:
  """Reads and checks all inputs, adapts the model, predicts, and writes and reports the results."""
  out, query_dir = files.as_path(args.out), files.as_path(args.query)
  if not 0 <= args.min_probability <= 1:
    raise ValueError(f'--min-probability must be from 0 to 1, got {args.min_probability:g}')
  name, model = choose(args.model, args.support)
  _check_likeness(args, name, model.config)
  support, query = _read(args, model.config)
  may_be_unsure = args.min_probability > 0 or args.min_likeness is not None
  if may_be_unsure and UNSURE in support.names:
    flag = '--min-probability' if args.min_probability else '--min-likeness'
    raise ValueError(f'--support={args.support} has a class {UNSURE!r}, which {flag} uses; rename the class')
  inputs = {'--support': files.as_path(args.support), '--query': query_dir}
  _check_out('--out', out, inputs)
  _check_results(out, args.overwrite)
  move = args.move_to is not None
  sorted_to = args.move_to if move else args.copy_to
  if sorted_to is not None:
    classes = [*support.names, *([UNSURE] if may_be_unsure else [])]
    _check_sorting('--move-to' if move else '--copy-to', files.as_path(sorted_to), classes, out, inputs)
  warn_of_other_kind(name, model.config, (support.bank.images, query.images))
  say('compiling and adapting, which takes some seconds')
  classifier = FewShotClassifier(model, inductive=args.inductive, invert=INVERT[args.invert])
  classifier.fit(support.bank.images, np.repeat(np.arange(len(support.names)), support.bank.sizes))
  say(f'classifying {len(query.paths)} pictures')
  probabilities = classifier.predict_proba(query.images)
  names = [path.relative_to(query_dir) for path in query.paths]
  folders, seen = _folders(names, support.names), _seen(support, query)
  truth = [None if s else folder for s, folder in zip(seen, folders, strict=True)]
  answers = [support.names[i] for i in probabilities.argmax(1)]
  sure, likeness = probabilities.max(1) >= args.min_probability, None
  if args.min_likeness is not None:
    likeness = classifier.likeness(query.images)
    sure &= likeness >= _least_likeness(args.min_likeness, model.config, support.bank.sizes)
  answers = [answer if s else UNSURE for answer, s in zip(answers, sure, strict=True)]
  table = _table(support.names, names, answers, probabilities, likeness)
  picture = _picture(support, query, names, probabilities, truth, sure)
  results = dict(zip(RESULTS, (table, picture), strict=True))
  if sorted_to is not None:
    paths = [path for path, s in zip(query.paths, seen, strict=True) if not s]
    classes = [answer for answer, s in zip(answers, seen, strict=True) if not s]
    copies, new = put(paths, classes, files.as_path(sorted_to), move=move)
  _write(out, results)
  if move:  # The pictures are removed last, because a repeated command finds them all until the results are written.
    remove(paths, copies)
  _report_images(support, query, answers)
  _report_inverted(args.invert, model.config, (support.bank.images, query.images))
  _report_accuracy(answers, truth, left_out=truth.count(None) - folders.count(None))
  if sorted_to is not None:
    done = 'moved' if move else 'copied'
    already = f'; {len(paths) - new} were there already' if new < len(paths) else ''
    say(f'{done} to {sorted_to}, by class: {new} pictures{already}')
    if left := sum(seen):
      say(f'examples of --support are not {done}: {left} pictures')
  say(f'results: {" and ".join(str(out / name) for name, data in results.items() if data)}')


def _read(args: argparse.Namespace, config: ModelConfig) -> tuple[Any, Any]:
  """Returns the support and the query. Raises ValueError if the model does not support the number of classes."""
  height, width, channels = config.image_shape
  form: dict[str, Any] = dict(size=(height, width), channels=channels, fit=config.fit, report=say)
  support = image_folder.load(args.support, **form)
  if not 2 <= len(support.names) <= config.way:
    supports = f'the model supports 2 to {config.way} classes; make a sub-folder for each class'
    raise ValueError(f'--support={args.support} has {len(support.names)} class(es), but {supports}')
  return support, image_folder.read_images(args.query, **form)


def _check_likeness(args: argparse.Namespace, name: str, config: ModelConfig) -> None:
  """Raises ValueError if --min-likeness=auto is given, but the model has no least likeness for this use."""
  if args.min_likeness != 'auto':
    return
  if config.least_likeness is None:
    raise ValueError(
      f'--min-likeness=auto needs a model whose likeness was measured, and that of --model={name} was not; '
      'give a number, such as 0.9, or a model that was trained with --validate_every'
    )
  if not args.inductive:
    raise ValueError('--min-likeness=auto was measured for --inductive, got --transductive; give a number, such as 0.9')


def _least_likeness(given: float | str, config: ModelConfig, sizes: Sequence[int]) -> float:
  """Returns the likeness below which a picture is unsure, and prints it if it is the model's."""
  if given != 'auto':
    return float(given)
  least = config.least_likeness_of(int(np.min(sizes)))
  assert least is not None  # `_check_likeness` has checked it.
  say(f'pictures with a likeness below {least:.3f} are {UNSURE}')
  return least


def _check_out(flag: str, out: pathlib.Path, inputs: Mapping[str, pathlib.Path], folder: str = '') -> None:
  """Raises WriterError if `out` or a folder above it is a file, or if `out` is in one of the input folders.

  If the results were in an input folder, the next run would read them as input images. If `folder` is not empty, the
  folder of this name in `out` is checked in place of `out`.
  """
  what, out = (f'the folder {out / folder} of {flag}' if folder else f'{flag}={out}'), out / folder
  for name, given in inputs.items():
    if pathlib.Path(os.path.realpath(out)).is_relative_to(os.path.realpath(given)):  # Path.resolve fails on loops.
      raise files.WriterError(f'{what} lies in {name}, so results would mix with images there; give another {flag}')
  there = next(path for path in (out, *out.absolute().parents) if os.path.lexists(path))
  if not there.is_dir():
    is_what = 'a file' if there.exists() else 'a broken link'
    raise files.WriterError(f'{what} cannot be written, because {there} is {is_what}; give another {flag}')


def _check_sorting(
  flag: str, into: pathlib.Path, folders: Sequence[str], out: pathlib.Path, inputs: Mapping[str, pathlib.Path]
) -> None:
  """Raises WriterError if `into`, or one of the folders that it may get, is not a place for pictures."""
  for folder in ('', *folders):
    _check_out(flag, into, inputs, folder)
  results = [os.path.realpath(out / name) for name in RESULTS]
  for folder in folders:
    place = pathlib.Path(os.path.realpath(into / folder))
    if any(place.is_relative_to(result) or place == pathlib.Path(result).parent for result in results):
      raise files.WriterError(
        f'the folder {into / folder} of {flag} collides with the results in --out={out}; give another --out'
      )


def _check_results(out: pathlib.Path, overwrite: bool) -> None:
  """Raises WriterError if there are results already, unless `overwrite` is set."""
  for name in () if overwrite else RESULTS:
    if os.path.lexists(out / name):
      raise files.WriterError(f'{out / name} exists; give another --out, or --overwrite to replace it')


def _folders(names: Sequence[pathlib.Path], classes: Sequence[str]) -> list[str | None]:
  """Returns for each image the name of its top folder in --query, or None if no class has this name."""
  folders = [name.parts[0] if len(name.parts) > 1 else None for name in names]
  return [folder if folder in classes else None for folder in folders]


def _seen(support, query) -> list[bool]:
  """Returns whether each query image is also a support image. Such images are neither judged nor sorted."""
  examples = {path.resolve() for path in support.paths}
  return [path.resolve() in examples for path in query.paths]


def _table(
  classes: Sequence[str], names: Sequence[pathlib.Path], answers, probabilities: np.ndarray, likeness: np.ndarray | None
) -> bytes:
  text = io.StringIO()
  writer = csv.writer(text, lineterminator='\n')
  writer.writerow(['file', 'prediction', *classes, *([] if likeness is None else ['likeness'])])
  numbers = probabilities if likeness is None else np.column_stack([probabilities, likeness])
  for name, answer, row in zip(names, answers, numbers, strict=True):
    writer.writerow([name, answer, *(f'{p:.6f}' for p in row)])
  return text.getvalue().encode(errors='surrogateescape')


def _picture(support, query, names, probabilities, truth, sure) -> bytes | None:
  """Returns the sheet of predictions as PNG, or None if matplotlib is not installed."""
  try:
    from metasgd_jax.plotting import prediction_sheet
  except ImportError:
    say('predictions.png is not written, because matplotlib is missing; pip install matplotlib')
    return None
  classes = [printable(name) for name in support.names]
  examples = np.split(support.bank.images / 255, np.cumsum(support.bank.sizes)[:-1])
  names = [printable(str(name)) for name in names]
  truth = [name and printable(name) for name in truth]
  figure = prediction_sheet(classes, examples, query.images / 255, probabilities, names, truth, sure)
  file = io.BytesIO()
  with warnings.catch_warnings():
    warnings.filterwarnings('ignore', 'Glyph .* missing')  # Characters that the font lacks are shown as boxes.
    figure.savefig(file, format='png', dpi=150)
  return file.getvalue()


def _write(out: pathlib.Path, results: Mapping[str, bytes | None]) -> None:
  with files.told(out, 'give another --out'):
    out.mkdir(parents=True, exist_ok=True)
    for name, data in results.items():
      if data is None:  # A file of an earlier run would look like a result of this run.
        (out / name).unlink(missing_ok=True)
      else:
        with files.atomic(out / name, 'give another --out') as file:
          file.write(data)


def _report_images(support, query, answers: Sequence[str]) -> None:
  say('', f'classes: {_counted(dict(zip(support.names, support.bank.sizes, strict=True)))}')
  say(f'answers: {_counted(Counter(answers))}')
  if skipped := len(support.skipped) + len(query.skipped):
    listed = 'listed above' if skipped <= REPORTED_ONE_BY_ONE else 'the first ones are listed above'
    say(f'skipped unreadable files: {skipped}, {listed}')


def _report_inverted(invert: str, config: ModelConfig, parts: Sequence[np.ndarray]) -> None:
  count = sum(int(to_invert(images / 255, INVERT[invert], config).sum()) for images in parts)
  if count:
    why = 'have light paper and ' if invert == 'auto' else ''
    say(f'{count} of {sum(map(len, parts))} pictures {why}were inverted; see --invert')


def _counted(counts: Mapping[str, int]) -> str:
  return ', '.join(f'{name} {count}' for name, count in sorted(counts.items()))


def _report_accuracy(answers: Sequence[str], truth: Sequence[str | None], left_out: int) -> None:
  if left_out:
    are, them = ('picture is', 'it') if left_out == 1 else ('pictures are', 'them')
    say(f'{left_out} {are} among the examples too; the accuracy leaves {them} out')
  pairs = [(answer, true) for answer, true in zip(answers, truth, strict=True) if true is not None]
  if right := [answer == true for answer, true in pairs if answer != UNSURE or true == UNSURE]:
    unsure = f'; {len(pairs) - len(right)} more are unsure' if len(right) < len(pairs) else ''
    say(f'accuracy: {np.mean(right):.1%} of {len(right)} pictures in folders named like a class{unsure}')
