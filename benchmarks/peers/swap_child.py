"""Jittor's own swap under a limit of memory: the part of gpu_offload.py that runs it, in a process of its own.

    python benchmarks/peers/swap_child.py '{"device": "cuda", "limit": 8000000000, "rebuild": true, "shapes": …, …}'

A stack of matrices of MOSS's shape, multiplied with one token as a layer does, by Jittor's own operations. The normal
build of Jittor ignores its limits: the code that swaps is compiled only with JT_SAVE_MEM, so with "rebuild" such a core
is compiled beside ours, some minutes the first time. What it moves is read from its own count. One JSON object comes last.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from typing import Any

import numpy as np

from moss_jt import startup
from moss_jt.kernels.nvml import used_memory
from moss_jt.startup import machine
from moss_jt.startup.loading import load
from moss_jt.startup.plan import make_plan, prepare

SWAPS = " -DJT_SAVE_MEM=1 "
SWAP_TOTAL = "_ZN6jittor10swap_totalE"  # int64 jittor::swap_total, bytes moved or written
LEAST_STEPS = 3
AGAIN = "MOSS_JT_SWAP_AGAIN"


def start(settings: dict[str, Any]) -> Any:
    """Jittor, with the code that swaps where it is to be rebuilt."""
    if not settings["rebuild"]:
        return startup.import_jittor(device=settings["device"])
    plan = make_plan(settings["device"])
    variables = {**plan.variables, "cc_flags": plan.variables["cc_flags"] + SWAPS, "cache_name": "swap"}
    plan = replace(plan, variables=variables)
    prepare(plan)
    try:
        return load(plan, on_all_cores)
    except SystemExit:  # "jit_utils updated, please rerun": its helper library is rebuilt by now
        if AGAIN in os.environ:
            raise
        os.environ[AGAIN] = "1"
        os.execv(sys.executable, [sys.executable, *sys.argv])


def on_all_cores(commands: list[str], cache_path: str, jittor_path: str, title: str = "") -> None:
    """Compile Jittor's files at once."""
    compile_one = sys.modules["jittor_utils"].do_compile
    with ProcessPoolExecutor(machine.compile_jobs(), get_context("fork")) as pool:
        for done in [pool.submit(compile_one, [command, cache_path, jittor_path]) for command in commands]:
            done.result()


def swapped_bytes() -> int:
    """What has been swapped so far, as Jittor counts it; the core is loaded for everybody to see."""
    core = next(module.__file__ for name, module in sys.modules.items() if name == "jittor_core")
    assert core is not None, "a compiled module"
    return int(ctypes.c_int64.in_dll(ctypes.CDLL(core), SWAP_TOTAL).value)


def matrices(jt: Any, settings: dict[str, Any]) -> Iterator[Any]:
    """A Var for each shape, the same random numbers in those of one shape; the host gives them to Jittor one by one."""
    known: dict[tuple[int, ...], Any] = {}
    numbers = np.random.default_rng(0)
    for shape in map(tuple, settings["shapes"]):
        if shape not in known:
            values = numbers.random(shape, np.float32) - np.float32(0.5)
            known[shape] = (values * np.float32((12 / shape[1]) ** 0.5)).astype(settings["dtype"])
        yield jt.array(known[shape])


def forward(jt: Any, weights: list[Any], x: Any) -> None:
    """One token through the stack: each matrix takes as much of its input as it wants."""
    with jt.no_grad():
        for weight in weights:
            inputs = weight.shape[1]
            if x.shape[1] < inputs:
                x = jt.concat([x] * -(-inputs // x.shape[1]), dim=1)
            x = jt.nn.matmul_transpose(x[:, :inputs], weight)
        x.sync(True)


def measure(jt: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Seconds of passes, and bytes swapped in each, after two that compile and bring everything where it stays."""
    name = "device_mem_limit" if settings["device"] == "cuda" else "cpu_mem_limit"
    setattr(jt.flags, name, settings["limit"] - settings["own"])
    weights = list(matrices(jt, settings))
    x = jt.array(np.ones((1, weights[0].shape[1]), settings["dtype"]))
    taken: list[float] = []
    moved: list[int] = []
    for _ in range(2):
        forward(jt, weights, x)
    while len(taken) < settings["steps"] and (len(taken) < LEAST_STEPS or sum(taken) < settings["seconds"]):
        began, swapped = time.perf_counter(), swapped_bytes()
        forward(jt, weights, x)
        taken.append(time.perf_counter() - began)
        moved.append(swapped_bytes() - swapped)
    nbytes = sum(rows * inputs for rows, inputs in settings["shapes"]) * np.dtype(settings["dtype"]).itemsize
    return {"steps_s": taken, "swapped_bytes": moved, "weight_bytes": nbytes}


def used(settings: dict[str, Any]) -> int:
    """Bytes of the device in use by everybody; 0 where nothing tells."""
    return (used_memory(settings["bus"]) or 0) if settings["bus"] else 0


def main() -> None:
    """Settings from the command line, results to stdout."""
    settings = json.loads(sys.argv[1])
    before, began = used(settings), time.perf_counter()
    jt = start(settings)
    started = round(time.perf_counter() - began, 1)
    found = measure(jt, settings)
    print(json.dumps({"jittor": jt.__version__, "start_s": started, **found, "used_bytes": used(settings) - before}))


if __name__ == "__main__":
    main()
