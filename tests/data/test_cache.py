"""Images kept in memory, and shared with forked processes."""

import multiprocessing
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from reid_dist.data import cache as cache_module
from reid_dist.data.cache import ImageCache, Images
from reid_dist.data.reader import ShardSet
from reid_dist.errors import UserError

Build = Callable[..., Path]
SIZE = (16, 8)


def _decode_nothing(*_: object) -> None:
    raise AssertionError("decoded again")


def test_cached_images_equal_decoded_ones_and_are_decoded_once(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    shards, cache = ShardSet(build()), ImageCache()
    decoded = [Images(shards, SIZE)(row) for row in range(4)]
    cached = Images(shards, SIZE, cache)
    assert cached.cached and all(np.array_equal(cached(row), decoded[row]) for row in range(4))
    monkeypatch.setattr(cache_module, "decode_image", _decode_nothing)
    again = Images(ShardSet(shards.path), SIZE, cache)  # as another stage opens it
    assert all(np.array_equal(again(row), decoded[row]) for row in range(4))
    with pytest.raises(AssertionError):
        Images(shards, (8, 8), cache)(0)  # another size is another image


def test_sets_above_the_limit_are_not_kept(build: Build) -> None:
    shards, cache = ShardSet(build()), ImageCache(max_bytes=22 * (16 * 8 * 3 + 1))
    assert Images(shards, SIZE, cache).cached
    other = Images(shards, (8, 8), cache)
    assert not other.cached and other(0).shape == (8, 8, 3)


def _first_pixel(images: Images) -> None:
    images(5)


def test_forked_workers_fill_the_same_memory(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    images = Images(ShardSet(build()), SIZE, ImageCache())
    process = multiprocessing.get_context("fork").Process(target=_first_pixel, args=(images,))
    process.start()
    process.join()
    monkeypatch.setattr(cache_module, "decode_image", _decode_nothing)
    assert images(5).any()


def test_pickles_carry_no_images(build: Build) -> None:
    cache = ImageCache()
    images = Images(ShardSet(build()), SIZE, cache)
    images(0)
    copy = pickle.loads(pickle.dumps(images))
    assert not copy.cached and np.array_equal(copy(0), images(0))
    assert pickle.loads(pickle.dumps(cache)).bytes == 0


def test_a_bad_image_is_named(build: Build) -> None:
    images = Images(ShardSet(build(spoil=7)), SIZE, ImageCache())
    with pytest.raises(UserError, match=r"tiny \(tiny\), shard tiny-00000\d\.tar, sample s007: the image does not"):
        images(7)
