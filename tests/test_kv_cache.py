"""The cache of keys and values: growing keeps them, truncating forgets them, and a full context is said in time."""

import numpy as np
import pytest

from runtime.bundle import CacheLayout
from runtime.errors import PromptError
from runtime.kv_cache import KVCache

LAYOUT = CacheLayout(layers=2, kv_heads=2, head_dim=4, dtype="float32", max_positions=50)


def filled(count: int, capacity: int = 8) -> KVCache:
    cache, rng = KVCache(LAYOUT, capacity), np.random.default_rng(0)
    cache.reserve(count)
    for buffer in cache.buffers.values():
        buffer[:, :, :count] = rng.standard_normal(buffer[:, :, :count].shape)
    cache.append(count)
    return cache


def test_growing_keeps_what_was_read() -> None:
    cache = filled(8)
    before = {name: buffer[:, :, :8].copy() for name, buffer in cache.buffers.items()}
    assert cache.reserve(10)
    assert cache.capacity >= 18
    for name, buffer in cache.buffers.items():
        np.testing.assert_array_equal(buffer[:, :, :8], before[name])


def test_buffers_stay_where_they_are_while_there_is_room() -> None:
    cache = filled(3)
    assert not cache.reserve(5)


def test_capacity_never_exceeds_the_context() -> None:
    cache = filled(40)
    cache.reserve(10)
    assert cache.capacity == LAYOUT.max_positions
    assert cache.room == 10


def test_one_position_too_many_is_refused_with_the_numbers() -> None:
    cache = filled(45)
    with pytest.raises(PromptError, match=r"51 positions \(45 used, 6 more\).*50"):
        cache.reserve(6)
    assert cache.length == 45


def test_truncating_only_goes_back() -> None:
    cache = filled(5)
    cache.truncate(2)
    assert cache.length == 2
    with pytest.raises(ValueError, match="cannot truncate"):
        cache.truncate(3)


def test_a_copy_holds_the_same_positions_and_is_its_own() -> None:
    cache, copy = filled(12), KVCache(LAYOUT, 4)
    copy.copy_from(cache)
    assert copy.length == 12
    np.testing.assert_array_equal(copy.buffers["1.key"][:, :, :12], cache.buffers["1.key"][:, :, :12])
    cache.buffers["1.key"][:] = 0
    assert copy.buffers["1.key"][:, :, :12].any()


def test_bytes_of_a_position_count_keys_and_values_of_every_layer() -> None:
    cache = KVCache(LAYOUT, capacity=10)
    assert sum(buffer.nbytes for buffer in cache.buffers.values()) == 10 * LAYOUT.bytes_per_position
