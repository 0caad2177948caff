"""Distributions of tasks, drawn on the device."""

from metasgd_jax.tasks.few_shot import ClassBank, few_shot, rotate_classes
from metasgd_jax.tasks.glyphs import GlyphConfig, glyphs
from metasgd_jax.tasks.sinusoid import Sinusoid, SinusoidConfig, sinusoid

__all__ = [
  'ClassBank',
  'GlyphConfig',
  'Sinusoid',
  'SinusoidConfig',
  'few_shot',
  'glyphs',
  'rotate_classes',
  'sinusoid',
]
