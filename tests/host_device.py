"""A device that is the host: kernels run behind the shim, memory is counted, and streams run as late as they may.

What is queued is not done when it is queued. Whenever somebody waits, steps of both streams are done in a random order
that streams and events allow; so whoever forgot an event gets wrong numbers, sooner or later.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from cuda_sources import HostKernels

from moss_jt.device import Account, Argument, Place, Stream

Array = npt.NDArray[Any]


@dataclass
class HostEvent:
    """Happens when the steps before it are done."""

    happened: bool = False


@dataclass
class _Step:
    run: Callable[[], None]
    after: list[HostEvent] = field(default_factory=list)


class HostDevice:
    """Implements `moss_jt.device.Device`."""

    def __init__(self, folder: Path, capacity: int = 1 << 30, seed: int = 0) -> None:
        self.name, self.own_bytes, self.capacity = "the host", 1000, capacity
        self._folder = folder
        self._account = Account(capacity)
        self._kernels: dict[str, HostKernels] = {}
        self._memory: dict[int, Array] = {}
        self._queues: dict[Stream, deque[_Step]] = {"compute": deque(), "copy": deque(), "back": deque()}
        self._random = random.Random(seed)
        self.written: dict[Stream, int] = {"compute": 0, "copy": 0, "back": 0}
        self.read_bytes = 0
        self.launched = self.replayed = 0
        self.pinned: dict[int, int] = {}
        self._capturing: list[Callable[[], None]] | None = None

    @property
    def taken(self) -> int:
        return self._account.taken

    def allocate(self, nbytes: int, purpose: str) -> Place:
        whole = self._account.take(nbytes, purpose)
        raw = np.full(whole + 256, 0xCD, np.uint8)  # not zeros: whoever relies on them is found
        memory = raw[-raw.ctypes.data % 256 :][:whole]
        self._memory[memory.ctypes.data] = memory
        return Place(memory.ctypes.data)

    def pin(self, memory: Array) -> bool:
        start, end = memory.ctypes.data, memory.ctypes.data + memory.nbytes
        assert not any(start < other + size and other < end for other, size in self.pinned.items()), "pinned twice"
        self.pinned[start] = memory.nbytes
        return True

    def unpin(self, memory: Array) -> None:
        del self.pinned[memory.ctypes.data]

    def write(self, place: Place, values: Array, *, stream: Stream = "compute", stays: bool = False) -> None:
        assert self._capturing is None, "a copy from the host would be captured"
        kept = values if stays else values.copy()
        self.written[stream] += kept.nbytes
        self._queue(stream, lambda: self._copy(self._at(place, kept.nbytes), kept.reshape(-1).view(np.uint8)))

    def read(self, place: Place, into: Array) -> None:
        self.wait(self.record("compute"))
        self.read_bytes += into.nbytes
        self._copy(into.reshape(-1).view(np.uint8), self._at(place, into.nbytes))

    def fetch(self, place: Place, into: Array, after: HostEvent) -> None:
        self.follow("back", after)
        self._queue("back", lambda: self._copy(into.reshape(-1).view(np.uint8), self._at(place, into.nbytes)))
        self.read_bytes += into.nbytes
        self.wait(self.record("back"))

    def move(self, source: Place, target: Place, nbytes: int) -> None:
        self._queue("compute", lambda: self._copy(self._at(target, nbytes), self._at(source, nbytes)))

    def launch(
        self, source: str, kernel: str, grid: Sequence[int], threads: int, arguments: Sequence[Argument]
    ) -> None:
        if source not in self._kernels:
            self._kernels[source] = HostKernels(source, self._folder)
        values = [self._from(argument) for argument in arguments]
        self.launched += 1
        self._queue("compute", lambda: self._kernels[source].launch(kernel, grid, threads, values))

    def capture(self, queue: Callable[[], None]) -> list[Callable[[], None]]:
        steps: list[Callable[[], None]] = []
        self._capturing = steps
        try:
            queue()
        finally:
            self._capturing = None
        return steps

    def replay(self, graph: list[Callable[[], None]]) -> None:
        self.replayed += 1
        for step in graph:
            self._queue("compute", step)

    def record(self, stream: Stream) -> HostEvent:
        event = HostEvent()
        self._queue(stream, lambda: setattr(event, "happened", True))
        return event

    def follow(self, stream: Stream, event: HostEvent) -> None:
        self._queues[stream].append(_Step(lambda: None, [event]))

    def wait(self, event: HostEvent) -> None:
        while not event.happened:
            ready = [queue for queue in self._queues.values() if queue and all(e.happened for e in queue[0].after)]
            assert ready, "streams wait for each other"
            self._random.choice(ready).popleft().run()

    def close(self) -> None:
        self._memory.clear()
        self.pinned.clear()
        self._account.taken = 0

    def _queue(self, stream: Stream, run: Callable[[], None]) -> None:
        if self._capturing is not None:
            assert stream == "compute"
            self._capturing.append(run)
            return
        self._queues[stream].append(_Step(run))

    def _copy(self, target: Array, source: Array) -> None:
        target[:] = source

    def _at(self, place: Place, nbytes: int) -> Array:
        """Memory that was allocated, and not past its end."""
        start = max(address for address in self._memory if address <= place.address)
        offset = place.address - start
        assert offset + nbytes <= len(self._memory[start]), "past the end of what was taken"
        return self._memory[start][offset : offset + nbytes]

    def _from(self, argument: Argument) -> Any:
        if not isinstance(argument, Place):
            return argument
        start = max(address for address in self._memory if address <= argument.address)
        return self._memory[start][argument.address - start :]
