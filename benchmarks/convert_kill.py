"""A conversion killed by SIGKILL at points spread evenly over the bytes written, and resumed each time.

    python benchmarks/convert_kill.py [--points 50] [--bits 4] [--layers 3] [--folder DIR] [--save]

The source is a random model with full-width layers of moss-moon-003 and a smaller vocabulary; int4
with 3 layers converts to 1.1 GB. The process is watched from outside and gets a real
SIGKILL when it has written so many bytes (its own account in /proc/PID/io); at that moment no result
may be visible, and the same command with --resume must then give files identical to those of a
conversion that nobody disturbed. Anything else is exit code 1. One JSON line comes last.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from moss_jt.converters.synth import preset_config, synthesize_foreign
from moss_jt.record import keep

ROOT = Path(__file__).resolve().parent.parent
CONVERT = [sys.executable, "-c", "from moss_jt.cli.convert import main; main()"]
POLL_S = 0.001
VOCABULARY = 16384


def hash_folder(folder: Path) -> dict[str, str]:
    """SHA-256 of every file."""
    hashes = {}
    for file in sorted(folder.iterdir()):
        with file.open("rb") as opened:
            sha = hashlib.sha256()
            while piece := opened.read(1 << 24):
                sha.update(piece)
        hashes[file.name] = sha.hexdigest()
    return hashes


def start(source: Path, target: Path, *options: str) -> subprocess.Popen[bytes]:
    """Begin a conversion."""
    words = [*CONVERT, "hf2jittor", str(source), str(target), *options]
    return subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen[bytes]) -> None:
    """Wait for a conversion that must succeed."""
    _, errors = process.communicate()
    if process.returncode:
        raise SystemExit(f"a conversion failed:\n{errors.decode()}")


def bytes_written(pid: int) -> int:
    """What a process has handed to write calls so far."""
    for line in Path(f"/proc/{pid}/io").read_text().splitlines():
        if line.startswith("wchar:"):
            return int(line.split()[1])
    raise SystemExit("this system does not count the bytes that a process writes")


def kill_at(process: subprocess.Popen[bytes], point: int) -> int:
    """Let a conversion write `point` bytes, then kill it; how many it had written."""
    written = 0
    while process.poll() is None:
        written = bytes_written(process.pid)
        if written >= point:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            return written
        time.sleep(POLL_S)
    raise SystemExit(f"the conversion ended before it had written {point} bytes")


def measure(source: Path, folder: Path, points: int) -> dict[str, object]:
    """Convert once in peace, then once for every point with a kill and a resume."""
    target = folder / "native"
    finish(start(source, target))
    wanted = hash_folder(target)
    total = sum(file.stat().st_size for file in target.glob("*.safetensors"))
    shutil.rmtree(target)
    print(f"{total / 1e9:.2f} GB are written; {points} kills", flush=True)
    equal, late = 0, []
    for number in range(1, points + 1):
        point = total * number // (points + 1)
        written = kill_at(start(source, target), point)
        late.append(written - point)
        if target.exists():
            raise SystemExit(f"killed after {written} bytes, and a result is visible")
        began = time.perf_counter()
        finish(start(source, target, "--resume"))
        same = hash_folder(target) == wanted
        equal += same
        print(
            f"{number:3d}: killed after {written:>12,} bytes, resumed in {time.perf_counter() - began:5.1f} s, {'identical' if same else 'DIFFERENT'}",
            flush=True,
        )
        shutil.rmtree(target)
    return {"bytes": total, "points": points, "identical": equal, "largest_overshoot": max(late)}


def main() -> int:
    """Measure, then print the line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--points", type=int, default=50)
    parser.add_argument("--bits", default=4, type=int, choices=[4, 8, 16])
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to work; else a temporary folder")
    parser.add_argument("--save", action="store_true", help="keep the result under benchmarks/results")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=chosen.folder) as made:
        folder = Path(made)
        source = folder / "hf"
        config = replace(preset_config("moss-moon-003", bits=chosen.bits, layers=chosen.layers), vocab_size=VOCABULARY)
        synthesize_foreign(config, source)
        values = measure(source, folder, chosen.points)
    print(keep("convert_kill", {**values, "bits": chosen.bits, "layers": chosen.layers}, save=chosen.save))
    return int(values["identical"] != chosen.points)


if __name__ == "__main__":
    sys.exit(main())
