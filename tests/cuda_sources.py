"""Our CUDA kernels for tests: run on the host behind the shim, or on a device where MOSS_JT_TEST_DEVICE names one."""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from moss_jt.device import Device
from moss_jt.kernels.cuda import entry_points, source
from moss_jt.kernels.cupy_device import CupyDevice
from moss_jt.startup import machine

Argument = npt.NDArray[Any] | np.int64 | int | float | None
DEVICE = "MOSS_JT_TEST_DEVICE"  # an environment variable: the number of a CUDA device
SHIM = Path(__file__).parents[1] / "kernels" / "host" / "cuda_shim.h"


class Kernels(Protocol):
    """The kernels of one source."""

    def launch(self, entry: str, grid: Sequence[int], block: int, arguments: Sequence[Argument]) -> None:
        """Run a kernel; arrays are written in place, whole numbers are 32 bits wide but for np.int64."""
        ...


def kernels_of(name: str, folder: Path) -> Kernels:
    """The kernels of a source, where tests are to run them; what is compiled for the host lies in `folder`."""
    number = os.environ.get(DEVICE)
    return HostKernels(name, folder) if number is None else DeviceKernels(name, CupyDevice(int(number)))


class DeviceKernels:
    """On a device: arrays go there before each launch, and come back after it."""

    def __init__(self, name: str, device: Device) -> None:
        self._name, self._device = name, device

    def launch(self, entry: str, grid: Sequence[int], block: int, arguments: Sequence[Argument]) -> None:
        """As `Kernels` says."""
        arrays = {i: each for i, each in enumerate(arguments) if isinstance(each, np.ndarray)}
        places = {i: self._device.allocate(each.nbytes, "a test") for i, each in arrays.items()}
        for i, each in arrays.items():
            self._device.write(places[i], each)
        values = [places[i] if isinstance(each, np.ndarray) else each for i, each in enumerate(arguments)]
        self._device.launch(self._name, entry, grid, block, values)
        for i, each in arrays.items():
            self._device.read(places[i], each)
        self._device.close()


class HostKernels:
    """On the host."""

    def __init__(self, name: str, folder: Path) -> None:
        launchers = "".join(
            f'extern "C" void launch_{entry}(const unsigned* grid, const unsigned* block, void** arguments) {{\n'
            f'    shim::launch("{entry}", {entry}, grid, block, arguments);\n}}\n'
            for entry in entry_points(name)
        )
        text = f'#include "{SHIM}"\n{source(name)}\n{launchers}'
        stem = hashlib.sha256((text + SHIM.read_text("utf-8")).encode()).hexdigest()[:16]
        code, library = folder / f"{stem}.cpp", folder / f"{stem}.so"
        if not library.is_file():
            code.write_text(text, "utf-8")
            flags = (
                "-std=c++17",
                "-O2",
                "-U_FORTIFY_SOURCE",
                "-ffp-contract=off",
                "-fPIC",
                "-shared",
                "-Wno-unknown-pragmas",
            )
            command = [str(machine.require_compiler()), *flags, "-o", str(library), str(code)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
            assert done.returncode == 0, done.stderr[-4000:]
        self._library = ctypes.CDLL(str(library))

    def launch(self, entry: str, grid: Sequence[int], block: int, arguments: Sequence[Argument]) -> None:
        """As `Kernels` says."""
        values = [_as_c(argument) for argument in arguments]
        addresses = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        three = ctypes.c_uint * 3
        getattr(self._library, f"launch_{entry}")(three(*grid, *[1] * (3 - len(grid))), three(block, 1, 1), addresses)


def _as_c(argument: Argument) -> Any:
    if argument is None:
        return ctypes.c_void_p(None)
    if isinstance(argument, np.ndarray):
        assert argument.flags.c_contiguous
        return ctypes.c_void_p(argument.ctypes.data)
    if isinstance(argument, np.integer):
        return ctypes.c_int64(int(argument))
    return ctypes.c_float(argument) if isinstance(argument, float) else ctypes.c_int32(argument)
