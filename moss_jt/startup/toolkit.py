"""CUDA toolkits 11, 12 and 13 on this machine: the compiler, its headers and the libraries that Jittor links.

They may come from the system, from conda or from pip wheels, in two layouts: `nvidia/cu13/{include,lib}` for
CUDA 13, `nvidia/<library>/{include,lib}` before that.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

OLDEST_MAJOR, NEWEST_MAJOR = 11, 13
_TARGET = "targets/x86_64-linux"
_WHEELS_BEFORE_13 = ("cuda_runtime", "cublas", "curand", "cuda_nvcc", "cuda_cccl")
_PROBE_TIMEOUT_S = 60


@dataclass(frozen=True)
class Toolkit:
    """One CUDA compiler and the folder that it belongs to."""

    nvcc: Path
    top: Path
    version: tuple[int, int]

    @property
    def version_text(self) -> str:
        """As 13.0."""
        return f"{self.version[0]}.{self.version[1]}"

    def include_folders(self) -> list[Path]:
        """Its folders of headers."""
        return [folder for folder in (self.top / _TARGET / "include", self.top / "include") if folder.is_dir()]

    def library_folders(self) -> list[Path]:
        """Its folders of libraries; Debian's own package keeps them with the system's."""
        candidates = [self.top / _TARGET / "lib", self.top / "lib64", self.top / "lib"]
        if self.top.parts[:2] == ("/", "usr") and "local" not in self.top.parts:
            candidates.append(Path("/usr/lib/x86_64-linux-gnu"))
        return [folder for folder in candidates if folder.is_dir()]


def find_toolkits() -> list[Toolkit]:
    """Every toolkit whose nvcc works, newest first."""
    found: dict[Path, Toolkit] = {}
    for nvcc in _candidates():
        toolkit = inspect_nvcc(nvcc)
        if toolkit is not None:
            found.setdefault(toolkit.nvcc, toolkit)
    return sorted(found.values(), key=lambda toolkit: toolkit.version, reverse=True)


def choose_toolkit(toolkits: list[Toolkit], newest_major: int) -> Toolkit | None:
    """The newest toolkit that we know and that the driver serves."""
    for toolkit in toolkits:
        if OLDEST_MAJOR <= toolkit.version[0] <= min(NEWEST_MAJOR, newest_major):
            return toolkit
    return None


def _candidates() -> Iterator[Path]:
    for variable in ("CUDA_HOME", "CUDA_PATH", "CONDA_PREFIX"):
        if os.environ.get(variable):
            yield Path(os.environ[variable], "bin", "nvcc")
    on_path = shutil.which("nvcc")
    if on_path:
        yield Path(on_path)
    yield Path("/usr/local/cuda/bin/nvcc")
    yield from sorted(Path("/usr/local").glob("cuda-*/bin/nvcc"), reverse=True)
    yield Path("/opt/cuda/bin/nvcc")
    for root in wheel_roots():
        yield from sorted((root / "nvidia").glob("cu[0-9]*/bin/nvcc"), reverse=True)


def inspect_nvcc(nvcc: Path) -> Toolkit | None:
    """Ask an nvcc for its version and folder: the one on PATH may be a script around the real one."""
    if not os.access(nvcc, os.X_OK):
        return None
    release = re.search(r"release (\d+)\.(\d+)", _output_of(nvcc, "--version"))
    if release is None:
        return None
    named = re.search(r"^#\$ TOP=(.*)$", _output_of(nvcc, "--dryrun", "-x", "cu", os.devnull), re.MULTILINE)
    top = Path(named.group(1).strip() if named else nvcc.resolve().parent.parent).resolve()
    real = top / "bin" / "nvcc"
    return Toolkit(real if real.is_file() else nvcc, top, (int(release.group(1)), int(release.group(2))))


def _output_of(*command: str | Path) -> str:
    try:
        result = subprocess.run(
            [str(word) for word in command], capture_output=True, text=True, timeout=_PROBE_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout + result.stderr


def wheel_roots() -> list[Path]:
    """The folders of installed packages that hold NVIDIA's wheels."""
    return [Path(entry) for entry in dict.fromkeys(sys.path) if entry and Path(entry, "nvidia").is_dir()]


def wheel_folders(major: int) -> list[Path]:
    """The folders with `include` and `lib` of the installed wheels for this CUDA release."""
    folders: list[Path] = []
    for root in wheel_roots():
        if major >= 13:
            folders.append(root / "nvidia" / f"cu{major}")
        else:
            folders += [root / "nvidia" / name for name in _WHEELS_BEFORE_13 if _is_for(root, name, major)]
    return [folder for folder in folders if folder.is_dir()]


def _is_for(root: Path, name: str, major: int) -> bool:
    """Whether nvidia/<name> was installed by the wheel for this release: cu11 and cu12 use the same folder."""
    wanted = f"nvidia-{name.replace('_', '-')}-cu{major}"
    return any(True for _ in importlib.metadata.distributions(name=wanted, path=[str(root)]))


def wheel_names(major: int, libraries: list[str]) -> list[str]:
    """The names on PyPI of the wheels with these libraries."""
    suffix = "" if major >= 13 else f"-cu{major}"
    return [f"nvidia-{library}{suffix}" for library in libraries]
