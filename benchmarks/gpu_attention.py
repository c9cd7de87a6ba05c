"""Part of gpu.py: attention of one layer with the heads of moss-moon-003, the kernel of fast compute beside the exact one.

A decoded token reads the cache once and computes little: bytes per second. A prompt computes: multiplications and
additions per second, of which those that the mask drops are not counted.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from gpu_rows import Rows

from moss_jt.batch import tiles_of
from moss_jt.device import Device, Place
from moss_jt.kv_layout import BLOCK, KVLayout, KVType
from moss_jt.ops import STRETCH
from moss_jt.record import spread

Results = dict[str, Any]
Timed = Callable[[Device, Callable[[], None]], list[float]]

HEADS, WIDTH = 24, 256
CASES = ((1, 512), (1, 2048), (128, 512), (512, 512), (512, 2048))  # new tokens, and positions with them
ALLOWED = 2e-3  # of the largest result
PAST_CACHES = 512 << 20  # bytes that no cache holds
KINDS: tuple[tuple[KVType, int, str], ...] = (("float16", 1, "half"), ("int8", 2, "int8"))


def attention(open_device: Callable[[], Device], timed: Timed) -> Results:
    """Seconds of each kernel, stretches merged, their rates, and how far their results are apart."""
    results: Results = Rows()
    for kind, number, name in KINDS:
        for tokens, context in CASES:
            device = open_device()
            layer = Layer(device, KVLayout(1, HEADS, WIDTH, kind), number, tokens, context)
            size = 8 if tokens <= 8 else 32
            works: dict[str, Callable[[], None]] = {
                "ours": partial(layer.tiles, f"attend_{name}_{size}"),
                "attend": layer.tokens,
            }
            row: Results = {}
            made = []
            for what, work in works.items():
                seconds = [each / layer.turns for each in timed(device, work)]
                made.append(layer.result())
                row[f"{what}_us"] = spread([1e6 * each for each in seconds], 1)
                if tokens == 1:
                    row[f"{what}_gb_per_s"] = spread([layer.nbytes / each / 1e9 for each in seconds], 1)
                else:
                    row[f"{what}_tflop_per_s"] = spread([layer.flop / each / 1e12 for each in seconds], 2)
            row["off"] = float(np.abs(made[0] - made[1]).max() / np.abs(made[1]).max())
            results[f"{kind} {tokens} of {context}"] = row
            device.close()
    results["wrong"] = not all(row["off"] < ALLOWED for row in results.values())
    return results


class Layer:
    """One sequence of which some tokens are new, over a cache of random numbers; over many such in turns for one token,
    since they would lie in the device's own cache otherwise."""

    def __init__(self, device: Device, layout: KVLayout, number: int, tokens: int, context: int) -> None:
        self._device, self._count, self._stretches = device, tokens, -(-context // STRETCH)
        rng, blocks = np.random.default_rng(0), -(-context // BLOCK)
        positions = np.arange(context - tokens, context, dtype=np.int32)
        slots = np.zeros(tokens, np.int32)
        tiles = tiles_of(slots, positions, 32)
        self._tiles = len(tiles)
        pool = rng.integers(0, 0x38, blocks * layout.block_bytes, np.uint8)  # below 0x3800: finite
        self.nbytes = context * layout.token_bytes
        self.turns = -(-PAST_CACHES // self.nbytes) if tokens == 1 else 1
        self._pools = [self._put(pool) for _ in range(self.turns)]
        self._queries = self._put(rng.standard_normal((tokens, HEADS, WIDTH)).astype(np.float32))
        self._slots, self._positions = self._put(slots), self._put(positions)
        self._table, self._which = self._put(np.arange(blocks, dtype=np.int32)), self._put(tiles)
        self._parts = device.allocate(4 * tokens * HEADS * self._stretches * (2 + WIDTH), "measuring")
        self._out = device.allocate(4 * tokens * HEADS * WIDTH, "measuring")
        sizes = (np.int64(layout.block_bytes), blocks, layout.row_bytes, number, WIDTH)
        self._sizes = (*sizes, 0, layout.layer_bytes // 2)
        self.flop = 4 * HEADS * WIDTH * int((positions.astype(np.int64) + 1).sum())

    def _put(self, values: np.ndarray[Any, Any]) -> Place:
        place = self._device.allocate(values.nbytes, "measuring")
        self._device.write(place, values)
        return place

    def tiles(self, kernel: str) -> None:
        """The kernel of fast compute."""
        for pool in self._pools:
            given = (self._queries, pool, self._slots, self._positions, self._table, self._which, self._parts)
            grid = (self._stretches, HEADS, self._tiles)
            self._device.launch("attention_rounded", kernel, grid, 256, (*given, *self._sizes))
            self._merge()

    def tokens(self) -> None:
        """The exact one, token by token."""
        for pool in self._pools:
            given = (self._queries, pool, self._slots, self._positions, self._table, self._parts, *self._sizes)
            self._device.launch("attention", "attend", (self._stretches, HEADS, self._count), 128, given)
            self._merge()

    def result(self) -> np.ndarray[Any, np.dtype[np.float32]]:
        """What the last one made, (T, H, D)."""
        out = np.empty((self._count, HEADS, WIDTH), np.float32)
        self._device.read(self._out, out)
        return out

    def _merge(self) -> None:
        given = (self._parts, self._positions, self._out, self._stretches, WIDTH)
        self._device.launch("attention", "merge", (HEADS, self._count), 128, given)
