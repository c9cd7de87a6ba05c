"""Tiers: the matrices of a checkpoint, each partly in memory and partly on disk.

Of every matrix the first rows are held in anonymous memory, the rest stays in its file and passes
through a ring of buffers that native threads fill ahead of the computation, in the order of a pass
and on over its end. The cut is always between whole units (a tile of 16 rows, or a row), so an
operation meets the same units whatever is held.

What is held may change between passes. To shrink costs nothing: the last rows of each matrix are
given back to the system. To grow costs no reading either: a piece that passes by and may stay is
copied from the ring to its place.

Where a device holds the first rows of each matrix for good, only the rest is a matter of this file: its
rows count from `base` on in here, and from the first of the matrix for everybody else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from moss_jt.checkpoint import Checkpoint, Entry
from moss_jt.layout import ALIGNMENT, round_up
from moss_jt.memory import PAGE
from moss_jt.pages import Pages
from moss_jt.plan import MatrixSize, Plan, cut_rows, rest_of
from moss_jt.progress import Progress, Quiet
from moss_jt.reader import Item, Reader, ReaderStats

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Cut:
    """Rows of a matrix that pass through the ring at once."""

    index: int  # in the order of a pass
    first: int
    count: int


@dataclass
class Matrix:
    """One matrix: where it lies in its file, and what of it is held.

    Attributes:
        size: of the rows from `base` on, and how they may be cut; rows count from there.
        base: the first row of the matrix that matters here.
        file, offset: the reader's number of its file, and where row `base` lies in it.
        memory_at, memory: room for the rows that may be held, up to the end of a page; the first `held` rows are here.
            Its address and `offset` are equal modulo ALIGNMENT, which direct I/O likes.
        goal: rows that should be held.
        low: rows below this are not asked for now.
        cuts: the rest, in order.
    """

    size: MatrixSize
    base: int
    file: int
    offset: int
    goal: int
    memory_at: int
    memory: Bytes
    held: int = 0
    low: int = 0
    cuts: list[Cut] = field(default_factory=list)

    @property
    def lead(self) -> int:
        """Bytes before row `base` of the first block of direct I/O."""
        return self.offset % ALIGNMENT

    def pages_of(self, rows: int) -> int:
        """Bytes of memory that hold the first `rows` rows, in whole pages."""
        return round_up(self.lead + self.size.bytes_of(rows), PAGE) if rows else 0

    def rest(self, piece_bytes: int) -> Iterator[tuple[int, int]]:
        """(first, count) of pieces for the rows that are not held: those that should be, and then the others."""
        start = self.first_not_here
        if start < self.goal:
            yield from cut_rows(replace(self.size, rows=self.goal), start, piece_bytes)
        if max(start, self.goal) < self.size.rows:
            yield from cut_rows(self.size, max(start, self.goal), piece_bytes)

    @property
    def first_not_here(self) -> int:
        """The first row that is asked for and not held."""
        return max(self.held, self.low)

    @property
    def first_streamed(self) -> int:
        """The row from which on the current order of reading brings it."""
        return self.cuts[0].first if self.cuts else self.size.rows


class TieredMatrices:
    """Matrices in the order of a pass, as far as held in memory, the rest streamed.

    Args:
        checkpoint: whose files are read; they stay open.
        sizes: of the matrices, in the order in which a pass asks for them.
        plan: what to hold at first, and the ring; None holds everything. More than at first is never held.
        base: the first row of each matrix that matters here, whole units; the plan counts rows from there.

    Raises:
        DeviceMemoryError: the system does not give the memory.
        CheckpointError: a file cannot be read.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        sizes: Sequence[MatrixSize],
        plan: Plan | None = None,
        progress: Progress | None = None,
        base: Mapping[str, int] | None = None,
    ) -> None:
        self._checkpoint, self._base = checkpoint, base or {}
        self._files: dict[Path, int] = {}
        sizes = rest_of(sizes, self._base)
        if plan is not None and plan.ring_slots:
            self._reader = Reader(plan.ring_slots, plan.slot_bytes, progress=progress)
        else:
            self._reader = Reader(1, ALIGNMENT, progress=progress)  # to fill memory; nothing passes through its ring
        self._piece_bytes = plan.piece_bytes if plan is not None else 0
        rows = plan.resident if plan is not None else {size.name: size.rows for size in sizes}
        self._matrices: dict[str, Matrix] = {}
        self._is_cut = False  # whether the reader's order is that of all cuts
        self.version = 0  # rises whenever rows begin to come from elsewhere
        self._loan: object = None  # names the piece on loan
        self.streamed_bytes = 0
        self._take_memory(sizes, rows)
        self._fill(Quiet() if progress is None else progress)
        self._cut_rest()

    def _take_memory(self, sizes: Sequence[MatrixSize], rows: Mapping[str, int]) -> None:
        """Take room for what is held at first."""
        total = 0
        for size in sizes:
            entry, goal, base = self._checkpoint.entries[size.name], rows[size.name], self._base.get(size.name, 0)
            assert goal % size.unit == 0 or goal == size.rows, f"{size.name} would be cut within a unit"
            offset = entry.offset + size.bytes_of(base)
            matrix = Matrix(size, base, self._file_of(entry), offset, goal, total, np.empty(0, np.uint8))
            self._matrices[size.name] = matrix
            total += matrix.pages_of(goal)
        self._arena = Pages(total, "weights", "Give a smaller --memory.")
        memory = self._arena.array
        for matrix in self._matrices.values():
            if matrix.goal:
                end = round_up(matrix.lead + matrix.size.bytes_of(matrix.goal), ALIGNMENT)
                matrix.memory = memory[matrix.memory_at :][matrix.lead : end]

    def _file_of(self, entry: Entry) -> int:
        """The reader's number of the file in which something lies."""
        if entry.file not in self._files:
            self._files[entry.file] = self._reader.add_file(entry.file)
        return self._files[entry.file]

    def _fill(self, progress: Progress) -> None:
        """Read what is held from the files."""
        wanted = [matrix for matrix in self._matrices.values() if matrix.goal]
        places = [(Item(m.file, m.offset, len(m.memory)), m.memory) for m in wanted]
        self._reader.fill(places, progress)
        for matrix in wanted:
            matrix.held = matrix.goal

    def _cut_rest(self) -> None:
        """Cut what is not held into pieces that fit a buffer, and start reading ahead.

        An interrupt may strike anywhere in here: then the next pass cuts again.
        """
        self._is_cut = False
        self.version += 1
        items: list[Item] = []
        for matrix in self._matrices.values():
            matrix.cuts = []
            for first, count in matrix.rest(self._piece_bytes):
                matrix.cuts.append(Cut(len(items), first, count))
                start, end = matrix.size.bytes_of(first), matrix.size.bytes_of(first + count)
                items.append(Item(matrix.file, matrix.offset + start, end - start))
        self.streamed_bytes = sum(item.nbytes for item in items)
        self._reader.set_order(items)
        self._is_cut = True

    @property
    def ring(self) -> Bytes:
        """The memory through which the rest passes."""
        return self._reader.ring

    def __contains__(self, name: str) -> bool:
        return name in self._matrices

    def pieces(self, name: str) -> Iterator[tuple[Bytes, int, int, int]]:
        """(memory, byte of the first row in it, first row, rows) for all rows that are asked for, in order."""
        matrix = self._matrices[name]
        if matrix.first_streamed > matrix.low:
            at = matrix.size.bytes_of(matrix.low)
            yield matrix.memory, at, matrix.base + matrix.low, matrix.first_streamed - matrix.low
        for cut in matrix.cuts:
            loan = self._loan = object()
            start = self._reader.acquire(cut.index)
            try:
                yield self._reader.ring, start, matrix.base + cut.first, cut.count
                self._keep(matrix, cut, start)
            finally:
                if self._loan is loan:  # what broke off may be closed late, when another pass has the same piece
                    self._reader.release(cut.index)

    def _keep(self, matrix: Matrix, cut: Cut, start: int) -> None:
        """Copy a piece that may stay to its place; it is used from there from the next pass on."""
        if cut.first == matrix.held and cut.first + cut.count <= matrix.goal:
            at, end = matrix.size.bytes_of(cut.first), matrix.size.bytes_of(cut.first + cut.count)
            matrix.memory[at:end] = self._reader.ring[start : start + end - at]
            matrix.held = cut.first + cut.count

    def held(self, name: str) -> tuple[Bytes, int, int, int] | None:
        """What `pieces` gives first, if it is in memory; nothing is waited for."""
        matrix = self._matrices[name]
        return next(iter(self.pieces(name))) if matrix.first_streamed > matrix.low else None

    def begin_pass(self) -> None:
        """Take up what has come to stay since the last pass."""
        if not self._is_cut or any(m.first_streamed != m.first_not_here for m in self._matrices.values()):
            self._cut_rest()

    def set_rows(self, rows: Mapping[str, int]) -> None:
        """Hold this many rows of each matrix: fewer at once, more as they pass by. Only between passes."""
        self._is_cut = False
        for name, matrix in self._matrices.items():
            matrix.goal = rows[name]
            assert matrix.size.bytes_of(matrix.goal) <= len(matrix.memory), f"{name} has no room for {matrix.goal} rows"
            if matrix.goal < matrix.held:
                self._give_back(matrix)
        self._cut_rest()

    def start_at(self, rows: Mapping[str, int]) -> None:
        """Ask for the rows of each matrix from these on; a device has the others. Only between passes."""
        assert all(rows[name] >= base for name, base in self._base.items()), "rows before `base` are not in here"
        self._is_cut = False
        for name, matrix in self._matrices.items():
            matrix.low = max(0, rows[name] - matrix.base)
        self._cut_rest()

    def fill(self, parts: Sequence[tuple[str, int, Bytes]], progress: Progress | None = None) -> None:
        """Read bytes of matrices into arrays, several at a time: (name, byte of the blob, array to fill)."""
        items = []
        for name, start, target in parts:
            entry = self._checkpoint.entries[name]
            items.append((Item(self._file_of(entry), entry.offset + start, len(target)), target))
        self._reader.fill(items, progress)

    @property
    def memory(self) -> list[Bytes]:
        """The memory that weights lie in and pass through, for devices that copy from it."""
        return [memory for memory in (self._arena.array, self._reader.ring) if len(memory)]

    def _give_back(self, matrix: Matrix) -> None:
        """Return the pages behind the rows that should be held to the system."""
        start, end = matrix.pages_of(matrix.goal), matrix.pages_of(matrix.held)
        matrix.held = matrix.goal
        if end > start:
            # With huge pages a row that returns would bring its neighbours' empty places with it, and the system
            # might fill up any place where a little is left.
            self._arena.stay_small()
            self._arena.give_back(matrix.memory_at + start, end - start)

    @property
    def resident_bytes(self) -> int:
        """Bytes of memory that hold weights now, the ring apart."""
        return sum(matrix.pages_of(matrix.held) for matrix in self._matrices.values())

    @property
    def stats(self) -> ReaderStats:
        """What the reader has done so far."""
        return self._reader.stats()

    def close(self) -> None:
        """Stop the readers."""
        self._reader.close()
