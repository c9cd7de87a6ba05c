"""WeightStore: lends stored matrices to operations, piece by piece.

Whoever computes asks for the pieces of a matrix, and runs the operation on each before the next:

    for piece in store.pieces(name):     # rows [piece.first, piece.first + piece.count) are here
        multiply(x, piece, …)            # and the operation has run when the next piece is asked for

Weights are never changed and never written back. Small tensors (norms, biases) are kept in memory
as float32. Matrices handed over by `add` and `put` (low-rank terms, tests) lie in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moss_jt.checkpoint import Checkpoint
from moss_jt.errors import CheckpointError
from moss_jt.layout import PlainLayout, RowsLayout, TileLayout

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
    """

    name: str
    layout: RowsLayout | TileLayout
    data: Bytes
    start: int
    first: int
    count: int


def widen(raw: Bytes, dtype: str) -> Floats:
    """Stored floating-point bytes as float32."""
    if dtype == "bfloat16":
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return raw.view(dtype).astype(np.float32)


class WeightStore:
    """The weights of one checkpoint, read into memory; without one, what is added."""

    def __init__(self, checkpoint: Checkpoint | None = None) -> None:
        self._matrices: dict[str, Stored] = {}
        self._perms: dict[str, Perm] = {}
        self._small: dict[str, Floats] = {}
        if checkpoint is not None:
            self._load(checkpoint)

    def _load(self, checkpoint: Checkpoint) -> None:
        for name, entry in checkpoint.entries.items():
            if isinstance(entry.layout, PlainLayout):
                self._small[name] = checkpoint.read_plain(name)
            else:
                self.put(Stored(name, checkpoint.read(name), entry.layout))

    def begin_pass(self) -> None:
        """A pass over the layers begins."""

    def layout(self, name: str) -> RowsLayout | TileLayout:
        """How a matrix is stored."""
        return self._find(name).layout

    def perm(self, name: str) -> Perm | None:
        """The order in which a matrix holds its inputs, (padded_in,) int32, -1 for padding; None where it is theirs."""
        return self._perms.get(name)

    def pieces(self, name: str) -> Iterator[Piece]:
        """All rows of a matrix, once and in order. A piece is gone when the next one is asked for."""
        stored = self._find(name)
        yield Piece(name, stored.layout, stored.data, 0, 0, stored.layout.shape[0])

    def read(self, name: str) -> Bytes:
        """The whole blob of a matrix: for tools and tests, it may be large."""
        return self._find(name).data

    def small(self, name: str) -> Floats:
        """A norm's or bias's values, float32; always in memory."""
        try:
            return self._small[name]
        except KeyError:
            raise CheckpointError(f"the checkpoint has no tensor {name}.") from None

    def rows(self, name: str, which: Sequence[int] | npt.NDArray[np.int32]) -> Floats:
        """Rows of a floating-point matrix, (len(which), K) float32; only these rows are read."""
        stored = self._find(name)
        assert isinstance(stored.layout, RowsLayout), f"{name} is quantised and has no rows to look up"
        n, k = stored.layout.shape
        table = stored.data[: n * stored.layout.row_bytes].reshape(n, stored.layout.row_bytes)
        return widen(table[np.asarray(which)], stored.layout.dtype).reshape(-1, k)

    def add(self, name: str, values: npt.ArrayLike) -> None:
        """Keep a matrix or a small tensor of the caller as float32 in memory, as if it came from the file."""
        array = np.array(values, dtype=np.float32, order="C")
        if array.ndim == 1:
            self._small[name] = array
            return
        assert array.ndim == 2, f"{name} is neither a matrix nor a norm or bias"
        layout = RowsLayout((array.shape[0], array.shape[1]), "float32")
        data = np.zeros(layout.nbytes, np.uint8)
        data[: array.nbytes] = array.reshape(-1).view(np.uint8)
        self.put(Stored(name, data, layout))

    def put(self, stored: Stored) -> None:
        """Keep a matrix of the caller in memory, laid out already."""
        self._matrices[stored.name] = stored
        if isinstance(stored.layout, TileLayout) and stored.layout.permuted:
            at, count = stored.layout.perm_offset, stored.layout.padded_in
            self._perms[stored.name] = stored.data[at : at + 4 * count].view(np.int32)
        else:
            self._perms.pop(stored.name, None)

    @property
    def stored_bytes(self) -> int:
        """Bytes of all matrices, padding included."""
        return sum(stored.data.nbytes for stored in self._matrices.values())

    def _find(self, name: str) -> Stored:
        try:
            return self._matrices[name]
        except KeyError:
            raise CheckpointError(f"the checkpoint has no matrix {name}.") from None
