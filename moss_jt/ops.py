"""What a forward pass may call: the steps over stored weights and a KV cache.

`InferenceOps` lines the steps up and runs those of a layer in one launch, in place, on buffers taken
beforehand: nothing is allocated, nothing is compiled after the first pass at any length. A matrix comes
piece by piece, cut along its output rows, and a piece may be gone when the next one comes; the bits are
the same for every cut. `moss_jt.ops_grad` has the same steps with gradients, `moss_jt.launch` the kernels.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moss_jt.batch import Batch
from moss_jt.cache import BLOCK, KVCache
from moss_jt.config import MossConfig
from moss_jt.errors import ShapeError
from moss_jt.kv_layout import STEP_CHANNELS
from moss_jt.launch import (
    ADD_BOTH,
    ATTEND,
    ATTENTION_NUMBERS,
    GELU,
    LAYER_NORM,
    LINEAR,
    LINEAR_ROUNDED,
    PERMUTE,
    ROTATE_AND_APPEND,
    ROUND_ACTIVATIONS,
    Buffer,
    Steps,
    aligned,
    pack_step,
)
from moss_jt.layout import RowsLayout, TileLayout
from moss_jt.weights import Piece, WeightStore

Floats = npt.NDArray[np.float32]

MAX_HEAD_DIM = 1024  # of the kernels: one head lies on the stack
MOST_PACKED = 1024  # steps that are kept packed, half a KB each
LOGIT_ROWS = 32  # rows of logits that are held at a time
ROUND_BLOCK = 128  # positions, at most, that share a step when activations are rounded; of the kernels: up to 128
PROCESSORS = {"best": 0, "plain": 1, "avx2": 2, "avx-vnni": 3, "avx512-vnni": 4}  # versions of the rounded product
STRETCH = 256  # positions after which attention begins a partial result; of the kernels
_KV_KIND = {"float32": 0, "float16": 1, "int8": 2}
_STORED_KIND = {"float32": 0, "float16": 1, "bfloat16": 2}


@dataclass(frozen=True)
class Linear:
    """A linear layer by name: y = x W^T + bias + scale * (x A^T) B^T.

    Attributes:
        name: of the tensors, without ".weight" and ".bias".
        bias: whether there is one.
        low_rank: names of A (r, K) and B (N, r) in the store, or None; an adapter puts them there.
        low_rank_scale: their factor.
    """

    name: str
    bias: bool = False
    low_rank: tuple[str, str] | None = None
    low_rank_scale: float = 1.0


def rotary_table(config: MossConfig) -> Floats:
    """Sines, then cosines, of every position: (n_positions, rotary_dim) float32.

    The frequencies are float32 as in the original's unconverted table; its half-precision variants
    (quantised and multi-GPU runs) are off by up to 0.76 at the last position.

    Source: Su et al. 2021, arXiv:2104.09864, section 3.4.2.
    """
    exponents = np.arange(0, config.rotary_dim, 2, dtype=np.float32) / np.float32(config.rotary_dim)
    frequencies = (1.0 / np.power(10000.0, exponents.astype(np.float64)).astype(np.float32)).astype(np.float32)
    angles = np.arange(config.n_positions, dtype=np.float32)[:, None] * frequencies
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1, dtype=np.float32)


class _RoundedInputs:
    """Room for activations rounded to int8: codes, and a step and a sum for every block of them."""

    def __init__(self, codes: int, blocks: int) -> None:
        self.codes = Buffer(aligned((codes,), "int8"))
        self.steps = Buffer(aligned((blocks,), "float32"))
        self.sums = Buffer(aligned((blocks,), "int32"))
        self.addresses = (self.codes.address, self.steps.address, self.sums.address)

    def hold(self, codes: int, blocks: int) -> bool:
        """Whether there is room for so many."""
        return codes <= self.codes.array.size and blocks <= self.steps.array.size


def _shared_floats(config: MossConfig) -> int:
    """Floats of the partial results where many threads share the heads of few tokens; 0 where they never do."""
    items = 4 * len(os.sched_getaffinity(0))  # kItemsPerThread of the kernel
    if items <= config.n_head:
        return 0
    return items * -(-config.n_positions // STRETCH) * (config.head_dim + 10)


class InferenceOps:
    """The steps of a forward pass over stored weights and a KV cache, in place.

    What a step gives is there when `values` or `logits` has been asked for, or a layer is done.

    Attributes:
        capacity: T at most, new tokens of one pass.
        buffers: the results of the steps by name, (capacity, width).
        sincos: the rotary table.
        observe: called with the name and values of each step's result, for tests and debugging;
            the values are a view that the next steps overwrite.
        rounding: whether products with int4 and int8 matrices round their inputs to int8.
        processor: which version of those products runs, of PROCESSORS; where it cannot, the best that can.
    """

    def __init__(
        self, config: MossConfig, store: WeightStore, kv: KVCache, *, capacity: int = 128, rounding: bool = False
    ) -> None:
        if config.head_dim > MAX_HEAD_DIM:
            raise ShapeError(f"heads are {config.head_dim} wide; the CPU kernels take up to {MAX_HEAD_DIM}.")
        self.config, self.store, self.cache, self.capacity = config, store, kv, capacity
        self.observe: Callable[[str, Floats], None] | None = None
        self.on_layer: Callable[[int], None] | None = None
        width, inner = config.n_embd, config.inner_dim
        sizes = {
            "x": width,
            "normed": width,
            "qkv": 3 * width,
            "queries": width,
            "merged": width,
            "attn": width,
            "inner": inner,
            "mlp": width,
        }
        self.buffers = {name: Buffer(aligned((capacity, size), "float32")) for name, size in sizes.items()}
        self.buffers["picked"] = Buffer(aligned((LOGIT_ROWS, width), "float32"))
        self.buffers["logits"] = Buffer(aligned((LOGIT_ROWS, config.vocab_size), "float32"))
        self._scratch = Buffer(aligned((2, 2), "float32"))  # grows to the widest permuted matrix
        self._nothing = Buffer(aligned((2,), "float32"))
        self._slots = Buffer(aligned((max(capacity, 2),), "int32"))
        self._positions = Buffer(aligned((max(capacity, 2),), "int32"))
        self._table = Buffer(kv.table)
        self.sincos = Buffer(rotary_table(config))
        self._kv_address = kv.memory.ctypes.data
        self._stretches = Buffer(aligned((max(2, _shared_floats(config)),), "float32"))
        self._attention_shapes = {
            layer: self._attention_shape(index * kv.layout.layer_bytes) for index, layer in enumerate(kv.layers)
        }
        self.rounding, self.processor = rounding, "best"
        self._rounded = _RoundedInputs(2, 2)
        self._small: dict[str, Buffer] = {}
        self._memory: dict[int, Buffer] = {}
        self._steps = Steps()
        self._packed: dict[Hashable, bytes] = {}  # steps of passes over `_packed_tokens` tokens, by what they do
        self._packed_tokens = 0
        self._tokens = self._picked_rows = 0

    def begin(self, batch: Batch) -> None:
        """Take up a new pass.

        Raises:
            ShapeError: more tokens than `capacity`, or a position past the model's.
        """
        if not 0 < batch.size <= self.capacity:
            raise ShapeError(f"a pass takes 1 to {self.capacity} tokens; {batch.size} were given.")
        if int(batch.positions.max()) >= self.config.n_positions:
            raise ShapeError(f"position {int(batch.positions.max())} is past the model's {self.config.n_positions}.")
        self._steps.clear()  # of a pass that was broken off
        if batch.size != self._packed_tokens or len(self._packed) > MOST_PACKED:
            self._packed.clear()
            self._packed_tokens = batch.size
        self.store.begin_pass()
        self._tokens = batch.size
        self._slots.array[: batch.size] = batch.slots
        self._positions.array[: batch.size] = batch.positions

    def layer_done(self, layer: int) -> None:
        """Finish a block and say so; whoever wants to break a pass off raises from `on_layer`."""
        self._steps.run()
        if self.on_layer is not None:
            self.on_layer(layer)

    def embed(self, ids: npt.NDArray[np.int32], name: str) -> Buffer:
        """Rows of the embedding: (T,) ids to (T, C)."""
        x = self.buffers["x"]
        x.array[: self._tokens] = self.store.rows(name, ids)
        return self._seen("emb", x)

    def hidden(self, values: Floats) -> Buffer:
        """Take hidden states (T, C) from outside, where this model begins at a later layer."""
        x = self.buffers["x"]
        x.array[: self._tokens] = values
        return x

    def layer_norm(self, x: Buffer, name: str) -> Buffer:
        """Normalise (T, C) by the norm `name`."""
        y = self.buffers["picked" if x is self.buffers["picked"] else "normed"]
        rows = self._rows(x)

        def step() -> bytes:
            data = {"tokens": rows, "width": self.config.n_embd, "eps": self.config.layer_norm_epsilon}
            values = [self._small_address(f"{name}.{kind}") for kind in ("weight", "bias")]
            return pack_step(LAYER_NORM, [x.address, *values], [y.address], data)

        self._line_up((name, rows, x.address), step)
        return self._seen(name, y)

    def linear(self, x: Buffer, weight: Linear, into: str) -> Buffer:
        """(T, K) to (T, N), written to the buffer `into`."""
        y = self.buffers[into]
        bias = self._small_address(weight.name + ".bias") if weight.bias else None
        self._multiply(x, weight.name + ".weight", bias, y)
        if weight.low_rank is not None:
            self._add_low_rank(x, weight, y)
        return self._seen(weight.name, y)

    def attention(self, qkv: Buffer, layer: int) -> Buffer:
        """Rotate, append to the cache, attend: (T, 3C) to (T, C)."""
        queries, merged = self.buffers["queries"], self.buffers["merged"]
        shape = self._attention_shapes[layer]
        shape.array[0], shape.array[-1] = self._tokens, self.processor == "plain"
        where = [self._slots.address, self._positions.address, self._table.address]

        def append() -> bytes:
            inputs = [shape.address, qkv.address, self.sincos.address, *where]
            return pack_step(ROTATE_AND_APPEND, inputs, [queries.address, self._kv_address])

        def attend() -> bytes:
            inputs = [shape.address, queries.address, self._kv_address, *where]
            return pack_step(ATTEND, inputs, [merged.address, self._stretches.address])

        self._line_up((ROTATE_AND_APPEND, layer, qkv.address), append)
        self._line_up((ATTEND, layer), attend)
        return self._seen(f"transformer.h.{layer}.attn.merged", merged)

    def gelu(self, x: Buffer, name: str) -> Buffer:
        """gelu_new, in place."""
        count = {"count": self._tokens * self.config.inner_dim}
        self._line_up((GELU, x.address), lambda: pack_step(GELU, [], [x.address], count))
        return self._seen(name, x)

    def residual(self, x: Buffer, attn: Buffer, mlp: Buffer, name: str) -> Buffer:
        """x + attn + mlp, in place of x."""
        count = {"count": self._tokens * self.config.n_embd}
        inputs = (attn.address, mlp.address)
        self._line_up((ADD_BOTH, x.address, *inputs), lambda: pack_step(ADD_BOTH, inputs, [x.address], count))
        return self._seen(name, x)

    def logits(self, x: Buffer, norm: str, head: Linear, wanted: npt.NDArray[np.int32]) -> Floats:
        """Final norm and head for the chosen tokens: (R, V) float32, a copy."""
        picked, out = self.buffers["picked"], self.buffers["logits"]
        result = np.empty((len(wanted), self.config.vocab_size), np.float32)
        self._steps.run()
        for start in range(0, len(wanted), LOGIT_ROWS):
            rows = wanted[start : start + LOGIT_ROWS]
            picked.array[: len(rows)] = x.array[rows]
            self._picked_rows = len(rows)
            self.linear(self.layer_norm(picked, norm), head, "logits")
            self._steps.run()
            result[start : start + len(rows)] = out.array[: len(rows)]
        return result

    def values(self, x: Buffer) -> Floats:
        """The T rows of a buffer, copied."""
        self._steps.run()
        return x.array[: self._rows(x)].copy()

    def _attention_shape(self, at: int) -> Buffer:
        """The AttentionShape of the kernel, but for the tokens, where the layer begins at byte `at` of a block."""
        kv, table_width = self.cache.layout, self.cache.table.shape[1]
        where = (BLOCK, table_width, kv.block_bytes, kv.row_bytes, at, at + kv.layer_bytes // 2)
        stored = (_KV_KIND[kv.kind], kv.steps, STEP_CHANNELS)
        numbers = (0, kv.heads, kv.width, self.config.rotary_dim, *where, *stored, self._stretches.array.size, 0)
        assert len(numbers) == ATTENTION_NUMBERS
        return Buffer(np.array(numbers, np.int64))

    def _rows(self, x: Buffer) -> int:
        """Rows of a buffer that hold something in this pass."""
        return self._picked_rows if x is self.buffers["picked"] or x is self.buffers["logits"] else self._tokens

    def _small_address(self, name: str) -> int:
        if name not in self._small:
            self._small[name] = Buffer(self.store.small(name))
        return self._small[name].address

    def _memory_address(self, data: npt.NDArray[np.uint8]) -> int:
        """Of memory in which pieces of matrices lie; the store keeps few of them, for long."""
        kept = self._memory.get(id(data))
        if kept is None:
            kept = self._memory[id(data)] = Buffer(data)
        return kept.address

    def _line_up(self, key: Hashable, make: Callable[[], bytes]) -> None:
        """A step that passes over as many tokens repeat: packed once, `key` tells it from the others."""
        step = self._packed.get(key)
        if step is None:
            step = self._packed[key] = make()
        self._steps.add(step)

    def _multiply(self, x: Buffer, name: str, bias: int | None, y: Buffer, *, add: bool = False) -> None:
        """Line up a product. What passes through the ring is multiplied before the next piece is asked for."""
        layout, rows = self.store.layout(name), self._rows(x)
        rounds = False
        inputs: tuple[int, ...]
        if self.rounding and isinstance(layout, TileLayout):
            rounds = True
            inputs, stride = self._round(x, name, layout), 0
        else:
            inputs, stride = self._stored_order(x, name)
        bias = self._nothing.address if bias is None else bias
        same = (name, rows, rounds, self.processor, *inputs, y.address, add)
        for piece in self.store.pieces(name):

            def step(piece: Piece = piece) -> bytes:
                data = layout_data(layout) | _product_data(piece, rows, stride, y, self.processor)
                data |= {"has_bias": bias != self._nothing.address, "add": add}
                first, *more = inputs
                blob = self._memory_address(piece.data)
                return pack_step(LINEAR_ROUNDED if rounds else LINEAR, [first, blob, bias, *more], [y.address], data)

            if piece.stays:
                self._line_up((*same, id(piece.data), piece.start, piece.first, piece.count), step)
            else:
                self._steps.add(step())
            if not piece.stays or piece.count < layout.shape[0]:
                self._steps.run()

    def _round(self, x: Buffer, name: str, layout: TileLayout) -> tuple[int, int, int]:
        """Codes, steps and sums of the inputs, in the order in which a matrix holds them."""
        perm = self.store.perm(name)
        wide, blocks = layout.padded_in, layout.n_groups * -(-layout.padded_group // ROUND_BLOCK)
        if not self._rounded.hold(self.capacity * wide, self.capacity * blocks):
            self._steps.run()  # the room that there was goes
            self._packed.clear()
            self._rounded = _RoundedInputs(self.capacity * wide, self.capacity * blocks)
        rows = self._rows(x)

        def step() -> bytes:
            data = {
                "tokens": rows,
                "x_stride": x.array.shape[1],
                "padded_in": wide,
                "padded_group": layout.padded_group,
                "block": ROUND_BLOCK,
                "permuted": perm is not None,
            }
            order = self._slots.address if perm is None else self._perm_address(name, perm)
            return pack_step(ROUND_ACTIVATIONS, [x.address, order], self._rounded.addresses, data)

        self._line_up((ROUND_ACTIVATIONS, name, rows, x.address), step)
        return self._rounded.addresses

    def _stored_order(self, x: Buffer, name: str) -> tuple[tuple[int], int]:
        """The inputs in the order in which a matrix holds them, and floats from token to token."""
        perm = self.store.perm(name)
        if perm is None:
            return (x.address,), x.array.shape[1]
        if len(perm) > self._scratch.array.shape[1]:
            self._steps.run()  # the scratch that there was goes
            self._packed.clear()
            self._scratch = Buffer(aligned((self.capacity, len(perm)), "float32"))
        rows = self._rows(x)

        def step() -> bytes:
            data = {"tokens": rows, "x_stride": x.array.shape[1], "padded_in": len(perm)}
            return pack_step(PERMUTE, [x.address, self._perm_address(name, perm)], [self._scratch.address], data)

        self._line_up((PERMUTE, name, rows, x.address), step)
        return (self._scratch.address,), len(perm)

    def _perm_address(self, name: str, perm: npt.NDArray[np.int32]) -> int:
        if name not in self._small:
            self._small[name] = Buffer(perm)
        return self._small[name].address

    def _add_low_rank(self, x: Buffer, weight: Linear, y: Buffer) -> None:
        assert weight.low_rank is not None
        a, b = weight.low_rank
        rank = self.store.layout(a).shape[0]
        middle = self.buffers.get(f"rank{rank}")
        if middle is None:
            middle = self.buffers[f"rank{rank}"] = Buffer(aligned((self.capacity, rank), "float32"))
        self._multiply(x, a, None, middle)
        self._steps.run()
        middle.array[: self._rows(x)] *= np.float32(weight.low_rank_scale)
        self._multiply(middle, b, None, y, add=True)

    def _seen(self, name: str, buffer: Buffer) -> Buffer:
        if self.observe is not None:
            self._steps.run()
            self.observe(name, buffer.array[: self._rows(buffer)])
        return buffer


def _product_data(piece: Piece, rows: int, x_stride: int, y: Buffer, processor: str) -> dict[str, float]:
    """What the kernels must know of a product with a piece, its layout apart."""
    return {
        "tokens": rows,
        "x_stride": x_stride,
        "y_stride": y.array.shape[1],
        "blob_at": piece.start,
        "first": piece.first,
        "out": piece.count,
        "block": ROUND_BLOCK,
        "processor": PROCESSORS[processor],
    }


def layout_data(layout: RowsLayout | TileLayout) -> dict[str, float]:
    """What the kernels must know of a stored matrix, its rows apart."""
    k = layout.shape[1]
    if isinstance(layout, RowsLayout):
        unused = dict.fromkeys(
            ("group", "padded_group", "padded_in", "groups", "scales_at", "zeros_at", "tile_bytes"), 0
        )
        return {**unused, "in": k, "stored": _STORED_KIND[layout.dtype]}
    return {
        "in": k,
        "stored": layout.bits,
        "group": layout.group_size,
        "padded_group": layout.padded_group,
        "padded_in": layout.padded_in,
        "groups": layout.n_groups,
        "scales_at": layout.code_bytes,
        "zeros_at": layout.code_bytes + layout.scale_bytes,
        "tile_bytes": layout.tile_bytes,
    }
