"""How far `moss-jt fit` is from what then happens: formats x budgets, decoding and prefill.

    python benchmarks/fit_error.py [--formats int4,int8,fp16] [--layers 4] [--budgets 5] [--tokens 12]
                                   [--folder DIR] [--save]

A model of full width is made on disk for each format. Budgets lie evenly from just above the smallest
to what holds everything. For each one a fresh process loads the model within it and answers a prompt
greedily, again and again; disk and kernels are measured in between. Two predictions are compared with
the median token: one from those measurements, and one from the calibration that was kept before all runs. The error is predicted / measured - 1 of tokens a second. More than 15 % of the
first kind anywhere is exit code 1. One JSON line comes last.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from moss_jt import measuring
from moss_jt.calibrate import Calibration, KernelFound, Wanted, calibrate, disk_of, load_calibration
from moss_jt.checkpoint import Checkpoint, is_native
from moss_jt.config import GenerationConfig, MossConfig
from moss_jt.converters.synth import preset_config, synthesize
from moss_jt.engine import Engine
from moss_jt.fit import BASE_BYTES
from moss_jt.limits import Limits
from moss_jt.load import load_model
from moss_jt.messages import Request
from moss_jt.plan import MatrixSize, Needs, make_plan, matrix_sizes, needs_of, smallest_memory
from moss_jt.predict import Predictor, Spread
from moss_jt.record import keep

ROOT = Path(__file__).resolve().parent.parent
BITS = {"int4": 4, "int8": 8, "fp16": 16}
PROMPT, CONTEXT = 64, 512
LIMIT = 0.15
GROUP = 4  # tokens of an answer; the machine is measured before each, and its first token does not count


def opened(folder: Path, base: int) -> tuple[MossConfig, list[MatrixSize], Needs]:
    """Shape, matrices and needs of a model on disk."""
    checkpoint = Checkpoint.open(folder)
    sizes = matrix_sizes(checkpoint.config, {name: entry.layout for name, entry in checkpoint.entries.items()})
    return checkpoint.config, sizes, needs_of(checkpoint.config, sizes, base=base, kv="float16")


def budgets_of(folder: Path, count: int) -> list[int]:
    """Evenly from a little more than the smallest to a little more than holds everything."""
    _, sizes, needs = opened(folder, BASE_BYTES)
    low = smallest_memory(sizes, needs, CONTEXT) + (128 << 20)
    whole = make_plan(sizes, needs, memory=1 << 50, context=CONTEXT).total_bytes
    high = needs.fixed + whole + needs.kv_bytes(CONTEXT) + (128 << 20)
    return [low + (high - low) * step // max(1, count - 1) for step in range(count)]


def wanted_of(folder: Path) -> Wanted:
    """What a prediction for the model needs to know."""
    _, sizes, _ = opened(folder, 0)
    return Wanted(frozenset(size.stored for size in sizes), "fast", "float16", folder)


def predict(folder: Path, memory: int, base: int, found: Calibration) -> dict[str, Any]:
    """What fit says, by some calibration."""
    config, sizes, needs = opened(folder, base)
    plan = make_plan(sizes, needs, memory=memory, context=CONTEXT)
    model = Predictor(config, sizes, plan, found.rates(wanted_of(folder)))
    step = model.decoding(PROMPT + 8)
    return {
        "token_s": step.seconds,
        "disk_s": step.disk_s,
        "compute_s": step.compute_s,
        "streamed_gb": round(step.streamed_bytes / 1e9, 3),
        "prefill_s": model.prefill(PROMPT).seconds,
    }


class Rig:
    """The machine's rates, sampled in between: the disk, and the kernels for every format of a model."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file = max(folder.glob("*.safetensors"), key=lambda name: name.stat().st_size)
        self._limits, self._load = Limits(), Limits()
        stored = sorted(wanted_of(folder).stored)
        self._fixed = measuring.measure_fixed("float16")
        self._benches = {name: measuring.Bench(name, "float16", rounding=True) for name in stored}
        self._seconds: dict[str, list[list[float]]] = {name: [[], [], []] for name in stored}
        self._disk: list[float] = []
        self._beside: list[float] = []

    def sample(self) -> None:
        """Measure everything for a moment."""
        self._disk.append(self._limits.disk(self._file, 0.3).per_second)
        self._beside.append(self._limits.disk_beside(self._load, self._file, 0.3).per_second)
        for name, bench in self._benches.items():
            one, late, many = self._seconds[name]
            bench.step(0, 1)  # after whatever ran before
            one.append(bench.step(0, 1))
            late.append(bench.step(measuring.CONTEXT - 1, 1))
            many.append(bench.step(0, PROMPT))

    def found(self, known: Calibration) -> Calibration:
        """A calibration with what was sampled."""
        here = disk_of(self._folder)
        kernels, attention = dict(known.kernels), dict(known.attention)
        for name, bench in self._benches.items():
            one, late, many = (Spread.of(seconds) for seconds in self._seconds[name])
            rates = bench.rates(one, late, many, PROMPT, self._fixed)
            key = f"{name} fast" if name.startswith("int") else name
            kernels[key], attention["float16"] = KernelFound(rates.decode, rates.prefill), rates.attention
        disk = replace(known.disks[here], rate=Spread.of(self._disk), beside=Spread.of(self._beside))
        rest = replace(known, layer_s=self._fixed.layer_s, token_s=self._fixed.token_s)
        return replace(rest, disks={here: disk}, kernels=kernels, attention=attention)


def forget(folder: Path) -> None:
    """Drop a model's files from the page cache."""
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as opened:
            os.fdatasync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def run_once(folder: Path, memory: int, tokens: int) -> dict[str, Any]:
    """What the child process does: load, answer, measure in between, predict."""
    model = load_model(folder, compute="fast", memory=memory, max_tokens=CONTEXT)
    assert model.budget is not None, "a model that was loaded has a budget"
    rig = Rig(folder)
    prompts, steps = [], []
    for start in range(0, tokens, GROUP - 1):
        rig.sample()
        ids = tuple(1 + (start + number) * 37 % (model.config.vocab_size - 1) for number in range(PROMPT))
        engine = Engine(model)
        engine.submit(Request(ids, GenerationConfig(do_sample=False, max_new_tokens=GROUP + 1)))
        taken = [seconds_of(engine) for _ in range(GROUP + 1)]
        prompts.append(taken[0])
        steps += taken[2:]
    fresh = predict(folder, memory, model.budget.plan.needs.base, rig.found(load_calibration()))
    measured = {"token_s": statistics.median(steps), "prefill_s": statistics.median(prompts), "steps": steps}
    return {"base": model.budget.plan.needs.base, "measured": measured, "fresh": fresh}


def seconds_of(engine: Engine) -> float:
    """Seconds of one step of an engine."""
    began = time.perf_counter()
    engine.step()
    return time.perf_counter() - began


def in_child(folder: Path, memory: int, tokens: int) -> dict[str, Any]:
    """`run_once` in a process of its own."""
    command = [sys.executable, __file__, "--child", str(folder), str(memory), "--tokens", str(tokens)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def error(predicted: dict[str, Any], measured: dict[str, Any], key: str = "token_s") -> float:
    """Of a rate: predicted tokens a second over measured ones, less 1."""
    return float(measured[key] / predicted[key] - 1)


def case(name: str, folder: Path, memory: int, tokens: int, kept: Calibration) -> dict[str, Any]:
    """One format and budget."""
    forget(folder)
    run = in_child(folder, memory, tokens)
    run["cached"] = predict(folder, memory, run["base"], kept)
    result = {
        "format": name,
        "memory_gib": round(memory / 2**30, 2),
        **{f"error_{kind}": round(error(run[kind], run["measured"]), 3) for kind in ("fresh", "cached")},
        "error_prefill": round(error(run["fresh"], run["measured"], "prefill_s"), 3),
        **run,
    }
    fresh, token = run["fresh"], run["measured"]["token_s"]
    print(
        f"{name} {result['memory_gib']:6.2f} GiB: {token:.4f} s a token, predicted {fresh['token_s']:.4f} "
        f"(disk {fresh['disk_s']:.4f}, compute {fresh['compute_s']:.4f}): "
        f"{result['error_fresh']:+.1%}; by the kept calibration {result['error_cached']:+.1%}; "
        f"prefill {result['error_prefill']:+.1%}",
        flush=True,
    )
    return result


def summary(cases: list[dict[str, Any]]) -> dict[str, Any]:
    """Largest and median error of each kind."""
    values = {}
    for kind in ("error_fresh", "error_cached", "error_prefill"):
        sizes = [abs(found[kind]) for found in cases]
        values[kind] = {"largest": max(sizes), "median": round(statistics.median(sizes), 3)}
    return values


def run_all(arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Every format and budget."""
    cases = []
    for name in arguments.formats.split(","):
        model = folder / f"fit-{name}-{arguments.layers}"
        if not is_native(model):
            synthesize(preset_config("moss-moon-003", bits=BITS[name], layers=arguments.layers), model, resume=True)
        kept = calibrate(wanted_of(model), again=True)
        for memory in budgets_of(model, arguments.budgets):
            cases.append(case(name, model, memory, arguments.tokens, kept))
    return cases


def main() -> int:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", default="int4,int8,fp16")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--budgets", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--folder", type=Path, help="where the models are made and stay; else a temporary folder")
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--child", nargs=2, metavar=("MODEL", "BYTES"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(run_once(Path(arguments.child[0]), int(arguments.child[1]), arguments.tokens)))
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        cases = run_all(arguments, arguments.folder or Path(scratch))
    results = {"layers": arguments.layers, "summary": summary(cases), "cases": cases}
    print(keep("fit_error", results, save=arguments.save))
    return int(results["summary"]["error_fresh"]["largest"] > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
