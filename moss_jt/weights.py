"""WeightStore: lends stored matrices to operations, piece by piece.

Whoever computes asks for the pieces of a matrix, and runs the operation on each before the next:

    for piece in store.pieces(name):     # rows [piece.first, piece.first + piece.count) are here
        multiply(x, piece, …)            # and the operation has run when the next piece is asked for

Weights are never changed and never written back. Small tensors (norms, biases) are kept in memory
as float32. Matrices handed over by `add` and `put` (low-rank terms, tests) lie in memory.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from moss_jt.checked_file import CheckedFile
from moss_jt.checkpoint import Checkpoint, Entry
from moss_jt.errors import CheckpointError
from moss_jt.layout import PlainLayout, RowsLayout, TileLayout
from moss_jt.plan import Plan, matrix_sizes
from moss_jt.progress import Progress
from moss_jt.reader import ReaderStats
from moss_jt.tiers import TieredMatrices

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Perm = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Stored:
    """A whole matrix in memory: its bytes, as they lie in a file, and how to read them.

    Attributes:
        name: of the tensor, for messages.
        data: the blob, (layout.nbytes,) uint8; never changed.
        layout: how the bytes are laid out.
    """

    name: str
    data: Bytes
    layout: RowsLayout | TileLayout


@dataclass(frozen=True)
class Piece:
    """Some rows of a matrix, here until the next piece is asked for.

    Attributes:
        name: of the tensor, for messages.
        layout: of the whole matrix.
        data: memory that holds the piece; the store keeps few such arrays, for long.
        start: the byte in `data` where row `first` lies.
        first, count: rows [first, first + count) of the matrix.
        stays: whether it is here until the end of the pass.
    """

    name: str
    layout: RowsLayout | TileLayout
    data: Bytes
    start: int
    first: int
    count: int
    stays: bool = True


def widen(raw: Bytes, dtype: str) -> Floats:
    """Stored floating-point bytes as float32."""
    if dtype == "bfloat16":
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return raw.view(dtype).astype(np.float32)


class WeightStore:
    """The weights of one checkpoint; without one, what is added.

    Args:
        checkpoint: whose weights. Its files are held open: they may be removed or replaced, but not written to.
        plan: what is held in memory and what is streamed; without one everything is held.
        progress: told how much has been read.
        base: the first row of each matrix that is ever asked for, whole units, where a device keeps those before it;
            the plan is for the rows from there on.

    Attributes:
        lock: held by whoever computes a pass or changes what is held, so that neither meets the other.

    Raises:
        CheckpointError: a file cannot be read, or was replaced meanwhile.
        DeviceMemoryError: the system does not give the memory.
    """

    def __init__(
        self,
        checkpoint: Checkpoint | None = None,
        plan: Plan | None = None,
        progress: Progress | None = None,
        *,
        base: Mapping[str, int] | None = None,
    ) -> None:
        self._matrices: dict[str, Stored] = {}
        self._perms: dict[str, Perm] = {}
        self._small: dict[str, Floats] = {}
        self._on_disk: dict[str, Entry] = {}  # tables of which single rows are read
        self._checkpoint = checkpoint
        self._files: dict[Path, CheckedFile] = {}
        self._tiers: TieredMatrices | None = None
        self._added = 0
        self.lock = threading.RLock()
        weakref.finalize(self, _close, self._files)
        if checkpoint is not None:
            self._load(checkpoint, plan, progress, base)

    def _load(
        self, checkpoint: Checkpoint, plan: Plan | None, progress: Progress | None, base: Mapping[str, int] | None
    ) -> None:
        sizes = matrix_sizes(checkpoint.config, {name: entry.layout for name, entry in checkpoint.entries.items()})
        streamable = {size.name for size in sizes}
        for path in {entry.file for entry in checkpoint.entries.values()}:
            self._files[path] = CheckedFile(path)
        for name, entry in checkpoint.entries.items():
            if isinstance(entry.layout, PlainLayout):
                self._small[name] = checkpoint.read_plain(name)
            elif name not in streamable:
                self._on_disk[name] = entry
            elif isinstance(entry.layout, TileLayout) and entry.layout.permuted:
                self._perms[name] = _read_perm(checkpoint, entry, entry.layout)
        self._tiers = TieredMatrices(checkpoint, sizes, plan, progress, base)
        for path, file in self._files.items():
            file.check_in_place(checkpoint.stamps.get(path, file.stamp))

    def check_files(self) -> None:
        """See that what was read so far is what the files held when they were opened.

        Raises:
            CheckpointError: somebody has written to one.
            DiskError: the disk fails.
        """
        for file in self._files.values():
            file.check_unchanged()

    def begin_pass(self) -> None:
        """A pass over the layers begins."""
        if self._tiers is not None:
            self._tiers.begin_pass()

    def hold(self, rows: Mapping[str, int]) -> None:
        """Hold this many rows of each matrix of the checkpoint from now on; never more than at first.

        Only between passes. Rows that should be held and are not yet are kept as they pass by.
        """
        if self._tiers is not None:
            self._tiers.set_rows(rows)

    def start_at(self, rows: Mapping[str, int]) -> None:
        """From now on `pieces` begins at these rows: a device has those before. Only between passes."""
        if self._tiers is not None:
            self._tiers.start_at(rows)

    def fill(self, parts: Sequence[tuple[str, int, Bytes]], progress: Progress | None = None) -> None:
        """Read parts of matrices into arrays, several at a time.

        Args:
            parts: name, byte of its blob where the part begins, and the array to fill, uint8; fastest where the
                array's address and that byte are equal modulo 4096.
            progress: told about the bytes.

        Raises:
            CheckpointError: a part cannot be read.
        """
        on_disk = []
        for name, start, target in parts:
            if name in self._matrices:
                target[:] = self._matrices[name].data[start : start + len(target)]
            else:
                on_disk.append((name, start, target))
        if on_disk:
            assert self._tiers is not None, on_disk[0][0]
            self._tiers.fill(on_disk, progress)

    @property
    def memory(self) -> list[Bytes]:
        """The memory that matrices of the checkpoint lie in and pass through, for devices that copy from it."""
        return [] if self._tiers is None else self._tiers.memory

    def close(self) -> None:
        """Stop reading ahead; the store can no longer be used."""
        if self._tiers is not None:
            self._tiers.close()

    def layout(self, name: str) -> RowsLayout | TileLayout:
        """How a matrix is stored."""
        if name in self._matrices or self._checkpoint is None or name not in self._checkpoint.entries:
            return self._find(name).layout
        layout = self._checkpoint.entries[name].layout
        assert not isinstance(layout, PlainLayout), f"{name} is no matrix"
        return layout

    def perm(self, name: str) -> Perm | None:
        """The order in which a matrix holds its inputs, (padded_in,) int32, -1 for padding; None where it is theirs."""
        return self._perms.get(name)

    def pieces(self, name: str) -> Iterator[Piece]:
        """The rows of a matrix, once and in order: all, or those that `start_at` left.

        A piece is gone when the next one is asked for.
        """
        if name in self._matrices or self._tiers is None or name not in self._tiers:
            stored = self._find(name)
            yield Piece(name, stored.layout, stored.data, 0, 0, stored.layout.shape[0])
            return
        layout = self.layout(name)
        for data, start, first, count in self._tiers.pieces(name):
            yield Piece(name, layout, data, start, first, count, stays=data is not self._tiers.ring)

    def held(self, name: str) -> Piece | None:
        """What `pieces` gives first, if it is in memory and stays there."""
        if name in self._matrices or self._tiers is None or name not in self._tiers:
            return next(iter(self.pieces(name)))
        held = self._tiers.held(name)
        return None if held is None else Piece(name, self.layout(name), *held)

    def read(self, name: str) -> Bytes:
        """The whole blob of a matrix: for tools and tests, it may be large."""
        if name in self._matrices or self._checkpoint is None:
            return self._find(name).data
        return self._checkpoint.read(name)

    def small(self, name: str) -> Floats:
        """A norm's or bias's values, float32; always in memory."""
        try:
            return self._small[name]
        except KeyError:
            raise CheckpointError(f"the checkpoint has no tensor {name}.") from None

    def rows(self, name: str, which: Sequence[int] | npt.NDArray[np.int32]) -> Floats:
        """Rows of a floating-point matrix, (len(which), K) float32; only these rows are read.

        Raises:
            CheckpointError: the file has become shorter.
            DiskError: the disk fails.
        """
        entry = self._on_disk.get(name)
        layout = self._find(name).layout if entry is None or name in self._matrices else entry.layout
        assert isinstance(layout, RowsLayout), f"{name} is quantised and has no rows to look up"
        result = np.empty((len(which), layout.shape[1]), np.float32)
        for place, row in enumerate(which):
            raw = self._read_part(entry, name, int(row) * layout.row_bytes, layout.row_bytes)
            result[place] = widen(raw, layout.dtype)
        return result

    def _read_part(self, entry: Entry | None, name: str, start: int, nbytes: int) -> Bytes:
        """Bytes of a matrix that is not streamed."""
        if name in self._matrices or entry is None:
            return self._find(name).data[start : start + nbytes]
        raw = np.empty(nbytes, np.uint8)
        self._files[entry.file].read_into(entry.offset + start, raw.data)
        return raw

    def add(self, name: str, values: npt.ArrayLike) -> None:
        """Keep a matrix or a small tensor of the caller as float32 in memory, as if it came from the file."""
        array = np.ascontiguousarray(values, np.float32)
        self._added += 1
        if array.ndim == 1:
            self._small[name] = array.copy()
            return
        assert array.ndim == 2, f"{name} is neither a matrix nor a norm or bias"
        layout = RowsLayout((array.shape[0], array.shape[1]), "float32")
        data = np.zeros(layout.nbytes, np.uint8)
        data[: array.nbytes] = array.reshape(-1).view(np.uint8)
        self.put(Stored(name, data, layout))

    def put(self, stored: Stored) -> None:
        """Keep a matrix of the caller in memory, laid out already."""
        self._matrices[stored.name] = stored
        self._added += 1
        if isinstance(stored.layout, TileLayout) and stored.layout.permuted:
            at, count = stored.layout.perm_offset, stored.layout.padded_in
            self._perms[stored.name] = stored.data[at : at + 4 * count].view(np.int32)
        else:
            self._perms.pop(stored.name, None)

    @property
    def version(self) -> int:
        """As long as it is the same, so is every place where `pieces`, `small` and `perm` find what stays."""
        return self._added + (0 if self._tiers is None else self._tiers.version)

    @property
    def resident_bytes(self) -> int:
        """Bytes of matrices in memory now."""
        held = 0 if self._tiers is None else self._tiers.resident_bytes
        return held + sum(stored.data.nbytes for stored in self._matrices.values())

    @property
    def streamed_bytes(self) -> int:
        """Bytes of matrices that each pass reads."""
        return 0 if self._tiers is None else self._tiers.streamed_bytes

    @property
    def reading(self) -> ReaderStats:
        """What was read from the checkpoint's matrices so far."""
        return ReaderStats(0, 0, 0.0, True) if self._tiers is None else self._tiers.stats

    def _find(self, name: str) -> Stored:
        try:
            return self._matrices[name]
        except KeyError:
            raise CheckpointError(f"the checkpoint has no matrix {name}.") from None


def _close(files: Mapping[Path, CheckedFile]) -> None:
    for file in files.values():
        file.close()


def _read_perm(checkpoint: Checkpoint, entry: Entry, layout: TileLayout) -> Perm:
    return checkpoint.read(entry.name, start=layout.perm_offset, nbytes=4 * layout.padded_in).view(np.int32)
