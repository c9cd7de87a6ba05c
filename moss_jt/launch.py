"""The C++ kernels of moss_jt.kernels inside Jittor: the only place that hands them over, and that launches them.

Kernels work in place, on arrays that numpy has too. Sizes travel as data and not as shapes, so each is compiled
once for all lengths. `run` launches one kernel by itself, as a node of Jittor's graph. What inference calls is lined
up in `Steps`, whose one program holds all of these kernels and is compiled by `warm_up`.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import struct
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, cached_property
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
    "rounded_amx.h",
    "rounded.h",
    "pointwise.h",
    "ordered.h",
    "kv_store.h",
    "kv_store_x86.h",
    "attention.h",
)
TRAINING_HEADERS = ("training.h", "training_attention.h")
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


# What a pass lines up, with the C++ types of what each kernel reads and writes.
STEP_TYPES: dict[str, tuple[str, str]] = {
    LINEAR: ("float uint8_t float", "float"),
    PERMUTE: ("float int32_t", "float"),
    ROUND_ACTIVATIONS: ("float int32_t", "int8_t float int32_t"),
    LINEAR_ROUNDED: ("int8_t uint8_t float float int32_t", "float"),
    LAYER_NORM: ("float float float", "float"),
    GELU: ("", "float"),
    ADD_BOTH: ("float float", "float"),
    ROTATE_AND_APPEND: ("uint8_t float float int32_t int32_t int32_t", "float uint8_t"),
    ATTEND: ("uint8_t float uint8_t int32_t int32_t int32_t", "float float"),
}
_DATA_KEY = re.compile(r'data\["(\w+)"\]')
_STEP_KEYS = {source: tuple(dict.fromkeys(_DATA_KEY.findall(source))) for source in STEP_TYPES}
_STEP_NUMBERS = {source: number for number, source in enumerate(STEP_TYPES)}
_MOST_INPUTS, _MOST_OUTPUTS, _MOST_KEYS = 6, 3, 20
_STEP = struct.Struct(f"={1 + _MOST_INPUTS + _MOST_OUTPUTS}q{_MOST_KEYS}d")  # struct Step of _STEPS
_MOST_STEPS = 64
_NOTHING = (0,) * _MOST_KEYS

_ALONE = threading.RLock()


@contextmanager
def computing() -> Iterator[None]:
    """Have Jittor to oneself, without gradients: its flags and its queue belong to the whole process, not to a thread."""
    with _ALONE, startup.import_jittor(device="cpu").flag_scope(no_grad=1):
        yield


class Buffer:
    """Memory that numpy, kernels and, through `var`, Jittor see; it begins at `address`."""

    def __init__(self, array: npt.NDArray[Any]) -> None:
        self.array = array
        self.address: int = array.ctypes.data

    @cached_property
    def var(self) -> Any:
        """The Var, made when it is first asked for."""
        return share(self.array)


def share(array: npt.NDArray[Any]) -> Any:
    """A Jittor Var on the array's own memory, without a copy, which keeps the array alive.

    The array must be C-contiguous, not of shape (1,): that Jittor takes for a constant, copies, and compiles; and
    not of 64-bit numbers: these it converts.
    """
    jt = startup.import_jittor(device="cpu")
    assert array.flags.c_contiguous and array.shape != (1,) and array.dtype.itemsize < 8
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
def _header(names: tuple[str, ...] = HEADERS) -> str:
    """The include line of all kernels of inference, or of those named.

    They are joined into one file whose name is a hash of its contents: Jittor keys its compiled code
    by the text of the source, so the text must change when a header does, and must not change with
    the environment; and it does not follow an include within an include.
    """
    room = resources.files("moss_jt.kernels").joinpath("cpu")
    text = "".join(_LOCAL_INCLUDE.sub("", room.joinpath(name).read_text("utf-8")) for name in names)
    path = paths.jittor_home().resolve() / "kernels" / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.h"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(f".{os.getpid()}.tmp")
        scratch.write_text(text, "utf-8")
        scratch.replace(path)
    return f'#include "{path}"\n'


def _launch(source: str, inputs: list[Any], outputs: list[Any], data: Mapping[str, float]) -> list[Any]:
    """Queue a kernel that writes `outputs` in place; what comes back must be synced, or it runs at some later time."""
    jt = startup.import_jittor(device="cpu")
    numbers = {key: float(value) for key, value in data.items()}
    return list(jt.code(inputs, outputs, cpu_src=source, cpu_header=_header(), data=numbers))


def training_node(
    source: str, shapes: list[list[int]], inputs: list[Any], data: Mapping[str, float] | None = None
) -> list[Any]:
    """Queue a kernel of training, whose results are new float32 Vars of these shapes."""
    jt = startup.import_jittor(device="cpu")
    numbers = {key: float(value) for key, value in (data or {}).items()}
    header = _header(TRAINING_HEADERS)
    made = jt.code(shapes, ["float32"] * len(shapes), inputs, cpu_src=source, cpu_header=header, data=numbers)
    return list(made)


def training_in_place(source: str, inputs: list[Any], outputs: list[Any], data: Mapping[str, float]) -> list[Any]:
    """Queue a kernel of training that writes `outputs` in place; what comes back stands for them."""
    jt = startup.import_jittor(device="cpu")
    numbers = {key: float(value) for key, value in data.items()}
    return list(jt.code(inputs, outputs, cpu_src=source, cpu_header=_header(TRAINING_HEADERS), data=numbers))


def run_training(source: str, inputs: list[Any], outputs: list[Any], data: Mapping[str, float]) -> None:
    """Run a kernel of training now; `outputs` are written in place.

    Without gradients: else Jittor would keep a node for each call, for as long as the outputs live.
    """
    with computing():
        for var in training_in_place(source, inputs, outputs, data):
            var.sync()


def run(source: str, inputs: list[Any], outputs: list[Any], data: Mapping[str, float]) -> None:
    """Run a kernel now; `outputs` are written in place.

    If an interrupt strikes, it may run, or run again, at any later time: nobody may need what it writes to then.
    """
    try:
        for var in _launch(source, inputs, outputs, data):
            var.sync()
    except RuntimeError as error:
        raise KernelError(
            f"a CPU kernel failed: {_reason(str(error))} `moss-jt doctor` checks the compiler."
        ) from error


class Steps:
    """Kernels that run one after the other in one launch, as if each had been launched by itself.

    What they read and write must stay where it is until `run`.
    """

    def __init__(self) -> None:
        self._table = aligned((_MOST_STEPS * _STEP.size,), "uint8")
        self._bytes = self._table.data
        self._address = self._table.ctypes.data
        self._count = 0
        self._is_recording = False

    def add(
        self, kernel: str, inputs: Sequence[int], outputs: Sequence[int], data: Mapping[str, float] | None = None
    ) -> None:
        """Line up a kernel.

        Args:
            kernel: of STEP_TYPES, its source.
            inputs, outputs: addresses, of the types that STEP_TYPES names.
            data: its numbers; others may be among them.
        """
        if self._count == _MOST_STEPS:
            self.run()
        numbers = [data[key] for key in _STEP_KEYS[kernel]] if data else ()
        _STEP.pack_into(
            self._bytes,
            self._count * _STEP.size,
            _STEP_NUMBERS[kernel],
            *inputs,
            *_NOTHING[: _MOST_INPUTS - len(inputs)],
            *outputs,
            *_NOTHING[: _MOST_OUTPUTS - len(outputs)],
            *numbers,
            *_NOTHING[: _MOST_KEYS - len(numbers)],
        )
        self._count += 1

    def record(self) -> None:
        """From here on, with nothing lined up, keep what is lined up for `recorded`."""
        assert self._count == 0, "run() comes first"
        self._is_recording = True

    def recorded(self) -> bytes | None:
        """What was lined up since `record`, for `repeat`; None where some of it has run already."""
        whole, self._is_recording = self._is_recording, False
        return bytes(self._bytes[: self._count * _STEP.size]) if whole else None

    def repeat(self, steps: bytes) -> None:
        """Line up what `recorded` gave. Whoever repeats knows that everything it names is still the same."""
        count = len(steps) // _STEP.size
        if self._count + count > _MOST_STEPS:
            self.run()
        self._bytes[self._count * _STEP.size : (self._count + count) * _STEP.size] = steps
        self._count += count

    def run(self) -> None:
        """Run what is lined up. Other threads of Python go on meanwhile.

        Raises:
            KernelError: the compiler failed, or a kernel.
        """
        count, self._count = self._count, 0
        if count:
            self._is_recording = False
            if _program()(self._address, count) != 0:
                raise KernelError("a CPU kernel failed: the system gave it no memory. Close other programs.")

    def clear(self) -> None:
        """Forget what is lined up."""
        self._count, self._is_recording = 0, False


@cache
def _program() -> Callable[[int, int], int]:
    """What goes through the table of `Steps`, (address, steps) to 0 or an error.

    Jittor compiles it; once, it is asked where it lies in memory, and from then on it is called there. Through
    Jittor a call took 150 microseconds of a step of decoding, whose weights leave no cache warm for the graph
    that Jittor makes of it, and it held Python's lock. Nor can an interrupt leave it in Jittor's queue.
    """
    where = Buffer(aligned((2,), "int32"))  # the two halves of the address
    with computing():
        run(_steps_source(), [share(aligned((2,), "int32"))], [where.var], {})
    address = int(where.array.view(np.int64)[0])
    return ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int64)(address)


@cache
def _steps_source() -> str:
    """The program of `Steps`: it goes through a table and calls the kernels in it. Run, it tells its address."""
    cases = []
    for source, (inputs, outputs) in STEP_TYPES.items():
        places = [("in", kind, i) for i, kind in enumerate(inputs.split())]
        places += [("out", kind, i) for i, kind in enumerate(outputs.split())]
        pointers = "".join(f"const auto {side}{i}_p = ({kind}*)step.{side}[{i}]; " for side, kind, i in places)
        body = source
        for place, key in enumerate(_STEP_KEYS[source]):
            body = body.replace(f'data["{key}"]', f"step.data[{place}]")
        cases.append(f"case {_STEP_NUMBERS[source]}: {{ {pointers}{body} break; }}\n")
    return f"""
    struct Step {{
        int64_t kernel;
        void *in[{_MOST_INPUTS}], *out[{_MOST_OUTPUTS}];
        double data[{_MOST_KEYS}];
    }};
    static_assert(sizeof(Step) == {_STEP.size}, "as launch.py packs it");
    int (*const program)(const Step*, int64_t) = [](const Step* steps, int64_t count) {{
        try {{
            for (int64_t i = 0; i < count; i++) {{
                const Step& step = steps[i];
                switch (step.kernel) {{
                    {"".join(cases)}
                }}
            }}
        }} catch (const std::bad_alloc&) {{
            return 1;
        }}
        return 0;
    }};
    static_assert(sizeof program == 2 * sizeof(*out0_p), "as launch.py reads it");
    std::memcpy(out0_p, &program, sizeof program);
    """


def warm_up(progress: Progress | None = None) -> None:
    """Compile what inference calls; at once where that was done before.

    Raises:
        KernelError: the compiler failed.
    """
    progress = Quiet() if progress is None else progress
    jt = startup.import_jittor(device="cpu", progress=progress)
    made_of = hashlib.sha256((_header() + _steps_source() + jt.flags.cc_flags).encode()).hexdigest()[:16]
    done = Path(jt.flags.cache_path) / f"moss_jt.{made_of}"
    if done.is_file():
        return
    progress.begin(pick("compiling the CPU kernels (once)", "编译 CPU 算子（仅首次）"), 1, "programs")
    try:
        with _ALONE, _stderr_away():
            _program()
        progress.advance(1)
    finally:
        progress.end()
    done.touch()


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
    """The line of Jittor's long report that says what went wrong; of a compiler that failed it has only the command."""
    if "Run cmd failed" in report:
        return "its program does not compile; what the compiler said stands above."
    lines = [line.strip() for line in _COLOUR.sub("", report).splitlines() if line.strip()]
    telling = [line for line in lines if "error:" in line.lower() or line.startswith("Reason:")]
    return (telling or lines or ["no reason was given."])[-1]
