"""CupyDevice: a CUDA device through cupy, as moss_jt.device wants it.

Memory is taken from the driver directly, not from cupy's pool, so that what is counted is what is taken. Both streams
are our own and non-blocking: nothing of Jittor's or cupy's, which share the legacy stream, waits for them or they for it.
Kernels are loaded when the device is opened; see machine_code.py. A thread that calls in here has the device for its
current one from then on: to go back, as cupy's own context does, would take memory on the device it came from. Every error of cupy's is a RuntimeError, and leaves this
module as a KernelError or a DeviceMemoryError.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from moss_jt.device import Account, Argument, Event, Graph, Place, Stream
from moss_jt.errors import DeviceMemoryError, KernelError
from moss_jt.kernels.cuda import SOURCES, entry_points
from moss_jt.kernels.machine_code import Nvrtc, machine_code
from moss_jt.kernels.nvml import used_memory
from moss_jt.language import pick
from moss_jt.memory import format_size
from moss_jt.progress import Progress, Quiet

Array = npt.NDArray[Any]

OLDEST = 75  # compute capability times ten: the products of bytes need its tensor cores
_TO_DEVICE, _FROM_DEVICE, _WITHIN = 1, 2, 3  # cudaMemcpyKind
_PORTABLE = 1  # cudaHostRegisterPortable
_CONTEXT = 512 << 20  # what the driver takes for a process, where nobody tells; and what is believable
_LEAST, _MOST = 64 << 20, 1 << 30
_RESERVE, _RESERVE_SHARE = 256 << 20, 20  # left to the screen and others

_log = logging.getLogger(__name__)
_own: dict[int, int] = {}  # by device, what opening it first took: the driver's part is taken once in a process


def _own_bytes(taken: int | None, known: int | None, used: int) -> int:
    """What a process takes on a device before anything is allocated: the driver's part and our modules.

    Args:
        taken: bytes that opening it took; None where nobody tells.
        known: what was found when it was opened first in this process, if it was.
        used: bytes of the device that all processes use now.
    """
    if known is not None:
        return max(known, min(taken or 0, _MOST))
    if taken is None:
        return min(max(used, _CONTEXT), _MOST)
    if taken < _LEAST:  # another library has opened it before: the driver's part is there already
        return _CONTEXT
    return min(taken, _MOST)


class CupyDevice:
    """One CUDA device.

    Args:
        index: which, as CUDA counts them.
        limit: bytes that this process may take there, all in all; None for all that is free. A reserve stays free in any
            case.
        progress: told about compiling.

    Raises:
        KernelError: the device is too old for our kernels, or CUDA does not answer.
    """

    def __init__(self, index: int = 0, limit: int | None = None, progress: Progress | None = None) -> None:
        self._kernels: dict[tuple[str, str], Any] = {}
        self._addresses: list[int] = []
        self._pinned: dict[int, Array] = {}  # memory must not be given back while the device knows it
        try:
            import cupy

            self._cupy = cupy
            self._device = _Chosen(cupy.cuda.runtime, index)
            bus = cupy.cuda.Device(index).pci_bus_id
            found = cupy.cuda.runtime.getDeviceProperties(index)
            self.name = found["name"].decode()
            generation = 10 * found["major"] + found["minor"]
            _check_generation(self.name, generation)
            codes = _compile(generation, Quiet() if progress is None else progress)
            before = used_memory(bus)
            with self._device:
                self._streams: dict[Stream, Any] = {
                    "compute": cupy.cuda.Stream(non_blocking=True),
                    "copy": cupy.cuda.Stream(non_blocking=True),
                    "back": cupy.cuda.Stream(non_blocking=True),
                }
                self._load(codes)
                free, total = cupy.cuda.runtime.memGetInfo()
            after = used_memory(bus)
        except (ImportError, RuntimeError) as error:
            raise KernelError(f"CUDA device {index} cannot be used: {error}. `moss-jt doctor` checks it.") from error
        taken = None if before is None or after is None else after - before
        self.own_bytes = _own[index] = _own_bytes(taken, _own.get(index), total - free)
        usual = free - max(_RESERVE, free // _RESERVE_SHARE)
        self._account = Account(max(0, usual if limit is None else min(limit - self.own_bytes, usual)))
        self.capacity = self._account.capacity

    def _load(self, codes: Mapping[str, bytes]) -> None:
        """Have all kernels ready, so that their memory counts as the process's own."""
        for name, code in codes.items():
            module = self._cupy.cuda.function.Module()
            module.load(code)
            for kernel in entry_points(name):
                self._kernels[name, kernel] = module.get_function(kernel)

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
        except RuntimeError as error:
            self._account.taken -= whole
            raise DeviceMemoryError(
                f"{self.name} does not give {format_size(whole)} for {purpose} ({error}). "
                "Close other programs that use it, or allow less."
            ) from error
        self._addresses.append(address)
        return Place(address)

    def pin(self, memory: Array) -> bool:
        """Keep main memory where it is, so that copies from it need no processor; False: the system refuses."""
        try:
            with self._device:
                self._cupy.cuda.runtime.hostRegister(memory.ctypes.data, memory.nbytes, _PORTABLE)
        except RuntimeError as error:
            _log.warning(
                "%s of main memory cannot be pinned (%s): copies from it are slower.",
                format_size(memory.nbytes),
                error,
            )
            return False
        self._pinned[memory.ctypes.data] = memory
        return True

    def unpin(self, memory: Array) -> None:
        """End that, when nothing is copied from it any more."""
        with self._told("unpinning"), self._device:
            self._cupy.cuda.runtime.hostUnregister(memory.ctypes.data)
        self._pinned.pop(memory.ctypes.data, None)

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

    def fetch(self, place: Place, into: Array, after: Event) -> None:
        """Copy from the device when an event has happened, past all that is queued behind it; waits for the copy."""
        assert into.flags.c_contiguous, "copied as one run of bytes"
        self.follow("back", after)
        self._copy(into.ctypes.data, place.address, into.nbytes, _FROM_DEVICE, "back")
        self.wait(self.record("back"))

    def move(self, source: Place, target: Place, nbytes: int) -> None:
        """Queue a copy within the device on the computing stream."""
        self._copy(target.address, source.address, nbytes, _WITHIN, "compute")

    def launch(
        self, source: str, kernel: str, grid: Sequence[int], threads: int, arguments: Sequence[Argument]
    ) -> None:
        """Queue a kernel on the computing stream.

        Raises:
            KernelError: it cannot be launched.
        """
        values = tuple(_as_scalar(argument) for argument in arguments)
        shape = (*grid, *(1,) * (3 - len(grid)))
        try:
            with self._device, self._streams["compute"]:
                self._kernels[source, kernel](shape, (threads, 1, 1), values)
        except RuntimeError as error:
            raise KernelError(
                f"{kernel} of {source}.cu, grid {shape}, {threads} threads, on {self.name}: {error}. "
                "`moss-jt doctor` checks CUDA."
            ) from error

    def capture(self, queue: Callable[[], None]) -> Graph:
        """What `queue` launches on the computing stream, kept to be launched again as one; nothing runs now."""
        stream = self._streams["compute"]
        with self._told("capturing"), self._device, stream:
            graph = None
            try:
                stream.begin_capture()  # in here: an interrupt may strike as it returns
                queue()
            finally:
                if _is_capturing(stream):
                    graph = stream.end_capture()
        return graph

    def replay(self, graph: Graph) -> None:
        """Queue what was captured, with the same arguments."""
        with self._told("a captured block"), self._device:
            graph.launch(self._streams["compute"])

    def record(self, stream: Stream) -> Event:
        """An event that happens when all that was queued so far is done."""
        with self._told("an event"), self._device:
            event = self._cupy.cuda.Event(disable_timing=True)
            event.record(self._streams[stream])
        return event

    def follow(self, stream: Stream, event: Event) -> None:
        """What is queued on a stream from here on begins after an event."""
        with self._told("an event"):
            self._streams[stream].wait_event(event)

    def wait(self, event: Event) -> None:
        """Wait for an event."""
        with self._told("what was queued"):
            event.synchronize()

    def close(self) -> None:
        """Give all memory back, when what is queued is done.

        Raises:
            KernelError: the device no longer answers.
        """
        with self._told("giving memory back"), self._device:
            for stream in self._streams.values():
                stream.synchronize()
            while self._addresses:
                self._cupy.cuda.runtime.free(self._addresses.pop())
            for address in list(self._pinned):
                self._cupy.cuda.runtime.hostUnregister(address)
                del self._pinned[address]  # only now may the memory go
        self._account.taken = 0

    def _told(self, what: str) -> _Told:
        """Raise errors of CUDA as ours."""
        return _Told(self.name, what)

    def _copy(self, target: int, source: int, nbytes: int, kind: int, stream: Stream) -> None:
        with self._told(f"a copy of {nbytes} bytes"), self._device:
            self._cupy.cuda.runtime.memcpyAsync(target, source, nbytes, kind, self._streams[stream].ptr)


class _Chosen:
    """A context in which a device is the current one, and stays it: every `setDevice` has CUDA set up the device it names."""

    def __init__(self, runtime: Any, index: int) -> None:
        self._runtime, self._index = runtime, index

    def __enter__(self) -> None:
        if self._runtime.getDevice() != self._index:
            self._runtime.setDevice(self._index)

    def __exit__(self, *_: object) -> None:
        pass


class _Told:
    """A context in which CUDA's errors become a KernelError; a class, since a generator would cost a microsecond more."""

    def __init__(self, device: str, what: str) -> None:
        self._device, self._what = device, what

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, RuntimeError):
            raise KernelError(
                f"{self._device} failed at {self._what}: {error}. Errors of kernels show up late, at whatever is waited for; "
                "`moss-jt doctor` looks at driver and CUDA."
            ) from error


def _compile(generation: int, progress: Progress) -> dict[str, bytes]:
    """The machine code of each source; done before the device is looked at, since it may take long."""
    compiler = Nvrtc()
    codes = {}
    progress.begin(pick("Preparing the CUDA kernels", "准备 CUDA 内核"), len(SOURCES), "")
    try:
        for name in SOURCES:
            codes[name] = machine_code(name, generation, compiler)
            progress.advance(1)
    finally:
        progress.end()
    return codes


def _is_capturing(stream: Any) -> bool:
    """Whether a capture must be ended; one that an error has spoiled must."""
    try:
        return bool(stream.is_capturing())
    except RuntimeError:
        return True


def _check_generation(name: str, generation: int) -> None:
    if generation < OLDEST:
        raise KernelError(
            f"{name} is of compute capability {generation / 10}; our kernels need {OLDEST / 10}. Use the CPU."
        )


def _as_scalar(argument: Argument) -> Any:
    """What cupy hands to a kernel bit by bit."""
    if argument is None or isinstance(argument, Place):
        return np.uintp(0 if argument is None else argument.address)
    if isinstance(argument, np.integer):
        return argument
    return np.float32(argument) if isinstance(argument, float) else np.int32(argument)
