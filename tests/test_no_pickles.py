"""No code opens a pickle: neither by its name nor through NumPy."""

import ast
import pathlib

import pytest

import metasgd_jax

ROOT = pathlib.Path(__file__).resolve().parents[1]
FOLDERS = [pathlib.Path(metasgd_jax.__file__).parent, ROOT / 'experiments', ROOT / 'benchmarks']
SOURCE = [path for folder in FOLDERS for path in sorted(folder.rglob('*.py'))]
RUN_CODE = ('pickle', 'cPickle', 'dill', 'cloudpickle', 'joblib', 'shelve', 'marshal', 'yaml')


@pytest.mark.parametrize('path', SOURCE, ids=lambda path: f'{path.parent.name}/{path.name}')
def test_no_code_opens_pickles_or_runs_text(path):
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import | ast.ImportFrom):
      module = [getattr(node, 'module', None) or ''] if isinstance(node, ast.ImportFrom) else []
      for name in (*module, *(alias.name for alias in node.names)):
        assert name.split('.')[0] not in RUN_CODE, f'{path}:{node.lineno} imports {name}'
    if isinstance(node, ast.Call):
      called = ast.unparse(node.func)
      if called in ('np.load', 'numpy.load', 'np.save', 'numpy.save'):
        given = {word.arg: ast.unparse(word.value) for word in node.keywords}
        assert given.get('allow_pickle') == 'False', f'{path}:{node.lineno} calls {called} without allow_pickle=False'
      assert called not in ('eval', 'exec', 'torch.load'), f'{path}:{node.lineno} calls {called}'
