"""Where the peers live: one folder for each, with an environment of its own, outside of the checkout.

`MOSS_JT_HOME/peers` unless --folder names another one. Deleting a peer's folder undoes its --build.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moss_jt import paths


@dataclass(frozen=True)
class Ended:
    """A program that has run.

    Attributes:
        output: what it wrote to stdout.
        cpu_seconds: user and system, children that it waited for included.
        peak_bytes: the most memory it had, mapped files included.
    """

    output: str
    cpu_seconds: float
    peak_bytes: int


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of every peer."""
    parser.add_argument("--build", action="store_true", help="make the peer's environment first (needs pip's network)")
    parser.add_argument("--folder", type=Path, help="where peers live; else MOSS_JT_HOME/peers")
    parser.add_argument("--save", action="store_true", help="keep the line under benchmarks/results/")


def folder_of(peer: str, chosen: Path | None) -> Path:
    """The folder of a peer."""
    return (chosen.absolute() if chosen is not None else paths.home() / "peers") / peer


def make_environment(folder: Path, packages: Sequence[str]) -> None:
    """A virtual environment with these packages."""
    subprocess.run([sys.executable, "-m", "venv", str(folder / "env")], check=True)
    pip(folder, "install", "--quiet", *packages)


def pip(folder: Path, *words: str) -> None:
    """Call the environment's pip."""
    command = [str(python_of(folder)), "-m", "pip", "--disable-pip-version-check", *words]
    subprocess.run(command, check=True, cwd=folder)


def python_of(folder: Path) -> Path:
    """The interpreter of a peer's environment."""
    return folder / "env" / "bin" / "python"


def built(file: Path, peer: str) -> Path:
    """A file that --build makes.

    Raises:
        SystemExit: it is not there.
    """
    if not file.exists():
        raise SystemExit(f"{file} is missing: python benchmarks/peers/{peer}.py --build")
    return file


def run(command: Sequence[str], *, environment: Mapping[str, str] | None = None) -> Ended:
    """Run a program to its end.

    Raises:
        SystemExit: it failed; its own words are on stderr.
    """
    process = subprocess.Popen(
        [*map(str, command)], stdout=subprocess.PIPE, text=True, env={**os.environ, **(environment or {})}
    )
    assert process.stdout is not None, "made with a pipe"
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command[0]} ended with {process.returncode}")
    return Ended(output, usage.ru_utime + usage.ru_stime, usage.ru_maxrss << 10)


def alternate(pairs: int, *runs: Callable[[], Any]) -> list[list[Any]]:
    """Call each in turn, so many times: what each gave."""
    found: list[list[Any]] = [[] for _ in runs]
    for _ in range(pairs):
        for results, call in zip(found, runs, strict=True):
            results.append(call())
    return found
