"""Products with the matrices of a model on a device: which kernel takes which matrix, and in which grid.

Whatever lies in `DeviceWeights` comes piece by piece; a kernel is queued for each before the next is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from moss_jt.device import Device, Place
from moss_jt.device_weights import DeviceWeights
from moss_jt.host_share import HostShare
from moss_jt.layout import TILE_ROWS, RowsLayout, TileLayout
from moss_jt.ops import ROUND_BLOCK
from moss_jt.weights import WeightStore
from moss_jt.workspace import ROW_BLOCK, DeviceBuffer, Inputs, blocks_of

# Of the kernels: warps of a block and what they share out; each is said in the head of its source.
_WARP, _ROUND_WARPS, _PRODUCT_WARPS, _MANY = 32, 8, 8, 64
_TOGETHER, _EXACT_THREADS, _ROW_WARPS = 4, 256, 8
_TRANSPOSED_THREADS, _TRANSPOSED_CHUNKS, _TRANSPOSED_TOKENS = 256, 64, 64
_ROW_CHUNK = 4  # inputs of a row of 16-bit numbers that linear_transposed.cu takes as it takes a chunk of a tile
_FEW = (8, 16)  # tokens for which there are products of their own
_ROUNDED: dict[Inputs, tuple[str, str]] = {  # who rounds inputs, and whose products take them
    "float16": ("halve_activations", "halves"),
    "int8": ("round_activations", "bytes"),
}


class Space(Protocol):
    """Device memory around the matrices.

    Attributes:
        device: that computes.
        store: of the host: how matrices are stored.
        weights: the matrices.
        rounded: codes, steps and sums of rounded inputs, for as many tokens as are ever given.
        share: what the host multiplies; None where it multiplies nothing.
    """

    device: Device
    store: WeightStore
    weights: DeviceWeights
    rounded: tuple[Place, Place, Place]
    share: HostShare | None

    def small(self, name: str) -> Place:
        """Where the order of the inputs of a matrix lies, if it has one."""
        ...


@dataclass(frozen=True)
class _Matrix:
    """A matrix: its name, where the order of its inputs and its bias lie."""

    name: str
    layout: TileLayout | RowsLayout
    order: Place | None
    bias: Place | None


class DeviceProducts:
    """Products with the matrices of a space, queued on its device.

    Args:
        space: the memory.
        inputs: what products make of theirs: they stay float32, or are rounded, where the kernels take such a matrix.
    """

    def __init__(self, space: Space, inputs: Inputs) -> None:
        self._space, self._device, self._inputs = space, space.device, inputs

    def multiply(self, x: DeviceBuffer, name: str, bias: Place | None, y: DeviceBuffer, *, tokens: int) -> None:
        """y = x W^T + bias: (T, K) to (T, N)."""
        matrix = self._matrix(name, bias)
        layout = matrix.layout
        if self._inputs != "float32" and can_round(layout):
            self._multiply_rounded(x, matrix, y, tokens)
        elif isinstance(layout, TileLayout):
            self._multiply_exact(x, matrix, layout, y, tokens)
        else:
            for piece in self._space.weights.pieces(name):
                rows = (piece.count, piece.first, layout.shape[1])
                self._multiply_rows(layout.dtype, x, piece.place, y, bias, rows=rows, tokens=tokens)

    def multiply_floats(
        self, x: DeviceBuffer, matrix: Place, y: DeviceBuffer, *, tokens: int, add: bool = False
    ) -> None:
        """The same with a matrix (N, K) of float32 that lies at a place; adds to what is in y, where so told."""
        self._multiply_rows("float32", x, matrix, y, None, rows=(y.width, 0, x.width), tokens=tokens, add=add)

    def multiply_transposed(self, dy: DeviceBuffer, name: str, dx: DeviceBuffer, *, tokens: int) -> None:
        """dx = dy W: (T, N) to (T, K), what `multiply` passes back; dy rounded to half where the kernels take such a
        matrix, whatever `inputs` says."""
        matrix = self._matrix(name, None)
        layout = matrix.layout
        if not can_round(layout):
            assert isinstance(layout, RowsLayout), "all tiles can be"
            inputs = layout.shape[1]
            for piece in self._space.weights.pieces(name):
                grid = (-(-inputs // _EXACT_THREADS), -(-tokens // _TOGETHER))
                exact = (piece.count, piece.first, inputs, dy.width, dx.width, int(piece.first > 0))
                arguments = (dy.place, piece.place, dx.place, tokens, *exact)
                kernel = f"transposed_rows_{layout.dtype}"
                self._device.launch("linear_exact", kernel, grid, _EXACT_THREADS, arguments)
            return
        codes, steps, _ = self._space.rounded
        given = (dy.place, codes, steps, dy.width)
        self._device.launch("linear_transposed", "halve_tokens", (tokens,), _TRANSPOSED_THREADS, given)
        if isinstance(layout, TileLayout):
            chunks, of_group, kernel = layout.padded_in // layout.block, layout.padded_group, f"int{layout.bits}"
            numbers = (*_sizes(layout)[:3], chunks, of_group // layout.block)
        else:
            chunks, kernel = layout.shape[1] // _ROW_CHUNK, layout.dtype
            numbers = (*_sizes(layout)[:3], chunks, chunks)
        grid = (-(-chunks // _TRANSPOSED_CHUNKS), -(-tokens // _TRANSPOSED_TOKENS))
        for piece in self._space.weights.pieces(name):
            places = (piece.place, codes, steps, matrix.order, dx.place)
            sizes = (tokens, piece.count, piece.first, *numbers, dy.width, dx.width, int(piece.first > 0))
            self._device.launch(
                "linear_transposed", f"transposed_{kernel}", grid, _TRANSPOSED_THREADS, (*places, *sizes)
            )

    def _matrix(self, name: str, bias: Place | None) -> _Matrix:
        store = self._space.store
        return _Matrix(name, store.layout(name), None if store.perm(name) is None else self._space.small(name), bias)

    def _multiply_rows(
        self,
        stored: str,
        x: DeviceBuffer,
        matrix: Place,
        y: DeviceBuffer,
        bias: Place | None,
        *,
        rows: tuple[int, int, int],
        tokens: int,
        add: bool = False,
    ) -> None:
        """Multiply by rows of floating-point numbers: `rows` are how many, the first, and their inputs."""
        grid = (-(-rows[0] // _ROW_WARPS), -(-tokens // _TOGETHER))
        arguments = (x.place, matrix, bias, y.place, tokens, *rows, x.width, y.width, int(add))
        self._device.launch("linear_exact", f"rows_{stored}", grid, _ROW_WARPS * _WARP, arguments)

    def _multiply_exact(
        self, x: DeviceBuffer, matrix: _Matrix, layout: TileLayout, y: DeviceBuffer, tokens: int
    ) -> None:
        for piece in self._space.weights.pieces(matrix.name):
            grid = (-(-piece.count // TILE_ROWS), -(-tokens // _TOGETHER))
            sizes = (tokens, piece.count, piece.first, *_sizes(layout), x.width, y.width, 0)
            arguments = (x.place, matrix.order, piece.place, matrix.bias, y.place, *sizes)
            self._device.launch("linear_exact", f"exact_int{layout.bits}", grid, _EXACT_THREADS, arguments)

    def _multiply_rounded(self, x: DeviceBuffer, matrix: _Matrix, y: DeviceBuffer, tokens: int) -> None:
        layout, share, weights = matrix.layout, self._space.share, self._space.weights
        rounded, sizes = self._space.rounded, _sizes(layout)
        ready = None if share is None else self._device.record("compute")
        grid: tuple[int, ...] = (-(-blocks_of(layout) // _ROUND_WARPS), tokens)
        numbers = (tokens, x.width, *sizes[-3:], int(matrix.order is not None), 0)
        inputs: Inputs = "float16" if isinstance(layout, RowsLayout) else self._inputs
        how, product_name = _ROUNDED[inputs]
        self._device.launch("rounding", how, grid, _ROUND_WARPS * _WARP, (x.place, matrix.order, *rounded, *numbers))
        first = None if share is None else share.first_row(matrix.name, weights.held_rows(matrix.name), tokens)
        few = next((size for size in _FEW if tokens <= size), None)
        kept = layout.dtype if isinstance(layout, RowsLayout) else f"int{layout.bits}"
        kernel = f"{product_name}_{kept}_{'many' if few is None else few}"
        for piece in weights.pieces(matrix.name, first):
            tiles = -(-piece.count // TILE_ROWS)
            grid = (tiles,) if few is not None else (-(-tokens // _MANY), -(-tiles // _PRODUCT_WARPS))
            product = (piece.place, *rounded, matrix.bias, y.place, tokens, piece.count, piece.first)
            self._device.launch("linear_rounded", kernel, grid, _PRODUCT_WARPS * _WARP, (*product, *sizes, y.width, 0))
        if share is not None and first is not None:
            name = matrix.name.removesuffix("weight") + "bias" if matrix.bias is not None else None
            share.multiply(matrix.name, first, x.place, y.place, tokens=tokens, ready=ready, bias=name)


def can_round(layout: TileLayout | RowsLayout) -> bool:
    """Whether the kernels take such a matrix with rounded inputs: of rows, those that can be read in 16 bytes."""
    return isinstance(layout, TileLayout) or (layout.dtype != "float32" and layout.shape[1] % 8 == 0)


def _sizes(layout: TileLayout | RowsLayout) -> tuple[int, ...]:
    """What the kernels must know of a matrix, its rows apart; the last three tell how its inputs are rounded."""
    if isinstance(layout, RowsLayout):
        return (TILE_ROWS * layout.row_bytes, 0, 0, layout.shape[1], layout.shape[1], ROW_BLOCK)
    where = (layout.tile_bytes, layout.code_bytes, layout.code_bytes + layout.scale_bytes)
    return (*where, layout.padded_in, layout.padded_group, ROUND_BLOCK)
