"""Distributions of tasks, which are drawn on the device."""

from metasgd_jax.tasks import augmentation
from metasgd_jax.tasks.augmentation import augmented
from metasgd_jax.tasks.few_shot import (
  ClassBank,
  all_classes,
  class_bank,
  class_indices,
  few_shot,
  few_shot_from,
  image_indices,
  rotate_classes,
)
from metasgd_jax.tasks.glyphs import GlyphConfig, glyphs
from metasgd_jax.tasks.markov import MarkovChain, MarkovConfig, markov_chains
from metasgd_jax.tasks.sinusoid import Sinusoid, SinusoidConfig, sinusoid
from metasgd_jax.tasks.streaming import stream

__all__ = [
  'ClassBank',
  'GlyphConfig',
  'MarkovChain',
  'MarkovConfig',
  'Sinusoid',
  'SinusoidConfig',
  'all_classes',
  'augmentation',
  'augmented',
  'class_bank',
  'class_indices',
  'few_shot',
  'few_shot_from',
  'glyphs',
  'image_indices',
  'markov_chains',
  'rotate_classes',
  'sinusoid',
  'stream',
]
