"""No code opens a pickle: neither by its name nor through NumPy."""

import ast
import pathlib

import metasgd_jax

ROOT = pathlib.Path(__file__).resolve().parents[2]
FOLDERS = [pathlib.Path(metasgd_jax.__file__).parent, ROOT / 'experiments', ROOT / 'benchmarks']
SOURCE = [path for folder in FOLDERS for path in sorted(folder.rglob('*.py'))]
RUN_CODE = ('pickle', 'cPickle', 'dill', 'cloudpickle', 'joblib', 'shelve', 'marshal', 'yaml')


def offences(path):
  """Says of each line that opens a pickle, or runs text, what it does."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import | ast.ImportFrom):
      module = [getattr(node, 'module', None) or ''] if isinstance(node, ast.ImportFrom) else []
      for name in (*module, *(alias.name for alias in node.names)):
        if name.split('.')[0] in RUN_CODE:
          yield f'{path}:{node.lineno} imports {name}'
    if isinstance(node, ast.Call):
      called = ast.unparse(node.func)
      if called in ('np.load', 'numpy.load', 'np.save', 'numpy.save'):
        given = {word.arg: ast.unparse(word.value) for word in node.keywords}
        if given.get('allow_pickle') != 'False':
          yield f'{path}:{node.lineno} calls {called} without allow_pickle=False'
      if called in ('eval', 'exec', 'torch.load'):
        yield f'{path}:{node.lineno} calls {called}'


def test_no_code_opens_pickles_or_runs_text():
  assert len(SOURCE) > 100
  assert [said for path in SOURCE for said in offences(path)] == []


def test_what_would_open_a_pickle_is_found(tmp_path):
  lines = ['import pickle', 'from joblib import load', "np.load('a')", "eval('1')", "np.load('a', allow_pickle=False)"]
  (tmp_path / 'a.py').write_text('\n'.join(lines))
  assert [said.split(':')[1].split()[0] for said in offences(tmp_path / 'a.py')] == ['1', '2', '3', '4']
