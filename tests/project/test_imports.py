"""Who may import whom, so that a part can be lifted into another pipeline without the others."""

import ast
import inspect
import pathlib
import re
import subprocess
import sys

from public_names import public_names

import metasgd_jax

ROOT = pathlib.Path(__file__).resolve().parents[2]
PACKAGE = pathlib.Path(metasgd_jax.__file__).parent
MODULES = sorted(PACKAGE.rglob('*.py'))

ONLY_HERE = {  # library → where alone it may be imported
  'tensorflow_datasets': ('datasets/',),
  'matplotlib': ('plotting/',),
  'flax': ('nn/', 'learners/', 'deploy/likeness.py'),
  'tensorboardX': ('io/writers.py',),
  'safetensors': ('deploy/model_file.py', 'io/files.py'),
  'orbax': ('io/checkpoint.py',),
  'tensorstore': (),
  'gymnasium': ('rl/gymnasium_host.py',),
  'sklearn': ('deploy/classifier.py',),
  'equinox': ('nn/adapters.py',),
  'haiku': (),
}
MAY_IMPORT = {  # part → parts of the package that it may use beside itself, `types` and `tree`
  'types': set(),
  'tree': set(),
  'version': set(),
  'losses': set(),
  'inner': set(),
  'outer': {'inner'},
  'nn': set(),
  'tasks': {'outer'},
  'learners': {'inner', 'losses'},
  'rl': {'inner', 'outer'},
  'io': {'outer'},
  'datasets': {'io', 'tasks'},
  'plotting': set(),
  'deploy': {'io', 'learners', 'losses', 'nn', 'outer', 'version'},
  'cli': {'datasets', 'deploy', 'io', 'plotting', 'version'},
  '__main__': {'cli'},
}


def imports(path):
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      module = '.' * node.level + (node.module or '')
      yield module
      yield from (f'{module}.{alias.name}' for alias in node.names)


def part_of(path):
  name = path.relative_to(PACKAGE).parts[0]
  return name.removesuffix('.py')


def offences(path):
  """Says what a module imports that it may not."""
  place = path.relative_to(PACKAGE).as_posix()
  for name in imports(path):
    library, _, rest = name.partition('.')
    if not library:
      yield f'{place} imports {name}: imports are absolute'
    if library in ONLY_HERE and not place.startswith(ONLY_HERE[library]):
      yield f'{place} imports {library}'
    if library in ('experiments', 'tests', 'benchmarks'):
      yield f'{place} imports {name}'
    inside = library == 'metasgd_jax' and rest and place != '__init__.py'
    part = part_of(path)
    if inside and rest.split('.')[0] not in MAY_IMPORT[part] | {part, 'types', 'tree'}:
      yield f'{place} imports {name}'


def test_each_module_imports_only_what_it_may():
  assert len(MODULES) > 80
  assert [said for path in MODULES for said in offences(path)] == []


def test_importing_the_package_leaves_the_slow_and_the_optional_alone():
  code = (
    'import sys, metasgd_jax; from jax._src import xla_bridge as b; '
    "slow = ('tensorflow_datasets', 'tensorflow', 'matplotlib', 'tensorboardX', 'orbax.checkpoint', 'gymnasium', "
    "'equinox', 'haiku', 'flax', 'safetensors', 'msgpack', 'requests', 'scipy'); "
    'print([m for m in slow if m in sys.modules], '
    'b.backends_are_initialized())'
  )
  out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, cwd=ROOT)
  assert out.stdout.strip() == '[] False'


def test_the_inner_loop_needs_only_jax_optax_and_chex():
  """As with `pip install --no-deps`: a library whose entry in sys.modules is None cannot be imported."""
  code = """
import re, sys, tomllib
asked = tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies']
names = {re.match('[a-z_A-Z-]+', one)[0].replace('-', '_') for one in asked}
missing = names - {'jax', 'jaxlib', 'numpy', 'scipy', 'optax', 'chex', 'absl_py'} | {'PIL', 'orbax'}
sys.modules.update(dict.fromkeys(missing))
import jax, metasgd_jax as ms
theta = {'w': jax.numpy.zeros(2)}
alpha = ms.init_alpha(jax.random.key(0), theta)
loss = lambda theta, target: ((theta['w'] - target) ** 2).sum()
print(len(missing), jax.jit(lambda alpha: ms.adapt(theta, alpha, 1.0, loss_fn=loss))(0.25)['w'], alpha['w'].shape)
"""
  out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, cwd=ROOT)
  missing, adapted = out.stdout.split(maxsplit=1)
  assert int(missing) > 10
  assert adapted.strip() == '[0.5 0.5] (2,)'


def test_public_names_have_docstrings():
  import metasgd_jax as ms

  public = {
    f'{module.__name__}.{name}': getattr(module, name)
    for module in (ms, ms.nn, ms.tasks, ms.learners, ms.rl)
    for name in public_names(module)
  }
  described = {name: thing for name, thing in public.items() if inspect.isclass(thing) or inspect.isfunction(thing)}
  assert described
  assert [name for name, thing in described.items() if not thing.__doc__ or 'Alias for field' in thing.__doc__] == []


def test_the_library_advises_no_flag_of_the_experiments():
  """A caller of Python cannot set one. --noverify_archives stands beside the argument `verify_archives`."""
  strings = (
    node.value
    for path in MODULES
    if part_of(path) != 'cli'
    for node in ast.walk(ast.parse(path.read_text()))
    if isinstance(node, ast.Constant) and isinstance(node.value, str)
  )
  found = {flag for text in strings for flag in re.findall(r'(?<![\w-])--[a-z]\w*', text)}
  assert found == {'--xla_force_host_platform_device_count', '--noverify_archives'}
