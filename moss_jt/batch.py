"""The unit of work of a forward pass: a flat list of new tokens.

Sequences of any length are laid one after the other; each token says whose it is (slot) and where
it stands (position). There is no padding in here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Batch:
    """New tokens of one pass; T of them.

    Attributes:
        ids: token ids, (T,) int32.
        slots: the sequence of the cache that each token belongs to, (T,) int32.
        positions: its place in that sequence, (T,) int32; tokens of a slot come in order.
        wanted: indices into the T tokens whose logits are asked for, (R,) int32.
    """

    ids: IntArray
    slots: IntArray
    positions: IntArray
    wanted: IntArray

    @property
    def size(self) -> int:
        """T, the number of new tokens."""
        return len(self.ids)


def single_batch(ids: npt.ArrayLike, *, start: int = 0, slot: int = 0, wanted: npt.ArrayLike | None = None) -> Batch:
    """Tokens of one sequence from position `start` on; logits of the last one unless `wanted` says otherwise."""
    flat = np.asarray(ids, dtype=np.int32).reshape(-1)
    size = len(flat)
    rows = np.array([size - 1], np.int32) if wanted is None else np.asarray(wanted, dtype=np.int32)
    return Batch(flat, np.full(size, slot, np.int32), np.arange(start, start + size, dtype=np.int32), rows)


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many leading tokens two sequences share."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))


def tiles_of(slots: IntArray, positions: IntArray, most: int) -> IntArray:
    """Tokens of one sequence at neighbouring positions, up to `most` together: (tiles, 2) int32, first and how many."""
    follows = (np.diff(slots) == 0) & (np.diff(positions) == 1)
    ends = np.append(np.flatnonzero(~follows) + 1, len(slots))
    starts = np.append(0, ends[:-1])
    tiles = [
        (first, min(most, end - first))
        for start, end in zip(starts, ends, strict=True)
        for first in range(start, end, most)
    ]
    return np.array(tiles, np.int32)
