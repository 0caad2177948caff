"""Runs the notebooks and writes their outputs into them; `execute` is what the tests call.

python -m notebooks.execute                 all of them, at full size
python -m notebooks.execute quickstart      one of them
METASGD_SMOKE=1 python -m notebooks.execute    at tiny sizes, to see that they run; nothing is written
"""

import base64
import io
import os
import pathlib
import sys
import tempfile

import nbformat
from ipykernel.kernelspec import write_kernel_spec
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from PIL import Image

HERE = pathlib.Path(__file__).resolve().parent
TIMEOUT = 3600  # Seconds a cell may take.


def execute(path: pathlib.Path, *, smoke: bool = False) -> nbformat.NotebookNode:
  """Returns a notebook with the outputs of a run from top to bottom, in a fresh kernel of this interpreter.

  Args:
    path: of the notebook; nothing is written to it.
    smoke: whether to run it at tiny sizes, by METASGD_SMOKE.

  Raises:
    nbclient.exceptions.CellExecutionError: a cell raised.
  """
  notebook = nbformat.read(path, as_version=4)
  environment = {**os.environ, 'METASGD_SMOKE': '1' if smoke else '0', 'TF_CPP_MIN_LOG_LEVEL': '2'}
  if smoke:
    environment['JAX_DISABLE_MOST_OPTIMIZATIONS'] = '1'  # Compiling is then most of the time.
  with tempfile.TemporaryDirectory() as aside:
    write_kernel_spec(pathlib.Path(aside) / 'python3')
    specs = KernelSpecManager(kernel_dirs=[aside])
    manager = AsyncKernelManager(kernel_name='python3', kernel_spec_manager=specs)
    resources = {'metadata': {'path': str(path.parent)}}
    client = NotebookClient(notebook, km=manager, timeout=TIMEOUT, resources=resources)
    client.execute(env=environment, cleanup_kc=True)  # Or it leaves a kernel running that it was given.
  return cleaned(notebook)


def cleaned(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
  """Returns the notebook without times and the machine's Python, its pictures in few colours, to be small."""
  notebook.metadata = {
    'kernelspec': {'display_name': 'Python 3', 'language': 'python', 'name': 'python3'},
    'language_info': {'name': 'python'},
  }
  for cell in notebook.cells:
    cell.metadata = {}
    for output in cell.get('outputs', []):
      if 'image/png' in output.get('data', {}):
        output.data['image/png'] = small(output.data['image/png'])
  return notebook


def small(png: str) -> str:
  """Returns a picture, PNG in base64, with 128 colours."""
  image = Image.open(io.BytesIO(base64.b64decode(png))).convert('RGB')
  file = io.BytesIO()
  image.quantize(128, dither=Image.Dither.NONE).save(file, 'PNG', optimize=True)
  return base64.b64encode(file.getvalue()).decode()


def main(names: list[str]) -> None:
  """Runs the named notebooks, or all, and replaces each by its run."""
  for path in [HERE / f'{name}.ipynb' for name in names] or sorted(HERE.glob('*.ipynb')):
    smoke = os.environ.get('METASGD_SMOKE') == '1'
    print(f'{path.name}: running', flush=True)
    notebook = execute(path, smoke=smoke)
    if not smoke:
      nbformat.write(notebook, path)
    print(f'{path.name}: runs' if smoke else f'{path.name}: {path.stat().st_size / 1000:.0f} kB')


if __name__ == '__main__':
  main(sys.argv[1:])
