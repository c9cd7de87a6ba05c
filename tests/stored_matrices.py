"""Random stored matrices for the tests of kernels, and the ways in which a kernel may compute."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moss_jt.config import Bits, FloatType
from moss_jt.layout import TILE_ROWS, RowsLayout, TileLayout
from moss_jt.packing import QuantMatrix, dequantize, input_order, pack, tile_layout
from moss_jt.weights import widen

Array = npt.NDArray[Any]

VERSIONS = {
    "plain": 1,
    "avx2": 2,
    "avx512": 3,
}  # RowsVersion of rows.h; what does not run here answers with a lesser one
DATA_KEYS = ("in", "stored", "group", "padded_group", "padded_in", "groups", "scales_at", "zeros_at", "tile_bytes")


@dataclass(frozen=True)
class Tiles:
    """A quantised matrix to make."""

    n: int
    k: int
    bits: Bits
    group: int
    act_order: bool = False


@dataclass(frozen=True)
class Floats:
    """A floating-point matrix to make."""

    n: int
    k: int
    dtype: FloatType


@dataclass(frozen=True)
class Way:
    """How a kernel computes; none of it may change a bit.

    Attributes:
        options: of the compiler, a key of OPTIONS in tests/kernels/conftest.py.
        version: a key of VERSIONS.
        threads: how many share the work.
        cuts: where the matrix is cut into pieces, in units: tiles or rows.
    """

    options: str = "jittor"
    version: str = "avx512"
    threads: int = 2
    cuts: tuple[int, ...] = ()


USUAL = Way()


class Matrix:
    """A random stored matrix: its bytes, its layout, its values."""

    def __init__(self, case: Tiles | Floats) -> None:
        rng = np.random.default_rng(case.n * case.k)
        self.layout: TileLayout | RowsLayout
        self.perm: Array = np.zeros(1, np.int32)
        self.codes: QuantMatrix | None = None
        if isinstance(case, Tiles):
            groups = (np.arange(case.k) // case.group).astype(np.int32)
            if case.act_order:
                groups = rng.permutation(groups).astype(np.int32)
            count = -(-case.k // case.group)
            codes = rng.integers(0, 2**case.bits, (case.n, case.k)).astype(np.uint8)
            codes[0], codes[-1] = 2**case.bits - 1, 0  # the largest sums of products
            scales = rng.uniform(1e-3, 2e-2, (case.n, count)).astype(np.float16)
            zeros = rng.integers(0, 2**case.bits, (case.n, count)).astype(np.uint8)
            zeros[0], zeros[-1] = 0, 2**case.bits - 1
            matrix = self.codes = QuantMatrix(codes, scales, zeros, groups)
            self.layout = tile_layout((case.n, case.k), case.bits, case.group, groups)
            self.perm = input_order(self.layout, groups)
            self.blob, self.values = pack(matrix, self.layout), dequantize(matrix)
            return
        values = rng.normal(size=(case.n, case.k)).astype(np.float16 if case.dtype == "float16" else np.float32)
        kept = (values.view(np.uint32) >> 16).astype(np.uint16) if case.dtype == "bfloat16" else values
        self.layout = RowsLayout((case.n, case.k), case.dtype)
        self.blob = np.ascontiguousarray(kept).reshape(-1).view(np.uint8)
        self.values = widen(self.blob, case.dtype).reshape(case.n, case.k)

    @property
    def unit(self) -> tuple[int, int]:
        """Rows and bytes of the smallest piece."""
        if isinstance(self.layout, TileLayout):
            return TILE_ROWS, self.layout.tile_bytes
        return 1, self.layout.row_bytes
