"""The benchmark of weak scaling, at its smallest."""

import numpy as np
import pytest

from benchmarks import scaling


@pytest.mark.slow
def test_a_worker_trains_on_as_many_devices_as_it_is_told(monkeypatch):
  monkeypatch.setenv('JAX_DISABLE_MOST_OPTIMIZATIONS', '1')
  workers = [scaling.Worker('sinusoids', devices, 4 // devices, 1) for devices in (1, 2)]
  try:
    answers = [[worker(n) for n in (3, 2)] for worker in workers]
  finally:
    for worker in workers:
      worker.close()
  assert [[answer['step'] for answer in of_worker] for of_worker in answers] == [[3, 5], [3, 5]]
  assert [answer['devices'] for of_worker in answers for answer in of_worker] == [1, 1, 2, 2]
  one, two = ([answer['loss'] for answer in of_worker] for of_worker in answers)
  np.testing.assert_allclose(one, two, rtol=1e-4)  # Four tasks in all, the same.
  assert one[0] != one[1]


@pytest.mark.slow
def test_a_worker_that_fails_is_told_of(monkeypatch):
  monkeypatch.setenv('JAX_PLATFORMS', 'no_such_platform')
  worker = scaling.Worker('sinusoids', 1, 1, 1)
  with pytest.raises(RuntimeError, match='exit code 1'):
    worker(1)
  worker.close()


def test_efficiency_is_by_round_and_beside_the_cores():
  found = {'1': [10.0, 20.0, 40.0], '2': [9.0, 18.0, 20.0], '8': [2.5, 5.0, 8.0]}
  lines = scaling.table(found, 3, cores=2).splitlines()
  assert lines[2:] == [
    '| 1 | 3 | 20.0 | 60 | 1.00 | 1.00 |',
    '| 2 | 6 | 18.0 | 108 | 0.90 | 1.00 |',
    '| 8 | 24 | 5.0 | 120 | 0.25 | 0.25 |',
  ]
  assert scaling.table(found, 3, cores=None).splitlines()[-1].endswith('| 0.25 | 1.00 |')
  assert scaling.table({'4': [1.0], '8': [1.0]}, 1, cores=2).splitlines()[-1].endswith('| 1.00 | 0.50 |')
