"""A cache that CUDA kernels of attention fill and read, beside one that the CPU fills."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from cuda_sources import DEVICE, Argument, Kernels

from moss_jt.batch import Batch, tiles_of
from moss_jt.cache import KVCache, KVType
from moss_jt.config import MossConfig
from moss_jt.ops import InferenceOps, rotary_table
from moss_jt.weights import WeightStore

Array = npt.NDArray[Any]
KIND: dict[KVType, int] = {"float32": 0, "float16": 1, "int8": 2}
STRETCH = 256
ON_DEVICE = DEVICE in os.environ  # there Jittor need not be, and the CPU writes nothing to compare with


class Shape(NamedTuple):
    """Of the heads."""

    heads: int
    width: int
    rotary: int


class Seat:
    """Two caches of three slots: one that the CPU writes, one for the kernels.

    Args:
        kernels: of attention.cu.
        rounded: of attention_rounded.cu, where these attend.
        most: tokens of a tile.
    """

    def __init__(
        self,
        kernels: Kernels,
        kind: KVType,
        shape: Shape,
        positions: int,
        *,
        rounded: Kernels | None = None,
        most: int = 32,
    ) -> None:
        self.kernels, self.rounded, self.kind, self.shape, self.most = kernels, rounded, kind, shape, most
        self.config = MossConfig(
            vocab_size=8,
            n_positions=positions,
            n_embd=shape.heads * shape.width,
            n_layer=2,
            n_head=shape.heads,
            rotary_dim=shape.rotary,
        )
        self.cache, self.other = (KVCache(self.config, slots=3, tokens=3 * positions, kind=kind) for _ in range(2))
        self.ops = InferenceOps(self.config, WeightStore(), self.other, capacity=64)
        self.sincos = rotary_table(self.config)
        kv = self.cache.layout
        self.keys_at, self.values_at = kv.layer_bytes, kv.layer_bytes + kv.layer_bytes // 2  # of the second layer
        self.common = (self.cache.table.shape[1], kv.row_bytes, KIND[kind], shape.width)

    def feed(self, qkv: Array, slot: int, first: int) -> Array:
        """Tokens of one slot from position `first` on: (T, 3C) to (T, H, D)."""
        positions = np.arange(first, first + len(qkv), dtype=np.int32)
        slots = np.full(len(qkv), slot, np.int32)
        for cache in (self.cache, self.other):
            cache.reserve(slot, len(qkv))
        if not ON_DEVICE:
            self.ops.begin(Batch(np.zeros(len(qkv), np.int32), slots, positions, slots[:1]))
            buffer = self.ops.buffers["qkv"]
            buffer.array[: len(qkv)] = qkv
            self.ops.values(self.ops.attention(buffer, 1))
        out = self.attend(qkv, slots, positions)
        for cache in (self.cache, self.other):
            cache.commit(slot, len(qkv))
        return out

    def attend(self, qkv: Array, slots: Array, positions: Array) -> Array:
        """Tokens for which there is room: (T, 3C) to (T, H, D)."""
        heads, width, rotary = self.shape
        tokens, table, memory, block_bytes = len(qkv), self.cache.table, self.cache.memory, self.cache.block_bytes
        queries, out = (np.zeros((tokens, heads, width), np.float32) for _ in range(2))
        where = [slots, positions, table]
        threads = -(-width // 32) * 32
        append: list[Argument] = [
            np.ascontiguousarray(qkv),
            self.sincos,
            *where,
            queries,
            memory,
            np.int64(block_bytes),
            *self.common,
        ]
        self.kernels.launch(
            "rotate_and_append", (heads, tokens), threads, [*append, rotary, self.keys_at, self.values_at]
        )
        stretches = int(positions.max()) // STRETCH + 1
        parts = np.full((tokens, heads, stretches, 2 + width), np.nan, np.float32)
        sizes = (np.int64(block_bytes), *self.common, self.keys_at, self.values_at)
        if self.rounded is None:
            grid = (stretches, heads, tokens)
            self.kernels.launch("attend", grid, 128, [queries, memory, *where, parts, *sizes])
        else:
            tiles = tiles_of(slots, positions, self.most)
            name = f"attend_{'half' if self.kind == 'float16' else 'int8'}_{8 if self.most <= 8 else 32}"
            grid = (stretches, heads, len(tiles))
            self.rounded.launch(name, grid, 256, [queries, memory, *where, tiles, parts, *sizes])
        self.kernels.launch("merge", (heads, tokens), 96, [parts, positions, out, stretches, width])
        return out


def some_qkv(seat: Seat, tokens: int, seed: int = 0) -> Array:
    """Random queries, keys and values, (T, 3C)."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(tokens, 3 * seat.config.n_embd)).astype(np.float32)
