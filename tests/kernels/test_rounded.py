"""Products with activations rounded to int8 (rounding, rounded, rounded_plain, rounded_x86, rounded_vnni, rounded_amx).

The reference follows the kernels operation by operation; every version that this processor can run must
give its bits, for any number of tokens, any cut and any number of threads.
"""

from __future__ import annotations

import ctypes
import platform
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from moss_jt.config import Bits
from moss_jt.kernels import reference
from moss_jt.launch import LINEAR_ROUNDED, ROUND_ACTIVATIONS, Buffer, aligned, run
from moss_jt.layout import TILE_ROWS, TileLayout
from moss_jt.ops import PROCESSORS, ROUND_BLOCK, layout_data
from moss_jt.packing import QuantMatrix, dequantize, input_order, pack, tile_layout

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Case:
    """A quantised matrix to make."""

    n: int
    k: int
    bits: Bits
    group: int
    act_order: bool = False


CASES = [
    Case(1, 8, 4, 8),
    Case(3, 136, 4, 32),
    Case(15, 1, 4, 1),
    Case(16, 128, 4, 128),
    Case(17, 520, 4, 200),
    Case(127, 72, 4, 36, act_order=True),
    Case(129, 1024, 4, 1024),
    Case(144, 640, 4, 64),
    Case(16, 4, 8, 4),
    Case(17, 36, 8, 9, act_order=True),
    Case(31, 132, 8, 64),
    Case(127, 520, 8, 260),
    Case(129, 384, 8, 128, act_order=True),
    Case(15, 129, 8, 129),
]


class Product:
    """A random matrix and what is needed to multiply with it."""

    def __init__(self, case: Case, seed: int = 0) -> None:
        rng = np.random.default_rng(seed + case.n * case.k)
        groups = (np.arange(case.k) // case.group).astype(np.int32)
        if case.act_order:
            groups = rng.permutation(groups).astype(np.int32)
        shape = (case.n, -(-case.k // case.group))
        codes = rng.integers(0, 2**case.bits, (case.n, case.k)).astype(np.uint8)
        codes[0], codes[-1] = 2**case.bits - 1, 0  # the largest sums of products
        zeros = rng.integers(0, 2**case.bits, shape).astype(np.uint8)
        zeros[0], zeros[-1] = 0, 2**case.bits - 1
        scales = rng.uniform(1e-3, 2e-2, shape).astype(np.float16)
        self.matrix = QuantMatrix(codes, scales, zeros, groups)
        self.layout: TileLayout = tile_layout((case.n, case.k), case.bits, case.group, groups)
        self.perm = input_order(self.layout, groups)
        self.blob = Buffer(aligned((self.layout.nbytes,), "uint8"))
        self.blob.array[:] = pack(self.matrix, self.layout)
        self.bias = Buffer(rng.normal(size=max(case.n, 2)).astype(np.float32))

    def reference(self, x: Array) -> Array:
        """What the kernels must give, bit for bit, without a bias."""
        return reference.linear_rounded(x, self.matrix, self.layout, self.perm, ROUND_BLOCK)

    def run(
        self,
        x: Array,
        processor: str = "best",
        *,
        cut: int | None = None,
        bias: bool = False,
        y: Array | None = None,
    ) -> Array:
        """(T, N); in pieces of `cut` tiles; added to `y` if there is one."""
        tokens, layout = len(x), self.layout
        blocks = len(reference.rounding_blocks(layout, ROUND_BLOCK))
        rounded = [
            Buffer(aligned((max(2, tokens * count),), kind))
            for count, kind in ((layout.padded_in, "int8"), (blocks, "float32"), (blocks, "int32"))
        ]
        wide = aligned((tokens, x.shape[1] + 3), "float32")  # inputs and outputs are channels of wider buffers
        wide[:] = np.nan
        wide[:, : x.shape[1]] = x
        out = aligned((tokens, layout.shape[0] + 3), "float32")
        out[:, : layout.shape[0]] = 0 if y is None else y
        out[:, layout.shape[0] :] = 7
        data = layout_data(layout) | {
            "tokens": tokens,
            "x_stride": wide.shape[1],
            "y_stride": out.shape[1],
            "has_bias": bias,
            "add": y is not None,
            "block": ROUND_BLOCK,
            "processor": PROCESSORS[processor],
            "permuted": layout.permuted,
        }
        keys = ("tokens", "x_stride", "padded_in", "padded_group", "block", "permuted")
        order = Buffer(np.append(self.perm, np.int32(0)))
        codes, steps, sums = (buffer.var for buffer in rounded)
        run(ROUND_ACTIVATIONS, [Buffer(wide).var, order.var], [codes, steps, sums], {key: data[key] for key in keys})
        target = Buffer(out)
        step = (cut or layout.n_tiles) * TILE_ROWS
        for first in range(0, layout.shape[0], step):
            data |= {
                "first": first,
                "out": min(step, layout.shape[0] - first),
                "blob_at": first // TILE_ROWS * layout.tile_bytes,
            }
            run(LINEAR_ROUNDED, [codes, self.blob.var, self.bias.var, steps, sums], [target.var], data)
        assert (out[:, layout.shape[0] :] == 7).all(), "written past the last row"
        results: Array = out[:, : layout.shape[0]]
        return results


def activations(tokens: int, k: int, seed: int = 0) -> Array:
    """Floats of widely different size, with a token whose codes are all the largest, and zeros."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(tokens, k)) * np.exp(2 * rng.normal(size=(tokens, k)))
    x[0] = 3 * np.sign(x[0])
    x[-1, : k // 2] = 0
    return np.asarray(x, np.float32)


@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_bits_are_those_of_the_reference(jittor: Any, case: Case, processor: str) -> None:
    """For any number of tokens: so they do not depend on it, nor on the processor."""
    product = Product(case)
    x = activations(131, case.k)
    want = product.reference(x)
    for tokens in (1, 2, 3, 4, 5, 7, 8, 16, 33, 131):
        np.testing.assert_array_equal(product.run(x[:tokens], processor), want[:tokens], f"{tokens} tokens")


@pytest.mark.parametrize("tokens", [1, 6])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cuts_bias_and_sum(jittor: Any, case: Case, tokens: int) -> None:
    product = Product(case)
    x = activations(tokens, case.k)
    plain = product.run(x)
    for cut in (1, 2, 5):
        np.testing.assert_array_equal(product.run(x, cut=cut), plain)
    bias = product.bias.array[: case.n]
    np.testing.assert_array_equal(product.run(x, bias=True, cut=2), plain + bias)
    y = activations(tokens, case.n, seed=1)
    np.testing.assert_array_equal(product.run(x, bias=True, y=y, cut=2), y + (plain + bias))


@pytest.fixture
def openmp() -> Iterator[ctypes.CDLL]:
    """OpenMP, with its number of threads put back afterwards."""
    library = ctypes.CDLL("libgomp.so.1")
    before = library.omp_get_max_threads()
    yield library
    library.omp_set_num_threads(before)


def test_any_number_of_threads_gives_the_same_bits(jittor: Any, openmp: ctypes.CDLL) -> None:
    product = Product(Case(2024, 3200, 4, 64))  # more than one thread's work for one token
    x = activations(9, 3200)
    want = product.reference(x)
    for threads in (1, 2, 3, 8):
        openmp.omp_set_num_threads(threads)
        for tokens in (1, 9):
            np.testing.assert_array_equal(product.run(x[:tokens]), want[:tokens], f"{threads} threads")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_is_within_that_of_rounding(jittor: Any, case: Case) -> None:
    """Each input is off by half a step at most, so a sum by half the steps times the weights' magnitudes."""
    product = Product(case)
    x = activations(20, case.k)
    weight = dequantize(product.matrix).astype(np.float64)
    here = np.where(product.perm < 0, 0, weight[:, product.perm])
    stored = np.where(product.perm < 0, np.float32(0), x[:, product.perm])
    bound = np.zeros((len(x), case.n))
    for _, start, size in reference.rounding_blocks(product.layout, ROUND_BLOCK):
        part = slice(start, start + size)
        half_step = np.abs(stored[:, part]).max(axis=1) / 127 / 2
        bound += half_step[:, None] * np.abs(here[:, part]).sum(axis=1)
    sums = np.abs(x.astype(np.float64)) @ np.abs(weight).T
    error = np.abs(product.run(x) - reference.linear(x, weight))
    assert (error <= bound * (1 + 1e-5) + sums * 1e-5).all()


@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("bits", [4, 8])
def test_what_is_not_finite_stays_so(jittor: Any, bits: Bits, bad: float, processor: str) -> None:
    """In every output of its token, and of no other."""
    product = Product(Case(33, 264, bits, 128))
    x = activations(7, 264)
    clean = product.run(x, processor)
    for token, at in ((0, 0), (3, 130), (6, 263)):
        spoiled = x.copy()
        spoiled[token, at] = bad
        got = product.run(spoiled, processor)
        assert not np.isfinite(got[token]).any()
        others = np.arange(7) != token
        np.testing.assert_array_equal(got[others], clean[others])


def test_tiny_and_huge_activations(jittor: Any) -> None:
    """Subnormal inputs are not lost where the step can hold them, and large ones keep their accuracy."""
    product = Product(Case(16, 128, 8, 128))
    weight = dequantize(product.matrix).astype(np.float64)
    x = activations(1, 128, seed=3)
    x = np.concatenate([x * np.float32(factor) for factor in (1e-44, 1e-39, 1e-37, 1e-30, 1e30, 1e34)])
    got, want = product.run(x), reference.linear(x, weight)
    np.testing.assert_array_equal(got, product.reference(x))
    steps = np.maximum(np.abs(x).max(axis=1).astype(np.float64) / 127, np.finfo(np.float32).tiny)
    assert (np.abs(got - want) <= steps[:, None] / 2 * np.abs(weight).sum(axis=1) * 1.001).all()


def test_largest_sums_do_not_overflow(jittor: Any) -> None:
    """Every code and every activation at its limit, of either sign, in every version."""
    for bits in (4, 8):
        product = Product(Case(16, 512, bits, 512))
        product.matrix.codes[:8] = 0
        product.matrix.codes[8:] = 2**bits - 1
        product.blob.array[:] = pack(product.matrix, product.layout)
        signs = np.ones((3, 512), np.float32)
        signs[1] = -1
        signs[2, ::2] = -1
        for processor in PROCESSORS:
            np.testing.assert_array_equal(product.run(signs * 5, processor), product.reference(signs * 5))


@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("bits", [4, 8])
def test_zero_points_in_the_middle(jittor: Any, bits: Bits, processor: str) -> None:
    """As symmetric weights have them: some versions take them off the codes; in one tile others do not allow it."""
    product = Product(Case(50, 392, bits, 128))
    product.matrix.zeros[:] = 2 ** (bits - 1) - 1  # stored less one, as GPTQ does
    product.matrix.zeros[20, 1] = 2**bits - 1
    product.blob.array[:] = pack(product.matrix, product.layout)
    x = activations(40, 392)
    np.testing.assert_array_equal(product.run(x, processor), product.reference(x))


CALL_ALL = """
#include "rounded.h"
void call(const moss::LinearShape& s, const int8_t* x, const uint8_t* w, const float* f, const int32_t* n, float* y) {
    for (int p = moss::kBest; p <= moss::kAmxInt8; p++) moss::linear_rounded(s, x, w, f, f, n, y, 128, p);
}
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="these are x86 processors")
@pytest.mark.parametrize("processor", ["x86-64", "icelake-server"])
def test_compiles_for_old_and_new_processors(processor: str, tmp_path: Path) -> None:
    """Every version is in every program: the compiler must take those that its target does not have."""
    source = tmp_path / "all.cpp"
    source.write_text(CALL_ALL, "utf-8")
    room = Path(reference.__file__).parent / "cpu"
    options = [
        "-std=c++14",
        "-O1",
        "-fopenmp",
        "-Wno-psabi",
        f"-march={processor}",
        f"-I{room}",
        "-c",
        "-o",
        "/dev/null",
    ]
    done = subprocess.run(["g++", *options, str(source)], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
