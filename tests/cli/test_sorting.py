"""Pictures are put into a folder for each class, and no file is overwritten or lost."""

import errno
import os
import pathlib
import shutil

import pytest
from problems import saying

from metasgd_jax.cli.sorting import put, remove
from metasgd_jax.io.files import WriterError

ANSWERS = ['cat', 'cat', 'unsure']
WHOLE = {'cat/1.png': b'\0', 'cat/1 (2).png': b'\1', 'unsure/2.jpg': b'\2'}


@pytest.fixture
def given(tmp_path):
  """Three pictures, two of which have the same name."""
  paths = [tmp_path / 'query' / name for name in ('a/1.png', 'b/1.png', '2.jpg')]
  for i, path in enumerate(paths):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes([i]) * 9)
  return paths


@pytest.fixture(params=['links', 'no links'])
def linking(request, monkeypatch):
  """A file system with hard links, and one without."""

  def link(*_):
    raise OSError(errno.EPERM, 'Operation not permitted')

  if request.param == 'no links':
    monkeypatch.setattr(os, 'link', link)


def contents(folder):
  return {str(path.relative_to(folder)): path.read_bytes()[:1] for path in folder.rglob('*') if path.is_file()}


def move(paths, answers, into):
  copies, new = put(paths, answers, into, move=True)
  remove(paths, copies)
  return new


def test_equal_names_get_numbers(tmp_path, given, linking):
  copies, new = put(given, ANSWERS, tmp_path / 'out', move=False)
  assert new == 3
  assert [path.name for path in copies] == ['1.png', '1 (2).png', '2.jpg']
  assert contents(tmp_path / 'out') == WHOLE
  assert [copy.samefile(path) for copy, path in zip(copies, given, strict=True)] == [False] * 3
  assert move(given, ANSWERS, tmp_path / 'moved') == 3
  assert contents(tmp_path / 'moved') == WHOLE
  assert not any(path.exists() for path in given)


def test_a_second_call_copies_nothing_again_and_finishes_a_move(tmp_path, given, linking):
  put(given, ANSWERS, tmp_path / 'out', move=True)
  assert all(path.exists() for path in given)
  assert put(given, ANSWERS, tmp_path / 'out', move=False)[1] == 0
  assert move(given, ANSWERS, tmp_path / 'out') == 0
  assert contents(tmp_path / 'out') == WHOLE
  assert not any(path.exists() for path in given)


def test_links_are_copied_and_are_not_taken_for_copies(tmp_path, given, linking):
  """A link among the pictures may be relative. A link in the folder may lead to the picture that is removed."""
  (tmp_path / 'query' / '3.png').symlink_to('2.jpg')
  (tmp_path / 'out' / 'cat').mkdir(parents=True)
  (tmp_path / 'out' / 'cat' / '2.jpg').symlink_to(given[2])
  assert move([given[2], tmp_path / 'query' / '3.png'], ['cat', 'cat'], tmp_path / 'out') == 2
  assert contents(tmp_path / 'out') == {'cat/2 (2).jpg': b'\2', 'cat/3.png': b'\2'}
  assert not (tmp_path / 'query' / '3.png').is_symlink()


def test_a_picture_in_its_folder_stays_there(tmp_path, given, linking):
  (tmp_path / 'out').symlink_to(tmp_path / 'query', target_is_directory=True)
  before = contents(tmp_path / 'query')
  assert move(given[:1], ['a'], tmp_path / 'out') == 0
  assert contents(tmp_path / 'query') == before


def test_a_long_name_needs_no_longer_one(tmp_path):
  name = 'x' * 251 + '.png'
  (tmp_path / name).write_bytes(b'\0')
  put([tmp_path / name], ['cat'], tmp_path / 'out', move=False)
  assert contents(tmp_path / 'out') == {f'cat/{name}': b'\0'}


def no_space(path, aside):
  if path.suffix == '.jpg':
    aside.write_bytes(b'half')
    raise OSError(errno.ENOSPC, 'No space left on device')
  pathlib.Path(aside).write_bytes(path.read_bytes())


def test_a_full_disk_loses_no_picture(tmp_path, given, monkeypatch):
  monkeypatch.setattr(shutil, 'copyfile', no_space)
  message = saying(given[2], tmp_path / 'out' / 'unsure', 'No space left', '2 of 3 pictures', 'free disk space')
  with pytest.raises(WriterError, match=message):
    put(given, ANSWERS, tmp_path / 'out', move=False)
  assert contents(tmp_path / 'out') == {'cat/1.png': b'\0', 'cat/1 (2).png': b'\1'}
  assert all(path.exists() for path in given)


def test_nothing_is_left_of_a_copy_that_gets_no_name(tmp_path, given, monkeypatch):
  def replace(*_):
    raise OSError(errno.EIO, 'Input/output error')

  monkeypatch.setattr('pathlib.Path.replace', replace)
  with pytest.raises(WriterError, match=saying(given[0], 'Input/output error', '0 of 3')):
    put(given, ANSWERS, tmp_path / 'out', move=False)
  assert contents(tmp_path / 'out') == {}


def test_a_name_taken_meanwhile_is_not_overwritten(tmp_path, given, linking, monkeypatch):
  (tmp_path / 'out' / 'cat').mkdir(parents=True)
  (tmp_path / 'out' / 'cat' / '1.png').write_bytes(b'mine')
  monkeypatch.setattr('os.path.lexists', lambda path: False)
  for moved in (False, True):
    with pytest.raises(WriterError, match=saying(given[0], 'File exists', 'repeat the command')):
      put(given, ANSWERS, tmp_path / 'out', move=moved)
  assert contents(tmp_path / 'out') == {'cat/1.png': b'm'}


def test_a_missing_picture_is_named(tmp_path, given, linking):
  given[1].unlink()
  message = saying(given[1], 'No such file', '1 of 3 pictures', 'check that the picture exists')
  with pytest.raises(WriterError, match=message):
    put(given, ANSWERS, tmp_path / 'out', move=True)
  assert contents(tmp_path / 'out') == {'cat/1.png': b'\0'}


def test_a_copy_is_on_the_disk_before_its_name_is(tmp_path, given, monkeypatch):
  happened = []
  monkeypatch.setattr(os, 'fsync', lambda _: happened.append('fsync'))
  monkeypatch.setattr('pathlib.Path.replace', lambda path, target: happened.append('replace'))
  put(given[:1], ['cat'], tmp_path / 'out', move=False)
  assert happened == ['fsync', 'replace']
