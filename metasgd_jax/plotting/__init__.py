"""Figures of meta-learning. Only this package imports matplotlib. Each function returns a Figure or an animation."""

from metasgd_jax.plotting.figures import (
  Accuracy,
  Fit,
  accuracies,
  adaptation_curves,
  alpha_histograms,
  instance_curve,
  learning_curves,
)
from metasgd_jax.plotting.paths import Walks, navigation_animation, navigation_paths
from metasgd_jax.plotting.sheets import episode_sheet, prediction_sheet

__all__ = (
  'Accuracy',
  'Fit',
  'Walks',
  'accuracies',
  'adaptation_curves',
  'alpha_histograms',
  'episode_sheet',
  'instance_curve',
  'learning_curves',
  'navigation_animation',
  'navigation_paths',
  'prediction_sheet',
)
