"""Compares meta-training from images in host memory with meta-training from images in device memory.

    python -m benchmarks.streaming

The question is whether the device has to wait for images. The learner is Meta-SGD on Conv4-32, with 4 tasks of 5-way
1-shot and 15 query images per class. The images are noise in the shape of mini-ImageNet: 64 classes of 600 RGB images
of 84×84 pixels, 813 MB. They are streamed from memory or from a memory map. Before the timing, all programs train on
the same tasks, and their results must be equal to the bit. A chunk is 25 meta-iterations. While the device computes one
chunk, the images of the next chunk are gathered and sent.
"""

import pathlib
import tempfile
import time

import jax
import numpy as np
from absl import app

import metasgd_jax as ms
from benchmarks import ours, timing
from benchmarks.conv4 import learner
from metasgd_jax.io import provenance
from metasgd_jax.outer import sharding

CLASSES, INSTANCES, SIDE, CHUNK, TASKS = 64, 600, 84, 25, 4
RESIDENT, STREAMED, MAPPED = 'on the device', 'streamed from memory', 'streamed from a memory map'


def build(directory: pathlib.Path) -> dict[str, ms.TaskDistribution | ms.TaskStream]:
  """Returns the same tasks from three stores of images, as a dict by the name of the store."""
  path = directory / 'images.npy'
  images = np.lib.format.open_memmap(path, 'w+', np.uint8, (CLASSES * INSTANCES, SIDE, SIDE, 3))
  rng = np.random.default_rng(0)
  for start in range(0, len(images), INSTANCES):
    images[start : start + INSTANCES] = rng.integers(0, 256, (INSTANCES, SIDE, SIDE, 3), np.uint8)
  images.flush()
  sizes = np.full(CLASSES, INSTANCES)
  bank = ms.tasks.ClassBank(np.load(path, allow_pickle=False), sizes)
  mapped = ms.tasks.ClassBank(np.load(path, mmap_mode='r', allow_pickle=False), sizes)
  indices = ms.tasks.image_indices(bank, way=5, shot=1, query=15)
  return {
    RESIDENT: ms.tasks.few_shot(bank, way=5, shot=1, query=15),
    STREAMED: ms.tasks.stream(bank, indices),
    MAPPED: ms.tasks.stream(mapped, indices),
  }


def main(argv) -> None:
  """Checks that the programs agree, times them, and prints a table."""
  del argv
  with tempfile.TemporaryDirectory() as directory:
    tasks, learns = build(pathlib.Path(directory)), learner(ms.nn.Conv4(5, filters=32, hidden=0))
    runs = {name: ours.Run(learns, of, TASKS, devices=True, chunk=CHUNK) for name, of in tasks.items()}
    for run in runs.values():
      run(2)
    first, *others = (jax.device_get(run.state.meta) for run in runs.values())
    for other in others:
      assert ours.error(other, first) == 0, 'the streamed images gave another result than the images on the device'
    print('all programs learned the same parameters; timing them in turn', flush=True)
    found = timing.rates(runs, seconds=20, rounds=4)
    keys = jax.random.split(jax.random.key(0), (2, CHUNK * TASKS))
    seconds = {}
    for name, of in tasks.items():
      if isinstance(of, ms.TaskStream):
        start = time.perf_counter()
        jax.block_until_ready(of.send(*keys))
        seconds[name] = f'{1000 * (time.perf_counter() - start):.0f} ms'
  print(timing.table(found, RESIDENT, {f'time to gather a chunk of {CHUNK}': seconds}))
  print(f'\n{provenance.collect()}')


if __name__ == '__main__':
  sharding.cpu_cores_as_devices()
  app.run(main)
