"""DeviceWeights: matrices partly in device memory, the rest brought there piece by piece while others are multiplied.

Of every matrix the first rows stay on the device. The rest comes from the host's store (memory or disk) through a ring
of slots: the copying stream fills a slot when the kernel that used it last is through, and the computing stream begins
a kernel when its slot is full. So copying runs ahead of computing by the slots of the ring, on over the end of a pass.
Nothing is ever copied back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from moss_jt.device import Device, Event, Place
from moss_jt.errors import DeviceMemoryError
from moss_jt.layout import TILE_ROWS, RowsLayout, TileLayout
from moss_jt.weights import Piece, WeightStore


@dataclass(frozen=True)
class DevicePiece:
    """Rows [first, first + count) of a matrix on the device, until the next piece is asked for."""

    place: Place
    first: int
    count: int


@dataclass
class _Slot:
    place: Place
    used: Event | None = None  # when the kernel that read it last is through


class DeviceWeights:
    """The matrices of a store, for kernels of a device.

    Args:
        device: where they are multiplied.
        store: where they come from; it stays the caller's.
        resident: rows of each matrix that stay on the device, whole units; the rest is streamed.
        slots, slot_bytes: of the ring; 0 where nothing is streamed.

    Raises:
        DeviceMemoryError: more than the device may take.
    """

    def __init__(
        self, device: Device, store: WeightStore, resident: Mapping[str, int], *, slots: int = 0, slot_bytes: int = 0
    ) -> None:
        self._device, self._store = device, store
        self._rows = dict(resident)
        self._places: dict[str, Place] = {}
        self._slot_bytes = slot_bytes
        self._slots = [_Slot(device.allocate(slot_bytes, "the ring of weights")) for _ in range(slots)]
        self._turn = 0
        self.copied_bytes = 0
        for name, rows in resident.items():
            if rows:
                self._upload(name, rows)

    def _upload(self, name: str, rows: int) -> None:
        layout = self._store.layout(name)
        place = self._places[name] = self._device.allocate(bytes_of(layout, rows), f"rows of {name}")
        for piece in self._store.pieces(name):
            count = min(piece.count, rows - piece.first)
            if count <= 0:
                break
            start, nbytes = bytes_of(layout, piece.first), bytes_of(layout, count)
            self._device.write(place.after(start), piece.data[piece.start : piece.start + nbytes])

    def pieces(self, name: str) -> Iterator[DevicePiece]:
        """All rows of a matrix, once and in order; the kernel for each is queued before the next is asked for."""
        layout, held = self._store.layout(name), self._rows.get(name, 0)
        if held:
            yield DevicePiece(self._places[name], 0, held)
        if held < layout.shape[0]:
            for piece in self._store.pieces(name):
                if piece.first + piece.count > held:
                    yield from self._through_ring(layout, piece, max(piece.first, held))

    def _through_ring(self, layout: RowsLayout | TileLayout, piece: Piece, first: int) -> Iterator[DevicePiece]:
        """The rows of a host's piece from `first` on, slot by slot."""
        unit = TILE_ROWS if isinstance(layout, TileLayout) else 1
        at_once = self._slot_bytes // bytes_of(layout, unit) * unit
        if at_once == 0:
            raise DeviceMemoryError(f"the ring's slots of {self._slot_bytes} bytes hold no row of {piece.name}.")
        end = piece.first + piece.count
        for start in range(first, end, at_once):
            count = min(at_once, end - start)
            slot = self._slots[self._turn]
            self._turn = (self._turn + 1) % len(self._slots)
            if slot.used is not None:
                self._device.follow("copy", slot.used)
            at = piece.start + bytes_of(layout, start - piece.first)
            nbytes = bytes_of(layout, count)
            self._device.write(slot.place, piece.data[at : at + nbytes], stream="copy", stays=piece.stays)
            self.copied_bytes += nbytes
            self._device.follow("compute", self._device.record("copy"))
            try:
                yield DevicePiece(slot.place, start, count)
            finally:  # also where a pass is broken off with the kernel queued
                slot.used = self._device.record("compute")


def bytes_of(layout: RowsLayout | TileLayout, rows: int) -> int:
    """Bytes of the first `rows` rows of a matrix, which are whole units or all."""
    if isinstance(layout, TileLayout):
        return -(-rows // TILE_ROWS) * layout.tile_bytes
    return rows * layout.row_bytes
