"""Few-shot classification from configurations: every learner, settings that do not go together, checkpoints."""

import contextlib
import dataclasses
import functools

import jax
import numpy as np
import pytest
from few_shot_settings import TINY, draw_folder
from problems import OneLayer, SmallConvNet, in_place_of_conv4, saying

import metasgd_jax as ms
from experiments import (
  classification,
  few_shot_data,
  few_shot_learners,
  few_shot_training,
)
from experiments.few_shot_learners import LEARNERS, NAMES, SEQUENTIAL


def of_three():
  """An episode of three classes, an image of each to show and one to ask."""
  batch = lambda seed: ms.Batch(np.random.default_rng(seed).random((3, 28, 28, 1), np.float32), np.arange(3))
  return ms.Episode(batch(0), batch(1))


def assert_trained_and_tested(name):
  """Traced, not compiled: shapes fit, a key is there where one is needed, and every answer is one of N."""
  config = classification.Config(learner=(name,), way=3, shot=1, query=2, filters=4)
  bank = ms.tasks.class_bank(np.random.default_rng(0).integers(0, 256, (6, 20, 28, 28, 1), np.uint8))
  setup = few_shot_training.build(config, few_shot_data.Data(bank, None, bank))
  learner, tasks = setup.learners[name], setup.train[name]
  state = jax.eval_shape(
    lambda key: ms.init(key, tasks, learner=learner, optimizer=setup.optimizers[name]), jax.random.key(0)
  )
  step = lambda state: ms.train_step(
    state, tasks, learner=learner, optimizer=setup.optimizers[name], meta_batch=2, placement=ms.Placement(1)
  )
  after, info = jax.eval_shape(step, state)
  assert jax.tree.structure(after.meta) == jax.tree.structure(state.meta)
  assert 'accuracy' in info
  test = setup.tests[1]

  def answered(meta, key, tester):
    support, query = test.episode(test.sample(key), key)
    return tester.predict(tester.adapt(meta, support, key), query.x)

  for inductive in (False, True):
    tester = setup.testers[name, inductive]
    answers = jax.eval_shape(functools.partial(answered, tester=tester), state.meta, jax.random.key(0))
    assert answers.shape == (45, 3)


@pytest.mark.parametrize('name', LEARNERS)
def test_every_learner_can_be_trained_and_tested(name):
  # ANIL's rates are by the names of Conv4's layers.
  with contextlib.nullcontext() if name == 'anil' else in_place_of_conv4(OneLayer):
    assert_trained_and_tested(name)


@pytest.mark.slow
@pytest.mark.parametrize('name', LEARNERS)
def test_every_learner_can_be_trained_and_tested_with_conv4(name):
  assert_trained_and_tested(name)


def test_each_learner_is_another():
  """A name that built its neighbour's learner would go unseen in a table."""
  config = classification.Config(way=3, filters=2)
  build = lambda name, **options: few_shot_learners.build_learner(name, config, **options)
  key, one = jax.random.key(0), of_three()

  def adapted(name):
    """Which leaves of θ an inner step moves."""
    init = jax.jit(build(name).init)(key, one)
    meta, after = jax.device_get((init, jax.jit(build(name).adapt)(init, one.support, None)))
    return jax.tree.map(lambda a, b: bool(np.any(a != b)), after, meta.theta)

  moved = adapted('anil')
  assert all(jax.tree.leaves(moved.pop('Dense_1')))
  assert not any(jax.tree.leaves(moved))
  with in_place_of_conv4(SmallConvNet):
    assert any(jax.tree.leaves(adapted('maml')['ConvBlock_0']))
    meta = jax.jit(build('maml').init)(key, one)
    slope = lambda name: jax.grad(lambda meta: build(name).loss(meta, one, None)[0])(meta).theta['Dense_0']['kernel']
    first_order, second = jax.jit(lambda: (slope('fomaml'), slope('maml')))()
    assert np.any(np.abs(np.subtract(first_order, second)) > 1e-6)

    def steps(name, **options):
      path = jax.eval_shape(lambda meta: build(name, **options).path(meta, one.support, None), meta)
      return jax.tree.leaves(path)[0].shape[0]

    assert [steps('maml'), steps('maml_5'), steps('maml_5', test=True)] == [2, 6, 11]

  whole = dataclasses.replace(config, filters=None)
  init = lambda name: jax.eval_shape(few_shot_learners.build_learner(name, whole).init, key, one)
  rates = {name: init(name).alpha for name in ('meta_sgd', 'layer_rates')}
  assert {leaf.size for leaf in jax.tree.leaves(rates['layer_rates'])} == {1}
  assert sum(leaf.size for leaf in jax.tree.leaves(rates['meta_sgd'])) > 100_000
  fce, bare = (init(name) for name in ('matching_fce', 'matching'))
  assert bare.support_context is None
  assert fce.support_context is not None
  cells = [init(name) for name in SEQUENTIAL]
  assert ['gates' in cell for cell in cells] == [True, False]


def test_checkpoints_are_kept_by_their_accuracy():
  accuracies = iter([0.5, 0.9, 0.7, 0.8, 0.6])
  best = few_shot_training.Best(lambda step, meta: next(accuracies), every=10, keep=3)
  for step in range(5, 51, 5):
    state = ms.TrainState(np.int32(step), None, {'w': np.float32(step)}, None)
    best(ms.Progress(state, step, 50, {}, 1.0, 1.0))
  assert [(a, step, float(meta['w'])) for a, step, meta in best.found] == [(0.9, 20, 20), (0.8, 40, 40), (0.7, 30, 30)]


def test_an_accuracy_that_is_nan_is_the_worst():
  accuracies = iter([np.nan, 0.9, 0.1, np.nan])
  best = few_shot_training.Best(lambda step, meta: next(accuracies), every=1, keep=2)
  for step in range(4):
    best(ms.Progress(ms.TrainState(np.int32(step), None, {}, None), step, 4, {}, 1.0, 1.0))
  assert [(accuracy, step) for accuracy, step, _ in best.found] == [(0.9, 1), (0.1, 2)]


def test_images_stay_on_the_host_where_asked():
  bank = ms.tasks.class_bank(np.zeros((6, 20, 28, 28, 1), np.uint8))
  data = few_shot_data.Data(bank, None, bank)
  for stream, kind in (('yes', ms.TaskStream), ('no', ms.TaskDistribution), ('auto', ms.TaskDistribution)):
    config = classification.Config(
      learner=('meta_sgd', 'joint', 'mann'), dataset='omniglot', data_dir='DIR', stream=stream, way=3
    )
    setup = few_shot_training.build(config, data)
    for tasks in (*setup.train.values(), *setup.tests.values()):
      assert isinstance(tasks, kind)
  assert not few_shot_data.streamed(bank, 'auto')
  assert not few_shot_data.streamed(bank, 'no')


@pytest.mark.parametrize(
  ('values', 'message'),
  [
    (dict(table2=True, table3=True), ('table2 and table3', 'give one')),
    (dict(dataset='mini_imagenet'), ('mini_imagenet', 'data_dir')),
    (dict(ensemble=3), ('ensemble=3', '--validate_every=N')),
    (dict(channels=2), ('channels', '1 or 3', 'got 2')),
    (dict(eval_shots=(0,)), ('eval_shots', 'at least 1', '(0,)')),
    (dict(eval_shots=(1, 1)), ('eval_shots', 'each once')),
    (dict(multi_step_loss=True), ('multi_step_loss', 'inner_steps=1', 'at least 2')),
    (dict(alpha_by_step=True), ('alpha_by_step', 'inner_steps=1', 'at least 2')),
    (dict(ensemble=3, validate_every=200), ('ensemble=3', '2 validations', '500 meta-iterations', 'lower')),
    (dict(table2=True, dataset='glyphs'), ('table', 'dataset=glyphs', 'leave --dataset out')),
    (dict(class_lists='lists'), ('class_lists', 'folder', 'dataset=glyphs', 'leave class_lists out')),
    (dict(data_dir='x'), ('data_dir', 'omniglot or', 'dataset=glyphs', '--data_dir=x', 'leave data_dir out')),
    (dict(cache='x', dataset='folder', data_dir='x'), ('cache', 'mini_imagenet', 'dataset=folder', 'leave cache out')),
    (dict(split='vinyals', dataset='cifar_fs', data_dir='x'), ('split works', 'omniglot', '--split=vinyals')),
    (dict(split_seed=1), ('split_seed works', 'omniglot or folder', '--split_seed=1')),
    (dict(validation_classes=9, dataset='folder', data_dir='x'), ('omniglot', '--validation_classes=9')),
    (dict(image_size=32, dataset='cifar_fs', data_dir='x'), ('image_size', '--image_size=32', 'dataset=cifar_fs')),
    (dict(channels=1, dataset='omniglot', data_dir='x'), ('channels', 'dataset=folder', '--channels=1')),
    (dict(verify_archives=False, dataset='folder', data_dir='x'), ('verify_archives', '--noverify_archives')),
  ],
)
def test_settings_that_do_not_go_together(values, message):
  with pytest.raises(ValueError, match=saying(*message)):
    classification.Config(**values)


def test_mamls_rates_are_its_papers():
  rate = lambda name, **options: few_shot_learners.maml_rate(
    name, classification.Config(data_dir='somewhere', **options)
  )
  assert rate('maml', dataset='omniglot') == 0.4
  assert rate('maml_5', dataset='omniglot', way=20) == 0.1
  assert rate('maml_5', dataset='mini_imagenet') == 0.01
  assert rate('fomaml', dataset='cifar_fs') == 0.01
  assert rate('maml', dataset='omniglot', alpha=0.2) == 0.2


def test_a_sequence_has_ten_images_of_a_class():
  config = classification.Config(learner=('mann',), shot=10)
  with pytest.raises(ValueError, match=saying('mann', '10 images', 'shot=10', 'lower shot')):
    few_shot_training.build(config)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['random', 'lstm'])
def test_an_ensemble_of_what_is_not_trained_and_of_what_reads_sequences(name, tmp_path, mini_imagenet):
  config = classification.Config(
    learner=(name,), dataset='folder', data_dir=str(mini_imagenet), image_size=16, validate_every=1, ensemble=2,
    **TINY | dict(meta_iterations=2),
  )  # fmt: skip
  if name == 'lstm':
    draw_folder(tmp_path / 'images', [f'class_{i:02d}' for i in range(30)], images=11)
    config = dataclasses.replace(config, data_dir=str(tmp_path / 'images'))
  with in_place_of_conv4(SmallConvNet):
    assert classification.run(config, tmp_path / 'run')


def test_joint_training_needs_classes():
  config = classification.Config(learner=('joint',))
  with pytest.raises(ValueError, match=saying('joint', 'glyphs', '--dataset=omniglot')):
    few_shot_training.build(config)


def test_validation_needs_classes():
  config = classification.Config(validate_every=5)
  bank = ms.tasks.class_bank(np.zeros((6, 20, 28, 28, 1), np.uint8))
  with pytest.raises(ValueError, match=saying('validate_every', '--validation_classes=100')):
    few_shot_training.build(config, few_shot_data.Data(bank, None, bank))


def test_names_are_all_different():
  assert len(set(NAMES.values())) == len(LEARNERS)
