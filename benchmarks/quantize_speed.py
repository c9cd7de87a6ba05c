"""Quantising a full-width model: MB of floating-point source per second of processor time, peak memory, errors.

    python benchmarks/quantize_speed.py [--layers 1] [--bits 4,8] [--folder DIR] [--save]

The source is a native fp16 model of random, normally distributed weights (one layer and the two tables
have 3.6 GB). Blocks become int4 or int8, the head int8. Processor time is that of the whole process:
reading, searching, packing, hashing and writing, and copying the embedding. One JSON line comes last.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from moss_jt.checkpoint import expected_shapes, quantization_of
from moss_jt.config import MossConfig
from moss_jt.converters.synth import preset_config, synthesize
from moss_jt.record import keep

ROOT = Path(__file__).resolve().parent.parent
QUANTIZE = [sys.executable, "-m", "moss_jt.cli", "quantize"]
BOUND_MIB = 400


def quantized_bytes(config: MossConfig) -> int:
    """Bytes of the fp16 matrices that are quantised."""
    shapes = expected_shapes(config).items()
    return sum(2 * shape[0] * shape[1] for name, shape in shapes if quantization_of(config, name) is not None)


def measure(source: Path, bits: int, layers: int, folder: Path) -> dict[str, object]:
    """Quantise once and delete the result."""
    target = folder / f"int{bits}"
    words = [*QUANTIZE, str(source), str(target), "--bits", str(bits), "--head", "int8", "--json"]
    began = time.perf_counter()
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None, "the output is a pipe"
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"quantising {source} failed")
    seconds, cpu = time.perf_counter() - began, usage.ru_utime + usage.ru_stime
    shutil.rmtree(target)
    matrices = json.loads(output)["matrices"].values()
    nbytes = quantized_bytes(preset_config("moss-moon-003", bits=bits, layers=layers, head_bits=8))
    ratios = [one["relative_error"] / one["relative_error_plain"] for one in matrices]
    print(
        f"int{bits}: {nbytes / 1e9:.2f} GB quantised in {seconds:.1f} s and {cpu:.1f} s of processor time: "
        f"{nbytes / cpu / 1e6:.1f} MB/s a core; peak memory {usage.ru_maxrss / 1024:.0f} MiB; "
        f"error {min(ratios):.4f} to {max(ratios):.4f} of plain rounding",
        flush=True,
    )
    return {
        "bits": bits,
        "source_bytes": nbytes,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu, 1),
        "mb_per_core_second": round(nbytes / cpu / 1e6, 1),
        "peak_mib": round(usage.ru_maxrss / 1024),
        "error_over_plain": [round(min(ratios), 4), round(max(ratios), 4)],
    }


def main() -> int:
    """Measure, then print the line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--bits", default="4,8")
    parser.add_argument("--folder", type=Path, help="where to work; else a temporary folder")
    parser.add_argument("--save", action="store_true", help="keep the line under benchmarks/results/")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=chosen.folder) as made:
        folder = Path(made)
        source = synthesize(preset_config("moss-moon-003", layers=chosen.layers), folder / "fp16").path
        rows = [measure(source, int(bits), chosen.layers, folder) for bits in chosen.bits.split(",")]
    print(keep("quantize_speed", {"layers": chosen.layers, "cases": rows, "bound_mib": BOUND_MIB}, save=chosen.save))
    return int(any(int(str(row["peak_mib"])) > BOUND_MIB for row in rows))


if __name__ == "__main__":
    sys.exit(main())
