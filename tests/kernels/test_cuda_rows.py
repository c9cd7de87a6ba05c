"""CUDA products with rows of 16-bit numbers on the host, inputs rounded to half: few and many tokens, as numpy has them."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
from cuda_sources import Argument, Kernels, kernels_of
from stored_matrices import Floats, Matrix

from moss_jt.workspace import ROW_BLOCK

Array = npt.NDArray[np.float32]
WARPS, MANY = 8, 64  # of the kernels


class Both(NamedTuple):
    """Who rounds and who multiplies."""

    rounding: Kernels
    products: Kernels

    def multiply(
        self, x: Array, matrix: Matrix, y: Array, *, cut: int | None = None, bias: Array | None = None
    ) -> None:
        """Into y (T, wide), in pieces of `cut` rows."""
        n, k = matrix.layout.shape
        tokens, blocks = len(x), -(-k // ROW_BLOCK)
        codes = np.zeros((tokens, k), np.float16)
        steps, sums = np.zeros((blocks, tokens), np.float32), np.zeros((blocks, tokens), np.int32)
        rounded: list[Argument] = [codes, steps, sums]
        numbers = (tokens, k, k, k, ROW_BLOCK, 0, 0)
        given: list[Argument] = [np.ascontiguousarray(x), None, *rounded, *numbers]
        self.rounding.launch("halve_activations", (-(-blocks // WARPS), tokens), 32 * WARPS, given)
        size = 8 if tokens <= 8 else 16 if tokens <= 16 else "many"
        blob = matrix.blob[: n * 2 * k].reshape(n, 2 * k)
        for first in range(0, n, cut or n):
            rows = min(cut or n, n - first)
            tiles = -(-rows // 16)
            piece = np.ascontiguousarray(blob[first : first + rows])
            sizes = (tokens, rows, first, 32 * k, 0, 0, k, k, ROW_BLOCK, y.shape[1], 0)
            grid = (-(-tokens // MANY), -(-tiles // WARPS)) if size == "many" else (tiles,)
            name = f"halves_{matrix.layout.dtype}_{size}"  # type: ignore[union-attr]
            self.products.launch(name, grid, 32 * WARPS, [piece, *rounded, bias, y, *sizes])


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Both:
    folder: Path = tmp_path_factory.mktemp("cuda")
    return Both(kernels_of("rounding", folder), kernels_of("linear_rounded", folder))


CASES = [Floats(1, 8, "float16"), Floats(3, 136, "float16"), Floats(129, 1024, "float16")]
CASES += [Floats(case.n, case.k, "bfloat16") for case in CASES]


@pytest.mark.parametrize("tokens", [1, 3, 9, 16, 17, 127, 129])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_products(both: Both, case: Floats, tokens: int) -> None:
    """Against the weights in float64; inputs lose their twelfth bit, and one of them is far larger than the others."""
    matrix, rng = Matrix(case), np.random.default_rng(tokens)
    x = rng.normal(size=(tokens, case.k)).astype(np.float32)
    x[tokens // 2, case.k // 3] = 3e5  # more than a half can hold
    bias, weights = rng.normal(size=case.n).astype(np.float32), matrix.values.astype(np.float64)
    y = np.full((tokens, case.n + 3), 7, np.float32)
    both.multiply(x, matrix, y, bias=bias)
    assert (y[:, case.n :] == 7).all(), "what lies beside the result is left alone"
    off = np.abs(y[:, : case.n] - x.astype(np.float64) @ weights.T - bias)
    usual = np.sqrt((x.astype(np.float64) ** 2) @ (weights**2).T) * 2.0**-11
    worst = np.unravel_index((off / (4 * usual + 1e-6)).argmax(), off.shape)
    assert (off <= 4 * usual + 1e-6).all(), f"{off[worst]} at {worst}"


@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
def test_the_cut_the_company_and_the_place_change_no_bit(both: Both, stored: str) -> None:
    """In pieces that are no whole tiles; one token alone, among nine, and among seventy."""
    matrix = Matrix(Floats(70, 648, "float16" if stored == "float16" else "bfloat16"))
    x = np.random.default_rng(1).normal(size=(70, 648)).astype(np.float32)
    whole = np.zeros((70, 70), np.float32)
    both.multiply(x, matrix, whole)
    for tokens, cut in ((70, 33), (9, None), (9, 5), (1, None), (1, 50)):
        y = np.zeros((tokens, 70), np.float32)
        part = slice(0, 70) if tokens == 70 else slice(60, 60 + tokens)
        both.multiply(x[part], matrix, y, cut=cut)
        assert np.array_equal(y, whole[part]), (tokens, cut)


@pytest.mark.parametrize("size", [1e-30, 1e-8, 1.0, 1e8, 1e30])
def test_bfloat16_of_any_size(both: Both, size: float) -> None:
    """What a half could not hold; rows and runs of inputs have powers of two of their own."""
    matrix = Matrix(Floats(17, 128, "bfloat16"))
    values = matrix.values.copy()
    values[3] *= np.float32(size)
    values[5, 64:] *= np.float32(size)
    kept = (values.view(np.uint32) >> 16).astype(np.uint16)
    matrix.blob = kept.reshape(-1).view(np.uint8)
    weights = (kept.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    x = np.random.default_rng(1).choice([-2.0, -1.0, 1.0, 0.5], size=(20, 128)).astype(np.float32)  # halves hold them
    y = np.zeros((20, 17), np.float32)
    both.multiply(x, matrix, y)
    want = x.astype(np.float64) @ weights.T
    scale = np.abs(x).astype(np.float64) @ np.abs(weights).T
    assert (np.abs(y - want) <= 1e-6 * scale).all(), "weights lose nothing"


@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
@pytest.mark.parametrize("tokens", [3, 20])
def test_what_is_not_finite_stays_in_its_token_and_its_row(both: Both, stored: str, tokens: int) -> None:
    matrix = Matrix(Floats(16, 256, "float16" if stored == "float16" else "bfloat16"))
    matrix.blob = matrix.blob.copy()
    matrix.blob.view(np.uint16).reshape(16, 256)[4, 100] = 0x7FC0 if stored == "bfloat16" else 0x7E00
    x = np.ones((tokens, 256), np.float32)
    x[1, 7] = np.nan
    y = np.zeros((tokens, 16), np.float32)
    both.multiply(x, matrix, y)
    spoilt = np.zeros(y.shape, bool)
    spoilt[1], spoilt[:, 4] = True, True
    assert np.array_equal(np.isnan(y), spoilt)
