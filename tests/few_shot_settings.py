"""Settings and folders that the tests of few-shot classification share."""

import numpy as np
from PIL import Image

TINY = dict(filters=2, meta_iterations=1, meta_batch=1, query=1, eval_tasks=2, eval_query=1)


def draw_folder(directory, classes, images=8, size=16):
  rng = np.random.default_rng(0)
  for name in classes:
    (directory / name).mkdir(parents=True)
    for i in range(images):
      Image.fromarray(rng.integers(0, 256, (size, size, 3), np.uint8)).save(directory / name / f'{i}.png')
