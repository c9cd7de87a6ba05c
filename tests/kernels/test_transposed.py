"""The transposed product (transposed): dx = dy W for every layout, right, and the same bits however it is computed."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from stored_matrices import DATA_KEYS, USUAL, VERSIONS, Floats, Matrix, Tiles, Way

from moss_jt.kernels import reference
from moss_jt.layout import TileLayout
from moss_jt.ops import layout_data

Array = npt.NDArray[Any]

SOURCE = """
#include "transposed.h"
using moss::LinearShape;
extern "C" void turn(int64_t tokens, int64_t out, int64_t first, int64_t blob_at, int64_t y_stride, int64_t in,
                     int64_t stored, int64_t group, int64_t padded_group, int64_t padded_in, int64_t groups,
                     int64_t scales_at, int64_t zeros_at, int64_t tile_bytes, const float* dy, const uint8_t* blob,
                     float* turned, int version, int threads) {
    omp_set_num_threads(threads);
    const LinearShape s{tokens, in, out, blob_at, first, 0, y_stride, stored, group, padded_group, padded_in, groups,
                        scales_at, zeros_at, tile_bytes, false, false};
    moss::turn_product(s, dy, blob, turned, version);
}
extern "C" void turn_back(int64_t tokens, int64_t columns, int64_t x_stride, const float* turned, const int32_t* perm,
                          float* dx, bool permuted) {
    moss::turn_back(turned, perm, dx, tokens, columns, x_stride, permuted);
}
"""


CASES: list[Tiles | Floats] = [
    Tiles(1, 8, 4, 8),
    Tiles(17, 128, 4, 128),
    Tiles(129, 256, 4, 32, act_order=True),
    Tiles(127, 72, 4, 36, act_order=True),
    Tiles(300, 1024, 4, 1024),
    Tiles(31, 132, 8, 64),
    Tiles(15, 36, 8, 9, act_order=True),
    Tiles(260, 520, 8, 260),
    Floats(1, 1, "float32"),
    Floats(3, 7, "float16"),
    Floats(127, 129, "bfloat16"),
    Floats(300, 513, "float16"),
]


Turn = Callable[..., Array]


@pytest.fixture(scope="module")
def turn(compile_kernels: Any) -> Turn:
    """(matrix, dy, way) to dx."""

    def call(matrix: Matrix, dy: Array, way: Way = USUAL) -> Array:
        library, data = compile_kernels(SOURCE, way.options), layout_data(matrix.layout)
        n, k = matrix.layout.shape
        tokens, tiles = len(dy), isinstance(matrix.layout, TileLayout)
        columns = int(data["padded_in"]) if tiles else k
        wide = np.full((tokens, n + 3), np.nan, np.float32)
        wide[:, :n] = dy
        turned = np.zeros((-(-columns // 48) * 48, -(-tokens // 16) * 16), np.float32)
        rows, nbytes = matrix.unit
        ends = sorted({0, -(-n // rows), *way.cuts})
        pointers = [array.ctypes.data_as(ctypes.c_void_p) for array in (wide, matrix.blob, turned)]
        for start, end in pairwise(ends):
            sizes = [tokens, min(n, end * rows) - start * rows, start * rows, start * nbytes, n + 3]
            numbers = [ctypes.c_int64(int(size)) for size in [*sizes, *(data[key] for key in DATA_KEYS)]]
            library.turn(*numbers, *pointers, VERSIONS[way.version], way.threads)
        dx = np.full((tokens, k + 2), 7, np.float32)
        pointers = [array.ctypes.data_as(ctypes.c_void_p) for array in (turned, matrix.perm, dx)]
        permuted = tiles and matrix.layout.permuted  # type: ignore[union-attr]
        library.turn_back(*map(ctypes.c_int64, (tokens, columns, k + 2)), *pointers, ctypes.c_bool(permuted))
        assert (dx[:, k:] == 7).all(), "written past the last input"
        return dx[:, :k]

    return call


def gradients(tokens: int, n: int) -> Array:
    return np.random.default_rng(tokens).normal(size=(tokens, n)).astype(np.float32)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_order_is_that_of_the_rows(turn: Turn, case: Tiles | Floats) -> None:
    matrix = Matrix(case)
    dy = gradients(19, case.n)
    np.testing.assert_array_equal(turn(matrix, dy), reference.transposed(dy, matrix.values))
    want = dy.astype(np.float64) @ matrix.values.astype(np.float64)
    limit = 2e-6 * np.abs(want).max()  # chains of up to 300 terms, each rounded to 6e-8
    assert np.abs(turn(matrix, dy) - want).max() <= limit


@pytest.mark.parametrize(
    "case", [Tiles(129, 256, 4, 32, act_order=True), Tiles(260, 520, 8, 260), Floats(300, 513, "float16")], ids=str
)
def test_the_bits_depend_on_token_and_input_only(turn: Turn, case: Tiles | Floats) -> None:
    matrix = Matrix(case)
    dy = gradients(130, case.n)
    want = turn(matrix, dy)
    units = -(-case.n // matrix.unit[0])
    ways = [Way(options, version) for options in ("oldest", "jittor") for version in VERSIONS]
    ways += [Way(threads=1), Way(threads=5), Way(cuts=(1, units // 2)), Way("oldest", "plain", 3, (units // 3,))]
    for way in ways:
        for tokens in (1, 2, 3, 16, 17, 127, 130):
            got = turn(matrix, dy[:tokens], way)
            assert np.array_equal(got, want[:tokens]), f"{way}, {tokens} tokens: {np.abs(got - want[:tokens]).max()}"


def test_a_token_keeps_its_troubles_to_itself(turn: Turn) -> None:
    matrix = Matrix(CASES[3])
    dy = gradients(5, 127)
    want = turn(matrix, dy)
    dy[2, 7] = np.nan
    got = turn(matrix, dy)
    assert np.isnan(got[2]).all()
    np.testing.assert_array_equal(got[[0, 1, 3, 4]], want[[0, 1, 3, 4]])
