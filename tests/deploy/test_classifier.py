import dataclasses
import pickle
import warnings

import jax
import numpy as np
import pytest
import sklearn.base
import sklearn.exceptions
import sklearn.model_selection
from problems import saying
from scipy.special import softmax
from sklearn.utils import estimator_checks
from small_models import able_model, pictures, small_model

import metasgd_jax as ms
from metasgd_jax.deploy import classifier as module
from metasgd_jax.deploy.classifier import FewShotClassifier, NotFittedError

NAMES = np.array(['rows', 'columns', 'diagonals', 'blot', 'frame'])
LABELS = np.repeat(np.arange(5), 4)


@pytest.fixture(scope='module')
def able():
  return able_model()


@pytest.fixture(scope='module')
def fitted(able):
  return FewShotClassifier(able).fit(pictures(LABELS), NAMES[LABELS])


@pytest.fixture(scope='module')
def small():
  return small_model()


@pytest.mark.parametrize('inductive', [True, False])
def test_it_learns_new_classes(able, inductive):
  classifier = FewShotClassifier(able, inductive=inductive).fit(pictures(LABELS), NAMES[LABELS])
  assert list(classifier.classes_) == sorted(NAMES)
  assert classifier.n_features_in_ == 784
  assert classifier.score(pictures(LABELS, seed=1), NAMES[LABELS]) > 0.9


def test_labels_may_be_numbers_and_classes_fewer(able):
  labels = np.array([30, 10, 30, 10, 10])
  classifier = FewShotClassifier(able).fit(pictures(labels // 10), labels)
  answers = classifier.predict(pictures([3, 1, 1], seed=1))
  assert answers.tolist() == [30, 10, 10]
  assert answers.dtype == labels.dtype


def test_probabilities_logits_and_answers_agree(fitted):
  x = pictures(LABELS, seed=2)
  probabilities, logits = fitted.predict_proba(x), fitted.decision_function(x)
  assert probabilities.shape == logits.shape == (20, 5)
  np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-12)
  assert np.array_equal(fitted.classes_[probabilities.argmax(1)], fitted.predict(x))
  assert np.array_equal(probabilities.argmax(1), logits.argmax(1))


def test_probabilities_are_of_the_logits_divided_by_the_temperature(able):
  warm = able._replace(config=dataclasses.replace(able.config, temperature=4.0))
  x = pictures(LABELS, seed=2)
  probabilities, logits = (
    getattr(FewShotClassifier(model).fit(pictures([0, 3, 4]), [0, 3, 4]), ask)(x)
    for model, ask in ((warm, 'predict_proba'), (able, 'decision_function'))
  )
  np.testing.assert_allclose(probabilities, softmax(logits.astype(float) / 4, 1), rtol=1e-6)


def test_two_classes_have_one_decision(able):
  classifier = FewShotClassifier(able).fit(pictures([0, 3]), ['a', 'b'])
  x = pictures(LABELS)
  decision = classifier.decision_function(x)
  assert decision.shape == (20,)
  probability = classifier.predict_proba(x)[:, 1]
  np.testing.assert_allclose(probability, 1 / (1 + np.exp(-decision.astype(float))), rtol=1e-4)
  assert np.array_equal(classifier.predict(x) == 'b', decision > 0)


def test_every_form_of_the_same_pictures_gives_the_same(fitted):
  x = pictures(LABELS, seed=3)
  expected = fitted.decision_function(x)
  for form in (x[..., None], x.reshape(20, -1), x / np.float32(255), x / 255, x.tolist(), x.astype(np.int64)):
    np.testing.assert_allclose(fitted.decision_function(form), expected, rtol=1e-4, atol=1e-4)


def test_inductive_answers_depend_on_their_own_picture_alone(fitted):
  x = pictures(np.resize(LABELS, 40), seed=4)
  together = fitted.decision_function(x)
  assert len(x) > module.AT_ONCE
  np.testing.assert_array_equal(fitted.decision_function(x[:1]), together[:1])
  np.testing.assert_array_equal(fitted.decision_function(x[::-1])[::-1], together)


def test_transductive_answers_depend_on_the_others(able):
  classifier = FewShotClassifier(able, inductive=False).fit(pictures(LABELS), LABELS)
  x = pictures(LABELS, seed=4)
  assert not np.allclose(classifier.decision_function(x[:1]), classifier.decision_function(x)[:1], atol=1e-2)


def test_a_class_with_more_pictures_does_not_weigh_more(able):
  x = pictures([0, 3])
  once = FewShotClassifier(able).fit(x, [0, 3])
  more = FewShotClassifier(able).fit(x[[0, 1, 1, 1]], [0, 3, 3, 3])
  query = pictures(LABELS, seed=1)
  np.testing.assert_allclose(once.decision_function(query), more.decision_function(query), rtol=1e-2, atol=1e-2)


def test_light_paper_is_turned_dark(able, fitted):
  x = pictures(LABELS, seed=5)
  expected = fitted.decision_function(x)
  light = FewShotClassifier(able).fit(255 - pictures(LABELS), NAMES[LABELS])
  assert light.inverted_
  assert not fitted.inverted_
  np.testing.assert_array_equal(light.decision_function(255 - x), expected)
  # Each picture goes by its own background.
  mixed = np.concatenate([255 - x[:3], x[3:]])
  for classifier in (light, fitted):
    np.testing.assert_allclose(classifier.decision_function(mixed), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
  ('invert', 'background', 'inverted'),
  [('auto', 'dark', True), ('auto', 'any', False), (True, 'any', True), (False, 'dark', False)],
)
def test_whether_light_pictures_are_inverted(invert, background, inverted):
  model = small_model(background=background)
  classifier = FewShotClassifier(model, invert=invert).fit(255 - pictures([0, 1]), [0, 1])
  assert classifier.inverted_ is inverted


def test_steps_are_the_models_or_ones_own(small):
  x = pictures(LABELS)
  before = FewShotClassifier(small, steps=0).fit(x, LABELS).decision_function(x)
  own = FewShotClassifier(small).fit(x, LABELS).decision_function(x)
  one = FewShotClassifier(small, steps=1).fit(x, LABELS).decision_function(x)
  np.testing.assert_array_equal(own, one)
  assert not np.allclose(before, one)


def test_a_model_may_be_a_file(tmp_path, small):
  ms.save_model(tmp_path / 'm.safetensors', small)
  x = pictures(LABELS)
  of_file = FewShotClassifier(tmp_path / 'm.safetensors').fit(x, LABELS)
  np.testing.assert_array_equal(
    of_file.decision_function(x), FewShotClassifier(small).fit(x, LABELS).decision_function(x)
  )


def test_colour_pictures_of_another_size():
  model = small_model(image_shape=(32, 24, 3), background='any')
  x = np.random.default_rng(0).integers(0, 256, (4, 32, 24, 3), np.uint8)
  classifier = FewShotClassifier(model).fit(x, [0, 1, 2, 2])
  assert classifier.predict_proba(x.reshape(4, -1)).shape == (4, 3)
  with pytest.raises(ValueError, match=saying('[n, 32, 24, 3]', '(4, 32, 24, 1)')):
    classifier.predict(x[..., :1])


def test_calls_of_a_shape_seen_before_compile_nothing(small):
  x = pictures(LABELS)

  def use(seed):
    for inductive in (True, False):
      classifier = FewShotClassifier(small_model(seed=seed), inductive=inductive).fit(x, LABELS)
      classifier.predict(x)
    return classifier

  use(0)
  # An inductive classifier has one program for any number of pictures.
  FewShotClassifier(small).fit(x, LABELS).predict(x[:3])
  programs = module._adapt._cache_size(), module._predict._cache_size()
  use(1)
  FewShotClassifier(small).fit(x, LABELS).predict(pictures(np.resize(LABELS, 70)))
  assert (module._adapt._cache_size(), module._predict._cache_size()) == programs


class PandasNA:
  """Compares as the missing value of pandas does: the result has no truth value."""

  def __ne__(self, other):
    return self

  def __bool__(self):
    raise TypeError('boolean value of NA is ambiguous')


def test_drawings_of_two_values_may_be_booleans(fitted):
  x = pictures(LABELS, seed=3) > 100
  np.testing.assert_array_equal(fitted.decision_function(x), fitted.decision_function(x.astype(np.float32)))


@pytest.mark.parametrize(
  ('images', 'labels', 'message'),
  [
    (pictures([0, 1]), ['a', 'a'], ('at least two classes', "'a' alone")),
    (pictures([0] * 6), range(6), ('at most 5 classes', 'got 6', 'fewer')),
    (pictures([0, 1]), ['a'], ('a label for each', '2 images', '(1,)')),
    (pictures([0, 1]), [['a'], ['b']], ('a label for each', '2 images', '(2, 1)')),
    (pictures([0, 1]), None, ('a label for each', '2 images', 'shape ()')),
    (pictures([0, 1]), [0.0, np.nan], ('labels', 'NaN', 'leave those pictures out')),
    (pictures([0, 1]), np.array(['a', 1], object), ('labels', 'of one kind', 'convert them')),
    (pictures([0, 1], size=32), [0, 1], ('[n, 28, 28, 1]', '(2, 32, 32)')),
    (np.zeros((2, 28, 28, 3)), [0, 1], ('[n, 28, 28, 1]', '(2, 28, 28, 3)')),
    (np.zeros((2, 700)), [0, 1], ('flat [n, 784]', '(2, 700)', 'resize them')),
    (np.zeros(784), [0, 1], ('flat [n, 784]', '(784,)')),
    (np.float32(3), [0, 1], ('[n, 28, 28, 1]', 'shape ()')),
    (np.zeros((0, 28, 28)), [], ('at least one image', '(0, 28, 28)')),
    ([], [], ('at least one image', '(0,)')),
    ([np.zeros((28, 28)), np.zeros((20, 20))], [0, 1], ('images', 'different shapes', 'resize them')),
    (np.full((2, 784), np.nan), [0, 1], ('images', 'finite', 'leave those pictures out')),
    (np.full((2, 784), np.inf), [0, 1], ('images', 'finite', 'leave those pictures out')),
    (np.full((2, 784), 255.0), [0, 1], ('0 to 1', '255 to 255', 'divide by 255')),
    (np.full((2, 784), -0.5), [0, 1], ('0 to 1', '-0.5 to -0.5')),
    (pictures([0, 1]), ['a', None], ('labels', 'missing', 'leave those pictures out')),
    (pictures([0, 1]), ['a', float('nan')], ('labels', 'missing', 'leave those pictures out')),
    (pictures([0, 1]), ['a', PandasNA()], ('labels', 'missing', 'leave those pictures out')),
    (pictures([0, 1]), np.array(['2020-01-01', 'NaT'], 'M8[D]'), ('labels', 'missing')),
    (pictures([0, 1]), ['a', 1], ('labels', 'of one kind', 'convert them')),
    (np.full((2, 784), 256), [0, 1], ('integer images', '0 to 255', '256 to 256')),
    (np.full((2, 784), -1), [0, 1], ('integer images', '0 to 255', '-1 to -1')),
    (np.ones((2, 784), int), [0, 1], ('integer images', 'only 0 and 1', 'booleans or floats')),
    (np.zeros((2, 784), object), [0, 1], ('integers (0 to 255)', 'floats', 'got object', 'convert them')),
    (np.full((2, 784), 'a'), [0, 1], ('integers (0 to 255)', 'got <U1')),
  ],
)
def test_what_does_not_fit_is_one_sentence(small, images, labels, message):
  with pytest.raises(ValueError, match=saying(*message)) as e:
    FewShotClassifier(small).fit(images, list(labels) if isinstance(labels, range) else labels)
  assert '\n' not in str(e.value)


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (dict(model='no-such-model'), ('no model file', 'no-such-model')),
    (dict(steps=-1), ('inner_steps', 'integer from 0', 'got -1')),
    (dict(invert='yes'), ('invert', "'auto', True or False", "got 'yes'")),
  ],
)
def test_bad_arguments_are_told_in_fit(small, arguments, message):
  classifier = FewShotClassifier(**(dict(model=small) | arguments))
  with pytest.raises(ValueError, match=saying(*message)):
    classifier.fit(pictures([0, 1]), [0, 1])


def test_before_fit_there_are_no_answers(small):
  for ask in ('predict', 'predict_proba', 'decision_function'):
    with pytest.raises(NotFittedError, match=saying('not fitted', 'call fit')):
      getattr(FewShotClassifier(small), ask)(pictures([0]))
  assert issubclass(NotFittedError, sklearn.exceptions.NotFittedError.__bases__)


def test_scoring_needs_a_label_for_each(fitted):
  with pytest.raises(ValueError, match=saying('a label for each', '2 images', '(3,)')):
    fitted.score(pictures([0, 1]), ['rows'] * 3)


def test_scoring_compares_labels_of_one_kind_and_counts_weights(fitted):
  x = pictures([0, 1])
  with pytest.raises(ValueError, match=saying('labels', 'like the classes', 'got int 1')):
    fitted.score(x, [1, 2])
  with pytest.raises(ValueError, match=saying('labels', 'like the classes', "got bytes b'rows'")):
    fitted.score(x, [b'rows', b'columns'])
  for missing in (['rows', None], np.ma.array(['rows', 'columns'], mask=[False, True])):
    with pytest.raises(ValueError, match=saying('labels', 'missing')):
      fitted.score(x, missing)
  answers = fitted.predict(x)
  wrong_second = [answers[0], 'another']
  assert fitted.score(X=x, y=wrong_second) == 0.5
  assert fitted.score(X=x, y=wrong_second, sample_weight=[3, 1]) == 0.75


def test_it_pickles_before_and_after_fit(small, fitted):
  x = pictures(LABELS, seed=6)
  again = pickle.loads(pickle.dumps(fitted))
  np.testing.assert_array_equal(again.predict_proba(x), fitted.predict_proba(x))
  assert pickle.loads(pickle.dumps(FewShotClassifier('a', steps=2))).get_params() == dict(
    model='a', inductive=True, steps=2, invert='auto'
  )


def test_parameters_are_set_by_name_and_shown():
  classifier = FewShotClassifier().set_params(steps=3, inductive=False)
  assert repr(classifier) == 'FewShotClassifier(inductive=False, steps=3)'
  assert repr(FewShotClassifier()) == 'FewShotClassifier()'
  with pytest.raises(ValueError, match=saying("'step'", 'model, inductive, steps, invert')):
    classifier.set_params(inductive=True, step=1)
  assert not classifier.inductive


def test_a_model_in_hand_is_shown_in_short(small):
  assert repr(FewShotClassifier(small)) == 'FewShotClassifier(model=FewShotModel(…))'


def test_scikit_learn_clones_it_unfitted(fitted):
  clone = sklearn.base.clone(fitted)
  assert sklearn.base.is_classifier(clone)
  assert repr(clone) == repr(fitted)
  with pytest.raises(NotFittedError):
    clone.predict(pictures([0]))


@pytest.mark.parametrize('flat', [False, True])
def test_scikit_learn_cross_validates_it(able, flat):
  x = pictures(LABELS)
  x = x.reshape(20, -1) if flat else x
  scores = sklearn.model_selection.cross_val_score(FewShotClassifier(able), x, NAMES[LABELS], cv=2)
  assert scores.shape == (2,)
  assert scores.mean() > 0.8


def test_scikit_learn_searches_over_its_steps(able):
  search = sklearn.model_selection.GridSearchCV(FewShotClassifier(able), {'steps': [0, 20]}, cv=2)
  search.fit(pictures(LABELS).reshape(20, -1), NAMES[LABELS])
  assert search.best_params_ == {'steps': 20}
  assert search.score(pictures(LABELS, seed=1).reshape(20, -1), NAMES[LABELS]) > 0.9


# The others fit tables of 1 to 10 columns of any range, where a model takes pictures of its own size from 0 to 1; or
# they ask for what it does not have: weights of samples, transforming, regression. One asks that fit's second argument
# be called y.
@pytest.mark.parametrize(
  'check',
  [
    'check_do_not_raise_errors_in_init_or_set_params',
    'check_estimator_cloneable',
    'check_estimator_repr',
    'check_estimator_tags_renamed',
    'check_get_params_invariance',
    'check_mixin_order',
    'check_no_attributes_set_in_init',
    'check_parameters_default_constructible',
    'check_set_params',
    'check_valid_tag_types',
  ],
)
def test_scikit_learns_checks(check):
  getattr(estimator_checks, check)('FewShotClassifier', FewShotClassifier())


class OfTables(FewShotClassifier):
  """Makes pictures of scikit-learn's tables, so that its checks of fitting apply."""

  def fit(self, X, y):
    return super().fit(self._pictures(X), y)

  def predict(self, X):
    return super().predict(self._pictures(X))

  def decision_function(self, X):
    return super().decision_function(self._pictures(X))

  def predict_proba(self, X):
    return super().predict_proba(self._pictures(X))

  def _pictures(self, X):
    return np.resize(np.clip(np.abs(np.asarray(X, np.float32)), 0, 1), (len(X), 784))


@pytest.mark.parametrize(
  'check', ['check_dont_overwrite_parameters', 'check_dict_unchanged', 'check_estimators_fit_returns_self']
)
def test_scikit_learns_checks_of_fitting(small, check):
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    getattr(estimator_checks, check)('OfTables', OfTables(small))


def test_jax_arrays_are_taken(fitted):
  x = pictures(LABELS[:2])
  np.testing.assert_array_equal(fitted.predict(jax.numpy.asarray(x)), fitted.predict(x))
