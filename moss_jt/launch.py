"""The C++ kernels of moss_jt.kernels inside Jittor: the only place that hands them over, and that launches them.

A kernel runs at once and in place, on arrays that numpy and Jittor share. Sizes travel as data and not as
shapes, so each kernel is compiled once, by `warm_up`, for all lengths.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moss_jt import paths, startup
from moss_jt.errors import KernelError
from moss_jt.language import pick
from moss_jt.progress import Progress, Quiet

HEADERS = (
    "numbers.h",
    "matrix.h",
    "rows.h",
    "linear.h",
    "transposed.h",
    "rounding.h",
    "rounded_plain.h",
    "rounded_x86.h",
    "rounded_vnni.h",
    "rounded.h",
    "pointwise.h",
    "ordered.h",
    "kv_store.h",
    "kv_store_x86.h",
    "attention.h",
)
_LOCAL_INCLUDE = re.compile(r'^#(include "|pragma once).*\n', re.MULTILINE)
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")

LINEAR = """
    moss::LinearShape s{(int64_t)data["tokens"], (int64_t)data["in"], (int64_t)data["out"], (int64_t)data["blob_at"],
        (int64_t)data["first"], (int64_t)data["x_stride"], (int64_t)data["y_stride"], (int64_t)data["stored"],
        (int64_t)data["group"], (int64_t)data["padded_group"], (int64_t)data["padded_in"], (int64_t)data["groups"],
        (int64_t)data["scales_at"], (int64_t)data["zeros_at"], (int64_t)data["tile_bytes"], data["has_bias"] != 0,
        data["add"] != 0};
    moss::linear(s, in0_p, (const uint8_t*)in1_p, in2_p, out0_p);
"""
PERMUTE = """
    moss::permute(in0_p, in1_p, out0_p, (int64_t)data["tokens"], (int64_t)data["x_stride"], (int64_t)data["padded_in"]);
"""
_LINEAR_KEYS = re.findall(r'data\["(\w+)"\]', LINEAR)
TURN_PRODUCT = LINEAR.replace(
    "moss::linear(s, in0_p, (const uint8_t*)in1_p, in2_p, out0_p);",
    "moss::turn_product(s, in0_p, (const uint8_t*)in1_p, out0_p);",
)
TURN_BACK = """
    moss::turn_back(in0_p, in1_p, out0_p, (int64_t)data["tokens"], (int64_t)data["columns"], (int64_t)data["x_stride"],
        data["permuted"] != 0);
"""
ROUND_ACTIVATIONS = """
    moss::RoundingShape s{(int64_t)data["tokens"], (int64_t)data["x_stride"], (int64_t)data["padded_in"],
        (int64_t)data["padded_group"], (int64_t)data["block"], data["permuted"] != 0};
    moss::round_activations(s, in0_p, in1_p, out0_p, out1_p, out2_p);
"""
LINEAR_ROUNDED = LINEAR.replace(
    "moss::linear(s, in0_p, (const uint8_t*)in1_p, in2_p, out0_p);",
    """moss::linear_rounded(s, in0_p, (const uint8_t*)in1_p, in2_p, in3_p, in4_p, out0_p, (int64_t)data["block"],
        (int)data["processor"]);""",
)
LAYER_NORM = """
    moss::layer_norm(in0_p, in1_p, in2_p, out0_p, (int64_t)data["tokens"], (int64_t)data["width"], data["eps"]);
"""
GELU = 'moss::gelu(out0_p, (int64_t)data["count"]);'
ADD_BOTH = 'moss::add_both(out0_p, in0_p, in1_p, (int64_t)data["count"]);'
# Fifteen numbers as data would take longer to hand over than a short attention takes: they are the bytes of a Var.
_ATTENTION_SHAPE = """
    moss::AttentionShape s;
    std::memcpy(&s, in0_p, sizeof s);
"""
ATTENTION_NUMBERS = 15  # int64
ROTATE_AND_APPEND = (
    _ATTENTION_SHAPE + "moss::rotate_and_append(s, in1_p, in2_p, in3_p, in4_p, in5_p, out0_p, (uint8_t*)out1_p);"
)
ATTEND = _ATTENTION_SHAPE + "moss::attend(s, in1_p, (const uint8_t*)in2_p, in3_p, in4_p, in5_p, out0_p, out1_p);"


_ALONE = threading.RLock()


@contextmanager
def computing() -> Iterator[None]:
    """Have Jittor to oneself, without gradients: its flags and its queue belong to the whole process, not to a thread."""
    with _ALONE, startup.import_jittor(device="cpu").flag_scope(no_grad=1):
        yield


class Buffer:
    """Memory that numpy and Jittor both see: `array` and `var` share it."""

    def __init__(self, array: npt.NDArray[Any]) -> None:
        self.array = array
        self.var = share(array)


def share(array: npt.NDArray[Any]) -> Any:
    """A Jittor Var on the array's own memory, without a copy, which keeps the array alive.

    The array must be C-contiguous, and not of shape (1,): that Jittor takes for a constant, copies, and compiles.
    """
    jt = startup.import_jittor(device="cpu")
    assert array.flags.c_contiguous and array.shape != (1,)
    with _ALONE, jt.flag_scope(reuse_array=1):
        var = jt.array(array)
    var.sync()
    return var


def aligned(shape: tuple[int, ...], dtype: str) -> npt.NDArray[Any]:
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


def run(source: str, inputs: list[Any], outputs: list[Any], data: Mapping[str, float]) -> None:
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
        with _ALONE, _stderr_away():
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
    done.touch()


def _idle_calls() -> list[tuple[str, list[Any], list[Any], Mapping[str, float]]]:
    """One call of every kernel with nothing to do: the code is compiled for types, not for sizes."""

    def floats(*shape: int) -> Any:
        return share(np.zeros(shape, np.float32))

    where = [share(np.zeros(2, np.int32)), share(np.zeros(2, np.int32)), share(np.zeros((2, 2), np.int32))]
    calls: list[tuple[str, list[Any], list[Any], Mapping[str, float]]] = [
        (
            LINEAR,
            [floats(2, 2), share(np.zeros(64, np.uint8)), floats(2)],
            [floats(2, 2)],
            dict.fromkeys(_LINEAR_KEYS, 0),
        ),
        (
            ROUND_ACTIVATIONS,
            [floats(2, 2), where[0]],
            [share(np.zeros(2, np.int8)), floats(2), where[1]],
            dict.fromkeys(("tokens", "x_stride", "padded_in", "padded_group", "block", "permuted"), 0),
        ),
        (
            LINEAR_ROUNDED,
            [share(np.zeros(2, np.int8)), share(np.zeros(64, np.uint8)), floats(2), floats(2), where[0]],
            [floats(2, 2)],
            dict.fromkeys((*_LINEAR_KEYS, "block", "processor"), 0),
        ),
        (PERMUTE, [floats(2, 2), where[0]], [floats(2, 2)], dict.fromkeys(("tokens", "x_stride", "padded_in"), 0)),
        (
            LAYER_NORM,
            [floats(2, 2), floats(2), floats(2)],
            [floats(2, 2)],
            dict.fromkeys(("tokens", "width", "eps"), 1),
        ),
        (GELU, [], [floats(2, 2)], {"count": 0}),
        (ADD_BOTH, [floats(2, 2), floats(2, 2)], [floats(2, 2)], {"count": 0}),
    ]
    cache = share(np.zeros((2, 64), np.uint8))
    shape = share(np.zeros(ATTENTION_NUMBERS, np.int64).view(np.uint8))
    calls.append((ROTATE_AND_APPEND, [shape, floats(2, 2), floats(2, 2), *where], [floats(2, 2), cache], {}))
    calls.append((ATTEND, [shape, floats(2, 2), cache, *where], [floats(2, 2), floats(2, 2)], {}))
    return calls


@contextmanager
def _stderr_away() -> Iterator[None]:
    """Keep what is written to stderr below Python (Jittor's own progress line) off the user's screen."""
    sys.stderr.flush()
    saved = os.dup(2)
    with tempfile.TemporaryFile() as elsewhere:
        try:
            os.dup2(elsewhere.fileno(), 2)
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)


def _reason(report: str) -> str:
    """The line of Jittor's long report that says what went wrong."""
    lines = [line.strip() for line in _COLOUR.sub("", report).splitlines() if line.strip()]
    telling = [line for line in lines if "error:" in line.lower() or line.startswith("Reason:")]
    return (telling or lines or ["no reason was given."])[-1]
