"""Products with floating-point rows (rows, matrix, numbers): right, and the same bits however they are computed.

The kernels are compiled by themselves, as Jittor compiles them and for the oldest processor, and every version
that runs here is tried in both. AVX-512 needs a processor that has it; elsewhere AVX2 answers in its place.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from itertools import pairwise
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import pytest
from stored_matrices import USUAL, VERSIONS, Way

from moss_jt.config import FloatType
from moss_jt.kernels import reference
from moss_jt.weights import widen

Array = npt.NDArray[Any]

STORED = {"float32": 0, "float16": 1, "bfloat16": 2}
SOURCE = """
#include "linear.h"
extern "C" void multiply(int64_t tokens, int64_t in, int64_t out, int64_t first, int64_t x_stride, int64_t y_stride,
                         int64_t stored, bool has_bias, bool add, const float* x, const uint8_t* rows, const float* bias,
                         float* y, int version, int threads) {
    omp_set_num_threads(threads);
    const moss::LinearShape s{tokens, in, out, 0, first, x_stride, y_stride, stored, 0, 0, 0, 0, 0, 0, 0, has_bias, add};
    moss::linear_rows(s, x, rows, bias + first, y + first, version);
}
"""


class Rows:
    """A random matrix, a bias and inputs."""

    def __init__(self, n: int, k: int, dtype: FloatType, tokens: int) -> None:
        rng = np.random.default_rng(n * k + tokens)
        self.n, self.k, self.dtype = n, k, dtype
        values = rng.normal(size=(n, k)).astype(np.float16 if dtype == "float16" else np.float32)
        kept = (values.view(np.uint32) >> 16).astype(np.uint16) if dtype == "bfloat16" else values
        self.blob = np.ascontiguousarray(kept).reshape(-1).view(np.uint8)
        self.weight = widen(self.blob, dtype).reshape(n, k)
        self.bias = rng.normal(size=n).astype(np.float32)
        self.wide = np.full((tokens, k + 3), np.nan, np.float32)  # inputs are channels of a wider buffer
        self.wide[:, :k] = rng.normal(size=(tokens, k))

    @property
    def x(self) -> Array:
        """The inputs, (T, K)."""
        return self.wide[:, : self.k]


Multiply = Callable[..., Array]


@pytest.fixture(scope="module")
def multiply(compile_kernels: Any) -> Multiply:
    """(rows, way, tokens=…, bias=…, add=…) to (T, N)."""

    def call(rows: Rows, way: Way = USUAL, *, tokens: int | None = None, bias: bool = False, add: float = 0.0) -> Array:
        library = compile_kernels(SOURCE, way.options)
        count = len(rows.wide) if tokens is None else tokens
        y = np.full((count, rows.n + 2), add, np.float32)
        ends = sorted({0, rows.n, *way.cuts})
        for first, end in pairwise(ends):
            sizes = (count, rows.k, end - first, first, rows.k + 3, rows.n + 2, STORED[rows.dtype])
            piece = rows.blob[first * rows.k * (rows.blob.size // (rows.n * rows.k)) :]
            arrays = [array.ctypes.data_as(ctypes.c_void_p) for array in (rows.wide, piece, rows.bias, y)]
            flags = (ctypes.c_bool(bias), ctypes.c_bool(add != 0))
            library.multiply(*map(ctypes.c_int64, sizes), *flags, *arrays, VERSIONS[way.version], way.threads)
        assert (y[:, rows.n :] == np.float32(add)).all(), "written past the last row"
        return y[:, : rows.n]

    return call


def near(got: Array, want: Array, tolerance: float) -> None:
    difference = np.abs(got - want)
    limit = tolerance * np.abs(want).max()
    where = np.unravel_index(difference.argmax(), difference.shape)
    assert difference.max() <= limit, f"off by {difference.max():.2e} at {where}, allowed {limit:.2e}"


@pytest.mark.parametrize(("n", "k"), [(1, 1), (3, 7), (127, 129), (129, 513), (40, 6144)])
@pytest.mark.parametrize("dtype", get_args(FloatType))
def test_products_are_right(multiply: Multiply, n: int, k: int, dtype: FloatType) -> None:
    rows = Rows(n, k, dtype, 129)
    want = reference.linear(rows.x, rows.weight, rows.bias)
    near(multiply(rows, bias=True), want, 1e-6)  # sums of K / 8 terms, each rounded to 6e-8
    near(multiply(rows, bias=True, add=2.5), want + 2.5, 1e-6)


@pytest.mark.parametrize("dtype", get_args(FloatType))
def test_sums_are_in_the_order_that_is_written_down(multiply: Multiply, dtype: FloatType) -> None:
    rows = Rows(13, 275, dtype, 5)
    np.testing.assert_array_equal(multiply(rows), reference.linear_rows(rows.x, rows.weight))


@pytest.mark.parametrize(("n", "k"), [(3, 7), (41, 129), (131, 1031)])
@pytest.mark.parametrize("dtype", get_args(FloatType))
def test_the_bits_depend_on_token_and_row_only(multiply: Multiply, n: int, k: int, dtype: FloatType) -> None:
    rows = Rows(n, k, dtype, 101)  # more than one run of tokens
    want = multiply(rows, bias=True)
    ways = [Way(options, version) for options in ("oldest", "jittor") for version in VERSIONS]
    ways += [Way(threads=1), Way(threads=5), Way(cuts=(1, n // 2)), Way(version="plain", cuts=(n // 3,), threads=3)]
    for way in ways:
        for tokens in (1, 2, 3, 4, 6, 7, 96, 97, 101):
            got = multiply(rows, way, tokens=tokens, bias=True)
            assert np.array_equal(got, want[:tokens]), f"{way}, {tokens} tokens: {np.abs(got - want[:tokens]).max()}"


def test_threads_share_the_rows_of_one_token(multiply: Multiply) -> None:
    rows = Rows(2051, 1027, "float16", 2)  # enough products to wake them
    want = multiply(rows, Way(threads=1))
    for way in (Way(threads=2), Way(threads=5), Way("oldest", threads=3), Way(threads=3, cuts=(1, 2040))):
        for tokens in (1, 2):
            np.testing.assert_array_equal(multiply(rows, way, tokens=tokens), want[:tokens])


@pytest.mark.parametrize("version", VERSIONS)
def test_fused_where_there_is_no_such_instruction(multiply: Multiply, version: str) -> None:
    """Products that cancel, subnormal and huge ones: rounding twice, or too late, would show."""
    rng = np.random.default_rng(1)
    rows = Rows(8, 64, "float32", 64)
    rows.weight[:] = rng.normal(size=(8, 64)) * 2.0 ** rng.integers(-80, 60, (8, 64))
    rows.wide[:, :64] = rng.normal(size=(64, 64)) * 2.0 ** rng.integers(-80, 60, (64, 64))
    rows.blob = rows.weight.reshape(-1).view(np.uint8)
    want = reference.linear_rows(rows.x, rows.weight)
    assert np.isfinite(want).all()
    for options in ("oldest", "jittor"):
        np.testing.assert_array_equal(multiply(rows, Way(options, version)), want)


def test_numbers_that_are_none_stay_in_their_row(multiply: Multiply) -> None:
    rows = Rows(9, 40, "float16", 5)
    halves = rows.blob.view(np.float16).reshape(9, 40)
    halves[2, 3], halves[4, 39], halves[6, 0] = np.nan, np.inf, -np.inf
    for options in ("oldest", "jittor"):
        for tokens in (1, 5):
            got = multiply(rows, Way(options), tokens=tokens)
            finite = np.isfinite(got).all(axis=0)
            np.testing.assert_array_equal(np.flatnonzero(~finite), [2, 4, 6])
            assert np.isnan(got[:, 2]).all()
            assert np.isinf(got[:, [4, 6]]).all()
