"""What our kernels do on a CUDA device: right, and how fast. `benchmarks/gpu_suite.sh` sets it up.

    python benchmarks/gpu.py [--only bandwidth,kernels,golden,products,decode] [--layers 34] [--save]

bandwidth  copies within the device, and to it from pinned and from ordinary memory
kernels    the tests of every kernel against numpy, run on this device (needs pytest)
golden     logits of the original's small models, exact and fast, on this device
products   int4 and int8 products of one layer for 1 to 512 tokens, bytes per second against copies on the device
decode     the full-size int4 model of random weights, resident: a prompt of 128 and 32 tokens after it

Each part ends with a JSON line as soon as it is measured; the exit code is 1 where numbers are wrong. Without a device
it says so and exits with 0.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from moss_jt.batch import single_batch
from moss_jt.bench import parse_synthetic, pass_bytes
from moss_jt.cache import KVCache
from moss_jt.checkpoint import Checkpoint
from moss_jt.config import Bits, MossConfig
from moss_jt.device_ops import DeviceBuffer, DeviceOps, matrices_of
from moss_jt.device_weights import DeviceWeights
from moss_jt.kernels.cupy_device import CupyDevice
from moss_jt.layout import TILE_ROWS, TileLayout
from moss_jt.load import native_folder
from moss_jt.model import Moss
from moss_jt.ops import ROUND_BLOCK
from moss_jt.plan import matrix_sizes
from moss_jt.progress import Quiet
from moss_jt.record import keep, spread
from moss_jt.startup.gpu import ask_driver
from moss_jt.synthetic import synthetic_store
from moss_jt.weights import WeightStore

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
MODELS = ("tiny-fp/safetensors-fp16", "tiny-fp-h8/bin-single", "tiny-int4/g32-actorder", "tiny-int8/g128")
SHAPES = {"qkv": (18432, 6144), "out": (6144, 6144), "fc_in": (24576, 6144), "fc_out": (6144, 24576)}
TOKENS = (1, 2, 4, 8, 16, 64, 512)
PAST_CACHES = 512 << 20
ALLOWED = {"exact": 1e-3, "fast": 0.25}  # rounded activations lose up to 0.19 on the CPU, too (docs/kernels.md)
Results = dict[str, Any]


def timed(device: CupyDevice, work: Callable[[], None], *, least_s: float = 0.05, runs: int = 9) -> list[float]:
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
    results: Results = {"copy_gb_per_s": round(copy_rate(device) / 1e9, 1)}
    for name, values in (("pinned", pinned), ("ordinary", np.zeros(nbytes, np.uint8))):
        taken = timed(device, partial(device.write, target, values, stays=True))
        rates = [nbytes / each / 1e9 for each in taken]
        results[f"to_device_{name}_gb_per_s"] = spread(rates, 1)
    device.close()
    return results


def on_device(
    config: MossConfig, store: WeightStore, device: CupyDevice, *, rounding: bool
) -> tuple[DeviceOps, KVCache]:
    """All of a model in device memory."""
    resident = {name: store.layout(name).shape[0] for name in matrices_of(config)}
    weights = DeviceWeights(device, store, resident)
    cache = KVCache(config, slots=1, tokens=256, kind="float16" if rounding else "float32")
    return DeviceOps(config, device, store, weights, cache, capacity=128, rounding=rounding), cache


def kernels(_: argparse.Namespace) -> Results:
    """What pytest says of the kernels' tests, run on the device."""
    files = [str(ROOT / "tests" / "kernels" / f"test_cuda_{name}.py") for name in ("products", "attention")]
    variables = {**os.environ, "MOSS_JT_TEST_DEVICE": "0", "PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-m", "pytest", "-q", "--rootdir", str(ROOT), *files]
    done = subprocess.run(line, stdout=subprocess.PIPE, text=True, env=variables, check=False)
    told = done.stdout.splitlines()
    return {
        "told": told[-1] if told else "",
        "failed": [each for each in told if "FAILED" in each],
        "wrong": done.returncode != 0,
    }


def golden(_: argparse.Namespace) -> Results:
    """The largest difference from the original's logits."""
    results: Results = {}
    for name in MODELS:
        path = GOLDEN / name / "expected.npz"
        want = np.load(path if path.is_file() else path.parents[1] / "expected.npz")
        checkpoint = Checkpoint.open(native_folder(GOLDEN / name, Quiet()))
        for way in ALLOWED if "int" in name else ("exact",):
            device, config = CupyDevice(), checkpoint.config
            ops, cache = on_device(config, WeightStore(checkpoint), device, rounding=way == "fast")
            ids = want["b2_ids"][0]
            cache.reserve(0, len(ids))
            network: Moss[DeviceBuffer] = Moss(config)
            logits = network.execute(ops, single_batch(ids, wanted=np.arange(len(ids))))
            off = float(np.abs(logits - want["b2_logits"][0]).max())
            results[f"{name} {way}"] = {"off": off, "wrong": not off <= ALLOWED[way]}
            device.close()
    results["wrong"] = any(each["wrong"] for each in results.values())
    return results


def products(_: argparse.Namespace) -> Results:
    """Weights per second for each shape and number of tokens."""
    device = CupyDevice()
    limit = copy_rate(device)
    results: Results = {"copy_gb_per_s": round(limit / 1e9, 1)}
    for bits in (4, 8):
        for name, shape in SHAPES.items():
            device_here = CupyDevice()
            for tokens in TOKENS:
                found = _product(device_here, TileLayout(shape, _bits(bits), 128), tokens)
                rates = [found["nbytes"] / each for each in found["seconds"]]
                results[f"int{bits} {name} {tokens}"] = {
                    "gb_per_s": spread([rate / 1e9 for rate in rates], 1),
                    "of_copy": round(sorted(rates)[len(rates) // 2] / limit, 3),
                }
            device_here.close()
    device.close()
    return results


def _bits(bits: int) -> Bits:
    return 4 if bits == 4 else 8


def _product(device: CupyDevice, layout: TileLayout, tokens: int) -> Results:
    """Seconds of one product whose weights no cache holds."""
    nbytes, blocks = layout.n_tiles * layout.tile_bytes, layout.padded_in // ROUND_BLOCK
    copies = -(-PAST_CACHES // nbytes)
    blob = device.allocate(copies * nbytes, "measuring")
    some = np.random.default_rng(0).integers(0, 0x38, nbytes, np.uint8)  # below 0x3800: finite scales
    for copy in range(copies):
        device.write(blob.after(copy * nbytes), some)
    codes = device.allocate(tokens * layout.padded_in, "measuring")
    steps, sums = (device.allocate(4 * tokens * blocks, "measuring") for _ in range(2))
    device.write(codes, np.ones(tokens * layout.padded_in, np.int8))
    device.write(steps, np.ones(tokens * blocks, np.float32))
    device.write(sums, np.full(tokens * blocks, ROUND_BLOCK, np.int32))
    y = device.allocate(4 * tokens * layout.shape[0], "measuring")
    size = 8 if tokens <= 8 else 16 if tokens <= 16 else "many"
    tiles = layout.n_tiles
    grid = (-(-tiles // 8), -(-tokens // 64)) if size == "many" else (tiles,)
    where = (layout.tile_bytes, layout.code_bytes, layout.code_bytes + layout.scale_bytes, layout.padded_in, 128)
    numbers = (tokens, tiles * TILE_ROWS, 0, *where, ROUND_BLOCK, layout.shape[0], 0)

    def work() -> None:
        for copy in range(copies):
            arguments = (blob.after(copy * nbytes), codes, steps, sums, None, y, *numbers)
            device.launch("linear_rounded", f"linear_int{layout.bits}_{size}", grid, 256, arguments)

    return {"nbytes": nbytes, "seconds": [each / copies for each in timed(device, work)]}


def decode(arguments: argparse.Namespace) -> Results:
    """Speed of the whole model, resident."""
    device = CupyDevice()
    limit = copy_rate(device)
    device.close()
    config = parse_synthetic("moss-moon-003-int4", layers=arguments.layers)
    device = CupyDevice()
    ops, cache = on_device(config, synthetic_store(config), device, rounding=True)
    network: Moss[DeviceBuffer] = Moss(config)
    ids = np.random.default_rng(0).integers(0, 50000, 128).astype(np.int32)
    prefill, tokens, answer, finite = [], [], [0], True
    for _ in range(4):
        cache.release(0)
        cache.reserve(0, len(ids))
        began = time.perf_counter()
        network.execute(ops, single_batch(ids))
        prefill.append(len(ids) / (time.perf_counter() - began))
        cache.commit(0, len(ids))
        for place in range(128, 160):
            cache.reserve(0, 1)
            began = time.perf_counter()
            logits = network.execute(ops, single_batch(np.array(answer[-1:], np.int32), start=place))
            tokens.append(time.perf_counter() - began)
            cache.commit(0, 1)
            answer.append(int(logits[0].argmax()))
            finite = finite and bool(np.isfinite(logits).all())
    nbytes = pass_bytes(matrix_sizes(config))
    rate = nbytes / sorted(tokens)[len(tokens) // 2]
    taken = device.taken
    device.close()
    return {
        "layers": config.n_layer,
        "copy_gb_per_s": round(limit / 1e9, 1),
        "prefill_tokens_per_s": spread(prefill[1:], 1),
        "decode_tokens_per_s": spread([1 / each for each in tokens[4:]], 1),
        "of_copy": round(rate / limit, 3),
        "taken_bytes": taken,
        "wrong": not finite,
    }


PARTS: dict[str, Callable[[argparse.Namespace], Results]] = {
    "bandwidth": bandwidth,
    "kernels": kernels,
    "golden": golden,
    "products": products,
    "decode": decode,
}


def main() -> int:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--layers", type=int, default=34)
    parser.add_argument("--save", action="store_true")
    arguments = parser.parse_args()
    names = arguments.only.split(",")
    if set(names) - set(PARTS):
        parser.error(f"there are {', '.join(PARTS)}")
    driver = ask_driver()
    if driver.problem is not None:
        print(f"not measured: {driver.problem}")
        return 0
    wrong = False
    for name in names:
        results = PARTS[name](arguments)
        print(keep(f"gpu_{name}", results, save=arguments.save), flush=True)
        wrong = wrong or bool(results.get("wrong"))
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
