"""Kernels compiled by themselves, without Jittor: with other options, for a processor other than this one."""

from __future__ import annotations

import ctypes
import hashlib
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from moss_jt.startup import machine

HEADERS = Path(__file__).parents[2] / "kernels" / "cpu"
OPTIONS = {
    # the oldest processor of its kind: on x86 without AVX and fused multiply-add
    "oldest": ("-O2",),
    # what Jittor gives; these let the compiler put sums in another order
    "jittor": (
        *("-march=native", "-O3", "-fassociative-math", "-fno-signed-zeros"),
        *("-freciprocal-math", "-fno-trapping-math", "-fno-math-errno"),
    ),
}

Compile = Callable[[str, str], ctypes.CDLL]


@pytest.fixture(scope="session")
def compile_kernels(tmp_path_factory: pytest.TempPathFactory) -> Compile:
    """Compiles C++ around the kernels' headers: (source, key of OPTIONS) to an open library."""
    folder = tmp_path_factory.mktemp("kernels")
    opened: dict[Path, ctypes.CDLL] = {}

    def build(source: str, options: str) -> ctypes.CDLL:
        name = hashlib.sha256((source + options).encode()).hexdigest()[:16]
        library = folder / f"{name}.so"
        if library not in opened:
            code = folder / f"{name}.cpp"
            code.write_text(source, "utf-8")
            common = ("-std=c++14", "-fPIC", "-shared", "-fopenmp", "-Wno-psabi", f"-I{HEADERS}")
            command = [str(machine.require_compiler()), *common, *OPTIONS[options], str(code), "-o", str(library)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
            assert done.returncode == 0, done.stderr[-3000:]
            opened[library] = ctypes.CDLL(str(library))
        return opened[library]

    return build
