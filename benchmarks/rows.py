"""Floating-point rows, exact tiles, transposed products and pointwise steps, each beside what the machine can do.

    python benchmarks/rows.py [--head-rows 107008] [--pairs 9] [--save]

One token: bytes per second of moss-moon-003's head (107008 x 6144, float16 and bfloat16) against pure reading of
memory. 128 and 512 tokens: operations per second of a 6144 x 6144 matrix against fused multiply-adds in registers,
forward and turned around. Each run stands between two measurements of its limit, and the ratio is to their mean:
once by the clock, once by processor time, which other programs on the machine disturb less. GELU and layer norm
are in nanoseconds a number on one core. One JSON line comes last.
"""

from __future__ import annotations

import argparse
import mmap
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from moss_jt.launch import GELU, LAYER_NORM, LINEAR, TURN_PRODUCT, Buffer, aligned, computing, run, warm_up
from moss_jt.layout import RowsLayout, TileLayout
from moss_jt.limits import Limits, Measured
from moss_jt.ops import layout_data
from moss_jt.record import keep, spread

WIDTH, INNER = 6144, 24576  # of moss-moon-003
PROMPTS = (128, 512)


@dataclass
class Rates:
    """Of the runs of one case, each beside the limit measured around it."""

    per_second: list[float] = field(default_factory=list)
    of_limit: list[float] = field(default_factory=list)
    of_limit_cpu: list[float] = field(default_factory=list)

    def summary(self, unit: str) -> dict[str, Any]:
        """For the line of results."""
        rates = spread([rate / 1e9 for rate in self.per_second], 2)
        return {unit: rates, "of_limit": spread(self.of_limit), "of_limit_cpu": spread(self.of_limit_cpu)}


def huge_pages(nbytes: int) -> npt.NDArray[np.uint8]:
    """Anonymous memory as weights have it, zeros."""
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)


class Matrix:
    """Random bytes as a stored matrix, inputs and outputs for some tokens."""

    def __init__(self, layout: RowsLayout | TileLayout, tokens: int) -> None:
        self.layout, self.tokens = layout, tokens
        n, k = layout.shape
        self.blob = Buffer(huge_pages(layout.nbytes))
        some = np.random.default_rng(0).integers(0, 0x38, 1 << 20, np.uint8)  # below 0x3800: no NaN of either kind
        for start in range(0, layout.nbytes, some.size):
            part = self.blob.array[start : start + some.size]
            part[:] = some[: part.size]
        self.x = Buffer(aligned((tokens, k), "float32"))
        self.y = Buffer(aligned((tokens, n), "float32"))
        self.turned = Buffer(aligned((k, -(-tokens // 16) * 16), "float32"))
        self.bias = Buffer(aligned((n,), "float32"))
        for buffer in (self.x, self.y):
            buffer.array[:] = np.random.default_rng(1).normal(size=buffer.array.shape)

    @property
    def operations(self) -> float:
        """A multiplication and an addition for each weight and token."""
        return 2.0 * self.layout.shape[0] * self.layout.shape[1] * self.tokens

    def forward(self) -> None:
        """One product."""
        data = self._sizes() | {"y_stride": self.y.array.shape[1], "has_bias": True}
        run(LINEAR, [self.x.var, self.blob.var, self.bias.var], [self.y.var], data)

    def backward(self) -> None:
        """One product with the matrix turned around."""
        data = self._sizes() | {"y_stride": self.y.array.shape[1], "has_bias": False}
        run(TURN_PRODUCT, [self.y.var, self.blob.var, self.bias.var], [self.turned.var], data)

    def _sizes(self) -> dict[str, float]:
        n, k = self.layout.shape
        where = {"tokens": self.tokens, "blob_at": 0, "first": 0, "out": n, "x_stride": k, "add": False}
        return layout_data(self.layout) | where


def in_turns(work: Callable[[], None], amount: float, limit: Callable[[], Measured], pairs: int) -> Rates:
    """Limit, work, limit, work, …, limit; the first run of the work warms up."""
    rates = Rates()
    work()
    before = limit()
    for _ in range(pairs):
        wall, cpu = time.perf_counter(), time.process_time()
        work()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        after = limit()
        rates.per_second.append(amount / wall)
        rates.of_limit.append(2 * amount / wall / (before.per_second + after.per_second))
        rates.of_limit_cpu.append(2 * amount / cpu / (before.per_cpu_second + after.per_cpu_second))
        before = after
    return rates


def measure_head(dtype: Any, rows: int, limits: Limits, pairs: int) -> dict[str, Any]:
    """One token through the head."""
    layout = RowsLayout((rows, WIDTH), dtype)
    matrix = Matrix(layout, 1)
    return in_turns(matrix.forward, rows * layout.row_bytes, lambda: limits.memory(0.1), pairs).summary("gb_per_s")


def measure_prompts(limits: Limits, pairs: int) -> dict[str, Any]:
    """Many tokens through one matrix, both ways."""
    found: dict[str, Any] = {}
    layouts: dict[str, RowsLayout | TileLayout] = {
        "float16": RowsLayout((WIDTH, WIDTH), "float16"),
        "int4": TileLayout((WIDTH, WIDTH), 4, 128),
    }
    for name, layout in layouts.items():
        for tokens in PROMPTS:
            matrix = Matrix(layout, tokens)
            for way, work in (("forward", matrix.forward), ("transposed", matrix.backward)):
                rates = in_turns(work, matrix.operations, limits.fp32, pairs)
                found[f"{name} {way} {tokens}"] = rates.summary("gflop_per_s")
                print(f"{name} {way}, {tokens} tokens: {found[f'{name} {way} {tokens}']}", flush=True)
    return found


def measure_pointwise(pairs: int) -> dict[str, Any]:
    """Nanoseconds of processor time a number, of one token."""
    x, weight, y = (Buffer(aligned((1, INNER), "float32")) for _ in range(3))
    weight.array[:] = x.array[:] = np.random.default_rng(0).normal(size=(1, INNER))
    flat = Buffer(weight.array.reshape(-1))
    norm = {"tokens": 1, "width": INNER, "eps": 1e-5}
    steps: dict[str, Callable[[], None]] = {
        "gelu": lambda: run(GELU, [], [x.var], {"count": INNER}),
        "layer_norm": lambda: run(LAYER_NORM, [weight.var, flat.var, flat.var], [y.var], norm),
        "a launch": lambda: run(GELU, [], [x.var], {"count": 0}),
    }
    found: dict[str, Any] = {}
    for name, step in steps.items():
        taken = []
        for _ in range(20 * pairs):
            cpu = time.thread_time_ns()
            step()
            taken.append((time.thread_time_ns() - cpu) / (1 if name == "a launch" else INNER))
        found[f"{name}_ns"] = spread(taken, 2)
        print(f"{name}: {found[f'{name}_ns']} ns", flush=True)
    return found


def main() -> int:
    """Measure, print, then the line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--head-rows", type=int, default=107008, help="1.3 GB in float16")
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--save", action="store_true", help="keep the line under benchmarks/results/")
    options = parser.parse_args()
    warm_up()
    results: dict[str, Any] = {"head_rows": options.head_rows}
    with Limits() as limits, computing():
        for dtype in ("float16", "bfloat16"):
            results[f"head {dtype}"] = measure_head(dtype, options.head_rows, limits, options.pairs)
            print(f"one token, {dtype}: {results[f'head {dtype}']}", flush=True)
        results |= measure_prompts(limits, options.pairs)
        results |= measure_pointwise(options.pairs)
    print(keep("rows", results, save=options.save))
    return 0


if __name__ == "__main__":
    sys.exit(main())
