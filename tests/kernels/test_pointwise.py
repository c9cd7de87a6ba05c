"""Layer normalisation, GELU, sums (pointwise): close to float64, the same bits however they are compiled and shared out."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from moss_jt.kernels import reference

Array = npt.NDArray[Any]
Kernel = Callable[..., Array]

WAYS = list(product(("oldest", "jittor"), (1, 3)))  # options and threads
SOURCE = """
#include <omp.h>
#include "pointwise.h"
extern "C" void gelu(float* x, int64_t count, int threads) {
    omp_set_num_threads(threads);
    moss::gelu(x, count);
}
extern "C" void layer_norm(const float* x, const float* weight, const float* bias, float* y, int64_t tokens,
                           int64_t width, double eps, int threads) {
    omp_set_num_threads(threads);
    moss::layer_norm(x, weight, bias, y, tokens, width, eps);
}
extern "C" void add_both(float* x, const float* a, const float* b, int64_t count, int threads) {
    omp_set_num_threads(threads);
    moss::add_both(x, a, b, count);
}
"""


def at(array: Array) -> ctypes.c_void_p:
    return array.ctypes.data_as(ctypes.c_void_p)


@pytest.fixture(scope="module")
def gelu(compile_kernels: Any) -> Kernel:
    def call(x: Array, options: str = "jittor", threads: int = 1) -> Array:
        y = x.copy()
        compile_kernels(SOURCE, options).gelu(at(y), ctypes.c_int64(y.size), threads)
        return y

    return call


@pytest.fixture(scope="module")
def layer_norm(compile_kernels: Any) -> Kernel:
    def call(x: Array, weight: Array, bias: Array, options: str = "jittor", threads: int = 1) -> Array:
        y = np.full_like(x, np.nan)
        sizes = (ctypes.c_int64(len(x)), ctypes.c_int64(x.shape[1]), ctypes.c_double(1e-5))
        compile_kernels(SOURCE, options).layer_norm(at(x), at(weight), at(bias), at(y), *sizes, threads)
        return y

    return call


def test_gelu_is_rounded_once(gelu: Kernel) -> None:
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(size=200_000) * 3, np.linspace(-14, 14, 100_001)]).astype(np.float32)
    wide = x.astype(np.longdouble)
    z = np.sqrt(np.longdouble(2) / np.pi) * (wide + np.longdouble(0.044715) * wide**3)
    want = wide / (1 + np.exp(-2 * z))  # the same as 0.5 u (1 + tanh z), which loses digits where tanh is near -1
    got = gelu(x)
    normal = np.abs(want) > 1e-37
    ulps = np.abs(got[normal] - want[normal]) / np.spacing(np.abs(want[normal]).astype(np.float32))
    assert ulps.max() < 0.501, f"{ulps.max()} units in the last place at {x[normal][ulps.argmax()]}"
    assert np.abs(got[~normal] - want[~normal]).max(initial=0) < 1e-44
    assert np.abs(got - reference.gelu(x)).max() < 1e-6


def test_gelu_at_the_ends(gelu: Kernel) -> None:
    x = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 3e38, -3e38, 50, -50, 1e-40, -1e-40], np.float32)
    want = np.array([0.0, -0.0, np.inf, np.nan, np.nan, 3e38, -0.0, 50, -0.0, 5e-41, -5e-41], np.float32)
    for options, threads in WAYS:
        got = gelu(x, options, threads)
        np.testing.assert_array_equal(got, want)
        numbers = ~np.isnan(want)
        np.testing.assert_array_equal(np.signbit(got[numbers]), np.signbit(want[numbers]))


@pytest.mark.parametrize("width", [1, 3, 127, 129, 1028, 6144])
def test_layer_norm_is_right(layer_norm: Kernel, width: int) -> None:
    rng = np.random.default_rng(width)
    weight, bias = (rng.normal(size=width).astype(np.float32) for _ in range(2))
    x = (rng.normal(size=(5, width)) * 3 + 100).astype(np.float32)
    want = reference.layer_norm(x, weight, bias, 1e-5)
    # the mean is rounded to a float: half a unit of 100 is 4e-6, a millionth of the spread of 3
    assert np.abs(layer_norm(x, weight, bias) - want).max() < 3e-6 * np.abs(weight).max() + 1e-6 * np.abs(want).max()


def test_the_bits_are_the_same_everywhere(gelu: Kernel, layer_norm: Kernel, compile_kernels: Any) -> None:
    rng = np.random.default_rng(3)
    x = (rng.normal(size=(160, 2051)) * 4).astype(np.float32)  # enough to be shared out
    a, b, weight, bias = (rng.normal(size=shape).astype(np.float32) for shape in (x.shape, x.shape, 2051, 2051))
    curved, normed = gelu(x), layer_norm(x, weight, bias)
    for options, threads in WAYS:
        np.testing.assert_array_equal(gelu(x, options, threads), curved)
        np.testing.assert_array_equal(layer_norm(x, weight, bias, options, threads), normed)
        total = x.copy()
        compile_kernels(SOURCE, options).add_both(at(total), at(a), at(b), ctypes.c_int64(x.size), threads)
        np.testing.assert_array_equal(total, x + (a + b))
    for token in (0, 7, 159):
        np.testing.assert_array_equal(gelu(x[token]), curved[token])
        np.testing.assert_array_equal(layer_norm(x[token : token + 1].copy(), weight, bias)[0], normed[token])


def test_a_token_that_is_no_number_keeps_to_itself(layer_norm: Kernel) -> None:
    x = np.ones((3, 16), np.float32)
    x[1, 5] = np.inf
    weight = np.ones(16, np.float32)
    got = layer_norm(x, weight, weight)
    assert np.isnan(got[1]).all()
    np.testing.assert_array_equal(got[[0, 2]], 1)
