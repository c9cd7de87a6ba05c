"""Part of gpu.py about Jittor itself in CUDA mode: does it start on this machine, and compute what numpy computes?

    python benchmarks/gpu_jittor.py [--device cuda] [--only matmul_float32,sort]

Each check is a result of its own, told as soon as it is there; all run in a process of their own, so that one that takes
the process with it costs the others behind it and no more. None needs the network.

Nothing that moss-jt computes on a device goes through Jittor: answers come from our kernels, training runs on the CPU.
So what is checked is what `moss_jt.startup` promises to whoever asks it for Jittor on CUDA, and that our kernels compute
right in the same process. Left out, since nothing of ours can meet it: cuDNN with its convolutions and recurrent
networks, cuFFT and cuSPARSE (Jittor is started without them), and memory handed between Jittor and cupy (numpy_code,
init_cupy, device pointers of Vars: our kernels have memory and streams of their own). Headers of Python and a numpy
that fits are what starting looks at first.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Results = dict[str, Any]

ROOT = Path(__file__).resolve().parent.parent
START_S = 420  # with compiling Jittor, the first time
DTYPES = ("float32", "float16", "float64", "int32", "int64", "int16", "int8", "uint8", "bool")


def numbers(*shape: int, seed: int = 0) -> Array:
    """Normal numbers, float64."""
    return np.random.default_rng(seed).standard_normal(shape)


def off(found: Any, wanted: Array) -> float:
    """The largest difference, in parts of the largest number wanted."""
    values = np.asarray(found.numpy(), np.float64)
    assert values.shape == wanted.shape, f"the shape is {values.shape} in place of {wanted.shape}"
    return float(np.abs(values - wanted).max() / max(1e-30, np.abs(wanted).max())) if wanted.size else 0.0


def product(jt: Any, dtype: str) -> float:
    """A matrix product, wider than any tile."""
    left, right = numbers(67, 259).astype(dtype), numbers(259, 131, seed=1).astype(dtype)
    with jt.flag_scope(auto_convert_64_to_32=0):
        return off(jt.array(left) @ jt.array(right), left.astype(np.float64) @ right.astype(np.float64))


def batches(jt: Any) -> float:
    """Products of many matrices at once."""
    left, right = numbers(5, 33, 65).astype("float32"), numbers(5, 65, 17, seed=1).astype("float32")
    return off(jt.nn.bmm(jt.array(left), jt.array(right)), left.astype(np.float64) @ right)


def round_trips(jt: Any) -> float:
    """Arrays of all kinds and layouts there and back."""
    worst = 0.0
    with jt.flag_scope(auto_convert_64_to_32=0):
        for dtype in DTYPES:
            whole = (np.arange(60).reshape(5, 12) % 7).astype(dtype)
            for array in (whole, whole.T, whole[1:, ::2], whole[:0]):
                worst = max(worst, off(jt.array(array), array.astype(np.float64)))
    return worst


def elementwise(jt: Any) -> float:
    """A chain that Jittor fuses into one kernel, in float32 (nvcc's fast functions) and in float16, of 11 bits."""
    x = numbers(3, 1001)
    worst = off(jt.tanh(jt.array(x.astype("float32")) * 0.5).exp(), np.exp(np.tanh(x * 0.5)))
    half = x.astype("float16").astype(np.float64)
    return max(worst, off(jt.array(x.astype("float16")) * 2 + 1, half * 2 + 1))


def reductions(jt: Any) -> float:
    """Sums, means and largest numbers along each side."""
    x = numbers(129, 257).astype("float32")
    var, worst = jt.array(x), 0.0
    for dim in (0, 1):
        worst = max(worst, off(var.sum(dim), x.astype(np.float64).sum(dim)))
        worst = max(worst, off(var.mean(dim), x.astype(np.float64).mean(dim)))
        worst = max(worst, off(var.max(dim), x.max(dim)))
    return worst


def sort(jt: Any) -> float:
    """Order, and the numbers in it."""
    x = np.random.default_rng(0).permutation(5000).reshape(5, 1000).astype("float32")
    index, values = jt.argsort(jt.array(x), dim=1)
    return max(off(index, np.argsort(x, 1)), off(values, np.sort(x, 1)))


def largest(jt: Any) -> float:
    """Where the largest number of each row is."""
    x = np.random.default_rng(0).permutation(9000).reshape(9, 1000).astype("float32")
    index, values = jt.argmax(jt.array(x), 1)
    return max(off(index, x.argmax(1)), off(values, x.max(1)))


def where(jt: Any) -> float:
    """Which numbers are above nought."""
    x = numbers(5000).astype("float32")
    (index,) = jt.where(jt.array(x) > 0)
    return off(index, np.where(x > 0)[0])


def running_sums(jt: Any) -> float:
    """Sums up to each place."""
    x = numbers(7, 1025).astype("float32")
    return off(jt.cumsum(jt.array(x), 1), x.astype(np.float64).cumsum(1))


def softmax(jt: Any) -> float:
    """Rows of probabilities."""
    x = 4 * numbers(17, 1003)
    wanted = np.exp(x - x.max(1, keepdims=True))
    found = jt.nn.softmax(jt.array(x.astype("float32")), dim=1)
    return off(found, wanted / wanted.sum(1, keepdims=True))


def places(jt: Any) -> float:
    """Rows taken by number, columns taken by a slice, and numbers put in place."""
    x = numbers(40, 30).astype("float32")
    rows = np.array([3, 0, 39, 3], np.int32)
    var = jt.array(x)
    worst = max(off(var[jt.array(rows)], x[rows]), off(var[:, 4:20:3], x[:, 4:20:3]))
    changed = x.copy()
    changed[2:5] = 7.0
    var[2:5] = 7.0
    return max(worst, off(var, changed))


def random(jt: Any) -> float:
    """How far mean and spread of a million numbers are from what they should be, in standard errors over 50."""
    count = 1_000_000
    even, normal = jt.rand((count,)).numpy(), jt.randn((count,)).numpy()
    assert 0 <= even.min() < 1e-4 and 1 - 1e-4 < even.max() <= 1, "not from 0 to 1"
    assert not np.array_equal(jt.rand((count,)).numpy(), even), "the same numbers again"
    errors = ((even.mean() - 0.5) * 12**0.5, normal.mean(), (normal.var() - 1) / 2**0.5)
    return float(max(map(abs, errors)) * count**0.5 / 50)


def gradient(jt: Any) -> float:
    """Of the squares of a product's numbers, by both sides."""
    left, right = numbers(31, 47).astype("float32"), numbers(47, 23, seed=1).astype("float32")
    a, b = jt.array(left), jt.array(right)
    found = jt.grad(((a @ b) ** 2).sum(), [a, b])
    wide = left.astype(np.float64) @ right
    wanted = (2 * wide @ right.T, 2 * left.T.astype(np.float64) @ wide)
    return max(map(off, found, wanted))


def ours_beside(jt: Any) -> float:
    """Our kernels in the process in which Jittor computes; raises where they give other numbers."""
    from moss_jt.device_check import check_device
    from moss_jt.kernels.cupy_device import CupyDevice

    x = jt.array(numbers(512, 512).astype("float32"))
    y = x @ x  # on its way while ours run
    device = CupyDevice()
    try:
        check_device(device)
    finally:
        device.close()
    return off(y, x.numpy().astype(np.float64) @ x.numpy())


@dataclass(frozen=True)
class Check:
    """Something that Jittor should do; `allowed` is what it may be off."""

    run: Callable[[Any], float]
    allowed: float
    on_cpu: bool = True


CHECKS: dict[str, Check] = {
    "round_trips": Check(round_trips, 0.0),
    "matmul_float32": Check(lambda jt: product(jt, "float32"), 1e-5),
    "matmul_float64": Check(lambda jt: product(jt, "float64"), 1e-12),
    "matmul_float16": Check(lambda jt: product(jt, "float16"), 2e-2),
    "batches": Check(batches, 1e-5),
    "elementwise": Check(elementwise, 1e-3),
    "reductions": Check(reductions, 1e-5),
    "sort": Check(sort, 0.0),
    "largest": Check(largest, 0.0),
    "where": Check(where, 0.0),
    "running_sums": Check(running_sums, 1e-5),
    "softmax": Check(softmax, 1e-4),
    "places": Check(places, 0.0),
    "random": Check(random, 0.1),
    "gradient": Check(gradient, 1e-5),
    "ours_beside": Check(ours_beside, 1e-4, on_cpu=False),
}


def result_of(check: Check, jt: Any) -> Results:
    """What a check found; whatever it raises is a finding, too."""
    try:
        found = check.run(jt)
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return {"failed": f"{type(error).__name__}: {lines[0] if lines else 'no words'}", "wrong": True}
    return {"off": float(f"{found:.3g}"), "wrong": not found <= check.allowed}


def runtimes() -> list[str]:
    """The CUDA runtimes that this process has loaded: two of them are not forbidden, but good to know."""
    maps = Path("/proc/self/maps").read_text("utf-8")
    return sorted(set(re.findall(r"(/\S*libcudart[^\s/]*)", maps)))


def part(device: str = "cuda", only: Sequence[str] = ()) -> Results:
    """Run the checks in a process of their own; what it did not come to is wrong."""
    names = [
        name for name, check in CHECKS.items() if (not only or name in only) and (device == "cuda" or check.on_cpu)
    ]
    if importlib.util.find_spec("jittor") is None:
        return {"not_measured": "Jittor is not installed"}
    line = [sys.executable, __file__, "--device", device, "--only", ",".join(names)]
    try:
        done = subprocess.run(line, capture_output=True, text=True, timeout=START_S, check=False)
        said, told, how = done.stdout, done.stderr, f"the process ended with {done.returncode}"
    except subprocess.TimeoutExpired as late:
        said, told, how = _text(late.stdout), _text(late.stderr), f"not through within {START_S} s"
    return gathered(names, said, f"{how}: {(told.strip().splitlines() or ['no words'])[-1]}")


def gathered(names: Sequence[str], said: str, ended: str) -> Results:
    """The results in the lines that the process told, and `ended` for those that are not there."""
    results: Results = {}
    for line in said.splitlines():
        if line.startswith("{"):
            results |= json.loads(line)
    if "not_measured" in results:
        return results
    for name in ("start", *names):
        results.setdefault(name, {"failed": ended, "wrong": True})
    return {**results, "wrong": any(row["wrong"] for row in results.values())}


def _text(said: str | bytes | None) -> str:
    return said.decode("utf-8", "replace") if isinstance(said, bytes) else said or ""


def main() -> None:
    """Start Jittor and run the checks, a line of JSON for each."""
    from moss_jt import startup
    from moss_jt.paths import jittor_home
    from moss_jt.startup.plan import DeviceWish, cuda_state

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--only", default=",".join(CHECKS))
    arguments = parser.parse_args()
    if arguments.device == "cuda":
        problem, found = cuda_state(jittor_home())
        if found is None:
            print(json.dumps({"not_measured": f"Jittor cannot use CUDA here: {problem}"}))
            return
    began = time.perf_counter()
    compiles = startup.compile_needed(cast(DeviceWish, arguments.device))
    jt = startup.import_jittor(device=arguments.device)
    seconds = round(time.perf_counter() - began, 1)
    told = {"seconds": seconds, "compiled": compiles, "on": startup.device_reason(), "wrong": False}
    print(json.dumps({"start": told}), flush=True)
    for name in arguments.only.split(","):
        print(json.dumps({name: result_of(CHECKS[name], jt)}), flush=True)
    print(json.dumps({"runtimes": {"loaded": runtimes(), "wrong": False}}))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
