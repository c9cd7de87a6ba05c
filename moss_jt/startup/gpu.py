"""Which CUDA devices answer, asked of the driver itself through ctypes.

Jittor aborts the whole process when it is started in CUDA mode without a working device, so this is asked
first. Only libcuda is loaded (it comes with the driver); no context is made and no memory is taken.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field

OLDEST_CAPABILITY = (7, 5)
_ATTRIBUTE_MAJOR, _ATTRIBUTE_MINOR = 75, 76
_LIBRARIES = ("libcuda.so.1", "libcuda.so")


@dataclass(frozen=True)
class Gpu:
    """One CUDA device."""

    name: str
    memory_bytes: int
    capability: tuple[int, int]

    @property
    def sm(self) -> str:
        """The capability as compilers write it: sm_90."""
        return f"sm_{self.capability[0]}{self.capability[1]}"

    @property
    def is_supported(self) -> bool:
        """Whether our kernels are made for it."""
        return self.capability >= OLDEST_CAPABILITY


@dataclass(frozen=True)
class Driver:
    """What the CUDA driver says. `problem` is None when at least one device answers."""

    version: tuple[int, int] | None = None
    gpus: tuple[Gpu, ...] = field(default=())
    problem: str | None = None

    @property
    def version_text(self) -> str:
        """The newest CUDA release that the driver serves, as 13.0."""
        return "none" if self.version is None else f"{self.version[0]}.{self.version[1]}"


class _CudaError(Exception):
    """A call of the driver failed."""


def ask_driver() -> Driver:
    """Ask the driver for its version and devices; never raises."""
    library = _load()
    if library is None:
        return Driver(problem="no CUDA driver (libcuda.so.1) on this machine")
    version: tuple[int, int] | None = None
    try:
        version = _version(library)
        _call(library, "cuInit", ctypes.c_uint(0))
        gpus = tuple(_describe(library, index) for index in range(_count(library)))
    except _CudaError as error:
        return Driver(version=version, problem=f"the CUDA driver answers no device ({error})")
    if not gpus:
        return Driver(version=version, problem="the CUDA driver sees no device")
    return Driver(version=version, gpus=gpus)


def _load() -> ctypes.CDLL | None:
    for name in _LIBRARIES:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


def _call(library: ctypes.CDLL, name: str, *arguments: object) -> None:
    try:
        status = getattr(library, name)(*arguments)
    except AttributeError:
        raise _CudaError(f"{name} is missing") from None
    if status != 0:
        raise _CudaError(f"{name} gives error {status}")


def _version(library: ctypes.CDLL) -> tuple[int, int]:
    value = ctypes.c_int()
    _call(library, "cuDriverGetVersion", ctypes.byref(value))
    return value.value // 1000, value.value % 1000 // 10


def _count(library: ctypes.CDLL) -> int:
    value = ctypes.c_int()
    _call(library, "cuDeviceGetCount", ctypes.byref(value))
    return value.value


def _describe(library: ctypes.CDLL, index: int) -> Gpu:
    device, memory = ctypes.c_int(), ctypes.c_size_t()
    name = ctypes.create_string_buffer(256)
    _call(library, "cuDeviceGet", ctypes.byref(device), ctypes.c_int(index))
    _call(library, "cuDeviceGetName", name, ctypes.c_int(len(name)), device)
    _call(library, "cuDeviceTotalMem_v2", ctypes.byref(memory), device)
    capability = (_attribute(library, _ATTRIBUTE_MAJOR, device), _attribute(library, _ATTRIBUTE_MINOR, device))
    return Gpu(name.value.decode("utf-8", "replace"), memory.value, capability)


def _attribute(library: ctypes.CDLL, number: int, device: ctypes.c_int) -> int:
    value = ctypes.c_int()
    _call(library, "cuDeviceGetAttribute", ctypes.byref(value), ctypes.c_int(number), device)
    return value.value
