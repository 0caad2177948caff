"""Banks that stay on the host: the same episodes, to the bit, a chunk's images at a time."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import conv_learner, random_bank, saying

import metasgd_jax as ms

WAY, SHOT, QUERY = 3, 1, 2
LINEAR = ms.Model(
  lambda key, x: {'w': jax.random.normal(key, (x[0].size, WAY))}, lambda theta, x: x.reshape(len(x), -1) @ theta['w']
)
LEARNER = ms.meta_sgd(LINEAR, ms.losses.cross_entropy)
OPTIMIZER = optax.sgd(0.1)
BANK = random_bank()
RESIDENT = ms.tasks.few_shot(BANK, way=WAY, shot=SHOT, query=QUERY)


def stream(bank):
  return ms.tasks.stream(bank, ms.tasks.image_indices(bank, way=WAY, shot=SHOT, query=QUERY))


STREAM = stream(BANK)
"""Tasks that are the same object share their compiled program of training."""


def trained(tasks, meta_iterations=7, keys=None, learner=LEARNER, **options):
  options = dict(learner=learner, optimizer=OPTIMIZER) | options
  keys = jax.random.key(3) if keys is None else keys
  state = ms.init(keys, tasks, learner=learner, optimizer=OPTIMIZER)
  return ms.train(state, tasks, meta_iterations=meta_iterations, meta_batch=2, chunk=3, **options)


@pytest.mark.parametrize(
  ('runs', 'mesh'),
  [(None, False), *[pytest.param(*pair, marks=pytest.mark.slow) for pair in ((2, True), (2, False), (None, True))]],
)
def test_training_on_a_stream_is_training_on_the_bank(runs, mesh):
  keys = None if runs is None else jax.random.split(jax.random.key(3), runs)
  options = dict(placement=ms.Placement(mesh=ms.sharding.task_mesh(2))) if mesh else {}
  resident, streamed = (trained(tasks, keys=keys, **options) for tasks in (RESIDENT, STREAM))
  for a, b in zip(jax.tree.leaves(resident.meta), jax.tree.leaves(streamed.meta), strict=True):
    assert np.array_equal(a, b)


@pytest.mark.slow
def test_training_a_convolutional_network_on_a_stream_is_training_it_on_the_bank(optimized):
  learner = conv_learner(way=WAY)
  resident, streamed = (trained(tasks, learner=learner) for tasks in (RESIDENT, STREAM))
  for a, b in zip(jax.tree.leaves(resident.meta), jax.tree.leaves(streamed.meta), strict=True):
    assert np.array_equal(a, b)


def test_a_stream_goes_on_where_training_stopped():
  options = dict(learner=LEARNER, optimizer=OPTIMIZER, meta_batch=2, chunk=3)
  half = trained(STREAM, meta_iterations=4)
  again = ms.train(half, STREAM, meta_iterations=7, **options)
  for a, b in zip(jax.tree.leaves(again.meta), jax.tree.leaves(trained(STREAM).meta), strict=True):
    assert np.array_equal(a, b)


@pytest.mark.parametrize('mesh', [pytest.param(None, marks=pytest.mark.slow), ms.sharding.task_mesh(2)])
def test_testing_on_a_stream_is_testing_on_the_bank(mesh):
  meta = trained(RESIDENT, meta_iterations=1).meta
  in_parts = dataclasses.replace(STREAM, sent_at_once=4)
  options = dict(metric_fn=ms.losses.cross_entropy, num_tasks=12, repeats=2, placement=ms.Placement(2, mesh))
  values = [ms.evaluate(LEARNER, meta, tasks, jax.random.key(5), **options) for tasks in (RESIDENT, in_parts)]
  assert values[0].shape == (12, 2, 2)
  np.testing.assert_allclose(values[1], values[0], rtol=1e-6)


def test_joint_training_on_a_stream_is_joint_training_on_the_bank():
  bank = random_bank()
  keys = jax.random.split(jax.random.key(0), (2, 3))
  sent = ms.tasks.stream(bank, ms.tasks.class_indices(bank, batch=9)).send(*keys)
  whole = ms.tasks.all_classes(bank, batch=9)
  draw = jax.jit(lambda tasks, keys: tasks.episode(tasks.sample(keys[0, 2]), keys[1, 2]))
  a, b = (draw(tasks, keys) for tasks in (sent, whole))
  assert np.array_equal(a.query.x, b.query.x)
  assert np.array_equal(a.query.y, b.query.y)


def test_only_what_a_chunk_shows_is_sent():
  bank = random_bank(classes=200, size=16)
  tasks = stream(bank)
  keys = jax.random.split(jax.random.key(0), (2, 4))
  sent = tasks.send(*keys)
  largest = max(leaf.nbytes for leaf in jax.tree.leaves(sent))
  assert largest == 4 * WAY * (SHOT + QUERY) * 16 * 16
  whole = ms.tasks.few_shot(bank, way=WAY, shot=SHOT, query=QUERY)
  draw = jax.jit(lambda tasks, keys: tasks.episode(tasks.sample(keys[0, 1]), keys[1, 1]))
  episode, expected = (draw(tasks, keys) for tasks in (sent, whole))
  assert np.array_equal(episode.query.x, expected.query.x)
  assert np.array_equal(episode.support.y, expected.support.y)


def test_a_shorter_last_chunk_sends_the_images_of_its_own_meta_iterations():
  sent = []

  def send(*keys):
    sent.append(len(np.unique(jax.random.key_data(keys[0]), axis=0)))
    return STREAM.send(*keys)

  trained(dataclasses.replace(STREAM, send=send), meta_iterations=7)
  assert sent == [1, 6, 6, 2]  # Tasks: one of `ms.init`, and two in each meta-iteration.


def test_an_image_that_was_not_sent_is_nan():
  tasks = stream(random_bank(classes=200))
  sent = tasks.send(*jax.random.split(jax.random.key(0), (2, 1)))
  draw = jax.jit(lambda tasks, *keys: tasks.episode(tasks.sample(keys[0]), keys[1]))
  other = draw(sent, jax.random.key(8), jax.random.key(9))
  assert np.isnan(other.query.x).any()


def test_a_memory_map_will_do(tmp_path):
  images, sizes = BANK
  np.save(tmp_path / 'images.npy', images)
  mapped = stream(ms.tasks.ClassBank(np.load(tmp_path / 'images.npy', mmap_mode='r'), sizes))
  keys = jax.random.split(jax.random.key(0), (2, 3))
  for x, y in zip(*(jax.tree.leaves(tasks.send(*keys)) for tasks in (mapped, STREAM)), strict=True):
    assert np.array_equal(x, y)


@pytest.mark.slow
def test_training_on_a_memory_map_is_training_on_the_array(tmp_path):
  np.save(tmp_path / 'images.npy', BANK.images)
  mapped = stream(ms.tasks.ClassBank(np.load(tmp_path / 'images.npy', mmap_mode='r'), BANK.sizes))
  for x, y in zip(*(jax.tree.leaves(trained(tasks).meta) for tasks in (mapped, STREAM)), strict=True):
    assert np.array_equal(x, y)


def test_an_error_while_sending_is_raised():
  def send(*keys):
    raise OSError('the disk is gone')

  with pytest.raises(OSError, match='the disk is gone'):
    trained(ms.TaskStream(send))


class TestAugmentation:
  IMAGE = np.random.default_rng(0).uniform(size=(6, 6, 3)).astype(np.float32)

  def many(self, augment, count=200):
    return np.asarray(jax.jit(jax.vmap(augment, (0, None)))(jax.random.split(jax.random.key(0), count), self.IMAGE))

  def test_flip(self):
    images = self.many(ms.tasks.augmentation.flip)
    mirrored = [np.array_equal(image, self.IMAGE[:, ::-1]) for image in images]
    same = [np.array_equal(image, self.IMAGE) for image in images]
    assert np.all(np.logical_xor(mirrored, same))
    assert 0.35 < np.mean(mirrored) < 0.65

  def test_shift_moves_by_up_to_so_many_pixels(self):
    padded = np.pad(self.IMAGE, ((2, 2), (2, 2), (0, 0)), mode='edge')
    places = {(r, c): padded[r : r + 6, c : c + 6] for r in range(5) for c in range(5)}
    seen = set()
    for image in self.many(ms.tasks.augmentation.shift(2)):
      seen |= {place for place, expected in places.items() if np.array_equal(image, expected)}
    assert seen == set(places)

  def test_light(self):
    images = self.many(ms.tasks.augmentation.light(0.3))
    assert images.min() >= 0
    assert images.max() <= 1
    assert 0.1 < images.mean((1, 2, 3)).std() / images.mean() < 0.3
    np.testing.assert_allclose(self.many(ms.tasks.augmentation.light(0.0), 1)[0], self.IMAGE, atol=1e-6)

  def test_a_chain_gives_each_a_key_of_its_own(self):
    noise = lambda key, image: image + jax.random.normal(key, image.shape)
    twice = jax.jit(ms.tasks.augmentation.chain(noise, noise))(jax.random.key(0), np.zeros((50, 50, 1), np.float32))
    assert 1.3 < float(twice.std()) < 1.55  # √2; one key for both would give 2.

  @pytest.mark.parametrize(
    ('build', 'value', 'bounds'),
    [('shift', -1, 'at least 0'), ('light', 1.5, 'from 0 to 1'), ('light', float('nan'), 'from 0 to 1')],
  )
  def test_bad_numbers(self, build, value, bounds):
    with pytest.raises(ValueError, match=saying(bounds, f'got {value}')):
      getattr(ms.tasks.augmentation, build)(value)

  def test_each_image_of_an_episode_is_changed_by_itself_and_labels_stay(self):
    bank = random_bank()
    plain = ms.tasks.few_shot(bank, way=WAY, shot=SHOT, query=QUERY)
    noisy = ms.tasks.augmented(plain, lambda key, image: image * 0 + jax.random.uniform(key))
    task = jax.jit(plain.sample)(jax.random.key(0))
    a, b = (jax.jit(tasks.episode)(task, jax.random.key(1)) for tasks in (plain, noisy))
    assert np.array_equal(a.query.y, b.query.y)
    assert len(np.unique(np.concatenate([b.support.x, b.query.x])[:, 0, 0, 0])) == WAY * (SHOT + QUERY)

  def test_keys_are_none_that_the_episode_was_drawn_with(self):
    """Whether an image is flipped must not tell which images were drawn."""
    bank = random_bank()
    plain = ms.tasks.few_shot(bank, way=WAY, shot=SHOT, query=QUERY)
    used = set()
    note = lambda key, image: image * 0 + jax.random.key_data(key).astype(jnp.float32)[0]
    key = jax.random.key(1)
    noted = jax.jit(ms.tasks.augmented(plain, note).episode)(jax.jit(plain.sample)(jax.random.key(0)), key)
    order_key, draw_key = jax.random.split(key)
    for keys in (jax.random.split(key, 8), jax.random.split(order_key), jax.random.split(draw_key, 8)):
      used |= set(np.asarray(jax.random.key_data(keys)).astype(np.float32)[:, 0].tolist())
    found = np.concatenate([noted.support.x, noted.query.x])[:, 0, 0, 0].tolist()
    assert len(set(found)) == WAY * (SHOT + QUERY)
    assert not used & set(found)

  @pytest.mark.parametrize('kind', ['bank', 'stream'])
  def test_twice_is_refused(self, kind):
    bank = random_bank()
    tasks = stream(bank) if kind == 'stream' else ms.tasks.few_shot(bank, way=WAY, shot=SHOT, query=QUERY)
    once = ms.tasks.augmented(tasks, ms.tasks.augmentation.flip)
    with pytest.raises(ValueError, match=saying('augmented already', 'chain')):
      ms.tasks.augmented(once, ms.tasks.augmentation.flip)

  def test_episodes_of_a_stream_are_augmented_as_the_banks_are(self):
    bank = random_bank()
    keys = jax.random.split(jax.random.key(0), (2, 4))
    resident = ms.tasks.few_shot(bank, way=WAY, shot=SHOT, query=QUERY)
    whole, streamed = (ms.tasks.augmented(tasks, ms.tasks.augmentation.flip) for tasks in (resident, stream(bank)))
    draw = jax.jit(lambda tasks, keys: jax.vmap(tasks.episode)(jax.vmap(tasks.sample)(keys[0]), keys[1]))
    a, b, plain = (draw(t, keys) for t in (whole, streamed.send(*keys), resident))
    for x, y, unchanged in zip(*map(jax.tree.leaves, (a, b, plain)), strict=True):
      assert np.array_equal(x, y)
      assert np.array_equal(x, unchanged) == (x.ndim == 2)  # The labels are, and the images are not.

  @pytest.mark.slow
  def test_a_stream_is_augmented_as_the_bank_is(self):
    bank = random_bank()
    augment = ms.tasks.augmentation.flip
    resident = ms.tasks.few_shot(bank, way=WAY, shot=SHOT, query=QUERY)
    a, b = (trained(ms.tasks.augmented(tasks, augment)) for tasks in (resident, stream(bank)))
    for x, y in zip(jax.tree.leaves(a.meta), jax.tree.leaves(b.meta), strict=True):
      assert np.array_equal(x, y)


def test_data_are_not_sent_inside_jit():
  keys = jax.random.split(jax.random.key(0), (2, 2))
  draw = lambda tasks, keys: tasks.episode(tasks.sample(keys[0, 0]), keys[1, 0])
  with pytest.raises(ValueError, match=saying('TaskStream', 'jax.jit', 'tasks.prepare', 'argument')):
    jax.jit(lambda keys: draw(STREAM.prepare(lambda: tuple(keys)), keys))(keys)
  assert jax.jit(draw)(STREAM.prepare(lambda: tuple(keys)), keys).support.x.shape == (3, 8, 8, 1)
