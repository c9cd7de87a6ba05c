"""CUDA kernels of attention on the host: the cache gets the bits that the CPU writes, outputs are the reference's."""

from __future__ import annotations

import numpy as np
import pytest
from attention_seat import KIND, ON_DEVICE, Seat, Shape, some_qkv
from cuda_sources import Kernels, kernels_of

from moss_jt.cache import KVType
from moss_jt.kernels import reference

LOST = {"float32": 3e-6, "float16": 2e-3, "int8": 2e-2}


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    return kernels_of("attention", tmp_path_factory.mktemp("cuda"))


@pytest.mark.parametrize("kind", list(KIND))
@pytest.mark.parametrize("shape", [Shape(4, 16, 8), Shape(8, 33, 6), Shape(4, 256, 64), Shape(4, 40, 40)], ids=str)
def test_attention(kernels: Kernels, shape: Shape, kind: KVType) -> None:
    seat = Seat(kernels, kind, shape, 48)
    qkv = some_qkv(seat, 40)
    found = np.concatenate([seat.feed(qkv[:1], 1, 0), seat.feed(qkv[1:36], 1, 1), seat.feed(qkv[36:], 1, 36)])
    positions = np.arange(40)
    want = reference.attention(qkv, shape.heads, shape.rotary, np.zeros(40), positions).reshape(found.shape)
    assert np.abs(found - want).max() < LOST[kind] * np.abs(want).max()
    assert ON_DEVICE or np.array_equal(seat.cache.memory, seat.other.memory), "both wrote the same bytes"
    keys, values = seat.cache.read(1, 1)
    queries = reference.rotate(reference.split_qkv(qkv, shape.heads)[0], positions, shape.rotary)
    kept = reference.attend(queries, keys, values, positions)
    assert np.abs(found - kept).max() < 3e-6 * np.abs(kept).max(), "of what the cache holds, only rounding is lost"


@pytest.mark.parametrize("kind", list(KIND))
def test_many_stretches_and_strangers_in_the_batch(kernels: Kernels, kind: KVType) -> None:
    """Positions around the ends of stretches; tokens of other slots change no bit."""
    seat = Seat(kernels, kind, Shape(4, 64, 16), 600)
    rng = np.random.default_rng(3)
    lengths = {0: 520, 2: 255}
    for slot, length in lengths.items():
        seat.cache.reserve(slot, length + 3)
        rows = seat.cache.rows(1)
        for block in seat.cache.table[slot][: -(-(length + 3) // 32)]:
            numbers = rng.normal(size=(*rows[block].shape[:3], 64)).astype(np.float32)
            if kind == "int8":
                rows[block][..., :64] = rng.integers(-127, 128, numbers.shape, np.int8).view(np.uint8)
                rows[block][..., 64:] = np.full((*numbers.shape[:3], 2), 0x3C23, np.uint16).view(np.uint8)
            else:
                rows[block][...] = numbers.astype(kind).view(np.uint8)
        seat.cache.commit(slot, length)
    slots = np.array([0, 2, 0, 2, 0], np.int32)
    positions = np.array([520, 255, 521, 256, 511], np.int32)
    qkv = some_qkv(seat, 5)
    together = seat.attend(qkv, slots, positions)
    for i in (4, 0, 1, 2, 3):
        alone = seat.attend(qkv[i : i + 1], slots[i : i + 1], positions[i : i + 1])
        if i in {1, 3, 2}:
            assert np.array_equal(alone[0], together[i])
    seat.cache.commit(0, 2)
    keys, values = seat.cache.read(1, 0)
    queries = reference.rotate(reference.split_qkv(qkv, 4)[0], positions, 16)
    want = reference.attend(queries[2:3], keys, values, positions[2:3])
    assert np.abs(together[2] - want[0]).max() < 3e-6 * np.abs(want).max()


def test_what_is_not_a_number_reaches_its_token(kernels: Kernels) -> None:
    seat = Seat(kernels, "float16", Shape(4, 16, 8), 32)
    qkv = some_qkv(seat, 3)
    qkv[1, 0] = np.nan  # of the query
    found = seat.feed(qkv, 0, 0)
    assert np.isnan(found[1, 0]).all() and not np.isnan(found[[0, 2]]).any()
