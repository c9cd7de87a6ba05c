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
)
from moss_jt.layout import RowsLayout, TileLayout
from moss_jt.plan import buffer_widths
from moss_jt.weights import WeightStore

Floats = npt.NDArray[np.float32]

MAX_HEAD_DIM = 1024  # of the kernels: one head lies on the stack
LOGIT_ROWS = 32  # rows of logits that are held at a time
ROUND_BLOCK = 128  # positions, at most, that share a step when activations are rounded; of the kernels: up to 128
# versions of the rounded product
PROCESSORS = {"best": 0, "plain": 1, "avx2": 2, "avx-vnni": 3, "avx512-vnni": 4, "amx-int8": 5}
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


@dataclass(frozen=True)
class _Recorded:
    """The steps of a block, what they hold for, and where they leave their result."""

    state: tuple[Hashable, ...]
    steps: bytes
    result: Buffer


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
        self.buffers = {
            name: Buffer(aligned((capacity, size), "float32")) for name, size in buffer_widths(config).items()
        }
        self.buffers["picked"] = Buffer(aligned((LOGIT_ROWS, config.n_embd), "float32"))
        self.buffers["logits"] = Buffer(aligned((LOGIT_ROWS, config.vocab_size), "float32"))
        self._scratch = Buffer(aligned((2, 2), "float32"))  # grows to the widest permuted matrix
        self._nothing = Buffer(aligned((2,), "float32"))
        self._slots = Buffer(aligned((max(capacity, 2),), "int32"))
        self._positions = Buffer(aligned((max(capacity, 2),), "int32"))
        self._table = Buffer(kv.table)
        self.sincos = Buffer(rotary_table(config))
        self._kv_address = kv.memory.ctypes.data
        self._stretches = Buffer(aligned((max(2, _shared_floats(config)),), "float32"))
        self._attention_shapes = self._shapes_of_attention()
        self.rounding, self.processor = rounding, "best"
        self._rounded = _RoundedInputs(2, 2)
        self._small: dict[str, Buffer] = {}
        self._memory: dict[int, Buffer] = {}
        self._steps = Steps()
        self._recorded: dict[str, _Recorded] = {}
        self._rooms = 0  # how often room for inputs was taken anew
        self._store_version = store.version
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
        self.store.begin_pass()
        if self._store_version != self.store.version:
            self._small.clear()
            self._memory.clear()
            self._store_version = self.store.version
        self._tokens = batch.size
        self._slots.array[: batch.size] = batch.slots
        self._positions.array[: batch.size] = batch.positions
        self._attention_shapes.array[:, 0] = batch.size
        self._attention_shapes.array[:, -1] = self.processor == "plain"

    def layer_done(self, layer: int) -> None:
        """Finish a block and say so; whoever wants to break a pass off raises from `on_layer`."""
        self._steps.run()
        if self.on_layer is not None:
            self.on_layer(layer)

    def block(self, name: str, compute: Callable[[Buffer], Buffer], x: Buffer) -> Buffer:
        """A block of the network. Its steps are those of the last time, if nothing has changed that they name."""
        state = (self._tokens, self.store.version, self._rooms, self.rounding, self.processor, self.observe)
        recorded = self._recorded.get(name)
        if recorded is not None and recorded.state == state:
            self._steps.repeat(recorded.steps)
            return recorded.result
        self._steps.run()
        self._steps.record()
        result = compute(x)
        steps = self._steps.recorded()
        if steps is not None:
            state = (*state[:2], self._rooms, *state[3:])
            self._recorded[name] = _Recorded(state, steps, result)
        return result

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
        data = {"tokens": self._rows(x), "width": self.config.n_embd, "eps": self.config.layer_norm_epsilon}
        values = [self._small_address(f"{name}.{kind}") for kind in ("weight", "bias")]
        self._steps.add(LAYER_NORM, [x.address, *values], [y.address], data)
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
        shape = (
            self._attention_shapes.address + self.cache.layers.index(layer) * self._attention_shapes.array.strides[0]
        )
        where = [self._slots.address, self._positions.address, self._table.address]
        append = [shape, qkv.address, self.sincos.address, *where]
        self._steps.add(ROTATE_AND_APPEND, append, [queries.address, self._kv_address])
        attend = [shape, queries.address, self._kv_address, *where]
        self._steps.add(ATTEND, attend, [merged.address, self._stretches.address])
        return self._seen(f"transformer.h.{layer}.attn.merged", merged)

    def gelu(self, x: Buffer, name: str) -> Buffer:
        """gelu_new, in place."""
        self._steps.add(GELU, [], [x.address], {"count": self._tokens * self.config.inner_dim})
        return self._seen(name, x)

    def residual(self, x: Buffer, attn: Buffer, mlp: Buffer, name: str) -> Buffer:
        """x + attn + mlp, in place of x."""
        count = self._tokens * self.config.n_embd
        self._steps.add(ADD_BOTH, [attn.address, mlp.address], [x.address], {"count": count})
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

    def more_logits(self, norm: str, head: Linear, wanted: npt.NDArray[np.int32]) -> Floats:
        """The same for other tokens of the pass that has just run."""
        return self.logits(self.buffers["x"], norm, head, wanted)

    def values(self, x: Buffer) -> Floats:
        """The T rows of a buffer, copied."""
        self._steps.run()
        return x.array[: self._rows(x)].copy()

    def _shapes_of_attention(self) -> Buffer:
        """The AttentionShape of the kernel for each layer, but for the tokens: (layers, ATTENTION_NUMBERS)."""
        kv, table_width = self.cache.layout, self.cache.table.shape[1]
        stored = (_KV_KIND[kv.kind], kv.steps, STEP_CHANNELS)
        rows = []
        for index in range(len(self.cache.layers)):
            at = index * kv.layer_bytes
            where = (BLOCK, table_width, kv.block_bytes, kv.row_bytes, at, at + kv.layer_bytes // 2)
            rows.append((0, kv.heads, kv.width, self.config.rotary_dim, *where, *stored, self._stretches.array.size, 0))
        shapes = np.array(rows, np.int64)
        assert shapes.shape[1] == ATTENTION_NUMBERS
        return Buffer(shapes)

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

    def _multiply(self, x: Buffer, name: str, bias: int | None, y: Buffer, *, add: bool = False) -> None:
        """Line up a product. What passes through the ring is multiplied before the next piece is asked for."""
        layout = self.store.layout(name)
        inputs: tuple[int, ...]
        if self.rounding and isinstance(layout, TileLayout):
            kernel, inputs, stride = LINEAR_ROUNDED, self._round(x, name, layout), 0
        else:
            kernel, (inputs, stride) = LINEAR, self._stored_order(x, name)
        data = layout_data(layout) | {
            "tokens": self._rows(x),
            "x_stride": stride,
            "y_stride": y.array.shape[1],
            "has_bias": bias is not None,
            "add": add,
            "block": ROUND_BLOCK,
            "processor": PROCESSORS[self.processor],
        }
        first, *more = inputs
        for piece in self.store.pieces(name):
            data |= {"blob_at": piece.start, "first": piece.first, "out": piece.count}
            blob = self._memory_address(piece.data)
            self._steps.add(kernel, [first, blob, bias or self._nothing.address, *more], [y.address], data)
            if not piece.stays or piece.count < layout.shape[0]:
                self._steps.run()

    def _round(self, x: Buffer, name: str, layout: TileLayout) -> tuple[int, int, int]:
        """Codes, steps and sums of the inputs, in the order in which a matrix holds them."""
        perm = self.store.perm(name)
        wide, blocks = layout.padded_in, layout.n_groups * -(-layout.padded_group // ROUND_BLOCK)
        if not self._rounded.hold(self.capacity * wide, self.capacity * blocks):
            self._steps.run()  # the room that there was goes
            self._rooms += 1
            self._rounded = _RoundedInputs(self.capacity * wide, self.capacity * blocks)
        data = {
            "tokens": self._rows(x),
            "x_stride": x.array.shape[1],
            "padded_in": wide,
            "padded_group": layout.padded_group,
            "block": ROUND_BLOCK,
            "permuted": perm is not None,
        }
        order = self._slots.address if perm is None else self._perm_address(name, perm)
        self._steps.add(ROUND_ACTIVATIONS, [x.address, order], self._rounded.addresses, data)
        return self._rounded.addresses

    def _stored_order(self, x: Buffer, name: str) -> tuple[tuple[int], int]:
        """The inputs in the order in which a matrix holds them, and floats from token to token."""
        perm = self.store.perm(name)
        if perm is None:
            return (x.address,), x.array.shape[1]
        if len(perm) > self._scratch.array.shape[1]:
            self._steps.run()  # the scratch that there was goes
            self._rooms += 1
            self._scratch = Buffer(aligned((self.capacity, len(perm)), "float32"))
        data = {"tokens": self._rows(x), "x_stride": x.array.shape[1], "padded_in": len(perm)}
        self._steps.add(PERMUTE, [x.address, self._perm_address(name, perm)], [self._scratch.address], data)
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
