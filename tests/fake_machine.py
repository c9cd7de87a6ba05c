"""Stand-ins: an installed wheel, a toolkit, a CUDA driver, a plan whose compilation is a small script."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def install_wheel(site: Path, name: str, version: str, files: Mapping[str, str]) -> Path:
    """Lay out an installed distribution under a folder of packages; returns its dist-info."""
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", "utf-8")
    record = []
    for place, text in files.items():
        file = site / place
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, "utf-8")
        record.append(f"{place},sha256=x,{len(text)}\n")
    (info / "RECORD").write_text("".join(record), "utf-8")
    return info


def make_script(file: Path, text: str) -> Path:
    """An executable file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, "utf-8")
    file.chmod(0o755)
    return file


def make_toolkit(top: Path, release: str, *, libraries: tuple[str, ...] = ("cudart", "cublas", "curand")) -> Path:
    """A CUDA toolkit whose nvcc says its release and "compiles" anything that has the right words; returns nvcc."""
    major = release.split(".", maxsplit=1)[0]
    for folder in ("include", "lib64"):
        (top / folder).mkdir(parents=True)
    for header in ("cuda_runtime.h", "cublas_v2.h", "curand.h"):
        (top / "include" / header).write_text("// stand-in\n", "ascii")
    for library in libraries:
        (top / "lib64" / f"lib{library}.so.{major}").write_text("", "ascii")
    return make_script(
        top / "bin" / "nvcc",
        "#!/bin/sh\n"
        f'echo "$@" >> {top}/calls\n'
        'case "$*" in\n'
        f'  *--version*) echo "Cuda compilation tools, release {release}, V{release}.1" ;;\n'
        f'  *--dryrun*) echo "#$ TOP={top}" >&2 ;;\n'
        "esac\n"
        f'[ -z "$(cat {top}/refuses 2>/dev/null)" ] && exit 0\n'
        f'case "$*" in *"-ccbin $(cat {top}/refuses) "*) echo "error: unsupported GNU version" >&2; exit 1 ;; esac\n',
    )


class FakeCuda:
    """A libcuda with these devices: (name, bytes, (major, minor))."""

    def __init__(self, *devices: tuple[str, int, tuple[int, int]], version: int = 13000, init: int = 0) -> None:
        self._devices, self._version, self._init = devices, version, init

    def cuInit(self, flags: Any) -> int:
        return self._init

    def cuDriverGetVersion(self, out: Any) -> int:
        out._obj.value = self._version
        return 0

    def cuDeviceGetCount(self, out: Any) -> int:
        out._obj.value = len(self._devices)
        return 0

    def cuDeviceGet(self, out: Any, index: ctypes.c_int) -> int:
        out._obj.value = index.value
        return 0

    def cuDeviceGetName(self, out: Any, size: ctypes.c_int, device: ctypes.c_int) -> int:
        out.value = self._devices[device.value][0].encode()
        return 0

    def cuDeviceTotalMem_v2(self, out: Any, device: ctypes.c_int) -> int:
        out._obj.value = self._devices[device.value][1]
        return 0

    def cuDeviceGetAttribute(self, out: Any, number: ctypes.c_int, device: ctypes.c_int) -> int:
        out._obj.value = self._devices[device.value][2][number.value - 75]
        return 0
