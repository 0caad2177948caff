"""Random values that users pass to functions: labels, pictures, names in θ, rates α and keys, each with an oracle.

A check returns whether the input was accepted. It raises AssertionError if the package accepts an input and gives
another result than the oracle, or if it refuses an input that the oracle can do.
"""

import functools
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from hypothesis import strategies as st
from PIL import Image
from small_models import WAY, pictures, small_model

import metasgd_jax as ms
from metasgd_jax.datasets import image_folder
from metasgd_jax.io import files

from . import derivatives


class Kind(NamedTuple):
  """A kind of value.

  Attributes:
    oracle: What computes the expected results.
    draw: Strategy of the inputs.
    check: Function that checks an input; see the module.
    share: Share of the inputs, relative to the shares of the other kinds.
  """

  oracle: str
  draw: st.SearchStrategy
  check: Callable[[Any], bool]
  share: float = 1.0


def accepted(call: Callable[[], Any], may: bool, errors: Any = ValueError) -> tuple[bool, Any]:
  """Returns whether a call was accepted, and its result. `may` tells whether the oracle accepts the input."""
  try:
    result = call()
  except errors as e:
    if may:
      raise AssertionError(f'refused what is right: {e}') from e
    return False, None
  assert may, f'accepted what is wrong, with the result {result!r:.200}'
  return True, result


@st.composite
def _class_labels(draw):
  classes, rows = 3, draw(st.sampled_from([1, 3]))
  dtype = draw(st.sampled_from([np.int8, np.uint8, np.int32, np.int64, np.float32, np.bool_]))
  values = draw(st.lists(st.integers(-2, classes), min_size=rows, max_size=rows))
  if draw(st.booleans()):
    values = [value % classes for value in values]
  logits = np.random.default_rng(draw(st.integers(0, 99))).normal(0, 3, (rows, classes)).astype(np.float32)
  return logits, np.array(values).astype(dtype)


_jitted = {metric: jax.jit(metric) for metric in (ms.losses.cross_entropy, ms.losses.accuracy)}


def _check_class_labels(example) -> bool:
  logits, labels = example
  are_integers = np.issubdtype(labels.dtype, np.integer)
  may = bool(are_integers and (labels >= 0).all() and (labels < logits.shape[1]).all())
  expected = {}
  if may:
    log_p = scipy.special.log_softmax(logits.astype(np.float64), -1)
    expected[ms.losses.cross_entropy] = -np.mean(log_p[np.arange(len(labels)), labels])
    expected[ms.losses.accuracy] = np.mean(np.argmax(logits, -1) == labels)
  for metric, jitted in _jitted.items():
    _, value = accepted(lambda metric=metric: metric(logits, labels), may)
    if may:
      np.testing.assert_allclose([value, jitted(logits, labels)], expected[metric], rtol=1e-5, atol=1e-6)
    elif are_integers:
      assert np.isnan(jitted(logits, labels))
  return may


_WORDS = st.text('abé字 1/.', max_size=3)
_ONE_KIND = [
  _WORDS,
  st.integers(-3, 3),
  st.booleans(),
  st.sampled_from([0.5, 1.0, -2.0]),
  _WORDS.map(np.str_),
  st.integers(0, 3).map(np.uint8),
]
_MISSING = st.sampled_from([None, float('nan'), np.datetime64('NaT', 's'), np.float32('nan')])


@st.composite
def _own_labels(draw):
  kind = draw(st.sampled_from(_ONE_KIND))
  labels = draw(st.lists(kind, min_size=4, max_size=4))
  fault = draw(st.sampled_from(['none', 'none', 'none', 'missing', 'mixed']))
  if fault == 'missing':
    labels[draw(st.integers(0, 3))] = draw(_MISSING)
  if fault == 'mixed':
    labels[0] = 'a' if not isinstance(labels[1], str) else 7
  return labels, fault, draw(st.booleans())


@functools.cache
def _model():
  return small_model()


def _check_own_labels(example) -> bool:
  from sklearn.metrics import accuracy_score
  from sklearn.preprocessing import LabelEncoder

  labels, fault, as_array = example
  given = np.array(labels) if as_array and fault == 'none' else labels
  images = pictures([0, 1, 2, 3])
  may = fault == 'none' and 2 <= len(set(labels)) <= WAY
  classifier = ms.FewShotClassifier(_model())
  done, _ = accepted(lambda: classifier.fit(images, given), may)
  if not done:
    return False
  encoder = LabelEncoder().fit(labels)
  codes = encoder.transform(labels)
  numbered = ms.FewShotClassifier(_model()).fit(images, codes)
  np.testing.assert_array_equal(classifier.classes_, encoder.classes_)
  answers = numbered.predict(images)
  np.testing.assert_array_equal(classifier.predict(images), encoder.inverse_transform(answers))
  assert classifier.score(images, given) == accuracy_score(codes, answers)
  return True


_NAMES = st.one_of(
  st.text(st.sampled_from('ab01./[]\'"\\ é字_-%'), min_size=0, max_size=4),
  st.integers(0, 3),
  st.tuples(st.integers(0, 1)),
)


def _of_one_type(names: list) -> list:
  """Returns the names that have the type of the first; JAX cannot sort the keys of a dict of several types."""
  return [name for name in names if type(name) is type(names[0])]


@st.composite
def _trees(draw):
  count = iter(range(100))

  def node(depth):
    if depth == 0 or draw(st.integers(0, 2)) == 0:
      return np.full(
        draw(st.sampled_from([(), (2,), (1, 3)])), next(count), draw(st.sampled_from([np.float32, np.int32]))
      )
    form = draw(st.sampled_from(['dict', 'dict', 'list', 'tuple']))
    names = _of_one_type(draw(st.lists(_NAMES, min_size=1, max_size=3, unique=True)))
    children = [node(depth - 1) for _ in names]
    return dict(zip(names, children, strict=True)) if form == 'dict' else {'list': list, 'tuple': tuple}[form](children)

  return node(3)


def _check_tree(tree) -> bool:
  with tempfile.TemporaryDirectory(prefix='fuzz-') as directory:
    path = pathlib.Path(directory, 'params.safetensors')
    files.write_params(path, tree)
    found = files.read_params(path, jax.tree.map(np.zeros_like, tree))
  assert jax.tree.structure(found) == jax.tree.structure(tree)
  for ours, expected in zip(jax.tree.leaves(found), jax.tree.leaves(tree), strict=True):
    np.testing.assert_array_equal(ours, expected)
    assert ours.dtype == expected.dtype
  return True


_SHAPES = {'w': (2, 3), 'b': (3,)}
_RATES = st.one_of(
  st.sampled_from([0.1, 1, np.float32(0.2), np.float64(0.3), np.array(0.4), np.int32(2), jnp.float32(0.5), True]),
  st.sampled_from([None, '0.1', 1j, np.array('x'), [0.1, 0.2]]),
  st.sampled_from([(2, 3), (3,), (1,), (2, 1), (3, 2)]).map(
    lambda shape: np.linspace(0.1, 0.6, np.prod(shape)).reshape(shape)
  ),
)


@st.composite
def _alphas(draw):
  form = draw(st.sampled_from(['bare', 'dict', 'dict', 'dict', 'missing', 'extra']))
  if form == 'bare':
    return draw(_RATES)
  alpha = {name: draw(_RATES) for name in _SHAPES}
  if form == 'missing':
    del alpha['b']
  if form == 'extra':
    alpha['c'] = 0.1
  return alpha


def _rate_for(alpha, name) -> Any:
  """Returns the rate of a leaf of θ, which is 0.0 for `None`. Raises ValueError if there is no valid rate."""
  if isinstance(alpha, dict):
    if alpha.keys() != _SHAPES.keys():
      raise ValueError('another structure')
    alpha = alpha[name]
    if alpha is None:
      return 0.0
  if alpha is None or isinstance(alpha, str | list):
    raise ValueError('no number')
  rate = np.asarray(alpha)
  if rate.dtype.kind not in 'biuf' or rate.shape not in ((), _SHAPES[name]):
    raise ValueError('no rate of this leaf')
  return rate.astype(np.float64)


def _quadratic(theta, target):
  return sum(jnp.sum(jnp.square(leaf - target)) / 2 for leaf in jax.tree.leaves(theta))


def _check_alpha(alpha) -> bool:
  theta = {
    name: np.linspace(-1, 1, int(np.prod(shape)), dtype=np.float32).reshape(shape) for name, shape in _SHAPES.items()
  }
  try:
    expected = {name: leaf - _rate_for(alpha, name) * (leaf - 2.0) for name, leaf in theta.items()}
  except ValueError:
    expected = None
  done, found = accepted(
    lambda: ms.adapt(theta, alpha, np.float32(2), loss_fn=_quadratic), expected is not None, (ValueError, TypeError)
  )
  if done:
    for name in theta:
      np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-6)
      assert found[name].dtype == np.float32
  return done


_TASKS = ms.tasks.sinusoid()


@st.composite
def _keys(draw):
  impl = draw(st.sampled_from(['threefry2x32', 'threefry2x32', 'rbg', 'unsafe_rbg', 'old']))
  return impl, draw(st.integers(0, 2**32 - 1)), draw(st.lists(st.integers(0, 2**31 - 1), max_size=3))


@jax.jit
def _several(keys):
  sample = lambda key: _TASKS.episode(_TASKS.sample(key), key)
  return jax.vmap(sample)(keys), jax.lax.map(sample, keys)


@jax.jit
def _single(key):
  return _TASKS.episode(_TASKS.sample(key), key)


def _check_key(example) -> bool:
  from metasgd_jax.outer.loop import check_key

  impl, seed, folds = example
  key = jax.random.PRNGKey(seed) if impl == 'old' else jax.random.key(seed, impl=impl)
  for fold in folds:
    key = jax.random.fold_in(key, fold)
  done, _ = accepted(lambda: check_key(key), impl == 'threefry2x32')
  if done:
    keys = jax.random.split(key, 3)
    together, in_turn = jax.device_get(_several(keys))
    for i in range(3):
      alone = jax.device_get(_single(keys[i]))
      for expected, *found in zip(*map(jax.tree.leaves, (alone, together, in_turn)), strict=True):
        for ours in found:
          np.testing.assert_allclose(ours[i], expected, rtol=1e-6, atol=1e-6)
  return done


@st.composite
def _pictures(draw):
  rng = np.random.default_rng(draw(st.integers(0, 9999)))
  mode = draw(st.sampled_from(['L', 'RGB', 'RGBA', 'LA', 'P', '1', 'I;16', 'CMYK']))
  size = draw(st.sampled_from([(5, 6), (4, 4), (1, 3)]))
  orientation = draw(st.sampled_from([1, 1, 2, 3, 4, 5, 6, 7, 8]))
  bits, transparent = draw(st.sampled_from([8, 10, 12, 14, 16])), draw(st.booleans())
  darkest = draw(st.sampled_from([0, 0, 200]))
  form = {'CMYK': 'TIFF', 'RGB': draw(st.sampled_from(['PNG', 'BMP', 'TIFF', 'PPM', 'WEBP']))}.get(mode, 'PNG')
  name = 'picture' + draw(st.sampled_from(['.png', '.PNG', '', '.dat', '.jpg', f'.{form.lower()}']))
  channels = draw(st.sampled_from([1, 3]))
  depth = {'RGB': 3, 'RGBA': 4, 'LA': 2, 'CMYK': 4}.get(mode, 1)
  values = rng.integers(darkest, 256, (*size, depth))
  if mode in ('RGBA', 'LA'):
    values[..., -1] = rng.choice([0, 255], size)
  if mode == 'I;16':
    values = rng.integers(0, 1 << bits, (*size, 1))
    values.flat[0] = (1 << bits) - 1
  return values, mode, form, name, orientation, bits, transparent and mode in ('I;16', 'P'), channels


def _write_picture(path, values, mode, form, orientation, transparent) -> None:
  flat = values[..., 0]
  if mode == 'I;16':
    image = Image.fromarray(flat.astype(np.uint16))
  elif mode == '1':
    image = Image.fromarray(flat >= 128)
  elif mode == 'P':
    image = Image.fromarray((flat % 4).astype(np.uint8), 'P')
    image.putpalette([10, 20, 30, 200, 0, 0, 0, 0, 200, 90, 250, 90])
  else:
    image = Image.fromarray(values.astype(np.uint8) if values.shape[2] > 1 else flat.astype(np.uint8), mode)
  how: dict[str, Any] = {'lossless': True} if form == 'WEBP' else {}
  if transparent:
    how['transparency'] = int(flat[0, 0]) if mode == 'I;16' else 0
  if form in ('PNG', 'TIFF', 'WEBP'):
    exif = Image.Exif()
    exif[0x0112] = orientation
    how['exif'] = exif
  image.save(path, form, **how)


_UPRIGHT = {
  1: lambda a: a,
  2: lambda a: a[:, ::-1],
  3: lambda a: a[::-1, ::-1],
  4: lambda a: a[::-1],
  5: lambda a: a.swapaxes(0, 1),
  6: lambda a: np.rot90(a, 3),
  7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
  8: np.rot90,
}


def _grey(rgb: np.ndarray) -> np.ndarray:
  """The luma of ITU-R 601-2 in integers, as Pillow documents it for the conversion to 'L'."""
  return (rgb @ np.array([19595, 38470, 7471]) + 0x8000) >> 16


def _expected_picture(values, mode, form, orientation, bits, transparent, channels) -> np.ndarray:
  """Returns the picture as the documentation of `read_image` says, computed from its values by NumPy alone."""
  flat = values[..., 0]
  alpha = np.full(flat.shape, 255)
  if mode in ('RGBA', 'LA'):
    alpha = values[..., -1]
  if mode in ('RGB', 'RGBA'):
    rgb = values[..., :3]
  elif mode == 'CMYK':
    rgb = np.rint((255 - values[..., :3]) * (255 - values[..., 3:]) / 255).astype(int)
  elif mode == 'P':
    rgb = np.array([[10, 20, 30], [200, 0, 0], [0, 0, 200], [90, 250, 90]])[flat % 4]
    alpha = np.where((flat % 4 == 0) & transparent, 0, 255)
  else:
    grey = {'1': 255 * (flat >= 128), 'I;16': flat >> (bits - 8)}.get(mode, flat)
    rgb = np.repeat(grey[..., None], 3, -1)
    if mode == 'I;16' and transparent:
      alpha = np.where(flat == flat[0, 0], 0, 255)
  grounds = [np.where(alpha[..., None] == 255, rgb, ground) for ground in (255, 0)]
  on_white, on_black = (np.ptp(_grey(laid)) for laid in grounds)
  rgb = grounds[1] if 2 * on_white < on_black else grounds[0]
  found = rgb if channels == 3 else _grey(rgb)[..., None]
  return _UPRIGHT[orientation if form in ('PNG', 'TIFF', 'WEBP') else 1](found)


def _check_picture(example) -> bool:
  values, mode, form, name, orientation, bits, transparent, channels = example
  expected = _expected_picture(values, mode, form, orientation, bits, transparent, channels)
  with tempfile.TemporaryDirectory(prefix='fuzz-') as directory:
    _write_picture(pathlib.Path(directory, name), values, mode, form, orientation, transparent)
    found = image_folder.read_images(directory, size=expected.shape[:2], channels=channels)
  tolerance = 1 if mode == 'CMYK' else 0  # Pillow rounds its product of inks in another way.
  np.testing.assert_allclose(found.images[0].astype(int), expected, atol=tolerance)
  return True


KINDS = {
  'labels of a loss': Kind('NumPy and SciPy in float64', _class_labels(), _check_class_labels, 2.0),
  'labels of a classifier': Kind("scikit-learn's LabelEncoder and accuracy_score", _own_labels(), _check_own_labels),
  'pictures': Kind('NumPy, from the values that were stored', _pictures(), _check_picture, 3.0),
  'names in theta': Kind('the arrays themselves, read back', _trees(), _check_tree, 2.0),
  'rates alpha': Kind('NumPy in float64, on a quadratic', _alphas(), _check_alpha, 2.0),
  'keys': Kind('the same key alone, without vmap', _keys(), _check_key),
  'derivatives': Kind('a plain loop in float64, differences', derivatives.networks(), derivatives.check, 0.1),
}
