import dataclasses
import json

import jax
import numpy as np
import pytest
import safetensors.numpy
from problems import assert_trees_close, episodes, saying
from small_models import small_model

import metasgd_jax as ms
from metasgd_jax.deploy import model_file
from metasgd_jax.io.files import WriterError

FACTS = {'dataset': 'glyphs', 'accuracy': 0.9, 'seeds': [0, 1], 'transductive': True, 'versions': {'jax': '1.0'}}


@pytest.fixture(scope='module')
def model():
  return small_model(training=FACTS)


def rewritten(path, model, tensors=None, metadata=None, **changes):
  """Writes a model's file with tensors and metadata replaced, and fields of its config changed."""
  whole = {jax.tree_util.keystr(p, simple=True, separator='/'): v for p, v in jax.tree.leaves_with_path(model.meta)}
  if metadata is None:
    metadata = {'format_version': '1', 'config': json.dumps(dataclasses.asdict(model.config) | changes)}
  safetensors.numpy.save_file(whole if tensors is None else tensors(whole), path, metadata)
  return path


@pytest.mark.parametrize('learner', ['meta_sgd', 'maml', 'prototypical'])
def test_a_model_comes_back(tmp_path, learner):
  model = small_model(learner, training=FACTS, background='any', temperature=0.625)
  ms.save_model(tmp_path / 'm.safetensors', model)
  back = ms.load_model(tmp_path / 'm.safetensors')
  assert back.config == model.config
  assert back.config.temperature == 0.625
  assert_trees_close(back.meta, model.meta, rtol=0, atol=0)
  assert (getattr(back.meta, 'alpha', None) is None) == (learner != 'meta_sgd')
  assert [path.name for path in tmp_path.iterdir()] == ['m.safetensors']


def test_parameters_of_a_run_are_no_model(tmp_path, model):
  path = rewritten(tmp_path / 'params_maml.safetensors', model, metadata={})
  with pytest.raises(ValueError, match=saying('no metadata', 'give model_maml.safetensors of the same directory')):
    ms.load_model(path)


def test_rewriting_it_by_hand_gives_a_model_that_loads(tmp_path, model):
  assert ms.load_model(rewritten(tmp_path / 'm', model)).config == model.config


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (dict(metadata={}), ('no metadata', 'save_model')),
    (dict(metadata={'config': '{}'}), ('no metadata', 'save_model')),
    (dict(metadata={'format_version': 'one', 'config': '{}'}), ("version 'one'", 'positive integer')),
    (dict(metadata={'format_version': '2', 'config': '?'}), ('version 2', 'newer than 1', 'upgrade')),
    (dict(metadata={'format_version': '1', 'config': '{'}), ('does not describe a model',)),
    (dict(metadata={'format_version': '1', 'config': '[' * 100_000}), ('does not describe a model',)),
    (dict(metadata={'format_version': '1', 'config': '[]'}), ('JSON object', 'got list')),
    (dict(metadata={'format_version': '1', 'config': '{}'}), ('does not describe a model', 'missing')),
    (dict(colour='red'), ('does not describe a model', "'colour'")),
    (dict(way=1), ('way', 'from 2 to 10,000', 'got 1')),
    (dict(way=10**40), ('way', 'integer from 2')),
    (dict(way=5.0), ('way', 'integer from 2', 'got 5.0')),
    (dict(filters=True), ('filters', 'integer from 1', 'got True')),
    (dict(image_shape=[28, 28]), ('image_shape', 'tuple', '(28, 28)')),
    (dict(image_shape=[8, 28, 1]), ('image_shape', 'at least 16x16', '(8, 28, 1)')),
    (dict(learner='protonet'), ('learner', 'one of', "got 'protonet'")),
    (dict(learner=['maml']), ('learner', 'one of')),
    (dict(learner='maml'), ('alpha', "MAML's rate", 'finite number', 'got None')),
    (dict(learner='maml', alpha='0.4'), ('alpha', "MAML's rate", "got '0.4'")),
    (dict(learner='maml', alpha=True), ('alpha', "MAML's rate", 'got True')),
    (dict(alpha=0.4), ('alpha', 'None for meta_sgd', 'got 0.4')),
    (dict(least_likeness=[0.5]), ('least_likeness', 'two numbers from 0 to 1', 'got (0.5,)')),
    (dict(least_likeness=['a', 0.5]), ('least_likeness', 'two numbers from 0 to 1', "got ('a', 0.5)")),
    (dict(least_likeness=0.5), ('least_likeness', 'two numbers from 0 to 1', 'got 0.5')),
    (dict(temperature=True), ('temperature', 'from 1e-6 to 1e6', 'got True')),
    (dict(temperature=0), ('temperature', 'from 1e-6 to 1e6', 'got 0')),
    (dict(temperature='1'), ('temperature', 'from 1e-6 to 1e6', "got '1'")),
    (dict(temperature=None), ('temperature', 'from 1e-6 to 1e6', 'got None')),
    (dict(learner='prototypical'), ('prototypical', 'hidden=0', 'got hidden=8, inner_steps=1')),
    (dict(background='light'), ('background', 'one of', "got 'light'")),
    (dict(training=[1]), ('training', 'a dict', 'got [1]')),
    (dict(filters=8), ('for the tensor', 'but its config asks for')),
    (dict(hidden=0), ('tensor', 'made with another config')),
    (dict(learner='maml', alpha=0.4), ('should not have', 'tensor alpha/')),
    (dict(tensors=lambda t: {}), ('lacks the tensor alpha/',)),
    (dict(tensors=lambda t: t | {'extra': np.zeros(1)}), ('should not have', 'tensor extra;', 'unexpected: 1')),
    (dict(tensors=lambda t: {k: v.astype(np.float64) for k, v in t.items()}), ('F64', 'asks for float32')),
    (dict(tensors=lambda t: {k: v.ravel() for k, v in t.items()}), ('its config asks for float32',)),
    (dict(tensors=lambda t: {k: v * np.float32('nan') for k, v in t.items()}), ('tensor', 'not finite')),
  ],
)  # fmt: skip
def test_a_file_that_is_not_quite_a_model_is_refused_by_name(tmp_path, model, change, message):
  path = rewritten(tmp_path / 'bad.safetensors', model, **change)
  with pytest.raises(ValueError, match=saying(*message)) as e:
    ms.load_model(path)
  assert str(e.value).startswith(str(path))
  assert '\n' not in str(e.value)


@pytest.mark.parametrize('cut', [0, 5, 300, -1])
def test_a_file_cut_short_is_refused(tmp_path, model, cut):
  ms.save_model(tmp_path / 'm', model)
  (tmp_path / 'm').write_bytes((tmp_path / 'm').read_bytes()[:cut])
  with pytest.raises(ValueError, match=saying(tmp_path / 'm', 'incomplete', 'get the file again')):
    ms.load_model(tmp_path / 'm')


def test_a_file_of_something_else_is_refused(tmp_path):
  (tmp_path / 'm').write_bytes(b'PK\x03\x04' * 100)
  with pytest.raises(ValueError, match=saying(tmp_path / 'm', 'not a safetensors file')):
    ms.load_model(tmp_path / 'm')


@pytest.mark.parametrize('path', ['nothing-here', '', '.', '\0', '~nobody-of-that-name/m'])
def test_no_file_and_no_model_of_that_name(path):
  with pytest.raises(ValueError, match='there is no model file|there is no such home directory'):
    ms.load_model(path)


def test_what_would_not_load_is_not_saved(tmp_path, model):
  theta = jax.tree.map(lambda t: t + np.float32(np.inf), model.meta.theta)
  for meta, message in (
    (model.meta._replace(theta=theta), 'not finite'),
    (model.meta._replace(alpha=None), 'lacks the tensor alpha'),
    (jax.tree.map(np.float64, model.meta), 'has float64'),
  ):
    with pytest.raises(ValueError, match=message):
      ms.save_model(tmp_path / 'm', model._replace(meta=meta))
  with pytest.raises(ValueError, match=saying('training', 'JSON')):
    dataclasses.replace(model.config, training={'accuracy': float('nan')})
  assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written(tmp_path, model):
  with pytest.raises(WriterError, match=saying(tmp_path / 'no' / 'm', 'No such file', 'give another path')):
    ms.save_model(tmp_path / 'no' / 'm', model)


@pytest.mark.parametrize('inductive', [False, True])
def test_with_fewer_classes_the_first_logits_are_used(model, inductive):
  x = np.random.default_rng(0).random((6, 28, 28, 1), np.float32)
  support = ms.Batch(x[:3], np.arange(3, dtype=np.int32))
  learner = model_file.build_learner(model.config, 3, inductive)

  @jax.jit
  def answers(meta):
    return learner.predict(learner.adapt(meta, support, jax.random.key(0)), x[3:])

  logits = answers(model.meta)
  assert logits.shape == (3, 3)
  # What belongs to the other logits takes no part.
  name = max(name for name in model.meta.theta if name.startswith('Dense'))
  dense = model.meta.theta[name]
  other = {'kernel': dense['kernel'].copy(), 'bias': dense['bias'].copy()}
  other['kernel'][:, 3:] += 7
  other['bias'][3:] += 7
  changed = answers(model.meta._replace(theta=model.meta.theta | {name: other}))
  np.testing.assert_allclose(logits, changed, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('way', [1, 6, 2.0, True])
def test_more_classes_than_a_model_has(model, way):
  with pytest.raises(ValueError, match=saying('2 to 5 classes', f'got {way!r}')):
    model_file.build_learner(model.config, way)


def test_shipped_models_load_by_name():
  assert 'omniglot' in model_file.shipped_models()
  for name in model_file.shipped_models():
    assert model_file.model_size(name) < 3e6
    assert ms.load_model(name).config.training


@pytest.fixture(scope='module')
def unseen():
  """Four episodes of characters that no shipped model was trained on."""
  return jax.device_get(episodes(ms.tasks.glyphs(way=5, shot=1, query=5), 4))


@pytest.mark.parametrize('inductive', [False, True])
def test_the_shipped_model_tells_characters_apart_that_it_never_saw(unseen, inductive):
  model = ms.load_model('omniglot')
  learner = model_file.build_learner(model.config, 5, inductive)
  support, query = unseen

  @jax.jit
  def answers(meta, support, query):
    return learner.predict(learner.adapt(meta, support, jax.random.key(0)), query)

  found = [answers(model.meta, *jax.tree.map(lambda a, i=i: a[i], (support, query.x))) for i in range(4)]
  right = np.mean([np.argmax(f, -1) == y for f, y in zip(found, query.y, strict=True)])
  assert right > 0.6  # Chance is 0.2.
