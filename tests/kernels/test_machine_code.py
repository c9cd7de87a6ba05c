"""Machine code of the CUDA kernels: what is compiled for which device, and what is kept of it."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import pytest
from nvrtc import compile_cuda

from moss_jt.errors import KernelError
from moss_jt.kernels.cuda import OPTIONS, SOURCES, source
from moss_jt.kernels.machine_code import machine_code


class FakeNvrtc:
    """Notes what is compiled."""

    def __init__(self, version: str = "13.0") -> None:
        self.version = version
        self.generations: Sequence[int] = (75, 80, 86, 90)
        self.compiled: list[tuple[str, str, bool]] = []

    def compile(self, text: str, name: str, options: Sequence[str], *, final: bool) -> bytes:
        assert text == source(name)
        self.compiled.append((name, options[-1], final))
        return f"code {len(self.compiled)}".encode()


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOSS_JT_HOME", str(tmp_path))
    return tmp_path


def test_what_was_compiled_is_kept_for_each_kind_of_device_and_compiler(home: Path) -> None:
    nvrtc = FakeNvrtc()
    assert [machine_code("pointwise", 86, nvrtc) for _ in range(2)] == [b"code 1"] * 2
    assert machine_code("pointwise", 90, nvrtc) == b"code 2"
    assert machine_code("attention", 90, nvrtc) == b"code 3"
    assert nvrtc.compiled == [
        ("pointwise", "--gpu-architecture=sm_86", True),
        ("pointwise", "--gpu-architecture=sm_90", True),
        ("attention", "--gpu-architecture=sm_90", True),
    ]
    newer = FakeNvrtc("13.1")
    assert machine_code("pointwise", 86, newer) == b"code 1" and newer.compiled
    assert len(list((home / "cuda").iterdir())) == 4


def test_a_newer_device_than_the_compiler_knows_gets_what_its_driver_compiles() -> None:
    nvrtc = FakeNvrtc()
    for _ in range(2):
        machine_code("pointwise", 120, nvrtc)
        machine_code("pointwise", 89, nvrtc)
    assert nvrtc.compiled == [
        ("pointwise", "--gpu-architecture=compute_90", False),
        ("pointwise", "--gpu-architecture=compute_86", False),
    ]
    nvrtc.generations = (80,)
    with pytest.raises(KernelError, match=r"NVRTC 13.0 no longer compiles for compute capability 7.5"):
        machine_code("pointwise", 75, nvrtc)


@pytest.mark.parametrize("damage", [lambda code: code[:-1], lambda code: b"", lambda code: code[:-1] + b"x"])
def test_what_is_no_longer_whole_is_compiled_anew(damage: object, home: Path) -> None:
    assert callable(damage)
    nvrtc = FakeNvrtc()
    machine_code("pointwise", 86, nvrtc)
    (file,) = (home / "cuda").iterdir()
    file.write_bytes(damage(file.read_bytes()))
    assert machine_code("pointwise", 86, nvrtc) == b"code 2"
    assert machine_code("pointwise", 86, nvrtc) == b"code 2"


def test_a_folder_that_cannot_be_written_costs_time_only(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    (home / "cuda").write_text("a file")
    nvrtc = FakeNvrtc()
    assert [machine_code("pointwise", 86, nvrtc) for _ in range(2)] == [b"code 1", b"code 2"]
    assert "the CUDA kernels are compiled anew each time" in caplog.text
    assert [path.name for path in home.iterdir()] == ["cuda"]


@pytest.mark.parametrize("name", SOURCES)
def test_small_numbers_are_not_flushed_to_zero(name: str) -> None:
    """With these options, products, sums and roundings of our own keep numbers below 2^-126, as on the CPU."""
    ptx, _ = compile_cuda(source(name), name, (*OPTIONS, "--gpu-architecture=compute_80"), to="PTX")
    flushed = set(re.findall(r"(?:add|sub|mul|fma|cvt|max|min)(?:\.\w+)*?\.ftz\S*", ptx.decode("latin-1")))
    assert not flushed


# cupy before 14 opens NVRTC like this, by a name that only the system's folders are searched for.
OLDER_CUPY = """
import ctypes, sys, types
from importlib import metadata

name = next(f.name for f in metadata.files("nvidia-cuda-nvrtc") if f.name.startswith("libnvrtc.so."))

def version():
    try:
        library = ctypes.CDLL(name)
    except OSError as error:
        raise RuntimeError(f"CuPy failed to load {name}: {error}") from error
    numbers = ctypes.c_int(), ctypes.c_int()
    assert library.nvrtcVersion(*map(ctypes.byref, numbers)) == 0
    return tuple(number.value for number in numbers)

nvrtc = types.SimpleNamespace(getVersion=version, getSupportedArchs=lambda: [75, 90])
sys.modules["cupy"] = types.SimpleNamespace(cuda=types.SimpleNamespace(nvrtc=nvrtc))
from moss_jt.kernels import machine_code
"""


def test_the_compiler_is_found_in_the_wheels() -> None:
    code = OLDER_CUPY + "print(machine_code.Nvrtc().version)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.partition(".")[0] == metadata.version("nvidia-cuda-nvrtc").partition(".")[0]


def test_without_a_compiler_the_error_is_that_of_cupy() -> None:
    code = OLDER_CUPY + "name = 'libnvrtc.so.0'; machine_code.Nvrtc()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "CuPy failed to load libnvrtc.so.0" in done.stderr
