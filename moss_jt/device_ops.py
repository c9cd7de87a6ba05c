"""The steps of a forward pass on a device: the same as in moss_jt.ops, launched as kernels of moss_jt.kernels.cuda.

Buffers are taken beforehand and everything is queued on one stream, in order; what comes back to the host are logits.
The cache of keys and values has the host's layout, block by block, in device memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moss_jt.batch import Batch
from moss_jt.cache import KVCache
from moss_jt.config import MossConfig
from moss_jt.device import Device, Place
from moss_jt.device_weights import DeviceWeights
from moss_jt.errors import ShapeError
from moss_jt.kv_layout import STEP_CHANNELS
from moss_jt.layout import RowsLayout, TileLayout
from moss_jt.ops import LOGIT_ROWS, ROUND_BLOCK, STRETCH, Linear, rotary_table
from moss_jt.plan import buffer_widths
from moss_jt.weights import WeightStore

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]

# Of the kernels: warps of a block and what they share out; each is said in the head of its source.
_WARP, _ROUND_WARPS, _PRODUCT_WARPS, _MANY = 32, 8, 8, 64
_TOGETHER, _EXACT_THREADS, _ROW_WARPS = 4, 256, 8
_ATTEND_THREADS, _SMALL_THREADS = 128, 256
_FEW = (8, 16)  # tokens for which there are products of their own
_KV_KIND = {"float32": 0, "float16": 1, "int8": 2}


@dataclass(frozen=True)
class _Tiles:
    """A matrix in tiles: its name, where the order of its inputs and its bias lie."""

    name: str
    layout: TileLayout
    order: Place | None
    bias: Place | None


class DeviceBuffer:
    """Rows of float32 in device memory, `width` to a row."""

    def __init__(self, device: Device, rows: int, width: int, purpose: str) -> None:
        self.width = width
        self.place = device.allocate(4 * rows * width, purpose)


class DeviceOps:
    """The steps of a forward pass over weights and a cache in device memory.

    Args:
        config: of the model.
        device: that computes.
        store: of the host: small tensors, rows of the embedding, layouts.
        weights: its matrices on the device.
        kv: counts the tokens; its memory on the host is not used.
        capacity: T at most, new tokens of one pass.
        rounding: whether products with int4 and int8 matrices round their inputs to int8.

    Raises:
        DeviceMemoryError: buffers and cache do not fit.
        ShapeError: heads that the kernels cannot take.
    """

    def __init__(
        self,
        config: MossConfig,
        device: Device,
        store: WeightStore,
        weights: DeviceWeights,
        kv: KVCache,
        *,
        capacity: int = 128,
        rounding: bool = False,
    ) -> None:
        if config.head_dim > 1024:
            raise ShapeError(f"heads are {config.head_dim} wide; the CUDA kernels take up to 1024.")
        assert STEP_CHANNELS == _WARP, "a warp keeps the channels that share a step"
        self.config, self.device, self.store, self.cache = config, device, store, kv
        self.capacity, self.rounding = capacity, rounding
        self.observe: Callable[[str, Floats], None] | None = None
        self.on_layer: Callable[[int], None] | None = None
        self._weights = weights
        widths = buffer_widths(config)
        self.buffers = {name: DeviceBuffer(device, capacity, size, "activations") for name, size in widths.items()}
        self.buffers["picked"] = DeviceBuffer(device, LOGIT_ROWS, config.n_embd, "activations")
        self.buffers["logits"] = DeviceBuffer(device, LOGIT_ROWS, config.vocab_size, "logits")
        stretches = -(-config.n_positions // STRETCH)
        self._parts = device.allocate(4 * capacity * config.n_head * stretches * (2 + config.head_dim), "attention")
        self._slots, self._positions = (device.allocate(4 * capacity, "activations") for _ in range(2))
        self._table = device.allocate(kv.table.nbytes, "the KV cache")
        self._cache = device.allocate(kv.memory.nbytes, "the KV cache")
        sincos = rotary_table(config)
        self._sincos = device.allocate(sincos.nbytes, "activations")
        device.write(self._sincos, sincos)
        widest = max((store.layout(name) for name in matrices_of(config)), key=_padded_in)
        most_blocks = max(_blocks(store.layout(name)) for name in matrices_of(config))
        self._codes = device.allocate(capacity * _padded_in(widest), "activations")
        self._steps, self._sums = (device.allocate(4 * capacity * most_blocks, "activations") for _ in range(2))
        self._small: dict[str, Place] = {}
        self._tokens = self._picked_rows = self._stretches = 0

    def begin(self, batch: Batch) -> None:
        """Take up a new pass.

        Raises:
            ShapeError: more tokens than `capacity`, or a position past the model's.
        """
        if not 0 < batch.size <= self.capacity:
            raise ShapeError(f"a pass takes 1 to {self.capacity} tokens; {batch.size} were given.")
        last = int(batch.positions.max())
        if last >= self.config.n_positions:
            raise ShapeError(f"position {last} is past the model's {self.config.n_positions}.")
        self.store.begin_pass()
        self._tokens, self._stretches = batch.size, last // STRETCH + 1
        self.device.write(self._slots, batch.slots)
        self.device.write(self._positions, batch.positions)
        self.device.write(self._table, self.cache.table)

    def layer_done(self, layer: int) -> None:
        """Say that a block is queued; whoever wants to break a pass off raises from `on_layer`."""
        if self.on_layer is not None:
            self.on_layer(layer)

    def block(self, name: str, compute: Callable[[DeviceBuffer], DeviceBuffer], x: DeviceBuffer) -> DeviceBuffer:
        """A block of the network."""
        return compute(x)

    def embed(self, ids: npt.NDArray[np.int32], name: str) -> DeviceBuffer:
        """Rows of the embedding, read on the host: (T,) ids to (T, C)."""
        x = self.buffers["x"]
        self.device.write(x.place, self.store.rows(name, ids))
        return self._seen("emb", x)

    def hidden(self, values: Floats) -> DeviceBuffer:
        """Take hidden states (T, C) from the host, where this model begins at a later layer."""
        x = self.buffers["x"]
        self.device.write(x.place, np.ascontiguousarray(values, np.float32))
        return x

    def layer_norm(self, x: DeviceBuffer, name: str) -> DeviceBuffer:
        """Normalise (T, C) by the norm `name`."""
        y = self.buffers["picked" if x is self.buffers["picked"] else "normed"]
        weight, bias = (self._small_place(f"{name}.{kind}") for kind in ("weight", "bias"))
        arguments = (x.place, weight, bias, y.place, x.width, self.config.layer_norm_epsilon)
        self.device.launch("pointwise", "layer_norm", (self._rows(x),), _SMALL_THREADS, arguments)
        return self._seen(name, y)

    def linear(self, x: DeviceBuffer, weight: Linear, into: str) -> DeviceBuffer:
        """(T, K) to (T, N), written to the buffer `into`."""
        assert weight.low_rank is None, "adapters are not on the device yet"
        y = self.buffers[into]
        bias = self._small_place(weight.name + ".bias") if weight.bias else None
        self._multiply(x, weight.name + ".weight", bias, y)
        return self._seen(weight.name, y)

    def attention(self, qkv: DeviceBuffer, layer: int) -> DeviceBuffer:
        """Rotate, append to the cache, attend: (T, 3C) to (T, C)."""
        queries, merged = self.buffers["queries"], self.buffers["merged"]
        kv, config = self.cache.layout, self.config
        heads, tokens, width = config.n_head, self._tokens, config.head_dim
        keys_at = self.cache.layers.index(layer) * kv.layer_bytes
        places = (keys_at, keys_at + kv.layer_bytes // 2)
        whose = (self._slots, self._positions, self._table)
        common = (np.int64(kv.block_bytes), self.cache.table.shape[1], kv.row_bytes, _KV_KIND[kv.kind], width)
        threads = -(-width // _WARP) * _WARP
        append = (qkv.place, self._sincos, *whose, queries.place, self._cache, *common, config.rotary_dim, *places)
        self.device.launch("attention", "rotate_and_append", (heads, tokens), threads, append)
        attend = (queries.place, self._cache, *whose, self._parts, *common, *places)
        self.device.launch("attention", "attend", (self._stretches, heads, tokens), _ATTEND_THREADS, attend)
        merge = (self._parts, self._positions, merged.place, self._stretches, width)
        self.device.launch("attention", "merge", (heads, tokens), _ATTEND_THREADS, merge)
        return self._seen(f"transformer.h.{layer}.attn.merged", merged)

    def gelu(self, x: DeviceBuffer, name: str) -> DeviceBuffer:
        """gelu_new, in place."""
        self._each(x, "gelu", x.place, self._tokens * x.width)
        return self._seen(name, x)

    def residual(self, x: DeviceBuffer, attn: DeviceBuffer, mlp: DeviceBuffer, name: str) -> DeviceBuffer:
        """x + attn + mlp, in place of x."""
        self._each(x, "add_both", x.place, attn.place, mlp.place, self._tokens * x.width)
        return self._seen(name, x)

    def logits(self, x: DeviceBuffer, norm: str, head: Linear, wanted: npt.NDArray[np.int32]) -> Floats:
        """Final norm and head for the chosen tokens: (R, V) float32; waits for the device."""
        picked, row = self.buffers["picked"], 4 * x.width
        result = np.empty((len(wanted), self.config.vocab_size), np.float32)
        for start in range(0, len(wanted), LOGIT_ROWS):
            rows = wanted[start : start + LOGIT_ROWS]
            for place, token in enumerate(rows):
                self.device.move(x.place.after(int(token) * row), picked.place.after(place * row), row)
            self._picked_rows = len(rows)
            out = self.linear(self.layer_norm(picked, norm), head, "logits")
            self.device.read(out.place, result[start : start + len(rows)])
        return result

    def values(self, x: DeviceBuffer) -> Floats:
        """The T rows of a buffer; waits for the device."""
        result = np.empty((self._rows(x), x.width), np.float32)
        self.device.read(x.place, result)
        return result

    def _rows(self, x: DeviceBuffer) -> int:
        """Rows of a buffer that hold something in this pass."""
        return self._picked_rows if x is self.buffers["picked"] or x is self.buffers["logits"] else self._tokens

    def _small_place(self, name: str) -> Place:
        if name not in self._small:
            values = self.store.small(name)
            place = self.device.allocate(values.nbytes, "norms and biases")
            self.device.write(place, values)
            self._small[name] = place
        return self._small[name]

    def _perm_place(self, name: str, perm: npt.NDArray[np.int32]) -> Place:
        if name not in self._small:
            place = self.device.allocate(perm.nbytes, "the order of inputs")
            self.device.write(place, perm)
            self._small[name] = place
        return self._small[name]

    def _each(self, x: DeviceBuffer, kernel: str, *arguments: Place | int) -> None:
        grid = -(-self._tokens * x.width // _SMALL_THREADS)
        self.device.launch("pointwise", kernel, (grid,), _SMALL_THREADS, arguments)

    def _multiply(self, x: DeviceBuffer, name: str, bias: Place | None, y: DeviceBuffer) -> None:
        layout, perm = self.store.layout(name), self.store.perm(name)
        if isinstance(layout, TileLayout):
            tiles = _Tiles(name, layout, None if perm is None else self._perm_place(name, perm), bias)
            multiply = self._multiply_rounded if self.rounding else self._multiply_exact
            return multiply(x, tiles, y)
        tokens = self._rows(x)
        for piece in self._weights.pieces(name):
            grid = (-(-piece.count // _ROW_WARPS), -(-tokens // _TOGETHER))
            sizes = (tokens, piece.count, piece.first, layout.shape[1], x.width, y.width, 0)
            arguments = (x.place, piece.place, bias, y.place, *sizes)
            self.device.launch("linear_exact", f"rows_{layout.dtype}", grid, _ROW_WARPS * _WARP, arguments)
        return None

    def _multiply_exact(self, x: DeviceBuffer, tiles: _Tiles, y: DeviceBuffer) -> None:
        tokens, layout = self._rows(x), tiles.layout
        for piece in self._weights.pieces(tiles.name):
            grid = (-(-piece.count // 16), -(-tokens // _TOGETHER))
            sizes = (tokens, piece.count, piece.first, *_tile_sizes(layout), x.width, y.width, 0)
            arguments = (x.place, tiles.order, piece.place, tiles.bias, y.place, *sizes)
            self.device.launch("linear_exact", f"exact_int{layout.bits}", grid, _EXACT_THREADS, arguments)

    def _multiply_rounded(self, x: DeviceBuffer, tiles: _Tiles, y: DeviceBuffer) -> None:
        layout = tiles.layout
        tokens, rounded = self._rows(x), (self._codes, self._steps, self._sums)
        grid: tuple[int, ...] = (-(-_blocks(layout) // _ROUND_WARPS), tokens)
        sizes = (tokens, x.width, layout.padded_in, layout.padded_group, ROUND_BLOCK, int(tiles.order is not None), 0)
        arguments = (x.place, tiles.order, *rounded, *sizes)
        self.device.launch("rounding", "round_activations", grid, _ROUND_WARPS * _WARP, arguments)
        few = next((size for size in _FEW if tokens <= size), None)
        kernel = f"linear_int{layout.bits}_{'many' if few is None else few}"
        for piece in self._weights.pieces(tiles.name):
            blocks = -(-piece.count // 16)
            grid = (blocks,) if few is not None else (-(-blocks // _PRODUCT_WARPS), -(-tokens // _MANY))
            numbers = (tokens, piece.count, piece.first, *_tile_sizes(layout), y.width, 0)
            product = (piece.place, *rounded, tiles.bias, y.place, *numbers)
            self.device.launch("linear_rounded", kernel, grid, _PRODUCT_WARPS * _WARP, product)

    def _seen(self, name: str, buffer: DeviceBuffer) -> DeviceBuffer:
        if self.observe is not None:
            self.observe(name, self.values(buffer))
        return buffer


def matrices_of(config: MossConfig) -> list[str]:
    """The matrices that a pass multiplies with, in its order."""
    parts = ("attn.qkv_proj", "attn.out_proj", "mlp.fc_in", "mlp.fc_out")
    names = [f"transformer.h.{layer}.{part}.weight" for layer in range(config.n_layer) for part in parts]
    return [*names, "lm_head.weight"]


def _tile_sizes(layout: TileLayout) -> tuple[int, ...]:
    """What the kernels must know of a matrix in tiles, its rows apart."""
    where = (layout.tile_bytes, layout.code_bytes, layout.code_bytes + layout.scale_bytes)
    return (*where, layout.padded_in, layout.padded_group, ROUND_BLOCK)


def _padded_in(layout: RowsLayout | TileLayout) -> int:
    return layout.padded_in if isinstance(layout, TileLayout) else layout.shape[1]


def _blocks(layout: RowsLayout | TileLayout) -> int:
    """Runs in which the inputs of a matrix are rounded."""
    if isinstance(layout, RowsLayout):
        return 1
    per_group = -(-layout.padded_group // ROUND_BLOCK)
    whole, rest = divmod(layout.padded_in, layout.padded_group)
    return whole * per_group + -(-rest // ROUND_BLOCK)
