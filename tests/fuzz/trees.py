"""Trees of files: laid down, taken up, and changed: in what their files hold, or in what is there at all."""

import os
import pathlib
import random
from typing import NamedTuple

from .mutations import ANY, Edit, flip


class Other(NamedTuple):
  """What stands where a file was: a `pipe`, a `folder`, or a `link` to somewhere."""

  kind: str
  target: str = ''


Tree = dict[str, bytes | Other]
"""Files by their path in a folder."""


def write(tree: Tree, folder: pathlib.Path) -> None:
  """Lays a tree down."""
  for name, content in tree.items():
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
      path.write_bytes(content)
    elif content.kind == 'pipe':
      os.mkfifo(path)
    elif content.kind == 'folder':
      path.mkdir(exist_ok=True)
    else:
      path.symlink_to(content.target)


def read(folder: pathlib.Path) -> Tree:
  """Takes a tree up."""
  return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file()}


def change_tree(rng: random.Random, tree: Tree, edits: dict[str, tuple[Edit, ...]]) -> Tree:
  """Changes a tree: mostly what is in one of its files, by the edits for its ending and by those for any.

  Args:
    rng: the chances.
    tree: valid.
    edits: more of them by the endings of files' names; '' for all.
  """
  names = sorted(tree)
  if not names or rng.random() < 0.03:
    return tree
  if rng.random() < 0.12:
    return _rearrange(rng, tree, names)
  changed = dict(tree)
  for name in {rng.choice(names) for _ in range(rng.choice((1, 1, 1, 2, 5)))}:
    own = [edit for ending, these in edits.items() if name.endswith(ending) for edit in these]
    for _ in range(rng.choice((1, 1, 2))):
      content = changed[name]
      assert isinstance(content, bytes)
      edit = rng.choice(own) if own and rng.random() < 0.6 else rng.choice(ANY)
      try:
        changed[name] = edit(rng, content)
      except Exception:
        changed[name] = flip(rng, content)  # It was changed before, and is no longer of its format.
  return changed


def _rearrange(rng: random.Random, tree: Tree, names: list[str]) -> Tree:
  """Puts something else where a file is, or exchanges two."""
  changed, name, other = dict(tree), rng.choice(names), rng.choice(names)
  what = rng.randrange(8)
  if what == 0:
    del changed[name]
  elif what == 1:
    changed[name], changed[other] = changed[other], changed[name]
  elif what == 2:
    changed[name] = Other('pipe')
  elif what == 3:
    changed[name] = Other('folder')
  elif what == 4:
    changed[name] = Other(
      'link', rng.choice((name.rpartition('/')[2], '..', '.', 'nowhere', '/dev/zero', '/proc/self/mem'))
    )
  elif what == 5:
    changed[name] = b''
  elif what == 6:
    folder, _, last = name.rpartition('/')
    odd = rng.choice(('\udcff' + last, '\x1b[31m' + last, 'a\nb' + last, '-' + last, 'e' * 200 + last, last.upper()))
    changed[f'{folder}/{odd}' if folder else odd] = changed.pop(name)
  else:
    folder = name.rpartition('/')[0]
    changed[f'{folder}/loop' if folder else 'loop'] = Other('link', rng.choice(('.', '..', '/', 'loop')))
  return changed
