"""Checks that the files in dist/ could be released, and prints what is missing. It uploads nothing.

`make release` runs this program after the tests, the pages and the packages.
"""

import datetime
import pathlib
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile

ROOT = pathlib.Path(__file__).resolve().parents[1]


def missing(root: pathlib.Path, status: str, tags: str) -> list[str]:
  """Returns what stands against a release, as sentences.

  Args:
    root: Directory of the clone.
    status: Output of `git status --porcelain`.
    tags: Output of `git tag`.
  """
  read = lambda name: (root / name).read_text(encoding='utf-8')
  version = re.findall(r"__version__ = '(.+)'", read('metasgd_jax/version.py'))[0]
  title = re.findall(r'^## (.+)$', read('CHANGELOG.md'), re.MULTILINE)[0]
  address = tomllib.loads(read('pyproject.toml'))['project']['urls']['Repository']
  found = []
  if status:
    found.append(f'the clone has changes that are not committed: {status.split()[1]}; commit them')
  if f'v{version}' in tags.split():
    found.append(f'the tag v{version} exists; raise __version__ in metasgd_jax/version.py')
  if not (re.fullmatch(rf'{re.escape(version)}, (\d{{4}}-\d\d-\d\d)', title) and _is_date(title[-10:])):
    wanted = f'{version}, {datetime.date.today()}'
    found.append(f'the first section of CHANGELOG.md is {title!r}; date it, as in {wanted!r}')
  if 'OWNER' in address:
    found.append(f'pyproject.toml has the address {address}; give the address of the repository')
  for name, names in _built(root, version).items():
    if names is None:
      found.append(f'dist/{name} is missing; run make package')
    elif not any(one.endswith('deploy/models/omniglot.safetensors') for one in names):
      found.append(f'dist/{name} lacks the trained models; see package-data in pyproject.toml')
  return found


def _is_date(text: str) -> bool:
  try:
    return bool(datetime.date.fromisoformat(text))
  except ValueError:
    return False


def _built(root: pathlib.Path, version: str) -> dict[str, list[str] | None]:
  """Returns the names of the files in the wheel and in the sdist, or None for one that is missing."""
  wheel, sdist = (f'metasgd_jax-{version}{ending}' for ending in ('-py3-none-any.whl', '.tar.gz'))
  found: dict[str, list[str] | None] = {wheel: None, sdist: None}
  if (root / 'dist' / wheel).is_file():
    with zipfile.ZipFile(root / 'dist' / wheel) as file:
      found[wheel] = file.namelist()
  if (root / 'dist' / sdist).is_file():
    with tarfile.open(root / 'dist' / sdist) as file:
      found[sdist] = file.getnames()
  return found


if __name__ == '__main__':
  git = lambda *command: subprocess.run(['git', *command], capture_output=True, text=True, check=True, cwd=ROOT).stdout
  if found := missing(ROOT, git('status', '--porcelain'), git('tag')):
    sys.exit('\n'.join(f'not ready: {one}' for one in found))
  print('dist/ is ready; nothing was uploaded')
