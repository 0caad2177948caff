"""Distributions of tasks. The tasks and their episodes are drawn on the device."""

from metasgd_jax.tasks import augmentation as augmentation
from metasgd_jax.tasks.augmentation import augmented as augmented
from metasgd_jax.tasks.few_shot import (
  ClassBank as ClassBank,
  all_classes as all_classes,
  class_bank as class_bank,
  class_indices as class_indices,
  few_shot as few_shot,
  few_shot_from as few_shot_from,
  image_indices as image_indices,
  rotate_classes as rotate_classes,
)
from metasgd_jax.tasks.glyphs import GlyphConfig as GlyphConfig, glyphs as glyphs
from metasgd_jax.tasks.markov import (
  MarkovChain as MarkovChain,
  MarkovConfig as MarkovConfig,
  markov_chains as markov_chains,
)
from metasgd_jax.tasks.sinusoid import Sinusoid as Sinusoid, SinusoidConfig as SinusoidConfig, sinusoid as sinusoid
from metasgd_jax.tasks.streaming import stream as stream
