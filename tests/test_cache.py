"""KVCache: blocks handed out, counted and given back, and the memory behind them; no computing."""

from __future__ import annotations

import mmap
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, get_args

import numpy as np
import pytest

from moss_jt.cache import BLOCK, KVCache, KVLayout, KVType
from moss_jt.config import MossConfig
from moss_jt.errors import DeviceMemoryError
from moss_jt.memory import HUGE_PAGE

CONFIG = MossConfig(vocab_size=32, n_positions=4 * BLOCK, n_embd=16, n_layer=2, n_head=4, rotary_dim=4)


def fill(cache: KVCache, slot: int, count: int, value: float) -> None:
    """Write tokens as a pass does: reserve, write through the table, commit."""
    start = cache.length(slot)
    cache.reserve(slot, count)
    for position in range(start, start + count):
        block = cache.table[slot, position // BLOCK]
        for layer in cache.layers:
            keys, values = (cache.rows(layer)[block, which, :, position % BLOCK].view(cache.kind) for which in (0, 1))
            keys[:], values[:] = value + position, -value - position
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


def test_a_copy_of_the_beginning_takes_no_more_blocks_than_it_needs() -> None:
    cache = KVCache(CONFIG, slots=2, tokens=8 * BLOCK)
    fill(cache, 0, 2 * BLOCK + 5, 1.0)
    cache.copy(0, 1, BLOCK + 2)
    check(cache, 1, BLOCK + 2, 1.0)
    assert cache.resident_bytes == 5 * cache.block_bytes


@pytest.mark.parametrize("kind", get_args(KVType))
def test_bytes_are_known_before_the_cache_is_made(kind: KVType) -> None:
    config = MossConfig(n_embd=6144, n_layer=34, n_head=24)
    layout = KVLayout.of(config, kind)
    per_head = {"float32": 256 * 4, "float16": 256 * 2, "int8": 256 + 256 // 32 * 2}[kind]
    assert layout.token_bytes == 34 * 2 * 24 * per_head
    assert layout.page_bytes == HUGE_PAGE
    assert 0 <= layout.block_bytes - BLOCK * layout.token_bytes < HUGE_PAGE
    assert layout.bytes_for(33) == 2 * layout.block_bytes
    assert KVLayout.of(config, kind, 17).token_bytes * 2 == layout.token_bytes
    cache, small = KVCache(CONFIG, slots=1, tokens=8, kind=kind), KVLayout.of(CONFIG, kind)
    assert (cache.block_bytes, cache.token_bytes) == (small.block_bytes, small.token_bytes)
    assert (small.block_bytes, cache.resident_bytes) == (
        mmap.PAGESIZE * -(-BLOCK * small.token_bytes // mmap.PAGESIZE),
        0,
    )


WIDE = MossConfig(vocab_size=32, n_positions=8 * BLOCK, n_embd=128, n_layer=6, n_head=4, rotary_dim=4)


def resident(cache: KVCache) -> int:
    """What the system says of the cache's addresses, in bytes."""
    begin = cache.memory.ctypes.data
    for entry in re.split(
        r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text("ascii"), flags=re.MULTILINE
    ):
        found = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", entry)
        if found and int(found.group(1), 16) <= begin < int(found.group(2), 16):
            assert int(found.group(2), 16) - begin >= cache.memory.nbytes, "the mapping is split"
            rss = re.search(r"^Rss:\s+(\d+) kB", entry, re.MULTILINE)
            assert rss is not None
            return int(rss.group(1)) << 10
    raise AssertionError("the cache is in no mapping")


def touch(cache: KVCache, slot: int, count: int) -> None:
    """Reserve, write every byte of the slot's blocks, commit."""
    cache.reserve(slot, count)
    cache.commit(slot, count)
    for block in cache.table[slot, : -(-cache.length(slot) // BLOCK)]:
        cache.memory[block] = 1 + slot


def test_memory_comes_and_goes_with_the_blocks() -> None:
    cache = KVCache(WIDE, slots=3, tokens=24 * BLOCK)
    asked: list[int] = []
    given: list[int] = []
    cache.on_take, cache.on_give = asked.append, given.append
    one = cache.block_bytes
    assert resident(cache) == cache.resident_bytes == 0
    touch(cache, 0, 3 * BLOCK)
    touch(cache, 1, BLOCK + 1)
    assert asked == [3 * one, 2 * one]
    assert resident(cache) == cache.resident_bytes == 5 * one
    cache.release(0)
    assert resident(cache) == cache.resident_bytes == 5 * one, "free blocks stay until trim"
    touch(cache, 2, 2 * BLOCK)
    assert asked[2:] == [], "free blocks that are in memory come first"
    assert cache.trim(keep=one) == 0
    assert cache.trim() == one
    assert given == [one]
    assert resident(cache) == cache.resident_bytes == 4 * one
    assert not cache.memory[2].any(), "what was given back is zeros"
    cache.release(1)
    cache.release(2)
    assert cache.trim() == 4 * one
    assert resident(cache) == cache.resident_bytes == 0
    assert cache.trim() == 0
    assert sum(asked) == sum(given) == 5 * one


def test_a_chat_that_regrows_asks_for_nothing() -> None:
    cache = KVCache(WIDE, slots=1, tokens=8 * BLOCK)
    touch(cache, 0, 4 * BLOCK)
    asked: list[int] = []
    cache.on_take = asked.append
    for length in (BLOCK + 3, 5, 0):
        cache.truncate(0, length)
        touch(cache, 0, 4 * BLOCK - length)
    assert not asked


def test_refused_memory_changes_nothing() -> None:
    cache = KVCache(WIDE, slots=2, tokens=16 * BLOCK)
    touch(cache, 0, BLOCK)

    def refuse(count: int) -> None:
        raise DeviceMemoryError(f"{count} bytes are too much")

    cache.on_take = refuse
    table = cache.table.copy()
    assert cache.missing_bytes(0, BLOCK + 1) == 2 * cache.block_bytes
    acts: list[Callable[[], None]] = [lambda: cache.reserve(0, BLOCK + 1), lambda: cache.copy(0, 1)]
    for act in acts:
        with pytest.raises(DeviceMemoryError, match="are too much"):
            act()
        assert (cache.length(0), cache.length(1), cache.resident_bytes) == (BLOCK, 0, cache.block_bytes)
        np.testing.assert_array_equal(cache.table, table)
    cache.on_take = None
    touch(cache, 0, BLOCK + 1)


def test_huge_pages_stay_within_their_blocks() -> None:
    """Whether the system gives huge pages or not, what is resident is at most what was counted."""
    config = MossConfig(vocab_size=32, n_positions=8 * BLOCK, n_embd=1024, n_layer=31, n_head=4, rotary_dim=4)
    cache = KVCache(config, slots=1, tokens=8 * BLOCK, kind="float16")
    assert cache.layout.page_bytes == HUGE_PAGE
    assert cache.memory.ctypes.data % HUGE_PAGE == 0
    used = BLOCK * cache.token_bytes
    for count in (1, 2):
        cache.reserve(0, count * BLOCK)
        cache.memory[count - 1, :used] = 1
        assert count * used <= resident(cache) <= cache.resident_bytes == count * cache.block_bytes
    cache.drop_block(0)
    cache.trim()
    assert used <= resident(cache) <= cache.resident_bytes == cache.block_bytes


def test_reserving_alone_touches_nothing() -> None:
    cache = KVCache(WIDE, slots=1, tokens=8 * BLOCK)
    cache.reserve(0, 8 * BLOCK)
    assert resident(cache) == 0
    assert cache.resident_bytes == 8 * cache.block_bytes


def test_addresses_that_do_not_exist_are_an_error() -> None:
    with pytest.raises(DeviceMemoryError, match="Ask for a shorter context"):
        KVCache(MossConfig(n_positions=1 << 30, n_embd=1 << 15, n_layer=1 << 9), slots=1, tokens=1 << 30)


@contextmanager
def struck_at(line: int) -> Iterator[None]:
    """KeyboardInterrupt at the n-th line that the cache executes, once."""
    left = line

    def trace(frame: FrameType, _event: str, _value: object) -> Any:
        return count if frame.f_code.co_filename.endswith("moss_jt/cache.py") else None

    def count(_frame: FrameType, event: str, _value: object) -> Any:
        nonlocal left
        left -= event == "line"
        if left == 0:
            raise KeyboardInterrupt
        return count

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def test_interrupts_lose_and_double_nothing() -> None:
    """Wherever one strikes, no block has two owners, all are there for the next, and memory is at most what is counted."""
    struck = 0
    for line in range(1, 400):
        cache = KVCache(WIDE, slots=2, tokens=8 * BLOCK)
        touch(cache, 0, BLOCK)
        try:
            with struck_at(line):
                cache.reserve(1, 2 * BLOCK)
                cache.commit(1, 2 * BLOCK)
                cache.truncate(1, BLOCK)
                cache.trim()
                cache.drop_block(1)
                cache.copy(0, 1)
                cache.release(0)
                cache.trim()
        except KeyboardInterrupt:
            struck += 1
        else:
            break
        assert resident(cache) <= cache.resident_bytes
        for slot in (0, 1):
            cache.truncate(slot, cache.length(slot))
        lengths = [cache.length(slot) for slot in (0, 1)]
        owned = [set(cache.table[slot, : -(-lengths[slot] // BLOCK)].tolist()) for slot in (0, 1)]
        assert not owned[0] & owned[1]
        for slot in (0, 1):
            cache.release(slot)
        assert [cache.room(slot) for slot in (0, 1)] == [8 * BLOCK, 8 * BLOCK]
        cache.trim()
        assert resident(cache) == cache.resident_bytes == 0
    assert 30 < struck < 399
