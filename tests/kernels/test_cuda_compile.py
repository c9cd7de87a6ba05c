"""Every CUDA source compiles, without a remark, for every generation of devices that we serve."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from nvrtc import compile_cuda

from moss_jt.kernels.cuda import OPTIONS, SOURCES, entry_points, source

GENERATIONS = (75, 80, 86, 89, 90)
KERNELS = Path(__file__).parents[2] / "kernels"


def test_every_source_is_listed() -> None:
    assert sorted(SOURCES) == sorted(path.stem for path in KERNELS.glob("*.cu"))


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("name", SOURCES)
def test_nvrtc_makes_machine_code(name: str, generation: int) -> None:
    options = (*OPTIONS, f"--gpu-architecture=sm_{generation}")
    code, remarks = compile_cuda(source(name), f"{name}.cu", options, to="CUBIN")
    assert not remarks
    assert code[:4] == b"\x7fELF"
    for entry in entry_points(name):
        assert f".text.{entry}\0".encode() in code


@pytest.mark.parametrize("name", SOURCES)
def test_nvrtc_makes_ptx_for_devices_to_come(name: str) -> None:
    code, _ = compile_cuda(source(name), f"{name}.cu", (*OPTIONS, "--gpu-architecture=compute_75"), to="PTX")
    found = re.findall(r"\.entry (\w+)", code.decode())
    assert sorted(found) == sorted(entry_points(name))


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
@pytest.mark.parametrize("generation", [GENERATIONS[0], GENERATIONS[-1]])
@pytest.mark.parametrize("name", SOURCES)
def test_nvcc_needs_no_memory_for_registers(name: str, generation: int, tmp_path: Path) -> None:
    """Registers that do not suffice are kept in memory, which no other test would notice."""
    file = tmp_path / f"{name}.cu"
    file.write_text(source(name), "utf-8")
    command = [
        "nvcc",
        "-cubin",
        *OPTIONS,
        f"-arch=sm_{generation}",
        "-Xptxas",
        "-v",
        "-o",
        str(tmp_path / "out"),
        str(file),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", done.stderr)
    assert len(spills) == len(entry_points(name))
    assert set(spills) == {("0", "0")}
