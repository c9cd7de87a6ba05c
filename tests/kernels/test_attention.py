"""Attention over the cache (ordered, kv_store, kv_store_x86, attention) against numpy, and its promise of equal bits.

Every output is compared with what numpy makes of the keys and values that the cache gives back, so the
tolerance is that of float32 sums for every kind; what a kind loses is tested on its own.
"""

from __future__ import annotations

import ctypes
import itertools
import shlex
import subprocess
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import pytest

from moss_jt import kernels
from moss_jt.batch import Batch
from moss_jt.cache import BLOCK, KVCache, KVType
from moss_jt.config import MossConfig
from moss_jt.kernels import reference
from moss_jt.kv_layout import STEP_CHANNELS
from moss_jt.ops import InferenceOps
from moss_jt.weights import WeightStore

Array = npt.NDArray[Any]
KINDS: tuple[KVType, ...] = get_args(KVType)
STRETCH = 256  # positions, of the kernel
TOLERANCE = 5e-6  # of sums of float32 that nearly cancel, relative to the largest output


class Seat:
    """A cache of three slots and the ops over it."""

    def __init__(
        self,
        kind: KVType,
        *,
        heads: int = 4,
        width: int = 64,
        rotary: int = 2,
        positions: int = 300,
        capacity: int = 160,
    ) -> None:
        self.config = MossConfig(
            vocab_size=8, n_positions=positions, n_embd=heads * width, n_layer=2, n_head=heads, rotary_dim=rotary
        )
        self.cache = KVCache(self.config, slots=3, tokens=3 * positions, kind=kind)
        self.ops = InferenceOps(self.config, WeightStore(), self.cache, capacity=capacity)

    def feed(self, qkv: Array, sizes: Iterable[int], slot: int = 0, layer: int = 1) -> Array:
        """Merged heads (T, C) of tokens appended to a slot in passes of these sizes, the last one repeated."""
        parts: list[Array] = [np.zeros((0, self.config.n_embd), np.float32)]
        start = 0
        for size in itertools.chain(sizes, itertools.repeat(self.ops.capacity)):
            if start == len(qkv):
                return np.concatenate(parts)
            count = min(size, len(qkv) - start)
            first = self.cache.length(slot)
            self.cache.reserve(slot, count)
            parts.append(self.attend(qkv[start : start + count], [slot] * count, range(first, first + count), layer))
            self.cache.commit(slot, count)
            start += count
        raise AssertionError("sizes end nowhere")

    def attend(self, qkv: Array, slots: Iterable[int], positions: Iterable[int], layer: int = 1) -> Array:
        """One pass over tokens whose room is reserved."""
        rows, places = (np.array(list(values), np.int32) for values in (slots, positions))
        self.ops.begin(Batch(np.zeros(len(qkv), np.int32), rows, places, rows[:1]))
        buffer = self.ops.buffers["qkv"]
        buffer.array[: len(qkv)] = qkv
        return self.ops.values(self.ops.attention(buffer, layer))


def near(got: Array, want: Array, tolerance: float = TOLERANCE) -> None:
    difference = np.abs(got - want)
    limit = tolerance * np.abs(want).max()
    where = np.unravel_index(difference.argmax(), difference.shape)
    assert difference.max() <= limit, f"off by {difference.max():.2e} at {where}, allowed {limit:.2e}"


def random_qkv(tokens: int, config: MossConfig, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=(tokens, 3 * config.n_embd)).astype(np.float32)


def expected(seat: Seat, qkv: Array, slot: int, positions: Array) -> Array:
    """What numpy makes of the rows of qkv at their positions, with the keys and values of the cache."""
    query, _, _ = reference.split_qkv(qkv, seat.config.n_head)
    query = reference.rotate(query, positions, seat.config.rotary_dim)
    return reference.attend(query, *seat.cache.read(1, slot), positions).reshape(len(qkv), -1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("heads", "width", "rotary"), [(4, 2, 2), (8, 16, 8), (4, 20, 20), (12, 6, 4), (4, 136, 64)])
def test_mixed_sequences(jittor: ModuleType, kind: KVType, heads: int, width: int, rotary: int) -> None:
    """Three sequences of different length, each fed in two passes, blocks interleaved in the cache."""
    seat = Seat(kind, heads=heads, width=width, rotary=rotary)
    lengths = (1, BLOCK + 3, 2 * BLOCK + 1)
    slots = np.repeat(np.arange(3), lengths)
    positions = np.concatenate([np.arange(n) for n in lengths])
    qkv = random_qkv(sum(lengths), seat.config)
    got = np.zeros((sum(lengths), heads * width), np.float32)
    for first in (True, False):
        here = np.flatnonzero((positions < 20) == first)
        counts = [int((slots[here] == slot).sum()) for slot in range(3)]
        for slot in range(3):
            seat.cache.reserve(slot, counts[slot])
        got[here] = seat.attend(qkv[here], slots[here], positions[here])
        for slot in range(3):
            seat.cache.commit(slot, counts[slot])
    for slot in range(3):
        own = slots == slot
        near(got[own], expected(seat, qkv[own], slot, positions[own]))
    if kind == "float32":
        near(got, reference.attention(qkv, heads, rotary, slots, positions), 1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("heads", "width"), [(4, 16), (4, 256), (8, 72)])
@pytest.mark.parametrize("context", [1, 31, 32, 33, STRETCH - 1, STRETCH, STRETCH + 1, 2047, 2048])
def test_contexts(jittor: ModuleType, kind: KVType, heads: int, width: int, context: int) -> None:
    """The last token of a context by itself, after the ones before it."""
    seat = Seat(kind, heads=heads, width=width, rotary=16, positions=2048)
    qkv = random_qkv(context, seat.config, context)
    seat.feed(qkv[:-1], [])
    got = seat.feed(qkv[-1:], [])
    near(got, expected(seat, qkv[-1:], 0, np.array([context - 1])))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [20, 64, 256])
def test_chunks_give_the_same_bits(jittor: ModuleType, kind: KVType, width: int) -> None:
    """However a sequence is cut into passes, and whatever else is in them."""
    seat = Seat(kind, width=width, positions=700)
    qkv = random_qkv(2 * STRETCH + 40, seat.config)
    whole = seat.feed(qkv, [])
    for sizes in ([1] * 300 + [2, 3, 5, 33, 31], [160, 1, 159, 4, 160], [7] * 90):
        seat.cache.release(0)
        np.testing.assert_array_equal(seat.feed(qkv, sizes), whole)
    seat.cache.release(0)
    seat.feed(qkv[:-5], [])
    seat.feed(random_qkv(40, seat.config, 5), [], slot=1)
    for slot, count in ((0, 5), (1, 3)):
        seat.cache.reserve(slot, count)
    start = len(qkv) - 5
    others = random_qkv(3, seat.config, 6)
    rows = np.concatenate([others[:1], qkv[start:], others[1:]])
    got = seat.attend(rows, [1] + [0] * 5 + [1] * 2, [40, *range(start, start + 5), 41, 42])
    np.testing.assert_array_equal(got[1:6], whole[start:])


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_there_before_does_not_matter(jittor: ModuleType, kind: KVType) -> None:
    """Rows after a sequence's end hold what another left there; here, bytes that are NaN in every kind."""
    seat = Seat(kind, width=32)
    qkv = random_qkv(STRETCH + 5, seat.config)
    clean = seat.feed(qkv, [1] * 40)
    seat.cache.release(0)
    seat.cache.memory[:] = 0xFF
    np.testing.assert_array_equal(seat.feed(qkv, [1] * 40), clean)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("part", "bad"), [(0, np.nan), (0, np.inf), (1, np.nan), (1, -np.inf), (2, np.nan)])
def test_what_is_no_number_shows(jittor: ModuleType, kind: KVType, part: int, bad: float) -> None:
    """In a query, value or key of the first head it reaches every output that it belongs to, and no other."""
    seat = Seat(kind, width=32)
    qkv = random_qkv(60, seat.config)
    clean = seat.feed(qkv, [])
    seat.cache.release(0)
    qkv[40, part * 32 + 3] = bad  # of the first slice: query, value, key of the first head
    got = seat.feed(qkv, [])
    hit = got[40:41, :32] if part == 0 else got[40:, :32]
    assert not np.isfinite(hit).all(axis=1).any()
    np.testing.assert_array_equal(got[:40], clean[:40])
    np.testing.assert_array_equal(got[:, 32:], clean[:, 32:])


def test_scores_of_minus_infinity_have_no_weight(jittor: ModuleType) -> None:
    """A whole stretch of them, too."""
    seat = Seat("float32", width=8, rotary=2)
    qkv = random_qkv(STRETCH + 9, seat.config)
    query, value, key = (slice(part * 8, part * 8 + 8) for part in range(3))
    qkv[:, query] = qkv[:, key] = 0
    qkv[:, 7] = 1
    qkv[: STRETCH + 3, 2 * 8 + 7] = -np.inf
    got = seat.feed(qkv, [])[-1, :8]
    near(got, qkv[STRETCH + 3 :, value].mean(axis=0))


def test_large_scores_do_not_overflow(jittor: ModuleType) -> None:
    seat = Seat("float32", width=16)
    qkv = random_qkv(300, seat.config) * np.float32(60)
    got = seat.feed(qkv, [])
    near(got, expected(seat, qkv, 0, np.arange(300)), 2e-4)  # scores of some thousands, to seven digits


@pytest.mark.parametrize("width", [6, 32, 136])
def test_kinds_keep_what_numpy_says(jittor: ModuleType, width: int) -> None:
    """To the bit: halves from subnormal to infinite, codes with the step of their group."""
    for kind in KINDS:
        seat = Seat(kind, width=width)
        qkv = random_qkv(50, seat.config)
        qkv *= np.float32(10.0) ** np.random.default_rng(1).integers(-9, 5, (50, 1))
        qkv[7] = 0
        seat.feed(qkv, [])
        _, key, value = reference.split_qkv(qkv, 4)
        keys, values = (x.transpose(1, 0, 2) for x in seat.cache.read(1, 0))
        with np.errstate(over="ignore"):
            want = (
                reference.store_int8(value, STEP_CHANNELS) if kind == "int8" else value.astype(kind).astype(np.float32)
            )
        np.testing.assert_array_equal(values, want)
        lost = {"float32": 1e-6, "float16": 6e-4, "int8": 5e-3}[kind]
        rotated = reference.rotate(key, np.arange(50), 2)
        small = np.abs(rotated) < 6e4  # larger ones are infinite halves
        near(np.where(small, keys, 0), np.where(small, rotated, 0), lost)


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_goes_on_alike(jittor: ModuleType, kind: KVType) -> None:
    seat = Seat(kind, width=40)
    qkv = random_qkv(3 * BLOCK, seat.config)
    whole = seat.feed(qkv, [])
    seat.cache.copy(0, 2)
    for mine, other in zip(seat.cache.read(1, 2), seat.cache.read(1, 0), strict=True):
        np.testing.assert_array_equal(mine, other)
    seat.cache.truncate(2, BLOCK + 3)
    seat.cache.release(0)
    seat.feed(random_qkv(2 * BLOCK, seat.config, 9), [])
    np.testing.assert_array_equal(seat.feed(qkv[BLOCK + 3 :], [5], slot=2), whole[BLOCK + 3 :])


DRIVER = """
#include "attention.h"
extern "C" void run(const int64_t* numbers, int64_t threads, const float* qkv, const float* sincos, const int32_t* slots,
                    const int32_t* positions, const int32_t* table, float* queries, uint8_t* cache, float* out, float* shared) {
    moss::AttentionShape s;
    static_assert(sizeof s == 15 * sizeof *numbers, "a number is missing");
    std::memcpy(&s, numbers, sizeof s);
    omp_set_num_threads(threads);
    moss::rotate_and_append(s, qkv, sincos, slots, positions, table, queries, cache);
    moss::attend(s, queries, cache, slots, positions, table, out, shared);
}
MOSS_ORDERED
extern "C" void exponentials(const float* x, float* y, int64_t count) {
    for (int64_t i = 0; i < count; i += 8) moss::store8(y + i, moss::exp8(moss::load8(x + i)));
}
MOSS_ORDERED_END
"""
BUILDS = {
    "native": "-O3 -march=native -fassociative-math -fno-signed-zeros -freciprocal-math -fno-trapping-math -fno-math-errno",
    "oldest": "-O1",
}
Driver = Callable[..., Array]


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, ctypes.CDLL]]:
    """The header by itself, with the options that Jittor has it compiled with, and for the oldest processor."""
    from moss_jt.startup import import_jittor

    folder = tmp_path_factory.mktemp("attention")
    (folder / "driver.cpp").write_text(DRIVER, "utf-8")
    headers = Path(str(kernels.__file__)).parent / "cpu"
    compiler = str(import_jittor(device="cpu").flags.cc_path)
    common = f"-std=c++14 -Wall -Wno-psabi -fopenmp -shared -fPIC -iquote {headers} {folder / 'driver.cpp'}"
    running = {
        name: subprocess.Popen([compiler, *shlex.split(f"{options} {common} -o {folder / name}.so")])
        for name, options in BUILDS.items()
    }
    assert [process.wait() for process in running.values()] == [0] * len(running)
    yield {name: ctypes.CDLL(str(folder / f"{name}.so")) for name in running}


def drive(library: ctypes.CDLL, seat: Seat, batch: tuple[Array, Array, Array], *, threads: int, plain: bool) -> Array:
    """One pass outside Jittor; the scratch is large enough for every split."""
    qkv, slots, positions = batch
    kv, config, layer = seat.cache.layout, seat.config, seat.cache.layout.layer_bytes
    shared = np.zeros(len(qkv) * config.n_head * 9 * (config.head_dim + 10), np.float32)
    numbers = np.array(
        [
            *(len(qkv), kv.heads, kv.width, config.rotary_dim, BLOCK, seat.cache.table.shape[1]),
            *(kv.block_bytes, kv.row_bytes, layer, layer + layer // 2),
            *(KINDS.index(kv.kind), kv.steps, STEP_CHANNELS, shared.size, plain),
        ],
        np.int64,
    )
    out, queries = (np.zeros((len(qkv), config.n_embd), np.float32) for _ in range(2))
    arrays = [qkv, seat.ops.sincos.array, slots, positions, seat.cache.table, queries, seat.cache.memory, out, shared]
    pointers = [ctypes.c_void_p(array.ctypes.data) for array in arrays]
    library.run(ctypes.c_void_p(numbers.ctypes.data), ctypes.c_int64(threads), *pointers)
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [18, 64, 96])
def test_threads_and_processors_give_the_same_bits(builds: dict[str, ctypes.CDLL], kind: KVType, width: int) -> None:
    """Alone or together, with stretches shared out or not, with extensions or without, compiled this way or that."""
    seat = Seat(kind, width=width, rotary=16, positions=1300)
    context = 4 * STRETCH + 77
    qkv = random_qkv(context, seat.config)
    seat.feed(qkv[:-70], [])
    before = seat.cache.memory.copy()
    for count in (1, 70):
        rows = qkv[context - 70 : context - 70 + count]
        seat.cache.reserve(0, count)
        positions = np.arange(context - 70, context - 70 + count, dtype=np.int32)
        want = seat.attend(rows, np.zeros(count, np.int32), positions)
        after = seat.cache.memory.copy()
        for (name, library), threads, plain in itertools.product(builds.items(), (1, 2, 5, 40), (False, True)):
            seat.cache.memory[:] = before
            batch = (rows.copy(), np.zeros(count, np.int32), positions)
            got = drive(library, seat, batch, threads=threads, plain=plain)
            assert got.tobytes() == want.tobytes(), f"{count} tokens, {name}, {threads} threads, plain {plain}"
            assert seat.cache.memory.tobytes() == after.tobytes(), f"cache: {name}, {threads} threads, plain {plain}"
        seat.cache.memory[:] = before


def test_exponentials(builds: dict[str, ctypes.CDLL]) -> None:
    """To two units in the last place, of subnormal results too; and the same in every build."""
    x = np.concatenate([np.linspace(-110, 0, 400_000), -np.logspace(-30, 2, 100_000), [-np.inf, -0.0, np.nan, -104.5]])
    x = np.resize(x.astype(np.float32), len(x) + -len(x) % 8)
    got = {}
    for name, library in builds.items():
        y = got[name] = np.zeros_like(x)
        library.exponentials(ctypes.c_void_p(x.ctypes.data), ctypes.c_void_p(y.ctypes.data), ctypes.c_int64(len(x)))
    y = got["native"]
    assert y.tobytes() == got["oldest"].tobytes()
    number = ~np.isnan(x)
    assert np.isnan(y[~number]).all()
    want = np.exp(x[number].astype(np.float64))
    unit = np.spacing(np.maximum(want, np.finfo(np.float32).smallest_subnormal).astype(np.float32)).astype(np.float64)
    worst = (np.abs(y[number] - want) / unit).max()
    assert worst <= 2, f"off by {worst:.2f} units"
    assert (y[x < -104.1] == 0).all()
