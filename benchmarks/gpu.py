"""What our kernels do on a CUDA device: right, and how fast. `benchmarks/gpu_suite.sh` sets it up.

    python benchmarks/gpu.py [--only bandwidth,kernels,…] [--layers 34] [--kinds int4,int8,fp16] [--caps 4,6,8,12,24] [--save]

bandwidth  copies within the device, and to it from pinned and from ordinary memory
kernels    the tests of every kernel against numpy, run on this device (needs pytest)
golden     logits of the original's small models, exact and fast, on this device
products   int4 and int8 products of one layer for 1 to 512 tokens, inputs rounded to half and to int8, and fp16 and bf16 ones, bytes per second against copies on the device
attention  of one layer for single tokens and prompts: the kernels of fast compute beside the exact one
resident   the full-size model of random weights, all on the device: prompts of 128 and 512, and the tokens after them
batch      what a step of 16 conversations takes against a step of one
context    int4 with 2048 tokens within 12 and 4 GiB
caps       int4, int8 and fp16 within 4 to 24 GiB: the same tokens, the memory taken, bytes per second against the link
share      int4 within 8 GiB when the host's processor multiplies a part of what would be copied (needs Jittor)
train      the products of a layer in training, forward and back, with the copies of what they are given and give back
peers      int4 products of torch and of a Triton kernel beside ours
offload    fp16 under each cap beside transformers with accelerate's offload (gpu_offload.py; aim 2.5 times)
swap       fp16 under each cap beside Jittor's own swap (gpu_offload.py; aim 2 times)
jittor     Jittor itself in CUDA mode (gpu_jittor.py): it starts, and computes what numpy does

Each part ends with a JSON line as soon as it is measured, and a table comes last; rows go to stderr before. Each runs in a
process of its own: after a fault of the device a process can do nothing more with it. Where one fails or takes too long,
its line has the rows that were there. The exit code is 1 where numbers are wrong. Without a device it says so and exits with 0.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gpu_attention
import gpu_jittor
import gpu_model
import gpu_offload
import gpu_peers
import gpu_train
import numpy as np
from gpu_model import Stage
from gpu_peers import PAST_CACHES, SHAPES
from gpu_rows import FILE, Rows, kept_rows
from peers.environment import folder_of, python_of

from moss_jt.checkpoint import Checkpoint
from moss_jt.device import Device
from moss_jt.kernels.cupy_device import CupyDevice
from moss_jt.kernels.nvml import used_memory
from moss_jt.layout import TILE_ROWS, RowsLayout, TileLayout
from moss_jt.load import native_folder
from moss_jt.memory import GIB
from moss_jt.ops import ROUND_BLOCK
from moss_jt.placement import place
from moss_jt.progress import Quiet
from moss_jt.record import keep, spread
from moss_jt.runner import DEFAULT_KV, Compute, Model
from moss_jt.startup.gpu import ask_driver
from moss_jt.workspace import ROW_BLOCK

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
MODELS = ("tiny-fp/safetensors-fp16", "tiny-fp-h8/bin-single", "tiny-int4/g32-actorder", "tiny-int8/g128")
TOKENS = (1, 2, 4, 8, 16, 64, 512)
WAYS = {"halves": np.float16, "bytes": np.int8}  # how inputs are rounded
ALLOWED: dict[Compute, float] = {"exact": 1e-3, "fast": 2e-2}
Results = dict[str, Any]
PART_SECONDS = 480  # for a part; offload and swap want one or two --caps at once


def timed(device: Device, work: Callable[[], None], *, least_s: float = 0.05, runs: int = 9) -> list[float]:
    """Seconds of each of several runs, each long enough that queueing does not count."""
    work()
    device.wait(device.record("compute"))
    began = time.perf_counter()
    work()
    device.wait(device.record("compute"))
    repeat = max(1, int(least_s / max(1e-6, time.perf_counter() - began)))
    taken = []
    for _ in range(runs):
        began = time.perf_counter()
        for _ in range(repeat):
            work()
        device.wait(device.record("compute"))
        taken.append((time.perf_counter() - began) / repeat)
    return taken


def replayed(device: Device, work: Callable[[], None]) -> list[float]:
    """The same for what only launches kernels: captured, as the model has it, since Python launches too slowly."""
    graph = device.capture(work)
    return timed(device, lambda: device.replay(graph))


def copy_rate(device: CupyDevice, nbytes: int = 1 << 30) -> float:
    """Bytes that the device reads and writes a second when it copies its own memory: the limit of all the rest."""
    source, target = device.allocate(nbytes, "measuring"), device.allocate(nbytes, "measuring")
    taken = timed(device, lambda: device.move(source, target, nbytes))
    return 2 * nbytes / sorted(taken)[len(taken) // 2]


def bandwidth(_: argparse.Namespace) -> Results:
    """Of the device and of its link."""
    import cupy

    device, nbytes = CupyDevice(), 256 << 20
    pinned = np.frombuffer(cupy.cuda.alloc_pinned_memory(nbytes), np.uint8, nbytes)
    target = device.allocate(nbytes, "measuring")
    results: Results = Rows(copy_gb_per_s=round(copy_rate(device) / 1e9, 1))
    for name, values in (("pinned", pinned), ("ordinary", np.ones(nbytes, np.uint8))):
        taken = timed(device, partial(device.write, target, values, stays=True))
        rates = [nbytes / each / 1e9 for each in taken]
        results[f"to_device_{name}_gb_per_s"] = spread(rates, 1)
    device.close()
    return results


def kernels(_: argparse.Namespace) -> Results:
    """What pytest says of the kernels' tests, run on the device."""
    if importlib.util.find_spec("pytest") is None:
        return {"not_measured": "pytest is not installed: pip install pytest"}
    names = ("products", "rows", "transposed", "attention", "attention_rounded", "shortlist")
    files = [str(ROOT / "tests" / "kernels" / f"test_cuda_{name}.py") for name in names]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    variables = {**os.environ, "MOSS_JT_TEST_DEVICE": "0", "PYTHONPATH": paths}
    line = [sys.executable, "-m", "pytest", "-q", "-W", "default", "--rootdir", str(ROOT), *files]
    done = subprocess.run(
        line, stdout=subprocess.PIPE, text=True, env=variables, check=False, timeout=PART_SECONDS - 30
    )
    told = done.stdout.splitlines()
    return {
        "told": told[-1] if told else "",
        "failed": [each for each in told if "FAILED" in each],
        "wrong": done.returncode != 0,
    }


def golden(_: argparse.Namespace) -> Results:
    """The largest difference from the original's logits."""
    results: Results = Rows()
    for name in MODELS:
        path = GOLDEN / name / "expected.npz"
        want = np.load(path if path.is_file() else path.parents[1] / "expected.npz")
        checkpoint = Checkpoint.open(native_folder(GOLDEN / name, Quiet()))
        ways: tuple[Compute, ...] = ("exact", "fast")
        for way in ways:
            device = CupyDevice()
            kv = DEFAULT_KV[way]
            room = device.own_bytes + device.capacity
            placed = place(checkpoint, device, kv, vram=room, memory=1 << 33, host_base=0)
            model = Model(
                checkpoint,
                placed.store,
                compute=way,
                device=device.name,
                max_tokens=None,
                kv=kv,
                budget=placed.budget,
                placed=placed,
            )
            off = float(np.abs(model.logits(want["b2_ids"][0])[0] - want["b2_logits"][0]).max())
            results[f"{name} {way}"] = {"off": off, "wrong": not off <= ALLOWED[way]}
            device.close()
    results["wrong"] = any(each["wrong"] for each in results.values())
    return results


def products(_: argparse.Namespace) -> Results:
    """Weights per second for each shape and number of tokens."""
    device = CupyDevice()
    limit = copy_rate(device)
    results: Results = Rows(copy_gb_per_s=round(limit / 1e9, 1))
    kinds = [*itertools.product(WAYS, ("int4", "int8")), ("halves", "float16"), ("halves", "bfloat16")]
    for (way, kept), (name, shape) in itertools.product(kinds, SHAPES.items()):
        device_here = CupyDevice()
        for tokens in TOKENS:
            found = _product(device_here, way, _layout(kept, shape), tokens)
            rates = [found["nbytes"] / each for each in found["seconds"]]
            results[f"{kept} {name} {tokens} {way}"] = {
                "gb_per_s": spread([rate / 1e9 for rate in rates], 1),
                "of_copy": round(sorted(rates)[len(rates) // 2] / limit, 3),
            }
        device_here.close()
    device.close()
    return results


def half_rate(tokens: int, rows: int, inputs: int) -> float:
    """Operations per second of the maker's product of halves."""
    import cupy

    x, weight = cupy.ones((tokens, inputs), cupy.float16), cupy.ones((inputs, rows), cupy.float16)
    cupy.matmul(x, weight)
    cupy.cuda.Device().synchronize()
    taken = []
    for _ in range(9):
        began = time.perf_counter()
        cupy.matmul(x, weight)
        cupy.cuda.Device().synchronize()
        taken.append(time.perf_counter() - began)
    return 2.0 * tokens * rows * inputs / sorted(taken)[len(taken) // 2]


def _layout(kept: str, shape: tuple[int, int]) -> TileLayout | RowsLayout:
    if kept in ("int4", "int8"):
        return TileLayout(shape, 4 if kept == "int4" else 8, 128)
    return RowsLayout(shape, "float16" if kept == "float16" else "bfloat16")


def _product(device: CupyDevice, way: str, layout: TileLayout | RowsLayout, tokens: int) -> Results:
    """Seconds of one product whose weights no cache holds."""
    n, k = layout.shape
    if isinstance(layout, RowsLayout):
        kept, nbytes = str(layout.dtype), n * layout.row_bytes
        sizes = (TILE_ROWS * layout.row_bytes, 0, 0, k, k, ROW_BLOCK)
    else:
        where = (layout.tile_bytes, layout.code_bytes, layout.code_bytes + layout.scale_bytes)
        kept, nbytes = f"int{layout.bits}", layout.n_tiles * layout.tile_bytes
        sizes = (*where, layout.padded_in, 128, ROUND_BLOCK)
    blocks = k // sizes[-1]
    copies = -(-PAST_CACHES // nbytes)
    blob = device.allocate(copies * nbytes, "measuring")
    some = np.random.default_rng(0).integers(0, 0x38, nbytes, np.uint8)  # below 0x3800: finite scales
    for copy in range(copies):
        device.write(blob.after(copy * nbytes), some)
    ones = np.ones(tokens * k, WAYS[way])
    codes = device.allocate(ones.nbytes, "measuring")
    steps, sums = (device.allocate(4 * tokens * blocks, "measuring") for _ in range(2))
    device.write(codes, ones)
    device.write(steps, np.ones(tokens * blocks, np.float32))
    device.write(sums, np.full(tokens * blocks, ROUND_BLOCK, np.int32))
    y = device.allocate(4 * tokens * n, "measuring")
    size = 8 if tokens <= 8 else 16 if tokens <= 16 else "many"
    tiles = -(-n // TILE_ROWS)
    grid = (-(-tokens // 64), -(-tiles // 8)) if size == "many" else (tiles,)
    numbers = (tokens, n, 0, *sizes, n, 0)

    def work() -> None:
        for copy in range(copies):
            arguments = (blob.after(copy * nbytes), codes, steps, sums, None, y, *numbers)
            device.launch("linear_rounded", f"{way}_{kept}_{size}", grid, 256, arguments)

    return {"nbytes": nbytes, "seconds": [each / copies for each in replayed(device, work)]}


def stage_of(arguments: argparse.Namespace) -> Stage:
    """This machine's first device, and what was asked for."""
    import cupy

    bus = cupy.cuda.Device(0).pci_bus_id
    room = ask_driver().gpus[0].memory_bytes
    caps = [int(float(gib) * GIB) for gib in arguments.caps.split(",")]
    if max(caps) > room:
        print(f"caps above the {room / GIB:.1f} GiB of the device are left out", file=sys.stderr)
    return Stage(
        open=lambda limit: CupyDevice(0, limit),
        layers=arguments.layers,
        kinds=tuple(arguments.kinds.split(",")),
        caps=tuple(cap for cap in caps if cap <= room),
        used=lambda: used_memory(bus),
    )


def of_copy(arguments: argparse.Namespace) -> Results:
    """The resident model against copies within the device."""
    device = CupyDevice()
    rate = copy_rate(device)
    device.close()
    return {**gpu_model.resident(stage_of(arguments), rate), "copy_gb_per_s": round(rate / 1e9, 1)}


def others(arguments: argparse.Namespace) -> gpu_offload.Limits:
    """How programs of others are run: with the Python named, that of the peers, or ours."""
    import cupy

    python = arguments.peer_python
    if python is None:
        built = python_of(folder_of("torch_offload", None))
        python = built if built.is_file() else Path(sys.executable)
    return gpu_offload.Limits(python, arguments.peer_seconds, bus=cupy.cuda.Device(0).pci_bus_id)


PARTS: dict[str, Callable[[argparse.Namespace], Results]] = {
    "bandwidth": bandwidth,
    "kernels": kernels,
    "golden": golden,
    "products": products,
    "attention": lambda _: gpu_attention.attention(CupyDevice, replayed),
    "resident": of_copy,
    "batch": lambda arguments: gpu_model.batch(stage_of(arguments)),
    "context": lambda arguments: gpu_model.context(stage_of(arguments)),
    "caps": lambda arguments: gpu_model.caps(stage_of(arguments)),
    "share": lambda arguments: gpu_model.share(stage_of(arguments)),
    "train": lambda _: gpu_train.train(CupyDevice, half_rate),
    "peers": lambda _: gpu_peers.products(CupyDevice),
    "offload": lambda arguments: gpu_offload.offload(stage_of(arguments), others(arguments)),
    "swap": lambda arguments: gpu_offload.swap(stage_of(arguments), others(arguments)),
    "jittor": lambda _: gpu_jittor.part(),
}


def main() -> int:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--layers", type=int, default=34)
    parser.add_argument("--kinds", default="int4,int8,fp16")
    parser.add_argument("--caps", default="4,6,8,12,24", help="GiB")
    parser.add_argument("--peer-python", type=Path, help="with torch, transformers and accelerate, for offload")
    parser.add_argument("--peer-seconds", type=float, default=60.0, help="for the others' tokens, of offload and swap")
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # in this process
    arguments = parser.parse_args()
    names = arguments.only.split(",")
    if set(names) - set(PARTS):
        parser.error(f"there are {', '.join(PARTS)}")
    driver = ask_driver()
    if driver.problem is not None:
        print(f"not measured: {driver.problem}")
        return 0
    found = {name: _measured(name, arguments) if arguments.here else _apart(name, arguments) for name in names}
    print("\n".join(table(found)))
    return int(any(results.get("wrong") for results in found.values()))


def _measured(name: str, arguments: argparse.Namespace) -> Results:
    """A part, and its line."""
    try:
        results = PARTS[name](arguments)
    except Exception as error:  # whatever it is belongs into the line
        traceback.print_exc()
        kept = kept_rows(Path(os.environ[FILE])) if FILE in os.environ else {}
        results = {**kept, "failed": f"{type(error).__name__}: {error}", "wrong": True}
    print(keep(f"gpu_{name}", results, save=arguments.save), flush=True)
    return results


def _apart(name: str, arguments: argparse.Namespace) -> Results:
    """The same in a process of its own, which has so much time."""
    options = [
        f"--{key.replace('_', '-')}={value}" for key, value in vars(arguments).items() if value not in (None, False)
    ]
    options = ["--save" if option == "--save=True" else option for option in options if not option.startswith("--only")]
    line = [sys.executable, __file__, *options, "--here", "--only", name]
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder, "rows")
        said, problem = _within(line, {**os.environ, FILE: str(rows)}, PART_SECONDS)
        lines = [each for each in said.splitlines() if each.startswith("{")]
        if not lines:
            results: Results = {**kept_rows(rows), "failed": problem or "it said nothing", "wrong": True}
            lines = [keep(f"gpu_{name}", results, save=arguments.save)]
    print(lines[-1], flush=True)
    found: Results = json.loads(lines[-1])["results"]
    return found


def _within(line: Sequence[str], environment: Mapping[str, str], seconds: float) -> tuple[str, str]:
    """What a program says, and why it did not end well, if so; what it has started ends with it."""
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True) as process:
        try:
            said, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            return "", f"it took longer than {seconds:g} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return said, "" if process.returncode in (0, 1) else f"its process ended with {process.returncode}"


def table(found: Mapping[str, Results]) -> list[str]:
    """A line for everything measured: part, what, and its figures."""
    lines = []
    for part, results in found.items():
        for name, value in results.items():
            rows = value if isinstance(value, dict) and "median" not in value else {"": value}
            figures = "  ".join(f"{key} {_short(each)}".strip() for key, each in rows.items())
            lines.append(f"{part:10} {name:28} {figures}")
    return lines


def _short(value: Any) -> str:
    if isinstance(value, dict) and "median" in value:
        return f"{value['median']:g} ({value['min']:g}-{value['max']:g})"
    if isinstance(value, dict):
        return " ".join(f"{key}: {_short(each)}" for key, each in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
