"""Classes shared out: by seed, by lists, as published."""

import numpy as np
import pytest
from problems import saying

from metasgd_jax.datasets import (
  ClassNames,
  DatasetError,
  published_split,
  read_list,
  split_bank,
  split_by_lists,
  split_by_seed,
)
from metasgd_jax.tasks.few_shot import ClassBank

NAMES = [f'class {i}' for i in range(50)]


class TestBySeed:
  def test_fractions_use_every_class_once(self):
    split = split_by_seed(NAMES, train=0.64, validation=0.16, test=0.2)
    assert [len(part) for part in split] == [32, 8, 10]
    assert sorted(sum(split, ())) == sorted(NAMES)

  def test_fractions_that_do_not_come_out_even_use_every_class_too(self):
    split = split_by_seed(NAMES[:7], train=1 / 3, validation=1 / 3, test=1 / 3)
    assert sorted(len(part) for part in split) == [2, 2, 3]
    assert len(set(sum(split, ()))) == 7

  def test_counts_leave_the_rest_out(self):
    split = split_by_seed(NAMES, train=5, validation=0, test=4)
    assert [len(part) for part in split] == [5, 0, 4]
    assert len(set(sum(split, ()))) == 9

  def test_seed_and_not_the_order_of_names_decides(self):
    split = split_by_seed(NAMES, seed=3)
    assert split_by_seed(NAMES[::-1], seed=3) == split
    assert split_by_seed(NAMES, seed=4) != split

  def test_a_seed_gives_the_split_that_it_has_always_given(self):
    split = split_by_seed(NAMES, seed=3)
    assert [int(name[6:]) for name in split.validation] == [14, 16, 17, 18, 33, 35, 47, 49]
    assert [int(name[6:]) for name in split.test] == [13, 15, 21, 23, 26, 32, 39, 4, 41, 7]

  def test_names_are_sorted_once_and_not_once_for_each_name(self):
    compared = []

    class Name(str):
      def __lt__(self, other):
        compared.append(other)
        return str.__lt__(self, other)

    names = [Name(f'class {i}') for i in np.random.default_rng(0).permutation(200)]
    assert split_by_seed(names) == split_by_seed([str(name) for name in names])
    assert len(compared) < 2 * 200 * np.log2(200)

  @pytest.mark.parametrize(
    ('shares', 'parts'),
    [
      (dict(train=40, validation=8, test=3), ('sum to 50 or less', 'train=40', 'validation=8', 'test=3')),
      (dict(train=-1, validation=8, test=3), ('0 or more', 'train=-1')),
      (dict(train=0.5, validation=0.1, test=0.2), ('sum to 1', 'train=0.5')),
      (dict(train=1.5, validation=-0.5, test=0.0), ('fractions', '0 or more', 'validation=-0.5')),
      (dict(train=float('nan'), validation=0.5, test=0.5), ('sum to 1', 'train=nan')),
      (
        dict(train=0.795, validation=0.005, test=0.2),
        ('validation=0.005', '50 classes', 'rounds to 0', 'give numbers'),
      ),
    ],
  )
  def test_shares_that_cannot_be(self, shares, parts):
    with pytest.raises(ValueError, match=saying(*parts)):
      split_by_seed(NAMES, **shares)

  def test_a_name_twice(self):
    with pytest.raises(ValueError, match=saying('1 class (class 3)', 'more than once')):
      split_by_seed([*NAMES, 'class 3'])


class TestByLists:
  def test_classes_in_no_list_are_left_out(self):
    lists = ClassNames(('class 4', 'class 1'), (), ('class 7',))
    assert split_by_lists(NAMES, lists) == lists

  def test_missing_classes_are_named(self):
    with pytest.raises(ValueError, match=saying('lists', '2 classes (cat, dog)', 'not in the data')):
      split_by_lists(NAMES, ClassNames(('dog', 'class 1'), ('cat',), ()))

  def test_a_class_in_two_lists(self):
    with pytest.raises(ValueError, match=saying('lists', '1 class (class 1)', 'more than once')):
      split_by_lists(NAMES, ClassNames(('class 1',), (), ('class 1',)))


class TestBank:
  def bank(self):
    sizes = np.array([2, 1, 3])
    images = np.repeat([10, 20, 30], sizes).astype(np.uint8).reshape(6, 1, 1, 1) + np.zeros((6, 2, 2, 1), np.uint8)
    return ClassBank(images, sizes)

  def test_images_follow_their_classes_in_the_lists_order(self):
    split = split_bank(self.bank(), ['a', 'b', 'c'], ClassNames(('c', 'a'), (), ('b',)))
    assert split.train.images[:, 0, 0, 0].tolist() == [30, 30, 30, 10, 10]
    assert split.train.sizes.tolist() == [3, 2]
    assert split.test.images.shape == (1, 2, 2, 1)
    assert split.validation.images.shape == (0, 2, 2, 1)
    assert split.validation.sizes.shape == (0,)

  def test_names_that_are_not_as_many(self):
    with pytest.raises(ValueError, match=saying('3 classes', 'names', 'got 2')):
      split_bank(self.bank(), ['a', 'b'], ClassNames(('a',), (), ('b',)))


class TestReadList:
  def test_blank_lines_and_comments(self, tmp_path):
    (tmp_path / 'list').write_bytes('\ufeff# of today\nchat à moustache\r\n\n  cat \n#dog\n'.encode())
    assert read_list(tmp_path / 'list') == ('chat à moustache', 'cat')

  def test_no_file(self, tmp_path):
    with pytest.raises(DatasetError, match=saying('nowhere', 'cannot be read', 'No such file')):
      read_list(tmp_path / 'nowhere')

  def test_not_text(self, tmp_path):
    (tmp_path / 'list').write_bytes(b'\xff\xfe\xff')
    with pytest.raises(DatasetError, match=saying(tmp_path / 'list', 'UTF-8', 'one class name per line')):
      read_list(tmp_path / 'list')


class TestPublished:
  @pytest.mark.parametrize('dataset', ['mini_imagenet', 'cifar_fs'])
  def test_64_16_20_classes_apart(self, dataset):
    split = published_split(dataset)
    assert [len(part) for part in split] == [64, 16, 20]
    assert len(set(sum(split, ()))) == 100

  def test_are_those_of_the_papers(self, shared_data):
    for dataset, folder in (('mini_imagenet', 'mini_imagenet_ravi'), ('cifar_fs', 'cifar_fs')):
      for part, stem in zip(published_split(dataset), ('train', 'val', 'test'), strict=True):
        assert list(part) == (shared_data / 'splits' / folder / f'{stem}.txt').read_text().split()

  def test_another_data_set(self):
    with pytest.raises(ValueError, match="got 'imagenet'"):
      published_split('imagenet')
