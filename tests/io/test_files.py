import errno
import io
import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import saying

from metasgd_jax.io import files


def test_a_file_takes_its_name_when_it_is_whole(tmp_path):
  path = tmp_path / 'results.json'
  files.write_json(path, {'a': 1})
  with pytest.raises(RuntimeError, match='half'), files.atomic(path) as file:
    file.write(b'{"a": ')
    raise RuntimeError('half-way')
  assert json.loads(path.read_text()) == {'a': 1}
  assert [p.name for p in tmp_path.iterdir()] == ['results.json']


def test_a_name_may_be_as_long_as_names_can_be(tmp_path):
  path = tmp_path / ('n' * 255)
  files.write_json(path, 1)
  assert path.read_text() == '1\n'


def test_half_written_files_are_those_of_atomic_alone(tmp_path):
  names = ('.a-01234567', '.metasgd_jax-notes', '.metasgd_jax-0123456789abcdef.json', 'metasgd_jax-0123456789abcdef')
  for name in names:
    (tmp_path / name).write_text('mine')
  with files.atomic(tmp_path / 'a'):
    (half,) = files.half_written(tmp_path)
    assert half.name not in ('a', '.a-01234567')
  assert files.half_written(tmp_path) == []


def test_a_file_is_closed_before_it_is_renamed(tmp_path, monkeypatch):
  """Windows renames no open file."""
  replace, closed = pathlib.Path.replace, []
  monkeypatch.setattr('pathlib.Path.replace', lambda *paths: (closed.append(file.closed), replace(*paths)))
  with files.atomic(tmp_path / 'a') as file:
    file.write(b'whole')
  assert closed == [True]
  assert (tmp_path / 'a').read_bytes() == b'whole'


@pytest.mark.parametrize('module', ['fsync', 'replace', 'write'])
def test_a_full_disk_is_told_in_a_sentence_and_leaves_the_old_file(tmp_path, monkeypatch, module):
  path = tmp_path / 'a'
  path.write_text('old')

  def full(*args, **options):
    raise OSError(errno.ENOSPC, 'No space left on device')

  class Full(io.BytesIO):
    write, fileno = full, full

  if module == 'fsync':
    monkeypatch.setattr('os.fsync', full)
  elif module == 'replace':
    monkeypatch.setattr('pathlib.Path.replace', full)
  else:
    monkeypatch.setattr('pathlib.Path.open', lambda path, mode: Full())
  for write in (
    lambda: files.write_json(path, {}),
    lambda: files.write_array(path, np.zeros(3)),
    lambda: files.write_params(path, {'a': np.zeros(3)}),
  ):
    with pytest.raises(files.WriterError, match=saying(f'{path} cannot be written', 'No space left', 'give another')):
      write()
  monkeypatch.undo()
  assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [('a', 'old')]


def test_json_of_arrays_and_infinities(tmp_path):
  value = {
    'mean': np.float32(0.5),
    'ci': float('inf'),
    'steps': jnp.arange(2),
    'path': pathlib.Path('x'),
    'n': np.int64(3),
  }
  files.write_json(tmp_path / 'a.json', value)
  assert json.loads((tmp_path / 'a.json').read_text()) == {
    'mean': 0.5,
    'ci': None,
    'steps': [0, 1],
    'path': 'x',
    'n': 3,
  }


def test_params_come_back(tmp_path):
  params = {'a': np.arange(6.0).reshape(2, 3), 'b': {'c': np.float32(2)}}
  files.write_params(tmp_path / 'p', params)
  like = {'a': np.zeros((2, 3)), 'b': {'c': np.float32(0)}}
  back = files.read_params(tmp_path / 'p', like)
  assert np.array_equal(back['a'], params['a'])
  assert back['b']['c'] == 2


def test_params_of_any_layout_and_dtype_come_back_to_the_bit(tmp_path):
  params = [
    np.arange(6.0, dtype=np.float32).reshape(2, 3).T, np.zeros((0, 2)), jnp.array([0.1, -0.0, jnp.nan], jnp.bfloat16),
    (np.array(True), np.int64(-1)), None, jnp.arange(3),
  ]  # fmt: skip
  files.write_params(tmp_path / 'p', params)
  back = files.read_params(tmp_path / 'p', jax.tree.map(np.zeros_like, params))
  assert jax.tree.structure(back) == jax.tree.structure(params)
  for a, b in zip(jax.tree.leaves(back), map(np.asarray, jax.tree.leaves(params)), strict=True):
    assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


def test_params_in_another_byte_order_come_back(tmp_path):
  params = {'a': np.arange(4, dtype='>f4').reshape(2, 2).T}
  files.write_params(tmp_path / 'p', params)
  back = files.read_params(tmp_path / 'p', params)['a']
  assert back.dtype == np.float32
  assert np.array_equal(back, params['a'])


@pytest.mark.parametrize(
  ('name', 'dtype', 'why'),
  [
    ('a', jnp.float8_e4m3fn, 'because of its dtype; cast it'),
    ('a', jnp.int4, 'because of its dtype; cast it'),
    ('a', np.complex128, 'because of its dtype; cast it'),
    ('__metadata__', np.float32, 'because of its name; rename it'),
    ('a\udcff', np.float32, 'because of its name; rename it'),
  ],
)
def test_params_that_could_not_be_read_are_not_written(tmp_path, name, dtype, why):
  with pytest.raises(ValueError, match=saying(repr(name), f'of dtype {np.dtype(dtype)}', why)):
    files.write_params(tmp_path / 'p', {name: np.zeros(2, dtype)})
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(('name', 'why'), [('', 'Is a directory'), ('x' * 300, 'name too long')])
def test_advice_is_about_the_disk_only_if_it_is_full(tmp_path, name, why):
  with pytest.raises(files.WriterError, match=saying(why, 'give another path')) as e:
    files.write_params(tmp_path / name, {'a': np.zeros(2)})
  assert 'free disk space' not in str(e.value)


def test_params_may_be_in_the_home_directory(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  files.write_params('~/p', {'a': np.ones(2)})
  assert (tmp_path / 'p').is_file()
  assert files.read_params('~/p', {'a': np.ones(2)})['a'].tolist() == [1, 1]


def test_a_workdir_that_is_not_utf8_is_refused(tmp_path):
  with pytest.raises(files.WriterError, match=saying(r'a\udcff', 'is not UTF-8', 'rename it')):
    files.open_workdir(tmp_path / os.fsdecode(b'a\xff'))
  assert not list(tmp_path.iterdir())


def test_a_random_key_is_no_parameter(tmp_path):
  with pytest.raises(TypeError, match='key_data'):
    files.write_params(tmp_path / 'p', {'key': jax.random.key(0)})
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ('data', 'like', 'said'),
  [
    (
      None,
      {'a': np.zeros((3, 2))},
      ('does not hold the expected parameters', 'a is stored as float64[2, 3], expected float64[3, 2]'),
    ),
    (None, {'z': np.zeros((2, 3))}, ('does not hold the expected parameters',)),
    (b'\x81', {'a': np.zeros((2, 3))}, ('does not hold the expected parameters',)),
    (b'', {'a': np.zeros((2, 3))}, ('does not hold the expected parameters',)),
  ],
)
def test_params_that_are_not_those(tmp_path, data, like, said):
  files.write_params(tmp_path / 'p', {'a': np.zeros((2, 3))})
  if data is not None:
    (tmp_path / 'p').write_bytes(data)
  with pytest.raises(ValueError, match=saying(tmp_path / 'p', *said)):
    files.read_params(tmp_path / 'p', like)


@pytest.mark.parametrize('umask', [0o077, 0o022, 0o002])
def test_whoever_may_read_other_files_may_read_these(tmp_path, umask):
  before = os.umask(umask)
  try:
    files.write_json(tmp_path / 'a.json', {})
  finally:
    os.umask(before)
  assert (tmp_path / 'a.json').stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_workdir_of_no_name_is_refused():
  with pytest.raises(files.WriterError, match=saying('workdir is empty', "give a directory, such as '.'")):
    files.open_workdir('')


def test_a_workdir_is_made(tmp_path):
  assert files.open_workdir(tmp_path / 'a' / 'b').is_dir()


def test_a_workdir_that_is_a_file(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(files.WriterError, match=saying(tmp_path / 'file', 'cannot be written (', 'another directory')):
    files.open_workdir(tmp_path / 'file')
