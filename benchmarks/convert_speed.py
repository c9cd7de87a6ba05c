"""Conversion of large checkpoints: MB/s against a plain copy and the disk in the same run, peak memory.

    python benchmarks/convert_speed.py [--cases int4:27,int4:4,fp16:13,fp16:3] [--folder DIR] [--save]

A case is a random model of that many full-width layers as one pytorch_model.bin (int4:27 has 9 GB).
Source files are dropped from the page cache before each reading. Around each conversion the same disk
is measured by itself: writing (with fdatasync), reading, and copying the source's first gigabytes as
`cp` would. Everything is deleted afterwards. One JSON line comes last.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from moss_jt.converters.synth import preset_config, synthesize_foreign
from moss_jt.record import keep

ROOT = Path(__file__).resolve().parent.parent
CONVERT = [sys.executable, "-c", "from moss_jt.cli.convert import main; main()"]
PROBE_BYTES = 3 << 30
PIECE_BYTES = 16 << 20
BOUND_MIB = 1024  # beside the largest tensor


def forget(file: Path) -> None:
    """Drop a file from the page cache."""
    with file.open("rb") as opened:
        os.fdatasync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy(source: Path, target: Path, *, read: bool = True, write: bool = True) -> float:
    """MB/s of copying the first bytes of a file, or of one half of that work."""
    forget(source)
    piece = memoryview(bytearray(PIECE_BYTES))
    done = 0
    began = time.perf_counter()
    with source.open("rb", buffering=0) as reader, target.open("wb", buffering=0) as writer:
        while done < PROBE_BYTES:
            count = reader.readinto(piece) if read else len(piece)
            if not count:
                break
            if write:
                writer.write(piece[:count])
            done += count
        if write:
            os.fdatasync(writer.fileno())
    taken = time.perf_counter() - began
    target.unlink()
    return done / taken / 1e6


def probe(source: Path, folder: Path) -> dict[str, float]:
    """The disk by itself, in MB/s."""
    return {
        "write": copy(source, folder / "probe", read=False),
        "read": copy(source, folder / "probe", write=False),
        "copy": copy(source, folder / "probe"),
    }


def convert(source: Path, target: Path) -> tuple[float, float]:
    """Seconds and peak memory in MiB of one conversion."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [*CONVERT, "hf2jittor", str(source), str(target)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"the conversion of {source} failed")
    return time.perf_counter() - began, usage.ru_maxrss / 1024


def measure(case: str, folder: Path) -> dict[str, object]:
    """Make a source, convert it, delete both."""
    kind, layers = case.split(":")
    bits = {"int4": 4, "int8": 8, "fp16": 16}[kind]
    source, target = folder / case.replace(":", "-"), folder / "native"
    synthesize_foreign(preset_config("moss-moon-003", bits=bits, layers=int(layers)), source)
    file = source / "pytorch_model.bin"
    before = probe(file, folder)
    forget(file)
    seconds, peak = convert(source, target)
    written = sum(part.stat().st_size for part in target.glob("*.safetensors"))
    shutil.rmtree(target)
    after = probe(file, folder)
    shutil.rmtree(source)
    disk = {name: statistics.mean((before[name], after[name])) for name in before}
    speed = written / seconds / 1e6
    print(
        f"{case:8s} {written / 1e9:6.2f} GB in {seconds:6.1f} s: {speed:5.0f} MB/s = {speed / disk['copy']:.2f} of a copy "
        f"(copy {disk['copy']:.0f}, write {disk['write']:.0f}, read {disk['read']:.0f} MB/s); peak memory {peak:.0f} MiB",
        flush=True,
    )
    return {
        "case": case,
        "bytes": written,
        "seconds": round(seconds, 1),
        "mb_per_s": round(speed),
        "peak_mib": round(peak),
        "disk_before": {name: round(value) for name, value in before.items()},
        "disk_after": {name: round(value) for name, value in after.items()},
    }


def main() -> int:
    """Measure, then print the line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", default="int4:27,int4:4,fp16:13,fp16:3")
    parser.add_argument("--folder", type=Path, help="where to work; else a temporary folder")
    parser.add_argument("--save", action="store_true", help="keep the line under benchmarks/results/")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=chosen.folder) as made:
        rows = [measure(case, Path(made)) for case in chosen.cases.split(",")]
    print(keep("convert_speed", {"cases": rows, "bound_mib": BOUND_MIB}, save=chosen.save))
    return int(any(int(str(row["peak_mib"])) > BOUND_MIB for row in rows))


if __name__ == "__main__":
    sys.exit(main())
