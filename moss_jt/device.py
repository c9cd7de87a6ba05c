"""Device: what the runtime asks of an accelerator, and nothing of it that cannot be imitated on the host.

Memory is plain device memory, counted against a cap. Work goes to two streams: one computes, one copies from the
host. Within a stream everything happens in order; between them only what an event says. Nothing here waits for the
device but `wait` and `read`, which say so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from moss_jt.errors import DeviceMemoryError
from moss_jt.memory import format_size

Array = npt.NDArray[Any]
Stream = Literal["compute", "copy"]
Event = Any


@dataclass(frozen=True)
class Place:
    """Device memory from an address on."""

    address: int

    def after(self, nbytes: int) -> Place:
        """The place that lies so many bytes further."""
        return Place(self.address + nbytes)


Argument = Place | np.int64 | int | float | None  # whole numbers are 32 bits wide but for np.int64


class Device(Protocol):
    """An accelerator.

    Attributes:
        name: as its maker calls it.
        capacity: bytes of memory that may be taken, all in all.
    """

    name: str
    capacity: int

    @property
    def taken(self) -> int:
        """Bytes of memory taken so far."""
        ...

    def allocate(self, nbytes: int, purpose: str) -> Place:
        """Take memory, aligned to 256 bytes, that stays until `close`.

        Raises:
            DeviceMemoryError: it would pass `capacity`, or the device has no more.
        """
        ...

    def write(self, place: Place, values: Array, *, stream: Stream = "compute", stays: bool = False) -> None:
        """Queue a copy to the device. Unless `stays`, the values may change as soon as this returns."""
        ...

    def read(self, place: Place, into: Array) -> None:
        """Wait for the computing stream, then copy from the device."""
        ...

    def move(self, source: Place, target: Place, nbytes: int) -> None:
        """Queue a copy within the device on the computing stream."""
        ...

    def launch(
        self, source: str, kernel: str, grid: Sequence[int], threads: int, arguments: Sequence[Argument]
    ) -> None:
        """Queue a kernel of `moss_jt.kernels.cuda` on the computing stream."""
        ...

    def record(self, stream: Stream) -> Event:
        """An event that happens when all that was queued so far is done."""
        ...

    def follow(self, stream: Stream, event: Event) -> None:
        """What is queued on a stream from here on begins after an event."""
        ...

    def wait(self, event: Event) -> None:
        """Wait for an event."""
        ...

    def close(self) -> None:
        """Give all memory back."""
        ...


class Account:
    """Counts memory against a cap, in whole units of 256 bytes."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.taken = 0

    def take(self, nbytes: int, purpose: str) -> int:
        """Count memory that is about to be taken; its size in whole units.

        Raises:
            DeviceMemoryError: it would pass the cap.
        """
        whole = -(-max(nbytes, 1) // 256) * 256
        if self.taken + whole > self.capacity:
            raise DeviceMemoryError(
                f"{purpose} takes {format_size(whole)} of device memory, and of the {format_size(self.capacity)} allowed "
                f"{format_size(self.capacity - self.taken)} are left. Allow more, or ask for a shorter context."
            )
        self.taken += whole
        return whole
