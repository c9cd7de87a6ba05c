"""DeviceWeights: matrices partly in device memory, the rest brought there piece by piece while others are multiplied.

Of every matrix the first rows stay on the device. The rest comes from the host's store (memory or disk) through a ring
of slots: the copying stream fills a slot when the kernel that used it last is through, and the computing stream begins
a kernel when its slot is full. So copying runs ahead of computing by the slots of the ring, and `prefetch` lets it run
on over the end of a pass. Nothing is ever copied back.

What stays may change between passes. It lies packed at the end of an arena whose start caches of keys and values may
need: to make room, rows leave every matrix and the others move up; later, rows that pass by may stay again.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moss_jt.device import Device, Event, Place, Slab
from moss_jt.errors import DeviceMemoryError
from moss_jt.language import pick
from moss_jt.layout import ALIGNMENT, round_up
from moss_jt.pages import Pages
from moss_jt.plan import MatrixSize
from moss_jt.progress import Progress, Quiet
from moss_jt.weights import Piece, WeightStore

Bytes = npt.NDArray[np.uint8]

_READ_AT_ONCE, _READS = 4 << 20, 8  # bytes of a read when the device is filled, and how many are in flight
STAGING = 2 * _READS * _READ_AT_ONCE  # main memory that filling takes for a while


@dataclass(frozen=True)
class DevicePiece:
    """Rows [first, first + count) of a matrix on the device, until the next piece is asked for."""

    place: Place
    first: int
    count: int


@dataclass
class _Matrix:
    """Rows that should stay have room at `offset` of the arena; the first `held` are there."""

    size: MatrixSize
    goal: int = 0
    held: int = 0
    offset: int = 0

    @property
    def room(self) -> int:
        return round_up(self.size.bytes_of(self.goal), ALIGNMENT)


@dataclass
class _Slot:
    place: Place
    filled: Event | None = None  # when its copy is done
    used: Event | None = None  # when the kernel that read it last is through


@dataclass(frozen=True)
class _Part:
    """Rows that go through a slot at once, and their bytes on the host."""

    name: str
    first: int
    count: int
    values: Bytes
    stays: bool


class DeviceWeights:
    """The matrices of a store, for kernels of a device.

    Args:
        device: where they are multiplied.
        store: where they come from; it stays the caller's.
        sizes: of the matrices, in the order of a pass.
        slab: memory is taken from it: the ring, and all that is left then for the arena.
        slots, slot_bytes: of the ring, one of them to move weights through; 0 where nothing is ever streamed.

    Attributes:
        arena: where the memory begins whose end holds weights.
        arena_bytes: of it.
        copied_bytes: weights copied to the device by passes.

    Raises:
        DeviceMemoryError: more than the device may take.
    """

    def __init__(
        self,
        device: Device,
        store: WeightStore,
        sizes: Sequence[MatrixSize],
        slab: Slab,
        *,
        slots: int = 0,
        slot_bytes: int = 0,
    ) -> None:
        self._device, self._store = device, store
        self._slot_bytes = slot_bytes
        places = [slab.take(slot_bytes, "the ring of weights") for _ in range(slots)]
        self._slots, self._bounce = [_Slot(place) for place in places[1:]], places[0] if places else None
        self._matrices = {size.name: _Matrix(size) for size in sizes}
        self.arena_bytes = slab.left // ALIGNMENT * ALIGNMENT
        self.arena = slab.take(self.arena_bytes, "weights")
        self._turn = 0
        self._ahead: deque[tuple[_Part, _Slot]] = deque()
        self._is_moving = False
        self._from_here: dict[str, int] = {}  # rows that the store was told to leave out
        self.copied_bytes = 0
        self.version = 0  # rises whenever resident rows begin to lie elsewhere

    @property
    def sizes(self) -> list[MatrixSize]:
        """Of the matrices, in the order of a pass."""
        return [matrix.size for matrix in self._matrices.values()]

    @property
    def lock(self) -> threading.RLock:
        """Held by whoever computes a pass or changes what is held."""
        return self._store.lock

    @property
    def resident_bytes(self) -> int:
        """Bytes of matrices on the device now, the ring apart."""
        return sum(matrix.size.bytes_of(matrix.held) for matrix in self._matrices.values())

    @property
    def streamed_bytes(self) -> int:
        """Bytes of matrices that each pass copies to the device."""
        return sum(matrix.size.nbytes for matrix in self._matrices.values()) - self.resident_bytes

    def load(self, rows: Mapping[str, int], progress: Progress | None = None) -> None:
        """Bring these rows of each matrix to the device.

        Raises:
            CheckpointError: they cannot be read.
        """
        self.hold(rows)
        wanted = [(m, at) for m in self._matrices.values() for at in range(0, m.size.bytes_of(m.goal), _READ_AT_ONCE)]
        staging = Pages(STAGING, "filling the device", "Close other programs.").array.reshape(2, _READS, _READ_AT_ONCE)
        pinned = self._device.pin(staging)
        try:
            self._fill(wanted, staging, pinned=pinned, progress=progress)
        finally:
            self._device.wait(self._device.record("copy"))  # also where it broke off: nobody reads `staging` any more
            if pinned:
                self._device.unpin(staging)
        for matrix in self._matrices.values():
            matrix.held = matrix.goal
        self.begin_pass()

    def _fill(
        self, wanted: Sequence[tuple[_Matrix, int]], staging: Bytes, *, pinned: bool, progress: Progress | None
    ) -> None:
        """Read one half of `staging` while the other is copied."""
        done: list[Event | None] = [None, None]
        progress = Quiet() if progress is None else progress
        total = sum(matrix.size.bytes_of(matrix.goal) for matrix in self._matrices.values())
        progress.begin(pick("filling the device", "填充显存"), total, "B")
        try:
            for turn, batch in enumerate(_batched(wanted, _READS)):
                copied = done[turn % 2]
                if copied is not None:
                    self._device.wait(copied)
                parts = []
                for (matrix, at), buffer in zip(batch, staging[turn % 2], strict=False):
                    nbytes = min(_READ_AT_ONCE, matrix.size.bytes_of(matrix.goal) - at)
                    parts.append((matrix.size.name, at, buffer[:nbytes]))
                self._store.fill(parts)
                progress.advance(sum(len(values) for _, _, values in parts))
                for (matrix, at), (_, _, values) in zip(batch, parts, strict=True):
                    target = self.arena.after(matrix.offset + at)
                    self._device.write(target, values, stream="copy", stays=pinned)
                done[turn % 2] = self._device.record("copy")
            for event in done:
                if event is not None:
                    self._device.wait(event)
                    self._device.follow("compute", event)
        finally:
            progress.end()

    @property
    def free_bytes(self) -> int:
        """At the start of the arena, where no weights lie or will come to lie."""
        return self.arena_bytes - sum(matrix.room for matrix in self._matrices.values())

    def hold(self, rows: Mapping[str, int], *, beside: int = 0) -> None:
        """Hold this many rows of each matrix from now on: fewer at once, more as they pass by. Only between passes.

        Args:
            rows: of each matrix.
            beside: bytes at the start of the arena that others use.

        Raises:
            DeviceMemoryError: they do not fit into the rest of the arena; nothing has changed.
        """
        total = sum(round_up(matrix.size.bytes_of(rows[name]), ALIGNMENT) for name, matrix in self._matrices.items())
        if total > self.arena_bytes - beside:
            raise DeviceMemoryError(
                f"weights of {total} bytes do not fit in {self.arena_bytes - beside} on {self._device.name}."
            )
        if self._is_moving:  # an interrupt struck: who knows what lies where
            for matrix in self._matrices.values():
                matrix.held = 0
        self._is_moving = True
        self.version += 1
        for name, matrix in self._matrices.items():
            matrix.goal = rows[name]
            matrix.held = min(matrix.held, matrix.goal)
        offset = self.arena_bytes - total
        targets = {}
        for name, matrix in self._matrices.items():
            targets[name] = offset
            offset += matrix.room
        ups = [m for name, m in self._matrices.items() if targets[name] > m.offset]
        downs = [m for name, m in self._matrices.items() if targets[name] < m.offset]
        for matrix in [*downs, *reversed(ups)]:  # nobody is overwritten before it has moved
            self._slide(matrix, targets[matrix.size.name])
        self._is_moving = False

    def _slide(self, matrix: _Matrix, target: int) -> None:
        """Move what is held of a matrix within the arena."""
        source, nbytes, by = matrix.offset, matrix.size.bytes_of(matrix.held), abs(target - matrix.offset)
        matrix.offset = target
        if by >= nbytes:
            self._move(source, target, nbytes)
            return
        step = by if self._bounce is None or by >= self._slot_bytes else self._slot_bytes
        starts = range(0, nbytes, step)
        for at in starts if target < source else reversed(starts):
            count = min(step, nbytes - at)
            if step == by:
                self._move(source + at, target + at, count)
            else:  # the two would overlap
                assert self._bounce is not None
                self._device.move(self.arena.after(source + at), self._bounce, count)
                self._device.move(self._bounce, self.arena.after(target + at), count)

    def _move(self, source: int, target: int, nbytes: int) -> None:
        if nbytes:
            self._device.move(self.arena.after(source), self.arena.after(target), nbytes)

    def begin_pass(self) -> None:
        """Take up what has come to stay since the last pass."""
        if self._is_moving:
            self.hold({name: matrix.goal for name, matrix in self._matrices.items()})
        here = {name: matrix.held for name, matrix in self._matrices.items()}
        if here != self._from_here:
            self._ahead.clear()
            self._store.start_at(here)
            self._from_here = here
            self.version += 1
        self._store.begin_pass()

    @property
    def is_whole(self) -> bool:
        """Whether nothing is streamed."""
        return all(matrix.held == matrix.size.rows for matrix in self._matrices.values())

    def held_rows(self, name: str) -> int:
        """Rows of a matrix that this pass finds on the device."""
        return self._from_here[name]

    def pieces(self, name: str, stop: int | None = None) -> Iterator[DevicePiece]:
        """All rows of a matrix, once and in order; the kernel for each is queued before the next is asked for.

        Args:
            stop: a row, at or behind those on the device, before which to stop; the rows from there lie in the host's memory.
        """
        matrix, held = self._matrices[name], self._from_here[name]
        end = matrix.size.rows if stop is None else stop
        if held:
            yield DevicePiece(self.arena.after(matrix.offset), 0, held)
        if held < end:
            for piece in self._store.pieces(name):
                yield from self._through_ring(matrix, piece, end)

    def prefetch(self) -> None:
        """Let the copying stream go on with what the next pass asks for first; call it when a pass is queued."""
        if self._ahead:
            return
        for name, matrix in self._matrices.items():
            if self._from_here[name] == matrix.size.rows:
                continue
            piece = self._store.held(name)
            if piece is None:
                return  # it comes from the disk, whose readers run ahead themselves
            for part in self._parts(matrix, piece, matrix.size.rows):
                if len(self._ahead) == len(self._slots):
                    return
                self._ahead.append((part, self._send(part)))
            if piece.first + piece.count < matrix.size.rows:
                return

    def _through_ring(self, matrix: _Matrix, piece: Piece, stop: int) -> Iterator[DevicePiece]:
        """The rows of a host's piece before `stop`, slot by slot."""
        for part in self._parts(matrix, piece, stop):
            slot = self._next_slot(part)
            self._device.follow("compute", slot.filled)
            try:
                yield DevicePiece(slot.place, part.first, part.count)
                self._keep(matrix, part, slot)
            finally:  # also where a pass is broken off with the kernel queued
                slot.used = self._device.record("compute")
                if not part.stays:
                    self._device.wait(slot.filled)  # before the host's memory holds something else

    def _parts(self, matrix: _Matrix, piece: Piece, stop_at: int) -> Iterator[_Part]:
        """A host's piece in parts that fit a slot; where rows that should stay end, a part ends."""
        size = matrix.size
        at_once = self._slot_bytes // size.unit_bytes * size.unit
        if at_once == 0 or not self._slots:
            raise DeviceMemoryError(f"the ring's slots of {self._slot_bytes} bytes hold no row of {size.name}.")
        first, end = max(piece.first, self._from_here[size.name]), min(piece.first + piece.count, stop_at)
        while first < end:
            stop = min(first + at_once, end)
            if first < matrix.goal:
                stop = min(stop, matrix.goal)
            at = piece.start + size.bytes_of(first - piece.first)
            values = piece.data[at : at + size.bytes_of(stop - first)]
            yield _Part(size.name, first, stop - first, values, piece.stays)
            first = stop

    def _next_slot(self, part: _Part) -> _Slot:
        """The slot to which a part was sent ahead, or is sent now."""
        if self._ahead:
            sent, slot = self._ahead.popleft()
            if (sent.name, sent.first, sent.count) == (part.name, part.first, part.count):
                return slot
            self._ahead.clear()  # a pass was broken off
        return self._send(part)

    def _send(self, part: _Part) -> _Slot:
        """Queue the copy of a part to the next slot of the ring."""
        slot = self._slots[self._turn]
        self._turn = (self._turn + 1) % len(self._slots)
        if slot.used is not None:
            self._device.follow("copy", slot.used)
        self._device.write(slot.place, part.values, stream="copy", stays=True)
        slot.filled = self._device.record("copy")
        self.copied_bytes += len(part.values)
        return slot

    def _keep(self, matrix: _Matrix, part: _Part, slot: _Slot) -> None:
        """Copy a part that may stay to its place; it is used from there from the next pass on."""
        if part.first == matrix.held and part.first + part.count <= matrix.goal:
            target = self.arena.after(matrix.offset + matrix.size.bytes_of(part.first))
            self._device.move(slot.place, target, len(part.values))
            matrix.held = part.first + part.count


def _batched(items: Sequence[tuple[_Matrix, int]], count: int) -> Iterator[list[tuple[_Matrix, int]]]:
    rest = iter(items)
    while batch := list(itertools.islice(rest, count)):
        yield batch
