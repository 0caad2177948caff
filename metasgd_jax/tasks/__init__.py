"""Distributions of tasks, drawn on the device."""

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
from metasgd_jax.tasks.sinusoid import Sinusoid, SinusoidConfig, sinusoid
from metasgd_jax.tasks.streaming import stream

__all__ = [
  'ClassBank',
  'GlyphConfig',
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
  'rotate_classes',
  'sinusoid',
  'stream',
]
