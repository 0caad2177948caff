import jax
import numpy as np
import pytest
from problems import episodes, saying

from metasgd_jax.tasks import sinusoid
from metasgd_jax.tasks.sinusoid import MAML_SINUSOIDS, META_SGD_SINUSOIDS, SinusoidConfig


@pytest.mark.parametrize(
  ('config', 'ranges'),
  [
    (META_SGD_SINUSOIDS, [(0.1, 5.0), (0.8, 1.2), (0.0, np.pi)]),
    (MAML_SINUSOIDS, [(0.1, 5.0), (1.0, 1.0), (0.0, np.pi)]),
  ],
)
def test_curves_are_uniform_in_the_papers_ranges(config, ranges):
  tasks = jax.jit(jax.vmap(sinusoid(config).sample))(jax.random.split(jax.random.key(0), 4000))
  for values, (low, high) in zip(tasks, ranges, strict=True):
    values = np.asarray(values)
    assert low <= values.min()
    assert values.max() <= high * (1 + 1e-6)
    quartiles = np.quantile(values, [0.25, 0.5, 0.75])
    np.testing.assert_allclose(
      quartiles, low + (high - low) * np.array([0.25, 0.5, 0.75]), atol=0.04 * (high - low) + 1e-6
    )


def test_points_lie_on_the_curve():
  tasks = sinusoid(shot=7, query=9)
  task = jax.jit(tasks.sample)(jax.random.key(0))
  episode = jax.jit(tasks.episode)(task, jax.random.key(1))
  for batch, count in zip(episode, (7, 9), strict=True):
    assert batch.x.shape == batch.y.shape == (count, 1)
    expected = float(task.amplitude) * np.sin(float(task.frequency) * np.asarray(batch.x) + float(task.phase))
    np.testing.assert_allclose(batch.y, expected, rtol=1e-4, atol=1e-5)


def test_inputs_are_uniform_and_never_shared():
  batch = episodes(sinusoid(shot=5, query=10), 500)
  x = np.concatenate([batch.support.x, batch.query.x], 1)[..., 0]
  assert np.abs(np.quantile(x, [0, 0.25, 0.5, 0.75, 1]) - [-5, -2.5, 0, 2.5, 5]).max() < 0.15
  assert all(len(set(row)) == 15 for row in x.tolist())


def test_a_range_the_wrong_way_round():
  with pytest.raises(ValueError, match=saying('amplitude', 'low <= high', 'got (5, 1)')):
    SinusoidConfig(amplitude=(5, 1))


@pytest.mark.parametrize('name', ['shot', 'query'])
def test_no_points(name):
  with pytest.raises(ValueError, match=saying(name, 'at least 1', 'got 0')):
    sinusoid(**{name: 0})
