"""Device: what the runtime asks of an accelerator, and nothing of it that cannot be imitated on the host.

Memory is plain device memory, counted against a cap. Work goes to three streams: one computes, one copies from the
host, one back. Within a stream everything happens in order; between them only what an event says. Nothing here waits for the
device but `wait` and `read`, which say so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from moss_jt.errors import DeviceMemoryError
from moss_jt.memory import format_size

Array = npt.NDArray[Any]
Stream = Literal["compute", "copy", "back"]
Event = Any
Graph = Any


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
        own_bytes: device memory that the process takes without asking: the driver's context, code.
        capacity: bytes of memory that may be taken beside these.
    """

    name: str
    own_bytes: int
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

    def pin(self, memory: Array) -> bool:
        """Keep main memory where it is, so that copies from it need no processor; False: the system refuses."""
        ...

    def unpin(self, memory: Array) -> None:
        """End that, when nothing is copied from it any more."""
        ...

    def write(self, place: Place, values: Array, *, stream: Stream = "compute", stays: bool = False) -> None:
        """Queue a copy to the device. Unless `stays`, the values may change as soon as this returns."""
        ...

    def read(self, place: Place, into: Array) -> None:
        """Wait for the computing stream, then copy from the device."""
        ...

    def fetch(self, place: Place, into: Array, after: Event) -> None:
        """Copy from the device when an event has happened, past all that is queued behind it; waits for the copy."""
        ...

    def move(self, source: Place, target: Place, nbytes: int) -> None:
        """Queue a copy within the device on the computing stream."""
        ...

    def launch(
        self, source: str, kernel: str, grid: Sequence[int], threads: int, arguments: Sequence[Argument]
    ) -> None:
        """Queue a kernel of `moss_jt.kernels.cuda` on the computing stream."""
        ...

    def capture(self, queue: Callable[[], None]) -> Graph:
        """What `queue` launches on the computing stream, kept to be launched again as one; nothing runs now."""
        ...

    def replay(self, graph: Graph) -> None:
        """Queue what was captured, with the same arguments."""
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


class Slab:
    """Device memory taken at once and handed out from its start, since many small pieces would waste whole pages.

    Raises:
        DeviceMemoryError: the device does not give it.
    """

    def __init__(self, device: Device, nbytes: int, purpose: str) -> None:
        self._account = Account(nbytes)
        self._place = device.allocate(nbytes, purpose)

    @property
    def left(self) -> int:
        """Bytes that are not handed out."""
        return self._account.capacity - self._account.taken

    def take(self, nbytes: int, purpose: str) -> Place:
        """The next bytes, aligned to 256.

        Raises:
            DeviceMemoryError: so many are not left.
        """
        place = self._place.after(self._account.taken)
        self._account.take(nbytes, purpose)
        return place
