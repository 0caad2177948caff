"""Banks that stay on the host: the same episodes, to the bit, a chunk's images at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import conv_learner, random_bank

import metasgd_jax as ms

WAY, SHOT, QUERY = 3, 1, 2


def stream(bank):
  return ms.tasks.stream(bank, ms.tasks.image_indices(bank, way=WAY, shot=SHOT, query=QUERY))


def trained(tasks, meta_iterations=7, keys=None, **options):
  learner, optimizer = conv_learner(way=WAY), optax.sgd(0.1)
  state = ms.init(jax.random.key(3) if keys is None else keys, tasks, learner=learner, optimizer=optimizer)
  options = dict(
    learner=learner, optimizer=optimizer, meta_iterations=meta_iterations, meta_batch=2, chunk=3, **options
  )
  return ms.train(state, tasks, **options)


@pytest.mark.parametrize('mesh', [False, True])
@pytest.mark.parametrize('runs', [None, 2])
def test_training_on_a_stream_is_training_on_the_bank(mesh, runs):
  bank = random_bank()
  keys = None if runs is None else jax.random.split(jax.random.key(3), runs)
  options = dict(mesh=ms.sharding.task_mesh(2)) if mesh else {}
  resident = trained(ms.tasks.few_shot(bank, way=WAY, shot=SHOT, query=QUERY), keys=keys, **options)
  streamed = trained(stream(bank), keys=keys, **options)
  for a, b in zip(jax.tree.leaves(resident.meta), jax.tree.leaves(streamed.meta), strict=True):
    assert np.array_equal(a, b)


def test_a_stream_goes_on_where_training_stopped():
  bank = random_bank()
  learner, optimizer = conv_learner(way=WAY), optax.sgd(0.1)
  options = dict(learner=learner, optimizer=optimizer, meta_batch=2, chunk=3)
  half = trained(stream(bank), meta_iterations=4)
  again = ms.train(half, stream(bank), meta_iterations=7, **options)
  for a, b in zip(jax.tree.leaves(again.meta), jax.tree.leaves(trained(stream(bank)).meta), strict=True):
    assert np.array_equal(a, b)


@pytest.mark.parametrize('mesh', [None, ms.sharding.task_mesh(2)])
def test_testing_on_a_stream_is_testing_on_the_bank(mesh, monkeypatch):
  monkeypatch.setattr('metasgd_jax.evaluation.SENT_AT_ONCE', 4)
  bank = random_bank()
  resident = ms.tasks.few_shot(bank, way=WAY, shot=SHOT, query=QUERY)
  learner = conv_learner(way=WAY)
  meta = trained(resident, meta_iterations=1).meta
  options = dict(metric_fn=ms.losses.cross_entropy, num_tasks=12, repeats=2, mapping=2, mesh=mesh)
  values = [ms.evaluate(learner, meta, tasks, jax.random.key(5), **options) for tasks in (resident, stream(bank))]
  assert values[0].shape == (12, 2, 2)
  np.testing.assert_allclose(values[1], values[0], rtol=1e-6)


def test_joint_training_on_a_stream_is_joint_training_on_the_bank():
  bank = random_bank()
  keys = jax.random.split(jax.random.key(0), (2, 3))
  sent = ms.tasks.stream(bank, ms.tasks.class_indices(bank, batch=9)).send(*keys)
  whole = ms.tasks.all_classes(bank, batch=9)
  a, b = (tasks.episode(tasks.sample(keys[0, 2]), keys[1, 2]) for tasks in (sent, whole))
  assert np.array_equal(a.query.x, b.query.x)
  assert np.array_equal(a.query.y, b.query.y)


def test_only_what_a_chunk_shows_is_sent():
  bank = random_bank(classes=200, size=16)
  tasks = stream(bank)
  keys = jax.random.split(jax.random.key(0), (2, 4))
  sent = tasks.send(*keys)
  largest = max(leaf.nbytes for leaf in jax.tree.leaves(sent))
  assert largest == 4 * WAY * (SHOT + QUERY) * 16 * 16
  episode = sent.episode(sent.sample(keys[0, 1]), keys[1, 1])
  whole = ms.tasks.few_shot(bank, way=WAY, shot=SHOT, query=QUERY)
  expected = whole.episode(whole.sample(keys[0, 1]), keys[1, 1])
  assert np.array_equal(episode.query.x, expected.query.x)
  assert np.array_equal(episode.support.y, expected.support.y)


def test_an_image_that_was_not_sent_is_nan():
  tasks = stream(random_bank(classes=200))
  sent = tasks.send(*jax.random.split(jax.random.key(0), (2, 1)))
  other = sent.episode(sent.sample(jax.random.key(8)), jax.random.key(9))
  assert bool(jnp.isnan(other.query.x).any())


def test_a_memory_map_will_do(tmp_path):
  images, sizes = random_bank()
  np.save(tmp_path / 'images.npy', images)
  bank = ms.tasks.ClassBank(np.load(tmp_path / 'images.npy', mmap_mode='r'), sizes)
  a, b = (trained(stream(b)) for b in (bank, ms.tasks.ClassBank(images, sizes)))
  for x, y in zip(jax.tree.leaves(a.meta), jax.tree.leaves(b.meta), strict=True):
    assert np.array_equal(x, y)


def test_an_error_while_sending_is_raised():
  def send(*keys):
    raise OSError('the disk is gone')

  with pytest.raises(OSError, match='the disk is gone'):
    trained(ms.TaskStream(send))


class TestAugmentation:
  IMAGE = jnp.asarray(np.random.default_rng(0).uniform(size=(6, 6, 3)), jnp.float32)

  def many(self, augment, count=200):
    return np.asarray(jax.vmap(augment, (0, None))(jax.random.split(jax.random.key(0), count), self.IMAGE))

  def test_flip(self):
    mirrored = [np.array_equal(image, self.IMAGE[:, ::-1]) for image in self.many(ms.tasks.augmentation.flip)]
    same = [np.array_equal(image, self.IMAGE) for image in self.many(ms.tasks.augmentation.flip)]
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
    twice = ms.tasks.augmentation.chain(noise, noise)(jax.random.key(0), jnp.zeros((50, 50, 1)))
    assert 1.3 < float(twice.std()) < 1.55  # √2; one key for both would give 2.

  @pytest.mark.parametrize(('build', 'value'), [('shift', -1), ('light', 1.5), ('light', float('nan'))])
  def test_bad_numbers(self, build, value):
    with pytest.raises(ValueError, match=r'must be (at least 0|from 0 to 1), got'):
      getattr(ms.tasks.augmentation, build)(value)

  def test_each_image_of_an_episode_is_changed_by_itself_and_labels_stay(self):
    bank = random_bank()
    plain = ms.tasks.few_shot(bank, way=WAY, shot=SHOT, query=QUERY)
    noisy = ms.tasks.augmented(plain, lambda key, image: image * 0 + jax.random.uniform(key))
    task = plain.sample(jax.random.key(0))
    a, b = plain.episode(task, jax.random.key(1)), noisy.episode(task, jax.random.key(1))
    assert np.array_equal(a.query.y, b.query.y)
    assert len(np.unique(np.concatenate([b.support.x, b.query.x])[:, 0, 0, 0])) == WAY * (SHOT + QUERY)

  def test_keys_are_none_that_the_episode_was_drawn_with(self):
    """Whether an image is flipped must not tell which images were drawn."""
    bank = random_bank()
    plain = ms.tasks.few_shot(bank, way=WAY, shot=SHOT, query=QUERY)
    used = set()
    note = lambda key, image: image * 0 + jax.random.key_data(key).astype(jnp.float32)[0]
    key = jax.random.key(1)
    noted = ms.tasks.augmented(plain, note).episode(plain.sample(jax.random.key(0)), key)
    order_key, draw_key = jax.random.split(key)
    for keys in (jax.random.split(key, 8), jax.random.split(order_key), jax.random.split(draw_key, 8)):
      used |= set(np.asarray(jax.random.key_data(keys).astype(jnp.float32)[:, 0]).tolist())
    found = np.concatenate([noted.support.x, noted.query.x])[:, 0, 0, 0].tolist()
    assert len(set(found)) == WAY * (SHOT + QUERY)
    assert not used & set(found)

  @pytest.mark.parametrize('kind', ['bank', 'stream'])
  def test_twice_is_refused(self, kind):
    bank = random_bank()
    tasks = stream(bank) if kind == 'stream' else ms.tasks.few_shot(bank, way=WAY, shot=SHOT, query=QUERY)
    once = ms.tasks.augmented(tasks, ms.tasks.augmentation.flip)
    with pytest.raises(ValueError, match='the tasks are augmented already; chain the augmentations'):
      ms.tasks.augmented(once, ms.tasks.augmentation.flip)

  def test_a_stream_is_augmented_as_the_bank_is(self):
    bank = random_bank()
    augment = ms.tasks.augmentation.flip
    resident = ms.tasks.few_shot(bank, way=WAY, shot=SHOT, query=QUERY)
    a, b = (trained(ms.tasks.augmented(tasks, augment)) for tasks in (resident, stream(bank)))
    for x, y in zip(jax.tree.leaves(a.meta), jax.tree.leaves(b.meta), strict=True):
      assert np.array_equal(x, y)
