import io

import numpy as np
from PIL import Image

import metasgd_jax as ms
from metasgd_jax import plotting


def drawn(figure):
  """Draws the figure, and returns its texts."""
  figure.savefig(io.BytesIO(), format='png')
  titles = [ax.get_title() for ax in figure.axes]
  return [t for t in titles if t] + ([figure.get_suptitle()] if figure.get_suptitle() else [])


def test_adaptation_curves_shows_each_learners_error():
  x = np.linspace(-1, 1, 20)
  support = ms.Batch(np.zeros((2, 1)), np.zeros((2, 1)))
  fits = [[plotting.Fit('Meta-SGD', x, x + 1), plotting.Fit('MAML', x, x - 2)]] * 3
  figure = plotting.adaptation_curves(x, [x] * 3, [support] * 3, fits)
  assert drawn(figure) == ['Meta-SGD, MSE 1.00'] * 3 + ['MAML, MSE 4.00'] * 3
  assert [t.get_text() for t in figure.legends[0].texts] == ['truth', 'before', 'after', 'support']


def test_alpha_histograms_give_the_negative_share_of_each_layer():
  alpha = {'a': {'bias': np.array([0.1, -0.1]), 'kernel': np.full((2, 3), 0.1)}, 'b': np.float32(-1)}
  texts = drawn(plotting.alpha_histograms(alpha))
  assert texts == ['a/bias: 50% < 0', 'a/kernel: 0% < 0', 'b: 100% < 0', 'learned α: 22.2% of 9 entries are negative']


def test_alpha_histograms_show_every_entry_of_a_small_leaf():
  figure = plotting.alpha_histograms({'bias': np.array([-0.3, 0.1])})
  drawn(figure)
  assert sum(bar.get_height() for bar in figure.axes[0].patches) == 2


def test_learning_curves_have_a_line_for_each_label():
  steps, values = np.arange(1, 4), np.array([[3.0, 4.0], [2.0, 2.5], [1.0, 1.2]])
  figure = plotting.learning_curves({'A': (steps, values), 'B': (steps, values / 2)}, ylabel='MSE', log=True)
  drawn(figure)
  lines = figure.axes[0].lines
  assert [line.get_label() for line in lines] == ['A', 'B']
  np.testing.assert_allclose(lines[0].get_ydata(), [3.5, 2.25, 1.1])


def test_episode_sheet_marks_what_is_wrong():
  labels = np.array([0, 1, 0, 1])
  query = ms.Batch(np.zeros((4, 5, 5, 1)), labels)
  support = ms.Batch(np.ones((2, 5, 5, 1)), np.array([1, 0]))
  logits = np.eye(2)[[0, 0, 0, 1]]
  figure = plotting.episode_sheet(support, query, logits)
  texts = drawn(figure)
  assert {ax.images[0].get_cmap().name for ax in figure.axes} == {'gray'}
  ink = plotting.episode_sheet(support, query, logits, negative=True)
  assert {ax.images[0].get_cmap().name for ax in ink.axes} == {'gray_r'}
  assert texts == [
    'support',
    '0',
    '0',
    'support',
    '0',
    '1',
    '75% of 4 query images right\nanswers: blue if right, red if wrong',
  ]
  assert [ax.title.get_color() for ax in figure.axes] == ['black', '#2166ac', '#2166ac', 'black', 'red', '#2166ac']
  named = plotting.episode_sheet(support, query, logits, names=['$a', 'a very long name'])
  assert drawn(named)[:6] == ['support', '$a', '$a', 'support', '$a', 'a ver…name']
  assert [named.axes[i].get_ylabel() for i in (0, 3)] == ['$a', 'a ver…name']


def test_accuracies_are_in_order_and_the_papers_are_beside_them():
  found = [plotting.Accuracy('worse', 0.9, 0.01, None), plotting.Accuracy('better', 0.95, 0.01, 0.97)]
  figure = plotting.accuracies({'5-way 1-shot': found, '5-way 5-shot': found[:1]})
  assert drawn(figure) == ['5-way 1-shot', '5-way 5-shot']
  left, right = figure.axes
  assert [t.get_text() for t in left.get_yticklabels()] == ['worse', 'better']
  assert [line.get_xdata().tolist() for line in left.lines if line.get_marker() == 'D'] == [[97.0]]
  assert not [line for line in right.lines if line.get_marker() == 'D']


def test_instance_curve_counts_from_one_and_is_in_percent():
  figure = plotting.instance_curve({'MANN': np.array([0.2, 0.8, 0.9])})
  drawn(figure)
  (line,) = figure.axes[0].lines
  assert line.get_xdata().tolist() == [1, 2, 3]
  np.testing.assert_allclose(line.get_ydata(), [20, 80, 90])


def walks(name, updates=2):
  steps = np.random.default_rng(0).normal(0, 0.05, (updates + 1, 4, 9, 2))
  return plotting.Walks(name, np.zeros(2), np.array([0.3, -0.2]), steps.cumsum(2), np.linspace(-30, -3, updates + 1))


def test_paths_of_each_learner_and_task():
  figure = plotting.navigation_paths([[walks('Meta-SGD'), walks('MAML')] for _ in range(3)])
  assert len(figure.axes) == 6
  assert figure.axes[0].get_title() == 'Meta-SGD: -30.0 → -16.5'
  assert len(figure.axes[0].lines) == 4 + 4 + 3


def test_the_animation_shows_every_update_to_its_end():
  """After the second update the point of the first learner ends in the upper right corner, and it is blue."""
  first, second = walks('Meta-SGD'), walks('MAML')
  first.paths[2, :, 5:] = 0.7
  gif = Image.open(io.BytesIO(plotting.navigation_gif([first, second], steps=5, milliseconds=20, dpi=40)))
  assert gif.n_frames == 3 * 5
  times, blue = [], []
  for frame in range(gif.n_frames):
    gif.seek(frame)
    times.append(gif.info['duration'])
    red, _, b = np.moveaxis(np.asarray(gif.convert('RGB'), np.int32), 2, 0)[:, :60, 90:128]  # Upper right of panel 1.
    blue.append(bool(np.any(b > red + 60)))
  assert times == [20, 20, 20, 20, 180] * 3
  assert blue == [False] * 14 + [True]
