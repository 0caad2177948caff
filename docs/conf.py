"""Settings of the documentation site; `make docs` builds it into docs/_build/html."""

import json
import pathlib
import sys
import tomllib

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from metasgd_jax.version import __version__

project = 'metasgd_jax'
author = 'The metasgd_jax authors'
copyright = author  # noqa: A001
release = __version__

extensions = [
  'sphinx.ext.autodoc',
  'sphinx.ext.napoleon',
  'sphinx.ext.viewcode',
  'myst_nb',
  'sphinx_copybutton',
  'sphinx_design',
]
exclude_patterns = ['_build', 'data']
html_theme = 'furo'
html_title = f'metasgd_jax {release}'
project_table = tomllib.loads((HERE.parent / 'pyproject.toml').read_text())['project']
repository = project_table['urls']['Repository']
published = 'OWNER' not in repository
if published:
  html_theme_options = {
    'source_repository': repository,
    'source_branch': 'main',
    'source_directory': 'docs/',
  }
html_static_path = ['_static']
html_css_files = ['custom.css']

# The notebooks are shown with the outputs that are committed; the tests run them.
nb_execution_mode = 'off'
nb_merge_streams = True
myst_enable_extensions = ['colon_fence']
myst_heading_anchors = 3

default_role = (
  'code'  # A name in single backticks is code, in docstrings as in Markdown.
)
autodoc_member_order = 'bysource'
python_maximum_signature_line_length = 80
autodoc_typehints = 'signature'
autodoc_typehints_format = 'short'
autodoc_preserve_defaults = True
napoleon_use_ivar = True  # A NamedTuple's fields are described at its class.
# Most types in signatures are of other projects, whose pages need a network.
nitpick_ignore_regex = [('py:.*', '.*')]


def copy_notebooks() -> None:
  """Copies the notebooks to where Sphinx looks for pages, with a link to Colab."""
  copies = HERE / 'notebooks'
  copies.mkdir(exist_ok=True)
  colab = repository.replace(
    'https://github.com', 'https://colab.research.google.com/github'
  )
  for path in (HERE.parent / 'notebooks').glob('*.ipynb'):
    notebook = json.loads(path.read_text(encoding='utf-8'))
    if published:
      link = f'[Open in Colab]({colab}/blob/main/notebooks/{path.name})'
      cell = dict(cell_type='markdown', id='colab', metadata={}, source=[link])
      notebook['cells'].insert(1, cell)
    (copies / path.name).write_text(json.dumps(notebook), encoding='utf-8')


def skip_aliases(app, what, name, obj, skip, options):
  """Leaves out a NamedTuple's fields, whose own docstrings say nothing."""
  return (
    True
    if (getattr(obj, '__doc__', None) or '').startswith('Alias for field number')
    else None
  )


def setup(app):
  """Connects what is above."""
  copy_notebooks()
  app.connect('autodoc-skip-member', skip_aliases)
