"""CUDA products with transposed matrices, on the host: what a product passes back to its inputs, as numpy has it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from cuda_sources import Kernels, kernels_of
from stored_matrices import Floats, Matrix, Tiles

from moss_jt.config import FloatType
from moss_jt.layout import TILE_ROWS, TileLayout

Array = npt.NDArray[Any]
THREADS, CHUNKS, TOKENS = 256, 64, 64  # of a thread block


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    folder: Path = tmp_path_factory.mktemp("cuda")
    return kernels_of("linear_transposed", folder)


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    folder: Path = tmp_path_factory.mktemp("exact")
    return kernels_of("linear_exact", folder)


def halved(kernels: Kernels, dy: Array) -> tuple[Array, Array]:
    """Codes and steps."""
    codes, steps = np.zeros(dy.shape, np.float16), np.zeros(len(dy), np.float32)
    kernels.launch("halve_tokens", (len(dy),), THREADS, [np.ascontiguousarray(dy), codes, steps, dy.shape[1]])
    return codes, steps


def transposed(kernels: Kernels, dy: Array, matrix: Matrix, dx: Array, *, cut: int | None = None) -> None:
    """Into dx (T, wide), in pieces of `cut` units."""
    codes, steps = halved(kernels, dy)
    layout, (unit, nbytes) = matrix.layout, matrix.unit
    n, k = layout.shape
    if isinstance(layout, TileLayout):
        name, chunks = f"transposed_int{layout.bits}", layout.padded_in // layout.block
        sizes = (layout.tile_bytes, layout.code_bytes, layout.code_bytes + layout.scale_bytes)
        rest = (chunks, layout.padded_group // layout.block)
        perm = matrix.perm.astype(np.int32) if layout.permuted else None
    else:
        name, chunks, perm = f"transposed_{layout.dtype}", k // 4, None
        sizes, rest = (TILE_ROWS * layout.row_bytes, 0, 0), (chunks, chunks)
    step = unit * (cut or -(-n // unit))
    for first in range(0, n, step):
        rows = min(step, n - first)
        piece = np.ascontiguousarray(matrix.blob[first // unit * nbytes :][: -(-rows // unit) * nbytes])
        numbers = (len(dy), rows, first, *sizes, *rest, n, dx.shape[1], int(first > 0))
        grid = (-(-chunks // CHUNKS), -(-len(dy) // TOKENS))
        kernels.launch(name, grid, THREADS, [piece, codes, steps, perm, dx, *numbers])


CASES: list[Tiles | Floats] = [
    Tiles(1, 8, 4, 8),
    Tiles(3, 136, 4, 32),
    Tiles(17, 520, 4, 200),
    Tiles(127, 72, 4, 36, act_order=True),
    Tiles(129, 1024, 4, 1024),
    Tiles(16, 4, 8, 4),
    Tiles(31, 132, 8, 64),
    Tiles(127, 520, 8, 260),
    Tiles(129, 384, 8, 128, act_order=True),
    Floats(1, 8, "float16"),
    Floats(3, 136, "bfloat16"),
    Floats(129, 264, "float16"),
    Floats(127, 264, "bfloat16"),
]


@pytest.mark.parametrize("tokens", [1, 3, 65, 129])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_products(kernels: Kernels, case: Tiles | Floats, tokens: int) -> None:
    """Against the weights in float64; both sides lose their twelfth bit. Gradients are small, and some far larger."""
    matrix, rng = Matrix(case), np.random.default_rng(tokens)
    dy = rng.normal(size=(tokens, case.n)).astype(np.float32) * np.float32(1e-9)
    dy[tokens // 2] *= np.float32(3e14)  # more than a half can hold
    dy[0, case.n // 2] *= 50
    dx = np.full((tokens, case.k + 3), 7, np.float32)
    transposed(kernels, dy, matrix, dx)
    assert (dx[:, case.k :] == 7).all(), "what lies beside the result is left alone"
    wide, weights = dy.astype(np.float64), matrix.values.astype(np.float64)
    off = np.abs(dx[:, : case.k] - wide @ weights)
    most = np.abs(wide) @ np.abs(weights)
    assert (off <= 2.0**-10 * most).all(), f"{(off / most).max()} of the largest sum"
    usual = np.sqrt((wide**2) @ (weights**2)) * 2.0**-10
    assert (off <= 4 * usual + 1e-6 * most).all(), "errors of single products go both ways"


@pytest.mark.parametrize(("case", "cut"), [(CASES[4], 3), (CASES[8], 1), (CASES[11], 33), (CASES[12], 7)], ids=str)
def test_pieces_add_up(kernels: Kernels, case: Tiles | Floats, cut: int) -> None:
    matrix = Matrix(case)
    dy = np.random.default_rng(1).normal(size=(70, case.n)).astype(np.float32)
    whole, parts = np.zeros((70, case.k), np.float32), np.full((70, case.k), np.nan, np.float32)
    transposed(kernels, dy, matrix, whole)
    transposed(kernels, dy, matrix, parts, cut=cut)
    np.testing.assert_allclose(parts, whole, rtol=0, atol=2e-6 * np.abs(whole).max() * np.sqrt(case.n))


@pytest.mark.parametrize("size", [1.0, 1e-44, 1e-30, 7e4, 3e38])
def test_halves_keep_eleven_bits_of_the_largest(kernels: Kernels, size: float) -> None:
    dy = (np.random.default_rng(3).uniform(-1, 1, size=(3, 300)) * size).astype(np.float32)
    dy[1] = 0
    codes, steps = halved(kernels, dy)
    assert (np.frexp(steps)[0] == 0.5).all(), "powers of two: nothing else is rounded"
    kept, real = codes.astype(np.float64) * steps.astype(np.float64)[:, None], dy.astype(np.float64)
    assert np.isfinite(kept).all() and np.abs(codes.astype(np.float64)).max() <= 2**15
    assert (np.abs(kept - real) <= np.maximum(np.abs(real) * 2.0**-11, steps[:, None] * 2.0**-24)).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("case", [CASES[1], CASES[12]], ids=str)
def test_a_token_that_is_not_finite_stays_alone(kernels: Kernels, case: Tiles | Floats, bad: float) -> None:
    dy = np.ones((3, case.n), np.float32)
    dy[1, 2] = bad
    dx = np.zeros((3, case.k), np.float32)
    transposed(kernels, dy, Matrix(case), dx)
    assert np.isnan(dx).all(axis=1).tolist() == [False, True, False]
    assert not np.isnan(dx[[0, 2]]).any()


@pytest.mark.parametrize("tokens", [1, 6])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (3, 127), (129, 300)])
def test_rows_that_are_not_rounded(exact: Kernels, n: int, k: int, dtype: FloatType, tokens: int) -> None:
    matrix = Matrix(Floats(n, k, dtype))
    dy = np.random.default_rng(n).normal(size=(tokens, n)).astype(np.float32)
    dx, middle, nbytes = np.full((tokens, k + 1), 7, np.float32), n // 2, matrix.unit[1]
    for first, end in ((0, middle), (middle, n)):  # in two pieces
        if first < end:
            piece = np.ascontiguousarray(matrix.blob[first * nbytes : end * nbytes])
            sizes = (tokens, end - first, first, k, n, k + 1, int(first > 0))
            exact.launch(
                f"transposed_rows_{dtype}", (-(-k // THREADS), -(-tokens // 4)), THREADS, [dy, piece, dx, *sizes]
            )
    want = dy.astype(np.float64) @ matrix.values.astype(np.float64)
    assert np.abs(dx[:, :k] - want).max() <= 2e-6 * (1 + np.abs(want).max()) * np.sqrt(n)
    assert (dx[:, k] == 7).all(), "what lies beside the result is left alone"
