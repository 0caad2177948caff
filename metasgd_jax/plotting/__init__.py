"""Functions that draw figures of meta-learning with matplotlib. Each returns a matplotlib Figure or a GIF.

No other part of metasgd_jax imports matplotlib.
"""

from metasgd_jax.plotting.figures import (
  Accuracy as Accuracy,
  Fit as Fit,
  accuracies as accuracies,
  adaptation_curves as adaptation_curves,
  alpha_histograms as alpha_histograms,
  instance_curve as instance_curve,
  learning_curves as learning_curves,
)
from metasgd_jax.plotting.paths import (
  Walks as Walks,
  navigation_gif as navigation_gif,
  navigation_paths as navigation_paths,
)
from metasgd_jax.plotting.sheets import episode_sheet as episode_sheet, prediction_sheet as prediction_sheet
