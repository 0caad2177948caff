"""The notebooks run from top to bottom, and what is committed of them is a whole run with a picture in each section."""

import base64
import io
import pathlib
import re

import nbformat
import pytest
from PIL import Image
from source import absent

NOTEBOOKS = sorted((pathlib.Path(__file__).resolve().parents[2] / 'notebooks').glob('*.ipynb'))
MOST_BYTES = 400_000

notebooks = pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)


def outputs(notebook):
  return [output for cell in notebook.cells for output in cell.get('outputs', [])]


def pictures_by_section(notebook):
  """Of each '## ' heading how many pictures follow before the next, as PNGs."""
  found, heading = {}, None
  for cell in notebook.cells:
    if cell.cell_type == 'markdown' and (title := re.search(r'^## (.+)$', cell.source, re.MULTILINE)):
      heading = title[1]
      found[heading] = []
    for output in cell.get('outputs', []):
      if 'image/png' in output.get('data', {}):
        found[heading].append(output.data['image/png'])
  return found


def test_the_four_notebooks_are_there():
  assert [path.stem for path in NOTEBOOKS] == ['navigation', 'omniglot', 'quickstart', 'your_pipeline']


@notebooks
@pytest.mark.slow
@pytest.mark.filterwarnings('ignore::Warning:zmq', 'ignore::Warning:jupyter_client')
def test_runs_from_top_to_bottom_at_tiny_sizes(path):
  from notebooks.execute import execute

  ran = execute(path, smoke=True)
  assert not [output for output in outputs(ran) if output.output_type == 'error']
  assert not [output.text for output in outputs(ran) if output.get('name') == 'stderr']
  assert all(pictures_by_section(ran).values())


@notebooks
def test_the_code_is_python_and_names_what_the_package_has(path):
  cells = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == 'code']
  code = '\n'.join(re.sub(r'^( *)%.*$', r'\1pass', cell, flags=re.MULTILINE) for cell in cells)
  assert 'ms.' in code
  assert list(absent(code)) == []


@notebooks
def test_each_section_shows_a_picture(path):
  sections = pictures_by_section(nbformat.read(path, as_version=4))
  assert len(sections) >= 4
  for heading, pngs in sections.items():
    assert pngs, heading
    for png in pngs:
      image = Image.open(io.BytesIO(base64.b64decode(png)))
      assert min(image.size) > 100, heading
      assert len(image.convert('L').getcolors()) > 2, f'{heading}: the picture is blank'


@notebooks
def test_what_is_committed_is_one_whole_run_without_errors(path):
  notebook = nbformat.read(path, as_version=4)
  code = [cell for cell in notebook.cells if cell.cell_type == 'code']
  assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
  assert not [output for output in outputs(notebook) if output.output_type == 'error' or output.get('name') == 'stderr']


@notebooks
def test_what_is_committed_names_no_machine(path):
  text = path.read_text()
  notebook = nbformat.read(path, as_version=4)
  assert len(text) < MOST_BYTES
  assert all(not cell.metadata for cell in notebook.cells)  # Where times of execution would be.
  assert 'version' not in notebook.metadata.language_info
  texts = [text for output in outputs(notebook) for text in (output.get('text'), *output.get('data', {}).values())]
  for words in [cell.source for cell in notebook.cells] + [text for text in texts if text and ' ' in text]:
    assert not re.search(r'/(home|root|tmp|work|opt|usr|content|Users)/', words), words


@notebooks
def test_installs_only_where_the_package_is_missing(path):
  install = next(cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == 'code')
  assert "if importlib.util.find_spec('metasgd_jax') is None:" in install
  assert re.search(r'^  %pip install ', install, re.MULTILINE)
