"""Zip and tar files that lead outside, swell, or break."""

import io
import os
import struct
import tarfile
import zipfile
import zlib

import pytest
from fuzz.guard import refused, watched

from metasgd_jax.datasets import DatasetError, archives


class TestArchives:
  def unpack(self, tmp_path, data, name='a.tar.gz'):
    (tmp_path / name).write_bytes(data)
    return refused(lambda: archives.unpack(tmp_path / name, tmp_path / 'out'), tmp_path, DatasetError)

  def tar(self, *members):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode='w:gz') as archive:
      for name, changes in members:
        info = tarfile.TarInfo(name)
        for field, value in changes.items():
          setattr(info, field, value)
        archive.addfile(info, io.BytesIO(bytes(info.size)))
    return file.getvalue()

  @pytest.mark.parametrize('name', ['../escaped', '/escaped', 'a/../../escaped', 'link/escaped'])
  def test_zip_members_stay_inside(self, tmp_path, name):
    link = zipfile.ZipInfo('link')
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / 'a.zip', 'w') as archive:
      archive.writestr(name, b'x')
      archive.writestr(link if 'link' not in name else 'other', '..')
    watched(lambda: archives.unpack(tmp_path / 'a.zip', tmp_path / 'out'), tmp_path / 'out', (DatasetError,))
    assert {path.name for path in tmp_path.iterdir()} == {'a.zip', 'out'}
    assert not any(path.is_symlink() for path in tmp_path.rglob('*'))

  @pytest.mark.parametrize('kind', [tarfile.SYMTYPE, tarfile.LNKTYPE])
  def test_links_in_tar_files_are_refused_even_to_members(self, tmp_path, kind):
    data = self.tar(('a/b', dict(size=3)), ('a/c', dict(type=kind, linkname='a/b' if kind == tarfile.LNKTYPE else 'b')))
    assert 'outside of the target folder' in self.unpack(tmp_path, data)

  @pytest.mark.parametrize('kind', [tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
  def test_devices_and_pipes_in_tar_files_are_refused(self, tmp_path, kind):
    data = self.tar(('zero', dict(type=kind, devmajor=1, devminor=5)))
    assert 'do not trust this archive' in self.unpack(tmp_path, data)

  @pytest.mark.parametrize('compression', [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
  def test_a_zip_bomb_is_refused_before_it_is_unpacked(self, tmp_path, monkeypatch, compression):
    monkeypatch.setattr(archives, 'MOST_BYTES', 1 << 20)
    with zipfile.ZipFile(file := io.BytesIO(), 'w', compression) as archive:
      for i in range(2):
        archive.writestr(f'{i}', bytes(1 << 20))
    assert 'unpacks to more than 1 MiB' in self.unpack(tmp_path, file.getvalue(), 'a.zip')
    assert not (tmp_path / 'out').exists()

  def test_a_zip_file_that_says_too_little_of_its_bomb(self, tmp_path):
    with zipfile.ZipFile(file := io.BytesIO(), 'w', zipfile.ZIP_DEFLATED) as archive:
      archive.writestr('a', bytes(1 << 26))
    data = file.getvalue().replace(struct.pack('<I', 1 << 26), struct.pack('<I', 100))
    assert 'is broken' in self.unpack(tmp_path, data, 'a.zip')
    assert sum(path.stat().st_size for path in (tmp_path / 'out').iterdir()) <= 100

  def test_too_many_members(self, tmp_path, monkeypatch):
    monkeypatch.setattr(archives, 'MOST_MEMBERS', 10)
    assert 'has more than 10 members' in self.unpack(tmp_path, self.tar(*((f'{i}', {}) for i in range(11))))

  @pytest.mark.parametrize('name', ['a', 'longname'])
  def test_a_tar_bomb_is_refused_before_it_takes_room(self, tmp_path, name):
    """A file of 4 GiB, or a header of 1 GiB that tarfile would read into memory."""
    info = tarfile.TarInfo(name)
    info.size, info.type = (4 << 30, tarfile.REGTYPE) if name == 'a' else (1 << 30, tarfile.GNUTYPE_LONGNAME)
    squeeze = zlib.compressobj(1, wbits=31)
    zeros = squeeze.compress(info.tobuf(tarfile.GNU_FORMAT)) + squeeze.compress(bytes(1 << 24)) + squeeze.flush()
    said = self.unpack(tmp_path, zeros)
    assert 'unpacks to more than' in said or 'header of more than 16 MiB' in said

  def test_zeros_without_end_behind_a_tar_file(self, tmp_path, monkeypatch):
    monkeypatch.setattr(archives, 'MOST_BYTES', 1 << 22)
    data = zlib.decompress(self.tar(('a', dict(size=3))), 31) + bytes(1 << 24)
    squeeze = zlib.compressobj(1, wbits=31)
    assert 'unpacks to more than 4 MiB' in self.unpack(tmp_path, squeeze.compress(data) + squeeze.flush())

  def test_a_tar_file_unpacks_and_breaks_in_a_sentence(self, tmp_path):
    data = self.tar(('a/b', dict(size=3000)), ('c', dict(size=5)))
    (tmp_path / 'whole.tar.gz').write_bytes(data)
    assert archives.is_archive(tmp_path / 'whole.tar.gz')
    archives.unpack(tmp_path / 'whole.tar.gz', tmp_path / 'whole')
    assert (tmp_path / 'whole' / 'a' / 'b').read_bytes() == bytes(3000)
    broken = bytearray(data)
    broken[len(data) // 2] ^= 0xFF
    assert 'a.tar.gz is broken' in self.unpack(tmp_path, bytes(broken))

  def test_a_broken_zip_file_in_lzma(self, tmp_path):
    with zipfile.ZipFile(file := io.BytesIO(), 'w', zipfile.ZIP_LZMA) as archive:
      archive.writestr('a', os.urandom(300))
    data = bytearray(file.getvalue())
    data[60:200] = bytes(140)
    assert 'a.zip is broken' in self.unpack(tmp_path, bytes(data), 'a.zip')
