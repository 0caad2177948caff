"""What `make release` asks for."""

import io
import tarfile
import zipfile

import pytest
from release import missing

VERSION = '1.2.3'
MODEL = 'metasgd_jax/deploy/models/omniglot.safetensors'


@pytest.fixture
def clone(tmp_path):
  """A clone that can be released."""
  for name, text in {
    'metasgd_jax/version.py': f"__version__ = '{VERSION}'",
    'CHANGELOG.md': f'# Changelog\n\n## {VERSION}, 2026-11-28\n\n## 1.2.2, 2026-01-01\n',
    'pyproject.toml': '[project.urls]\nRepository = "https://host/someone/metasgd_jax"\n',
  }.items():
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(text)
  (tmp_path / 'dist').mkdir()
  with zipfile.ZipFile(tmp_path / 'dist' / f'metasgd_jax-{VERSION}-py3-none-any.whl', 'w') as file:
    file.writestr(MODEL, 'model')
  with tarfile.open(tmp_path / 'dist' / f'metasgd_jax-{VERSION}.tar.gz', 'w:gz') as file:
    file.addfile(tarfile.TarInfo(f'metasgd_jax-{VERSION}/{MODEL}'), io.BytesIO())
  return tmp_path


def test_a_clone_that_is_ready(clone):
  assert missing(clone, '', 'v1.2.2\n') == []


@pytest.mark.parametrize(
  ('name', 'text', 'about'),
  [
    ('CHANGELOG.md', '## 1.2.3, unreleased', 'CHANGELOG.md'),
    ('CHANGELOG.md', '## 1.2.2, 2026-01-01', 'CHANGELOG.md'),
    ('CHANGELOG.md', '## 1.2.3, 2026-13-01', 'CHANGELOG.md'),
    ('pyproject.toml', '[project.urls]\nRepository = "https://host/OWNER/x"', 'address'),
    ('metasgd_jax/version.py', "__version__ = '1.2.4'", 'dist/metasgd_jax-1.2.4'),
  ],
)
def test_what_stands_against_a_release(clone, name, text, about):
  (clone / name).write_text(text)
  found = missing(clone, '', '')
  assert found
  assert about in ' '.join(found)


def test_changes_tags_and_models(clone):
  assert 'a.py' in missing(clone, ' M a.py\n', '')[0]
  assert 'v1.2.3' in missing(clone, '', 'v1.2.3\n')[0]
  with zipfile.ZipFile(clone / 'dist' / f'metasgd_jax-{VERSION}-py3-none-any.whl', 'w') as file:
    file.writestr('metasgd_jax/version.py', '')
  assert 'trained models' in missing(clone, '', '')[0]
