"""The comparison's systems by name: the learner, its outer optimiser, and what it is trained on."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

import metasgd_jax as ms
from experiments import few_shot_data
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
"""Those that read an episode as a sequence; they have no batch norm."""
UNTRAINED = ('random',)
DRAWINGS = 10
"""Of each class in a sequence (Santoro et al. 2016, section 4.1)."""
JOINT_BATCHES, JOINT_BATCH = 2, 64
"""Of a supervised step, so that two devices have one each, and images in each; batch norm is of one batch."""
FLOOR_STEPS = 20
"""Of plain SGD on the support: the last of the comparison, so given more steps than the others."""


def build_learner(name: str, config: Any, *, classes: int = 2, test: bool = False, inductive: bool | None = None):
  """Returns the learner.

  Args:
    name: one of `LEARNERS`.
    config: of the experiment.
    classes: to train on, for the one that is trained on all of them jointly.
    test: as it is tested, which for MAML of 5 steps means 10 (Finn et al. 2017) and leaves out a multi-step loss.
    inductive: of batch norm; the configuration's where left out.
  """
  filters, hidden = config.sizes
  dtype = jnp.bfloat16 if config.precision == 'bfloat16' else None
  network = lambda way, hidden: ms.nn.from_linen(ms.nn.Conv4(way, filters=filters, hidden=hidden, dtype=dtype))
  classifier = network(config.way, hidden)
  embedding = network(None, 0) if config.network == 'conv4' else ms.nn.from_linen(ms.nn.KochNet())
  shared: dict[str, Any] = dict(
    inductive=config.inductive if inductive is None else inductive, metrics={'accuracy': accuracy}
  )
  steps, adjoint = config.inner_steps, config.adjoint
  if name in ('meta_sgd', 'layer_rates'):
    start = (0.005, 0.1) if config.alpha is None else (config.alpha, config.alpha)
    weights = None
    if config.multi_step_loss and not test:
      weights = (1 / steps,) * steps
    return ms.meta_sgd(
      classifier, cross_entropy, steps=steps, alpha_range=start, alpha_by_step=config.alpha_by_step,
      alpha_per='layer' if name == 'layer_rates' else 'entry', step_weights=weights, adjoint=adjoint, **shared,
    )  # fmt: skip
  if name in ('maml', 'fomaml', 'anil', 'maml_5'):
    if name == 'maml_5':
      steps = 10 if test else 5
    rate = maml_rate(name, config)
    alpha = head_alone(config, rate) if name == 'anil' else rate
    return ms.maml(
      classifier, cross_entropy, alpha=alpha, steps=steps, first_order=name == 'fomaml', adjoint=adjoint, **shared
    )
  if name == 'meta_lstm':
    return ms.learners.meta_lstm(classifier, cross_entropy, steps=12 if config.shot == 1 else 5, **shared)
  if name in ('matching', 'matching_fce'):
    return ms.learners.matching(embedding, way=config.way, full_context=name == 'matching_fce', **shared)
  if name == 'siamese':
    return ms.learners.siamese(embedding, way=config.way, **shared)
  if name == 'prototypical':
    return ms.learners.prototypical(embedding, way=config.way, **shared)
  if name in SEQUENTIAL:
    cell = ms.learners.MemoryCell if name == 'mann' else ms.learners.PlainCell
    return ms.learners.mann(way=config.way, cell=cell(config.way), metrics=shared['metrics'])
  return ms.learners.fine_tuning(
    embedding, classes=classes, way=config.way, alpha=config.floor_rate, steps=FLOOR_STEPS, **shared
  )


def maml_rate(name: str, config: Any) -> float:
  """Returns the inner rate of MAML and its kin, that of its paper where the configuration gives none.

  Finn et al. 2017, appendix A.1: on Omniglot 0.4 with one step, for 5 ways, and 0.1 with five, for 20; on mini-ImageNet
  0.01. One step for 20 ways is not in the paper; 0.4 stays. Other photographs take mini-ImageNet's.
  """
  if config.alpha is not None:
    return config.alpha
  if config.dataset not in ('omniglot', 'glyphs'):
    return 0.01
  return 0.1 if name == 'maml_5' else 0.4


def head_alone(config: Any, rate: float) -> dict[str, float | None]:
  """Returns ANIL's α: the body of Conv4 keeps still, its last layer alone adapts (Raghu et al. 2020)."""
  last = f'Dense_{1 if config.sizes[1] else 0}'
  body = [f'ConvBlock_{i}' for i in range(4)] + (['Dense_0'] if config.sizes[1] else [])
  return {**dict.fromkeys(body, None), last: rate}


_NOT_FINITE_IS_NAN = optax.stateless(
  lambda grads, _: jax.tree.map(lambda g: jnp.where(jnp.isfinite(g), g, jnp.nan), grads)
)
"""So that clipping does not make an infinite gradient one that goes unseen."""


def build_optimizer(name: str, config: Any) -> optax.GradientTransformation:
  """Returns Adam, its gradient clipped where the learner's paper or the configuration says so."""
  rate: Any = config.learning_rate
  if config.schedule == 'cosine':
    rate = optax.cosine_decay_schedule(rate, config.meta_iterations)
  before = []
  if name == 'meta_lstm':
    before.append(optax.clip_by_global_norm(0.25))  # Ravi and Larochelle 2017, section 5.1.1.
  if config.clip:
    before += [_NOT_FINITE_IS_NAN, optax.clip(config.clip)]
  return optax.chain(*before, optax.adam(rate))


def build_training_tasks(name: str, config: Any, data: few_shot_data.Data) -> Any:
  """Returns the tasks that a learner is trained on.

  Raises:
    ValueError: joint training on tasks that have no classes in common; more shots than a sequence has items.
  """
  if name == 'joint':
    if data.train is None:
      raise ValueError(
        'learner joint needs a data set with classes to train on; glyphs have none, take --dataset=omniglot'
      )
    return few_shot_data.augmented(few_shot_data.supervised(data.train, batch=JOINT_BATCH), config)
  found = few_shot_data.tasks(data.train, config, shot=config.shot, query=query_images(name, config))
  return few_shot_data.augmented(found, config)


def query_images(name: str, config: Any) -> int:
  """Returns the query images of a class in training.

  Raises:
    ValueError: more shots than a sequence has items.
  """
  if name not in SEQUENTIAL:
    return config.query
  if config.shot >= DRAWINGS:
    raise ValueError(f'learner {name} reads {DRAWINGS} images of a class, got shot={config.shot}; give a lower shot')
  return DRAWINGS - config.shot


def meta_batch(name: str, config: Any) -> int:
  """Returns how many tasks a meta-iteration has."""
  return JOINT_BATCHES if name == 'joint' else config.meta_batch
