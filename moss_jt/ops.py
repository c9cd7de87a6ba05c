"""The only bridge between Jittor and the kernels of moss_jt.kernels: what a forward pass may call.

`InferenceOps` runs each step at once, in place, on buffers taken beforehand: nothing is allocated,
nothing is compiled after the first pass at any length (sizes travel as data, not as shapes), and a
loan of weights may end when the call returns. `moss_jt.ops_grad` has the same steps with gradients.
The sources are kernels/cpu/*.h, called through jt.code.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from moss_jt import paths, startup
from moss_jt.batch import Batch
from moss_jt.cache import BLOCK, KVCache
from moss_jt.config import MossConfig
from moss_jt.errors import KernelError, ShapeError
from moss_jt.language import pick
from moss_jt.layout import RowsLayout, TileLayout
from moss_jt.progress import Progress, Quiet
from moss_jt.weights import Stored, WeightStore

Floats = npt.NDArray[np.float32]

HEADERS = ("numbers.h", "linear.h", "pointwise.h", "attention.h")
MAX_HEAD_DIM = 1024  # of the kernels: one head lies on the stack
LOGIT_ROWS = 32  # rows of logits that are held at a time
_LOCAL_INCLUDE = re.compile(r'^#(include "|pragma once).*\n', re.MULTILINE)
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_STORED_KIND = {"float32": 0, "float16": 1, "bfloat16": 2}

_LINEAR = """
    moss::LinearShape s{(int64_t)data["tokens"], (int64_t)data["in"], (int64_t)data["out"], (int64_t)data["x_stride"],
        (int64_t)data["y_stride"], (int64_t)data["stored"], (int64_t)data["group"], (int64_t)data["padded_group"],
        (int64_t)data["padded_in"], (int64_t)data["groups"], (int64_t)data["scales_at"], (int64_t)data["zeros_at"],
        (int64_t)data["tile_bytes"], (int64_t)data["perm_at"], data["has_bias"] != 0, data["add"] != 0};
    moss::linear(s, in0_p, (const uint8_t*)in1_p, in2_p, out0_p, out1_p);
"""
_LINEAR_KEYS = re.findall(r'data\["(\w+)"\]', _LINEAR)
_LAYER_NORM = """
    moss::layer_norm(in0_p, in1_p, in2_p, out0_p, (int64_t)data["tokens"], (int64_t)data["width"], data["eps"]);
"""
_GELU = 'moss::gelu(out0_p, (int64_t)data["count"]);'
_ADD_BOTH = 'moss::add_both(out0_p, in0_p, in1_p, (int64_t)data["count"]);'
_ATTENTION_SHAPE = """
    moss::AttentionShape s{(int64_t)data["tokens"], (int64_t)data["heads"], (int64_t)data["width"], (int64_t)data["rotary"],
        (int64_t)data["block"], (int64_t)data["table_width"]};
"""
_ROTATE_AND_APPEND = {
    "float32": _ATTENTION_SHAPE
    + "moss::rotate_and_append(s, in0_p, in1_p, in2_p, in3_p, in4_p, out0_p, out1_p, out2_p);",
    "float16": _ATTENTION_SHAPE
    + "moss::rotate_and_append(s, in0_p, in1_p, in2_p, in3_p, in4_p, out0_p, (uint16_t*)out1_p, (uint16_t*)out2_p);",
}
_ATTEND = {
    "float32": _ATTENTION_SHAPE + "moss::attend(s, in0_p, in1_p, in2_p, in3_p, in4_p, in5_p, out0_p);",
    "float16": _ATTENTION_SHAPE
    + "moss::attend(s, in0_p, (const uint16_t*)in1_p, (const uint16_t*)in2_p, in3_p, in4_p, in5_p, out0_p);",
}


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


class Buffer:
    """Memory that numpy and Jittor both see: `array` and `var` share it."""

    def __init__(self, array: npt.NDArray[Any]) -> None:
        self.array = array
        self.var = share(array)


def share(array: npt.NDArray[Any]) -> Any:
    """A Jittor Var on the array's own memory, without a copy; the array must stay C-contiguous and alive."""
    jt = startup.import_jittor(device="cpu")
    assert array.flags.c_contiguous
    with jt.flag_scope(reuse_array=1):
        var = jt.array(array)
    var.sync()
    return var


def _aligned(shape: tuple[int, ...], dtype: str) -> npt.NDArray[Any]:
    """Zeros that start on a cache line."""
    count = int(np.prod(shape))
    raw = np.zeros(count * np.dtype(dtype).itemsize + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + count * np.dtype(dtype).itemsize].view(dtype).reshape(shape)


@cache
def _header() -> str:
    """The include line of all kernels.

    They are joined into one file whose name is a hash of its contents: Jittor keys its compiled code
    by the text of the source, so the text must change when a header does, and must not change with
    the environment; and it does not follow an include within an include.
    """
    room = resources.files("moss_jt.kernels").joinpath("cpu")
    text = "".join(_LOCAL_INCLUDE.sub("", room.joinpath(name).read_text("utf-8")) for name in HEADERS)
    path = paths.jittor_home().resolve() / "kernels" / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.h"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(f".{os.getpid()}.tmp")
        scratch.write_text(text, "utf-8")
        scratch.replace(path)
    return f'#include "{path}"\n'


def _launch(source: str, inputs: list[Any], outputs: list[Any], data: Mapping[str, float]) -> list[Any]:
    """Queue a kernel that writes `outputs` in place; what comes back must be synced."""
    jt = startup.import_jittor(device="cpu")
    numbers = {key: float(value) for key, value in data.items()}
    return list(jt.code(inputs, outputs, cpu_src=source, cpu_header=_header(), data=numbers))


def _run(source: str, inputs: list[Any], outputs: list[Any], data: Mapping[str, float]) -> None:
    """Run a kernel now; `outputs` are written in place."""
    try:
        for var in _launch(source, inputs, outputs, data):
            var.sync()
    except RuntimeError as error:
        raise KernelError(
            f"a CPU kernel failed: {_reason(str(error))} `moss-jt doctor` checks the compiler."
        ) from error


def warm_up(progress: Progress | None = None) -> None:
    """Compile every kernel that inference calls, all at once on all cores; at once where that was done before.

    Raises:
        KernelError: the compiler failed.
    """
    progress = Quiet() if progress is None else progress
    jt = startup.import_jittor(device="cpu", progress=progress)
    made_of = hashlib.sha256((_header() + jt.flags.cc_flags).encode()).hexdigest()[:16]
    done = Path(jt.flags.cache_path) / f"moss_jt.{made_of}"
    if done.is_file():
        return
    calls = _idle_calls()
    progress.begin(pick("compiling the CPU kernels (once)", "编译 CPU 算子（仅首次）"), len(calls), "kernels")
    try:
        with _stderr_kept() as report:
            waiting = [_launch(*call) for call in calls]
            for vars_ in waiting:
                for var in vars_:
                    var.sync()
                progress.advance(1)
    except RuntimeError as error:
        raise KernelError(
            f"a CPU kernel does not compile: {_reason(str(error))} `moss-jt doctor` checks the compiler."
        ) from error
    finally:
        progress.end()
    del report
    done.touch()


def _idle_calls() -> list[tuple[str, list[Any], list[Any], Mapping[str, float]]]:
    """One call of every kernel with nothing to do: the code is compiled for types, not for sizes."""

    def floats(*shape: int) -> Any:
        return share(np.zeros(shape, np.float32))

    where = [share(np.zeros(2, np.int32)), share(np.zeros(2, np.int32)), share(np.zeros((2, 2), np.int32))]
    calls: list[tuple[str, list[Any], list[Any], Mapping[str, float]]] = [
        (
            _LINEAR,
            [floats(2, 2), share(np.zeros(64, np.uint8)), floats(2)],
            [floats(2, 2), floats(2, 2)],
            dict.fromkeys(_LINEAR_KEYS, 0),
        ),
        (
            _LAYER_NORM,
            [floats(2, 2), floats(2), floats(2)],
            [floats(2, 2)],
            dict.fromkeys(("tokens", "width", "eps"), 1),
        ),
        (_GELU, [], [floats(2, 2)], {"count": 0}),
        (_ADD_BOTH, [floats(2, 2), floats(2, 2)], [floats(2, 2)], {"count": 0}),
    ]
    for kind in ("float32", "float16"):
        keys, values = (share(np.zeros((1, 1, 2, 2), kind)) for _ in range(2))
        shape = dict.fromkeys(("tokens", "heads", "width", "rotary", "block", "table_width"), 0)
        calls.append(
            (_ROTATE_AND_APPEND[kind], [floats(2, 2), floats(2, 2), *where], [floats(2, 2), keys, values], shape)
        )
        calls.append((_ATTEND[kind], [floats(2, 2), keys, values, *where], [floats(2, 2)], shape))
    return calls


@contextmanager
def _stderr_kept() -> Iterator[IO[bytes]]:
    """Keep what is written to stderr below Python (Jittor's own progress line) off the user's screen."""
    sys.stderr.flush()
    saved = os.dup(2)
    with tempfile.TemporaryFile() as kept:
        try:
            os.dup2(kept.fileno(), 2)
            yield kept
        finally:
            os.dup2(saved, 2)
            os.close(saved)


def _reason(report: str) -> str:
    """The line of Jittor's long report that says what went wrong."""
    lines = [line.strip() for line in _COLOUR.sub("", report).splitlines() if line.strip()]
    telling = [line for line in lines if "error:" in line.lower() or line.startswith("Reason:")]
    return (telling or lines or ["no reason was given."])[-1]


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


class InferenceOps:
    """The steps of a forward pass over stored weights and a KV cache, in place.

    Attributes:
        capacity: T at most, new tokens of one pass.
        observe: called with the name and values of each step's result, for tests and debugging;
            the values are a view that the next steps overwrite.
    """

    def __init__(self, config: MossConfig, store: WeightStore, kv: KVCache, *, capacity: int = 128) -> None:
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
        self._buffers = {name: Buffer(_aligned((capacity, size), "float32")) for name, size in sizes.items()}
        self._buffers["picked"] = Buffer(_aligned((LOGIT_ROWS, width), "float32"))
        self._buffers["logits"] = Buffer(_aligned((LOGIT_ROWS, config.vocab_size), "float32"))
        self._scratch = Buffer(_aligned((capacity, 2 * max(width, inner)), "float32"))
        self._nothing = Buffer(_aligned((2,), "float32"))
        self._slots = Buffer(_aligned((capacity,), "int32"))
        self._positions = Buffer(_aligned((capacity,), "int32"))
        self._table = Buffer(kv.table)
        self._sincos = Buffer(rotary_table(config))
        self._keys = {layer: share(kv.keys[layer]) for layer in kv.layers}
        self._values = {layer: share(kv.values[layer]) for layer in kv.layers}
        self._small: dict[str, Any] = {}
        self._blobs: dict[str, Any] = {}
        self._tokens = 0

    def begin(self, batch: Batch) -> None:
        """Take up a new pass.

        Raises:
            ShapeError: more tokens than `capacity`, or a position past the model's.
        """
        if not 0 < batch.size <= self.capacity:
            raise ShapeError(f"a pass takes 1 to {self.capacity} tokens; {batch.size} were given.")
        if int(batch.positions.max()) >= self.config.n_positions:
            raise ShapeError(f"position {int(batch.positions.max())} is past the model's {self.config.n_positions}.")
        self._tokens = batch.size
        self._slots.array[: batch.size] = batch.slots
        self._positions.array[: batch.size] = batch.positions

    def layer_done(self, layer: int) -> None:
        """Say that a block is through; whoever wants to break a pass off raises from `on_layer`."""
        if self.on_layer is not None:
            self.on_layer(layer)

    def embed(self, ids: npt.NDArray[np.int32], name: str) -> Buffer:
        """Rows of the embedding: (T,) ids to (T, C)."""
        x = self._buffers["x"]
        x.array[: self._tokens] = self.store.rows(name, ids)
        return self._seen("emb", x)

    def hidden(self, values: Floats) -> Buffer:
        """Take hidden states (T, C) from outside, where this model begins at a later layer."""
        x = self._buffers["x"]
        x.array[: self._tokens] = values
        return x

    def layer_norm(self, x: Buffer, name: str) -> Buffer:
        """Normalise (T, C) by the norm `name`."""
        y = self._buffers["picked" if x is self._buffers["picked"] else "normed"]
        data = {"tokens": self._rows(x), "width": self.config.n_embd, "eps": self.config.layer_norm_epsilon}
        _run(_LAYER_NORM, [x.var, self._small_var(name + ".weight"), self._small_var(name + ".bias")], [y.var], data)
        return self._seen(name, y)

    def linear(self, x: Buffer, weight: Linear, into: str) -> Buffer:
        """(T, K) to (T, N), written to the buffer `into`."""
        y = self._buffers[into]
        with self.store.use(weight.name + ".weight") as stored:
            self._multiply(x, stored, self._small_var(weight.name + ".bias") if weight.bias else None, y)
        if weight.low_rank is not None:
            self._add_low_rank(x, weight, y)
        return self._seen(weight.name, y)

    def attention(self, qkv: Buffer, layer: int) -> Buffer:
        """Rotate, append to the cache, attend: (T, 3C) to (T, C)."""
        queries, merged = self._buffers["queries"], self._buffers["merged"]
        data = {
            "tokens": self._tokens,
            "heads": self.config.n_head,
            "width": self.config.head_dim,
            "rotary": self.config.rotary_dim,
            "block": BLOCK,
            "table_width": self.cache.table.shape[1],
        }
        keys, values, kind = self._keys[layer], self._values[layer], self.cache.kind
        where = [self._slots.var, self._positions.var, self._table.var]
        _run(_ROTATE_AND_APPEND[kind], [qkv.var, self._sincos.var, *where], [queries.var, keys, values], data)
        _run(_ATTEND[kind], [queries.var, keys, values, *where], [merged.var], data)
        return self._seen(f"transformer.h.{layer}.attn.merged", merged)

    def gelu(self, x: Buffer, name: str) -> Buffer:
        """gelu_new, in place."""
        _run(_GELU, [], [x.var], {"count": self._tokens * self.config.inner_dim})
        return self._seen(name, x)

    def residual(self, x: Buffer, attn: Buffer, mlp: Buffer, name: str) -> Buffer:
        """x + attn + mlp, in place of x."""
        _run(_ADD_BOTH, [attn.var, mlp.var], [x.var], {"count": self._tokens * self.config.n_embd})
        return self._seen(name, x)

    def logits(self, x: Buffer, norm: str, head: Linear, wanted: npt.NDArray[np.int32]) -> Floats:
        """Final norm and head for the chosen tokens: (R, V) float32, a copy."""
        picked, out = self._buffers["picked"], self._buffers["logits"]
        result = np.empty((len(wanted), self.config.vocab_size), np.float32)
        for start in range(0, len(wanted), LOGIT_ROWS):
            rows = wanted[start : start + LOGIT_ROWS]
            picked.array[: len(rows)] = x.array[rows]
            self._picked_rows = len(rows)
            self.linear(self.layer_norm(picked, norm), head, "logits")
            result[start : start + len(rows)] = out.array[: len(rows)]
        return result

    def values(self, x: Buffer) -> Floats:
        """The T rows of a buffer, copied."""
        return x.array[: self._rows(x)].copy()

    _picked_rows = 0

    def _rows(self, x: Buffer) -> int:
        """Rows of a buffer that hold something in this pass."""
        return self._picked_rows if x is self._buffers["picked"] or x is self._buffers["logits"] else self._tokens

    def _small_var(self, name: str) -> Any:
        if name not in self._small:
            self._small[name] = share(self.store.small(name))
        return self._small[name]

    def _blob(self, stored: Stored) -> Any:
        """The Var on a loan's bytes; one is kept as long as the bytes stay where they are."""
        kept = self._blobs.get(stored.name)
        if kept is None or kept[0] != stored.data.ctypes.data:
            kept = (stored.data.ctypes.data, share(stored.data))
            self._blobs[stored.name] = kept
        return kept[1]

    def _multiply(self, x: Buffer, stored: Stored, bias: Any, y: Buffer, *, add: bool = False) -> None:
        data = _linear_data(stored.layout) | {
            "tokens": self._rows(x),
            "x_stride": x.array.shape[1],
            "y_stride": y.array.shape[1],
            "has_bias": bias is not None,
            "add": add,
        }
        if data["padded_in"] > self._scratch.array.shape[1]:
            self._scratch = Buffer(_aligned((self.capacity, int(data["padded_in"])), "float32"))
        unused = self._nothing.var
        _run(_LINEAR, [x.var, self._blob(stored), unused if bias is None else bias], [y.var, self._scratch.var], data)

    def _add_low_rank(self, x: Buffer, weight: Linear, y: Buffer) -> None:
        assert weight.low_rank is not None
        with self.store.use(weight.low_rank[0]) as a, self.store.use(weight.low_rank[1]) as b:
            rank = a.layout.shape[0]
            middle = self._buffers.get(f"rank{rank}")
            if middle is None:
                middle = self._buffers[f"rank{rank}"] = Buffer(_aligned((self.capacity, rank), "float32"))
            self._multiply(x, a, None, middle)
            middle.array[: self._rows(x)] *= np.float32(weight.low_rank_scale)
            self._multiply(middle, b, None, y, add=True)

    def _seen(self, name: str, buffer: Buffer) -> Buffer:
        if self.observe is not None:
            self.observe(name, buffer.array[: self._rows(buffer)])
        return buffer


def _linear_data(layout: RowsLayout | TileLayout) -> dict[str, float]:
    """What the kernel must know of a stored matrix."""
    n, k = layout.shape
    if isinstance(layout, RowsLayout):
        unused = dict.fromkeys(
            ("group", "padded_group", "padded_in", "groups", "scales_at", "zeros_at", "tile_bytes"), 0
        )
        return {**unused, "in": k, "out": n, "stored": _STORED_KIND[layout.dtype], "perm_at": -1}
    return {
        "in": k,
        "out": n,
        "stored": layout.bits,
        "group": layout.group_size,
        "padded_group": layout.padded_group,
        "padded_in": layout.padded_in,
        "groups": layout.n_groups,
        "scales_at": layout.code_bytes,
        "zeros_at": layout.code_bytes + layout.scale_bytes,
        "tile_bytes": layout.tile_bytes,
        "perm_at": layout.perm_offset if layout.permuted else -1,
    }
