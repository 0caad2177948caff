"""Distributions of tasks, drawn on the device."""

from metasgd_jax.tasks import augmentation
from metasgd_jax.tasks.augmentation import augmented
from metasgd_jax.tasks.few_shot import ClassBank, all_classes, class_bank, few_shot, rotate_classes
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
  'few_shot',
  'glyphs',
  'rotate_classes',
  'sinusoid',
  'stream',
]
