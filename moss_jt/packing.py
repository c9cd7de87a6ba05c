"""Quantised matrices as numpy arrays, as tile16 blobs and as GPTQ words: pack, unpack, dequantise.

The bytes are described in `moss_jt.layout`. There are two ways into a blob. The plain way goes
through codes, one byte each, and handles every case; it is the definition. The short way turns
GPTQ words into tiles without spreading the codes, which works because one 32-bit word of GPTQ
holds exactly the inputs that one row has in one 64-byte chunk: for int8 the same four bytes, for
int4 the same eight nibbles in another order. `pack_gptq` and `unpack_gptq` take the short way
where the inputs are not permuted and the plain way, some rows at a time, where they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moss_jt.config import Bits
from moss_jt.errors import CheckpointError, ShapeError
from moss_jt.layout import TILE_ROWS, TileLayout

Array = npt.NDArray[Any]
Bytes = npt.NDArray[np.uint8]

_WORDS_AT_ONCE = 1 << 16  # 256 KiB: the nibble shuffle's working set stays in the L2 cache
_PIECE_BYTES = 1 << 24
_CODES_AT_ONCE = 1 << 24  # 16 MiB: codes spread to bytes at a time on the plain way


@dataclass(frozen=True)
class QuantMatrix:
    """A quantised matrix, its inputs in their own order.

    Attributes:
        codes: (N, K) uint8, one code a byte.
        scales: (N, G) float16.
        zeros: (N, G) uint8, the zero point minus 1, as GPTQ stores it.
        groups: (K,) int32, the group of each input.
    """

    codes: Bytes
    scales: npt.NDArray[np.float16]
    zeros: Bytes
    groups: npt.NDArray[np.int32]


@dataclass(frozen=True)
class GptqMatrix:
    """A quantised matrix in the words of GPTQ.

    Attributes:
        qweight: (K * bits / 32, N) int32, inputs packed lowest bits first.
        qzeros: (G, N * bits / 32) int32, outputs packed lowest bits first.
        scales: (G, N) float16.
        g_idx: (K,) int32, the group of each input.
    """

    qweight: npt.NDArray[np.int32]
    qzeros: npt.NDArray[np.int32]
    scales: npt.NDArray[np.float16]
    g_idx: npt.NDArray[np.int32]


def plain_groups(k: int, group_size: int) -> npt.NDArray[np.int32]:
    """The group of each of `k` inputs when groups are runs of `group_size`."""
    return (np.arange(k, dtype=np.int64) // group_size).astype(np.int32)


def check_groups(groups: Array, k: int, group_size: int) -> None:
    """See that every group of inputs is whole.

    Raises:
        CheckpointError: a group has another number of inputs than `group_size` (the last one: the rest).
    """
    if groups.shape != (k,):
        raise CheckpointError(f"g_idx has shape {groups.shape}; the matrix has {k} inputs.")
    n_groups = -(-k // group_size)
    low, high = int(groups.min()), int(groups.max())
    if low < 0 or high >= n_groups:
        raise CheckpointError(
            f"g_idx names groups {low} to {high}; {k} inputs in groups of {group_size} have 0 to {n_groups - 1}."
        )
    wanted = np.full(n_groups, group_size)
    wanted[-1] = k - (n_groups - 1) * group_size
    found = np.bincount(groups, minlength=n_groups)
    if (found != wanted).any():
        first = int(np.flatnonzero(found != wanted)[0])
        raise CheckpointError(
            f"g_idx gives group {first} {found[first]} inputs where {wanted[first]} were expected: groups must be whole."
        )


def inputs_per_group(group_size: int, k: int) -> int:
    """A config's group size for a matrix of `k` inputs: -1 means all of them, and so does more than there are."""
    return k if group_size == -1 else min(group_size, k)


def tile_layout(shape: tuple[int, int], bits: Bits, group_size: int, groups: Array | None = None) -> TileLayout:
    """The layout for a matrix: with a permutation only where its groups need one.

    Args:
        shape: (N, K).
        bits: 4 or 8.
        group_size: inputs in a group, -1 for all.
        groups: (K,) the group of each input; None for runs.

    Raises:
        CheckpointError: the groups are not whole.
    """
    k = shape[1]
    size = inputs_per_group(group_size, k)
    permuted = bool(size % (32 // bits)) or bool(k % (32 // bits))
    if groups is not None:
        check_groups(groups, k, size)
        permuted = permuted or not np.array_equal(groups, plain_groups(k, size))
    return TileLayout(shape, bits, size, permuted)


def input_order(layout: TileLayout, groups: Array) -> npt.NDArray[np.int32]:
    """Which input lies at each position of a blob: (padded_in,) int32, -1 at padding.

    Inputs lie group after group, inside a group in their own order.
    """
    perm = np.full(layout.padded_in, -1, dtype=np.int32)
    by_group = np.argsort(groups, kind="stable")
    ordered = groups[by_group].astype(np.int64)
    rank = np.arange(len(groups)) - ordered * layout.group_size
    perm[ordered * layout.padded_group + rank] = by_group
    return perm


def pack(matrix: QuantMatrix, layout: TileLayout) -> Bytes:
    """Make the tile16 blob of a matrix, the plain way.

    Returns:
        (layout.nbytes,) uint8.

    Raises:
        ShapeError: the arrays are not of the layout's shape.
    """
    _check_shapes(matrix, layout)
    blob = np.zeros(layout.nbytes, dtype=np.uint8)
    perm = input_order(layout, matrix.groups)
    tiles = _tiles(blob, layout)
    step = _tiles_at_once(layout)
    for first in range(0, layout.n_tiles, step):
        rows = slice(first * TILE_ROWS, (first + step) * TILE_ROWS)
        _pack_codes(matrix.codes[rows], perm, layout, tiles[first : first + step])
    _pack_scales_zeros(matrix.scales.T, matrix.zeros.T, layout, tiles)
    blob[layout.perm_offset :] = pack_end(layout, perm)
    return blob


def unpack(blob: Bytes, layout: TileLayout) -> QuantMatrix:
    """Read a tile16 blob back; the inverse of `pack`.

    Raises:
        CheckpointError: the blob's permutation is broken.
    """
    n, k = layout.shape
    perm = read_perm(blob, layout)
    tiles = _tiles(blob, layout)
    codes = np.empty((n, k), dtype=np.uint8)
    step = _tiles_at_once(layout)
    for first in range(0, layout.n_tiles, step):
        rows = slice(first * TILE_ROWS, min(n, (first + step) * TILE_ROWS))
        _unpack_codes(tiles[first : first + step], perm, layout, codes[rows])
    scales, zeros = _unpack_scales_zeros(layout, tiles)
    return QuantMatrix(codes, scales.T[:n], zeros.T[:n], _groups_of(perm, layout))


def pack_tiles(matrix: QuantMatrix, layout: TileLayout, perm: Array) -> Bytes:
    """Make the tiles of some rows of a matrix: its next 16, 32, …, or its last ones.

    Args:
        matrix: those rows only.
        layout: of the whole matrix.
        perm: from `input_order`.
    """
    tiles = np.zeros((-(-len(matrix.codes) // TILE_ROWS), layout.tile_bytes), dtype=np.uint8)
    _pack_codes(matrix.codes, perm, layout, tiles)
    _pack_scales_zeros(matrix.scales.T, matrix.zeros.T, layout, tiles)
    return tiles.reshape(-1)


def pack_end(layout: TileLayout, perm: Array | None) -> Bytes:
    """What follows the last tile of a blob: the permutation where there is one, and zeros."""
    end = np.zeros(layout.nbytes - layout.perm_offset, dtype=np.uint8)
    if layout.permuted and perm is not None:
        end[: 4 * layout.padded_in] = perm.astype("<i4").view(np.uint8)
    return end


def unpack_tiles(data: Bytes, layout: TileLayout, perm: Array) -> QuantMatrix:
    """The rows of some whole tiles, those included that pad the last one; the inverse of `pack_tiles`."""
    tiles = data.reshape(-1, layout.tile_bytes)
    codes = np.empty((len(tiles) * TILE_ROWS, layout.shape[1]), dtype=np.uint8)
    _unpack_codes(tiles, perm, layout, codes)
    scales, zeros = _unpack_scales_zeros(layout, tiles)
    return QuantMatrix(codes, scales.T, zeros.T, _groups_of(perm, layout))


def dequantize(matrix: QuantMatrix) -> npt.NDArray[np.float32]:
    """The matrix as numbers: (N, K) float32, W = (code - (zero + 1)) * scale."""
    weights = matrix.codes.astype(np.float32)
    weights -= matrix.zeros[:, matrix.groups].astype(np.float32) + np.float32(1)
    weights *= matrix.scales[:, matrix.groups].astype(np.float32)
    return weights


def pack_gptq(words: GptqMatrix, layout: TileLayout) -> Bytes:
    """Make the tile16 blob of a matrix given in GPTQ words.

    Returns:
        (layout.nbytes,) uint8, the same as `pack` gives of the same matrix.
    """
    return np.concatenate(list(pack_gptq_pieces(words, layout)))


def pack_gptq_pieces(words: GptqMatrix, layout: TileLayout) -> Iterator[Bytes]:
    """Make the tile16 blob piece by piece: new arrays of at most 16 MiB (or one tile), in order."""
    perm = input_order(layout, words.g_idx) if layout.permuted else None
    yield from pack_gptq_tiles(words, layout, perm)
    if layout.nbytes > layout.perm_offset:
        yield pack_end(layout, perm)


def pack_gptq_tiles(words: GptqMatrix, layout: TileLayout, perm: Array | None) -> Iterator[Bytes]:
    """Make the tiles of some rows of a matrix, as `pack_tiles` does, from GPTQ words and piece by piece.

    Args:
        words: those rows only.
        layout: of the whole matrix.
        perm: from `input_order`, None where the layout has none.
    """
    n_tiles = -(-words.qweight.shape[1] // TILE_ROWS)
    step = max(1, _PIECE_BYTES // layout.tile_bytes)
    for first in range(0, n_tiles, step):
        count = min(step, n_tiles - first)
        rows = slice(first * TILE_ROWS, (first + count) * TILE_ROWS)
        tiles = np.zeros((count, layout.tile_bytes), dtype=np.uint8)
        qweight = words.qweight[:, rows]
        if perm is not None:
            qweight = _to_positions(qweight, perm, layout.bits)
        _words_to_tiles(qweight, layout, tiles)
        qzeros = words.qzeros[:, first * TILE_ROWS // layout.block : (first + count) * TILE_ROWS // layout.block]
        _pack_scales_zeros(words.scales[:, rows], gptq_zeros(qzeros, layout.bits), layout, tiles)
        yield tiles.reshape(-1)


def unpack_gptq(blob: Bytes, layout: TileLayout) -> GptqMatrix:
    """The GPTQ words of a tile16 blob; the inverse of `pack_gptq`.

    Raises:
        CheckpointError: the blob's permutation is broken, or its sizes do not fill GPTQ's words.
    """
    n, k = layout.shape
    if n % layout.block or k % layout.block:
        raise CheckpointError(
            f"a matrix of {n} x {k} does not fill the words of GPTQ, which hold {layout.block} codes each."
        )
    perm = read_perm(blob, layout)
    tiles = _tiles(blob, layout)
    qweight = np.empty((k // layout.block, n), dtype=np.int32)
    if layout.permuted:
        step = _tiles_at_once(layout)
        for first in range(0, layout.n_tiles, step):
            rows = slice(first * TILE_ROWS, min(n, (first + step) * TILE_ROWS))
            moved = np.empty((layout.padded_in // layout.block, rows.stop - rows.start), dtype=np.int32)
            _tiles_to_words(tiles[first : first + step], layout, moved)
            qweight[:, rows] = _from_positions(moved, perm, layout)
    else:
        _tiles_to_words(tiles, layout, qweight)
    scales, zeros = _unpack_scales_zeros(layout, tiles)
    return GptqMatrix(qweight, gptq_words(zeros[:, :n].T, layout.bits).T, scales[:, :n], _groups_of(perm, layout))


def gptq_codes(words: Array, bits: Bits) -> Bytes:
    """Spread GPTQ words along the first axis: (R, N) int32 -> (R * 32 / bits, N) uint8."""
    rows, n = words.shape
    in_bytes = np.ascontiguousarray(words).view(np.uint8).reshape(rows, n, 4).transpose(0, 2, 1)  # lowest byte first
    codes = np.empty((rows, 4, 8 // bits, n), dtype=np.uint8)
    if bits == 8:
        codes[:, :, 0] = in_bytes
    else:
        np.bitwise_and(in_bytes, 15, out=codes[:, :, 0])
        np.right_shift(in_bytes, 4, out=codes[:, :, 1])
    return codes.reshape(rows * (32 // bits), n)


def gptq_words(codes: Array, bits: Bits) -> npt.NDArray[np.int32]:
    """Pack codes along the first axis, lowest bits first: (K, N) uint8 -> (K * bits / 32, N) int32."""
    k, n = codes.shape
    spread = codes.reshape(k * bits // 32, 4, 8 // bits, n)
    in_bytes = spread[:, :, 0] if bits == 8 else spread[:, :, 0] | spread[:, :, 1] << 4
    return np.ascontiguousarray(in_bytes.transpose(0, 2, 1)).view("<i4")[:, :, 0]


def gptq_zeros(qzeros: Array, bits: Bits) -> Bytes:
    """Spread the zero words: (G, N * bits / 32) int32 -> (G, N) uint8, the zero points minus 1."""
    flat: Bytes = np.ascontiguousarray(qzeros).view(np.uint8)  # (G, N * bits / 8), lowest bits first
    if bits == 8:
        return flat
    spread: Bytes = np.stack([flat & np.uint8(15), flat >> np.uint8(4)], axis=-1).reshape(flat.shape[0], -1)
    return spread


def read_perm(blob: Bytes, layout: TileLayout) -> npt.NDArray[np.int32]:
    """Which input lies at each position of a blob: (padded_in,) int32, -1 at padding; raises as `parse_perm` does."""
    return parse_perm(blob[layout.perm_offset :], layout)


def parse_perm(end: Bytes, layout: TileLayout) -> npt.NDArray[np.int32]:
    """The same from what follows the last tile, made by `pack_end`.

    Raises:
        CheckpointError: it does not name every input once, or pads elsewhere than at the ends of groups.
    """
    k = layout.shape[1]
    if not layout.permuted:
        return np.arange(k, dtype=np.int32)
    perm = end[: 4 * layout.padded_in].view("<i4")
    real = perm != -1
    inputs = perm[real]
    if len(inputs) != k or inputs.min() < 0 or inputs.max() >= k or (np.bincount(inputs, minlength=k) != 1).any():
        raise CheckpointError(f"the permutation of a matrix does not name each of its {k} inputs once.")
    if not np.array_equal(real, input_order(layout, plain_groups(k, layout.group_size)) != -1):
        raise CheckpointError("the permutation of a matrix has padding where its groups need inputs.")
    return perm


def _check_shapes(matrix: QuantMatrix, layout: TileLayout) -> None:
    n, k = layout.shape
    g = layout.n_groups
    wanted = {"codes": (n, k), "scales": (n, g), "zeros": (n, g), "groups": (k,)}
    for name, shape in wanted.items():
        found = getattr(matrix, name).shape
        if found != shape:
            raise ShapeError(f"{name} has shape {found}; a matrix of {n} x {k} in {g} groups needs {shape}.")


def _tiles(blob: Bytes, layout: TileLayout) -> Bytes:
    """The tiles of a blob: (n_tiles, tile_bytes), a view."""
    if blob.shape != (layout.nbytes,) or blob.dtype != np.uint8:
        raise ShapeError(f"a blob is {blob.dtype} {blob.shape}; its layout needs uint8 ({layout.nbytes},).")
    tiles: Bytes = blob[: layout.perm_offset].reshape(layout.n_tiles, layout.tile_bytes)
    return tiles


def _tiles_at_once(layout: TileLayout) -> int:
    """Tiles whose codes, spread to bytes, are worked on at a time."""
    return max(1, _CODES_AT_ONCE // (TILE_ROWS * layout.padded_in))


def _to_positions(qweight: Array, perm: Array, bits: Bits) -> npt.NDArray[np.int32]:
    """GPTQ words of inputs in their own order -> words of positions, padding included."""
    codes = gptq_codes(qweight, bits)
    real = perm >= 0
    if real.all():
        return gptq_words(codes[perm], bits)
    moved = np.zeros((len(perm), codes.shape[1]), dtype=np.uint8)
    moved[real] = codes[perm[real]]
    return gptq_words(moved, bits)


def _from_positions(words: Array, perm: Array, layout: TileLayout) -> npt.NDArray[np.int32]:
    """The inverse of `_to_positions`."""
    moved = gptq_codes(words, layout.bits)
    codes = np.empty((layout.shape[1], moved.shape[1]), dtype=np.uint8)
    real = perm >= 0
    codes[perm[real]] = moved if real.all() else moved[real]
    return gptq_words(codes, layout.bits)


def _pack_codes(codes: Bytes, perm: Array, layout: TileLayout, tiles: Bytes) -> None:
    """Codes (rows, K) into the code sections of their tiles."""
    spread = np.zeros((len(tiles) * TILE_ROWS, layout.padded_in), dtype=np.uint8)
    real = perm >= 0
    if real.all():
        np.take(codes, perm, axis=1, out=spread[: len(codes)])
    else:
        spread[: len(codes), real] = codes[:, perm[real]]
    blocks: Array = spread.reshape(len(tiles), TILE_ROWS, -1, layout.block)
    if layout.bits == 4:
        blocks = blocks[..., :4] | blocks[..., 4:] << 4
    section = tiles[:, : layout.code_bytes].reshape(len(tiles), -1, TILE_ROWS, 4)
    section[...] = blocks.transpose(0, 2, 1, 3)


def _unpack_codes(tiles: Bytes, perm: Array, layout: TileLayout, codes: Bytes) -> None:
    """The code sections of tiles into codes (rows, K)."""
    section = tiles[:, : layout.code_bytes].reshape(len(tiles), -1, TILE_ROWS, 4).transpose(0, 2, 1, 3)
    if layout.bits == 4:
        section = np.concatenate([section & 15, section >> 4], axis=-1)
    spread = section.reshape(len(tiles) * TILE_ROWS, layout.padded_in)[: len(codes)]
    real = perm >= 0
    codes[:, perm[real]] = spread[:, real] if not real.all() else spread


def _pack_scales_zeros(scales: Array, zeros: Array, layout: TileLayout, tiles: Bytes) -> None:
    """Scales and zeros, both (G, rows), into their sections."""
    n, g = scales.shape[1], layout.n_groups
    padded_scales = np.zeros((g, len(tiles) * TILE_ROWS), dtype="<f2")
    padded_scales[:, :n] = scales
    padded_zeros = np.zeros((g, len(tiles) * TILE_ROWS), dtype=np.uint8)
    padded_zeros[:, :n] = zeros
    by_tile = np.ascontiguousarray(padded_scales.reshape(g, -1, TILE_ROWS).transpose(1, 0, 2))
    start = layout.code_bytes
    tiles[:, start : start + g * TILE_ROWS * 2] = by_tile.view(np.uint8).reshape(len(tiles), -1)
    zero_tiles: Array = padded_zeros.reshape(g, -1, TILE_ROWS).transpose(1, 0, 2)
    if layout.bits == 4:
        zero_tiles = zero_tiles[..., :8] | zero_tiles[..., 8:] << 4
    start += layout.scale_bytes
    tiles[:, start : start + g * TILE_ROWS * layout.bits // 8] = zero_tiles.reshape(len(tiles), -1)


def _unpack_scales_zeros(layout: TileLayout, tiles: Bytes) -> tuple[npt.NDArray[np.float16], Bytes]:
    """Scales and zeros of tiles, both (G, rows), padding rows included."""
    g = layout.n_groups
    start = layout.code_bytes
    raw = np.ascontiguousarray(tiles[:, start : start + g * TILE_ROWS * 2]).view("<f2")
    scales = raw.reshape(len(tiles), g, TILE_ROWS).transpose(1, 0, 2).reshape(g, -1)
    start += layout.scale_bytes
    zeros = tiles[:, start : start + g * TILE_ROWS * layout.bits // 8].reshape(len(tiles), g, -1)
    if layout.bits == 4:
        zeros = np.concatenate([zeros & 15, zeros >> 4], axis=-1)
    return scales, zeros.transpose(1, 0, 2).reshape(g, -1)


def _groups_of(perm: Array, layout: TileLayout) -> npt.NDArray[np.int32]:
    """The group of each input, from the order of inputs."""
    groups = np.empty(layout.shape[1], dtype=np.int32)
    real = perm >= 0
    groups[perm[real]] = (np.arange(layout.padded_in) // layout.padded_group)[real]
    return groups


def _words_to_tiles(qweight: Array, layout: TileLayout, tiles: Bytes) -> None:
    """GPTQ words (blocks, N) into the code sections, four bytes at a time."""
    n = qweight.shape[1]
    words = qweight.view(np.uint32)
    target = tiles[:, : layout.code_bytes].view(np.uint32).reshape(len(tiles), -1, TILE_ROWS)
    whole = n // TILE_ROWS
    rows_at_once = max(1, _WORDS_AT_ONCE // max(n, 1))
    for first in range(0, len(words), rows_at_once):
        some = words[first : first + rows_at_once]
        if layout.bits == 4:
            some = _interleave_nibbles(some)
        chunks = some[:, : whole * TILE_ROWS].reshape(len(some), whole, TILE_ROWS)
        target[:whole, first : first + rows_at_once] = chunks.transpose(1, 0, 2)
        if n % TILE_ROWS:
            target[whole, first : first + rows_at_once, : n % TILE_ROWS] = some[:, whole * TILE_ROWS :]


def _tiles_to_words(tiles: Bytes, layout: TileLayout, qweight: npt.NDArray[np.int32]) -> None:
    """The code sections into GPTQ words (blocks, N)."""
    n = qweight.shape[1]
    words = qweight.view(np.uint32)
    source = tiles[:, : layout.code_bytes].view(np.uint32).reshape(len(tiles), -1, TILE_ROWS)
    rows_at_once = max(1, _WORDS_AT_ONCE // max(n, 1))
    for first in range(0, len(words), rows_at_once):
        some = source[:, first : first + rows_at_once].transpose(1, 0, 2)
        flat = np.ascontiguousarray(some).reshape(some.shape[0], -1)[:, :n]
        words[first : first + rows_at_once] = _separate_nibbles(flat) if layout.bits == 4 else flat


def _interleave_nibbles(words: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    """Nibbles 0 1 2 3 4 5 6 7 become 0 4 1 5 2 6 3 7, as the low and high halves of four bytes."""
    return _swap_bits(_swap_bits(words, 8, 0x0000FF00), 4, 0x00F000F0)


def _separate_nibbles(words: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    """The inverse of `_interleave_nibbles`."""
    return _swap_bits(_swap_bits(words, 4, 0x00F000F0), 8, 0x0000FF00)


def _swap_bits(words: npt.NDArray[np.uint32], distance: int, mask: int) -> npt.NDArray[np.uint32]:
    """Exchange the bits under `mask` with those `distance` places above."""
    move = words >> np.uint32(distance)
    move ^= words
    move &= np.uint32(mask)
    swapped = words ^ move
    move <<= np.uint32(distance)
    swapped ^= move
    return swapped
