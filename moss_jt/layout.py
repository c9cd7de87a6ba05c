"""Where each byte of a weight matrix lies in our files and in memory: the one truth for all rooms.

A matrix is (N, K): N outputs, K inputs, y = x W^T. It is stored as one contiguous blob whose size
is a multiple of 4096 bytes and which starts at a multiple of 4096 in its file, so that it can be
read with direct I/O. There are two layouts.

**rows**: floating point, row-major, little-endian, then zeros up to the next multiple of 4096.

**tile16**: int4 or int8 with a scale and a zero per group of inputs and output row. Rows are taken
16 at a time; everything that 16 rows need lies together (a tile), so a matrix is split between
places by cutting between tiles. A tile holds, each section padded with zeros to 64 bytes:

    codes   for every block of B inputs (B = 8 for int4, 4 for int8) 64 bytes; byte 4*r + j is, of row r:
              int8: code of input 4*b + j
              int4: low nibble code of input 8*b + j, high nibble code of input 8*b + 4 + j
    scales  for every group 16 float16, one a row
    zeros   for every group, what GPTQ stores: the zero point minus 1
              int8: 16 bytes, one a row;  int4: 8 bytes, low nibble row i, high nibble row i + 8

Each group is padded to whole blocks of B inputs, so a block never holds two groups; rows are padded
to whole tiles with zero codes, scales and zeros. The inputs lie in the order of `perm`, which
follows the last tile as int32 (padded_in entries, -1 where a group was padded) when it is not the
identity ("permuted": act-order, or groups that are not whole blocks). Padding codes are 0 and are
multiplied with an input of 0.

    W[n, k] = (code[n, p] - (zero[g(p), n] + 1)) * scale[g(p), n]   where perm[p] = k, g(p) the group of p
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moss_jt.config import Bits, FloatType
from moss_jt.errors import CheckpointError

ALIGNMENT = 4096  # of blobs, in file and in size
TILE_ROWS = 16
CHUNK_BYTES = 64  # codes of one block of inputs for all rows of a tile
ITEM_BYTES: dict[str, int] = {"float16": 2, "bfloat16": 2, "float32": 4}


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple


@dataclass(frozen=True)
class RowsLayout:
    """A floating-point matrix stored row after row."""

    shape: tuple[int, int]
    dtype: FloatType

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.shape[1] * ITEM_BYTES[self.dtype]

    @property
    def nbytes(self) -> int:
        """Bytes of the blob, padding included."""
        return round_up(self.shape[0] * self.row_bytes, ALIGNMENT)

    def to_dict(self) -> dict[str, Any]:
        """For the metadata of a file; `layout_from_dict` reads it."""
        return {"layout": "rows", "shape": list(self.shape), "dtype": self.dtype}


@dataclass(frozen=True)
class TileLayout:
    """A quantised matrix stored in tiles of 16 rows; see the head of this file.

    Attributes:
        shape: (N, K).
        bits: 4 or 8.
        group_size: inputs of a group, 1 to K; the last group may be smaller.
        permuted: whether `perm` is stored.
    """

    shape: tuple[int, int]
    bits: Bits
    group_size: int
    permuted: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.group_size <= self.shape[1]:
            raise CheckpointError(f"group size {self.group_size} does not fit a matrix of {self.shape[1]} inputs.")
        if self.padded_in != self.shape[1] and not self.permuted:
            raise CheckpointError(
                f"groups of {self.group_size} inputs are not whole blocks of {self.block}; such a matrix needs its permutation."
            )

    @property
    def block(self) -> int:
        """B, inputs in one 64-byte chunk of codes."""
        return 32 // self.bits

    @property
    def n_groups(self) -> int:
        """G, groups of inputs."""
        return -(-self.shape[1] // self.group_size)

    @property
    def padded_group(self) -> int:
        """Positions that one full group takes up."""
        return round_up(self.group_size, self.block)

    @property
    def padded_in(self) -> int:
        """Positions along the inputs, padding of the groups included."""
        full, rest = divmod(self.shape[1], self.group_size)
        return full * self.padded_group + round_up(rest, self.block)

    @property
    def n_tiles(self) -> int:
        """Tiles of 16 rows."""
        return -(-self.shape[0] // TILE_ROWS)

    @property
    def code_bytes(self) -> int:
        """Bytes of the codes of one tile."""
        return self.padded_in // self.block * CHUNK_BYTES

    @property
    def scale_bytes(self) -> int:
        """Bytes of the scales of one tile."""
        return round_up(self.n_groups * TILE_ROWS * 2, CHUNK_BYTES)

    @property
    def zero_bytes(self) -> int:
        """Bytes of the zeros of one tile."""
        return round_up(self.n_groups * TILE_ROWS * self.bits // 8, CHUNK_BYTES)

    @property
    def tile_bytes(self) -> int:
        """Bytes of one tile: codes, scales, zeros."""
        return self.code_bytes + self.scale_bytes + self.zero_bytes

    @property
    def perm_offset(self) -> int:
        """Where `perm` starts in the blob."""
        return self.n_tiles * self.tile_bytes

    @property
    def nbytes(self) -> int:
        """Bytes of the blob, padding included."""
        return round_up(self.perm_offset + (self.padded_in * 4 if self.permuted else 0), ALIGNMENT)

    def to_dict(self) -> dict[str, Any]:
        """For the metadata of a file; `layout_from_dict` reads it."""
        return {
            "layout": "tile16",
            "shape": list(self.shape),
            "bits": self.bits,
            "group_size": self.group_size,
            "permuted": self.permuted,
        }


@dataclass(frozen=True)
class PlainLayout:
    """A small tensor (norm, bias) stored as safetensors stores it."""

    shape: tuple[int, ...]
    dtype: FloatType

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        count = 1
        for size in self.shape:
            count *= size
        return count * ITEM_BYTES[self.dtype]


Layout = RowsLayout | TileLayout | PlainLayout


def layout_from_dict(values: dict[str, Any]) -> RowsLayout | TileLayout:
    """Read what `to_dict` wrote.

    Raises:
        CheckpointError: a key is missing, unknown or has a value that cannot work.
    """
    try:
        n, k = (int(v) for v in values["shape"])
        if n < 1 or k < 1:
            raise CheckpointError(f"shape {values['shape']} is not that of a matrix.")
        if values["layout"] == "rows":
            if values["dtype"] not in ITEM_BYTES:
                raise CheckpointError(f"dtype {values['dtype']!r} is not one of {', '.join(ITEM_BYTES)}.")
            return RowsLayout((n, k), values["dtype"])
        if values["layout"] == "tile16":
            if values["bits"] not in (4, 8):
                raise CheckpointError(f"bits {values['bits']!r} is neither 4 nor 8.")
            return TileLayout((n, k), values["bits"], int(values["group_size"]), bool(values["permuted"]))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"the description of a matrix is broken ({error!r}): {values}") from error
    raise CheckpointError(f"layout {values['layout']!r} is not known to this version of moss-jt. Update moss-jt.")
