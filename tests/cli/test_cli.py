import csv
import io
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
from picture_folders import SHAPES, SHOWN, left, predict, save
from PIL import Image
from problems import saying
from small_models import small_model

import metasgd_jax as ms
from metasgd_jax import cli, plotting


@pytest.mark.parametrize('mode', ['--inductive', '--transductive'])
def test_a_folder_nobody_prepared_is_sorted(folders, model_file, mode, capsys):
  assert predict(folders, model_file, mode) == 0
  out, err = capsys.readouterr()
  assert err == ''
  assert 'broken.png' in out
  assert 'skipped unreadable files: 1, listed above' in out
  assert 'classes: blot 2, columns 1, diagonals 3, frame 4, rows 2' in out
  assert '% of 5 pictures in folders named like a class' in out
  assert 'among the examples' not in out
  assert left(folders / 'out') == ['predictions.csv', 'predictions.png']

  with (folders / 'out' / 'predictions.csv').open(newline='', encoding='utf-8') as file:
    rows = list(csv.DictReader(file))
  assert list(rows[0]) == ['file', 'prediction', *SHOWN]
  assert [row['file'] for row in rows] == [
    '0.png', *(f'{name}/one, two.png' for name in sorted(SHAPES)), 'unsorted/deep/größe $x$.jpg'
  ]  # fmt: skip
  for row in rows:
    probabilities = {name: float(row[name]) for name in SHOWN}
    assert sum(probabilities.values()) == pytest.approx(1, abs=1e-5)
    assert row['prediction'] == max(probabilities, key=probabilities.get)
  right = [row['prediction'] == pathlib.Path(row['file']).parts[0] for row in rows[1:6]]
  assert np.mean(right) >= 0.8
  assert f'accuracy: {np.mean(right):.1%} of 5' in out
  with Image.open(folders / 'out' / 'predictions.png') as sheet:
    sheet.load()
    assert min(sheet.size) > 500


def test_pictures_adapted_to_are_not_judged(folders, model_file, capsys):
  (folders / 'query' / 'rows' / 'again.png').symlink_to(folders / 'support' / 'rows' / '0.png')
  (folders / 'query' / 'again.png').symlink_to(folders / 'support' / 'rows' / '0.png')
  assert predict(folders, model_file) == 0
  out = capsys.readouterr().out
  assert re.search(saying('1 picture is among the examples', 'leaves it out'), out)
  assert '% of 5 pictures in folders named like a class' in out
  assert predict(folders, model_file, '--overwrite', query=folders / 'support') == 0
  out = capsys.readouterr().out
  assert re.search(saying('12 pictures are among the examples', 'leaves them out'), out)
  assert 'accuracy:' not in out


@pytest.mark.parametrize(('flags', 'inductive'), [([], True), (['--inductive'], True), (['--transductive'], False)])
def test_inductive_unless_told_otherwise(flags, inductive):
  assert cli.parse(['predict', '--support=a', '--query=b', '--out=c', *flags]).inductive is inductive


def test_light_paper_is_turned(folders, model_file, capsys):
  for path in [*folders.rglob('*.png'), *folders.rglob('*.[jJ][pP][gG]')]:
    if path.name != 'broken.png':
      with Image.open(path) as image:
        image.convert('L').point(lambda v: 255 - v).save(path)
  assert predict(folders, model_file) == 0
  assert '19 of 19 pictures have light paper and were inverted; see --invert' in capsys.readouterr().out
  save(folders / 'query' / '0.png', 'blot', seed=21)
  assert predict(folders, model_file, '--overwrite') == 0
  assert '18 of 19 pictures have light paper' in capsys.readouterr().out
  assert predict(folders, model_file, '--invert=no', '--overwrite') == 0
  assert 'inverted' not in capsys.readouterr().out


def test_without_matplotlib_there_is_the_table(folders, model_file, capsys, monkeypatch):
  (folders / 'out').mkdir()
  (folders / 'out' / 'predictions.png').write_text('of an earlier run')
  monkeypatch.setitem(sys.modules, 'metasgd_jax.plotting', None)
  monkeypatch.delattr(ms, 'plotting', raising=False)
  assert predict(folders, model_file, '--overwrite') == 0
  assert 'pip install matplotlib' in capsys.readouterr().out
  assert left(folders / 'out') == ['predictions.csv']


def empty_class(folders):
  (folders / 'support' / 'nothing').mkdir()


def one_class(folders):
  for name in list(SHOWN)[1:]:
    (folders / 'support' / name).rename(folders / name)


def no_classes(folders):
  (folders / 'support').rename(folders / 'other')
  save(folders / 'support' / 'a.png', 'rows', 0)


def six_classes(folders):
  save(folders / 'support' / 'more' / 'a.png', 'rows', 0)


def no_support(folders):
  (folders / 'support').rename(folders / 'other')


def no_query(folders):
  (folders / 'query').rename(folders / 'other')


def query_is_a_file(folders):
  no_query(folders)
  save(folders / 'query.png', 'rows', 0)
  (folders / 'query.png').rename(folders / 'query')


def unreadable_query(folders):
  no_query(folders)
  (folders / 'query').mkdir()
  (folders / 'query' / 'a.png').write_text('a')


def out_is_a_file(folders):
  (folders / 'out').write_text('here')


def out_is_under_a_file(folders):
  (folders / 'file').write_text('here')


def results_are_there(folders):
  (folders / 'out').mkdir()
  (folders / 'out' / 'predictions.csv').write_text('mine')


def nothing(folders):
  pass


@pytest.mark.parametrize(
  ('spoil', 'changes', 'message'),
  [
    (empty_class, {}, ('nothing',)),
    (one_class, {}, ('/support has 1 class', '2 to 5 classes')),
    (no_classes, {}, ('no sub-folders',)),
    (six_classes, {}, ('/support has 6 class', '2 to 5 classes')),
    (no_support, {}, ('/support does not exist',)),
    (no_query, {}, ('/query does not exist',)),
    (query_is_a_file, {}, ('/query is a file',)),
    (unreadable_query, {}, ('/query has no image', 'can be read')),
    (out_is_a_file, {}, ('/out is a file', 'give another --out')),
    (out_is_under_a_file, {'out': 'file/out'}, ('/file is a file', 'give another --out')),
    (results_are_there, {}, ('/out/predictions.csv exists', '--out', '--overwrite')),
    (nothing, {'out': 'query/out'}, ('--out', 'lies in --query', 'give another --out')),
    (nothing, {'out': 'support'}, ('--out', 'lies in --support', 'give another --out')),
    (nothing, {'model': 'support/frame/broken.png'}, ('broken.png', 'not a safetensors file')),
    (nothing, {'model': 'none.safetensors'}, ('no model file', 'none.safetensors')),
  ],
)
def test_a_mistake_is_one_sentence_and_nothing_is_written(folders, model_file, spoil, changes, message, capsys):
  spoil(folders)
  before = left(folders)
  assert predict(folders, model_file, **{name: folders / value for name, value in changes.items()}) == 1
  err = capsys.readouterr().err
  assert err.startswith('error: ')
  assert re.search(saying(*message), err)
  assert err.count('\n') == 1
  assert left(folders) == before


def test_a_disk_that_fails_in_the_end_is_told_too(folders, model_file, capsys, monkeypatch):
  def full(*args, **kwargs):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr('metasgd_jax.io.files.atomic', full)
  assert predict(folders, model_file) == 1
  err = capsys.readouterr().err
  assert err.startswith('error: ')
  assert re.search(saying(folders / 'out', 'No space left on device', 'give another --out'), err)
  assert err.count('\n') == 1


@pytest.mark.parametrize(
  ('argv', 'message'),
  [
    (['predit'], ('invalid choice', "'predit'", 'predict', 'info', 'export')),
    (['predict', '--suport=a', '--query=b', '--out=c'], ('required: --support',)),
    (['predict', '--support=a', '--query=b', '--out=c', '--inductve'], ('--inductive', 'unrecognized', '--inductve')),
    (['predict', '--support=a', '--query=b', '--out=c', '--invert=maybe'], ('invalid choice', "'maybe'")),
    (['predict', '--support=a', '--query=b', '--out=c', '--inductive', '--transductive'], ('not allowed with',)),
    (['predict', '--min-likeness=1.5'], ('--min-likeness', 'auto or a number from 0 to 1', "got '1.5'")),
    (['predict', '--min-likeness=x'], ('--min-likeness', 'auto or a number from 0 to 1', "got 'x'")),
    (['predict', '--invert', 'atuo'], ('--invert', "'atuo'", 'auto', 'yes', 'no')),
    (['export', '--out=a', '--platform=cpu'], ('[--platforms', 'unrecognized arguments: --platform=cpu')),
    (['info', '--modle=a'], ('[--model', 'unrecognized arguments: --modle=a')),
    (['predict', '--support=a', '--query=b', '--out=c', '--move-to='], ('--move-to is empty; give a folder',)),
    (['predict', '--support=a', '--query=b', '--out=c', '--copy-to='], ('--copy-to is empty; give a folder',)),
    (['predict', '--support=a', '--query=b', '--out='], ('--out is empty; give a folder, such as .',)),
    (['predict', '--support=', '--query=b', '--out=c'], ('--support is empty; give a folder',)),
    (['predict', '--support=a', '--query=', '--out=c'], ('--query is empty; give a folder',)),
    (['info', '--model='], ('--model is empty; give the path of a file',)),
    (['export', '--out='], ('--out is empty; give the path of a file',)),
    ([], ('required', 'command')),
  ],
)  # fmt: skip
def test_a_mistyped_command_or_flag(argv, message, capsys):
  with pytest.raises(SystemExit) as e:
    cli.main(argv)
  assert e.value.code == 2
  assert re.search(saying(*message), capsys.readouterr().err)


@pytest.mark.parametrize('argv', [['--help'], *([name, '--help'] for name in ('demo', 'predict', 'info', 'export'))])
def test_help_fits_a_screen(argv, capsys, monkeypatch):
  monkeypatch.setenv('COLUMNS', '80')
  with pytest.raises(SystemExit) as e:
    cli.main(argv)
  assert e.value.code == 0
  lines = capsys.readouterr().out.splitlines()
  assert len(lines) <= 24
  assert max(map(len, lines)) <= 80


def test_info_says_what_a_model_is(tmp_path, capsys):
  facts = {'dataset': 'glyphs', 'meta_iterations': 60_000, 'accuracy': 0.987, 'transductive': True, 'seeds': [0, 1]}
  model = small_model(training=facts)
  alpha = {k: {n: np.full_like(a, -0.25) for n, a in v.items()} for k, v in model.meta.alpha.items()}
  ms.save_model(tmp_path / 'm', model._replace(meta=model.meta._replace(alpha=alpha)))
  assert cli.main(['info', f'--model={tmp_path / "m"}']) == 0
  out = capsys.readouterr().out
  count = sum(a.size for v in alpha.values() for a in v.values())
  for words in (
    'Meta-SGD, 1 inner step', '4 filters, hidden layer 8', '2 to 5', '28x28, grey, light on a dark background',
    f'{count:,}', 'mean -0.25, 100.0% negative', ' MB', '60,000', '0.987', 'yes', '0, 1',
  ):  # fmt: skip
    assert words in out


def test_info_of_maml_and_of_nothing_known(model_file, capsys):
  assert cli.main(['info', f'--model={model_file}']) == 0
  out = capsys.readouterr().out
  assert 'MAML, 20 inner step(s)' in out
  assert '0.2, one rate for all' in out
  assert 'the file has no facts about it' in out


def test_info_of_no_model(capsys):
  assert cli.main(['info', '--model=/no/such']) == 1
  err = capsys.readouterr().err
  assert err.startswith('error: ')
  assert re.search(saying('no model file', '/no/such'), err)


def test_info_lists_the_models_that_ship(capsys):
  assert cli.main(['info']) == 0
  assert 'omniglot: ' in capsys.readouterr().out


def test_the_module_runs_as_the_command_does():
  run = subprocess.run([sys.executable, '-m', 'metasgd_jax', '--version'], capture_output=True, text=True, check=True)
  assert run.stdout == f'metasgd_jax {ms.__version__}\n'


def test_the_sheet_shows_every_class_and_judges_what_is_known():
  support = [np.zeros((n, 16, 16, 1)) for n in (1, 12)]
  query = np.zeros((45, 16, 16, 3))
  probabilities = np.tile([0.25, 0.75], (45, 1))
  truth = ['b', 'a', None] + [None] * 42
  figure = plotting.prediction_sheet(['a', 'b'], support, query, probabilities, [f'{i}.png' for i in range(45)], truth)
  figure.canvas.draw()
  assert len(figure.axes) == 1 + 10 + 40
  answers = [t for t in figure.texts if t.get_text() == 'b 75%']
  assert len(answers) == 40
  assert [t.get_color() for t in answers[:3]] == ['#1a7f37', '#c62828', '#2166ac']
  texts = [t.get_text() for t in figure.texts]
  assert 'its answers: 40 of 45 pictures, the least certain of each answer' in texts
  assert 'green: right, red: wrong, blue: true class not known' in texts


def test_the_sheet_shows_what_is_unsure_and_the_least_certain_of_each_answer():
  support, query = [np.zeros((1, 16, 16, 1))] * 2, np.zeros((100, 16, 16, 1))
  first = np.concatenate([np.linspace(0.9, 0.6, 60), np.full(10, 0.1), np.full(30, 0.99)])
  names, classes = [f'{i}.png' for i in range(100)], ['character01', 'b']
  sure = np.maximum(first, 1 - first) > 0.7
  probabilities = np.stack([first, 1 - first], 1)
  figure = plotting.prediction_sheet(classes, support, query, probabilities, names, ['b'] * 100, sure)
  texts = {t.get_text(): t.get_color() for t in figure.texts}
  assert [name for name in names if name in texts] == names[25:40] + names[45:70]
  assert texts['unsure 60%'] == '#777777'
  assert texts['char…r01 70%'] == '#c62828'
  assert texts['b 90%'] == '#1a7f37'
  assert 'green: right, red: wrong, grey: unsure' in texts


def test_help_that_the_terminal_cannot_encode_is_escaped(monkeypatch):
  out = io.TextIOWrapper(io.BytesIO(), 'ascii')
  monkeypatch.setattr(sys, 'stdout', out)
  monkeypatch.setattr(cli, 'parse', lambda argv: sys.exit(print('\u2212', flush=True)))
  with pytest.raises(SystemExit):
    cli.main(['--help'])
  assert out.buffer.getvalue() == b'\\u2212\n'
