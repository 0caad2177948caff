"""The likeness of images to the classes of the support."""

import dataclasses
import pickle

import jax
import numpy as np
import pytest
from problems import saying
from small_models import able_model, pictures, small_model

import metasgd_jax as ms
from metasgd_jax.deploy import likeness
from metasgd_jax.deploy.classifier import NotFittedError
from metasgd_jax.deploy.model_file import build_learner, build_network


@pytest.fixture(scope='module')
def support():
  labels = np.repeat(np.arange(4, dtype=np.int32), 3)
  return ms.Batch(pictures(labels, seed=1)[..., None] / np.float32(255), labels)


@pytest.fixture(scope='module')
def query():
  return pictures(np.tile(np.arange(5), 4), seed=2)[..., None] / np.float32(255)


def cosines(a, b):
  return (a @ b.T) / np.linalg.norm(a, axis=1)[:, None] / np.linalg.norm(b, axis=1)


@pytest.mark.parametrize('inductive', [False, True])
@pytest.mark.parametrize('learner', ['meta_sgd', 'prototypical'])
def test_features_are_what_the_blocks_give(learner, inductive, support, query):
  config, meta = small_model(learner)
  adapted = jax.jit(build_learner(config, 4, inductive).adapt)(meta, support, jax.random.key(0))
  found = jax.jit(lambda adapted, x: likeness.features(build_network(config), adapted, x))(adapted, query)
  blocks = ms.nn.from_linen(ms.nn.Conv4(None, filters=4, hidden=0))
  theta = adapted.theta if inductive or learner == 'prototypical' else adapted
  theta = {name: leaf for name, leaf in theta.items() if name.startswith('ConvBlock')}
  given = (blocks.statistics(theta, support.x),) if inductive else ()
  np.testing.assert_allclose(found, blocks.apply(theta, query, *given), rtol=1e-5, atol=1e-5)


def test_it_is_the_cosine_with_the_most_similar_mean(support, query):
  config, meta = small_model()
  network = build_network(config)
  means = likeness.class_means(network, meta.theta, support, 4)
  features = [np.asarray(likeness.features(network, meta.theta, x), np.float64) for x in (support.x, query)]
  expected = np.stack([features[0][support.y == label].mean(0) for label in range(4)])
  np.testing.assert_allclose(means, expected, rtol=1e-5)
  found = likeness.likeness(network, meta.theta, means, query)
  np.testing.assert_allclose(found, cosines(features[1], expected).max(1), rtol=1e-5)


@pytest.mark.parametrize('inductive', [False, True])
def test_a_picture_of_no_class_has_the_least(inductive, support, query):
  classifier = ms.FewShotClassifier(able_model(), inductive=inductive).fit(support.x, support.y)
  found = classifier.likeness(query)
  assert found.shape == (20,)
  assert np.all((found >= 0) & (found <= 1))
  unknown = np.arange(20) % 5 == 4
  assert found[unknown].max() < found[~unknown].min()


def test_classes_may_have_unequal_numbers_of_examples(support, query):
  """Examples are repeated as in `fit`, so that repeating them by hand changes nothing."""
  few = ms.FewShotClassifier(small_model()).fit(support.x[:-1], support.y[:-1])
  again = np.concatenate([support.x[:-1], support.x[-3:-2]])
  repeated = ms.FewShotClassifier(small_model()).fit(again, support.y)
  np.testing.assert_allclose(few.likeness(query), repeated.likeness(query), rtol=1e-6)


def test_a_pickled_classifier_has_the_means_and_no_pictures(support, query):
  classifier = ms.FewShotClassifier(small_model()).fit(support.x, support.y)
  stored = pickle.dumps(classifier)
  assert support.x[0].tobytes() not in stored
  np.testing.assert_array_equal(pickle.loads(stored).likeness(query), classifier.likeness(query))


def test_equal_features_are_alike_by_at_most_one(support):
  """The length of a unit vector may be rounded up."""
  network = build_network(small_model().config)
  same = jax.tree.map(np.zeros_like, small_model().meta.theta)
  same = jax.tree_util.tree_map_with_path(lambda path, a: a + np.float32(0.3) if 'bias' in str(path) else a, same)
  means = likeness.class_means(network, same, support, 4)
  found = np.asarray(likeness.likeness(network, same, means, support.x))
  assert np.all((found > 0.9999) & (found <= 1))


def test_features_that_are_not_numbers_have_no_likeness(support):
  network = build_network(small_model().config)
  broken = jax.tree.map(lambda a: a * np.float32(np.nan), small_model().meta.theta)
  means = likeness.class_means(network, broken, support, 4)
  assert np.all(np.isnan(likeness.likeness(network, broken, means, support.x)))


def test_before_fit_there_is_none():
  with pytest.raises(NotFittedError, match='not fitted yet'):
    ms.FewShotClassifier(small_model()).likeness(np.zeros((1, 28, 28)))


def test_a_model_file_says_the_usual_likeness(tmp_path):
  config, meta = small_model()
  assert config.least_likeness_of(1) is None
  config = dataclasses.replace(config, least_likeness=(0.8, 0.92))
  ms.save_model(tmp_path / 'm', ms.FewShotModel(config, meta))
  loaded = ms.load_model(tmp_path / 'm').config
  assert loaded == config
  np.testing.assert_allclose([loaded.least_likeness_of(k) for k in (1, 3, 5, 1000)], [0.8, 0.9, 0.92, 0.95], atol=2e-4)
  assert dataclasses.replace(config, least_likeness=(0.5, 0.99)).least_likeness_of(1000) == 1


@pytest.mark.parametrize('bad', [(0.5,), (0.5, 1.5), (0.5, None), [0.5, 0.6], 0.5, (True, 0.5), (0.5, float('nan'))])
def test_a_likeness_that_cannot_be(bad):
  with pytest.raises(ValueError, match=saying('least_likeness', 'two numbers from 0 to 1', repr(bad))):
    dataclasses.replace(small_model().config, least_likeness=bad)
