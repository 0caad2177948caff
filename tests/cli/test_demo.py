"""`metasgd demo` draws pictures and sorts them."""

import re

import numpy as np
import pytest
from problems import saying

from metasgd_jax import cli
from metasgd_jax.cli import demo
from metasgd_jax.cli.doodles import THINGS, doodle


def test_the_drawings_are_sorted(tmp_path, capsys):
  out = tmp_path / 'new' / 'demo'
  assert cli.main(['demo', f'--out={out}']) == 0
  right, of = map(int, re.search(r'(\d+) of (\d+) drawings are in the right folder', capsys.readouterr().out).groups())
  assert of == len(list((out / 'sorted').glob('*/*.png'))) == 5 * len(THINGS)
  assert right >= 20
  assert (out / 'results' / 'predictions.png').read_bytes().startswith(b'\x89PNG')
  kept = {path: path.read_bytes() for path in out.rglob('*') if path.is_file()}
  assert cli.main(['demo', f'--out={out}']) == 1
  assert re.search(saying(f'--out={out}', 'not an empty folder', 'give another --out'), capsys.readouterr().err)
  assert {path: path.read_bytes() for path in out.rglob('*') if path.is_file()} == kept


def test_a_file_in_place_of_the_folder(tmp_path, capsys):
  (tmp_path / 'a').write_text('mine')
  assert cli.main(['demo', f'--out={tmp_path / "a"}']) == 1
  assert 'give another --out' in capsys.readouterr().err
  assert (tmp_path / 'a').read_text() == 'mine'


def test_the_truth_says_what_is_drawn(tmp_path):
  """Every thing is drawn as often as the others, and the order differs from that of the names."""
  names = list(demo._draw(tmp_path).values())
  assert sorted(names) == sorted([*THINGS] * 5) != names


@pytest.mark.parametrize('name', THINGS)
def test_drawings_are_strokes_on_light_paper_and_all_different(name):
  rng = np.random.default_rng(0)
  drawings = [np.asarray(doodle(name, rng)) for _ in range(3)]
  for drawing in drawings:
    border = np.concatenate([drawing[0], drawing[-1], drawing[:, 0], drawing[:, -1]])
    assert border.min() > 200  # No stroke reaches the border.
    assert 0.02 < np.mean(drawing < 128) < 0.4
  assert len({drawing.tobytes() for drawing in drawings}) == 3
