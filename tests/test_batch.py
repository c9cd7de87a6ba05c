"""Tiles: the tokens of a pass that attend together."""

from __future__ import annotations

import numpy as np
import pytest

from moss_jt.batch import tiles_of

CASES = [
    ([0], [5], [(0, 1)]),
    ([3, 1, 2], [7, 8, 9], [(0, 1), (1, 1), (2, 1)]),
    ([0] * 4, [0, 1, 2, 3], [(0, 4)]),
    ([0] * 9, list(range(30, 39)), [(0, 4), (4, 4), (8, 1)]),
    ([0, 0, 1, 1, 1, 1, 1, 0], [4, 5, 6, 7, 8, 9, 10, 6], [(0, 2), (2, 4), (6, 1), (7, 1)]),
    ([0, 0, 0], [4, 5, 9], [(0, 2), (2, 1)]),
]


@pytest.mark.parametrize(("slots", "positions", "want"), CASES)
def test_tiles_are_neighbours_of_one_sequence(
    slots: list[int], positions: list[int], want: list[tuple[int, int]]
) -> None:
    found = tiles_of(np.array(slots, np.int32), np.array(positions, np.int32), 4)
    assert found.dtype == np.int32
    assert [tuple(tile) for tile in found.tolist()] == want
