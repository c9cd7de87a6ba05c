"""CUDA kernels of attention for fast compute, on the host: near the reference, and a token's bits are its own alone."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from attention_seat import Array, Seat, Shape, some_qkv
from cuda_sources import Kernels, kernels_of

from moss_jt.cache import KVType
from moss_jt.kernels import reference

KINDS: list[KVType] = ["float16", "int8"]
LOST = 1e-3  # of the largest output: queries and weights have eleven bits


class Both(NamedTuple):
    """Who writes the cache and adds up, and who attends."""

    plain: Kernels
    rounded: Kernels

    def seat(self, kind: KVType, shape: Shape, positions: int, *, most: int = 32) -> Seat:
        seat = Seat(self.plain, kind, shape, positions, rounded=self.rounded, most=most)
        for slot in range(3):  # what lies where nothing was written yet is not a number
            seat.cache.reserve(slot, positions)
        seat.cache.memory[:] = 0xFF
        return seat


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Both:
    folder: Path = tmp_path_factory.mktemp("cuda")
    return Both(kernels_of("attention", folder), kernels_of("attention_rounded", folder))


def expected(seat: Seat, qkv: Array, slot: int) -> Array:
    """From what the cache holds of a slot, whose last tokens these are: (T, H, D)."""
    keys, values = seat.cache.read(1, slot)
    positions = np.arange(keys.shape[1] - len(qkv), keys.shape[1])
    queries = reference.rotate(reference.split_qkv(qkv, seat.shape.heads)[0], positions, seat.shape.rotary)
    return reference.attend(queries, keys, values, positions)


SHAPES: list[tuple[KVType, Shape]] = [
    ("float16", Shape(4, 8, 8)),
    ("float16", Shape(4, 40, 16)),
    ("float16", Shape(4, 256, 64)),
    ("int8", Shape(4, 40, 16)),
    ("int8", Shape(4, 64, 16)),
    ("int8", Shape(4, 256, 64)),
]


@pytest.mark.parametrize("most", [8, 32])
@pytest.mark.parametrize(("kind", "shape"), SHAPES, ids=str)
def test_of_what_the_cache_holds_only_rounding_is_lost(both: Both, kind: KVType, shape: Shape, most: int) -> None:
    """Passes of 1, 3 and 37 tokens: tiles that are not full, and one that begins in the middle of a block."""
    seat = both.seat(kind, shape, 48, most=most)
    qkv = some_qkv(seat, 41)
    for first, end in ((0, 1), (1, 4), (4, 41)):
        found = seat.feed(qkv[first:end], 1, first)
        want = expected(seat, qkv[first:end], 1)
        off = np.abs(found - want)
        assert off.max() < LOST * np.abs(want).max(), f"{off.max()} at {np.unravel_index(off.argmax(), off.shape)}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [127, 129, 300])
def test_prompts(both: Both, kind: KVType, tokens: int) -> None:
    """Over the end of a stretch, too."""
    seat = both.seat(kind, Shape(4, 64, 16), 320)
    qkv = some_qkv(seat, tokens)
    found, want = seat.feed(qkv[:60], 0, 0), expected(seat, qkv[:60], 0)
    assert np.abs(found - want).max() < LOST * np.abs(want).max()
    for first in range(60, tokens, 64):
        found = seat.feed(qkv[first : first + 64], 0, first)
        want = expected(seat, qkv[first : first + 64], 0)
        assert np.abs(found - want).max() < LOST * np.abs(want).max()


@pytest.mark.parametrize("kind", KINDS)
def test_bits_do_not_depend_on_tiles_cuts_and_company(both: Both, kind: KVType) -> None:
    """One sequence around the end of a stretch: whole, in other passes, in tiles of 8, one by one, among strangers."""
    shape, first, count = Shape(4, 64, 16), 240, 45
    seat = both.seat(kind, shape, 320)
    qkv = some_qkv(seat, first + count)
    qkv.reshape(-1, 4, 3, 64)[first + 7 :, :, 1] *= 1e3  # what comes later has far larger values
    for start in range(0, first, 60):
        seat.feed(qkv[start : start + 60], 0, start)
    new, positions = qkv[first:], np.arange(first, first + count, dtype=np.int32)
    slots = np.zeros(count, np.int32)
    whole = seat.attend(new, slots, positions)
    want = seat.feed(new, 0, first)
    assert np.array_equal(whole, want)
    off = np.abs(whole - expected(seat, new, 0)).max(axis=(1, 2))
    assert (off < LOST * np.abs(whole).max(axis=(1, 2))).all()
    for most, cuts in ((32, (0, 5, 21, 45)), (8, (0, 45)), (8, (0, 1, 2, 9, 15, 16, 17, 45))):
        other = both.seat(kind, shape, 320, most=most)
        other.cache.memory[:] = seat.cache.memory
        for one, next_one in itertools.pairwise(cuts):
            part = slice(one, next_one)
            assert np.array_equal(other.attend(new[part], slots[part], positions[part]), whole[part]), (most, part)
    strangers = np.concatenate([some_qkv(seat, 3, seed=1), new[:11], some_qkv(seat, 1, seed=2), new[11:]])
    owners = np.repeat(np.array([1, 0, 2, 0], np.int32), [3, 11, 1, count - 11])
    where = np.concatenate([np.arange(3), positions[:11], [0], positions[11:]]).astype(np.int32)
    assert np.array_equal(seat.attend(strangers, owners, where)[owners == 0], whole)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", ["query", "key", "value"])
def test_what_is_not_a_number_reaches_those_who_look_at_it(both: Both, kind: KVType, part: str) -> None:
    seat = both.seat(kind, Shape(4, 64, 16), 64)
    qkv = some_qkv(seat, 20)
    sliced = qkv.reshape(20, 4, 3, 64)  # four heads in four slices: query, value, key of each
    sliced[9, 0, ["query", "value", "key"].index(part), 20] = np.nan
    found = np.isnan(seat.feed(qkv, 0, 0))
    assert not found[:, 1:].any() and not found[:9].any(), "other heads, and tokens before it"
    if part == "query":
        assert found[9, 0].all() and not found[10:].any()
    elif part == "key":
        assert found[9:, 0].all()
    else:
        assert found[9:, 0, 20].all()
        assert kind == "int8" or not found[9:, 0, :20].any(), "other channels"
    later = seat.feed(some_qkv(seat, 1, seed=4), 0, 20)
    assert np.isnan(later[0, 0]).any() == (part != "query")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1e-30, 1e-3, 1e5])
def test_queries_of_any_size(both: Both, kind: KVType, size: float) -> None:
    """What a half could not hold; scores as large as usual, since keys are as small as queries are large."""
    seat = both.seat(kind, Shape(4, 64, 16), 64)
    qkv = some_qkv(seat, 20)
    sliced = qkv.reshape(20, 4, 3, 64)
    sliced[:, :, 0] *= size
    sliced[:, :, 2] *= max(1e-5, min(1e3, 1 / size))
    found, want = seat.feed(qkv, 0, 0), expected(seat, qkv, 0)
    assert np.abs(found - want).max() < 2 * LOST * np.abs(want).max()


@pytest.mark.parametrize("size", [1e-30, 1e-6, 1e6, 1e30])
def test_int8_values_of_any_size(both: Both, size: float) -> None:
    """Each head and run of 32 channels has steps of its own, and the kernel's powers of two follow them."""
    seat = both.seat("int8", Shape(4, 64, 16), 64)
    qkv = some_qkv(seat, 20)
    qkv.reshape(20, 4, 3, 64)[:, :, 1, 32:] *= np.float32(size)
    found, want = seat.feed(qkv, 0, 0), expected(seat, qkv, 0)
    for run in (slice(0, 32), slice(32, 64)):
        assert np.abs(found - want)[..., run].max() < LOST * np.abs(want[..., run]).max()
