"""How long `import moss_jt` and every `--help` take beyond a bare interpreter.

    python benchmarks/import_time.py [--runs 15] [--save]

Each run starts a bare interpreter and then the call, so that a busy moment hits both; what counts is
the median of the differences. More than 0.5 s anywhere is exit code 1. One JSON line comes last.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from moss_jt.record import keep, spread

ROOT = Path(__file__).resolve().parent.parent
LIMIT_S = 0.5
BARE = ["-c", "pass"]
FIND_COMMANDS = """
import click
from moss_jt.cli.main import make_group
def walk(command, words):
    print(*words)
    if isinstance(command, click.Group):
        with click.Context(command) as ctx:
            for name in command.list_commands(ctx):
                walk(command.get_command(ctx, name), [*words, name])
walk(make_group(), [])
"""


def time_once(arguments: list[str]) -> float:
    """Seconds of one interpreter with these arguments."""
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, check=False)
    taken = time.perf_counter() - begin
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{done.stderr.decode()}")
    return taken


def find_calls() -> dict[str, list[str]]:
    """Name -> arguments of what is measured: the import, then each `--help`."""
    done = subprocess.run([sys.executable, "-c", FIND_COMMANDS], cwd=ROOT, capture_output=True, text=True, check=True)
    calls = {"import moss_jt": ["-c", "import moss_jt"]}
    for line in done.stdout.splitlines():
        words = line.split()
        calls[" ".join(["moss-jt", *words, "--help"])] = ["-m", "moss_jt.cli", *words, "--help"]
    return calls


def measure(arguments: list[str], runs: int) -> list[float]:
    """Seconds beyond a bare interpreter, once for each run."""
    time_once(arguments)  # warm: byte code written, files in memory
    differences = []
    for _ in range(runs):
        bare = time_once(BARE)
        differences.append(time_once(arguments) - bare)
    return differences


def main() -> int:
    """Measure, print a table, then the line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--save", action="store_true", help="keep the line under benchmarks/results/")
    options = parser.parse_args()
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed package has its byte code
    results: dict[str, dict[str, float | int]] = {}
    for name, arguments in find_calls().items():
        times = measure(arguments, options.runs)
        results[name] = spread(times)
        print(f"{statistics.median(times):7.3f} s  ({min(times):.3f} to {max(times):.3f})  {name}")
    slowest = max(row["median"] for row in results.values())
    print(keep("import_time", {"limit_s": LIMIT_S, "slowest_s": slowest, "beyond_bare_s": results}, save=options.save))
    return int(slowest > LIMIT_S)


if __name__ == "__main__":
    sys.exit(main())
