"""CupyDevice: a CUDA device through cupy, as moss_jt.device wants it.

Memory is taken from the driver directly, not from cupy's pool, so that what is counted is what is taken. Both streams
are our own and non-blocking: nothing of Jittor's or cupy's, which share the legacy stream, waits for them or they for it.
Sources are compiled by NVRTC at their first launch; cupy keeps the machine code on disk, one for each kind of device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from moss_jt.device import Account, Argument, Event, Place, Stream
from moss_jt.errors import DeviceMemoryError, KernelError
from moss_jt.kernels.cuda import OPTIONS, source
from moss_jt.memory import format_size

Array = npt.NDArray[Any]

OLDEST = 75  # compute capability times ten: the products of bytes need its tensor cores
_TO_DEVICE, _FROM_DEVICE, _WITHIN = 1, 2, 3  # cudaMemcpyKind


class CupyDevice:
    """One CUDA device.

    Args:
        index: which, as CUDA counts them.
        capacity: bytes that may be taken; None for what is free.

    Raises:
        KernelError: the device is too old for our kernels, or CUDA does not answer.
    """

    def __init__(self, index: int = 0, capacity: int | None = None) -> None:
        import cupy

        self._cupy = cupy
        self._device = cupy.cuda.Device(index)
        try:
            found = cupy.cuda.runtime.getDeviceProperties(index)
            with self._device:
                free, _ = cupy.cuda.runtime.memGetInfo()
                self._streams: dict[Stream, Any] = {
                    "compute": cupy.cuda.Stream(non_blocking=True),
                    "copy": cupy.cuda.Stream(non_blocking=True),
                }
        except cupy.cuda.runtime.CUDARuntimeError as error:
            raise KernelError(f"CUDA device {index} does not answer: {error}. `moss-jt doctor` checks it.") from error
        self.name = found["name"].decode()
        generation = 10 * found["major"] + found["minor"]
        if generation < OLDEST:
            raise KernelError(
                f"{self.name} is of compute capability {generation / 10}; our kernels need {OLDEST / 10}. Use the CPU."
            )
        self._account = Account(free if capacity is None else min(capacity, free))
        self.capacity = self._account.capacity
        self._modules: dict[str, Any] = {}
        self._kernels: dict[tuple[str, str], Any] = {}
        self._addresses: list[int] = []

    @property
    def taken(self) -> int:
        """Bytes of memory taken so far."""
        return self._account.taken

    def allocate(self, nbytes: int, purpose: str) -> Place:
        """Take memory that stays until `close`.

        Raises:
            DeviceMemoryError: it would pass `capacity`, or the device has no more.
        """
        whole = self._account.take(nbytes, purpose)
        try:
            with self._device:
                address = int(self._cupy.cuda.runtime.malloc(whole))
        except self._cupy.cuda.runtime.CUDARuntimeError as error:
            self._account.taken -= whole
            raise DeviceMemoryError(
                f"{self.name} does not give {format_size(whole)} for {purpose} ({error}). "
                "Close other programs that use it, or allow less."
            ) from error
        self._addresses.append(address)
        return Place(address)

    def write(self, place: Place, values: Array, *, stream: Stream = "compute", stays: bool = False) -> None:
        """Queue a copy to the device. Unless `stays`, the values may change as soon as this returns."""
        assert values.flags.c_contiguous, "copied as one run of bytes"
        self._copy(place.address, values.ctypes.data, values.nbytes, _TO_DEVICE, stream)
        if not stays:
            self.wait(self.record(stream))

    def read(self, place: Place, into: Array) -> None:
        """Wait for the computing stream, then copy from the device."""
        assert into.flags.c_contiguous, "copied as one run of bytes"
        self._copy(into.ctypes.data, place.address, into.nbytes, _FROM_DEVICE, "compute")
        self.wait(self.record("compute"))

    def move(self, source: Place, target: Place, nbytes: int) -> None:
        """Queue a copy within the device on the computing stream."""
        self._copy(target.address, source.address, nbytes, _WITHIN, "compute")

    def launch(
        self, source: str, kernel: str, grid: Sequence[int], threads: int, arguments: Sequence[Argument]
    ) -> None:
        """Queue a kernel on the computing stream.

        Raises:
            KernelError: it does not compile, or cannot be launched.
        """
        values = tuple(_as_scalar(argument) for argument in arguments)
        shape = (*grid, *(1,) * (3 - len(grid)))
        try:
            with self._device, self._streams["compute"]:
                self._kernel(source, kernel)(shape, (threads, 1, 1), values)
        except (self._cupy.cuda.compiler.CompileException, self._cupy.cuda.driver.CUDADriverError) as error:
            raise KernelError(
                f"{kernel} of {source}.cu, grid {shape}, {threads} threads, on {self.name}: {error}. "
                "`moss-jt doctor` checks CUDA."
            ) from error

    def record(self, stream: Stream) -> Event:
        """An event that happens when all that was queued so far is done."""
        with self._device:
            event = self._cupy.cuda.Event(disable_timing=True)
            event.record(self._streams[stream])
        return event

    def follow(self, stream: Stream, event: Event) -> None:
        """What is queued on a stream from here on begins after an event."""
        self._streams[stream].wait_event(event)

    def wait(self, event: Event) -> None:
        """Wait for an event."""
        event.synchronize()

    def close(self) -> None:
        """Give all memory back, when what is queued is done."""
        with self._device:
            for stream in self._streams.values():
                stream.synchronize()
            while self._addresses:
                self._cupy.cuda.runtime.free(self._addresses.pop())
        self._account.taken = 0

    def _kernel(self, name: str, kernel: str) -> Any:
        """A kernel; its source is compiled when the first one of it is asked for."""
        if (name, kernel) not in self._kernels:
            if name not in self._modules:
                self._modules[name] = self._cupy.RawModule(code=source(name), options=OPTIONS, backend="nvrtc")
            self._kernels[name, kernel] = self._modules[name].get_function(kernel)
        return self._kernels[name, kernel]

    def _copy(self, target: int, source: int, nbytes: int, kind: int, stream: Stream) -> None:
        with self._device:
            self._cupy.cuda.runtime.memcpyAsync(target, source, nbytes, kind, self._streams[stream].ptr)


def _as_scalar(argument: Argument) -> Any:
    """What cupy hands to a kernel bit by bit."""
    if argument is None or isinstance(argument, Place):
        return np.uintp(0 if argument is None else argument.address)
    if isinstance(argument, np.integer):
        return argument
    return np.float32(argument) if isinstance(argument, float) else np.int32(argument)
