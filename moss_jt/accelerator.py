"""Which accelerator a model is to use: asked for by name, or found.

"auto" takes a CUDA device that can run our kernels, and says in the log why it does not take one that is there.
"""

from __future__ import annotations

import importlib.util
import logging
import re
from typing import NoReturn

from moss_jt.device import Device
from moss_jt.errors import ConfigError, KernelError
from moss_jt.progress import Progress
from moss_jt.startup.gpu import OLDEST_CAPABILITY, Driver, Gpu, ask_driver
from moss_jt.startup.machine import pip_install

_CUDA = re.compile(r"cuda(?::(\d+))?")

_log = logging.getLogger(__name__)


def check_device_name(name: str) -> None:
    """Refuse a name that means no device.

    Raises:
        ConfigError: it is none of "auto", "cpu", "cuda" and "cuda:1" with a number.
    """
    if name not in ("auto", "cpu") and _CUDA.fullmatch(name) is None:
        raise ConfigError(
            f'device is "{name}"; known are "auto", "cpu", "cuda" and "cuda:1" with the device\'s number.'
        )


def open_accelerator(name: str, limit: int | None = None, progress: Progress | None = None) -> Device | None:
    """Open the device of a name.

    Args:
        name: "auto", "cpu", "cuda" (the first that our kernels can use) or "cuda:1".
        limit: bytes of its memory that this process may take, all in all; None for what is free, less a reserve.
        progress: told about compiling kernels.

    Returns:
        None where the CPU is to compute.

    Raises:
        ConfigError: there is no such name.
        KernelError: the device that was asked for is not there or cannot be used.
    """
    check_device_name(name)
    if name == "cpu":
        return None
    driver = ask_driver()
    asked = _CUDA.fullmatch(name)
    try:
        index = _choose(driver, None if asked is None or asked[1] is None else int(asked[1]))
        if index is None:
            if name != "auto":
                _refuse(driver)
            return None
        _require_cupy(driver)
        from moss_jt.kernels.cupy_device import CupyDevice

        return CupyDevice(index, limit, progress)
    except KernelError as error:
        if name != "auto":
            raise
        _log.warning("%s The CPU computes.", error)
        return None


def _choose(driver: Driver, index: int | None) -> int | None:
    """The number of the device to take; None where no device answers.

    Raises:
        KernelError: there is one, but our kernels cannot use it.
    """
    if not driver.gpus:
        return None
    if index is not None:
        if index >= len(driver.gpus):
            raise KernelError(f"there is no CUDA device {index}; the driver sees {len(driver.gpus)}.")
        candidates = [index]
    else:
        candidates = list(range(len(driver.gpus)))
    usable = [number for number in candidates if driver.gpus[number].is_supported]
    if not usable:
        gpu = driver.gpus[candidates[0]]
        raise KernelError(f"{_called(gpu)} is too old: our CUDA kernels need {_dotted(OLDEST_CAPABILITY)} or newer.")
    return max(usable, key=lambda number: (driver.gpus[number].memory_bytes, -number))


def _require_cupy(driver: Driver) -> None:
    if importlib.util.find_spec("cupy") is None:
        release = min(max(driver.version[0] if driver.version else 12, 11), 13)
        raise KernelError(f"our CUDA kernels need cupy, which is not installed: {pip_install(f'cupy-cuda{release}x')}")


def _refuse(driver: Driver) -> NoReturn:
    raise KernelError(f"no CUDA device can be used: {driver.problem}. `moss-jt doctor` looks further.")


def _called(gpu: Gpu) -> str:
    return f"{gpu.name} (compute capability {_dotted(gpu.capability)})"


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"
