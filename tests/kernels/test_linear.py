"""Exact products with tiles of int4 and int8 (linear, matrix): right, and the same bits however they are computed."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from stored_matrices import DATA_KEYS, USUAL, VERSIONS, Matrix, Tiles, Way

from moss_jt.kernels import reference
from moss_jt.layout import TILE_ROWS, TileLayout
from moss_jt.ops import layout_data

Array = npt.NDArray[Any]

SOURCE = """
#include "linear.h"
using moss::LinearShape;
extern "C" void multiply(int64_t tokens, int64_t out, int64_t first, int64_t blob_at, int64_t y_stride, int64_t x_stride,
                         int64_t in, int64_t stored, int64_t group, int64_t padded_group, int64_t padded_in, int64_t groups,
                         int64_t scales_at, int64_t zeros_at, int64_t tile_bytes, const float* x, const uint8_t* blob,
                         const float* bias, float* y, int version, int threads) {
    omp_set_num_threads(threads);
    const LinearShape s{tokens, in, out, blob_at, first, x_stride, y_stride, stored, group, padded_group, padded_in, groups,
                        scales_at, zeros_at, tile_bytes, true, false};
    moss::linear(s, x, blob, bias, y, version);
}
extern "C" void order(const float* x, const int32_t* perm, float* to, int64_t tokens, int64_t x_stride, int64_t padded_in) {
    moss::permute(x, perm, to, tokens, x_stride, padded_in);
}
"""

CASES = [
    Tiles(1, 8, 4, 8),
    Tiles(17, 520, 4, 200),
    Tiles(127, 72, 4, 36, act_order=True),
    Tiles(300, 1024, 4, 1024),
    Tiles(16, 4, 8, 4),
    Tiles(129, 384, 8, 128, act_order=True),
    Tiles(33, 129, 8, 129),
]

Multiply = Callable[..., Array]


@pytest.fixture(scope="module")
def multiply(compile_kernels: Any) -> Multiply:
    """(matrix, x, bias, way) to y."""

    def call(matrix: Matrix, x: Array, bias: Array, way: Way = USUAL) -> Array:
        library, layout = compile_kernels(SOURCE, way.options), matrix.layout
        assert isinstance(layout, TileLayout)
        tokens, (n, k), data = len(x), layout.shape, layout_data(layout)
        wide = np.full((tokens, k + 3), np.nan, np.float32)
        wide[:, :k] = x
        inputs = np.full((tokens, layout.padded_in), np.nan, np.float32)
        sizes = [ctypes.c_int64(size) for size in (tokens, k + 3, layout.padded_in)]
        library.order(*(array.ctypes.data_as(ctypes.c_void_p) for array in (wide, matrix.perm, inputs)), *sizes)
        y = np.full((tokens, n + 2), 7, np.float32)
        pointers = [array.ctypes.data_as(ctypes.c_void_p) for array in (inputs, matrix.blob, bias, y)]
        for start, end in pairwise(sorted({0, layout.n_tiles, *way.cuts})):
            rows = min(n, end * TILE_ROWS) - start * TILE_ROWS
            where = [tokens, rows, start * TILE_ROWS, start * layout.tile_bytes, n + 2, layout.padded_in]
            numbers = [ctypes.c_int64(int(size)) for size in [*where, *(data[key] for key in DATA_KEYS)]]
            library.multiply(*numbers, *pointers, VERSIONS[way.version], way.threads)
        assert (y[:, n:] == 7).all(), "written past the last row"
        return y[:, :n]

    return call


def inputs(tokens: int, k: int) -> Array:
    return np.random.default_rng(tokens).normal(size=(tokens, k)).astype(np.float32)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_sums_are_in_the_order_that_is_written_down(multiply: Multiply, case: Tiles) -> None:
    matrix, x = Matrix(case), inputs(7, case.k)
    assert matrix.codes is not None
    assert isinstance(matrix.layout, TileLayout)
    bias = inputs(1, case.n)[0]
    want = reference.linear_tiles(x, matrix.codes, matrix.layout, matrix.perm)
    np.testing.assert_array_equal(multiply(matrix, x, bias), want + bias)
    exact = reference.linear(x, matrix.values)
    assert np.abs(want - exact).max() <= 2e-6 * np.abs(exact).max()  # chains of 64 terms, each rounded to 6e-8


@pytest.mark.parametrize("case", [CASES[2], CASES[3], CASES[5]], ids=str)
def test_the_bits_depend_on_token_and_row_only(multiply: Multiply, case: Tiles) -> None:
    matrix, x, bias = Matrix(case), inputs(20, case.k), inputs(1, case.n)[0]
    want = multiply(matrix, x, bias)
    tiles = -(-case.n // TILE_ROWS)
    ways = [Way(options, version) for options in ("oldest", "jittor") for version in VERSIONS]
    ways += [Way(threads=1), Way(threads=5), Way(cuts=(1, tiles // 2)), Way("oldest", "plain", 3, (tiles // 3,))]
    for way in ways:
        for tokens in (1, 2, 3, 4, 19, 20):
            got = multiply(matrix, x[:tokens], bias, way)
            assert np.array_equal(got, want[:tokens]), f"{way}, {tokens} tokens: {np.abs(got - want[:tokens]).max()}"
