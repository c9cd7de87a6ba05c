"""How much memory of a device is in use, by everybody: asked of NVML, which comes with the driver and needs no context."""

from __future__ import annotations

import ctypes

_LIBRARY = "libnvidia-ml.so.1"


class _Memory(ctypes.Structure):
    """nvmlMemory_t: bytes."""

    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


def used_memory(bus: str) -> int | None:
    """Bytes in use of the device with this PCI bus id, as "0000:01:00.0"; None where NVML does not tell."""
    try:
        library = ctypes.CDLL(_LIBRARY)
        if library.nvmlInit_v2() != 0:
            return None
    except (OSError, AttributeError):
        return None
    try:
        handle, found = ctypes.c_void_p(), _Memory()
        if library.nvmlDeviceGetHandleByPciBusId_v2(bus.encode(), ctypes.byref(handle)) != 0:
            return None
        if library.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(found)) != 0:
            return None
        return int(found.used)
    finally:
        library.nvmlShutdown()
