"""WeightStore: lends stored matrices to operations.

Whoever computes borrows a matrix for as long as an operation runs:

    with store.use(name) as stored:      # the bytes are here until the block ends
        ops.linear(x, stored, …)         # and the operation has run when it does

Weights are never changed and never written back. This store maps the checkpoint's files: the
system reads what is used and drops what it needs the room for. Small tensors (norms, biases) are
kept in memory as float32. Matrices handed over by `add` (low-rank terms, tests) lie in memory.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from moss_jt.checkpoint import Checkpoint
from moss_jt.errors import CheckpointError
from moss_jt.layout import PlainLayout, RowsLayout, TileLayout

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Stored:
    """A matrix on loan: its bytes, as they lie in the file, and how to read them.

    Attributes:
        name: of the tensor, for messages.
        data: the blob, (layout.nbytes,) uint8; belongs to the store.
        layout: how the bytes are laid out.
    """

    name: str
    data: Bytes
    layout: RowsLayout | TileLayout


def widen(raw: Bytes, dtype: str) -> Floats:
    """Stored floating-point bytes as float32."""
    if dtype == "bfloat16":
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return raw.view(dtype).astype(np.float32)


class WeightStore:
    """The weights of one checkpoint, mapped from its files; without one, what is added."""

    def __init__(self, checkpoint: Checkpoint | None = None) -> None:
        self._matrices: dict[str, Stored] = {}
        self._small: dict[str, Floats] = {}
        if checkpoint is not None:
            self._map(checkpoint)

    def _map(self, checkpoint: Checkpoint) -> None:
        maps: dict[Path, Bytes] = {}
        for name, entry in checkpoint.entries.items():
            if isinstance(entry.layout, PlainLayout):
                self._small[name] = checkpoint.read_plain(name)
                continue
            if entry.file not in maps:
                maps[entry.file] = _map_file(entry.file)
            data = maps[entry.file][entry.offset : entry.offset + entry.nbytes]
            self._matrices[name] = Stored(name, data, entry.layout)

    @contextmanager
    def use(self, name: str) -> Iterator[Stored]:
        """Borrow a matrix. The loan ends with the block; the operation must have run by then."""
        yield self._find(name)

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

    @property
    def stored_bytes(self) -> int:
        """Bytes of all matrices, padding included."""
        return sum(stored.data.nbytes for stored in self._matrices.values())

    def _find(self, name: str) -> Stored:
        try:
            return self._matrices[name]
        except KeyError:
            raise CheckpointError(f"the checkpoint has no matrix {name}.") from None


def _map_file(path: Path) -> Bytes:
    """The whole file, read-only."""
    try:
        with path.open("rb") as file:
            return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be mapped: {error}. Convert the checkpoint again.") from error
