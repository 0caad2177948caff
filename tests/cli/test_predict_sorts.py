"""`metasgd predict --copy-to` and `--move-to`: which pictures are put where, and what is refused beforehand."""

import csv
import dataclasses
import pathlib
import re

import pytest
from picture_folders import SHOWN, left, predict, save
from problems import saying

import metasgd_jax as ms
from metasgd_jax.cli import choosing
from metasgd_jax.deploy import model_file as model_file_module
from metasgd_jax.io import files


def rows_of(folder):
  with (folder / 'predictions.csv').open(newline='', encoding='utf-8') as file:
    return list(csv.DictReader(file))


def put_at(folder):
  """The pictures in a folder, by the names of their folders and by their bytes."""
  return sorted((path.parent.name, path.read_bytes()) for path in folder.rglob('*') if path.is_file())


def of_table(query, rows):
  return sorted((row['prediction'], (query / row['file']).read_bytes()) for row in rows)


def pictures_in(folder):
  return [path for path in folder.rglob('*') if path.is_file()]


def test_pictures_are_copied_to_the_folders_of_their_classes(folders, model_file, capsys):
  sorted_to, before = folders / 'sorted', left(folders / 'query')
  assert predict(folders, model_file, f'--copy-to={sorted_to}', '--min-probability=0.6') == 0
  rows = rows_of(folders / 'out')
  for row in rows:
    most = max(float(row[name]) for name in SHOWN)
    assert (row['prediction'] == 'unsure') == (most < 0.6)
  assert put_at(sorted_to) == of_table(folders / 'query', rows)
  assert f'copied to {sorted_to}, by class: 7 pictures' in capsys.readouterr().out
  assert left(folders / 'query') == before


def test_pictures_unlike_all_classes_are_unsure(folders, model_file, tmp_path, capsys):
  """With auto the least likeness is the model's, for the least number of examples of a class."""
  assert predict(folders, model_file, '--min-likeness=0', out='all') == 0
  values = sorted(float(row['likeness']) for row in rows_of(folders / 'all'))
  least = (values[2] + values[3]) / 2
  model = ms.load_model(model_file)
  told = tmp_path / 'told.safetensors'
  ms.save_model(told, model._replace(config=dataclasses.replace(model.config, least_likeness=(least, least))))
  sorted_to = folders / 'sorted'
  assert predict(folders, told, '--min-likeness=auto', f'--copy-to={sorted_to}') == 0
  rows = rows_of(folders / 'out')
  assert [row['prediction'] == 'unsure' for row in rows] == [float(row['likeness']) < least for row in rows]
  assert len(pictures_in(sorted_to / 'unsure')) == 3
  assert f'a likeness below {least:.3f} are unsure' in capsys.readouterr().out
  assert predict(folders, told, '--min-likeness=auto', '--transductive', out='other') == 1
  assert re.search(saying('measured for --inductive', 'got --transductive'), capsys.readouterr().err)


def test_pictures_of_another_kind_are_told(folders, model_file, tmp_path, capsys):
  model = ms.load_model(model_file)
  for dataset, warned in (('omniglot', False), ('mini_imagenet', True), ('folder', False)):
    path = tmp_path / f'{dataset}.safetensors'
    ms.save_model(path, model._replace(config=dataclasses.replace(model.config, training={'dataset': dataset})))
    assert predict(folders, path, out=dataset) == 0
    said = f'look like drawings, but the model {path} was trained on photographs'
    assert (said in capsys.readouterr().out) == warned


def test_the_model_is_chosen_by_the_kind_of_the_examples(folders, model_file, tmp_path, capsys, monkeypatch):
  """One model ships for drawings and one for photographs. The examples are drawings, and one of them is damaged."""
  model, shipped = ms.load_model(model_file), tmp_path / 'shipped'
  shipped.mkdir()
  for name, dataset in (('a', 'mini_imagenet'), ('b', 'omniglot')):
    config = dataclasses.replace(model.config, training={'dataset': dataset})
    ms.save_model(shipped / f'{name}.safetensors', model._replace(config=config))
  monkeypatch.setattr(model_file_module, '_SHIPPED', shipped)
  (folders / 'support' / 'blot' / '0.png').write_bytes(b'\x89PNG')
  assert predict(folders, 'auto') == 0
  assert 'the examples look like drawings, so the model is b; --model=NAME' in capsys.readouterr().out
  monkeypatch.setattr(choosing, 'kind_of', lambda images: 'photographs')
  assert predict(folders, 'auto', out='other') == 0
  out = capsys.readouterr().out
  assert 'the examples look like photographs, so the model is a;' in out
  assert 'warning: these pictures look like drawings' not in out
  assert predict(folders, 'b', out='third') == 0
  assert 'the model b was trained on drawings' in capsys.readouterr().out


def test_pictures_are_moved_to_the_folders_of_their_classes(folders, model_file, capsys):
  assert predict(folders, model_file, out='other') == 0
  expected = of_table(folders / 'query', rows_of(folders / 'other'))
  assert predict(folders, model_file, f'--move-to={folders / "sorted"}') == 0
  assert put_at(folders / 'sorted') == expected
  assert pictures_in(folders / 'query') == []
  assert f'moved to {folders / "sorted"}, by class: 7 pictures' in capsys.readouterr().out
  assert len(rows_of(folders / 'out')) == 7


@pytest.mark.parametrize('where', ['support', 'query/examples'])
@pytest.mark.parametrize('flag', ['--copy-to', '--move-to'])
def test_examples_are_not_sorted(folders, model_file, flag, where, capsys):
  """The support is the query, or lies in it."""
  save(folders / 'support' / 'a.png', 'rows', 0)  # It is in no class, so it is no example.
  if where != 'support':
    (folders / 'support').rename(folders / where)
  examples, others = 12, 1 if where == 'support' else 8
  before = left(folders / where)
  query = folders / where.split('/')[0]
  assert predict(folders, model_file, f'{flag}={folders / "sorted"}', support=folders / where, query=query) == 0
  out = capsys.readouterr().out
  assert f'by class: {others} pictures' in out
  assert re.search(saying('examples of --support are not', f'{examples} pictures'), out)
  assert len(pictures_in(folders / 'sorted')) == others
  before = [name for name in before if flag == '--copy-to' or name != 'a.png']
  assert left(folders / where) == before


def test_a_picture_that_an_example_is_a_link_to_is_not_moved(folders, model_file):
  (folders / 'support' / 'blot' / 'linked.png').symlink_to(folders / 'query' / '0.png')
  assert predict(folders, model_file, f'--move-to={folders / "sorted"}') == 0
  assert pictures_in(folders / 'query') == [folders / 'query' / '0.png']


def test_an_interrupted_move_is_repeated_without_a_loss(folders, model_file, capsys, monkeypatch):
  """The first call puts all pictures and cannot write the results. The second call is the same command."""
  before = left(folders / 'query')
  command = f'--move-to={folders / "sorted"}'
  with monkeypatch.context() as patch:
    patch.setattr(files, 'atomic', lambda *_: (_ for _ in ()).throw(OSError(28, 'No space left on device')))
    assert predict(folders, model_file, command) == 1
  assert left(folders / 'query') == before
  assert predict(folders, model_file, command) == 0
  assert 'by class: 0 pictures; 7 were there already' in capsys.readouterr().out
  assert pictures_in(folders / 'query') == []
  assert len(pictures_in(folders / 'sorted')) == len(rows_of(folders / 'out')) == 7


def test_when_a_picture_cannot_be_removed_the_results_are_there(folders, model_file, capsys, monkeypatch):
  unlink = pathlib.Path.unlink

  def forbidden(path, missing_ok=False):
    if path.is_relative_to(folders / 'query'):
      raise PermissionError(13, 'Permission denied')
    unlink(path, missing_ok)

  with monkeypatch.context() as patch:
    patch.setattr(pathlib.Path, 'unlink', forbidden)
    assert predict(folders, model_file, f'--move-to={folders / "sorted"}') == 1
  parts = 'query/0.png cannot be removed', 'sorted', '0 of 7 pictures', 'repeat the command with another --out'
  assert re.search(saying(*parts), capsys.readouterr().err)
  assert len(rows_of(folders / 'out')) == 7
  assert predict(folders, model_file, f'--move-to={folders / "sorted"}', out='other') == 0
  assert pictures_in(folders / 'query') == []
  assert len(pictures_in(folders / 'sorted')) == len(rows_of(folders / 'other')) == 7


def class_is_a_link(folders):
  (folders / 'sorted').mkdir()
  (folders / 'sorted' / 'rows').symlink_to(folders / 'query' / 'rows', target_is_directory=True)


def unsure_is_a_link(folders):
  (folders / 'sorted').mkdir()
  (folders / 'sorted' / 'unsure').symlink_to(folders / 'support', target_is_directory=True)


def class_is_a_file(folders):
  (folders / 'sorted').mkdir()
  (folders / 'sorted' / 'frame').write_text('mine')


def class_is_a_broken_link(folders):
  (folders / 'sorted').mkdir()
  (folders / 'sorted' / 'frame').symlink_to(folders / 'nowhere')


def class_is_named_like_the_query(folders):
  (folders / 'support' / 'rows').rename(folders / 'support' / 'query')


def class_is_named_like_a_result(folders):
  (folders / 'support' / 'rows').rename(folders / 'support' / 'predictions.csv')


def nothing(folders):
  pass


@pytest.mark.parametrize(
  ('spoil', 'flags', 'message'),
  [
    (nothing, ['--min-likeness=auto'], ('--min-likeness=auto', 'a model whose likeness was measured', 'give a number')),
    (nothing, ['--min-probability=1.5'], ('--min-probability must be from 0 to 1', 'got 1.5')),
    (nothing, ['--copy-to={0}/query/sorted'], ('--copy-to=', 'lies in --query')),
    (nothing, ['--move-to={0}/support'], ('--move-to=', 'lies in --support')),
    (class_is_a_link, ['--move-to={0}/sorted'], ('sorted/rows of --move-to', 'lies in --query')),
    (unsure_is_a_link, ['--copy-to={0}/sorted', '--min-probability=0.1'], ('sorted/unsure', 'lies in --support')),
    (class_is_a_file, ['--copy-to={0}/sorted'], ('sorted/frame is a file', 'another --copy-to')),
    (class_is_a_broken_link, ['--copy-to={0}/sorted'], ('sorted/frame is a broken link', 'another --copy-to')),
    (class_is_named_like_the_query, ['--move-to={0}'], ('/query of --move-to', 'lies in --query')),
    (class_is_named_like_a_result, ['--move-to={0}/out'], ('out/predictions.csv of --move-to', 'results in --out=')),
    (nothing, ['--move-to={0}/sorted', '--out={0}/sorted/rows'], ('sorted/rows of --move-to', 'another --out')),
  ],
)
def test_where_pictures_cannot_be_sorted_to(folders, model_file, spoil, flags, message, capsys):
  spoil(folders)
  before = left(folders)
  assert predict(folders, model_file, *(flag.format(folders) for flag in flags)) == 1
  out, err = capsys.readouterr()
  assert re.search(saying(*message), err)
  assert err.count('\n') == 1
  assert 'compiling' not in out
  assert left(folders) == before


def test_a_folder_that_leads_to_the_query_by_a_link_in_the_query(folders, model_file):
  """Pictures that are in the folder of their answer already stay there."""
  assert predict(folders, model_file, f'--copy-to={folders / "sorted"}') == 0
  before = put_at(folders / 'sorted')
  (folders / 'new').mkdir()
  (folders / 'new' / 'link').symlink_to(folders / 'sorted', target_is_directory=True)
  assert predict(folders, model_file, f'--move-to={folders / "sorted"}', query=folders / 'new', out='other') == 0
  assert put_at(folders / 'sorted') == before
