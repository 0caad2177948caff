"""Pictures are put into a folder for each class, and no file is overwritten or lost."""

import errno
import os

import pytest
from problems import saying

from metasgd_jax.cli.sorting import put
from metasgd_jax.io.files import WriterError


@pytest.fixture
def given(tmp_path):
  """Three pictures, two of which have the same name."""
  paths = [tmp_path / 'query' / name for name in ('a/1.png', 'b/1.png', '2.jpg')]
  for i, path in enumerate(paths):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes([i]) * 9)
  return paths


def contents(folder):
  return {str(path.relative_to(folder)): path.read_bytes()[:1] for path in folder.rglob('*') if path.is_file()}


WHOLE = {'cat/1.png': b'\0', 'cat/1 (2).png': b'\1', 'unsure/2.jpg': b'\2'}


@pytest.mark.parametrize('move', [False, True])
def test_equal_names_get_numbers(tmp_path, given, move):
  assert put(given, ['cat', 'cat', 'unsure'], tmp_path / 'out', move=move) == 3
  assert contents(tmp_path / 'out') == WHOLE
  assert [path.exists() for path in given] == [not move] * 3


def test_a_second_call_copies_nothing_again(tmp_path, given):
  put(given, ['cat', 'cat', 'unsure'], tmp_path / 'out', move=False)
  assert put(given, ['cat', 'cat', 'unsure'], tmp_path / 'out', move=False) == 0
  assert contents(tmp_path / 'out') == WHOLE


def test_without_links_nothing_is_overwritten_either(tmp_path, given, monkeypatch):
  def link(*_):
    raise OSError(errno.EPERM, 'Operation not permitted')

  monkeypatch.setattr(os, 'link', link)
  assert put(given, ['cat', 'cat', 'unsure'], tmp_path / 'out', move=True) == 3
  assert contents(tmp_path / 'out') == WHOLE


def test_a_full_disk_loses_no_picture(tmp_path, given, monkeypatch):
  def copy(path, aside):
    aside.write_bytes(b'half')
    raise OSError(errno.ENOSPC, 'No space left on device')

  monkeypatch.setattr('shutil.copy2', copy)
  with pytest.raises(WriterError, match=saying(tmp_path / 'out' / 'cat', 'No space left')):
    put(given, ['cat'] * 3, tmp_path / 'out', move=True)
  assert contents(tmp_path / 'out') == {}
  assert all(path.exists() for path in given)
