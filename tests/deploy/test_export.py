"""Exported files: they run without the package, give its numbers, and are refused when they are not whole."""

import copy
import io
import json
import pathlib
import re
import subprocess
import sys
import zipfile

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special
from PIL import Image
from problems import SmallConvNet, saying
from small_models import pictures, small_model

import metasgd_jax as ms
from metasgd_jax import cli
from metasgd_jax.deploy import export, model_file
from metasgd_jax.io.files import WriterError

DOCS = (pathlib.Path(__file__).resolve().parents[2] / 'docs' / 'export.md').read_text()
ALONE, PICTURE, WITH_PACKAGE = re.findall(r'```py\n(.*?)```', DOCS, re.DOTALL)

SMALL = dict(image_shape=(16, 16, 1), filters=8)


def some(count, seed=0, way=5):
  labels = np.arange(count, dtype=np.int32) % way
  return (pictures(labels, size=16, seed=seed) / 255).astype(np.float32)[..., None], labels


def shrink(patch):
  """Has models of one block in Conv4's place, which compile in a fraction of its time."""
  patch.setattr(ms.nn, 'Conv4', lambda way, **sizes: SmallConvNet(way))


@pytest.fixture
def one_block(monkeypatch):
  shrink(monkeypatch)


@pytest.fixture(scope='module')
def model():
  with pytest.MonkeyPatch.context() as patch:
    shrink(patch)
    return small_model(seed=3, training={'dataset': 'none'}, temperature=0.25, **SMALL)


@pytest.fixture(scope='module')
def file(model, tmp_path_factory):
  path = tmp_path_factory.mktemp('exported') / 'small.zip'
  with pytest.MonkeyPatch.context() as patch:
    shrink(patch)
    export.export_model(path, model)
  return path


def run_alone(file, support, x, tmp_path):
  """What the documented lines answer in a process that has no metasgd_jax."""
  np.savez(tmp_path / 'in.npz', support_x=support[0], support_y=support[1], x=x)
  code = f"import sys; sys.modules['metasgd_jax'] = None\n{ALONE}\nassert 'flax' not in sys.modules"
  argv = [sys.executable, '-I', '-c', code, file, tmp_path / 'in.npz', tmp_path / 'out.npy']
  done = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path, check=False)
  assert done.returncode == 0, done.stderr
  return np.load(tmp_path / 'out.npy')


def test_the_documented_lines_give_the_learners_numbers_without_the_package(tmp_path):
  learner, _, episode = linear(lambda theta, support: {'w': theta['w'] * support.x.mean()})
  meta = {'w': np.arange(6, dtype=np.float32).reshape(2, 3)}
  export.export_learner(tmp_path / 'a.zip', learner, meta, episode, platforms=('cpu',))
  rng = np.random.default_rng(0)
  support = rng.normal(size=(6, 2)).astype(np.float32), np.ones((6, 1), np.float32)
  x = rng.normal(size=(7, 2)).astype(np.float32)
  ours = scipy.special.softmax(x @ meta['w'] * support[0].mean(), -1)
  np.testing.assert_allclose(run_alone(tmp_path / 'a.zip', support, x, tmp_path), ours, rtol=1e-5)


@pytest.mark.parametrize('shots', [1, 3])
def test_the_documented_lines_give_the_classifiers_numbers(file, model, one_block, shots, tmp_path, monkeypatch):
  support, (x, _) = some(5 * shots), some(7, seed=1)
  ours = ms.FewShotClassifier(model, invert=False).fit(*support).predict_proba(x)
  np.savez(tmp_path / 'in.npz', support_x=support[0], support_y=support[1], x=x)
  monkeypatch.setattr(sys, 'argv', ['', *(str(path) for path in (file, tmp_path / 'in.npz', tmp_path / 'out.npy'))])
  exec(compile(ALONE, 'docs/export.md', 'exec'), {})
  np.testing.assert_allclose(np.load(tmp_path / 'out.npy'), ours, rtol=1e-5)


@pytest.mark.slow
def test_the_documented_lines_give_the_numbers_of_conv4_without_the_package(tmp_path):
  model = small_model(seed=3, **SMALL)
  export.export_model(tmp_path / 'a.zip', model)
  classifier, (x, _) = ms.FewShotClassifier(model, invert=False), some(7, seed=1)
  for shots in (1, 3):
    support = some(5 * shots)
    ours = classifier.fit(*support).predict_proba(x)
    np.testing.assert_allclose(run_alone(tmp_path / 'a.zip', support, x, tmp_path), ours, rtol=1e-5)


def test_fewer_classes_and_a_fixed_number_of_shots(model, one_block, tmp_path):
  found = export.export_model(tmp_path / 'a.zip', model, way=3, shot=2, inductive=False, platforms=('cpu',))
  support, (x, _) = some(6, way=3), some(4, seed=1, way=3)
  learner = model_file.build_learner(model.config, 3)
  ours = jax.jit(lambda: learner.predict(learner.adapt(model.meta, ms.Batch(*support), None), x))()
  np.testing.assert_allclose(found.predict(found.adapt(found.parameters, *support), x), ours, rtol=1e-4, atol=1e-5)
  assert ours.shape == (4, 3)
  assert found.about['says']['classes'] == 3
  assert found.about['says']['pictures'].startswith('padded')
  assert found.about['platforms'] == ['cpu']
  with pytest.raises(ValueError, match=r'6|shape'):
    found.adapt(found.parameters, *some(9, way=3))


def test_about_says_what_goes_in_and_what_comes_out(file):
  found = ms.load_exported(file)
  assert found.about['adapt']['takes'][1:] == ['float32[S,16,16,1]', 'int32[S]']
  assert found.about['predict']['takes'][1] == 'float32[Q,16,16,1]'
  assert found.about['predict']['gives'] == 'float32[Q,5]'
  assert found.about['platforms'] == ['cpu', 'cuda', 'tpu']
  assert found.about['says']['training'] == {'dataset': 'none'}
  assert found.about['says']['temperature'] == 0.25
  assert found.about['checked_on'] in ('cpu', 'cuda', 'tpu')
  assert str(pathlib.Path(ms.__file__).parent).encode() not in file.read_bytes(), 'places in the source went along'


LEARNERS = {
  'meta_sgd': lambda model: ms.meta_sgd(model, ms.losses.cross_entropy, steps=2),
  'maml': lambda model: ms.maml(model, ms.losses.cross_entropy, alpha=0.1),
  'prototypical': lambda model: ms.learners.prototypical(model, way=5),
  'matching': lambda model: ms.learners.matching(model, way=5, full_context=True, read_steps=2),
  'siamese': lambda model: ms.learners.siamese(model, way=5),
  'mann': lambda model: ms.learners.mann(way=5, size=None),
  'inner_optimizer': lambda model: ms.learners.inner_optimizer(
    model, ms.losses.cross_entropy, optimizer_fn=lambda h: optax.sgd(h['rate'], h['momentum']), steps=2,
    hyper={'rate': 0.1, 'momentum': 0.5},
  ),
}  # fmt: skip


RECURRENT = ('matching', 'mann')  # Their loops take the compiler longest.


@pytest.mark.parametrize('name', [pytest.param(n, marks=pytest.mark.slow) if n in RECURRENT else n for n in LEARNERS])
def test_learners_of_each_kind(name, tmp_path):
  learner = LEARNERS[name](ms.nn.from_linen(ms.nn.MLP((8,), outputs=5, stddev=0.1)))
  flat = lambda x, y: ms.Batch(x.reshape(len(x), -1), y)
  episode = ms.Episode(flat(*some(5)), flat(*some(10, seed=1)))
  meta = jax.jit(learner.init)(jax.random.key(0), episode)
  found = export.export_learner(tmp_path / 'a.zip', learner, meta, episode, platforms=('cpu',))
  support, (x, _) = flat(*some(10, seed=2)), flat(*some(4, seed=3))
  ours = jax.jit(lambda meta: learner.predict(learner.adapt(meta, support, jax.random.key(0)), x))(meta)
  theirs = found.predict(found.adapt(found.parameters, *support), x)
  np.testing.assert_allclose(theirs, ours, rtol=1e-4, atol=1e-5)


def test_the_documented_lines_for_a_learner(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  exec(compile(WITH_PACKAGE, 'docs/export.md', 'exec'), {})
  assert capsys.readouterr().out == '(10, 1)\n'


@pytest.mark.parametrize('paper', [0, 255])
def test_the_pages_lines_bring_a_picture_into_form(paper, tmp_path):
  drawing = np.full((40, 60), paper, np.uint8)
  drawing[18:22, 10:50] = 255 - paper
  Image.fromarray(drawing).save(tmp_path / 'a.png')
  found = {}
  exec(compile(PICTURE, 'docs/export.md', 'exec'), found)
  x = found['picture'](tmp_path / 'a.png')
  assert (x.shape, x.dtype) == ((28, 28, 1), np.float32)
  assert x[13:15, 8:20].min() > 0.9  # The stroke, in the middle of the padded square.
  assert max(x[:8].max(), x[20:].max()) < 0.1


def linear(adapt=lambda theta, support: theta, predict=lambda theta, x: x @ theta['w'], key=None):
  learner = ms.Learner(None, lambda theta, support, key: adapt(theta, support), None, predict, None)
  episode = ms.Episode(*[ms.Batch(np.ones((4, 2), np.float32), np.ones((4, 1), np.float32))] * 2)
  return learner, {'w': np.ones((2, 1), np.float32)}, episode


def test_a_program_with_other_numbers_is_not_written(tmp_path):
  traced = []

  def predict(theta, x):
    traced.append(1)
    return x @ theta['w'] + len(traced)

  (tmp_path / 'a.zip').write_text('of before')
  with pytest.raises(WriterError, match=saying('differ from the learner', 'by ')):
    export.export_learner(tmp_path / 'a.zip', *linear(predict=predict))
  assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [('a.zip', 'of before')]


def test_other_numbers_are_seen_beside_infinite_ones(tmp_path):
  absent = lambda outputs: jnp.concatenate([outputs, jnp.full_like(outputs, -jnp.inf), outputs * jnp.nan], 1)
  same = linear(predict=lambda theta, x: absent(x @ theta['w']))
  assert export.export_learner(tmp_path / 'a.zip', *same, platforms=('cpu',)).about['checked_on'] == 'cpu'
  traced = []
  other = linear(predict=lambda theta, x: traced.append(1) or absent(x @ theta['w'] + 1e-2 * len(traced)))
  with pytest.raises(WriterError, match=saying('differ from the learner', 'by 0.0', 'finite')):
    export.export_learner(tmp_path / 'b.zip', *other, platforms=('cpu',))
  assert [path.name for path in tmp_path.iterdir()] == ['a.zip']


def test_names_with_slashes_as_haiku_gives_them(tmp_path):
  transformed = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([4, 1])(x)))
  learner = ms.meta_sgd(ms.Model(transformed.init, transformed.apply), ms.losses.mean_squared_error)
  batch = lambda seed: ms.Batch(*np.random.default_rng(seed).normal(size=(2, 5, 1)).astype(np.float32))
  episode = ms.Episode(batch(0), batch(1))
  meta = jax.jit(learner.init)(jax.random.key(2), episode)
  export.export_learner(tmp_path / 'a.zip', learner, meta, episode, platforms=('cpu',))
  found = export.load_exported(tmp_path / 'a.zip')
  assert 'theta.mlp/~/linear_0.w' in found.parameters
  adapted = lambda meta: learner.adapt(meta, episode.support, jax.random.key(0))
  ours = jax.jit(lambda meta: learner.predict(adapted(meta), episode.query.x))(meta)
  theirs = found.predict(found.adapt(found.parameters, *episode.support), episode.query.x)
  np.testing.assert_allclose(theirs, ours, rtol=1e-4, atol=1e-5)


def test_a_file_of_64_bits_says_so_where_jax_has_32(tmp_path):
  with jax.enable_x64(True):
    learner, _, _ = linear()
    episode = ms.Episode(*[ms.Batch(np.ones((4, 2)), np.ones((4, 1)))] * 2)
    export.export_learner(tmp_path / 'a.zip', learner, {'w': np.ones((2, 1))}, episode, platforms=('cpu',))
    assert export.load_exported(tmp_path / 'a.zip').parameters['w'].dtype == np.float64
  with pytest.raises(ValueError, match=saying('a.zip', 'float64', "jax.config.update('jax_enable_x64', True)")):
    export.load_exported(tmp_path / 'a.zip')


def test_a_machine_with_another_accelerator_compares_on_a_cpu(tmp_path, monkeypatch):
  monkeypatch.setattr(jax.export, 'default_export_platform', lambda: 'rocm')
  found = export.export_learner(tmp_path / 'a.zip', *linear(), platforms=('cuda', 'cpu'))
  assert found.about['checked_on'] == 'cpu'
  traced = []
  with pytest.raises(WriterError, match='differ from the learner'):
    changing = linear(predict=lambda theta, x: traced.append(1) or x @ theta['w'] + len(traced))
    export.export_learner(tmp_path / 'b.zip', *changing, platforms=('cpu',))
  assert export.export_learner(tmp_path / 'c.zip', *linear(), platforms=('tpu',)).about['checked_on'] is None


def test_products_are_of_the_highest_precision(tmp_path):
  export.export_learner(tmp_path / 'a.zip', *linear(), platforms=('cpu',))
  program = jax.export.deserialize(bytearray(members(tmp_path / 'a.zip')['predict.bin']))
  assert 'precision = [HIGHEST, HIGHEST]' in program.mlir_module()


@pytest.mark.parametrize('make', [np.ones, lambda shape: np.ones(shape, np.float64)])
def test_numbers_of_other_kinds_become_what_jax_makes_of_them(make, tmp_path):
  learner, _, episode = linear(predict=lambda theta, x: x @ theta['w'] * theta['scale'] + theta['shift'])
  meta = {'w': make((2, 1)), 'scale': 0.5, 'shift': np.float64(2)}
  found = export.export_learner(tmp_path / 'a.zip', learner, meta, episode, platforms=('cpu',))
  assert {a.dtype.name for a in found.parameters.values()} == {'float32'}
  np.testing.assert_allclose(found.predict(found.adapt(found.parameters, *episode.support), episode.query.x), 3)


def of_host(theta, support):
  like = jax.ShapeDtypeStruct((2, 1), np.float32)
  return {'w': jax.pure_callback(lambda w: w, like, theta['w'])}


@pytest.mark.parametrize(
  'adapt',
  [
    lambda theta, support: {'w': theta['w'] + sum(i for i in range(support.x.shape[0]))},
    lambda theta, support: {'w': theta['w'] * np.ones(support.x.shape[0]).mean()},
    lambda theta, support: {'w': theta['w'] + jax.random.permutation(jax.random.key(0), support.x)[:2, :1]},
    lambda theta, support: {'w': theta['w'] * len(jax.numpy.split(support.x, 2))},
  ],
)
def test_a_support_that_cannot_be_open_is_told_and_can_be_fixed(adapt, tmp_path):
  with pytest.raises(ValueError, match=saying('a fixed number of items', 'any_support=False')):
    export.export_learner(tmp_path / 'a.zip', *linear(adapt), platforms=('cpu',))
  assert not list(tmp_path.iterdir())
  export.export_learner(tmp_path / 'a.zip', *linear(adapt), platforms=('cpu',), any_support=False)


def test_a_predict_of_fixed_size_cannot_be_exported(tmp_path):
  with pytest.raises(ValueError, match=saying('a fixed number of items', 'predict', 'any number of query items')):
    fixed = linear(predict=lambda theta, x: x @ theta['w'] + np.ones((4, 1), np.float32))
    export.export_learner(tmp_path / 'a.zip', *fixed, any_support=False, platforms=('cpu',))


@pytest.mark.parametrize(
  ('adapt', 'message'),
  [
    (of_host, ['calls back into Python']),
    (lambda theta, support: theta | {'key': jax.random.key(0)}, ['the adapted parameters', 'a key of jax.random']),
  ],
)
def test_what_no_file_can_hold(adapt, message, tmp_path):
  with pytest.raises(ValueError, match=saying(*message)):
    export.export_learner(tmp_path / 'a.zip', *linear(adapt), platforms=('cpu',), any_support=False)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ('meta', 'message'),
  [
    ({'k': np.zeros(2, np.uint32), 'key': 'a key'}, ['parameter key ', 'array of numbers', "got 'a key'"]),
    ({'n': np.float32}, ['parameter n ', 'array of numbers', 'got <class']),
  ],
)
def test_parameters_that_no_file_can_hold(meta, message, tmp_path):
  learner, _, episode = linear()
  with pytest.raises(ValueError, match=saying(*message)):
    export.export_learner(tmp_path / 'a.zip', learner, meta, episode)
  with pytest.raises(ValueError, match=saying('parameter k ', 'a key of jax')):
    export.export_learner(tmp_path / 'a.zip', learner, {'k': jax.random.key(0)}, episode)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ('leaf', 'message'),
  [
    (np.float32(3), ['support.y.1', 'first dimension counts the items', 'got the scalar']),
    (np.ones(3, np.float32), ['leaves of support', 'the same first dimension', 'at least 1', 'got [3, 4]']),
  ],
)
def test_leaves_of_the_episode_without_items_in_front(leaf, message, tmp_path):
  learner, meta, episode = linear()
  support = ms.Batch(episode.support.x, (episode.support.y, leaf))
  with pytest.raises(ValueError, match=saying(*message)):
    export.export_learner(tmp_path / 'a.zip', learner, meta, ms.Episode(support, episode.query))


def test_a_support_whose_size_matters_must_be_fixed(tmp_path):
  halves = lambda theta, support: theta if support.x.shape[0] > 3 else {'w': theta['w'] / 2}
  with pytest.raises(ValueError, match=saying('a fixed number of items', 'any_support=False')):
    export.export_learner(tmp_path / 'a.zip', *linear(halves), platforms=('cpu',))
  export.export_learner(tmp_path / 'a.zip', *linear(halves), any_support=False, platforms=('cpu',))


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    (dict(platforms=('gpu',)), ['platforms', 'cpu, cuda, tpu, rocm', 'each once', "got ('gpu',)"]),
    (dict(platforms='cpu'), ['platforms', "got 'cpu'"]),
    (dict(platforms=()), ['platforms', 'got ()']),
    (dict(says={'a': object()}), ['a value that JSON cannot store']),
  ],
)
def test_what_cannot_be_exported(options, message, tmp_path):
  with pytest.raises(ValueError, match=saying(*message)):
    export.export_learner(tmp_path / 'a.zip', *linear(), **options)
  assert not list(tmp_path.iterdir())


def test_parameters_and_episodes_that_it_cannot_take(tmp_path):
  learner, _, episode = linear()
  with pytest.raises(ValueError, match=saying('NumPy', 'got bfloat16')):
    export.export_learner(tmp_path / 'a.zip', learner, {'w': jax.numpy.ones((2, 1), 'bfloat16')}, episode)
  with pytest.raises(ValueError, match=saying('Batch(x, y)', 'got tuple')):
    export.export_learner(tmp_path / 'a.zip', learner, {}, ms.Episode(tuple(episode.support), episode.query))
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(('options', 'message'), [(dict(way=6), ['got 6']), (dict(shot=0), ['shot', 'got 0'])])
def test_classes_and_shots_that_there_are_not(model, options, message, tmp_path):
  with pytest.raises(ValueError, match=saying(*message)):
    export.export_model(tmp_path / 'a.zip', model, **options)


@pytest.mark.parametrize('place', ['none/a.zip', ''])
def test_where_nothing_can_be_written(place, tmp_path):
  with pytest.raises(WriterError, match=saying('cannot be written', 'give another path')):
    export.export_learner(f'{tmp_path}/{place}', *linear())
  assert not list(tmp_path.iterdir())


def members(file):
  with zipfile.ZipFile(file) as archive:
    return {name: archive.read(name) for name in archive.namelist()}


def changed_about(parts, **changes):
  return parts | {'about.json': json.dumps(json.loads(parts['about.json']) | changes).encode()}


BIAS = 'parameters/theta.Dense_0.bias.npy'


def other_shape(parts):
  data = io.BytesIO()
  np.save(data, np.zeros(3, np.float32))
  return parts | {BIAS: data.getvalue()}


def claims_much(parts):
  return parts | {BIAS: parts[BIAS].replace(b'(5,), }', b'(5000000000,), }')}


@pytest.mark.parametrize(
  ('spoil', 'message'),
  [
    (lambda parts: parts | {'about.json': b'{'}, 'cannot be read as an exported learner'),
    (
      lambda parts: parts | {'about.json': b'[]'},
      'format_version in about.json must be an integer of at least 1, got None',
    ),
    (lambda parts: changed_about(parts, format_version=2), 'of format version 2, newer than 1'),
    (lambda parts: changed_about(parts, parameters=[1]), 'does not name the parameters'),
    (lambda parts: changed_about(parts, platforms=['cpu']), 'another program than adapt.bin'),
    (lambda parts: changed_about(parts, predict={}), 'another program than predict.bin'),
    (lambda parts: {k: v for k, v in parts.items() if k != 'predict.bin'}, 'predict.bin is missing'),
    (lambda parts: {k: v for k, v in parts.items() if k != 'about.json'}, 'no about.json'),
    (lambda parts: parts | {'more': b''}, 'more is not part of an exported learner'),
    (lambda parts: parts | {'adapt.bin': parts['predict.bin']}, 'another program than adapt.bin'),
    (lambda parts: parts | {'adapt.bin': b'\x08' * 100}, 'cannot be read as an exported learner'),
    (lambda parts: parts | {'about.json': b' ' * 2**21}, 'about.json is larger than 1 MiB'),
    (other_shape, 'and the shape .* but adapt.bin takes'),
    (claims_much, 'and the shape .* but adapt.bin takes'),
    (lambda parts: parts | {BIAS: parts[BIAS][:-4]}, 'bytes, but its header describes'),
    (lambda parts: changed_about(parts, format_version=0), 'about.json must be an integer of at least 1, got 0'),
  ],
)
def test_a_file_that_is_not_whole_is_refused(file, spoil, message, tmp_path):
  path = tmp_path / 'spoilt.zip'
  with zipfile.ZipFile(path, 'w') as archive:
    for name, data in spoil(members(file)).items():
      archive.writestr(name, data)
  with pytest.raises(ValueError, match=message) as e:
    export.load_exported(path)
  assert ('export it again' in str(e.value)) != ('upgrade' in str(e.value))  # One remedy.


def test_members_that_lie_over_each_other_are_refused(file, tmp_path):
  """One stretch of the file under many names would be read many times: 4 MB could take gigabytes."""
  path = tmp_path / 'over.zip'
  with zipfile.ZipFile(path, 'w') as archive:
    for name, data in members(file).items():
      archive.writestr(name, data)
    for name in ('a', 'b'):  # The directory at the end tells of the same place again, so that the file hardly grows.
      twin = copy.copy(archive.getinfo('adapt.bin'))
      twin.filename = name
      archive.filelist.append(twin)
  with pytest.raises(ValueError, match='have more bytes in all than the archive'):
    export.load_exported(path)


def test_data_is_not_read_before_its_header_is_found_right(file, tmp_path, monkeypatch):
  path, read = tmp_path / 'a.zip', []
  with zipfile.ZipFile(path, 'w') as archive:
    for name, data in other_shape(members(file)).items():
      archive.writestr(name, data)
  whole = zipfile.ZipFile.read
  monkeypatch.setattr(zipfile.ZipFile, 'read', lambda self, name: read.append(name) or whole(self, name))
  with pytest.raises(ValueError, match='and the shape .* but adapt.bin takes'):
    export.load_exported(path)
  assert BIAS not in read


def test_files_that_are_something_else_are_refused(file, tmp_path):
  with pytest.raises(ValueError, match='there is no such file'):
    export.load_exported(tmp_path / 'none')
  (tmp_path / 'cut').write_bytes(file.read_bytes()[:-500])
  (tmp_path / 'flipped').write_bytes(file.read_bytes().replace(b'\x93NUMPY', b'\x93NUMPX', 1))
  with zipfile.ZipFile(tmp_path / 'packed', 'w', zipfile.ZIP_DEFLATED) as archive:
    for name, data in members(file).items():
      archive.writestr(name, data)
  for name, message in (('cut', 'not a zip'), ('flipped', 'CRC'), ('packed', 'compressed')):
    with pytest.raises(ValueError, match=message):
      export.load_exported(tmp_path / name)


def test_the_command_writes_a_file_that_it_has_compared(model, one_block, tmp_path, capsys):
  ms.save_model(tmp_path / 'm', model)
  out = tmp_path / 'runs' / 'new' / 'a.zip'
  flags = [f'--model={tmp_path / "m"}', f'--out={out}', '--way=3', '--shot=1', '--platforms=cpu,cuda']
  assert cli.main(['export', *flags]) == 0
  said = capsys.readouterr().out
  assert re.match(saying(' MB', 'for cpu, cuda;', 'read back', 'same numbers on cpu', 'labels int32[3] from 0'), said)
  assert re.match(
    saying('float32[3,16,16,1] of 0 to 1, light on dark', 'float32[Q,16,16,1] → logits float32[Q,3]'), said
  )
  assert ms.load_exported(out).about['says']['classes'] == 3


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    (['--way=30'], ['2 to 20 classes', 'got 30']),
    (['--platforms=cpu,gpu'], ['platforms', 'cpu, cuda, tpu, rocm', 'each once', "got ['cpu', 'gpu']"]),
    (['--out=/dev/null/a.zip'], ['/dev/null cannot be written', 'File exists', 'another --out']),
  ],
)
def test_a_mistake_on_the_command_line_is_one_sentence(flags, message, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  assert cli.main(['export', '--out=a.zip', *flags]) == 1
  out, err = capsys.readouterr()
  assert out == '', 'told that it exports, and does not'
  assert err.startswith('error: ')
  assert re.match(saying(*message), err)
  assert err.count('\n') == 1
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('command', [['export', '--out=a.zip'], ['info']])
def test_a_mistyped_model_is_answered_with_the_nearest(command, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  assert cli.main([*command, '--model=omniglto']) == 1
  assert capsys.readouterr().err.endswith('; did you mean omniglot?\n')
