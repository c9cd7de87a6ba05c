"""The steps of a forward pass on a device: the same as in moss_jt.ops, launched as kernels of moss_jt.kernels.cuda.

Buffers are taken beforehand and everything is queued on one stream, in order; what comes back to the host are logits.
The cache of keys and values has the host's layout, block by block, in device memory. Where all weights are resident the
launches of a block are captured once and replayed: a graph, which costs the host one call.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from moss_jt.batch import Batch, tiles_of
from moss_jt.cache import KVCache
from moss_jt.device import Event, Graph, Place
from moss_jt.device_blocks import DeviceBlocks
from moss_jt.device_products import DeviceProducts
from moss_jt.errors import ShapeError
from moss_jt.kv_layout import STEP_CHANNELS, KVLayout
from moss_jt.ops import LOGIT_ROWS, STRETCH, Linear
from moss_jt.shortlist import FOUND, Shortlist, Wish, read_found
from moss_jt.workspace import TOLD, DeviceBuffer, Inputs, Workspace

Floats = npt.NDArray[np.float32]

# Of the kernels: warps of a block and what they share out; each is said in the head of its source.
_WARP = 32
_ATTEND_THREADS, _SMALL_THREADS, _SHORTLIST_THREADS = 128, 256, 1024
_KV_KIND = {"float32": 0, "float16": 1, "int8": 2}
_KV_NAME = {"float16": "half", "int8": "int8"}
_TILE_TOKENS, _TILE_THREADS, _TILE_WIDTH = (8, 32), 256, 256  # of attention_rounded.cu
_MOST_CAPTURED = 16  # tokens: with more, launching is a small part of a block, and each prompt would capture its own
_LAYERS_AHEAD = 2  # queued before the device has done them, where weights are streamed: Ctrl-C waits for these


@dataclass(frozen=True)
class _Captured:
    """The launches of a block, what they hold for, and where they leave their result; None where not captured yet."""

    state: tuple[Hashable, ...]
    graph: Graph | None
    result: DeviceBuffer


class DeviceOps:
    """The steps of a forward pass over weights and a cache in device memory.

    Args:
        space: buffers and weights, shared by all caches of a model.
        kv: the cache, its blocks from the pool of `space`.
        inputs: what products make of theirs: they stay float32, or are rounded; queries of attention likewise.

    Attributes:
        capacity: T at most, new tokens of one pass.
        observe: called with the name and values of each step's result, for tests and debugging.
        on_layer: called when a block is queued; may raise to break the pass off.

    Raises:
        ShapeError: heads that the kernels cannot take.
    """

    def __init__(self, space: Workspace, kv: KVCache, *, inputs: Inputs = "float32") -> None:
        config = space.config
        if config.head_dim > 1024:
            raise ShapeError(f"heads are {config.head_dim} wide; the CUDA kernels take up to 1024.")
        assert STEP_CHANNELS == _WARP, "a warp keeps the channels that share a step"
        assert isinstance(kv.blocks, DeviceBlocks), "the cache is not on the device"
        self.config, self.device, self.store, self.cache = config, space.device, space.store, kv
        self.space, self.capacity, self.buffers = space, space.capacity, space.buffers
        self.inputs: Inputs = inputs
        self._products = DeviceProducts(space, inputs)
        self.observe: Callable[[str, Floats], None] | None = None
        self.on_layer: Callable[[int], None] | None = None
        self._blocks = kv.blocks
        self._weights = space.weights
        self._captured: dict[str, _Captured] = {}
        self._queued: list[Event] = []
        self._masks = False
        self._rounds_attention = inputs != "float32" and _can_round_attention(kv.layout)
        self._tokens = self._picked_rows = self._stretches = self._tiles = self._tile_tokens = 0

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
        self._weights.begin_pass()
        self._queued.clear()
        self._tokens, self._stretches = batch.size, last // STRETCH + 1
        used, which = np.unique(batch.slots, return_inverse=True)  # only their rows of the table go to the device
        tiles = tiles_of(batch.slots, batch.positions, _TILE_TOKENS[-1])
        self._tiles, self._tile_tokens = len(tiles), int(tiles[:, 1].max())
        told = np.zeros((TOLD, self.capacity), np.int32)
        told[0, : batch.size], told[1, : batch.size] = which, batch.positions
        told[2:].reshape(-1)[: tiles.size] = tiles.reshape(-1)
        self.device.write(self.space.slots, told)
        self.device.write(self.space.table, self._blocks.units[self.cache.table[used]])

    def layer_done(self, layer: int) -> None:
        """Say that a block is queued; whoever wants to break a pass off raises from `on_layer`.

        Where weights are streamed the host does not run far ahead, so that a pass can be broken off.
        """
        if not self._weights.is_whole:
            self._queued.append(self.device.record("compute"))
            if len(self._queued) > _LAYERS_AHEAD:
                self.device.wait(self._queued.pop(0))
        if self.on_layer is not None:
            self.on_layer(layer)

    def block(self, name: str, compute: Callable[[DeviceBuffer], DeviceBuffer], x: DeviceBuffer) -> DeviceBuffer:
        """A block of the network: queued step by step, then captured, then replayed as long as nothing has changed."""
        if self.observe is not None or not self._weights.is_whole or self._tokens > _MOST_CAPTURED:
            return compute(x)
        attends = (self._stretches, self._tiles, self._tile_tokens <= _TILE_TOKENS[0])
        state = (self._tokens, attends, self._weights.version, self.inputs)
        known = self._captured.get(name)
        if known is None or known.state != state:
            result = compute(x)
            self._captured[name] = _Captured(state, None, result)
            return result
        if known.graph is None:
            known = self._captured[name] = _Captured(state, self.device.capture(lambda: _run(compute, x)), known.result)
        self.device.replay(known.graph)
        return known.result

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
        weight, bias = (self.space.small(f"{name}.{kind}") for kind in ("weight", "bias"))
        arguments = (x.place, weight, bias, y.place, x.width, self.config.layer_norm_epsilon)
        self.device.launch("pointwise", "layer_norm", (self._rows(x),), _SMALL_THREADS, arguments)
        return self._seen(name, y)

    def linear(self, x: DeviceBuffer, weight: Linear, into: str) -> DeviceBuffer:
        """(T, K) to (T, N), written to the buffer `into`."""
        y = self.buffers[into]
        bias = self.space.small(weight.name + ".bias") if weight.bias else None
        tokens = self._rows(x)
        self._products.multiply(x, weight.name + ".weight", bias, y, tokens=tokens)
        if weight.low_rank is not None:
            a, b = (self.space.small(name) for name in weight.low_rank)
            middle = self.space.middle
            self._products.multiply_floats(x, a, middle, tokens=tokens)
            self._products.multiply_floats(middle, b, y, tokens=tokens, add=True)
        return self._seen(weight.name, y)

    def attention(self, qkv: DeviceBuffer, layer: int) -> DeviceBuffer:
        """Rotate, append to the cache, attend: (T, 3C) to (T, C)."""
        queries, merged = self.buffers["queries"], self.buffers["merged"]
        kv, config = self.cache.layout, self.config
        heads, tokens, width = config.n_head, self._tokens, config.head_dim
        keys_at = self.cache.layers.index(layer) * kv.layer_bytes
        places = (keys_at, keys_at + kv.layer_bytes // 2)
        space, pool = self.space, self.space.pool.place
        whose = (space.slots, space.positions, space.table)
        common = (np.int64(kv.block_bytes), self.cache.table.shape[1], kv.row_bytes, _KV_KIND[kv.kind], width)
        threads = -(-width // _WARP) * _WARP
        append = (qkv.place, space.sincos, *whose, queries.place, pool, *common, config.rotary_dim, *places)
        self.device.launch("attention", "rotate_and_append", (heads, tokens), threads, append)
        given, shape = (queries.place, pool, *whose), (space.parts, *common, *places)
        if self._rounds_attention:
            size = next(size for size in _TILE_TOKENS if self._tile_tokens <= size)
            kernel, grid = f"attend_{_KV_NAME[kv.kind]}_{size}", (self._stretches, heads, self._tiles)
            self.device.launch("attention_rounded", kernel, grid, _TILE_THREADS, (*given, space.tiles, *shape))
        else:
            grid = (self._stretches, heads, tokens)
            self.device.launch("attention", "attend", grid, _ATTEND_THREADS, (*given, *shape))
        merge = (space.parts, space.positions, merged.place, self._stretches, width)
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
        result = np.empty((len(wanted), self.config.vocab_size), np.float32)
        for start, count, out in self._heads(x, norm, head, wanted):
            self.device.read(out.place, result[start : start + count])
        return result

    def shortlists(
        self, norm: str, head: Linear, wanted: npt.NDArray[np.int32], wishes: Sequence[Wish]
    ) -> list[Shortlist]:
        """The candidates for each of the chosen tokens of the pass that is queued; waits for the device."""
        results: list[Shortlist] = []
        for start, count, out in self._heads(self.buffers["x"], norm, head, wanted):
            found = self._find(wishes[start : start + count], out)
            results += [read_found(each, partial(self._row, out, place)) for place, each in enumerate(found)]
        return results

    def _row(self, out: DeviceBuffer, place: int) -> Floats:
        """One row of a buffer."""
        row = np.empty(out.width, np.float32)
        self.device.read(out.place.after(4 * out.width * place), row)
        return row

    def _heads(
        self, x: DeviceBuffer, norm: str, head: Linear, wanted: npt.NDArray[np.int32]
    ) -> Iterator[tuple[int, int, DeviceBuffer]]:
        """Queue final norm and head for some tokens at a time: (first, how many, where their logits will be)."""
        picked, row = self.buffers["picked"], 4 * x.width
        for start in range(0, len(wanted), LOGIT_ROWS):
            rows = wanted[start : start + LOGIT_ROWS]
            for place, token in enumerate(rows):
                self.device.move(x.place.after(int(token) * row), picked.place.after(place * row), row)
            self._picked_rows = len(rows)
            out = self.linear(self.layer_norm(picked, norm), head, "logits")
            if start + LOGIT_ROWS >= len(wanted):
                self._weights.prefetch()
            yield start, len(rows), out

    def allow(self, allowed: npt.NDArray[np.bool_] | None) -> None:
        """Say which ids may come out, (V,); None for all."""
        self._masks = allowed is not None
        if allowed is None:
            return
        with self.space.lock:  # else it could become part of what another thread captures
            self.device.write(self.space.allowed, allowed.astype(np.uint8))

    def _find(self, wishes: Sequence[Wish], out: DeviceBuffer) -> npt.NDArray[np.void]:
        """Run the kernel on as many rows as there are wishes; their logits become scores."""
        space, count = self.space, len(wishes)
        told = [wish.history if wish.config.repetition_penalty != 1 else () for wish in wishes]
        past = [np.unique(np.asarray(ids, np.int32)) for ids in told]
        history = np.full((count, max(1, *map(len, past))), -1, np.int32)
        for row, ids in zip(history, past, strict=True):
            row[: len(ids)] = ids
        self.device.write(space.history, history)
        self.device.write(space.penalties, np.array([w.config.repetition_penalty for w in wishes], np.float32))
        self.device.write(space.wanted, np.array([w.wanted for w in wishes], np.int32))
        places = (out.place, space.allowed if self._masks else None, space.history, space.penalties, space.wanted)
        sizes = (self.config.vocab_size, history.shape[1])
        self.device.launch("shortlist", "shortlist", (count,), _SHORTLIST_THREADS, (*places, space.found, *sizes))
        found = np.empty(count, FOUND)
        self.device.read(space.found, found)
        return found

    def more_logits(self, norm: str, head: Linear, wanted: npt.NDArray[np.int32]) -> Floats:
        """The same for other tokens of the pass that has just run."""
        return self.logits(self.buffers["x"], norm, head, wanted)

    def values(self, x: DeviceBuffer) -> Floats:
        """The T rows of a buffer; waits for the device."""
        result = np.empty((self._rows(x), x.width), np.float32)
        self.device.read(x.place, result)
        return result

    def _rows(self, x: DeviceBuffer) -> int:
        """Rows of a buffer that hold something in this pass."""
        return self._picked_rows if x is self.buffers["picked"] or x is self.buffers["logits"] else self._tokens

    def _each(self, x: DeviceBuffer, kernel: str, *arguments: Place | int) -> None:
        grid = -(-self._tokens * x.width // _SMALL_THREADS)
        self.device.launch("pointwise", kernel, (grid,), _SMALL_THREADS, arguments)

    def _seen(self, name: str, buffer: DeviceBuffer) -> DeviceBuffer:
        if self.observe is not None:
            self.observe(name, self.values(buffer))
        return buffer


def _run(compute: Callable[[DeviceBuffer], DeviceBuffer], x: DeviceBuffer) -> None:
    compute(x)


def _can_round_attention(layout: KVLayout) -> bool:
    """Whether attention_rounded.cu takes keys and values that are kept so."""
    fits = layout.width % 8 == 0 and layout.width <= _TILE_WIDTH
    return fits and (layout.kind == "float16" or (layout.kind == "int8" and layout.row_bytes % 4 == 0))
