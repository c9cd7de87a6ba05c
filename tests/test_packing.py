"""The tile16 layout against the golden integers, a slow definition of its own, and there-and-back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moss_jt.config import Bits
from moss_jt.errors import CheckpointError, ShapeError
from moss_jt.layout import TILE_ROWS, TileLayout
from moss_jt.packing import (
    GptqMatrix,
    QuantMatrix,
    dequantize,
    gptq_codes,
    gptq_words,
    gptq_zeros,
    input_order,
    pack,
    pack_end,
    pack_gptq,
    pack_gptq_tiles,
    pack_tiles,
    plain_groups,
    tile_layout,
    unpack,
    unpack_gptq,
    unpack_tiles,
)

PARTS = ("qweight", "qzeros", "scales", "g_idx")


def random_words(bits: Bits, n: int, k: int, groups: np.ndarray[Any, Any], seed: int = 0) -> GptqMatrix:
    rng = np.random.default_rng(seed)
    count = int(groups.max()) + 1
    per = 32 // bits
    return GptqMatrix(
        rng.integers(-(2**31), 2**31, (k // per, n), dtype=np.int32),
        rng.integers(-(2**31), 2**31, (count, n // per), dtype=np.int32),
        rng.standard_normal((count, n)).astype(np.float16),
        groups,
    )


def read_slowly(blob: np.ndarray[Any, Any], layout: TileLayout, row: int, position: int) -> int:
    """One code, by the words of moss_jt.layout."""
    tile, r = divmod(row, TILE_ROWS)
    block, i = divmod(position, layout.block)
    start = tile * layout.tile_bytes + 64 * block + 4 * r
    if layout.bits == 8:
        return int(blob[start + i])
    byte = int(blob[start + i % 4])
    return byte & 15 if i < 4 else byte >> 4


def assert_same_words(found: GptqMatrix, wanted: GptqMatrix) -> None:
    for part in PARTS:
        a, b = getattr(found, part), getattr(wanted, part)
        assert (a.dtype, a.shape) == (b.dtype, b.shape), part
        assert a.tobytes() == b.tobytes(), part


@pytest.mark.parametrize("case", ["r0", "r1"])
@pytest.mark.parametrize("bits", [4, 8])
def test_random_bits_give_the_golden_numbers_and_come_back(golden: Path, bits: Bits, case: str) -> None:
    with np.load(golden / f"tiny-int{bits}" / "random-bits.npz") as data:
        words = GptqMatrix(*(data[f"{case}_{part}"] for part in PARTS))
        codes, zeros = data[f"{case}_q"].T, data[f"{case}_zero"].T
        weights, size = data[f"{case}_w_fp32"], int(data[f"{case}_groupsize"][0])
    layout = tile_layout((codes.shape[0], codes.shape[1]), bits, size, words.g_idx)
    assert layout.permuted
    blob = pack_gptq(words, layout)
    matrix = unpack(blob, layout)
    assert np.array_equal(matrix.codes, codes)
    assert np.array_equal(matrix.zeros[:, matrix.groups].astype(np.int16) + 1, zeros)
    assert np.array_equal(dequantize(matrix), weights)
    assert np.array_equal(pack(matrix, layout), blob)
    assert_same_words(unpack_gptq(blob, layout), words)


@pytest.mark.parametrize("size", [8, 32, -1])
@pytest.mark.parametrize("n", [8, 16, 40, 64])
@pytest.mark.parametrize("bits", [4, 8])
def test_short_way_equals_plain_way(bits: Bits, n: int, size: int) -> None:
    k = 72  # not whole groups of 32
    groups = plain_groups(k, k if size == -1 else size)
    words = random_words(bits, n, k, groups)
    layout = tile_layout((n, k), bits, size, groups)
    assert not layout.permuted
    blob = pack_gptq(words, layout)
    plain = QuantMatrix(
        gptq_codes(words.qweight, bits).T, words.scales.T, gptq_zeros(words.qzeros, bits).T, words.g_idx
    )
    assert np.array_equal(blob, pack(plain, layout))
    assert len(blob) == layout.nbytes
    assert_same_words(unpack_gptq(blob, layout), words)
    back = unpack(blob, layout)
    for name in ("codes", "scales", "zeros", "groups"):
        assert np.array_equal(getattr(back, name), getattr(plain, name)), name


@pytest.mark.parametrize("size", [12, 32, 30])
@pytest.mark.parametrize("bits", [4, 8])
def test_act_order_and_broken_blocks_equal_plain_way(bits: Bits, size: int) -> None:
    n, k = 48, 120
    groups = np.random.default_rng(3).permutation(plain_groups(k, size))
    words = random_words(bits, n, k, groups)
    layout = tile_layout((n, k), bits, size, groups)
    assert layout.permuted
    plain = QuantMatrix(
        gptq_codes(words.qweight, bits).T, words.scales.T, gptq_zeros(words.qzeros, bits).T, words.g_idx
    )
    blob = pack_gptq(words, layout)
    assert np.array_equal(blob, pack(plain, layout))
    assert_same_words(unpack_gptq(blob, layout), words)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_blob_made_by_some_rows_at_a_time_is_the_same(bits: Bits, act_order: bool) -> None:
    n, k, size = 88, 80, 12 if act_order else 16
    groups = plain_groups(k, size)
    groups = np.random.default_rng(3).permutation(groups) if act_order else groups
    words = random_words(bits, n, k, groups)
    layout = tile_layout((n, k), bits, size, groups)
    matrix = unpack(pack_gptq(words, layout), layout)
    perm = input_order(layout, groups)
    parts, short = [], []
    for first, stop in ((0, 32), (32, 48), (48, 88)):
        rows = slice(first, stop)
        some = QuantMatrix(matrix.codes[rows], matrix.scales[rows], matrix.zeros[rows], groups)
        parts.append(pack_tiles(some, layout, perm))
        back = unpack_tiles(parts[-1], layout, perm)
        for name in ("codes", "scales", "zeros"):
            found = getattr(back, name)
            assert np.array_equal(found[: stop - first], getattr(some, name)), name
            assert not found[stop - first :].any(), name
        qzeros = words.qzeros[:, first // layout.block : stop // layout.block]
        part = GptqMatrix(words.qweight[:, rows], qzeros, words.scales[:, rows], groups)
        short += list(pack_gptq_tiles(part, layout, perm if layout.permuted else None))
    blob = pack_gptq(words, layout)
    assert np.array_equal(np.concatenate([*parts, pack_end(layout, perm)]), blob)
    assert np.array_equal(np.concatenate([*short, pack_end(layout, perm)]), blob)


@pytest.mark.parametrize("bits", [4, 8])
def test_bytes_lie_where_the_layout_says(bits: Bits) -> None:
    n, k, size = 24, 64, 16
    words = random_words(bits, n, k, plain_groups(k, size))
    layout = tile_layout((n, k), bits, size)
    blob = pack_gptq(words, layout)
    codes = gptq_codes(words.qweight, bits).T
    for row, position in ((0, 0), (3, 5), (15, 63), (16, 7), (23, 40)):
        assert read_slowly(blob, layout, row, position) == codes[row, position], (row, position)
    tile = blob[layout.tile_bytes : 2 * layout.tile_bytes]
    scales = tile[layout.code_bytes :][: layout.n_groups * 32].view("<f2").reshape(-1, TILE_ROWS)
    assert np.array_equal(scales[2, :8], words.scales[2, 16:24])
    zeros = tile[layout.code_bytes + layout.scale_bytes :]
    stored = gptq_zeros(words.qzeros, bits)
    if bits == 8:
        assert zeros[2 * 16 + 5] == stored[2, 21]
    else:
        assert zeros[2 * 8 + 5] == stored[2, 21]  # row 13 of the tile is padding: a zero high nibble
    padding = blob[layout.perm_offset :]
    assert not padding.any()


@pytest.mark.parametrize("bits", [4, 8])
def test_words_and_codes_are_inverse(bits: Bits) -> None:
    words = np.random.default_rng(1).integers(-(2**31), 2**31, (5, 12), dtype=np.int32)
    codes = gptq_codes(words, bits)
    assert codes[0, 0] == int(words[0, 0]) % (1 << bits)
    assert np.array_equal(gptq_words(codes, bits), words)


def test_groups_must_be_whole() -> None:
    groups = plain_groups(64, 16)
    groups[0] = 1
    with pytest.raises(CheckpointError, match=r"gives group 0 15 inputs where 16 were expected"):
        tile_layout((16, 64), 4, 16, groups)
    with pytest.raises(CheckpointError, match=r"names groups 0 to 4; 64 inputs in groups of 16 have 0 to 3"):
        tile_layout((16, 64), 4, 16, plain_groups(64, 16) + (np.arange(64) == 63))
    with pytest.raises(CheckpointError, match=r"g_idx has shape \(32,\); the matrix has 64 inputs"):
        tile_layout((16, 64), 4, 16, plain_groups(32, 16))


def test_a_broken_permutation_is_refused() -> None:
    groups = np.random.default_rng(0).permutation(plain_groups(64, 16))
    words = random_words(4, 16, 64, groups)
    layout = tile_layout((16, 64), 4, 16, groups)
    blob = pack_gptq(words, layout)
    perm = blob[layout.perm_offset : layout.perm_offset + 256].view("<i4")
    perm[0] = perm[1]
    with pytest.raises(CheckpointError, match=r"does not name each of its 64 inputs once"):
        unpack(blob, layout)
    perm[0] = 1000
    with pytest.raises(CheckpointError, match=r"does not name each of its 64 inputs once"):
        unpack_gptq(blob, layout)


def test_wrong_shapes_are_named() -> None:
    layout = tile_layout((16, 64), 4, 16)
    zeros = np.zeros((16, 4), np.uint8)
    matrix = QuantMatrix(np.zeros((16, 60), np.uint8), zeros.astype(np.float16), zeros, plain_groups(64, 16))
    with pytest.raises(
        ShapeError, match=r"codes has shape \(16, 60\); a matrix of 16 x 64 in 4 groups needs \(16, 64\)"
    ):
        pack(matrix, layout)
    with pytest.raises(ShapeError, match=r"its layout needs uint8"):
        unpack(np.zeros(10, np.uint8), layout)
    odd = tile_layout((15, 64), 4, 16)
    with pytest.raises(CheckpointError, match=r"does not fill the words of GPTQ"):
        unpack_gptq(np.zeros(odd.nbytes, np.uint8), odd)
