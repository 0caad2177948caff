"""Models that few-shot trainings start from and leave: temperature, likeness, embedding."""

import dataclasses
from unittest import mock

import jax
import numpy as np
import pytest
from few_shot_settings import TINY
from problems import OneLayer, assert_trees_close, in_place_of_conv4, random_bank, saying
from small_models import small_model

import metasgd_jax as ms
from experiments import (
  calibration,
  classification,
  few_shot_data,
  few_shot_testing,
  few_shot_training,
  reporting,
)
from metasgd_jax.deploy.model_file import build_learner as build_model_learner


def test_training_starts_from_a_model(tmp_path):
  path, options = str(tmp_path / 'm.safetensors'), TINY | dict(way=3)
  model = small_model(way=3, filters=2, hidden=32, seed=1)
  ms.save_model(path, model)
  config = classification.Config(start=path, **options)
  state = few_shot_training._first_state('meta_sgd', 0, config, few_shot_training.build(config))
  assert_trees_close(state.meta, model.meta, rtol=0, atol=0)
  for other in (dict(filters=4), dict(way=4), dict(learner=('maml',))):
    with pytest.raises(ValueError, match=saying(path, '(learner, way, filters, hidden, image_shape)', 'the values')):
      few_shot_training.build(classification.Config(start=path, **options | other))
  with pytest.raises(
    ValueError, match=saying('start', 'meta_sgd, maml or prototypical', 'learner=lstm', 'leave start out')
  ):
    classification.Config(start=path, learner=('lstm',))


def test_an_embedding_is_trained_further(tmp_path):
  """The number of ways may differ, as it does not change an embedding."""
  path = str(tmp_path / 'm.safetensors')
  model = small_model('prototypical', way=4, filters=2, seed=1)
  ms.save_model(path, model)
  config = classification.Config(start=path, **TINY | dict(learner=('prototypical',), way=3))
  state = few_shot_training._first_state('prototypical', 0, config, few_shot_training.build(config))
  assert_trees_close(state.meta, model.meta, rtol=0, atol=0)


@pytest.mark.parametrize('learner', ['meta_sgd', 'maml'])
def test_training_starts_from_an_embedding(learner, tmp_path):
  """A prototypical model of any number of ways gives the layers of the embedding; all else is as without it."""
  path = str(tmp_path / 'm.safetensors')
  model = small_model('prototypical', way=4, filters=2, seed=1)
  ms.save_model(path, model)
  options = TINY | dict(learner=(learner,), way=3)
  config = classification.Config(start=path, **options)
  begin = lambda config: few_shot_training._first_state(learner, 0, config, few_shot_training.build(config)).meta
  found, fresh = begin(config), begin(classification.Config(**options))
  blocks = {f'ConvBlock_{i}' for i in range(4)}
  assert model.meta.keys() == blocks < found.theta.keys()
  assert_trees_close({name: found.theta[name] for name in blocks}, model.meta, rtol=0, atol=0)
  rest = lambda meta: {name: layer for name, layer in meta.theta.items() if name not in blocks}
  assert_trees_close(rest(found), rest(fresh), rtol=0, atol=0)
  assert_trees_close(found.alpha, fresh.alpha, rtol=0, atol=0)
  with pytest.raises(ValueError, match=saying(path, '(filters, channels) = (2, 1)', 'this run has (4, 1)')):
    few_shot_training.build(classification.Config(start=path, **options | dict(filters=4)))


ALMOST_UNTRAINED = TINY | dict(way=3, filters=4, learning_rate=1e-12, validate_every=1)


@pytest.fixture(scope='module')
def conv4_run(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('conv4')
  return workdir, classification.run(classification.Config(**ALMOST_UNTRAINED), workdir)


@pytest.mark.slow
def test_a_run_that_starts_from_anothers_model_answers_as_it_did(conv4_run, tmp_path):
  """The seed alone would give another model."""
  workdir, rows = conv4_run
  path = str(workdir / 'model_meta_sgd.safetensors')
  again = classification.run(classification.Config(start=path, seed=1, **ALMOST_UNTRAINED), tmp_path)
  np.testing.assert_allclose(again[0]['mean_by_step'], rows[0]['mean_by_step'], atol=1e-6)
  models = [ms.load_model(directory / 'model_meta_sgd.safetensors').meta for directory in (workdir, tmp_path)]
  assert_trees_close(*models, atol=1e-6)


@pytest.mark.slow
def test_a_trained_model_can_be_used(conv4_run):
  workdir, rows = conv4_run
  path = workdir / 'model_meta_sgd.safetensors'
  model = ms.load_model(path)
  assert (model.config.way, model.config.image_shape, model.config.filters) == (3, (28, 28, 1), 4)
  assert model.config.training['accuracy_1_shot_inductive'].startswith(f'{100 * rows[1]["mean"]:.2f}% ±')
  assert 'without the temperature' in model.config.training['calibration_error_1_shot']
  assert rows[1]['temperature'] == model.config.temperature
  episode = ms.tasks.glyphs(way=3, shot=1, query=2)
  support, query = episode.episode(episode.sample(jax.random.key(0)), jax.random.key(1))
  classifier = ms.FewShotClassifier(path).fit(np.asarray(support.x), np.asarray(support.y))
  assert classifier.predict(np.asarray(query.x)).shape == (6,)


@pytest.mark.slow
def test_the_temperature_is_fitted_on_other_tasks_with_inductive_batch_norm(conv4_run):
  model = ms.load_model(conv4_run[0] / 'model_meta_sgd.safetensors')
  learner, tasks = build_model_learner(model.config, inductive=True), ms.tasks.glyphs(way=3, shot=1, query=1)
  key = reporting.test_keys(1)[0]
  logits = ms.evaluate(learner, model.meta, tasks, key, metric_fn=lambda logits, _: logits, num_tasks=2)[:, 0, -1]
  labels = ms.evaluate(learner, model.meta, tasks, key, metric_fn=lambda _, labels: labels, num_tasks=2)[:, 0, -1]
  expected = calibration.best_temperature(logits.reshape(-1, 3), labels.reshape(-1))
  assert model.config.temperature == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(('classes', 'fitted'), [pytest.param(0, False, marks=pytest.mark.slow), (1, False), (2, True)])
def test_a_temperature_needs_validation_classes_but_no_validation(classes, fitted, tmp_path, monkeypatch):
  found = []

  def fit(logits, labels):
    found.append((logits.shape, labels.shape))
    return 2.5

  monkeypatch.setattr(calibration, 'best_temperature', fit)
  bank = lambda count, seed: ms.tasks.class_bank(
    np.random.default_rng(seed).integers(0, 256, (count, 20, 28, 28, 1), np.uint8)
  )
  config = classification.Config(learner=('prototypical',), **TINY | dict(way=3, eval_shots=(1, 2)))
  data = few_shot_data.Data(bank(4, 0), bank(classes, 1) if classes else None, bank(4, 2))
  with in_place_of_conv4(OneLayer):
    setup = few_shot_training.build(config, data)
    rows = classification.run(config, tmp_path, setup)
  assert {row['temperature'] for row in rows} == {2.5 if fitted else 1.0}
  assert found == ([((8, 2), (8,))] if fitted else [])  # 2 shots, 2 tasks of 2 ways, 2 query images.
  for row in rows:
    assert (row['calibration_error'] == row['calibration_error_uncalibrated']) == (not fitted)


@pytest.mark.parametrize('learner', ['meta_sgd', 'prototypical'])
def test_with_few_validation_classes_the_first_logits_are_validated(learner):
  """There are three validation classes for a model of five ways."""
  bank = lambda count, seed: random_bank(count, 20, 28, seed)
  config = classification.Config(learner=(learner,), **TINY | dict(way=5, validate_every=1, eval_tasks=5))
  with in_place_of_conv4(OneLayer):
    setup = few_shot_training.build(config, few_shot_data.Data(bank(6, 0), bank(3, 1), bank(6, 2)))
    meta = few_shot_training._first_state(learner, 0, config, setup).meta
    judge = few_shot_training._best(learner, '', config, setup, mock.Mock(metrics=[])).judge
    three = dataclasses.replace(config, way=3)
    if learner == 'meta_sgd':
      layer = {name: leaf[..., :3] for name, leaf in meta.theta['Dense_0'].items()}
      rates = {name: leaf[..., :3] for name, leaf in meta.alpha['Dense_0'].items()}
      expected = ms.MetaParams({'Dense_0': layer}, {'Dense_0': rates})
    else:
      expected = meta
    setup_of_three = few_shot_training.build(three, setup.data)
    judge_of_three = few_shot_training._best(learner, '', three, setup_of_three, mock.Mock(metrics=[])).judge
    assert judge(0, meta) == pytest.approx(judge_of_three(0, expected), abs=1e-6)
    assert 0.1 < judge(0, meta) < 1
  with pytest.raises(ValueError, match='way'):  # A learner that reads sequences has a fixed number of ways.
    few_shot_training.build(dataclasses.replace(config, learner=('mann',)), setup.data)


def test_predictions_that_are_not_finite_leave_the_temperature_at_1(monkeypatch, capsys):
  config = classification.Config(**TINY)
  setup = few_shot_training.build(config)
  broken = np.zeros((2, 1, 5, 6))
  broken[..., :5] = np.nan  # The last column has the labels.
  monkeypatch.setattr(few_shot_testing, 'validate', lambda *_: broken)
  assert few_shot_testing.temperature('meta_sgd', None, config, setup) == 1
  out = capsys.readouterr().out
  assert 'Meta-SGD' in out
  assert '10 of 10 predictions' in out
  assert 'temperature stays 1' in out


def test_the_least_likeness_is_a_quantile_on_the_validation_tasks():
  config = classification.Config(**TINY | dict(way=3, eval_tasks=3, validate_every=1))
  with in_place_of_conv4(OneLayer):
    setup = few_shot_training.build(config)
    meta = few_shot_training._first_state('meta_sgd', 0, config, setup).meta
    one, five = few_shot_testing.least_likeness('meta_sgd', meta, config, setup)
    assert few_shot_testing.least_likeness('meta_sgd', meta, config, setup._replace(validation=None)) is None
  keys = jax.random.split(reporting.test_keys(config.eval_seed + 1)[0], 3)
  for shot, expected in ((1, one), (5, five)):
    tasks, found = ms.tasks.glyphs(way=3, shot=shot, query=1), []
    for sample_key, repeat_key in map(jax.random.split, keys):
      episode_key = jax.random.split(jax.random.split(repeat_key, 1)[0])[0]
      support, query = jax.jit(lambda s, e, tasks=tasks: tasks.episode(tasks.sample(s), e))(sample_key, episode_key)
      flat = lambda batch: np.asarray(batch.x, np.float64).reshape(len(batch.x), -1)  # What the one layer is given.
      means = np.stack([flat(support)[np.asarray(support.y) == label].mean(0) for label in range(3)])
      units = [v / np.linalg.norm(v, axis=1, keepdims=True) for v in (flat(query), means)]
      found += (units[0] @ units[1].T).max(1).tolist()
    assert expected == pytest.approx(np.quantile(found, 0.01), rel=1e-5)


def test_the_model_of_joint_training_is_its_embedding(tmp_path):
  bank = lambda seed: ms.tasks.class_bank(np.random.default_rng(seed).integers(0, 256, (4, 20, 28, 28, 1), np.uint8))
  config = classification.Config(learner=('joint',), **TINY | dict(way=3))
  with in_place_of_conv4(OneLayer):
    classification.run(config, tmp_path, few_shot_training.build(config, few_shot_data.Data(bank(0), None, bank(1))))
    model = ms.load_model(tmp_path / 'model_joint.safetensors')
    assert model.config.learner == 'prototypical'
    assert model.config.training['learner'] == 'joint'
    assert not [name for name in model.config.training if 'accuracy' in name or name in ('shot', 'query', 'meta_batch')]
    assert [leaf.shape for leaf in jax.tree.leaves(model.meta)] == [(4,), (784, 4)]
