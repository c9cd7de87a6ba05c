"""The one JSON line that ends every benchmark: what was measured, on what machine, at which commit.

    keep("import_time", {"import_s": spread(times)}, save=True)

With save the line goes to benchmarks/results/<benchmark>-<machine>.jsonl of the checkout, newest last.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moss_jt.errors import ConfigError

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"  # in a checkout


def spread(values: Sequence[float], digits: int = 4) -> dict[str, float | int]:
    """Median, smallest and largest of repeated measurements, and how many there were."""
    return {
        "median": round(statistics.median(values), digits),
        "min": round(min(values), digits),
        "max": round(max(values), digits),
        "runs": len(values),
    }


def ask(*command: str) -> str | None:
    """The output of a program, None where it is missing or fails."""
    if shutil.which(command[0]) is None:
        return None
    here = Path(__file__).resolve().parent
    done = subprocess.run(command, capture_output=True, text=True, cwd=here, timeout=60, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def read_field(file: str, pattern: str) -> str | None:
    """The first group of a pattern in a file of /proc, None where either is missing."""
    path = Path(file)
    found = re.search(pattern, path.read_text("utf-8"), re.MULTILINE) if path.is_file() else None
    return found.group(1).strip() if found else None


def machine() -> dict[str, Any]:
    """CPU, memory and device of this machine; nothing that names its owner."""
    memory_kb = read_field("/proc/meminfo", r"^MemTotal:\s+(\d+) kB")
    device = ask("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
    return {
        "cpu": read_field("/proc/cpuinfo", r"^model name\s*:\s*(.+)$") or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(int(memory_kb) / 2**20, 1) if memory_kb else None,
        "device": device.splitlines()[0] if device else None,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def commit() -> str | None:
    """The commit measured, with "+" where the tree differs from it; None outside of a checkout.

    In a copy without .git it is what MOSS_JT_COMMIT says, if anything.
    """
    if not BENCHMARKS.is_dir():
        return None
    name = ask("git", "rev-parse", "--short=12", "HEAD")
    if name is None:
        return os.environ.get("MOSS_JT_COMMIT")
    return name + ("+" if ask("git", "status", "--porcelain", "--untracked-files=no") else "")


def slug(text: str) -> str:
    """A text as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40]


def keep(benchmark: str, results: dict[str, Any], *, save: bool) -> str:
    """Make the line, keep it under benchmarks/results/ if asked, and give it back to be printed last.

    Raises:
        ConfigError: it is to be kept, and this is no checkout.
    """
    if save and not BENCHMARKS.is_dir():
        raise ConfigError("results are kept in a checkout, under benchmarks/results/; here the line is only printed.")
    here = machine()
    when = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%MZ")
    line = json.dumps(
        {"benchmark": benchmark, "when": when, "commit": commit(), "machine": here, "results": results},
        ensure_ascii=False,
    )
    if save:
        results_folder = BENCHMARKS / "results"
        results_folder.mkdir(exist_ok=True)
        with (results_folder / f"{benchmark}-{slug(here['device'] or here['cpu'])}.jsonl").open(
            "a", encoding="utf-8"
        ) as file:
            file.write(line + "\n")
    return line
