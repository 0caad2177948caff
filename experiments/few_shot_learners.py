"""Builds the few-shot learners that the experiments compare, with their outer optimisers and training tasks."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

import metasgd_jax as ms
from experiments import few_shot_data
from metasgd_jax.deploy.model_file import first_logits
from metasgd_jax.losses import accuracy, cross_entropy

NAMES = {
  'meta_sgd': 'Meta-SGD',
  'maml': 'MAML',
  'maml_5': 'MAML, 5 steps',
  'fomaml': 'first-order MAML',
  'anil': 'ANIL',
  'layer_rates': 'Meta-SGD, a rate a layer',
  'meta_lstm': 'Meta-LSTM',
  'matching': 'Matching Nets',
  'matching_fce': 'Matching Nets, FCE',
  'siamese': 'Siamese',
  'prototypical': 'Prototypical Nets',
  'mann': 'MANN',
  'lstm': 'LSTM',
  'joint': 'SGD, joint start',
  'random': 'SGD, random start',
}
LEARNERS = tuple(NAMES)
SEQUENTIAL = ('mann', 'lstm')
"""Learners that read an episode as a sequence. Their networks have no batch norm."""
UNTRAINED = ('random',)
DRAWINGS = 10
"""Number of images of each class in a sequence (Santoro et al. 2016, section 4.1)."""
JOINT_BATCHES, JOINT_BATCH = 2, 64
"""Number of batches in a step of joint training, and of images in a batch.

There are two batches so that two devices can share them. Batch norm uses the statistics of a single batch.
"""
FLOOR_STEPS = 20
"""Number of SGD steps on the support for the learners 'joint' and 'random', the baselines of the comparison."""


def build_learner(
  name: str,
  config: Any,
  *,
  classes: int = 2,
  test: bool = False,
  inductive: bool | None = None,
  way: int | None = None,
) -> ms.Learner:
  """Returns the learner with the given name, for training or for testing.

  Args:
    name: One of `LEARNERS`.
    config: Configuration of the experiment.
    classes: Number of training classes, which the learner 'joint' distinguishes.
    test: Whether the learner is for testing. The learner 'maml_5' then takes 10 inner steps (Finn et al. 2017).
    inductive: Whether batch norm is inductive. The default is `config.inductive`.
    way: Number of classes of a task, at most `config.way`, which is the default. A classifier then uses its first `way`
      logits.
  """
  metrics, way = {'accuracy': accuracy}, way or config.way
  if name in SEQUENTIAL:
    cell = ms.learners.MemoryCell if name == 'mann' else ms.learners.PlainCell
    return ms.learners.mann(way=way, cell=cell(way), metrics=metrics)
  shared = {'inductive': config.inductive if inductive is None else inductive, 'metrics': metrics}
  if name in ('meta_sgd', 'layer_rates', 'maml', 'maml_5', 'fomaml', 'anil', 'meta_lstm'):
    return _adapting_learner(name, config, way, test, shared)
  return _embedding_learner(name, config, way, classes, shared)


def _adapting_learner(name: str, config: Any, way: int, test: bool, shared: dict[str, Any]) -> ms.Learner:
  """Returns a learner that adapts a classifier by inner steps."""
  network = _conv4(config.way, config)
  if way < config.way:
    network = first_logits(network, way)
  if name == 'meta_lstm':
    return ms.learners.meta_lstm(network, cross_entropy, steps=12 if config.shot == 1 else 5, **shared)
  steps = config.inner_steps
  if name == 'maml_5':
    steps = 10 if test else 5
  inner = {'steps': steps, 'adjoint': config.adjoint, **shared}
  if name in ('meta_sgd', 'layer_rates'):
    alpha = ms.AlphaConfig(per='layer' if name == 'layer_rates' else 'entry', by_step=config.alpha_by_step)
    if config.alpha is not None:
      alpha = dataclasses.replace(alpha, low=config.alpha, high=config.alpha)
    weights = (1 / steps,) * steps if config.multi_step_loss else None
    return ms.meta_sgd(network, cross_entropy, alpha=alpha, step_weights=weights, **inner)
  if name == 'anil':  # Only the last layer adapts (Raghu et al. 2020).
    head = 'Dense_1' if config.sizes[1] else 'Dense_0'
    network = ms.adapt_only(network, lambda leaf: leaf.startswith(head))
  return ms.maml(network, cross_entropy, alpha=maml_rate(name, config), first_order=name == 'fomaml', **inner)


def _embedding_learner(name: str, config: Any, way: int, classes: int, shared: dict[str, Any]) -> ms.Learner:
  """Returns a learner that compares embeddings, or that trains a classifier on top of an embedding."""
  embedding = _conv4(None, config) if config.network == 'conv4' else ms.nn.from_linen(ms.nn.KochNet())
  if name == 'siamese':
    return ms.learners.siamese(embedding, way=way, **shared)
  if name == 'prototypical':
    return ms.learners.prototypical(embedding, way=way, **shared)
  if name in ('matching', 'matching_fce'):
    return ms.learners.matching(embedding, way=way, full_context=name == 'matching_fce', **shared)
  sgd = {'alpha': config.floor_rate, 'steps': FLOOR_STEPS}
  return ms.learners.fine_tuning(embedding, classes=classes, way=way, **sgd, **shared)


def classifier_or_embedding(name: str, config: Any) -> ms.Model:
  """Returns the network of a learner whose model is saved: a classifier, or the embedding of a prototypical model."""
  return _conv4(None if name == 'prototypical' else config.way, config)


def _conv4(way: int | None, config: Any) -> ms.Model:
  """Returns Conv4 as a classifier, or as an embedding if `way` is `None`."""
  filters, hidden = config.sizes
  dtype = jnp.bfloat16 if config.precision == 'bfloat16' else None
  return ms.nn.from_linen(ms.nn.Conv4(way, filters=filters, hidden=hidden if way else 0, dtype=dtype))


def maml_rate(name: str, config: Any) -> float:
  """Returns the inner rate of MAML and its variants: `config.alpha`, or the paper's rate if `config.alpha` is `None`.

  The paper is Finn et al. 2017, appendix A.1. On Omniglot, the paper's rate for 5 ways is 0.4, with one inner step. The
  rate for 20 ways is 0.1, with five inner steps. The paper has no rate for 20 ways with one inner step: this function
  then returns 0.4. On mini-ImageNet, the paper's rate is 0.01. The function also returns 0.01 for other data sets of
  photographs.
  """
  if config.alpha is not None:
    return config.alpha
  if config.dataset not in ('omniglot', 'glyphs'):
    return 0.01
  return 0.1 if name == 'maml_5' else 0.4


def build_optimizer(name: str, config: Any) -> optax.GradientTransformation:
  """Returns Adam, which gets clipped gradients if the configuration or the paper of the learner says so."""
  rate: Any = config.learning_rate
  if config.schedule == 'cosine':
    rate = optax.cosine_decay_schedule(rate, config.meta_iterations)
  before = []
  if name == 'meta_lstm':
    before.append(optax.clip_by_global_norm(0.25))  # Ravi and Larochelle 2017, section 5.1.1.
  if config.clip:
    before += [optax.stateless(_infinite_to_nan), optax.clip(config.clip)]
  return optax.chain(*before, optax.adam(rate))


def _infinite_to_nan(grads: Any, _: Any) -> Any:
  """Replaces infinite entries by NaN. Clipping would make them finite, so that a bad step would not be detected."""
  return jax.tree.map(lambda g: jnp.where(jnp.isfinite(g), g, jnp.nan), grads)


def build_training_tasks(name: str, config: Any, data: few_shot_data.Data) -> Any:
  """Returns the training tasks of a learner. Their images are augmented if `config.augmentation` names an augmentation.

  Raises:
    ValueError: if the learner is 'joint' and the data set has no training classes, or if the learner reads sequences,
      and the shots leave no image for the query.
  """
  if name != 'joint':
    found = few_shot_data.tasks(data.train, config.way, shot=config.shot, query=query_images(name, config))
  elif data.train is None:
    raise ValueError("the learner 'joint' needs training classes, but 'glyphs' has none; give --dataset=omniglot")
  else:
    found = few_shot_data.from_indices(data.train, ms.tasks.class_indices(data.train, batch=JOINT_BATCH))
  augment = few_shot_data.AUGMENTATIONS[config.augmentation]
  return ms.tasks.augmented(found, augment) if augment else found


def query_images(name: str, config: Any) -> int:
  """Returns the number of query images per class in training.

  For a learner that reads sequences, the support and the query together have `DRAWINGS` images per class.

  Raises:
    ValueError: if the learner reads sequences, and `config.shot` is not less than `DRAWINGS`.
  """
  if name not in SEQUENTIAL:
    return config.query
  if config.shot >= DRAWINGS:
    raise ValueError(
      f'learner {name} reads {DRAWINGS} images per class, and one or more of them must be query images, got '
      f'shot={config.shot}; give a lower shot, at most {DRAWINGS - 1}'
    )
  return DRAWINGS - config.shot


def meta_batch(name: str, config: Any) -> int:
  """Returns the number of tasks in a meta-iteration."""
  return JOINT_BATCHES if name == 'joint' else config.meta_batch
