"""KVCache: blocks handed out, counted and given back; no computing."""

from __future__ import annotations

import numpy as np
import pytest

from moss_jt.cache import BLOCK, KVCache
from moss_jt.config import MossConfig
from moss_jt.errors import DeviceMemoryError

CONFIG = MossConfig(vocab_size=32, n_positions=4 * BLOCK, n_embd=16, n_layer=2, n_head=4, rotary_dim=4)


def fill(cache: KVCache, slot: int, count: int, value: float) -> None:
    """Write tokens as a pass does: reserve, write through the table, commit."""
    start = cache.length(slot)
    cache.reserve(slot, count)
    for position in range(start, start + count):
        block = cache.table[slot, position // BLOCK]
        for layer in cache.layers:
            cache.keys[layer][block, :, position % BLOCK] = value + position
            cache.values[layer][block, :, position % BLOCK] = -value - position
    cache.commit(slot, count)


def check(cache: KVCache, slot: int, count: int, value: float) -> None:
    """The slot holds exactly what `fill` wrote."""
    keys, values = cache.read(1, slot)
    assert keys.shape == (4, count, 4)
    np.testing.assert_array_equal(keys[2, :, 3], value + np.arange(count))
    np.testing.assert_array_equal(values[0, :, 0], -value - np.arange(count))


def test_slots_do_not_mix() -> None:
    cache = KVCache(CONFIG, slots=3, tokens=6 * BLOCK)
    rng = np.random.default_rng(0)
    lengths = [0, 0, 0]
    for _ in range(200):
        slot = int(rng.integers(3))
        if rng.random() < 0.3:
            lengths[slot] = int(rng.integers(lengths[slot] + 1))
            cache.truncate(slot, lengths[slot])
        else:
            count = min(int(rng.integers(1, 20)), cache.room(slot))
            fill(cache, slot, count, 1000.0 * slot)
            lengths[slot] += count
        assert cache.used_tokens == sum(lengths)
        for other in range(3):
            check(cache, other, lengths[other], 1000.0 * other)


def test_full_cache_refuses_and_changes_nothing() -> None:
    cache = KVCache(CONFIG, slots=2, tokens=2 * BLOCK)
    fill(cache, 0, 2 * BLOCK, 5.0)
    room = cache.room(1)
    with pytest.raises(DeviceMemoryError, match=f"no room for {room + 1} more tokens after 0"):
        cache.reserve(1, room + 1)
    check(cache, 0, 2 * BLOCK, 5.0)
    cache.release(0)
    fill(cache, 1, 2 * BLOCK, 7.0)
    check(cache, 1, 2 * BLOCK, 7.0)


def test_a_sequence_ends_at_n_positions() -> None:
    cache = KVCache(CONFIG, slots=1, tokens=CONFIG.n_positions)
    fill(cache, 0, CONFIG.n_positions, 1.0)
    assert cache.room(0) == 0
    with pytest.raises(DeviceMemoryError, match="Shorten the prompt"):
        cache.reserve(0, 1)


def test_what_is_reserved_and_not_committed_does_not_exist() -> None:
    cache = KVCache(CONFIG, slots=1, tokens=CONFIG.n_positions)
    fill(cache, 0, 3, 1.0)
    cache.reserve(0, 2 * BLOCK)
    assert cache.length(0) == 3
    check(cache, 0, 3, 1.0)
    cache.truncate(0, 3)
    assert cache.room(0) == CONFIG.n_positions - 3


def test_dropping_blocks_one_by_one() -> None:
    cache = KVCache(CONFIG, slots=1, tokens=4 * BLOCK)
    fill(cache, 0, BLOCK + 3, 1.0)
    cache.reserve(0, BLOCK)  # the third block holds nothing yet
    lengths = [cache.length(0) for _ in range(3) if cache.drop_block(0)]
    assert lengths == [BLOCK + 3, BLOCK, 0]
    assert not cache.drop_block(0)
    assert cache.room(0) == 4 * BLOCK


def test_a_copy_lives_on_its_own() -> None:
    cache = KVCache(CONFIG, slots=2, tokens=8 * BLOCK)
    fill(cache, 0, BLOCK + 5, 1.0)
    cache.copy(0, 1)
    check(cache, 1, BLOCK + 5, 1.0)
    cache.truncate(0, 2)
    fill(cache, 0, 40, 9000.0)
    check(cache, 1, BLOCK + 5, 1.0)


def test_bytes_of_a_token() -> None:
    # 2 layers x (key + value) x 4 heads x 4 channels x 2 bytes
    assert KVCache(CONFIG, slots=1, tokens=8, kind="float16").token_bytes == 2 * 2 * 4 * 4 * 2
